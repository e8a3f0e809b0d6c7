"""Shutdown against a scripted guest (docs/protocol/devices.md#shutdown)."""

from __future__ import annotations

import asyncio
import struct
from typing import Any

import pytest
from vmbus.errors import DeviceError, UsageError
from vmbus_devices.shutdown import Shutdown, ShutdownAction, ShutdownOutcome, ShutdownResult

from tests.unit.device.ic_guest import IcGuest

OK = ShutdownResult(ShutdownOutcome.OK)


@pytest.fixture
def guest() -> IcGuest:
    guest = IcGuest(Shutdown())
    guest.open()
    return guest


@pytest.fixture
def ready(guest: IcGuest) -> IcGuest:
    guest.negotiate(version=(3, 2))
    return guest


def device(guest: IcGuest) -> Shutdown:
    assert isinstance(guest.device, Shutdown)
    return guest.device


def asked(guest: IcGuest, action: ShutdownAction | str, **details: Any) -> list[ShutdownResult]:
    results: list[ShutdownResult] = []
    device(guest).shut_down(action, results.append, **details)
    guest.run()
    return results


@pytest.mark.parametrize(
    ("action", "force", "flags"),
    [
        (ShutdownAction.SHUTDOWN, False, 0),
        (ShutdownAction.SHUTDOWN, True, 1),
        ("restart", False, 2),
        ("restart", True, 3),
        (ShutdownAction.HIBERNATE, False, 4),
        ("hibernate", True, 5),
    ],
)
def test_body_is_2060_bytes(ready: IcGuest, action: str, force: bool, flags: int) -> None:
    results = asked(ready, action, force=force)
    request = ready.take()
    assert (request.type, request.version, request.pipe) == (3, (3, 2), (1, 2080))
    assert request.body == struct.pack("<III", 0x80000000, 0, flags) + bytes(2048)
    assert results == []
    ready.answer(request)
    assert results == [OK]


def test_message_is_utf_16(ready: IcGuest) -> None:
    asked(ready, "shutdown", message="Güte", timeout=60, reason=7)
    body = ready.take().body
    assert body[:12] == struct.pack("<III", 7, 60, 0)
    assert body[12:] == "Güte".encode("utf-16-le").ljust(2048, b"\0")


def test_refusal_of_the_guest_is_told(ready: IcGuest) -> None:
    results = asked(ready, "hibernate")
    ready.answer(ready.take(), status=0x80004005)
    assert results == [ShutdownResult(ShutdownOutcome.FAILED, 0x80004005)]
    assert str(results[0]) == "failed: failure (0x80004005)"
    assert device(ready).status()["last_result"] == "failed: failure (0x80004005)"


def test_not_ready_before_negotiation_and_after_close(guest: IcGuest) -> None:
    assert asked(guest, "shutdown")[0].outcome is ShutdownOutcome.NOT_READY
    guest.negotiate(version=(3, 2))
    guest.close()
    assert asked(guest, "shutdown")[0].outcome is ShutdownOutcome.NOT_READY
    assert asked(IcGuest(Shutdown()), "shutdown")[0].outcome is ShutdownOutcome.NOT_READY


def test_second_request_while_one_is_pending(ready: IcGuest) -> None:
    first = asked(ready, "restart")
    assert asked(ready, "shutdown")[0].outcome is ShutdownOutcome.IN_PROGRESS
    assert first == []
    ready.answer(ready.take())
    assert first == [OK]
    asked(ready, "shutdown")
    assert ready.take().transaction == 2


def test_guest_that_closes_without_an_answer(ready: IcGuest) -> None:
    results = asked(ready, "shutdown")
    ready.close()
    assert [result.outcome for result in results] == [ShutdownOutcome.GONE]


