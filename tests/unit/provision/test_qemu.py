"""Which QEMU is used, and what is said where none will do."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from vmbus.errors import MissingRequirement, UserError
from vmbus.provision import cache
from vmbus.provision.qemu import find_qemu

from tests.unit.provision.fake_programs import fake_qemu, write_program

NAME = "qemu-system-x86_64"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def private_copy(folder: Path, version: str = "11.1.3") -> Path:
    root = folder / "qemu" / version
    with cache.filling(root, {"version": version, "dbus_vmstate": True}) as temporary:
        write_program(temporary / "usr/lib64/ld-linux-x86-64.so.2", ":")
        write_program(temporary / "usr/bin" / NAME, ":")
        write_program(temporary / "usr/bin/qemu-img", ":")
    return root


def test_the_one_that_the_user_names_goes_first(tmp_path: Path, folder: Path) -> None:
    own = fake_qemu(tmp_path / "own/qemu", version="12.0")
    fake_qemu(tmp_path / "path" / NAME)
    found = find_qemu(folder, {"VMBUS_QEMU": str(own), "PATH": str(tmp_path / "path")})
    assert (found.argv_prefix, found.version, found.origin) == ((str(own),), (12, 0, 0), "VMBUS_QEMU")


def test_a_named_one_that_does_not_do_is_an_error_not_a_hint(tmp_path: Path, folder: Path) -> None:
    private_copy(folder)
    own = fake_qemu(tmp_path / "own/qemu", version="9.2.1", plugins=False)
    with pytest.raises(MissingRequirement) as error:
        find_qemu(folder, {"VMBUS_QEMU": str(own)})
    assert "9.2.1" in str(error.value)
    assert "--enable-plugins" in str(error.value)


def test_a_named_one_that_is_not_there_is_an_error(folder: Path) -> None:
    with pytest.raises(MissingRequirement, match="/nowhere/qemu"):
        find_qemu(folder, {"VMBUS_QEMU": "/nowhere/qemu"})


def test_a_suitable_one_on_the_path_goes_before_the_private_copy(tmp_path: Path, folder: Path) -> None:
    private_copy(folder)
    fake_qemu(tmp_path / "path" / NAME)
    found = find_qemu(folder, {"PATH": str(tmp_path / "path")})
    assert (found.origin, found.plugins, found.qtest, found.dbus_vmstate) == ("PATH", True, True, True)


def test_an_old_one_on_the_path_gives_way_to_the_private_copy(tmp_path: Path, folder: Path) -> None:
    root = private_copy(folder)
    fake_qemu(tmp_path / "path" / NAME, version="7.2.22")
    found = find_qemu(folder, {"PATH": str(tmp_path / "path")})
    assert (found.origin, found.version, found.root) == ("private", (11, 1, 3), root)
    assert found.argv_prefix[0] == str(root / "usr/lib64/ld-linux-x86-64.so.2")
    assert found.argv_prefix[-4:] == (
        "-L",
        str(root / "usr/share/qemu"),
        "-L",
        str(root / "usr/share/seabios"),
    )


@pytest.mark.parametrize(
    ("lack", "said"),
    [
        ({"version": "11.0.9"}, "11.1 or newer"),
        ({"plugins": False}, "without TCG plug-ins"),
        ({"qtest": False}, "does not accept -qtest"),
    ],
)
def test_without_any_that_does_the_error_says_why_and_what_to_do(
    tmp_path: Path, folder: Path, lack: dict[str, object], said: str
) -> None:
    fake_qemu(tmp_path / "path" / NAME, **lack)  # type: ignore[arg-type]
    with pytest.raises(MissingRequirement) as error:
        find_qemu(folder, {"PATH": str(tmp_path / "path")})
    assert said in str(error.value)
    assert "vmbus setup" in str(error.value)


def test_without_any_at_all_setup_is_named(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(MissingRequirement, match="there is no QEMU: run `vmbus setup`"):
        find_qemu(folder, {"PATH": str(tmp_path)})


def test_the_same_program_is_asked_once_and_a_changed_one_again(tmp_path: Path, folder: Path) -> None:
    environ = {"PATH": str(tmp_path / "path")}
    fake_qemu(tmp_path / "path" / NAME)
    find_qemu(folder, environ)
    asked = len((tmp_path / "path/asked").read_text().splitlines())
    find_qemu(folder, environ)
    assert len((tmp_path / "path/asked").read_text().splitlines()) == asked
    fake_qemu(tmp_path / "path" / NAME, version="11.2.0-changed")
    assert find_qemu(folder, environ).version == (11, 2, 0)


def test_an_unfinished_private_copy_is_not_used(tmp_path: Path, folder: Path) -> None:
    root = private_copy(folder)
    (root / cache.STAMP).unlink()
    with pytest.raises(MissingRequirement):
        find_qemu(folder, {"PATH": str(tmp_path)})


def test_tools_come_from_the_same_copy_or_from_the_path(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = private_copy(folder)
    found = find_qemu(folder, {"PATH": str(tmp_path)})
    assert found.qemu_img()[-1] == str(root / "usr/bin/qemu-img")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingRequirement, match="qemu-nbd"):
        found.qemu_nbd()
    nbd = write_program(tmp_path / "qemu-nbd", ":")
    assert found.qemu_nbd() == (str(nbd),)
    shutil.rmtree(root)


def test_a_private_copy_that_others_can_change_is_not_run(tmp_path: Path, folder: Path) -> None:
    root = private_copy(folder)
    find_qemu(folder, {"PATH": str(tmp_path)})
    for place in (folder, root, root / "usr/bin", root / "usr/lib64/ld-linux-x86-64.so.2"):
        before = place.stat().st_mode
        place.chmod(before | 0o002)
        with pytest.raises(UserError, match="other users can write to"):
            find_qemu(folder, {"PATH": str(tmp_path)})
        place.chmod(before)
    find_qemu(folder, {"PATH": str(tmp_path)})


def test_the_cache_is_made_for_this_user_to_write_whatever_the_umask(folder: Path) -> None:
    before = os.umask(0)
    try:
        root = private_copy(folder)
    finally:
        os.umask(before)
    for place in (folder, folder / "qemu", root, root / "usr/bin", root / cache.STAMP):
        assert not place.stat().st_mode & 0o022
