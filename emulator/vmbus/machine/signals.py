"""The signals that end a program, as events of its loop: what it made is removed, whichever of them comes, and when.

The default action of SIGTERM, SIGHUP and SIGQUIT ends a process on the spot. Its run directory and its guest's memory
would stay.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import signal
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, TypeVar

Result = TypeVar("Result")

SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM)

_actions: list[Callable[[int], object]] = []
"""The actions of the blocks that are being executed, the innermost last."""
_before: dict[signal.Signals, Any] = {}
"""The handlers that the process had for the signals that an event loop handles now."""


@contextlib.contextmanager
def handled(action: Callable[[int], object]) -> Iterator[None]:
    """Call ``action`` with the number of each signal that comes in the block, in place of an outer block's action.

    After the last block the process has its handlers of before.
    """
    loop = asyncio.get_running_loop()
    try:
        if not _actions:
            _install(loop)
        _actions.append(action)
        try:
            yield
        finally:
            _actions.remove(action)
    finally:
        if not _actions:
            _remove(loop)


def _install(loop: asyncio.AbstractEventLoop) -> None:
    for number in SIGNALS:
        if not _ignored(number):
            handler = signal.getsignal(number)
            loop.add_signal_handler(number, functools.partial(_came, number))
            _before[number] = handler


def _remove(loop: asyncio.AbstractEventLoop) -> None:
    for number, handler in _before.items():
        loop.remove_signal_handler(number)
        if handler is not None:  # one that was not set by Python, which can neither name nor set it
            signal.signal(number, handler)
    _before.clear()


def _ignored(number: signal.Signals) -> bool:
    """Return whether the parent process chose that the signal is ignored, as ``nohup`` does."""
    return number is signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN


def _came(number: int) -> None:
    if _actions:
        _actions[-1](number)
    else:  # it came in the block, and is handled after it
        signal.raise_signal(number)


def run(work: Coroutine[Any, Any, int]) -> int:
    """Run ``work`` in a new event loop and return its result, the exit status of the process.

    The first signal that nothing in ``work`` handles cancels it; the status is then 128 + its number, as in a shell.
    """
    return asyncio.run(_run(work))


async def _run(work: Coroutine[Any, Any, int]) -> int:
    task = asyncio.current_task()
    came: list[int] = []

    def cancel(number: int) -> None:
        if not came and task is not None:
            task.cancel()
        came.append(number)

    with handled(cancel):
        try:
            return await work
        except asyncio.CancelledError:
            if not came:
                raise
            return 128 + came[0]


async def finished(work: Coroutine[Any, Any, Result]) -> Result:
    """Await ``work`` to its end, even if this task is cancelled meanwhile: it removes what must not stay."""
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while True:
        try:
            result = await asyncio.shield(task)
        except asyncio.CancelledError as error:
            if task.done():
                raise
            cancelled = error
        else:
            break
    if cancelled is not None:
        raise cancelled
    return result
