"""Fuzz the targets of :mod:`tests.fuzz.targets`, guided by coverage where atheris is installed.

    python -m tests.fuzz.guided saved_states --seconds 60
    python -m tests.fuzz.guided all --seconds 30 --json
    python -m tests.fuzz.guided storvsp --input crash-0123          run one input again

Without atheris (``pip install -e '.[fuzz]'``) the seeds are changed at random, without guidance. An input that is a
finding is written to ``build/fuzz``; once the fault is mended, move it to ``tests/fuzz/corpus/TARGET``, where
``tests/fuzz/test_corpus.py`` runs it.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import logging
import random
import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "fuzz"
CORPUS = Path(__file__).parent / "corpus"
MAX_INPUT = 33000
"""Bytes of a changed input; :data:`LONGEST` for guided runs of some targets, whose time goes with the length."""
LONGEST = {"frames": 4096, "saved_states": 4096, "nbd_negotiation": 512, "nbd_replies": 4500} | {
    "storvsp": 512,
    "channel_messages": 512,
    "gateway_socket": 12400,
    "journal": 4200,
    "mirror": 1024,
}
LEDGER = BUILD / "executions.json"
"""What was executed so far, in all runs: target → executions and seconds of processor time."""
NAMES = (
    *("frames", "saved_states", "nbd_negotiation", "nbd_replies", "storvsp", "channel_messages"),
    *("gateway_socket", "journal", "mirror"),
)


COMPILED = ("take", "plugin")
"""The targets of :mod:`tests.fuzz.compiled`. It is not imported here: atheris instruments what is imported first."""


def seeds(name: str) -> list[Path]:
    """Return the kept inputs of a target."""
    folder = CORPUS / name
    return sorted(folder.iterdir()) if folder.is_dir() else []


def mutations(kept: Sequence[bytes], rng: random.Random) -> Iterator[bytes]:
    """Yield changed seeds without end."""
    words = (b"\0", b"\xff", b"\xff" * 4, b"\x80\0\0\0", b"\xff" * 8, b"\x01\0\0\0")
    while True:
        data = bytearray(rng.choice(kept))
        for _ in range(rng.randrange(1, 8)):
            at = rng.randrange(len(data) + 1)
            match rng.randrange(6):
                case 0 if data:
                    data[at % len(data)] ^= 1 << rng.randrange(8)
                case 1 if data:
                    data[at % len(data)] = rng.randrange(256)
                case 2:
                    del data[at : at + rng.randrange(16)]
                case 3:
                    data[at:at] = rng.randbytes(rng.randrange(16))
                case 4:
                    word = rng.choice(words)
                    data[at : at + len(word)] = word
                case _:
                    other = rng.choice(kept)
                    data[at:] = other[rng.randrange(len(other) + 1) :]
        yield bytes(data[:MAX_INPUT])


def unguided(name: str, seconds: float, seed: int) -> tuple[int, bytes | None]:
    """Run changed seeds for ``seconds``; return their number, and the input that is a finding."""
    from tests.fuzz.targets import TARGETS

    target = TARGETS[name]()
    kept = [path.read_bytes() for path in seeds(name)] or [b""]
    end = time.monotonic() + seconds
    count = 0
    for data in mutations(kept, random.Random(seed)):
        try:
            target(data)
        except Exception:
            logging.getLogger(__name__).exception("%s", name)
            return count, data
        count += 1
        if time.monotonic() > end:
            break
    return count, None


def guided(name: str, arguments: Sequence[str]) -> None:
    """Run libFuzzer in this process, which it ends."""
    import atheris

    with atheris.instrument_imports(include=[part[:-3].replace("/", ".") for part in PARTS[name]]):
        from tests.fuzz.targets import TARGETS
    target = TARGETS[name]()
    gc.collect()
    gc.freeze()  # what is there now stays: no collection looks at it again
    atheris.Setup(["fuzz", *arguments], target)
    atheris.Fuzz()


def fuzz(name: str, seconds: float, seed: int) -> dict[str, object]:
    """Fuzz one target in a process of its own; return what was reached, and add it to :data:`LEDGER`."""
    BUILD.mkdir(parents=True, exist_ok=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = _fuzz(name, seconds, seed)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    count = found.get("executions")
    if isinstance(count, int):
        used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        ledger = json.loads(LEDGER.read_text()) if LEDGER.exists() else {}
        entry = ledger.setdefault(name, {"executions": 0, "seconds": 0.0})
        entry["executions"] += count
        entry["seconds"] = round(entry["seconds"] + used, 1)
        LEDGER.write_text(json.dumps(ledger, indent=1) + "\n")
        found["in_all"] = entry["executions"]
    return found


def _fuzz(name: str, seconds: float, seed: int) -> dict[str, object]:
    if name in COMPILED:
        from tests.fuzz import compiled

        return compiled.fuzz(name, seconds, seed, BUILD, CORPUS / name)
    if importlib.util.find_spec("atheris") is None:
        count, finding = unguided(name, seconds, seed)
        found: dict[str, object] = {"target": name, "guided": False, "executions": count}
        if finding is not None:
            place = BUILD / f"{name}-finding"
            place.write_bytes(finding)
            found["finding"] = str(place)
        return found | {"per_second": round(count / seconds)}
    grown = BUILD / name
    grown.mkdir(exist_ok=True)
    kept = CORPUS / name
    line = [
        *(sys.executable, "-m", "tests.fuzz.guided", name, "--libfuzzer", str(grown)),
        *([str(kept)] if kept.is_dir() else []),
        *(
            f"-max_total_time={seconds:g}",
            f"-seed={seed}",
            f"-max_len={LONGEST.get(name, MAX_INPUT)}",
            "-timeout=20",
            "-rss_limit_mb=2048",
        ),
        *("-print_final_stats=1", "-verbosity=1", f"-artifact_prefix={BUILD}/{name}-"),
    ]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, errors="replace", check=False)
    text = done.stdout + done.stderr
    (BUILD / f"{name}.log").write_text(text)
    figures = dict(re.findall(r"^stat::(\w+):\s+(\d+)", text, re.MULTILINE))
    covered = re.findall(r"cov: (\d+) ft: (\d+) corp: (\d+)", text)
    found = {
        "target": name,
        "guided": True,
        "executions": int(figures.get("number_of_executed_units", 0)),
        "per_second": int(figures.get("average_exec_per_sec", 0)),
        "edges": int(covered[-1][0]) if covered else 0,
        "inputs": int(covered[-1][2]) if covered else 0,
    }
    if done.returncode:
        written = re.findall(r"Test unit written to (\S+)", text)
        found["finding"] = written[-1] if written else f"status {done.returncode}: see {BUILD}/{name}.log"
    return found


PARTS = {
    "frames": ("vmbus/wire/frame.py",),
    "saved_states": (
        *("vmbus/saving/chunks.py", "vmbus/saving/loading.py", "vmbus/saving/state.py"),
        *("vmbus/bus/saved_state/restore.py", "vmbus/hypervisor/saved_state/restore.py"),
    ),
    "nbd_negotiation": ("vmbus_devices/nbd/handshake.py",),
    "nbd_replies": ("vmbus_devices/nbd/connection.py",),
    "storvsp": (
        *("vmbus_devices/scsi/controller.py", "vmbus_devices/scsi/unit.py", "vmbus_devices/scsi/blocks.py"),
        *("vmbus_devices/scsi/disk.py", "vmbus_devices/scsi/request.py", "vmbus/bus/io/ring.py"),
        *("vmbus_devices/scsi/cdrom.py", "vmbus_devices/scsi/reservations.py"),
        *("vmbus_devices/scsi/outstanding.py", "vmbus_devices/scsi/unit_table.py"),
    ),
    "channel_messages": ("vmbus/bus/messages.py", "vmbus/bus/contact.py", "vmbus/bus/channel/gpadl.py"),
    "journal": ("vmbus/machine/journal/reading.py", "vmbus/machine/journal/store.py"),
    "mirror": ("vmbus/machine/engine/mirror.py",),
    "gateway_socket": (
        *("vmbus/machine/gateway/client.py", "vmbus/machine/gateway/conversation.py"),
        "vmbus/machine/gateway/journal.py",
    ),
}
"""The files that a target is about: guidance is by their edges, and coverage that of their lines."""


def coverage_of(name: str) -> str:
    """Run all inputs of a target; return the share of lines that they reach, file by file."""
    if name in COMPILED:
        from tests.fuzz import compiled

        return compiled.coverage_of(name, BUILD, CORPUS / name)

    import io

    import coverage

    measured = coverage.Coverage(include=[f"*/{part}" for part in PARTS[name]], data_file=None)
    measured.start()
    from tests.fuzz.targets import TARGETS

    target = TARGETS[name]()
    grown = BUILD / name
    for path in [*seeds(name), *(sorted(grown.iterdir()) if grown.is_dir() else [])]:
        target(path.read_bytes())
    measured.stop()
    total = measured.report(file=io.StringIO())
    parts = []
    for file in measured.get_data().measured_files():
        _, lines, _, missing, _ = measured.analysis2(file)
        parts.append(f"{Path(file).name} {100 * (1 - len(missing) / len(lines)):.0f} %")
    return f"{total:.0f} % ({', '.join(sorted(parts))})"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", choices=[*NAMES, *COMPILED, "all"])
    parser.add_argument("--seconds", type=float, default=30.0, help="of each target")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--input", type=Path, help="run this input only")
    parser.add_argument("--json", action="store_true")
    parser.add_argument(
        "--coverage", action="store_true", help="run all inputs found so far, and print the share of lines"
    )
    parser.add_argument("--libfuzzer", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)
    if arguments.libfuzzer is not None:
        guided(arguments.target, arguments.libfuzzer)
    if arguments.input is not None:
        from tests.fuzz.targets import TARGETS

        TARGETS[arguments.target]()(arguments.input.read_bytes())
        return 0
    if arguments.coverage:
        for name in (*NAMES, *COMPILED) if arguments.target == "all" else (arguments.target,):
            print(f"{name}: {coverage_of(name)}")
        return 0
    if importlib.util.find_spec("atheris") is None:
        logging.disable(logging.NOTSET)
        print("atheris is not installed: the seeds are changed at random, without guidance", file=sys.stderr)
    names = (*NAMES, *COMPILED) if arguments.target == "all" else (arguments.target,)
    failed = False
    for name in names:
        found = fuzz(name, arguments.seconds, arguments.seed)
        failed |= "finding" in found
        print(
            json.dumps(found)
            if arguments.json
            else "  ".join(f"{key} {value}" for key, value in found.items())
        )
        sys.stdout.flush()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
