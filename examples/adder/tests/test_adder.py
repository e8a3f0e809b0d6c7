"""The adder against a guest in memory: real rings, no QEMU."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from vmbus.api import DeviceError, UsageError, options_of
from vmbus.testing import COMPLETION, LoopbackGuest
from vmbus_adder.device import Adder
from vmbus_adder.protocol import ADD, Add


def add(guest: LoopbackGuest, amount: int) -> int:
    """Send one amount; return the sum."""
    guest.send(ADD.build(Add(amount)), transaction_id=7, completion_requested=True)
    [answer] = guest.receive()
    assert (answer.kind, answer.transaction_id) == (COMPLETION, 7)
    return ADD.parse(answer.payload).amount


def test_amounts_are_added() -> None:
    with LoopbackGuest(Adder(start=40)) as guest:
        assert add(guest, 2) == 42
        assert add(guest, -50) == -8


@pytest.mark.parametrize(
    ("request_", "reason"),
    [(b"", "malformed"), (ADD.build(Add((1 << 63) - 1)), "adder-overflow")],
)
def test_a_wrong_request_is_refused_and_the_next_one_works(request_: bytes, reason: str) -> None:
    with LoopbackGuest(Adder(start=1)) as guest:
        guest.send(request_, transaction_id=8, completion_requested=True)
        [answer] = guest.receive()
        assert answer.payload == b""
        assert guest.io.refusals.counts == {reason: 1}
        assert add(guest, 1) == 2


def test_opening_again_starts_anew() -> None:
    guest = LoopbackGuest(Adder(start=3))
    for _ in range(2):
        with guest:
            assert add(guest, 1) == 4


def test_the_sum_survives_a_migration() -> None:
    source, target = Adder(), Adder()
    with LoopbackGuest(source) as guest:
        add(guest, 9)
    target.restore(source.save())
    assert target.status() == {"sum": 9}
    with pytest.raises(DeviceError):
        target.restore(source.save()[:-1])


def test_its_option() -> None:
    [start] = options_of(Adder)
    assert (start.key, start.read("0x10")) == ("start", 16)
    with pytest.raises(UsageError):
        start.read("-1")


def test_its_control_command() -> None:
    adder = Adder(start=1)
    adder.sum = 5
    reset: Any = adder.control_commands()["adder-reset"]({})
    assert asyncio.run(reset) == {"before": 5}
    assert adder.sum == 1
