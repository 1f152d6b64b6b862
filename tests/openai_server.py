"""An OpenAI-compatible server on loopback that answers what a test wants."""

import asyncio
import json

OUTPUT = '{"reason": "same", "label": 3}'


def completion(text: str | None, logprobs: list | None = None) -> bytes:
    """Return a chat completion's body."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "logprobs": {"content": logprobs}}
    return json.dumps({"id": "1", "choices": [choice]}).encode()


def http(body: bytes, status: str = "200 OK", headers: str = "", length: int | None = None) -> bytes:
    """Return a whole HTTP response; `length` lies about its body's."""
    size = len(body) if length is None else length
    return f"HTTP/1.1 {status}\r\nContent-Length: {size}\r\n{headers}\r\n".encode() + body


class Server:
    """Answers the n-th connection with the n-th item: bytes, or seconds to say nothing for; keeps what it was sent."""

    def __init__(self, *script: bytes | float | list):
        self.script, self.heard = list(script), []

    async def __aenter__(self):
        self.server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}/v1"
        return self

    async def __aexit__(self, *_):
        self.server.close()

    async def serve(self, reader, writer):
        """Read one request, play one item, hang up."""
        head = await reader.readuntil(b"\r\n\r\n")
        size = next(
            int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")
        )
        self.heard.append((head, json.loads(await reader.readexactly(size))))
        item = self.script.pop(0)
        for part in item if isinstance(item, list) else [item]:
            if isinstance(part, bytes):
                writer.write(part)
            else:
                await asyncio.sleep(part)
        writer.close()


WHOLE = http(completion(OUTPUT))
