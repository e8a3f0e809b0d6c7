"""Why a target on the same machine refused a guest: its own words reach the source, once, and those of no other."""

from __future__ import annotations

import asyncio
import os
import stat
import time
from pathlib import Path

import pytest
from vmbus.machine.migration import drive, refused

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
    waiting = asyncio.ensure_future(drive._reason(SIBLING, "unix:/a", time.time()))
    await asyncio.sleep(0)
    refused.leave("unix:/a", "this guest needs the device echo")
    assert await waiting == "the target refused the guest: this guest needs the device echo"


async def test_without_them_it_says_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drive, "_REASON_TIMEOUT", 0.01)
    assert "read it at the target" in (await drive._reason(SIBLING, "tcp:far:4444", time.time()) or "")
    assert await drive._reason({"error-desc": "Broken pipe"}, "unix:/a", time.time()) == "Broken pipe"
    assert await drive._reason({}, "unix:/a", time.time()) is None
