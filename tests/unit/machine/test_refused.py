"""Why a target on the same machine refused a guest: its own words reach the source, once, and those of no other."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
import time
from pathlib import Path
from typing import Any

import pytest
from vmbus.errors import VmbusError
from vmbus.machine.migration import drive, refused

from tests.unit.machine.test_coordinator_memory import Qemu

SIBLING = {"error-desc": "Sibling indicated error 1"}


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path / "vmbus"


@pytest.mark.parametrize(
    ("target", "source"),
    [
        ("unix:/a/m.sock", "unix:/a/./m.sock"),
        ("tcp:0:4444", "tcp:localhost:4444"),
        ("tcp::4444,ipv4=on", "tcp:[::1]:4444"),
    ],
)
def test_the_reason_is_taken_once(runtime: Path, target: str, source: str) -> None:
    begun = time.time()
    refused.leave(target, "this guest needs the device echo")
    (left,) = runtime.iterdir()
    assert stat.S_IMODE(left.stat().st_mode) == 0o600
    assert refused.take(source, begun) == "this guest needs the device echo"
    assert refused.take(source, begun) is None
    assert list(runtime.iterdir()) == []


@pytest.mark.parametrize("source", ["unix:/b", "tcp:host:1", "exec:cat", "fd:3", "unix:", "tcp:host:http"])
def test_another_address_has_none(source: str) -> None:
    for target in ("unix:/a", "tcp:0:2", "exec:cat /a", "fd:3"):
        refused.leave(target, "no")
    assert refused.take(source, 0) is None


def test_an_old_reason_is_of_another_migration() -> None:
    refused.leave("unix:/a", "no")
    assert refused.take("unix:/a", time.time() + 60) is None


def test_reasons_that_nobody_took_are_removed(runtime: Path) -> None:
    refused.leave("unix:/a", "no")
    (old,) = runtime.iterdir()
    os.utime(old, (0, 0))
    refused.leave("unix:/b", "x" * 10000)
    (new,) = runtime.iterdir()
    assert new != old
    assert len(refused.take("unix:/b", 0) or "") == 4096


async def test_the_source_waits_for_the_targets_words() -> None:
    waiting = asyncio.ensure_future(drive._reason(SIBLING, ["unix:/a"], time.time()))
    await asyncio.sleep(0)
    refused.leave("unix:/a", "this guest needs the device echo")
    assert await waiting == "the target refused the guest: this guest needs the device echo"


async def test_without_them_it_says_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drive, "_REASON_TIMEOUT", 0.01)
    assert "read it at the target" in (await drive._reason(SIBLING, ["tcp:far:4444"], time.time()) or "")
    assert await drive._reason({"error-desc": "Broken pipe"}, ["unix:/a"], time.time()) == "Broken pipe"
    assert await drive._reason({}, ["unix:/a"], time.time()) is None


# --- targets whose address the emulator does not choose ---

MACHINE = "machine:00000000-0000-0000-0000-000000000001"


async def refusing(**qemu: Any) -> Qemu:
    """An emulator that is attached to a QEMU which waits for a guest, and whose guest begins to come."""
    target = Qemu()
    execute = target.execute

    async def answering(command: str, arguments: object = None) -> Any:
        found = await execute(command, arguments)
        return {**found, **qemu} if command == "query-migrate" else found

    target.execute = answering  # type: ignore[method-assign]
    target.coordinator.expect()
    target.coordinator.event("MIGRATION", {"status": "setup"})
    await asyncio.gather(*target._tasks)
    return target


LISTENS = [{"type": "unix", "path": "/a/m.sock"}, {"type": "inet", "host": "::", "port": "4444"}]


@pytest.mark.parametrize("address", ["unix:/a/m.sock", "tcp:target:4444", MACHINE])
async def test_an_attached_target_leaves_its_reason_where_its_qemu_waits(address: str) -> None:
    target = await refusing(**{"socket-address": LISTENS})
    begun = time.time()
    with pytest.raises(VmbusError):
        target.coordinator.load(b"no state")
    reason = refused.take(address, begun)
    assert reason is not None
    assert reason == target.coordinator.load_refused


async def test_what_qemu_itself_refuses_is_left_in_its_words() -> None:
    target = await refusing(**{"error-desc": "Unknown savevm section"})
    begun = time.time()
    target.coordinator.event("MIGRATION", {"status": "failed"})
    await asyncio.gather(*target._tasks)
    assert refused.take(MACHINE, begun) == "Unknown savevm section"


async def test_a_source_looks_under_each_of_its_addresses_once() -> None:
    begun = time.time()
    refused.leave(MACHINE, "this guest needs the device echo")
    refused.leave("unix:/a", "this guest needs the device echo")
    assert refused.take_any(["unix:/a", MACHINE], begun) == "this guest needs the device echo"
    assert refused.take_any(["unix:/a", MACHINE], begun) is None


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_UNIX])
def test_both_ends_of_a_connection_that_was_made_before_know_it_by_one_address(
    family: socket.AddressFamily, tmp_path: Path
) -> None:
    with socket.socket(family) as listener:
        listener.bind(("127.0.0.1", 0) if family == socket.AF_INET else str(tmp_path / "m"))
        listener.listen()
        assert refused.of_descriptor(listener.fileno()) == ()
        with socket.socket(family) as source:
            source.connect(listener.getsockname())
            target, _ = listener.accept()
            with target:
                here, there = (refused.of_descriptor(each.fileno()) for each in (source, target))
                assert here == there
                assert len(here) == 1


def test_a_descriptor_without_an_address_has_none(tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    one, other = socket.socketpair()
    with one, other, (tmp_path / "file").open("w") as file:
        for each in (one, file):
            assert refused.of_descriptor(each.fileno()) == ()
    assert len(list(Path("/proc/self/fd").iterdir())) == before
