"""A whole Debian system, unmodified, whose disk is the emulator's."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from vmbus.provision.qemu import find_qemu

from tests.guest.debian import boot_debian, check_file_system, system_copy, system_image
from tests.guest.harness import nothing_lost
from tests.guest.matrix import full
from tests.guest.test_boot import complaints
from tests.guest.test_scsi import ASKED_IN_VAIN, units

pytestmark = pytest.mark.guest

FROM_ITS_OWN_REPOSITORY = (
    "-o Dir::Etc::sourcelist=/etc/apt/sources.list.d/repository.list -o Dir::Etc::sourceparts=-"
)
PROGRAM = r"""
#include <stdio.h>
#include <sys/utsname.h>
int main(void) { struct utsname name; uname(&name); printf("%s %d\n", name.release, __GNUC__); return 42; }
"""


def qemu_img(*words: str) -> None:
    subprocess.run([*find_qemu().qemu_img(), *words], check=True)


def overlay(folder: Path) -> Path:
    """A qcow2 image on top of the one in the cache, which stays as it is."""
    image = folder / "overlay.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-b", str(system_image()), "-F", "raw", str(image))
    return image


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("disk", "reboots"),
    [pytest.param("raw", 0, id="raw-one-boot"), full("raw", 1, id="raw"), full("overlay", 1, id="overlay")],
)
async def test_debian_lives_on_the_disk(tmp_path: Path, disk: str, reboots: int) -> None:
    image = system_copy(tmp_path) if disk == "raw" else overlay(tmp_path)

    options = "" if disk == "raw" else ",format=qcow2,backing=on"
    async with boot_debian(tmp_path, f"image={image}{options}") as (guest, shell):
        assert await shell.does("systemctl is-system-running --wait") == "running", await shell.run(
            "systemctl --failed"
        )
        assert await shell.does("systemctl is-active multi-user.target") == "active"
        assert await shell.does("systemd-detect-virt") == "microsoft"
        assert await shell.does("findmnt -no SOURCE,FSTYPE /") == "/dev/sda1 ext4"

        status, _ = await shell.run("jq --version")
        assert status == 127
        await shell.does(f"apt-get -q update {FROM_ITS_OWN_REPOSITORY}")
        await shell.does("apt-get -qy install jq")
        assert await shell.does("echo '[1, 23]' | jq -M '.[1]'") == "23"

        await shell.does(f"cat >prog.c <<'END'\n{PROGRAM}\nEND")
        await shell.does("gcc -O2 -Wall -o /usr/local/bin/prog prog.c")
        status, output = await shell.run("prog")
        assert (status, output) == (42, f"{await shell.does('uname -r')} 14")

        boot_id = await shell.does("cat /proc/sys/kernel/random/boot_id")
        machine_id = await shell.does("cat /etc/machine-id")
        assert len(machine_id) == 32
        for _ in range(reboots):
            shell.send("systemctl reboot")
            await guest.until(lambda: guest.host.events.resets == 1, "the reboot")
            await shell.ready()
            assert await shell.does("cat /proc/sys/kernel/random/boot_id") != boot_id
            assert await shell.does("cat /etc/machine-id") == machine_id
            assert await shell.does("systemctl is-system-running --wait") == "running"
            assert await shell.run("prog") == (status, output)
        # what is left out of the image is missing, nothing is changed
        _, verified = await shell.run("dpkg --verify jq libjq1 libonig5 libc6 gcc-14")
        assert [line for line in verified.splitlines() if not line.startswith("missing ")] == []

        unit = units(guest)["0:0"]
        assert set(unit["errors"]) <= ASKED_IN_VAIN
        assert unit["flushes"] > 0
        assert complaints(guest.console()) == []
        assert nothing_lost(guest)
        assert all(channel["refusals"] == {} for channel in guest.status()["channels"])
        shell.send("systemctl poweroff")
        await guest.finish()
    if disk == "overlay":
        qemu_img("check", "-q", str(image))
        whole = tmp_path / "whole.img"
        qemu_img("convert", "-O", "raw", str(image), str(whole))
        image = whole
    check_file_system(image)
