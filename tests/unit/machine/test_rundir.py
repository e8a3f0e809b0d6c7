"""Run directories and guest memory: private, reserved, locked, and gone when their process is."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from vmbus.errors import MissingRequirement, QemuUnsuitable, UserError
from vmbus.machine import memory_file, rundir, unix_path
from vmbus.machine.control import ControlServer
from vmbus.machine.memory import MappedMemory, RamRegion
from vmbus.machine.qemu.child import in_child
from vmbus.machine.qemu.launch import QemuProcess
from vmbus.machine.qemu.storage_daemon import private_connections

MEBIBYTE = 1 << 20


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of run directories; memory without room there goes to ``tmp_path/shm``."""
    short = Path(os.environ.get("TMPDIR", "/tmp")) / f"vmbus-r{os.getpid()}"  # tmp_path is long for sockets
    short.symlink_to(tmp_path)
    shm = tmp_path / "shm"
    shm.mkdir()
    monkeypatch.setattr(rundir, "memory_root", lambda: shm)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short))
    try:
        yield short / "vmbus"
    finally:
        short.unlink()


def no_room_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run directories' file system is full."""
    monkeypatch.setattr(
        memory_file, "available", lambda folder: MEBIBYTE << 10 if "shm" in str(folder) else 0
    )


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


async def test_memory_is_private_reserved_and_removed(root: Path) -> None:
    directory = rundir.create("web")
    await directory.make_memory(3 * MEBIBYTE)
    found = directory.memory.stat()
    assert (mode(directory.path), mode(directory.memory)) == (0o700, 0o600)
    assert found.st_size == 3 * MEBIBYTE
    assert found.st_blocks * 512 >= 3 * MEBIBYTE
    directory.remove()
    assert list(root.iterdir()) == []


