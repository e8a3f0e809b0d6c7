"""Work that a guest can ask for in a loop, and that is done by one task at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any


class Once:
    """Work of which there is one task at most.

    ``begin`` starts a task. ``again``: a request that comes while the work is done has it done once more; otherwise
    what is under way answers that request, too.
    """

    def __init__(
        self,
        begin: Callable[[Coroutine[Any, Any, None]], asyncio.Task[Any]],
        work: Callable[[], Coroutine[Any, Any, Any]],
        *,
        again: bool,
    ) -> None:
        self._begin = begin
        self._work = work
        self._repeats = again
        self._again = False
        self._task: asyncio.Task[Any] | None = None

    def request(self) -> None:
        """Have the work done."""
        if self._task is None or self._task.done():
            self._again = False
            self._task = self._begin(self._run())
        else:
            self._again = self._repeats

    async def _run(self) -> None:
        await self._work()
        while self._again:
            self._again = False
            await self._work()
