"""``bootstrap.sh`` with programs that only note what they are asked for."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.unit.provision.fake_programs import write_program

SCRIPT = Path(__file__).parents[3] / "emulator" / "vmbus" / "provision" / "bootstrap.sh"
REAL = ("sh", "mktemp", "date", "rm", "tail", "mkdir", "chmod", "cat")
PYTHON = """
case "$*" in
    *venv\\ *) mkdir -p "$3/bin"; cat "$0" >"$3/bin/python"; chmod +x "$3/bin/python";;
    *pip*) echo "pip's noise"; [ -z "$PIP_FAILS" ] || { echo "ERROR: no such package"; exit 1; };;
esac
echo "python $*" >>"$ASKED"
"""


@dataclass
class Machine:
    """A folder of programs, which is all that the script finds."""

    folder: Path
    user: int = 0

    def __post_init__(self) -> None:
        self.programs.mkdir()
        for name in REAL:
            (self.programs / name).symlink_to(str(shutil.which(name)))
        for name in ("cc", "dpkg-deb", "xz", "iasl"):
            self.program(name, "exit 0")
        self.program("python3", PYTHON)
        self.program(
            "apt-get", 'echo "apt-get $*" >>"$ASKED"; [ -z "$APT_FAILS" ] || { echo "E: no"; exit 100; }'
        )

    @property
    def programs(self) -> Path:
        return self.folder / "programs"

    def program(self, name: str, script: str) -> None:
        write_program(self.programs / name, script)

    def run(self, **variables: str) -> subprocess.CompletedProcess[str]:
        self.program("id", f"echo {self.user}")
        environment = {"PATH": str(self.programs), "ASKED": str(self.folder / "asked"), **variables}
        return subprocess.run(
            ["/bin/sh", str(SCRIPT), str(self.folder / "venv")],
            env={"PIP_FAILS": "", "APT_FAILS": "", "TMPDIR": str(self.folder)} | environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=60,
        )

    @property
    def asked(self) -> list[str]:
        """What apt-get and python were asked for: the first words."""
        path = self.folder / "asked"
        return [" ".join(line.split()[:3]) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_a_complete_machine_gets_only_the_environment(machine: Machine) -> None:
    done = machine.run()
    assert (done.returncode, done.stderr) == (0, "")
    making, installing = done.stdout.splitlines()
    assert making.startswith(f"making the Python environment {machine.folder}/venv (some seconds) done (")
    assert installing.startswith("installing the emulator and its test tools into ")
    assert "noise" not in done.stdout
    assert not [line for line in machine.asked if line.startswith("apt-get")]
    assert machine.run().stdout.count("\n") == 1  # the environment is kept
    assert {path.name for path in machine.folder.iterdir()} == {"programs", "venv", "asked"}


def test_an_environment_without_pip_is_made_again(machine: Machine) -> None:
    (machine.folder / "venv" / "bin").mkdir(parents=True)
    write_program(machine.folder / "venv" / "bin" / "python", "echo No module named pip >&2; exit 1")
    done = machine.run()
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("making the Python environment")


def test_root_gets_what_is_missing(machine: Machine) -> None:
    for name in ("xz", "iasl"):
        (machine.programs / name).unlink()
    done = machine.run()
    assert done.returncode == 0
    assert [line.split(" (")[0] for line in done.stdout.splitlines()[:2]] == [
        "installing Debian packages: xz-utils",
        "installing Debian packages for the tests: acpica-tools",
    ]
    assert [line for line in machine.asked if line.startswith("apt-get")] == [
        "apt-get update -qq",
        "apt-get install -y",
    ] * 2


def test_others_are_told_what_root_has_to_run(machine: Machine) -> None:
    machine.user = 1000
    for name in ("xz", "cc"):
        (machine.programs / name).unlink()
    done = machine.run()
    assert done.returncode == 1
    assert "as root" in done.stderr
    assert "    apt-get install gcc libc6-dev xz-utils\n" in done.stderr
    assert not machine.asked or not [line for line in machine.asked if "pip" in line]


@pytest.mark.parametrize("user", [0, 1000])
def test_what_only_a_test_needs_may_be_missing(machine: Machine, user: int) -> None:
    machine.user = user
    (machine.programs / "iasl").unlink()
    done = machine.run(APT_FAILS="1")
    assert done.returncode == 0
    assert "One test will be skipped" in done.stdout + done.stderr
    assert "acpica-tools" in done.stdout + done.stderr


def test_output_is_shown_when_a_step_fails(machine: Machine) -> None:
    done = machine.run(PIP_FAILS="1")
    assert done.returncode == 1
    assert done.stdout.endswith(" failed\n")
    assert done.stderr.startswith("pip's noise\nERROR: no such package\n")
    assert "check the network" in done.stderr


def test_an_old_python_is_refused(machine: Machine) -> None:
    machine.program("python3", 'case "$*" in *version_info*) exit 1;; --version) echo Python 3.9.2;; esac')
    done = machine.run()
    assert done.returncode == 1
    assert "Python 3.11 or newer is needed, and python3 is Python 3.9.2" in done.stderr


def test_a_failed_installation_of_what_is_needed_ends_it(machine: Machine) -> None:
    (machine.programs / "xz").unlink()
    done = machine.run(APT_FAILS="1")
    assert done.returncode == 1
    assert done.stderr.startswith("E: no\nCheck the network")
