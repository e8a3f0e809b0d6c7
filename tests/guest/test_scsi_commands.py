"""Commands that a kernel never sends: sg3_utils, edges of the disk, and every opcode there is, on a real guest."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.guest.debian import system_image
from tests.guest.harness import Booted, boot
from tests.guest.test_boot import complaints

pytestmark = [pytest.mark.guest, pytest.mark.timeout(600)]

MIB = 1 << 20
DISK = 64 * MIB
BLOCKS = DISK // 512
DISC = 3 * MIB
PROGRAM = "/run/initramfs/bin/scsi_commands"
FIND = f"""
disc=/dev/sr0
until [ -b "$disk" ] && [ -b $disc ]; do  # the system's disk is there, these may still be looked for
  for each in /sys/block/sd?; do [ "$(cat $each/size)" = {BLOCKS} ] && disk=/dev/${{each##*/}}; done
  sleep 0.1
done
head -c 512 /dev/urandom >/tmp/block
"""

SG3_UTILS = [
    ("sg_turs $disk", 0, ""),
    ("sg_inq $disk", 0, r"SPC-3[\s\S]*CmdQue=1[\s\S]*Msft[\s\S]*Virtual Disk[\s\S]*1\.0"),
    (
        "sg_vpd -p 0 $disk",
        0,
        r"\[sv\]\s[^[]*\[sn\]\s[^[]*\[di\]\s[^[]*\[bl\]\s[^[]*\[bdc\]\s[^[]*\[lbpv\]\s*$",
    ),
    ("sg_vpd -p 0x80 $disk", 0, r"serial number: blocks\n"),
    ("sg_vpd -p 0x83 $disk", 0, r"Addressed logical unit:\s+designator type: NAA,\s+code set: Binary\s+0x3"),
    (
        "sg_vpd -p 0xb0 $disk",
        0,
        r"\(WSNZ\): 1\s[\s\S]*Maximum transfer length: 0x200\s[\s\S]*descriptor count: 0x100\s[\s\S]*"
        r"Maximum write same length: 0x3ffff\s",
    ),
    ("sg_vpd -p 0xb1 $disk", 0, r"Non-rotating medium"),
    ("sg_vpd -p 0xb2 $disk", 0, r"LBPU=1\s+LBPWS=1\s+LBPWS10=1\s[\s\S]*type: thin provisioned"),
    ("sg_readcap $disk", 0, rf"Last LBA={BLOCKS - 1} [\s\S]*Logical block length=512"),
    ("sg_readcap -l $disk", 0, rf"lbpme=1[\s\S]*Last LBA={BLOCKS - 1} [\s\S]*exponent=3"),
    (
        "sg_luns $disk",
        0,
        r"implies 3 lun entries[\s\S]*0000000000000000\s+0001000000000000\s+0002000000000000",
    ),
    ("sg_modes -a $disk", 0, r"Caching[\s\S]*Control"),
    ("sg_sync $disk", 0, ""),
    ("sg_verify --lba=0 --count=512 $disk", 0, ""),
    (f"sg_verify --lba={BLOCKS - 1} --count=2 $disk", 22, ""),
    ("dd if=/tmp/block of=$disk seek=64 oflag=direct status=none", 0, ""),
    ("sg_verify --lba=64 --count=1 --ndo=512 --in=/tmp/block --quiet $disk", 0, ""),
    ("sg_verify --lba=65 --count=1 --ndo=512 --in=/tmp/block --quiet $disk", 14, ""),
    ("sg_write_same --10 --lba=128 --num=256 --in=/tmp/block $disk", 0, ""),
    ("dd if=$disk iflag=direct skip=383 count=1 status=none | cmp - /tmp/block", 0, ""),
    ("sg_write_same --16 --lba=128 --num=256 --in=/tmp/block $disk", 0, ""),
    ("dd if=$disk iflag=direct skip=384 count=1 status=none | cmp -n 512 - /dev/zero", 0, ""),
    ("sg_write_same --16 --unmap --lba=128 --num=256 $disk", 0, ""),
    ("dd if=$disk iflag=direct skip=128 count=256 status=none | cmp -n 131072 - /dev/zero", 0, ""),
    (f"sg_write_same --16 --lba={BLOCKS} --num=1 --in=/tmp/block $disk", 22, ""),
    ("dd if=/dev/urandom of=$disk bs=1M seek=1 count=2 oflag=direct status=none", 0, ""),
    ("sg_get_lba_status --lba=2048 $disk", 0, r"mapped"),
    ("sg_unmap --lba=2048 --num=2048 --force $disk", 0, ""),
    ("sg_get_lba_status --lba=2048 $disk", 0, r"deallocated"),
    ("dd if=$disk iflag=direct bs=1M skip=1 count=1 status=none | cmp -n 1048576 - /dev/zero", 0, ""),
    (f"sg_unmap --lba={BLOCKS - 1} --num=2 --force $disk", 22, ""),
    ("blkdiscard -o 2097152 -l 1048576 $disk", 0, ""),
    ("blkdiscard --zeroout -o 4194304 -l 1048576 $disk", 0, ""),
    ("sg_persist --in --read-keys $disk", 0, r"NO registered reservation keys"),
    ("sg_persist --out --register --param-sark=0x77 $disk", 0, ""),
    ("sg_persist --in --read-keys $disk", 0, r"0x77"),
    ("sg_persist --out --reserve --param-rk=0x78 --prout-type=3 $disk", 24, ""),
    ("sg_persist --out --reserve --param-rk=0x77 --prout-type=3 $disk", 0, ""),
    ("sg_persist --in --read-reservation $disk", 0, r"Exclusive Access"),
    ("sg_persist --in --report-capabilities $disk", 0, r"Exclusive Access: 1"),
    ("sg_persist --out --release --param-rk=0x77 --prout-type=3 $disk", 0, ""),
    ("sg_persist --out --register --param-rk=0x77 --param-sark=0 $disk", 0, ""),
    ("sg_raw $disk ff 00 00 00 00 00", 9, ""),
    ("sg_raw -r 512 $disk 28 20 00 00 00 00 00 00 01 00", 5, ""),
    ("sg_start --stop $disk; sg_start --start $disk", 0, ""),
    ("sg_prevent $disk; sg_prevent --allow $disk", 0, ""),
    ("sg_turs $disc", 0, ""),
    ("sg_inq $disc", 0, r"PDT=5\s+RMB=1[\s\S]*Virtual DVD-ROM"),
    ("sg_readcap $disc", 0, rf"Last LBA={DISC // 2048 - 1} [\s\S]*Logical block length=2048"),
    ("sg_modes -a $disc", 0, r"capabilities"),
    ("sg_get_config $disc", 0, r"CD-ROM"),
    ("sg_raw -r 12 $disc 43 00 00 00 00 00 00 00 0c 00", 0, r"00 12 01 01 00 14 01"),
    ("sg_raw -r 2048 $disc 28 00 00 00 06 00 00 00 01 00", 22, ""),
    ("sg_raw -s 2048 -i /dev/zero $disc 2a 00 00 00 00 00 00 00 01 00", 9, ""),
]
"""Shell line, exit status (sg3_utils(8): 5 illegal request, 9 invalid opcode, 14 miscompare, 22 LBA out
of range, 24 reservation conflict), and what its output has in it.
"""

END = BLOCKS.to_bytes(4, "big").hex()
LAST = (BLOCKS - 1).to_bytes(4, "big").hex()
LBA16 = f"{BLOCKS - 1:016x}"

EDGES = [
    ("read-last", f"2800{LAST}00000100", "in", 512, "good 512"),
    ("read-over-the-end", f"2800{LAST}00000200", "in", 1024, "5/21/00"),
    ("read-behind-the-end", f"2800{END}00000100", "in", 512, "5/21/00"),
    ("read-nothing-at-the-end", f"2800{END}00000000", "none", 0, "good 0"),
    ("read-nothing-behind", "2800ffffffff00000000", "none", 0, "5/21/00"),
    ("read-at-2-to-the-64", "8800ffffffffffffffff000000010000", "in", 512, "5/21/00"),
    ("read-16-last", f"8800{LBA16}000000010000", "in", 512, "good 512"),
    ("read-12-last", f"a800{LAST}000000010000", "in", 512, "good 512"),
    ("read-fua", "28080000000000000100", "in", 512, "good 512"),
    ("read-dpo", "28100000000000000100", "in", 512, "good 512"),
    ("read-protected", "28200000000000000100", "in", 512, "5/24/00"),
    ("read-too-short", "28000000000000000200", "in", 512, "5/24/00"),
    ("read-longer-buffer", "28000000000000000100", "in", 4096, "good 512"),
    ("read-more-than-possible", "a800000000000000ffff0000", "in", 4096, "5/24/00"),
    ("read-the-wrong-way", "28000000000000000100", "out", 512, "5/24/00"),
    ("write-last", f"2a00{LAST}00000100", "out", 512, "good 512"),
    ("write-over-the-end", f"2a00{LAST}00000200", "out", 1024, "5/21/00"),
    ("write-fua-dpo", "2a180000000000000100", "out", 512, "good 512"),
    ("write-protected", "2a200000000000000100", "out", 512, "5/24/00"),
    ("write-the-wrong-way", "2a000000000000000100", "in", 512, "5/24/00"),
    ("write-nothing", "2a000000000000000000", "none", 0, "good 0"),
    ("write-verify", "2e000000000000000100", "out", 512, "good 512"),
    ("verify-compare", "2f020000000000000100", "out", 512, "good 512"),
    ("verify-protected", "2f200000000000000100", "none", 0, "5/24/00"),
    ("same-nothing", "41000000000000000000", "out", 512, "5/24/00"),
    ("same-anchor", "93100000000000000000000000010000", "out", 512, "5/24/00"),
    ("same-protected", "93200000000000000000000000010000", "out", 512, "5/24/00"),
    ("unmap-nothing", "42000000000000000000", "none", 0, "good 0"),
    ("unmap-short-list", "42000000000000000400", "out", 4, "5/1A/00"),
    ("unmap-anchor", "42010000000000001800", "out", 24, "5/24/00"),
    ("synchronize-behind", f"3500{END}00000100", "none", 0, "5/21/00"),
    ("luns", "a00000000000000000200000", "in", 32, "good 32"),
    ("sense", "030000001200", "in", 18, "good 18"),
    ("sense-descriptors", "030100001200", "in", 18, "5/24/00"),
    ("capacity-16", "9e100000000000000000000000200000", "in", 32, "good 32"),
    ("service-action", "9e1f0000000000000000000000200000", "in", 32, "5/24/00"),
    ("reserve-short", "5f000000000000001700", "out", 23, "5/1A/00"),
    ("reserve-action", "5f1f0000000000001800", "out", 24, "5/24/00"),
    ("six-bytes-of-ten", "280000000000", "in", 4096, "good 0"),
]
DRIVE_EDGES = [
    ("read-last", f"2800{DISC // 2048 - 1:08x}00000100", "in", 2048, "good 2048"),
    ("read-over-the-end", f"2800{DISC // 2048 - 1:08x}00000200", "in", 4096, "5/21/00"),
    ("read-less-than-a-block", "28000000000000000100", "in", 512, "5/24/00"),
    ("contents", "43000000000000001400", "in", 20, "good 20"),
    ("contents-of-track-2", "43000000000002001400", "in", 20, "5/24/00"),
    ("event-polled", "4a010000100000000800", "in", 8, "good 8"),
    ("event-not-polled", "4a000000100000000800", "in", 8, "5/24/00"),
    ("write", "2a000000000000000100", "out", 2048, "5/20/00"),
    ("lock", "1e0000000100", "none", 0, "good 0"),
    ("eject-when-locked", "1b0000000200", "none", 0, "5/53/02"),
    ("unlock", "1e0000000000", "none", 0, "good 0"),
    ("eject", "1b0000000200", "none", 0, "good 0"),
    ("ready-without-disc", "000000000000", "none", 0, "2/3A/00"),
    ("read-without-disc", "28000000000000000100", "in", 2048, "2/3A/00"),
    ("capacity-without-disc", "25000000000000000000", "in", 8, "2/3A/00"),
    ("load", "1b0000000300", "none", 0, "good 0"),
    ("the-disc-is-new", "000000000000", "none", 0, "6/28/00"),
    ("ready", "000000000000", "none", 0, "good 0"),
]
"""Name, CDB, direction and bytes of the buffer, what comes of it: bytes transferred, or sense data."""

ALWAYS = dict.fromkeys(("none", "in", "out"), "good")
REFUSED = dict.fromkeys(("none", "in", "out"), "5/24/00")
INFORMS = {"none": "good", "in": "good", "out": "5/24/00"}
LINUX_SAYS_GOOD = (0x12, 0x1A, 0x5A)
"""hv_storvsc turns every failure of these (INQUIRY, MODE SENSE) into success."""

SWEEPS: dict[tuple[str, int], dict[int, dict[str, str]]] = {
    ("disk", 0x00): {
        **dict.fromkeys((0x00, 0x03, 0x12, 0x1A, 0x1B, 0x1E, 0x28, 0x2A, 0x2E, 0x2F, 0x35, 0x42), ALWAYS),
        **dict.fromkeys((0x5E, 0x88, 0x8A, 0x8E, 0x8F, 0x91, 0xA0, 0xA8, 0xAA, 0xAE, 0xAF), ALWAYS),
        **dict.fromkeys((0x08, 0x0A, 0x41, 0x93, 0x9E), REFUSED),
        0x25: INFORMS,
        0x5F: dict.fromkeys(ALWAYS, "5/1A/00"),
    },
    ("disk", 0xFF): {
        **dict.fromkeys((0x00, 0x12, 0x1A, 0x1B, 0x1E), ALWAYS),
        **dict.fromkeys((0x03, 0x28, 0x2A, 0x2E, 0x2F, 0x35, 0x41, 0x42, 0x5E), REFUSED),
        **dict.fromkeys((0x88, 0x8A, 0x8E, 0x8F, 0x91, 0x93, 0x9E, 0xA8, 0xAA, 0xAE, 0xAF), REFUSED),
        **{opcode: dict.fromkeys(ALWAYS, "5/21/00") for opcode in (0x08, 0x0A)},
        0x25: INFORMS,
        0x5F: dict.fromkeys(ALWAYS, "5/1A/00"),
        0xA0: INFORMS,
    },
    ("disc", 0x00): {
        **dict.fromkeys((0x00, 0x03, 0x12, 0x1A, 0x1B, 0x1E, 0x28, 0x43, 0x46, 0xA0, 0xA8), ALWAYS),
        **dict.fromkeys((0x08, 0x4A), REFUSED),
        0x25: INFORMS,
    },
    ("disc", 0xFF): {
        **dict.fromkeys((0x00, 0x12, 0x1A, 0x1B, 0x1E), ALWAYS),
        **dict.fromkeys((0x03, 0x28, 0x43, 0xA8), REFUSED),
        0x08: dict.fromkeys(ALWAYS, "5/21/00"),
        **dict.fromkeys((0x25, 0x46, 0x4A, 0xA0), INFORMS),
    },
}
"""Every opcode that is not refused with 5/20/00, and what comes of it without data, with a buffer in, and out."""


async def run(tmp_path: Path, program: Path, script: str) -> str:
    """The output of ``script`` in a guest that has a disk ``$disk`` and a disc ``$disc``."""
    image, disc = tmp_path / "blocks.img", tmp_path / "disc.iso"
    image.touch()
    os.truncate(image, DISK)
    disc.write_bytes(os.urandom(DISC))

    async with boot(
        tmp_path,
        smp=2,
        root="LABEL=debian",
        devices=(
            f"scsi,image={system_image()},readonly=on",
            f"scsi,image={image},serial=blocks",
            f"scsi,image={disc},serial=disc",
        ),
        load=("hv_vmbus", "sr_mod", "sg"),
        add=[(program, "/bin/scsi_commands")],
        command=[FIND + script],
    ) as guest:
        assert await guest.finish() == 0, guest.tail()
        healthy(guest)
        return guest.output.decode(errors="replace")


def healthy(guest: Booted) -> None:
    assert complaints(guest.console()) == []
    for channel in guest.status()["channels"]:
        assert channel["refusals"] == {}, channel
        assert channel["state"] == "open"


async def test_sg3_utils_find_a_disk_and_a_drive_as_they_should_be(
    tmp_path: Path, guest_program: Callable[[str], Path]
) -> None:
    script = "".join(f"echo '@@'; {{ {line}; }} 2>&1; echo \"@$?\"\n" for line, _, _ in SG3_UTILS)
    output = await run(tmp_path, guest_program("scsi_commands"), script)
    parts = output.split("@@\n")[1:]
    assert len(parts) == len(SG3_UTILS)
    wrong = []
    for (line, status, pattern), part in zip(SG3_UTILS, parts, strict=True):
        said, _, found = part.rpartition("@")
        if int(found) != status or not re.search(pattern, said):
            wrong.append(f"{line}: status {found.strip()}, not {status}\n{said}")
    assert not wrong, "\n".join(wrong)


async def test_every_edge_and_every_opcode_gets_its_answer(
    tmp_path: Path, guest_program: Callable[[str], Path]
) -> None:
    edges = {"disk": EDGES, "disc": DRIVE_EDGES}
    script = ""
    for what, cases in edges.items():
        words = " ".join(f"{name} {cdb} {way} {count}" for name, cdb, way, count, _ in cases)
        script += f"echo @{what}; {PROGRAM} ${what} {words} || exit 1\n"
    for what, fill in SWEEPS:
        script += f"echo @{what}-{fill:02X}; {PROGRAM} ${what} sweep {fill:02x} || exit 2\n"
    # and it works as before
    script += "echo @after; dd if=/dev/urandom of=/tmp/mib bs=1M count=1 status=none; "
    script += "dd if=/tmp/mib of=$disk bs=64k oflag=direct status=none; "
    script += "dd if=$disk bs=128k count=8 iflag=direct status=none | cmp - /tmp/mib && echo same\n"
    output = await run(tmp_path, guest_program("scsi_commands"), script)
    found = {part.split("\n", 1)[0]: part.splitlines()[1:] for part in output.split("@")[1:]}
    assert found.pop("after") == ["same"]
    wrong = {}
    for what, cases in edges.items():
        answers = dict(line.split(" ", 1) for line in found[what])
        for name, _, _, _, expected in cases:
            if answers.get(name) != expected:
                wrong[f"{what} {name}"] = f"{answers.get(name)}, not {expected}"
    for (what, fill), opcodes in SWEEPS.items():
        answers = dict(line.split(" ", 1) for line in found[f"{what}-{fill:02X}"])
        assert len(answers) == 3 * 256
        for opcode in range(256):
            for way in ("none", "in", "out"):
                answer = answers[f"{opcode:02X}-{way}"]
                wanted = opcodes.get(opcode, {}).get(way, "5/20/00")
                if answer.split(" ")[0] != wanted and opcode not in LINUX_SAYS_GOOD:
                    wrong[f"{what} {fill:02X} {opcode:02X}-{way}"] = f"{answer}, not {wanted}"
    assert not wrong
