"""Setup, its cache folder, its progress, and the doctor."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from vmbus.errors import MissingRequirement, UsageError, UserError
from vmbus.provision import cache, doctor, kernel, setup, system_packages
from vmbus.provision.progress import Silent, Terminal, for_stream
from vmbus.provision.system_packages import SystemPackage

from tests.unit.provision.fake_programs import fake_qemu, only_programs

ABSENT = SystemPackage("gcc", "compiles", lambda: False)


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("VMBUS_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache.cache_folder() == tmp_path / ".cache/vmbus"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache.cache_folder() == Path("/x/vmbus")
    monkeypatch.setenv("VMBUS_CACHE", "~/mine")
    assert cache.cache_folder() == tmp_path / "mine"


def test_a_folder_is_complete_or_absent(tmp_path: Path) -> None:
    place = tmp_path / "qemu/1"
    with pytest.raises(RuntimeError), cache.filling(place, {}) as temporary:
        (temporary / "half").touch()
        raise RuntimeError
    assert list(place.parent.iterdir()) == []
    with cache.filling(place, {"version": "1"}) as temporary:
        (temporary / "whole").touch()
    assert (place / "whole").exists()
    assert cache.complete_folders(place.parent) == [(place, {"version": "1"})]


def test_what_a_killed_setup_left_is_swept(tmp_path: Path) -> None:
    (tmp_path / ".filling-x/deep").mkdir(parents=True)
    cache.sweep(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_stamp_is_no_stamp(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / cache.STAMP).write_text("{")
    assert cache.complete_folders(tmp_path) == []


def test_a_cache_that_cannot_be_made_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="VMBUS_CACHE"):
        cache.make_folder(tmp_path / "file/below")


def test_two_setups_do_not_collide(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from vmbus.provision.cache import locked\n"
        "with locked(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        events = []

        def waiting() -> None:
            events.append("waiting")
            assert other.stdin is not None
            other.stdin.close()

        with cache.locked(tmp_path, waiting):
            events.append("held")
    assert events == ["waiting", "held"]


def test_progress_is_shown_on_a_terminal_only() -> None:
    class Tty(io.StringIO):
        def isatty(self) -> bool:
            return True

    assert isinstance(for_stream(io.StringIO()), Silent)
    stream = Tty()
    shown = for_stream(stream)
    assert isinstance(shown, Terminal)
    shown.step("loading")
    shown.advance(20_000_000, 40_000_000, "B")
    shown.advance(3, 0, "packages")
    shown.finish()
    lines = [line.rstrip() for line in stream.getvalue().split("\r")]
    assert lines == ["", "loading ...", "loading: 20.0 MB of 40.0 MB (50 %)", "loading: 3 packages"]
    assert stream.getvalue().endswith("\n")


@pytest.fixture
def complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with everything in it, and no way to fetch more."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("VMBUS_QEMU", str(fake_qemu(tmp_path / "bin/qemu")))
    monkeypatch.setattr(setup, "find_mirror", _no_network)
    monkeypatch.setattr(system_packages, "BUILD_PACKAGES", ())
    with cache.filling(folder / "busybox/1", {"busybox": "busybox"}) as temporary:
        (temporary / "busybox").touch()
    stamp: dict[str, object] = {"release": "6.12", "vmlinuz": "vmlinuz", "modules": "modules"}
    with cache.filling(folder / "kernels/debian-6.12/6.12", stamp) as temporary:
        (temporary / "vmlinuz").touch()
    return folder


def _no_network() -> None:
    raise AssertionError("the network was asked")


def test_a_second_setup_asks_nothing_of_the_network_and_is_quick(complete: Path) -> None:
    setup.Setup(complete).run()
    before = time.monotonic()
    found = setup.Setup(complete).run(["debian-6.12"])
    assert time.monotonic() - before < 1
    assert [x.release for x in found.kernels] == ["6.12"]


def test_setup_of_an_unknown_guest_is_refused_before_anything_is_fetched(complete: Path) -> None:
    with pytest.raises(UsageError, match="debian-99"):
        setup.Setup(complete).run(["debian-99"])


def test_setup_does_not_fetch_a_qemu_past_the_user_s_choice(
    complete: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VMBUS_QEMU", "/nowhere/qemu")
    with pytest.raises(MissingRequirement, match="/nowhere/qemu"):
        setup.Setup(complete).run()


def test_setup_fetches_only_what_is_missing(complete: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = []

    def fetch(name: str, folder: Path, archive: object) -> kernel.GuestKernel:
        fetched.append(name)
        return kernel.GuestKernel(name, "6.1", folder, None)

    monkeypatch.setattr(kernel, "fetch_kernel", fetch)
    monkeypatch.setattr(setup.Setup, "_archive", lambda self, codename: codename)
    found = setup.Setup(complete).run(["debian-6.12", "debian-6.1"])
    assert fetched == ["debian-6.1"]
    assert [x.name for x in found.kernels] == ["debian-6.12", "debian-6.1"]


def test_missing_system_packages_are_named_for_a_user(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    only_programs(monkeypatch, tmp_path, apt_get="exit 1")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(MissingRequirement, match="sudo apt-get install gcc"):
        system_packages.ensure([ABSENT])


def test_missing_system_packages_are_installed_for_root_who_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    only_programs(monkeypatch, tmp_path, apt_get=f'echo "$@" >>{tmp_path}/log')
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    told = io.StringIO()
    system_packages.ensure([ABSENT], told)
    assert told.getvalue() == "installing gcc with apt-get (gcc: compiles)\n"
    assert (tmp_path / "log").read_text().splitlines()[-1] == "-qq install --yes --no-install-recommends gcc"


def test_a_failed_installation_says_what_was_tried(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    only_programs(monkeypatch, tmp_path, apt_get='echo "E: no network" >&2; exit 100')
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with pytest.raises(MissingRequirement, match="apt-get install gcc failed: E: no network"):
        system_packages.ensure([ABSENT], io.StringIO())


def test_the_doctor_finds_a_complete_machine_healthy(complete: Path) -> None:
    gateway = doctor.Check("gateway", doctor.State.OK, "built")
    checks = {check.name: check for check in doctor.examine(complete, [gateway])}
    assert checks["QEMU"].state is doctor.State.OK
    assert checks["gateway"] is gateway
    assert checks["guest debian-6.12"].found == "Linux 6.12"
    assert checks["guest debian-6.1"].state is doctor.State.OPTIONAL
    json.dumps([check.as_json() for check in checks.values()])
    assert doctor.healthy([check for check in checks.values() if check.state is not doctor.State.OPTIONAL])


def test_the_doctor_says_how_to_get_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VMBUS_QEMU", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None)
    checks = doctor.examine(tmp_path / "nothing/here")
    assert not doctor.healthy(checks)
    found = {check.name: check for check in checks}
    assert (found["QEMU"].state, found["QEMU"].remedy) == (doctor.State.MISSING, "vmbus setup")
    assert found["guest debian-6.12"].remedy == "vmbus setup --guest debian-6.12"
    assert all(check.remedy for check in checks if check.state is doctor.State.MISSING)