async def test_memory_elsewhere_has_a_folder_that_nobody_can_guess_or_enter(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_room_beside(monkeypatch)
    planted = tmp_path / f"shm/vmbus-{os.getuid()}-web.memory"
    planted.write_bytes(b"of another user")
    directories = [rundir.create("web"), rundir.create("net")]
    for directory in directories:
        await directory.make_memory(MEBIBYTE)
    folders = {directory.memory.parent for directory in directories}
    assert len(folders) == 2
    assert {folder.parent for folder in folders} == {tmp_path / "shm"}
    assert {mode(folder) for folder in folders} == {0o700}
    assert {mode(directory.memory) for directory in directories} == {0o600}
    for directory in directories:
        directory.remove()
    assert list((tmp_path / "shm").iterdir()) == [planted]
    assert planted.read_bytes() == b"of another user"


@pytest.mark.parametrize("planted", ["file", "link"])
async def test_a_planted_memory_file_is_not_used(root: Path, tmp_path: Path, planted: str) -> None:
    directory = rundir.create("web")
    other = tmp_path / "other"
    other.write_bytes(b"x" * MEBIBYTE)
    if planted == "file":
        directory.memory.hardlink_to(other)
    else:
        directory.memory.symlink_to(other)
    await directory.make_memory(MEBIBYTE)
    assert not directory.memory.samefile(other)
    assert other.read_bytes() == b"x" * MEBIBYTE
    directory.remove()


async def test_memory_without_room_is_refused_and_leaves_nothing(root: Path, tmp_path: Path) -> None:
    directory = rundir.create(None)
    with pytest.raises(MissingRequirement, match=r"no room for 1073741824 MiB .* MiB are free.*--memory"):
        await directory.make_memory(1 << 50)
    assert list((tmp_path / "shm").iterdir()) == []
    directory.remove()
    assert list(root.iterdir()) == []


async def test_room_that_is_used_up_meanwhile_is_no_half_file(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.posix_fallocate

    def full(descriptor: int, offset: int, length: int) -> None:
        if offset:
            raise OSError(28, "No space left on device")
        real(descriptor, offset, length)

    monkeypatch.setattr(os, "posix_fallocate", full)
    directory = rundir.create("web")
    with pytest.raises(MissingRequirement, match="No space left on device"):
        await directory.make_memory(32 * MEBIBYTE)
    assert list(directory.path.iterdir()) == []
    assert list((tmp_path / "shm").iterdir()) == []
    directory.remove()


async def test_shared_memory_gets_a_second_name_and_ends_with_the_last(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = rundir.create("web")
    await directory.make_memory(MEBIBYTE)
    inner = rundir.within(directory)
    await inner.make_memory(MEBIBYTE, directory.memory)
    assert inner.memory.samefile(directory.memory)
    first = directory.memory
    directory.remove_machine()
    assert (first.exists(), inner.memory.exists()) == (False, True)
    directory.remove()


async def test_only_a_directory_inside_of_a_guests_goes_with_its_qemu(root: Path) -> None:
    """Another guest may have the name of a socket; and the guest's own socket is closed before its last QEMU ends."""
    other, directory = rundir.create("control.sock"), rundir.create("web")
    inner = rundir.within(directory)
    directory.remove_machine()
    assert directory.path.is_dir()
    inner.remove_machine()
    assert (directory.path.is_dir(), inner.path.exists()) == (True, False)
    directory.remove()
    other.remove()


def test_a_name_is_taken_from_the_first_moment(root: Path) -> None:
    """Also before it is served: two starts at the same time, and in one process."""
    first = rundir.create("web")
    with pytest.raises(UserError, match=r"web runs already, or is being started"):
        rundir.create("web")
    assert first.path.is_dir()
    first.remove()
    rundir.create("web").remove()


def test_of_many_starts_at_once_one_gets_the_name(root: Path) -> None:
    def start(_: int) -> rundir.RunDirectory | None:
        try:
            return rundir.create("web")
        except UserError:
            return None

    with ThreadPoolExecutor(16) as pool:
        found = [directory for directory in pool.map(start, range(64)) if directory is not None]
    assert len(found) == 1
    found[0].remove()
    with ThreadPoolExecutor(16) as pool:
        directories = list(pool.map(lambda _: rundir.create(None), range(32)))
    assert {directory.name for directory in directories} == {f"guest-{number}" for number in range(1, 33)}
    for directory in directories:
        directory.remove()


_KILLED = """
import asyncio, signal, os
from pathlib import Path
from vmbus.machine import memory_file, rundir

async def main():
    rundir.memory_root = lambda: Path(os.environ["SHM"])
    memory_file.available = lambda folder: 1 << 30 if "shm" in str(folder) else 0
    directory = rundir.create("web")
    await directory.make_memory(1 << 20)
    print(directory.memory, flush=True)
    signal.pause()

asyncio.run(main())
"""


def test_what_a_killed_process_left_is_swept_and_what_a_living_one_has_is_not(
    root: Path, tmp_path: Path
) -> None:
    with in_child(None) as enter:
        process = subprocess.Popen(
            [sys.executable, "-c", _KILLED],
            env={**os.environ, "SHM": str(tmp_path / "shm")},
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=enter,
        )
    with process:
        assert process.stdout is not None
        memory = Path(process.stdout.readline().strip())
        assert memory.is_relative_to(tmp_path / "shm")
        for folder in (root / "web", memory.parent):
            os.utime(folder, (0, 0))
        rundir.create("net").remove()
        assert memory.exists()
        assert (root / "web").is_dir()
        process.send_signal(signal.SIGKILL)
        process.wait()
        rundir.create("net").remove()
    assert not memory.parent.exists()
    assert list(root.iterdir()) == []


def test_a_name_that_a_killed_process_had_is_free_at_once(root: Path) -> None:
    (root / "web").mkdir(parents=True, mode=0o700)
    (root / "web/memory").touch()
    directory = rundir.create("web")
    assert list(directory.path.iterdir()) == []
    directory.remove()


async def test_a_served_directory_without_a_lock_is_not_swept(root: Path) -> None:
    """Versions without locks may run beside this one."""
    (root / "old").mkdir(parents=True, mode=0o700)
    server = ControlServer(root / "old/control.sock", {})
    await server.start()
    os.utime(root / "old", (0, 0))
    await asyncio.to_thread(lambda: rundir.create(None).remove())
    with pytest.raises(UserError, match="runs already"):
        await asyncio.to_thread(rundir.create, "old")
    assert (root / "old/control.sock").exists()
    await server.stop()
    (root / "new").mkdir()  # it may be starting
    rundir.create(None).remove()
    assert (root / "new").is_dir()
    assert time.time() - (root / "new").stat().st_mtime < 60


def test_a_name_too_long_for_sockets_is_refused_with_the_length_that_fits(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / ("d" * max(1, 60 - len(str(tmp_path))))
    base.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(base))
    with pytest.raises(UserError, match="107; choose a --name of at most"):
        rundir.create("n" * 64)
    rundir.create("n" * 64, qemu=False).remove()  # its only socket is this process' own
    (base / ("y" * 90)).mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(base / ("y" * 90)))
    with pytest.raises(UserError, match="107; set XDG_RUNTIME_DIR to a shorter path"):
        rundir.create(None)


async def test_a_control_socket_is_reached_through_a_path_of_any_length(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 120)
    folder.mkdir()
    server = ControlServer(folder / "control.sock", {})
    await server.start()
    assert await asyncio.to_thread(rundir.is_served, folder)
    await server.stop()
    assert list(folder.iterdir()) == []


def test_children_make_files_for_this_user_alone(tmp_path: Path) -> None:
    made = tmp_path / "made"
    before = os.umask(0)
    try:
        with in_child(None) as enter:
            subprocess.run(["touch", str(made)], preexec_fn=enter, check=True)
    finally:
        os.umask(before)
    assert mode(made) == 0o600


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_memory_file_of_another_user_is_not_mapped(tmp_path: Path) -> None:
    path = tmp_path / "ram"
    path.write_bytes(bytes(8192))
    os.chown(path, 12345, 12345)
    with pytest.raises(QemuUnsuitable, match="belongs to another user"):
        MappedMemory.map_file(path, [RamRegion(0, 8192, 0)], code_pages=None, through=None)


def test_a_memory_file_that_others_can_open_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "vm"
    folder.mkdir(mode=0o755)
    path = folder / "ram"
    path.write_bytes(bytes(8192))
    path.chmod(0o644)
    MappedMemory.map_file(path, [RamRegion(0, 8192, 0)], code_pages=None, through=None).close()
    assert "other users can open" in caplog.text
    caplog.clear()
    folder.chmod(0o700)
    MappedMemory.map_file(path, [RamRegion(0, 8192, 0)], code_pages=None, through=None).close()
    assert caplog.text == ""


async def test_memory_that_is_not_reserved_is_sparse(root: Path) -> None:
    directory = rundir.create("web")
    await directory.make_memory(256 * MEBIBYTE, reserve=False)
    found = directory.memory.stat()
    assert (found.st_size, mode(directory.memory)) == (256 * MEBIBYTE, 0o600)
    assert found.st_blocks * 512 < MEBIBYTE
    directory.remove()


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("exit 3", "QEMU ended with status 3"),
        ("kill -BUS $$", "killed by SIGBUS: the file system of the guest's memory is full"),
        ("kill -SEGV $$", "killed by SIGSEGV"),
        ("kill -KILL $$", "no memory left"),
    ],
)
def test_a_qemu_that_was_killed_is_told_with_the_reason(tmp_path: Path, script: str, said: str) -> None:
    process = QemuProcess.start(["sh", "-c", script], tmp_path / "qemu.log")
    process.process.wait()
    assert said in process.ending()


