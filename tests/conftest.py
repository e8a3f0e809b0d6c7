"""What holds for every test: the order among workers, and exceptions of tasks that nothing awaited.

asyncio reports such an exception when the task is collected, and only to its logger: without this, the task's work
is missing and the test passes, or waits until its timeout.
"""

from __future__ import annotations

import gc
import inspect
import logging
import os
from collections.abc import Generator, Sequence

import pytest
from vmbus import refusals
from vmbus.sandbox import confinement


@pytest.fixture(autouse=True)
def fresh_line_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each test log each reason: the limit is one for the process."""
    monkeypatch.setattr(refusals, "OF_PROCESS", refusals.LineLimit())


@pytest.fixture(autouse=True)
def unconfined(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no command that runs in this process confine it or, by ``--sandbox off``, free what later tests start."""
    monkeypatch.setattr(confinement, "confine_this_process", lambda limits: None)
    monkeypatch.setattr(confinement._Mode, "enabled", True)


class LostExceptions(logging.Handler):
    """What event loops reported to asyncio's logger."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.found: list[str] = []
        self.setFormatter(logging.Formatter("%(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(self.format(record))

    def check(self, item: pytest.Item) -> None:
        """Fail if a loop reported an exception since the last call."""
        if inspect.iscoroutinefunction(getattr(item, "obj", None)):
            gc.collect()  # a task and its exception's traceback refer to each other
        found, self.found = self.found, []
        if found:
            pytest.fail("the event loop reported:\n" + "\n".join(found), pytrace=False)


_lost = LostExceptions()


def long_ones_first(items: Sequence[pytest.Item], workers: int) -> list[pytest.Item]:
    """Return ``items`` in an order in which no worker is left with a long test when the others have ended.

    With ``--dist worksteal`` each of ``workers`` gets one share of the list, and takes from the end of another's when
    its own is done. So each share begins with its part of the guests, module by module, and ends with short tests.
    """
    modules: dict[str, list[pytest.Item]] = {}
    short: list[pytest.Item] = []
    for item in items:
        if item.get_closest_marker("guest") is None:
            short.append(item)
        else:
            modules.setdefault(item.nodeid.partition("::")[0], []).append(item)
    guests: list[list[pytest.Item]] = [[] for _ in range(workers)]
    for module in sorted(modules.values(), key=len, reverse=True):
        min(guests, key=len).extend(module)
    found: list[pytest.Item] = []
    for number, share in enumerate(guests, 1):
        size = len(items) * number // workers - len(found) - len(share)
        found += share
        found += short[: max(size, 0)]
        del short[: max(size, 0)]
    return found + short


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        items[:] = long_ones_first(items, workers)


def pytest_configure() -> None:
    logging.getLogger("asyncio").addHandler(_lost)


def pytest_unconfigure() -> None:
    logging.getLogger("asyncio").removeHandler(_lost)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, object, object]:
    result = yield  # a test that fails by itself says more than what it left behind
    _lost.check(item)
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, object, object]:
    """Check once more: fixtures and the end of the loop have ended tasks by now."""
    result = yield
    _lost.check(item)
    return result
