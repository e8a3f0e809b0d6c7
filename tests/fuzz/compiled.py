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
from vmbus.native_layout import DEVICE_HEADER
from vmbus.wire import gateway as wire
from vmbus_devices.scsi.fast.build import SOURCE, layout

HERE = Path(__file__).parent
GATEWAY_TESTS = HERE.parent / "unit" / "gateway"
FASTPATH_TESTS = HERE.parent / "unit" / "fastpath"
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
    with_libfuzzer = clang()
    sanitizers = "-fsanitize=address,undefined" + (",fuzzer" if with_libfuzzer else "")
    command = with_libfuzzer or native.compiler()
    return _compile(name, folder, command, sanitizers, driver=not with_libfuzzer), with_libfuzzer is not None


def _compile(name: str, folder: Path, command: str, instrumented: str, *, driver: bool) -> Path:
    """Compile a target with the option ``instrumented``; ``driver``: with the one of this project."""
    folder.mkdir(parents=True, exist_ok=True)
    if name == "take":
        (folder / "layout.h").write_text(layout())
        (folder / "engine_device.h").write_text(DEVICE_HEADER)
        includes, stubs = [folder, SOURCE, FASTPATH_TESTS], []
    else:
        includes, stubs = [gateway_build.SOURCE, GATEWAY_TESTS], [GATEWAY_TESTS / "stub.c"]
    files = [
        HERE / "c" / f"{name}.c",
        *_tested(name),
        *stubs,
        *([HERE / "c" / "unguided.c"] if driver else []),
    ]
    options = [*_FLAGS, instrumented, *(f"-I{each}" for each in (*includes, HERE / "c"))]
    target = folder / name
    objects = [folder / f"{name}-{index}-{file.stem}.o" for index, file in enumerate(files)]
    lines = [
        [command, *options, "-c", str(file), "-o", str(made)]
        for file, made in zip(files, objects, strict=True)
    ]
    for line in (*lines, [command, instrumented, "-pthread", "-o", str(target), *map(str, objects), "-lm"]):
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        if done.returncode:
            raise MissingRequirement(f"{command} does not compile the target {name}:\n{done.stderr}")
    return target


def _tested(name: str) -> list[Path]:
    """Return the sources that a target is about."""
    return sorted((SOURCE if name == "take" else gateway_build.SOURCE).glob("*.c"))


def coverage_of(name: str, folder: Path, corpus: Path) -> str:
    """Run all inputs found so far; return the share of lines that they reach, file by file.

    Raises :class:`~vmbus.errors.MissingRequirement` without gcc and gcov.
    """
    compiler, gcov = shutil.which("gcc"), shutil.which("gcov")
    if compiler is None or gcov is None:
        raise MissingRequirement("the coverage of targets in C is measured with gcc and gcov: install gcc")
    place = folder / f"{name}-coverage"
    shutil.rmtree(place, ignore_errors=True)
    program = _compile(name, place, compiler, "--coverage", driver=True)
    inputs = [str(each) for each in (corpus, folder / f"{name}-inputs") if each.is_dir()]
    done = subprocess.run(
        [str(program), "0", "1", *inputs], cwd=place, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise MissingRequirement(f"the target {name} ended with status {done.returncode}:\n{done.stderr}")
    data = sorted(str(each) for each in place.glob("*.gcda"))
    report = subprocess.run([gcov, "-n", *data], cwd=place, capture_output=True, text=True, check=False)
    parts, reached, all_lines = [], 0.0, 0
    for path, share, lines in re.findall(
        r"^File '(.+)'\nLines executed:([\d.]+)% of (\d+)", report.stdout, re.MULTILINE
    ):
        if Path(path) in _tested(name):
            parts.append(f"{Path(path).name} {float(share):.0f} %")
            reached += float(share) * int(lines) / 100
            all_lines += int(lines)
    return f"{100 * reached / all_lines:.0f} % ({', '.join(sorted(parts))})"


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

    def executed(
        emulator: int,
        answers: int,
        event: int,
        rcx: int,
        *instructions: str,
        posts: int = 0,
        rdx: int = 0x101,
    ) -> bytes:
        scene = struct.pack(
            "<5B5I", emulator, answers, event, 0x51, 0x51, 0x40000000, 0x101, rcx, rdx, 1 << 10
        )
        scene += struct.pack("<B5I", posts, 1, 0, 1, 16, 8)
        return b"\2" + block(*instructions)[1:4] + scene + block(*instructions)[4:]

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
            "journal": says(1, 5, 5),
            "journal-first": says(5),
            "reset": b"\x0e\0" + executed(6, 4, 0, 0, "90")[2:],
            "at-the-vector-in-protected-mode": b"\x06\0" + executed(6, 4, 0, 0, "90")[2:],
            "answered": executed(6, 4, 1, 0x40000073, "0fa2", "0f32", "0f30", "0f01c1"),
            "faults": executed(6, 5, 2, 0x40000073, "0f32"),
            "again": executed(6, 6, 5, 0x40000073, "0f32", "0f01d9"),
            "doorbell": executed(6, 4, 0, 0x5D, "0f01c1"),
            "gone": executed(4, 8, 0, 0x5C, "0f01c1"),
            "tables-being-written": executed(14, 4, 0, 0x5D, "0f01c1", "0fa2"),
            "posted": executed(6, 4, 0, 0x5C, "0f01c1", "0f01d9", posts=7, rdx=0x100000),
            "posted-eom": executed(6, 4, 0, 0x40000084, "0f30", posts=4),
            "ring-full": executed(6, 4, 0, 0x5C, "0f01c1", posts=15, rdx=0x100000),
            "halts": executed(6, 4, 0xE1, 0x838, "0f30", "f4", "f4"),
            "constant": executed(6, 4, 0x10, 0x40000002, "0f32"),
            "sampled": executed(6, 4, 8, 0, "0f31", "90", "0f01f9", "90"),
        },
    }
