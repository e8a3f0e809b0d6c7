"""Files and folders that other users of the machine can read, change or plant."""

from __future__ import annotations

import functools
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from vmbus import durable, private
from vmbus.cli import main
from vmbus.errors import UserError
from vmbus.native import NativeLibrary
from vmbus.provision import cache


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def somebody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process' files belong to another user from now on."""
    number = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: number)


def test_a_made_folder_is_closed_to_others(tmp_path: Path) -> None:
    folder = tmp_path / "a/b"
    private.make_folder(folder)
    assert mode(folder) == 0o700
    folder.chmod(0o777)
    private.make_folder(folder)
    assert mode(folder) == 0o700


def test_a_folder_is_made_in_a_sticky_one_and_not_where_others_could_exchange_it(tmp_path: Path) -> None:
    shared = tmp_path / "shm"
    shared.mkdir()
    shared.chmod(0o1777)
    private.make_folder(shared / "vmbus-1000")
    private.make_folder(shared / "vmbus-1000")
    shared.chmod(0o777)
    with pytest.raises(UserError, match="XDG_RUNTIME_DIR"):
        private.make_folder(shared / "vmbus-1000")


def test_a_planted_folder_or_link_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    (tmp_path / "file").touch()
    for name in ("link", "file"):
        with pytest.raises(UserError):
            private.make_folder(tmp_path / name)
    somebody_else(monkeypatch)
    with pytest.raises(UserError, match="not a folder of yours"):
        private.make_folder(tmp_path / "there")


@pytest.mark.parametrize("open_to_others", [0o755, 0o750, 0o711, 0o701, 0o777, 0o770])
def test_a_folder_that_others_can_enter_is_refused(tmp_path: Path, open_to_others: int) -> None:
    folder = tmp_path / "vm"
    folder.mkdir(mode=0o700)
    private.check_only_mine(folder, "close it")
    folder.chmod(open_to_others)
    with pytest.raises(UserError, match=f"other users can enter .*{open_to_others:o}.*: close it"):
        private.check_only_mine(folder, "close it")


def test_qemu_args_writes_nothing_into_a_folder_that_others_can_enter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "vm"
    folder.mkdir(mode=0o700)
    folder.chmod(0o755)
    assert main(["qemu-args", "--dir", str(folder)]) == 2
    assert f"mkdir -m 700 {folder}" in capsys.readouterr().err
    assert list(folder.iterdir()) == []


def test_qemu_args_refuses_a_path_that_is_too_long_for_its_sockets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / ("x" * 100)
    folder.mkdir(mode=0o700)
    assert main(["qemu-args", "--dir", str(folder)]) == 2
    assert "107 bytes" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["", "cache", "cache/lib", "cache/lib/gateway.so"])
def test_what_others_can_change_or_replace_is_not_trusted(tmp_path: Path, place: str) -> None:
    (tmp_path / "cache/lib").mkdir(parents=True)
    library = tmp_path / "cache/lib/gateway.so"
    library.touch()
    private.check_trusted(library, "remove it")
    changed = tmp_path / place
    changed.chmod(mode(changed) | 0o002)
    with pytest.raises(UserError, match=r"could change .*gateway\.so: remove it"):
        private.check_trusted(library, "remove it")


def test_in_a_sticky_folder_only_the_file_itself_counts(tmp_path: Path) -> None:
    folder = tmp_path / "tmp"
    folder.mkdir()
    folder.chmod(0o1777)
    (folder / "mine").mkdir(mode=0o700)
    private.check_trusted(folder / "mine", "")
    with pytest.raises(UserError):
        private.check_trusted(folder, "")


def test_a_link_is_followed_to_where_it_leads(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "open/lib.so").touch()
    (tmp_path / "lib.so").symlink_to("open/lib.so")
    with pytest.raises(UserError, match="other users can write to"):
        private.check_trusted(tmp_path / "lib.so", "")


