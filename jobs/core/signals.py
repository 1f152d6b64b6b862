"""What SIGTERM does to a job: it ends as with Ctrl-C, after its clean-up. The one place that sets handlers."""

import asyncio
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")


def interrupt_on_sigterm() -> None:
    """Let SIGTERM raise KeyboardInterrupt in the main thread, as Ctrl-C does (`ray job stop` sends SIGTERM)."""
    signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@contextmanager
def keep_handler() -> Iterator[None]:
    """Restore SIGTERM's handler after the block: ray.init sets its own. Outside the main thread: do nothing."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def run_async(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine; SIGTERM ends it as Ctrl-C does: it is cancelled, cleans up, and KeyboardInterrupt is raised."""
    if threading.current_thread() is not threading.main_thread():
        return asyncio.run(main)  # only the main thread may set handlers
    before, ended = signal.getsignal(signal.SIGTERM), False

    async def guarded() -> T:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, end(task))  # SIGINT may be ignored
        return await main

    def end(task: asyncio.Task) -> Callable[[], None]:
        def cancel() -> None:
            nonlocal ended
            ended = True
            task.cancel()

        return cancel

    try:
        return asyncio.run(guarded())
    except asyncio.CancelledError:
        if ended:
            raise KeyboardInterrupt from None
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
