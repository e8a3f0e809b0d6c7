"""Test doubles for devices and guests; everything is deterministic and needs no QEMU.

    from vmbus.testing import LoopbackGuest

    with LoopbackGuest(MyDevice()) as guest:
        guest.send(b"...", transaction_id=7, completion_requested=True)
        [answer] = guest.receive()

:class:`LoopbackGuest` opens one device and speaks through real rings, for tests of a device. :class:`ScriptedGuest`
speaks messages to a whole bus, for tests of offers, GPADLs and channels. The fakes stand in for :mod:`vmbus.ports`.

``docs/api.md`` lists every name. Other names of the modules in here are private and may change in any release.
"""

from __future__ import annotations

from vmbus.testing.fakes import (
    FakeInterrupts,
    FakeMemory,
    FakePages,
    FakeSynic,
    FakeTimer,
    FakeTimers,
    FakeViews,
    FakeWorkers,
)
from vmbus.testing.loopback import (
    COMPLETION,
    GPA_DIRECT,
    IN_BAND,
    TRANSFER_PAGES,
    FakeChannel,
    GuestPacket,
    LoopbackGuest,
    RacingPages,
    RingReader,
    RingWriter,
    gpa_direct_extension,
    guest_packet,
)
from vmbus.testing.scripted import Answer, RecordingEndpoint, ScriptedGuest, an_offer, parse_host_message

__all__ = [
    "COMPLETION",
    "GPA_DIRECT",
    "IN_BAND",
    "TRANSFER_PAGES",
    "Answer",
    "FakeChannel",
    "FakeInterrupts",
    "FakeMemory",
    "FakePages",
    "FakeSynic",
    "FakeTimer",
    "FakeTimers",
    "FakeViews",
    "FakeWorkers",
    "GuestPacket",
    "LoopbackGuest",
    "RacingPages",
    "RecordingEndpoint",
    "RingReader",
    "RingWriter",
    "ScriptedGuest",
    "an_offer",
    "gpa_direct_extension",
    "guest_packet",
    "parse_host_message",
]
