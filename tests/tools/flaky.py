"""Run tests again and again, alone and beside busy processes, and print how often each failed and how long it took.

    python -m tests.tools.flaky --runs 20 -k "replaced or over_tcp"
    make flaky N=20 K="replaced or over_tcp" LOAD=2

Each run is a pytest process of its own for each test, so that tests do not warm each other's caches. The output of
every run that failed is kept in the folder that is named at the end. The exit status is 1 if any run failed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
PYTEST = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q")
_BUSY = "while True: pass"


@dataclass
class Row:
    """The runs of one test, alone or beside busy processes."""

    test: str
    load: int
    seconds: list[float] = field(default_factory=list)
    failures: int = 0
    skips: int = 0

    def cells(self) -> tuple[str, ...]:
        beside = f"{self.load} busy" if self.load else "alone"
        skipped = f" ({self.skips} skipped)" if self.skips else ""
        median, longest = statistics.median(self.seconds), max(self.seconds)
        return (
            self.test,
            beside,
            f"{len(self.seconds)}{skipped}",
            str(self.failures),
            f"{median:.1f}",
            f"{longest:.1f}",
        )


HEADER = ("test", "beside", "runs", "failures", "median s", "max s")


def table(rows: Sequence[Row]) -> str:
    """Return the rows under their header, in columns."""
    lines = [HEADER, *(row.cells() for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADER))]
    text = []
    for line in lines:
        cells = [line[0].ljust(widths[0]), line[1].ljust(widths[1])]
        cells += [cell.rjust(width) for cell, width in zip(line[2:], widths[2:], strict=True)]
        text.append("  ".join(cells).rstrip())
    return "\n".join(text)


@contextlib.contextmanager
def busy(count: int, *, apart: bool = False) -> Iterator[None]:
    """Keep ``count`` processors busy, with processes that are ended on the way out.

    ``apart``: each in a session of its own. Linux divides processor time between sessions first (autogroups,
    sched(7)), so that they take nothing from this process alone.
    """
    line = [sys.executable, "-S", "-c", _BUSY]
    processes = [subprocess.Popen(line, start_new_session=apart) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def collect(expression: str, paths: Sequence[str]) -> list[str]:
    """Return the identifiers of the tests that pytest's ``-k`` expression chooses."""
    line = [*PYTEST, "--collect-only", "-k", expression, *paths]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 5):  # 5: no test was collected
        raise SystemExit(f"pytest could not collect the tests:\n{done.stdout}{done.stderr}")
    return [
        line for line in done.stdout.splitlines() if "::" in line and not line.startswith(("ERROR", "FAILED"))
    ]


def run(test: str, log: Path, timeout: float) -> tuple[int, float]:
    """Run one test; return pytest's exit status (124 after ``timeout`` seconds) and the seconds that it took.

    The output is left in ``log``. What the test has started is ended with it.
    """
    start = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*PYTEST, "-rs", test],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            status = 124
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return status, time.monotonic() - start


def _file_name(test: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", test.rpartition("/")[2])[:120]


def repeat(
    tests: Sequence[str], *, runs: int, load: int, folder: Path, timeout: float, show: bool = True
) -> list[Row]:
    """Run each test ``runs`` times beside ``load`` busy processes; logs of failed runs stay in ``folder``."""
    rows = {test: Row(test, load) for test in tests}
    with busy(load):
        for number in range(1, runs + 1):
            for test, row in rows.items():
                log = folder / f"{_file_name(test)}.{f'load{load}' if load else 'alone'}.{number}.log"
                status, seconds = run(test, log, timeout)
                row.seconds.append(seconds)
                row.skips += status == 0 and b" skipped" in log.read_bytes()
                if status:
                    row.failures += 1
                else:
                    log.unlink()
                if show:
                    verdict = f"FAILED (status {status}), {log}" if status else "passed"
                    print(
                        f"{number}/{runs}  {seconds:6.1f} s  {verdict}  {test}", file=sys.stderr, flush=True
                    )
    return list(rows.values())


def parser() -> argparse.ArgumentParser:
    assert __doc__ is not None
    made = argparse.ArgumentParser(
        prog="python -m tests.tools.flaky",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("-k", metavar="EXPRESSION", default="", help="tests, as pytest's -k has them")
    made.add_argument(
        "-n", "--runs", type=int, default=20, metavar="N", help="runs of each test (default: 20)"
    )
    made.add_argument(
        "--load",
        type=int,
        default=2,
        metavar="COUNT",
        help="after the runs alone, as many beside COUNT busy processes; 0: only alone (default: 2)",
    )
    made.add_argument("--only-load", action="store_true", help="no runs alone")
    made.add_argument(
        "--timeout", type=float, default=900.0, metavar="SECONDS", help="of one run (default: 900)"
    )
    made.add_argument("--logs", type=Path, metavar="FOLDER", help="for logs of failures (default: a new one)")
    made.add_argument("paths", nargs="*", default=["tests"], help="files or folders of tests (default: all)")
    return made


def main(words: Sequence[str] | None = None) -> int:
    options = parser().parse_args(words)
    if options.runs < 1 or options.load < 0:
        parser().error("--runs must be at least 1, and --load at least 0")
    tests = collect(options.k, options.paths)
    if not tests:
        parser().error(f"-k {options.k!r} chooses no test")
    folder = options.logs or Path(tempfile.mkdtemp(prefix="flaky-"))
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    try:
        for load in ([] if options.only_load else [0]) + ([options.load] if options.load else []):
            rows += repeat(tests, runs=options.runs, load=load, folder=folder, timeout=options.timeout)
    finally:
        if rows:
            print(table(rows))
    failures = sum(row.failures for row in rows)
    print(f"{failures} failures; their logs are in {folder}" if failures else "no failures")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
