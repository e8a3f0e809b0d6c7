"""The hypervisor section of a machine's state: the partition, its clock, and unfetched answers of the gateway.

Source: docs/saved-state.md. Forms as in :mod:`vmbus.wire.saved`, and under its rule: a layout never changes, a new
one gets a new version.
"""

from __future__ import annotations

from dataclasses import dataclass

import construct as c

from vmbus.hypervisor.saved_state.layout import SAVED_PARTITION
from vmbus.hypervisor.saved_state.values import PartitionState
from vmbus.wire.codec import Record
from vmbus.wire.plain import FixedTuple, Nested, Text, VarTuple


@dataclass(frozen=True, slots=True)
class SavedAnswer:
    """An answer to a trap that its vCPU has not fetched; ``identity``: of the trap (``Trap.identity``)."""

    identity: tuple[int, ...]
    verdict: int
    value: int


_IDENTITY_WORDS = 11
_ANSWER = Record(
    SavedAnswer,
    "identity" / FixedTuple(c.Int64ul[_IDENTITY_WORDS]),
    "verdict" / c.Int32ul,
    "value" / c.Int64ul,
)


@dataclass(frozen=True, slots=True)
class SavedHypervisor:
    """The hypervisor section.

    ``offered``: names of the features that the guest was offered. ``tsc``: the guest's TSC when it was stopped, 0 if
    it was not known. ``tsc_frequency``: in Hz, as the guest reads it.
    """

    offered: tuple[str, ...]
    tsc: int
    tsc_frequency: int
    answers: tuple[SavedAnswer, ...]
    partition: PartitionState


SAVED_HYPERVISOR = Record(
    SavedHypervisor,
    "offered" / VarTuple(Text),
    "tsc" / c.Int64ul,
    "tsc_frequency" / c.Int64ul,
    "answers" / VarTuple(Nested(_ANSWER)),
    "partition" / Nested(SAVED_PARTITION),
)
