"""Runs a driver in an event loop, and lets Ctrl-C stop it without losing what is on its way."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Protocol

from .dispatch import Outcome


class Stoppable(Protocol):
    """What Ctrl-C is told to."""

    def stop(self, stopped: str, why: str) -> None:
        """Ends the run: nothing new is asked, calls in flight are waited for."""

    def drop(self) -> None:
        """Gives up the calls in flight too."""


def finished(driver: Stoppable, work: Callable[[], Awaitable[Outcome]], write: Callable[[str], None]) -> Outcome:
    """Runs `work` to its end, in its own thread if an event loop is already running, as in a notebook.

    The first Ctrl-C waits for the calls in flight, the second gives them up.

    Args:
        write: prints a line.
    """
    loop, pressed = None, 0

    def stop() -> None:
        write("Stopping: waiting for the answers on their way, which are kept. Press Ctrl-C again to give them up.")
        driver.stop("user", "stopped by you")

    def interrupt(*_) -> None:  # prints nothing itself: the signal may arrive in the middle of printing
        nonlocal pressed
        pressed += 1
        loop.call_soon_threadsafe(stop if pressed == 1 else driver.drop)

    async def main() -> Outcome:
        nonlocal loop
        loop, before = asyncio.get_running_loop(), {}
        if threading.current_thread() is threading.main_thread():
            before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            return await work()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(main())
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(asyncio.run, main())
        while True:
            try:
                return future.result()
            except KeyboardInterrupt:
                if future.done():
                    raise
                with suppress(RuntimeError):  # the loop has just ended
                    interrupt()
