"""The flaky runner finds a test that fails now and then, keeps what it said, and leaves no process behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.tools import flaky

TESTS = """
import pathlib

def test_odd(tmp_path):
    count = pathlib.Path(__file__).with_name("count")
    number = int(count.read_text()) if count.exists() else 0
    count.write_text(str(number + 1))
    assert number % 2, f"run {number} is even"
"""


def test_a_test_that_fails_every_other_time_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flaky, "ROOT", tmp_path)
    (tmp_path / "test_now_and_then.py").write_text(TESTS)
    logs = tmp_path / "logs"
    assert flaky.main(["-n", "2", "--load", "1", "--logs", str(logs), "test_now_and_then.py"]) == 1
    printed = capsys.readouterr().out
    rows = [line.split()[:5] for line in printed.splitlines() if "::" in line]
    odd = "test_now_and_then.py::test_odd"
    assert rows == [[odd, "alone", "2", "1", rows[0][4]], [odd, "1", "busy", "2", "1"]]
    assert f"2 failures; their logs are in {logs}" in printed
    kept = sorted(path.name for path in logs.iterdir())
    assert kept == ["test_now_and_then.py-test_odd.alone.1.log", "test_now_and_then.py-test_odd.load1.1.log"]
    assert "run 0 is even" in (logs / kept[0]).read_text()


def test_a_run_that_does_not_end_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flaky, "ROOT", tmp_path)
    (tmp_path / "test_endless.py").write_text("import time\ndef test_endless():\n    time.sleep(1000)\n")
    status, seconds = flaky.run("test_endless.py", tmp_path / "log", timeout=1.0)
    assert status == 124
    assert seconds < 10


def test_help_says_what_it_does() -> None:
    line = [sys.executable, "-m", "tests.tools.flaky", "--help"]
    done = subprocess.run(line, cwd=flaky.ROOT, capture_output=True, text=True, check=True)
    assert "again and again" in done.stdout
    for option in ("--runs", "--load", "--logs", "-k"):
        assert option in done.stdout
