"""A guest that never stops asking leaves the emulator time for everything else, and a bug ends its attachment."""

from __future__ import annotations

import asyncio
import logging
from types import SimpleNamespace
from typing import Any

import pytest
from vmbus.errors import InternalError, MalformedError
from vmbus.machine.gateway.posts import Post
from vmbus.machine.gateway_service import GATEWAY_POSTS, GATEWAY_ROUNDS, GatewayService
from vmbus.machine.host import ExitReason, Host
from vmbus.wire.gateway import TrapKind
from vmbus.wire.msr import Msr
from vmbus.wire.synic import REFERENCE_TSC_PAGE

from tests.unit.hypervisor.scripted_guest import LINUX_6_1, ScriptedGuest


class BusyGateway:
    """Always has a doorbell more."""

    pending = SimpleNamespace(failed=lambda: False)
    carries = False

    def __init__(self) -> None:
        self.rounds = 0
        self.posts = SimpleNamespace(take=list, promise=lambda messages: None)

    def awake(self) -> None: ...

    def fileno(self) -> int:
        return 0

    def traps(self) -> list[object]:
        return []

    def doorbells(self) -> list[int]:
        self.rounds += 1
        return [1]

    def sleep_prepare(self) -> bool:
        return True


def busy_host(gateway: BusyGateway) -> Host:
    host = Host.__new__(Host)
    host._loop = asyncio.get_running_loop()
    host._ended = host._loop.create_future()
    host.state = SimpleNamespace(paused=False)  # type: ignore[assignment]
    host.migration = SimpleNamespace(fenced=False)  # type: ignore[assignment]
    host.gateway = gateway  # type: ignore[assignment]
    parts = SimpleNamespace(
        bus=SimpleNamespace(acknowledgeable=1),
        auto_eoi=SimpleNamespace(watched={}),
        clock=SimpleNamespace(),
        partition=SimpleNamespace(
            synic=SimpleNamespace(ring_event_port=lambda connection: None, end_of_message=lambda vp: None),
            reference_tsc_waits=False,
            hypercalls_enabled=False,
        ),
    )
    host.service = GatewayService(host._loop, gateway, parts, Host._Owner(host))  # type: ignore[arg-type]
    return host


def parts_of(host: Host) -> Any:
    """The parts that the service of a :func:`busy_host` calls."""
    return host.service._parts


async def test_others_have_their_turn_between_rounds() -> None:
    gateway = BusyGateway()
    host = busy_host(gateway)
    host.service.ready()
    assert gateway.rounds == GATEWAY_ROUNDS
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert gateway.rounds > GATEWAY_ROUNDS
    assert host.service.looks_again
    host.service.leave()


async def test_others_have_their_turn_after_as_many_posts_as_a_ring_holds() -> None:
    gateway = BusyGateway()
    gateway.posts.take = lambda: [Post(0, TrapKind.WRMSR, 0, b"")] * (GATEWAY_POSTS // 4)
    host = busy_host(gateway)
    host.service.ready()
    assert gateway.rounds == 2
    assert host.service.looks_again
    host.service.leave()


async def test_nothing_is_asked_for_again_when_the_host_has_ended() -> None:
    gateway = BusyGateway()
    host = busy_host(gateway)
    host._ended.set_result(ExitReason.POWERED_OFF)
    host.service.ready()
    assert not host.service.looks_again


@pytest.mark.parametrize("os_id", [0, LINUX_6_1])
async def test_a_reference_tsc_page_becomes_valid_when_the_tsc_is_known(os_id: int) -> None:
    guest = ScriptedGuest()
    gateway = BusyGateway()
    host = busy_host(gateway)
    host._ended.set_result(ExitReason.STOPPED)
    parts_of(host).clock = guest.clock
    parts_of(host).partition = guest.partition
    guest.clock.tsc_known = False
    page = guest.page()
    guest.wr(Msr.REFERENCE_TSC, page | 1)
    if os_id:
        guest.wr(Msr.GUEST_OS_ID, os_id)

    def sequence() -> int:
        return REFERENCE_TSC_PAGE.parse(guest.memory.read(page, REFERENCE_TSC_PAGE.size)).sequence

    host.service.ready()
    assert sequence() == 0
    guest.clock.tsc_known = True
    guest.partition.pause()
    host.service.ready()
    assert sequence() == 0, "nothing is written to a guest that stands still"
    guest.partition.resume()
    assert sequence() == 1
    guest.clock.tsc_known = False
    guest.wr(Msr.REFERENCE_TSC, page | 1)
    assert sequence() == 0
    guest.clock.tsc_known = True
    host.service.ready()
    assert sequence() == 2
    host.service.ready()
    assert sequence() == 2, "it is written once"


@pytest.mark.parametrize(
    "bug", [ZeroDivisionError(), InternalError("answered twice"), MalformedError("odd", "x")]
)
async def test_a_bug_while_the_guest_is_served_ends_the_attachment_with_its_reason(
    bug: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    """Otherwise every vCPU waits for ever for an answer, and nobody is told."""

    def ring(connection: int) -> None:
        raise bug

    host = busy_host(BusyGateway())
    parts_of(host).partition.synic.ring_event_port = ring
    host.look_at_gateway()
    async with asyncio.timeout(10):
        with pytest.raises(InternalError, match="not served any more") as found:
            await host.serve()
    assert found.value.__cause__ is bug and repr(bug) in str(found.value)
    host.service.ready()  # a second one, before the host is closed
    assert [record.exc_info is not None for record in caplog.records if record.levelno == logging.ERROR] == [
        True
    ] * 2