def test_a_memory_file_without_room_to_grow_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "ram"
    path.touch(0o600)
    os.truncate(path, 64 * MEBIBYTE)

    def attached() -> str:
        caplog.clear()
        MappedMemory.map_file(path, [RamRegion(0, 8192, 0)], code_pages=None, through=None).close()
        return caplog.text

    assert attached() == ""
    monkeypatch.setattr(memory_file, "available", lambda folder: 5 * MEBIBYTE)
    assert "can grow by 64 MiB" in (told := attached())
    assert "room for 5 MiB" in told
    path.write_bytes(bytes(MEBIBYTE))
    monkeypatch.setattr(memory_file, "available", lambda folder: 0)
    assert attached() == ""


def test_a_long_folder_for_temporary_files_does_not_matter_to_storage_daemons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / ("t" * 120)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    listener, connections = private_connections(2)
    for connection in (listener, *connections):
        connection.close()
    assert list(folder.iterdir()) == []


def test_an_emulator_that_does_not_answer_any_more_is_still_there(root: Path) -> None:
    """As many requests wait as the kernel takes: the next one would wait for a place among them."""
    directory = rundir.create("web")
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as waiting:
        listener.bind(str(directory.control))
        listener.listen(0)
        waiting.connect(str(directory.control))
        with ThreadPoolExecutor() as executor:
            found = executor.submit(rundir.find, None)
            try:
                assert found.result(timeout=10) == directory.path
            finally:
                listener.accept()[0].close()  # the place that the next one waits for
    directory.remove()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_folder_in_dev_shm_that_another_user_made_is_not_searched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.setattr(rundir, "_FALLBACK", tmp_path)
    planted = tmp_path / f"vmbus-{os.getuid()}" / "web"
    planted.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as listener:
        with unix_path.short(planted / "control.sock") as address:
            listener.bind(address)
        listener.listen()
        assert rundir.find("web") == planted
        os.chown(planted.parent, 12345, 12345)
        with pytest.raises(UserError, match="belongs to another user"):
            rundir.find("web")


def test_without_a_runtime_folder_the_one_in_dev_shm_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    directory = rundir.create(None)
    assert directory.path.parent == Path(f"/dev/shm/vmbus-{os.getuid()}")
    assert (mode(directory.path.parent), mode(directory.path)) == (0o700, 0o700)
    directory.remove()
    assert not directory.path.exists()
