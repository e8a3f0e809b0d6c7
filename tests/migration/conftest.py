"""The guest programs of tests/guest serve these tests too."""

from __future__ import annotations

from tests.guest.conftest import guest_program

__all__ = ["guest_program"]