def test_a_library_that_others_can_change_is_not_loaded(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    library = NativeLibrary("tiny", "a tiny library", source)
    planted = library.path(tmp_path / "cache")
    planted.parent.mkdir()
    planted.touch()
    assert library.build(planted.parent) == planted
    planted.parent.chmod(0o777)
    with pytest.raises(UserError, match="other users can write to"):
        library.build(planted.parent)
    planted.parent.chmod(0o755)
    planted.chmod(0o666)
    with pytest.raises(UserError, match="other users can write to"):
        library.build(planted.parent)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_what_belongs_to_another_user_is_not_trusted(tmp_path: Path) -> None:
    library = tmp_path / "lib.so"
    library.touch()
    os.chown(library, 12345, 12345)
    with pytest.raises(UserError, match="belongs to the user 12345"):
        private.check_trusted(library, "")


def test_the_commands_make_files_for_this_user_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "vm"
    folder.mkdir(mode=0o700)
    before = os.umask(0o022)
    try:
        assert main(["qemu-args", "--dir", str(folder), "--migratable"]) == 0
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(before)
    assert {path.name: mode(path) for path in folder.iterdir()} == {"vmbus.aml": 0o600, "dbus.conf": 0o600}


def test_what_the_cache_gets_while_a_guest_runs_can_be_read_by_its_other_users(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "tiny.c").write_text("int tiny(void) { return 1; }\n")
    for users, folder_mode, file_mode, program_mode in (
        (0o022, 0o755, 0o644, 0o755),
        (0o077, 0o700, 0o600, 0o700),
    ):
        shared = tmp_path / f"cache-{users:o}"
        before = os.umask(users)
        try:
            with private.umask(private.UMASK):  # as in `vmbus run`
                library = NativeLibrary("tiny", "a tiny library", source).build(shared)
                with cache.filling(shared / "kernels" / "one", {}) as folder:
                    (folder / "boot").mkdir()
                    (folder / "boot" / "vmlinuz").write_bytes(b"kernel")
                    (folder / "boot" / "link").symlink_to("nothing")
                (tmp_path / "guest").touch()
                assert mode(tmp_path / "guest") == 0o600, "a guest's file is made meanwhile"
                (tmp_path / "guest").unlink()
        finally:
            os.umask(before)
        kernel = shared / "kernels" / "one" / "boot" / "vmlinuz"
        assert [mode(each) for each in (shared, *kernel.parents[:3])] == [folder_mode] * 4
        assert (mode(library), mode(kernel)) == (program_mode, file_mode)


class Medium:
    """What is safe on the medium, as the calls that were made say."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.safe: set[str] = set()
        self.lost: list[str] = []
        for name in ("rename", "replace"):
            monkeypatch.setattr(os, name, functools.partial(self.rename, getattr(os, name)))
        self._fsync = os.fsync
        monkeypatch.setattr(os, "fsync", self.fsync)

    def fsync(self, descriptor: int) -> None:
        self._fsync(descriptor)
        self.safe.add(str(Path(f"/proc/self/fd/{descriptor}").readlink()))

    def rename(self, rename: Callable[[Any, Any], None], old: Path, new: Path) -> None:
        files = [old] if old.is_file() else [each for each in old.rglob("*") if not each.is_symlink()]
        self.lost += [each.name for each in files if str(each) not in self.safe]
        rename(old, new)


def test_what_the_cache_gets_is_on_the_medium_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a loss of power, an empty file under that name would be used for ever."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "tiny.c").write_text("int tiny(void) { return 1; }\n")
    medium = Medium(monkeypatch)
    NativeLibrary("tiny", "a tiny library", source).build(tmp_path / "cache")
    cache.write_atomically(tmp_path / "cache" / "initramfs" / "one.cpio", b"070701")
    with cache.filling(tmp_path / "cache" / "kernels" / "one", {}) as folder:
        (folder / "vmlinuz").write_bytes(b"kernel")
    assert medium.lost == []
    for name in ("", "initramfs", "kernels"):
        assert str(tmp_path / "cache" / name) in medium.safe, "and so is the name"


def test_a_large_folder_is_written_back_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durable, "_MANY", 1)
    for name in ("a", "b"):
        (tmp_path / name).touch()
    durable.synchronize_tree(tmp_path)