def test_guest_that_never_answers(ready: IcGuest) -> None:
    results = asked(ready, "shutdown")
    late = ready.take()
    ready.advance(30)
    assert [result.outcome for result in results] == [ShutdownOutcome.NO_ANSWER]
    again = asked(ready, "shutdown")
    ready.answer(late)
    assert ready.refusals() == {"ic-stale-answer": 1}
    assert again == []
    ready.answer(ready.take())
    assert again == [OK]


def test_damaged_answer_ends_the_request(ready: IcGuest) -> None:
    results = asked(ready, "shutdown")
    ready.answer(ready.take(), type=1)
    assert [result.outcome for result in results] == [ShutdownOutcome.NO_ANSWER]
    assert ready.refusals() == {"ic-wrong-type": 1}


@pytest.mark.parametrize(
    "wrong",
    [
        ("explode", {}),
        ("shutdown", {"message": "x" * 1024}),
        ("shutdown", {"timeout": -1}),
        ("shutdown", {"reason": 1 << 32}),
    ],
)
def test_what_cannot_be_asked_is_the_callers_error(ready: IcGuest, wrong: tuple[str, dict[str, int]]) -> None:
    with pytest.raises(UsageError):
        asked(ready, wrong[0], **wrong[1])
    assert ready.receive() == []


async def test_coroutine_gets_the_result(ready: IcGuest) -> None:
    task = asyncio.ensure_future(device(ready).ask("restart", force=True))
    await asyncio.sleep(0)
    ready.run()
    ready.answer(ready.take())
    assert await task == OK


def restored(guest: IcGuest) -> IcGuest:
    guest.io.pause()
    later = Shutdown()
    later.restore(device(guest).save())
    other = IcGuest(later, memory=guest.memory, timers=guest.timers)
    other.io.restore(guest.io.save())
    other.io.restored(other.channel)
    other.run()
    return other


def test_pending_request_is_kept_over_a_restore(ready: IcGuest) -> None:
    asked(ready, "shutdown")
    request = ready.take()
    other = restored(ready)
    assert other.receive() == []
    assert asked(other, "restart")[0].outcome is ShutdownOutcome.IN_PROGRESS
    other.answer(request)
    assert device(other).last_result == OK
    assert device(other).status()["requests"] == 1


def test_restored_request_is_not_awaited_for_ever(ready: IcGuest) -> None:
    asked(ready, "shutdown")
    other = restored(ready)
    other.receive()
    other.advance(30)
    assert device(other).last_result == ShutdownResult(ShutdownOutcome.NO_ANSWER)


def test_versions_are_kept_over_a_restore(ready: IcGuest) -> None:
    other = restored(ready)
    results = asked(other, "shutdown")
    request = other.take()
    assert (request.version, request.framework) == ((3, 2), (3, 0))
    other.answer(request)
    assert results == [OK]


def test_restore_before_negotiation_negotiates_again(guest: IcGuest) -> None:
    guest.receive()
    other = restored(guest)
    assert other.negotiate(version=(1, 0)).type == 0
    assert asked(other, "shutdown") == []


def test_state_of_unknown_versions_is_refused(ready: IcGuest) -> None:
    state = bytearray(device(ready).save())
    state[7:9] = (9).to_bytes(2, "little")
    with pytest.raises(DeviceError, match=r"9\.2"):
        Shutdown().restore(bytes(state))


def test_a_guest_that_damaged_its_ring_is_asked_nothing_here_or_where_it_moves(ready: IcGuest) -> None:
    ready.channel.incoming.store_u32(0, 0xFFFFFFFF)
    ready.doorbell()
    assert ready.io.failure == "invalid-ring-pointer"
    not_ready = [ShutdownResult(ShutdownOutcome.NOT_READY)]
    assert asked(ready, ShutdownAction.SHUTDOWN) == not_ready
    there = IcGuest(Shutdown())
    there.io.restore(ready.io.save())
    there.device.restore(ready.device.save())
    there.channel.incoming.write(0, bytes(4))
    there.io.restored(there.channel)
    assert there.io.failure == "invalid-ring-pointer"
    assert asked(there, ShutdownAction.SHUTDOWN) == not_ready
