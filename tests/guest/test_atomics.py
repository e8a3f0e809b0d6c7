"""Words in which guest and host each change bits of their own: what one stores, the other does not undo."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from vmbus.bus.io.channel_io import ChannelIo

from tests.guest.harness import DEFAULT_DEVICES, LOADED_MODULES, boot

pytestmark = pytest.mark.guest

SHARED = 2048
"""As ``programs/atomics.c`` has it: a word, of which the highest byte is the host's, and the word that ends it."""
STORES = 10_000
MAX_STORES = 100 * STORES


@pytest.mark.parametrize(
    ("smp", "atomic"), [((), True), (("-smp", "1,maxcpus=1"), False)], ids=["as run", "alone"]
)
async def test_a_store_of_the_host_s_is_not_undone_by_a_locked_instruction_of_the_guest_s(
    tmp_path: Path, guest_program: Callable[[str], Path], smp: tuple[str, ...], atomic: bool
) -> None:
    async with boot(
        tmp_path,
        devices=(*DEFAULT_DEVICES, "echo,monitor=off"),
        load=(*LOADED_MODULES, "uio_hv_generic"),
        add=[(guest_program("atomics"), "/bin/atomics")],
        command=["atomics"],
        extra=smp,
    ) as guest:
        await guest.says("ready")
        assert guest.host.facts.atomic is atomic
        ends = [each.endpoint for each in guest.host.bus.channels]
        echo = next(each for each in ends if isinstance(each, ChannelIo) and each.device.name == "echo")
        page, _ = echo.channel.ring_pages()
        undone = stores = 0
        # One that is undone is enough; it takes a vCPU that runs at the same time as this process.
        while stores < STORES or not (atomic or undone or stores >= MAX_STORES):
            number = stores
            stores += 1
            page.write(SHARED + 3, bytes([number % 255 + 1]))
            for _ in range(30):
                page.load_u32(SHARED)
            undone += page.read(SHARED + 3, 1)[0] != number % 255 + 1
            if number % 1000 == 0:
                await asyncio.sleep(0)
        page.store_u32(SHARED + 4, 1)
        await guest.says("done")
    # The second is the reason for ``maxcpus``: it is what a guest of QEMU's default machine suffers.
    assert (undone == 0) is atomic, f"{undone} of {stores} stores were undone"
