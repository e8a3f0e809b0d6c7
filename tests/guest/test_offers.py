"""Channels that come, move and go while a guest runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from vmbus.devices.registry import Registry

from tests.guest.harness import DEFAULT_DEVICES, LOADED_MODULES, boot, nothing_lost
from tests.guest.test_boot import complaints

pytestmark = pytest.mark.guest


@pytest.mark.conformance(35)
async def test_a_channel_moves_to_another_processor(tmp_path: Path) -> None:
    script = (
        "for cpu in 1 0 1 0 1; do for f in /sys/bus/vmbus/devices/fd149e91*/channels/*/cpu; "
        "do echo $cpu > $f || exit 1; cat $f; done; usleep 300000; done; echo moved; sleep 1000"
    )

    async with boot(tmp_path, smp=2, command=[script]) as guest:
        await guest.says("moved")
        await guest.until(lambda: guest.channel("heartbeat")["target_vp"] == 1, "the new target")
        await guest.more_beats()
        assert guest.output.split()[:5] == [b"1", b"0", b"1", b"0", b"1"]
        assert nothing_lost(guest)
        assert complaints(guest.console()) == []


@pytest.mark.conformance(18)
@pytest.mark.conformance(19)
@pytest.mark.conformance(20)
async def test_a_device_comes_and_goes_while_the_guest_runs(tmp_path: Path) -> None:
    async with boot(tmp_path, load=(*LOADED_MODULES, "uio_hv_generic")) as guest:
        await guest.more_beats()
        for _ in range(30):
            attached = guest.host.add_device(Registry().create("echo"))
            await guest.until(lambda: attached.channel.relid, "an offer")
            guest.host.remove_device(attached)
            await guest.until(lambda: len(guest.status()["channels"]) == 3, "the offer to be released")
        await guest.more_beats()
        assert guest.console().count("Unknown GUID") >= 1
        assert complaints(guest.console()) == []


@pytest.mark.conformance(20)
async def test_a_storm_of_offers_and_rescinds(tmp_path: Path) -> None:
    async with boot(tmp_path, devices=DEFAULT_DEVICES) as guest:
        await guest.more_beats()
        for _ in range(200):  # without waiting for the guest
            guest.host.remove_device(guest.host.add_device(Registry().create("echo")))
        await guest.until(
            lambda: len(guest.status()["channels"]) == 3, "every rescinded channel to be released"
        )
        await guest.more_beats()
        assert complaints(guest.console()) == []
