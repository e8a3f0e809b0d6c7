"""The layout of a partition's state (:mod:`vmbus.hypervisor.saved_state.values`) in bytes.

Forms as in :mod:`vmbus.wire.saved`, and under its rule: a layout never changes, a new one gets a new version. The
record is part of the hypervisor section of a machine's state (docs/saved-state.md).
"""

from __future__ import annotations

import construct as c

from vmbus.hypervisor.saved_state.values import (
    PageState,
    PartitionState,
    QueuedMessage,
    ReferenceTimeState,
    TimerState,
    VpState,
)
from vmbus.hypervisor.synic import MAX_QUEUED_MESSAGES
from vmbus.wire.codec import Record
from vmbus.wire.msr import CRASH_PARAMETER_COUNT, SINT_COUNT, STIMER_COUNT
from vmbus.wire.plain import Blob, FixedTuple, Nested, Nullable, VarTuple
from vmbus.wire.synic import EVENT_FLAG_COUNT

MAX_VPS = 4096
"""Virtual processors of a state."""

_TIMER = Record(TimerState, "config" / c.Int64ul, "count" / c.Int64ul, "expiration" / Nullable(c.Int64ul))
_PAGE = Record(PageState, "value" / c.Int64ul, "last_gpn" / Nullable(c.Int64ul))
_MESSAGE = Record(
    QueuedMessage,
    "sint" / c.Int8ul,
    "message_type" / c.Int32ul,
    "payload" / Blob,
    "timer" / Nullable(c.Int8ul),
    "expiration" / c.Int64ul,
)
_VP = Record(
    VpState,
    "assist_page" / c.Int64ul,
    "scontrol" / c.Int64ul,
    "siefp" / Nested(_PAGE),
    "simp" / Nested(_PAGE),
    "sints" / FixedTuple(c.Int64ul[SINT_COUNT]),
    "messages" / VarTuple(Nested(_MESSAGE), MAX_QUEUED_MESSAGES + STIMER_COUNT),
    "timers" / FixedTuple(Nested(_TIMER)[STIMER_COUNT]),
    "deferred_events" / VarTuple(FixedTuple(c.Int16ul[2]), SINT_COUNT * EVENT_FLAG_COUNT),
)
_TIME = Record(
    ReferenceTimeState,
    "time" / c.Int64ul,
    "sequence" / c.Int32ul,
    "frequency" / c.Int64ul,
    "scale" / c.Int64ul,
    "offset" / c.BytesInteger(16, signed=True, swapped=True),
)
SAVED_PARTITION = Record(
    PartitionState,
    "guest_os_id" / c.Int64ul,
    "hypercall" / c.Int64ul,
    "reference_tsc" / c.Int64ul,
    "tsc_invariant_control" / c.Int64ul,
    "crash_parameters" / VarTuple(c.Int64ul, CRASH_PARAMETER_COUNT),
    "time" / Nested(_TIME),
    "vps" / VarTuple(Nested(_VP), MAX_VPS),
)
