"""A task that fails unseen fails its test, and the next test does not suffer for it."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

CONFTEST = Path(__file__).parents[1] / "conftest.py"
TESTS = """
import asyncio

async def fails():
    raise ValueError("seen by no one")

async def test_a_task_fails():
    task = asyncio.create_task(fails())
    await asyncio.sleep(0.01)
    del task

async def test_a_task_fails_at_the_end_of_the_loop():
    async def story():
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            raise ValueError("while cancelled") from None
    asyncio.create_task(story())
    await asyncio.sleep(0)

async def test_a_task_is_awaited():
    await asyncio.gather(fails(), return_exceptions=True)

def test_no_loop():
    pass
"""


def test_an_exception_that_no_one_retrieves_fails_its_test(pytester: pytest.Pytester) -> None:
    pytester.makeconftest(CONFTEST.read_text())
    pytester.makeini("[pytest]\nasyncio_mode = auto\nasyncio_default_fixture_loop_scope = function\n")
    pytester.makepyfile(TESTS)
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider")
    result.assert_outcomes(passed=3, failed=1, errors=1)
    result.stdout.fnmatch_lines(["*ValueError: while cancelled*", "*ValueError: seen by no one*"])
