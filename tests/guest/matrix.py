"""Cases of a matrix that only ``make test-all`` runs: ``make test`` has another one, which shows the same."""

from __future__ import annotations

import pytest
from _pytest.mark.structures import ParameterSet


def full(*values: object, id: str | None = None) -> ParameterSet:
    """Return a parameter set that is run with all others only."""
    return pytest.param(*values, marks=pytest.mark.full, id=id)
