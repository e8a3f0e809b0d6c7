"""One command's output and status, out of the bytes of the guest's second serial port."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from vmbus.provision.command_output import START, CommandOutput


def trailer(status: int) -> bytes:
    return b"\x10\x03vmbus-exit %d\n" % status


def test_output_and_status_are_told_apart() -> None:
    port = CommandOutput()
    output = port.feed(START + b"hello\n" + trailer(7)) + port.close()
    assert (output, port.status) == (b"hello\n", 7)


def test_what_comes_before_the_start_is_dropped() -> None:
    port = CommandOutput()
    assert port.feed(b"noise of firmware" + START[:5]) == b""
    assert not port.started
    assert port.feed(START[5:] + b"x") == b"x"
    assert port.started


def test_output_is_handed_on_at_once_without_waiting_for_more() -> None:
    port = CommandOutput()
    assert port.feed(START + b"a prompt: ") == b"a prompt: "


def test_the_same_bytes_in_the_middle_are_output() -> None:
    port = CommandOutput()
    output = port.feed(START + trailer(9)) + port.feed(b"more" + trailer(3)) + port.close()
    assert (output, port.status) == (trailer(9) + b"more", 3)


def test_a_port_closed_early_has_no_status() -> None:
    port = CommandOutput()
    output = port.feed(START + b"half" + trailer(0)[:-1]) + port.close()
    assert (output, port.status) == (b"half" + trailer(0)[:-1], None)


def test_nothing_at_all_has_neither_output_nor_status() -> None:
    port = CommandOutput()
    assert (port.close(), port.status, port.started) == (b"", None, False)


def test_the_trailer_is_seen_before_the_port_is_closed() -> None:
    port = CommandOutput()
    port.feed(START + b"x")
    assert not port.trailer_seen
    port.feed(trailer(0))
    assert port.trailer_seen


@settings(deadline=None)
@given(
    st.lists(st.one_of(st.binary(max_size=20), st.just(trailer(1)), st.just(b"\x10\x03vm")), max_size=5),
    st.integers(0, 255),
    st.lists(st.integers(1, 30), max_size=40),
)
def test_any_output_in_any_pieces_comes_back_whole(parts: list[bytes], status: int, sizes: list[int]) -> None:
    expected = b"".join(parts)
    stream = b"noise" + START + expected + trailer(status)
    port = CommandOutput()
    output = b""
    for size in sizes:
        output += port.feed(stream[:size])
        stream = stream[size:]
    output += port.feed(stream) + port.close()
    assert (output, port.status) == (expected, status)
