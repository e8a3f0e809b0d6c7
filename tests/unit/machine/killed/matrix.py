"""A guest's session, and all the steps before which its emulator can be killed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.unit.machine.killed.guest import KilledGuest
from tests.unit.machine.killed.machine import Machine

TAKING_OVER = 12
"""Steps of an emulator that takes a guest over, and some more."""


def ordinary(number: int, stride: int) -> tuple[pytest.MarkDecorator, ...]:
    """Mark all but every ``stride``-th case as one that only the full run has."""
    return () if number % stride == 0 else (pytest.mark.full,)


class Matrix:
    """A ``session`` of ``steps``: it returns what the guest has seen, which no death of an emulator may change.

    ``lines``: the devices, or a function of a folder that makes them; ``options``: of the machine.
    """

    def __init__(
        self,
        session: Callable[[KilledGuest], object],
        steps: int,
        lines: list[str] | Callable[[Path], list[str]],
        **options: Any,
    ) -> None:
        self._session = session
        self.steps = steps
        self._lines = lines
        self._options = options
        self._told: object = None

    def run(self, folder: Path, *ends: int) -> tuple[Machine, object]:
        """Return the machine at the end of a session in which emulators were killed, and what the guest saw."""
        lines = self._lines(folder) if callable(self._lines) else self._lines
        machine = Machine(folder, lines, ends, **self._options)
        try:
            return machine, self._session(KilledGuest(machine))
        finally:
            machine.close()

    def undisturbed(self, folder: Path) -> object:
        """Return what the guest sees if nobody is killed. The number of steps is right."""
        machine, seen = self.run(folder)
        assert machine.deaths == []
        assert machine.fates[0].steps == self.steps
        self._told = seen
        return seen

    def killed_at(self, folder: Path, *ends: int) -> None:
        """Kill emulators, one after the other, each before the step given; the guest notices nothing."""
        if self._told is None:
            apart = folder / "undisturbed"
            apart.mkdir()
            self.undisturbed(apart)
        machine, seen = self.run(folder, *ends)
        assert len(machine.deaths) == len(ends)
        assert seen == self._told

    def each_step(self, stride: int) -> list[Any]:
        """Return all steps as parameters of a test; every ``stride``-th belongs to the ordinary run."""
        return [pytest.param(end, marks=ordinary(end, stride)) for end in range(1, self.steps + 1)]

    def each_pair(self, stride: int, *, of: int = 9) -> list[Any]:
        """Return every ``of``-th step with all steps of a take-over."""
        pairs = [
            (end, next_end)
            for end in range(of, self.steps - TAKING_OVER, of)
            for next_end in range(1, TAKING_OVER)
        ]
        return [pytest.param(*pair, marks=ordinary(number, stride)) for number, pair in enumerate(pairs)]
