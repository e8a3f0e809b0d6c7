"""Crash registers (docs/protocol/discovery.md#crash-registers)."""

from __future__ import annotations

import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vmbus.hypervisor.crash import MAX_MESSAGE
from vmbus.wire.msr import Msr

from tests.unit.hypervisor.scripted_guest import LINUX_6_1, NOT_RAM, RAM_SIZE, ScriptedGuest

NOTIFY = 1 << 63
MESSAGE = 1 << 62


def crash(guest: ScriptedGuest, parameters: tuple[int, ...], control: int) -> None:
    for index, value in enumerate(parameters):
        guest.wr(Msr.CRASH_P0 + index, value)
    guest.wr(Msr.CRASH_CTL, control)


def crash_with_message(guest: ScriptedGuest, gpa: int, length: int) -> str | None:
    crash(guest, (0, 0, 0, gpa, length), NOTIFY | MESSAGE)
    return guest.events.crashes[-1].message


def test_capabilities_are_notify_and_message(guest: ScriptedGuest) -> None:
    assert guest.rd(Msr.CRASH_CTL) == NOTIFY | MESSAGE
    crash(guest, (), NOTIFY)
    assert guest.rd(Msr.CRASH_CTL) == NOTIFY | MESSAGE


def test_report_without_text_has_the_five_parameters(guest: ScriptedGuest) -> None:
    crash(guest, (1, LINUX_6_1, 0xFFFFFFFF81000000, 4, 5), NOTIFY)
    (report,) = guest.events.crashes
    assert report.parameters == (1, LINUX_6_1, 0xFFFFFFFF81000000, 4, 5)
    assert report.message is None
    assert report.control.notify


def test_parameters_are_latched_at_the_control_write(guest: ScriptedGuest) -> None:
    crash(guest, (1, 2, 3, 4, 5), NOTIFY)
    guest.wr(Msr.CRASH_P0, 99)
    assert guest.events.crashes[0].parameters[0] == 1
    assert guest.rd(Msr.CRASH_P0) == 99


def test_text_is_read_from_the_guest(guest: ScriptedGuest) -> None:
    gpa = guest.page()
    text = "<0>[    1.0] Kernel panic - not syncing: d\u00e9sol\u00e9\n"
    guest.memory.write(gpa, text.encode())
    assert crash_with_message(guest, gpa, len(text.encode())) == text


def test_text_ends_at_a_zero_byte(guest: ScriptedGuest) -> None:
    guest.memory.write(0x5000, b"short\0rest")
    assert crash_with_message(guest, 0x5000, 10) == "short"


def test_text_is_bounded(guest: ScriptedGuest, caplog: pytest.LogCaptureFixture) -> None:
    guest.memory.write(0x5000, b"x" * (MAX_MESSAGE + 100))
    with caplog.at_level(logging.WARNING):
        assert crash_with_message(guest, 0x5000, 1 << 63) == "x" * MAX_MESSAGE
    assert "crash-message-too-long" in caplog.text


def test_text_that_is_no_text_is_made_harmless(guest: ScriptedGuest) -> None:
    guest.memory.write(0x5000, b"\x1b[31mred\xff\x07\ttab\n")
    assert crash_with_message(guest, 0x5000, 16) == "\ufffd[31mred\ufffd\ufffd\ttab\n"


@pytest.mark.parametrize("gpa", [RAM_SIZE, NOT_RAM, RAM_SIZE - 1, (1 << 64) - 1])
def test_text_outside_ram_leaves_a_report_without_one(guest: ScriptedGuest, gpa: int) -> None:
    assert crash_with_message(guest, gpa, 100) is None
    assert guest.partition.refusals.counts == {"crash-message-not-ram": 1}


def test_write_without_notify_reports_nothing(guest: ScriptedGuest) -> None:
    crash(guest, (1, 2, 3, 4, 5), MESSAGE)
    assert guest.events.crashes == []


def test_pre_os_id_and_no_dump_are_kept(guest: ScriptedGuest) -> None:
    crash(guest, (), NOTIFY | 1 << 61 | 5 << 58)
    control = guest.events.crashes[0].control
    assert (control.pre_os_id, control.no_dump, control.message) == (5, True, False)


@settings(deadline=None)
@given(st.binary(max_size=200), st.integers(0, 300))
def test_any_bytes_make_printable_text(data: bytes, length: int) -> None:
    guest = ScriptedGuest()
    guest.memory.write(0x5000, data)
    message = crash_with_message(guest, 0x5000, length)
    assert message is not None
    assert all(letter.isprintable() or letter in "\n\t" for letter in message)
