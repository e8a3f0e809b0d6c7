"""A whole Debian system, unmodified, whose disk is the emulator's."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.guest.debian import boot_debian, check_file_system, system_copy
from tests.guest.harness import nothing_lost
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


@pytest.mark.timeout(900)
def test_debian_lives_on_the_disk(tmp_path: Path) -> None:
    image = system_copy(tmp_path)

    async def story() -> None:
        async with boot_debian(tmp_path, f"image={image}") as (guest, shell):
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

            disk = units(guest)["0:0"]
            assert set(disk["errors"]) <= ASKED_IN_VAIN
            assert disk["flushes"] > 0
            assert complaints(guest.console()) == []
            assert nothing_lost(guest)
            assert all(channel["refusals"] == {} for channel in guest.status()["channels"])
            shell.send("systemctl poweroff")
            await guest.finish()

    asyncio.run(story())
    check_file_system(image)
