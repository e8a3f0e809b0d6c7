"""The echo device from a guest's user space: rings, signals, guest memory, and code that the host writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vmbus.machine.memory import MappedMemory

from tests.guest.harness import DEFAULT_DEVICES, LOADED_MODULES, boot
from tests.guest.matrix import full
from tests.guest.test_boot import complaints

pytestmark = pytest.mark.guest


async def run_client(
    tmp_path: Path, program: Path, *options: str, kernel: str = "debian-6.12", smp: int = 1
) -> tuple[int | None, dict[str, Any], dict[str, Any]]:
    """``(exit status, what the client reports, the channel's status)``."""
    async with boot(
        tmp_path,
        kernel=kernel,
        smp=smp,
        # uio_hv_generic of 6.1 refuses a channel that is signalled by hypercall.
        devices=(*DEFAULT_DEVICES, f"echo,monitor={'on' if kernel == 'debian-6.1' else 'off'}"),
        load=(*LOADED_MODULES, "uio_hv_generic"),
        add=[(program, "/bin/echo_client")],
        command=["echo_client", *options],
    ) as guest:
        status = await guest.finish()
        assert complaints(guest.console()) == []
        lines = guest.output.decode().splitlines()
        assert lines, guest.tail()
        try:
            return status, json.loads(lines[-1]), guest.channel("echo")
        except ValueError:
            raise AssertionError(guest.tail()) from None


@pytest.mark.parametrize("kernel", ["debian-6.1", full("debian-6.12"), full("debian-backports")])
async def test_everything_that_is_sent_comes_back_unchanged(
    tmp_path: Path, guest_program: Callable[[str], Path], kernel: str
) -> None:
    status, report, channel = await run_client(
        tmp_path,
        guest_program("echo_client"),
        *(
            "--count",
            "3000",
            "--generate",
            "2000",
            "--fill",
            "50",
            "--signal-latency",
            "200",
            "--cycles",
            "3",
        ),
        kernel=kernel,
        smp=2,
    )
    assert status == 0, report
    assert channel["refusals"] == {}
    assert channel["io"]["refusals"] == {}
    assert channel["opens"] >= 3


async def test_code_that_the_host_writes_into_a_page_is_the_code_that_runs(
    tmp_path: Path, guest_program: Callable[[str], Path]
) -> None:
    status, report, _ = await run_client(tmp_path, guest_program("echo_client"), "--fill-code", "40")
    assert status == 0, report


@pytest.mark.full
async def test_without_the_notes_of_code_pages_stale_code_runs(
    tmp_path: Path, guest_program: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shows that the test above can fail: the same guest with plain stores through the mapping."""
    plain = MappedMemory.map_file.__func__  # type: ignore[attr-defined]

    def blind(cls: type[MappedMemory], /, *arguments: Any, code_pages: object, **named: Any) -> MappedMemory:
        found: MappedMemory = plain(cls, *arguments, code_pages=None, **named)
        return found

    monkeypatch.setattr(MappedMemory, "map_file", classmethod(blind))
    status, report, _ = await run_client(tmp_path, guest_program("echo_client"), "--fill-code", "40")
    assert status != 0, report
