"""Guests whose interrupts cannot be ended for them: each vCPU is named once, until its vectors change."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
from vmbus.cli.status import render
from vmbus.machine.auto_eoi import AutoEoi
from vmbus.machine.problems import Problems

from tests.unit.machine.test_host_turns import BusyGateway, busy_host, parts_of


class ApicGateway:
    def __init__(self) -> None:
        self.vectors: dict[int, set[int]] = {}
        self.failures = {0: 3, 1: 0}

    def set_auto_eoi(self, vcpu: int, vectors: Iterable[int]) -> None:
        self.vectors[vcpu] = set(vectors)

    def auto_eoi_failures(self, vcpu: int) -> int:
        return self.failures[vcpu]


def test_a_vcpu_is_named_once_with_what_to_do(caplog: pytest.LogCaptureFixture) -> None:
    gateway, problems = ApicGateway(), Problems()
    auto_eoi = AutoEoi(gateway, problems)
    auto_eoi.changed(0, {0xF3})
    auto_eoi.changed(1, {0xF3})
    assert gateway.vectors == {0: {0xF3}, 1: {0xF3}}
    auto_eoi.look()
    assert problems.sentences == [], "the failures of an earlier guest do not count"
    gateway.failures[1] += 1
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            auto_eoi.look()
            gateway.failures[1] += 1
    assert len(problems.sentences) == len(caplog.records) == 1
    assert "vCPU 1 " in problems.sentences[0] and "-cpu max,-x2apic" in problems.sentences[0]
    assert set(auto_eoi.watched) == {0}
    auto_eoi.changed(1, set())
    assert problems.sentences == [] and gateway.vectors[1] == set()
    auto_eoi.look()
    assert problems.sentences == []


async def test_the_host_looks_when_it_is_woken_and_after_it_asked_to_be_woken() -> None:
    order: list[str] = []

    class SleepyGateway(BusyGateway):
        def sleep_prepare(self) -> bool:
            order.append("asked")
            return False

    host = busy_host(SleepyGateway())
    parts_of(host).auto_eoi = SimpleNamespace(watched={0: 0}, look=lambda: order.append("looked"))
    host.service.ready()
    assert order == ["asked", "looked"]


def test_status_shows_problems() -> None:
    found: dict[str, Any] = {
        "name": "g",
        "vcpus": 1,
        "qemu": {"version": "11.1.0"},
        "partition": {"guest_os": "Linux", "refusals": {}},
        "bus": {"version": None, "refusals": {}},
        "channels": [],
        "crashes": [],
        "problems": ["the guest hangs; do this"],
    }
    assert "problem: the guest hangs; do this" in render(found).splitlines()
