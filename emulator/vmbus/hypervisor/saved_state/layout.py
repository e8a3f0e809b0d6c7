"""What is saved beside the channels' own chunks: the hypervisor part and the gateway's answers.

Forms as in :mod:`vmbus.wire.saved`, and under its rule: a layout never changes, a new one gets a new version.
"""

from __future__ import annotations

from dataclasses import dataclass

import construct as c

from vmbus.hypervisor.saved_state.values import (
    PageState,
    PartitionState,
    QueuedMessage,
    ReferenceTimeState,
    TimerState,
    VpState,
)
from vmbus.wire.codec import Record
from vmbus.wire.msr import SINT_COUNT, STIMER_COUNT
from vmbus.wire.plain import Blob, Maybe, Members, Nested, Several, Text

_TIMER = Record(TimerState, "config" / c.Int64ul, "count" / c.Int64ul, "expiration" / Maybe(c.Int64ul))
_PAGE = Record(PageState, "value" / c.Int64ul, "last_gpn" / Maybe(c.Int64ul))
_MESSAGE = Record(
    QueuedMessage,
    "sint" / c.Int8ul,
    "message_type" / c.Int32ul,
    "payload" / Blob,
    "timer" / Maybe(c.Int8ul),
    "expiration" / c.Int64ul,
)


_VP = Record(
    VpState,
    "assist_page" / c.Int64ul,
    "scontrol" / c.Int64ul,
    "siefp" / Nested(_PAGE),
    "simp" / Nested(_PAGE),
    "sints" / Several(c.Int64ul[SINT_COUNT]),
    "messages" / Members(Nested(_MESSAGE)),
    "timers" / Several(Nested(_TIMER)[STIMER_COUNT]),
    "owed_events" / Members(Several(c.Int16ul[2])),
)
_TIME = Record(
    ReferenceTimeState,
    "time" / c.Int64ul,
    "sequence" / c.Int32ul,
    "frequency" / c.Int64ul,
    "scale" / c.Int64ul,
    "offset" / c.BytesInteger(16, signed=True, swapped=True),
)
_PARTITION = Record(
    PartitionState,
    "guest_os_id" / c.Int64ul,
    "hypercall" / c.Int64ul,
    "reference_tsc" / c.Int64ul,
    "tsc_invariant_control" / c.Int64ul,
    "crash_parameters" / Members(c.Int64ul),
    "time" / Nested(_TIME),
    "vps" / Members(Nested(_VP)),
)


@dataclass(frozen=True, slots=True)
class SavedAnswer:
    """An answer that its vCPU has not fetched: what it is an answer to (``Trap.identity``), and the answer."""

    identity: tuple[int, ...]
    verdict: int
    value: int


_IDENTITY_WORDS = 11
_ANSWER = Record(
    SavedAnswer,
    "identity" / Several(c.Int64ul[_IDENTITY_WORDS]),
    "verdict" / c.Int32ul,
    "value" / c.Int64ul,
)


@dataclass(frozen=True, slots=True)
class SavedHypervisor:
    """The hypervisor part. ``offered``: names of the features that the guest was offered.

    ``tsc``: the guest's TSC when it was stopped, 0 if it was not known; ``tsc_frequency`` in Hz, as the guest
    was told.
    """

    offered: tuple[str, ...]
    tsc: int
    tsc_frequency: int
    answers: tuple[SavedAnswer, ...]
    partition: PartitionState


SAVED_HYPERVISOR = Record(
    SavedHypervisor,
    "offered" / Members(Text),
    "tsc" / c.Int64ul,
    "tsc_frequency" / c.Int64ul,
    "answers" / Members(Nested(_ANSWER)),
    "partition" / Nested(_PARTITION),
)
