"""Builds and runs the targets that are C, under the address and undefined-behaviour sanitizers.

    take      the compiled path for reads and writes: packets of a ring
    plugin    the gateway plug-in: translation of instructions, and its socket

With clang they are guided by coverage (libFuzzer); with another compiler seeds are changed at random.
"""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from pathlib import Path

from vmbus import native
from vmbus.errors import MissingRequirement
from vmbus.machine.gateway import build as gateway_build
from vmbus.wire import gateway as wire
from vmbus_devices.scsi.fast.build import SOURCE, layout

HERE = Path(__file__).parent
GATEWAY_TESTS = HERE.parent / "unit" / "gateway"
_FLAGS = ("-std=c11", "-D_GNU_SOURCE", "-g", "-O1", "-pthread", "-fno-sanitize-recover=all")


def clang() -> str | None:
    """Return a clang that has libFuzzer, or nothing."""
    for name in ("clang", *(f"clang-{version}" for version in range(21, 13, -1))):
        found = shutil.which(name)
        if found:
            probe = [found, "-fsanitize=fuzzer", "-x", "c", "-", "-o", "/dev/null"]
            text = "int LLVMFuzzerTestOneInput(const char *d, unsigned long s) { return d && s > 9; }"
            if subprocess.run(probe, input=text, text=True, capture_output=True, check=False).returncode == 0:
                return found
    return None


def build(name: str, folder: Path) -> tuple[Path, bool]:
    """Compile a target into ``folder``; return the program, and whether it is guided by coverage.

    Raises :class:`~vmbus.errors.MissingRequirement` without a compiler.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if name == "take":
        (folder / "layout.h").write_text(layout())
        sources, includes = sorted(SOURCE.glob("*.c")), (str(folder), str(SOURCE))
    else:
        sources = [*sorted(gateway_build.SOURCE.glob("*.c")), GATEWAY_TESTS / "stub.c"]
        includes = (str(gateway_build.SOURCE), str(GATEWAY_TESTS))
    with_libfuzzer = clang()
    command = with_libfuzzer or native.compiler()
    sanitizers = "-fsanitize=address,undefined" + (",fuzzer" if with_libfuzzer else "")
    files = [HERE / "c" / f"{name}.c", *sources, *(() if with_libfuzzer else [HERE / "c" / "unguided.c"])]
    target = folder / name
    line = [command, *_FLAGS, sanitizers, *(f"-I{each}" for each in (*includes, HERE / "c"))]
    done = subprocess.run(
        [*line, "-o", str(target), *map(str, files), "-lm"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise MissingRequirement(f"{command} does not compile the target {name}:\n{done.stderr}")
    return target, with_libfuzzer is not None


def fuzz(name: str, seconds: float, seed: int, folder: Path, corpus: Path) -> dict[str, object]:
    """Build and run a target; return what was reached."""
    try:
        program, guided = build(name, folder)
    except MissingRequirement as error:
        return {"target": name, "skipped": str(error)}
    grown = folder / f"{name}-inputs"
    grown.mkdir(exist_ok=True)
    if guided:
        line = [
            str(program),
            str(grown),
            str(corpus),
            f"-max_total_time={seconds:g}",
            f"-seed={seed}",
            "-max_len=4096",
        ]
        line += ["-max_len=4096", "-print_final_stats=1", "-timeout=20", f"-artifact_prefix={folder}/{name}-"]
    else:
        line = [str(program), f"{seconds:.0f}", str(seed), str(corpus)]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True, errors="replace", check=False)
    text = done.stdout + done.stderr
    (folder / f"{name}.log").write_text(text)
    if done.returncode == 77:
        return {"target": name, "skipped": "no io_uring for this process"}
    found: dict[str, object] = {"target": name, "guided": guided}
    count = re.search(r"number_of_executed_units: (\d+)|^(\d+) executions", text, re.MULTILINE)
    executions = int(count[1] or count[2]) if count else 0
    found |= {"executions": executions, "per_second": round(executions / seconds)}
    if covered := re.findall(r"cov: (\d+) ft: \d+ corp: (\d+)", text):
        found |= {"edges": int(covered[-1][0]), "inputs": int(covered[-1][1])}
    if done.returncode:
        written = re.findall(r"Test unit written to (\S+)", text)
        found["finding"] = written[-1] if written else f"status {done.returncode}: see {folder}/{name}.log"
    return found


def seeds() -> dict[str, dict[str, bytes]]:
    """Return seeds of both targets: a read, a write, instructions that are trapped, a peer's messages."""

    def request(opcode: int, blocks: int) -> bytes:
        pages = (blocks * 512 + 4095) // 4096
        data = 16 + 8 + 8 + 8 * pages
        head = struct.pack("<HHHHQ", 9, data // 8, (data + 64) // 8, 1, 7)
        ranges = struct.pack("<IIII", 0, 1, blocks * 512, 0) + struct.pack(f"<{pages}Q", *range(1, pages + 1))
        direction = 0 if opcode == 0x2A else 1
        srb = struct.pack("<HBBBBBBBBBBI", 52, 0, 0, 0, 0, 0, 0, 10, 20, direction, 0, blocks * 512)
        cdb = struct.pack(">BBIBHB", opcode, 0, 4, 0, blocks, 0).ljust(20, b"\0")
        body = (struct.pack("<III", 3, 1, 0) + srb + cdb).ljust(64, b"\0")
        return head + ranges + body[:64] + bytes(8)

    def block(*instructions: str) -> bytes:
        codes = [bytes.fromhex(each) for each in instructions]
        return b"\0\1\0\0" + b"".join(bytes([len(each) - 1]) + each for each in codes)

    def says(*kinds: int) -> bytes:
        return b"\1" + b"".join(wire.MESSAGE.build(wire.Message(wire.MessageType(kind))) for kind in kinds)

    return {
        "take": {
            "read": bytes(4) + request(0x28, 8),
            "two": b"\0\0\0\4" + request(0x2A, 8) + request(0x28, 20),
        },
        "plugin": {
            "traps": block("90", "0fa2", "0f32", "0f30", "0f01c1", "0f01d9", "0f31", "0f01f9", "660f32"),
            "hello": says(1, 2, 3),
        },
    }
