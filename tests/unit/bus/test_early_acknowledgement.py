"""Which messages are acknowledged before the bus acts on them."""

from __future__ import annotations

import pytest
from vmbus.bus.messages import EARLY_ACKNOWLEDGED, MAX_UNDELIVERED
from vmbus.testing.scripted import ScriptedGuest
from vmbus.wire.header import MessageType
from vmbus.wire.version import Version


def message(number: MessageType) -> bytes:
    return int(number).to_bytes(8, "little") + bytes(140)


def connected() -> ScriptedGuest:
    guest = ScriptedGuest.on_fakes()
    guest.connect(Version.IRON)
    return guest


@pytest.mark.parametrize("number", list(MessageType))
def test_only_messages_with_at_most_an_ordinary_answer_are_acknowledged_early(number: MessageType) -> None:
    assert connected().bus.can_acknowledge_early(message(number)) == (int(number) in EARLY_ACKNOWLEDGED)


def test_contact_unload_and_reserved_channels_wait_for_the_bus() -> None:
    assert not EARLY_ACKNOWLEDGED & {
        int(MessageType.INITIATE_CONTACT),
        int(MessageType.UNLOAD),
        int(MessageType.OPEN_RESERVED_CHANNEL),
        int(MessageType.CLOSE_RESERVED_CHANNEL),
        int(MessageType.TL_CONNECT_REQUEST),
    }


def test_a_paused_bus_acknowledges_nothing_early() -> None:
    guest = connected()
    guest.bus.pause()
    assert not guest.bus.can_acknowledge_early(message(MessageType.GPADL_TEARDOWN))


def test_a_guest_that_takes_no_answers_gets_nothing_acknowledged_early() -> None:
    guest = connected()
    header = message(MessageType.GPADL_HEADER)[:20]  # for no channel: each is answered with a failure
    posted = 0
    while guest.bus.can_acknowledge_early(header):
        guest.bus.handle_acknowledged(1, header)
        posted += 1
        assert posted <= MAX_UNDELIVERED
    assert posted == MAX_UNDELIVERED


@pytest.mark.parametrize("junk", [b"", b"\x08", bytes(300), b"\xff" * 8])
def test_junk_is_not_acknowledged_early_or_does_no_harm(junk: bytes) -> None:
    guest = connected()
    if guest.bus.can_acknowledge_early(junk):
        guest.bus.handle_acknowledged(1, junk)
    assert guest.bus.version is Version.IRON
