"""The emulator believes nothing that QEMU says about the shared memory: compiled code reads and writes there."""

from __future__ import annotations

import os
from typing import Any

import pytest
from vmbus.errors import GatewayError
from vmbus.machine.gateway import client
from vmbus.machine.gateway.client import Gateway
from vmbus.wire import gateway as wire

from tests.fuzz.seeds import gateways
from tests.fuzz.targets import GatewaySocket

ATTACHED = gateways()["attached"]
REGION = 1 + wire.REPLY.size
"""Where the region begins in the input."""


def place_of(name: str) -> int:
    at = 0
    for part in wire.CONTROL.subcons:
        if part.name == name:
            return REGION + at
        at += part.sizeof()
    raise KeyError(name)


def answer(data: bytes | bytearray) -> Gateway:
    """Attach to a gateway that answers with ``data``."""
    server = GatewaySocket()
    try:
        return server.attach(bytes(data))
    finally:
        server.close()


def test_a_region_as_it_should_be_is_taken() -> None:
    gateway = answer(ATTACHED)
    assert gateway.traps() == []
    gateway.close()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("vcpus_max", 0),
        ("vcpus_max", 0xFFFFFFFF),
        ("vcpus", 2),
        ("vcpu_offset", 1 << 16),
        ("vcpu_offset", 4097),
        ("request_offset", (1 << 64) - 8),
        ("doorbell_offset", (1 << 16) - 1),
        ("post_offset", 1 << 16),
        ("post_offset", 20484),
        ("post_offset", 0),
        ("code_offset", 1 << 40),
        ("code_offset", (1 << 64) - 4096),
        ("code_offset", 0),
        ("code_pages", 1 << 20),
        ("code_pages", (1 << 64) - 1),
    ],
)
def test_places_outside_the_region_are_refused(name: str, value: int) -> None:
    data = bytearray(ATTACHED)
    size = 4 if name.startswith("vcpus") else 8
    data[place_of(name) : place_of(name) + size] = value.to_bytes(size, "little")
    with pytest.raises(GatewayError, match="the shared memory is damaged"):
        answer(data)


@pytest.mark.parametrize(("name", "value"), [("vcpus_max", 4096), ("request_offset", 1 << 40)])
def test_places_that_qemu_changes_after_the_check_are_not_used(
    monkeypatch: pytest.MonkeyPatch, name: str, value: int
) -> None:
    check = client._misplaced

    def check_and_change(*arguments: Any) -> str:
        found = check(*arguments)
        size = 4 if name.startswith("vcpus") else 8
        os.pwrite(server.memory, value.to_bytes(size, "little"), place_of(name) - REGION)
        return found

    monkeypatch.setattr(client, "_misplaced", check_and_change)
    server = GatewaySocket()
    gateway = server.attach(ATTACHED)
    assert gateway.traps() == []
    assert gateway.unclaimed() == []
    assert len(gateway._requests) == wire.SLOTS
    gateway.close()
    server.close()


@pytest.mark.parametrize("size", [0, 16, (1 << 16) - 4, (1 << 16) + 4096, 1 << 40, 1 << 63])
def test_a_size_that_its_file_cannot_have_is_refused(size: int) -> None:
    data = bytearray(ATTACHED)
    data[REGION - 8 : REGION] = size.to_bytes(8, "little")
    with pytest.raises(GatewayError, match="announces"):
        answer(data)


def test_a_trap_of_an_unknown_kind_is_the_fault_of_the_gateway() -> None:
    data = bytearray(ATTACHED)
    at = REGION + 8192
    data[at : at + 8] = (1).to_bytes(8, "little")
    gateway = answer(data)
    with pytest.raises(GatewayError, match="unknown kind 0"):
        gateway.traps()
    gateway.close()
