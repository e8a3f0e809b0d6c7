"""Calls of an endpoint, contained: the border between the bus and device code.

What an endpoint raises is counted and logged here and handed back as a value; nothing of it may reach the
guest's path. A call may say from inside that it will finish later.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

from vmbus.errors import DeviceError, GuestError
from vmbus.refusals import Refusals

_logger = logging.getLogger(__name__)


class Outcome(NamedTuple):
    """What became of a call: what it raised, and whether it will finish later."""

    error: Exception | None
    deferred: bool


class EndpointCalls:
    """Makes the calls of one channel. They may nest: a device that is told one thing can cause the next."""

    def __init__(self, refusals: Refusals) -> None:
        self._refusals = refusals
        self._current = ""
        self._deferred = False

    def call(self, name: str, function: Callable[..., None], *arguments: object) -> Outcome:
        """Call ``function``, known as ``name``."""
        outer = self._current, self._deferred
        self._current, self._deferred = name, False
        error: Exception | None = None
        try:
            function(*arguments)
        except GuestError as refused:
            self._refusals.refuse(refused.reason, refused.detail)
            error = refused
        except DeviceError as broken:
            self._refusals.refuse("device-error", f"{name}: {broken}")
            error = broken
        except Exception as bug:
            _logger.exception("%s: %s() failed", self._refusals.owner, name)
            self._refusals.refuse("device-exception", f"{name}: {type(bug).__name__}")
            error = DeviceError(f"{name}(): {type(bug).__name__}: {bug}")
        finally:
            deferred = self._deferred and error is None
            self._current, self._deferred = outer
        return Outcome(error, deferred)

    def defer(self, name: str) -> None:
        """From inside call ``name``: it will finish later. Raises :class:`DeviceError` anywhere else."""
        if self._current != name:
            raise DeviceError(f"{self._refusals.owner}: only from inside {name}() can it be put off")
        self._deferred = True

    def finish(self, name: str) -> bool:
        """It has finished; False if it was still inside call ``name``, which then simply ends."""
        if self._current != name:
            return True
        self._deferred = False
        return False
