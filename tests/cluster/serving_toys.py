"""Plain classes for the tests of serving: each can do one thing that goes wrong on real machines."""

import asyncio
import os
import time


class Echo:
    """Works; `http` says what it was asked."""

    def __init__(self, sign: str):
        self._sign, self._sick = sign, False

    async def slowly(self, number: int, seconds: float) -> str:
        await asyncio.sleep(seconds)
        return f"{self._sign}{number}"

    def process(self) -> int:
        return os.getpid()

    def fail(self, text: str) -> None:
        raise KeyError(text)

    def sicken(self) -> None:
        self._sick = True

    def check_health(self) -> None:
        if self._sick:
            raise RuntimeError("sick")

    async def http(self, method: str, path: str, body: bytes) -> tuple[int, dict]:
        return 418, {"method": method, "path": path, "body": body.decode()}


class Refuses:
    """Cannot be built."""

    def __init__(self, kind: str):
        raise {"ValueError": ValueError, "OSError": OSError}[kind]("the checkpoint is empty:\nno weights")


class Slow:
    """Takes a minute to build, as a large model does."""

    def __init__(self) -> None:
        time.sleep(60)
