"""The log on a terminal: nothing in it is executed, forged, or without end."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
from vmbus.cli.logs import ALL_BURST, BURST, HarmlessFormatter, RateLimit, StandardError

CLIPBOARD = "\x1b]52;c;cm0gLXJmIH4=\x07"


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def logger_of(clock: Callable[[], float], level: int = logging.INFO) -> logging.Logger:
    """Return a logger of its own with the command line's handler."""
    handler = StandardError()
    handler.setFormatter(HarmlessFormatter("vmbus: %(message)s"))
    handler.addFilter(RateLimit(clock))
    logger = logging.Logger("guest", level)
    logger.addHandler(handler)
    return logger


def test_text_of_a_guest_is_shown_and_not_executed(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logger_of(Clock())
    logger.warning("the guest reports a crash: %s", f"{CLIPBOARD}\nvmbus: all is well")
    try:
        raise ValueError(f"{CLIPBOARD}\nvmbus: forged")
    except ValueError:
        logger.exception("internal error")
    lines = capsys.readouterr().err.splitlines()
    assert not any("\x1b" in line or "\x07" in line for line in lines)
    assert [line for line in lines if line.startswith("vmbus: ")] == [
        r"vmbus: the guest reports a crash: \x1b]52;c;cm0gLXJmIH4=\x07",
        "vmbus: internal error",
    ]


def test_a_guest_that_connects_all_the_time_gets_few_lines(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    logger = logger_of(clock)
    for number in range(2700):
        logger.info("connected: version %s", number)
    assert len(capsys.readouterr().err.splitlines()) == BURST
    clock.now += 0.5
    logger.info("connected: version %s", "x")
    assert capsys.readouterr().err == f"vmbus: connected: version x ({2700 - BURST} more like this)\n"
    logger.warning("something else")
    assert capsys.readouterr().err == "vmbus: something else\n"


def test_all_lines_together_are_bounded(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logger_of(Clock())
    for number in range(5 * ALL_BURST):
        logger.warning(f"a message that is made of what the guest sent: {number}")
    assert len(capsys.readouterr().err.splitlines()) == ALL_BURST


def test_who_asks_for_every_step_gets_every_step(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logger_of(Clock(), logging.DEBUG)
    for number in range(4 * BURST):
        logger.debug("QMP event %d", number)
    assert len(capsys.readouterr().err.splitlines()) == 4 * BURST
