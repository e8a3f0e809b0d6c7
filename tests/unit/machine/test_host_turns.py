"""A guest that never stops asking leaves the emulator time for everything else."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

from vmbus.machine.host import GATEWAY_ROUNDS, ExitReason, Host


class BusyGateway:
    """Always has a doorbell more."""

    def __init__(self) -> None:
        self.rounds = 0

    def awake(self) -> None: ...

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
    host._tsc_page_waits = False
    host._gateway_again = None
    host.gateway_doorbells = 0
    host.migration = SimpleNamespace(fenced=False)  # type: ignore[assignment]
    host.gateway = gateway  # type: ignore[assignment]
    host.partition = SimpleNamespace(  # type: ignore[assignment]
        synic=SimpleNamespace(ring_event_port=lambda connection: None)
    )
    return host


async def test_others_have_their_turn_between_rounds() -> None:
    gateway = BusyGateway()
    host = busy_host(gateway)
    host._gateway_ready()
    assert gateway.rounds == GATEWAY_ROUNDS
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert gateway.rounds > GATEWAY_ROUNDS
    assert host._gateway_again is not None
    host._gateway_again.cancel()


async def test_nothing_is_asked_for_again_when_the_host_has_ended() -> None:
    gateway = BusyGateway()
    host = busy_host(gateway)
    host._ended.set_result(ExitReason.POWERED_OFF)
    host._gateway_ready()
    assert host._gateway_again is None
