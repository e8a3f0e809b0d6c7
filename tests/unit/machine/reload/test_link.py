"""The connection between two emulators during a reload: messages arrive whole, and a bad peer is refused."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator

import pytest
from vmbus.machine.reload.link import Link, ReloadEnded, ReloadFailed
from vmbus.wire.reload import FORMAT, MAX_DATA, MAX_DESCRIPTORS, RELOAD_HEADER, ReloadHeader

from tests.unit.machine.reload.no_descriptors import no_descriptors


@pytest.fixture
def pair() -> Iterator[tuple[Link, socket.socket]]:
    here, there = socket.socketpair()
    link = Link(here, "the other one")
    yield link, there
    link.close()
    there.close()


async def test_a_message_has_values_data_and_descriptors(pair: tuple[Link, socket.socket]) -> None:
    here, there = pair[0], Link(pair[1], "this one")
    reading, writing = os.pipe()
    state = os.urandom(3 << 20)  # more than a socket holds
    sending = asyncio.ensure_future(here.tell("state", {"a": [1, "b"]}, data=state, descriptors=[writing]))
    found = await there.hear("state")
    await sending
    assert (found.kind, found.values, found.data) == ("state", {"a": [1, "b"]}, state)
    [number] = found.descriptors
    assert not os.get_inheritable(number)
    os.write(number, b"the same pipe")
    assert os.read(reading, 100) == b"the same pipe"
    for each in (reading, writing, number):
        os.close(each)


async def test_messages_that_come_together_are_taken_one_by_one(pair: tuple[Link, socket.socket]) -> None:
    here, there = pair[0], Link(pair[1], "this one")
    for number in range(3):
        await here.tell("count", {"number": number}, data=bytes(number))
    for number in range(3):
        found = await there.hear("count")
        assert (found.values["number"], len(found.data)) == (number, number)


async def test_a_refusal_is_raised_with_its_reason(pair: tuple[Link, socket.socket]) -> None:
    await Link(pair[1], "this one").refuse("a disk is missing")
    with pytest.raises(ReloadFailed, match=r"^a disk is missing$"):
        await pair[0].hear("accepted")


async def test_another_message_than_the_expected_one_is_refused(pair: tuple[Link, socket.socket]) -> None:
    await Link(pair[1], "this one").tell("go")
    with pytest.raises(ReloadFailed, match="the other one said 'go' where accepted or claimed was expected"):
        await pair[0].hear("accepted", "claimed")


async def test_the_end_of_the_peer_is_known_on_both_ways(pair: tuple[Link, socket.socket]) -> None:
    pair[1].close()
    with pytest.raises(ReloadEnded, match="the other one ended"):
        await pair[0].hear("accepted")
    with pytest.raises(ReloadEnded, match="the other one ended"):
        await pair[0].tell("go")


async def test_the_end_of_a_peer_that_has_not_read_is_its_end(pair: tuple[Link, socket.socket]) -> None:
    await pair[0].tell("go")
    pair[1].close()  # the kernel reports a reset then
    with pytest.raises(ReloadEnded):
        await pair[0].hear("accepted")


async def test_a_peer_that_is_silent_does_not_hold_up_for_ever(pair: tuple[Link, socket.socket]) -> None:
    with pytest.raises(ReloadFailed, match="the other one does not answer"):
        await pair[0].hear("accepted", timeout=0.01)
    with pytest.raises(ReloadFailed, match="the other one does not take what it is sent"):
        await pair[0].tell("state", data=bytes(8 << 20), timeout=0.01)


HEADERS = {
    "protocol": b"HTTP/1.1 200 OK\r\n",
    "format": RELOAD_HEADER.build(ReloadHeader(FORMAT + 1, 2, 0)),
    "announces": RELOAD_HEADER.build(ReloadHeader(FORMAT, 2, MAX_DATA + 1)),
    "parsed": RELOAD_HEADER.build(ReloadHeader(FORMAT, 2, 0)) + b"[]",
    "cannot be parsed": RELOAD_HEADER.build(ReloadHeader(FORMAT, 2, 0)) + b"{}",
    "be parsed": RELOAD_HEADER.build(ReloadHeader(FORMAT, 9, 0)) + b"\xff" * 9,
}


@pytest.mark.parametrize("why", HEADERS)
async def test_what_is_no_message_is_refused(pair: tuple[Link, socket.socket], why: str) -> None:
    pair[1].sendall(HEADERS[why])
    with pytest.raises(ReloadFailed, match=why):
        await pair[0].hear("accepted")


async def test_descriptors_of_a_refused_message_are_closed(pair: tuple[Link, socket.socket]) -> None:
    reading, writing = os.pipe()
    await Link(pair[1], "this one").tell("go", descriptors=[writing])
    os.close(writing)
    with pytest.raises(ReloadFailed):
        await pair[0].hear("accepted")
    assert os.read(reading, 1) == b""
    os.close(reading)


async def test_too_many_descriptors_are_refused_and_closed(pair: tuple[Link, socket.socket]) -> None:
    reading, writing = os.pipe()
    header = RELOAD_HEADER.build(ReloadHeader(FORMAT, 15, 0))
    socket.send_fds(pair[1], [header], [writing] * MAX_DESCRIPTORS)
    socket.send_fds(pair[1], [b'{"kind": "go"}'], [writing] * MAX_DESCRIPTORS)
    os.close(writing)
    with pytest.raises(ReloadFailed, match="too many descriptors"):
        await pair[0].hear("go")
    assert os.read(reading, 1) == b""
    os.close(reading)


async def test_what_is_too_large_is_not_sent(pair: tuple[Link, socket.socket]) -> None:
    with pytest.raises(ReloadFailed, match="more than a message to the other one can have"):
        await pair[0].tell("state", {"much": "x" * (1 << 20)})
    pair[1].setblocking(False)
    with pytest.raises(BlockingIOError):
        pair[1].recv(1)


async def test_a_peer_has_taken_what_it_was_told_when_it_has_read_it_and_left(
    pair: tuple[Link, socket.socket],
) -> None:
    there = Link(pair[1], "this one")
    await pair[0].tell("yours")
    taken = asyncio.ensure_future(pair[0].taken())
    await there.hear("yours")
    assert not taken.done()
    there.leave()
    there.leave()
    async with asyncio.timeout(30):
        await taken


async def test_a_peer_that_ends_with_a_message_half_read_has_not_taken_it(
    pair: tuple[Link, socket.socket],
) -> None:
    await pair[0].tell("yours")
    assert pair[1].recv(RELOAD_HEADER.size)
    pair[1].close()
    with pytest.raises(ReloadEnded):
        await pair[0].taken()


async def test_a_peer_that_says_something_instead_has_not_taken_it(pair: tuple[Link, socket.socket]) -> None:
    await Link(pair[1], "this one").tell("wait")
    with pytest.raises(ReloadFailed, match="said 'wait' where nothing was expected"):
        await pair[0].taken()


async def test_descriptors_that_this_process_has_no_room_for_are_missed_and_the_next_message_is_read(
    pair: tuple[Link, socket.socket],
) -> None:
    here, there = pair[0], Link(pair[1], "this one")
    reading, writing = os.pipe()
    await there.tell("state", {"a": 1}, descriptors=[writing, writing])
    await there.tell("go")
    os.close(writing)
    with (
        no_descriptors(1),
        pytest.raises(ReloadFailed, match="no room for the descriptors that the other one"),
    ):
        await here.hear("state")
    assert os.read(reading, 1) == b""
    os.close(reading)
    assert (await here.hear("go")).kind == "go"


async def test_a_message_that_the_system_does_not_send_is_a_failure_and_no_end_of_the_peer(
    pair: tuple[Link, socket.socket],
) -> None:
    with pytest.raises(ReloadFailed, match="the other one cannot be told anything: Bad file descr") as found:
        await pair[0].tell("state", descriptors=[1 << 20])
    assert not isinstance(found.value, ReloadEnded)
