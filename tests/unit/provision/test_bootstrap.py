"""``bootstrap.sh`` with programs that only note what they are asked for."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.unit.provision.fake_programs import write_program

SCRIPT = Path(__file__).parents[3] / "emulator" / "vmbus" / "provision" / "bootstrap.sh"
LOCK = SCRIPT.parents[3] / "requirements" / "dev.lock"
REAL = ("sh", "mktemp", "date", "rm", "tail", "mkdir", "chmod", "cat")
PYTHON = """
case "$*" in
    *venv\\ *) mkdir -p "$3/bin"; cat "$0" >"$3/bin/python"; chmod +x "$3/bin/python";;
    *require-hashes*) [ -z "$LOCK_FAILS" ] || { echo "ERROR: $LOCK_FAILS"; echo "python $*" >>"$ASKED"; exit 1; };;
    *\\(3,\\ 11\\)\\ \\<=*) [ -z "$UNKNOWN" ] || exit 1;;
esac
case "$*" in
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
        none = {"LOCK_FAILS": "", "UNKNOWN": ""}
        environment = none | {"PATH": str(self.programs), "ASKED": str(self.folder / "asked"), **variables}
        return subprocess.run(
            ["/bin/sh", str(SCRIPT), str(self.folder / "venv")],
            env={
                "PIP_FAILS": "",
                "APT_FAILS": "",
                "LOCK_FAILS": "",
                "UNKNOWN": "",
                "TMPDIR": str(self.folder),
            }
            | environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=60,
        )

    @property
    def installed(self) -> list[str]:
        """The arguments of each ``pip install``, without the first ones."""
        lines = (self.folder / "asked").read_text().splitlines()
        return [
            line.partition("--disable-pip-version-check ")[2] for line in lines if " pip install " in line
        ]

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


# --- hashes ---


def test_packages_are_installed_with_known_hashes_only(machine: Machine) -> None:
    assert machine.run().returncode == 0
    packages, itself = machine.installed
    assert packages.startswith("--require-hashes --only-binary :all: -r ")
    assert Path(packages.rpartition(" ")[2]).resolve() == LOCK
    assert itself == "--no-deps --no-build-isolation -e ."


def test_a_python_that_the_lock_file_does_not_cover_is_named(machine: Machine) -> None:
    done = machine.run(UNKNOWN="1")
    assert done.returncode == 0
    assert "for Python 3.11 to 3.13 only" in done.stdout
    assert machine.installed == ["-e .[dev]"]


def test_an_index_that_lacks_a_locked_version_is_used_without_hashes(machine: Machine) -> None:
    done = machine.run(LOCK_FAILS="No matching distribution found for pytest==9.2.0")
    assert done.returncode == 0
    assert "This package index lacks a version in" in done.stderr
    assert machine.installed[-1] == "-e .[dev]"


def test_a_wrong_hash_ends_it(machine: Machine) -> None:
    done = machine.run(LOCK_FAILS="THESE PACKAGES DO NOT MATCH THE HASHES")
    assert done.returncode == 1
    assert "DO NOT MATCH" in done.stderr
    assert len(machine.installed) == 1


def test_the_lock_file_has_what_the_project_needs() -> None:
    """``make lock`` renews it after a change of pyproject.toml."""
    project = tomllib.loads((LOCK.parents[1] / "pyproject.toml").read_text())
    wanted = [
        *project["build-system"]["requires"],
        *project["project"]["dependencies"],
        *project["project"]["optional-dependencies"]["dev"],
    ]
    text = LOCK.read_text()
    assert "://" not in text
    pins = [entry.split(" \\\n") for entry in re.split(r"\n(?=\w)", text) if "==" in entry]
    versions = {}
    for head, *hashes in pins:
        requirement = Requirement(head)
        assert hashes and all(re.fullmatch(r"    --hash=sha256:[0-9a-f]{64}\n?", each) for each in hashes), (
            head
        )
        versions[canonicalize_name(requirement.name)] = str(requirement.specifier).removeprefix("==")
    for each in map(Requirement, wanted):
        assert each.specifier.contains(versions[canonicalize_name(each.name)]), each
