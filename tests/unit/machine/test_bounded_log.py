"""Logs of what a guest prints: bounded, with the beginning and the end, and no error stops the guest."""

from __future__ import annotations

import errno
import os
import socket
import stat
from pathlib import Path

import pytest
from vmbus.errors import DeviceError
from vmbus.machine.bounded_log import BoundedLog, BoundedText, LogCopy, copy_socket
from vmbus.machine.guest import emulator_options
from vmbus.machine.qemu.launch import GuestOptions, QemuProcess, command_line
from vmbus.machine.qemu.storage_daemon import StorageDaemon
from vmbus.machine.rundir import RunDirectory
from vmbus_devices.scsi.image import ImageFile

KEEP = 1000


def lines(count: int) -> list[bytes]:
    return [b"line %06d\n" % number for number in range(count)]


@pytest.mark.parametrize("count", [0, 1, 250, 273, 1_000, 50_000])
def test_the_file_keeps_the_beginning_and_the_end(tmp_path: Path, count: int) -> None:
    log = BoundedLog(tmp_path / "log", KEEP)
    printed = lines(count)
    largest = 0
    for line in printed:
        log.write(line)
        largest = max(largest, log.path.stat().st_size)
    log.close()
    everything, found = b"".join(printed), log.path.read_bytes()
    assert stat.S_IMODE(log.path.stat().st_mode) == 0o600
    assert largest <= 3 * KEEP
    assert found[:KEEP] == everything[:KEEP]
    assert found[-KEEP:] == everything[-KEEP:]
    if len(everything) <= 3 * KEEP:
        assert found == everything
    else:
        before, rest = found.split(b"\n[vmbus: ")
        number, after = rest.split(b" bytes are left out here]\n")
        assert len(before) + int(number) + len(after) == len(everything)


def test_chunks_larger_than_the_file_are_bounded_too(tmp_path: Path) -> None:
    log = BoundedLog(tmp_path / "log", KEEP)
    everything = b"".join(lines(5_000))
    for start in range(0, len(everything), 7_777):
        log.write(everything[start : start + 7_777])
    log.close()
    found = log.path.read_bytes()
    assert len(found) <= 3 * KEEP
    assert (found[:KEEP], found[-KEEP:]) == (everything[:KEEP], everything[-KEEP:])


def test_a_full_file_system_costs_a_part_of_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log = BoundedLog(tmp_path / "log", KEEP)
    log.write(b"before\n")

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        for _ in range(100):
            log.write(b"lost\n")
    log.write(b"after\n")
    log.close()
    assert log.path.read_bytes() == b"before\nafter\n"
    assert caplog.text.count("No space left on device") == 1


def test_a_copy_ends_with_the_other_side(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        address = tmp_path / "s"
        listener.bind(str(address))
        listener.listen()
        log = BoundedLog(tmp_path / "log", 1 << 20)
        copy = copy_socket(address, log)
        here, _ = listener.accept()
        with here:
            here.sendall(b"x" * 300_000)
            assert not copy.wait(0.01)
        assert copy.wait(60)
    log.write(b"y")  # a copy of another QEMU may follow
    log.close()
    log.write(b"z")
    assert log.path.read_bytes() == b"x" * 300_000 + b"y"


def test_qemu_that_prints_without_end_fills_nothing(tmp_path: Path) -> None:
    message = "a message of fifty characters, for the log of QEMU"
    script = f"i=0; while [ $i -lt 40000 ]; do echo '{message}'; i=$((i+1)); done"
    process = QemuProcess.start(["sh", "-c", f"echo first; {script}; echo last"], tmp_path / "qemu.log")
    assert process.process.wait(60) == 0
    assert process.messages(1) == "last"
    found = (tmp_path / "qemu.log").read_bytes()
    assert found.startswith(b"first\n")
    assert len(found) < 1 << 20
    assert b"bytes are left out here" in found


def test_a_qemu_that_does_not_start_leaves_no_descriptor(tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(FileNotFoundError):
        QemuProcess.start([str(tmp_path / "nothing")], tmp_path / "qemu.log")
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_two_copies_write_one_log(tmp_path: Path) -> None:
    """As the two QEMUs of a guest that moves."""
    log = BoundedLog(tmp_path / "log", 1 << 20)
    ends = []
    copies = []
    for _ in range(2):
        reading, writing = os.pipe()
        copies.append(LogCopy(reading, log, close_log=False))
        ends.append(writing)
    for _ in range(100):
        for end in ends:
            os.write(end, b"0123456789\n")
    for end in ends:
        os.close(end)
    assert all(copy.wait(60) for copy in copies)
    log.close()
    assert sorted(log.path.read_bytes()) == sorted(b"0123456789\n" * 200)


def test_the_console_goes_to_a_file_or_to_a_socket(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path, tmp_path / "memory")
    options = emulator_options(directory, 1 << 20, tmp_path / "gateway.so")

    def console(guest: GuestOptions) -> list[str]:
        return [word for word in command_line(["qemu"], directory, options, guest) if "id=console" in word]

    plain = GuestOptions(tmp_path / "kernel", None, "")
    assert console(plain) == [f"file,id=console,path={tmp_path}/console.log"]
    assert console(GuestOptions(tmp_path / "kernel", None, "", console_socket=True)) == [
        f"socket,id=console,path={tmp_path}/console.sock,server=on,wait=off"
    ]


def test_bounded_text_keeps_the_beginning_and_the_end() -> None:
    text = BoundedText(4)
    for each in (b"ab", b"cdef", b"gh"):
        text.write(each)
    assert text.text() == "abcdefgh"
    text.write(b"i" * 1000 + b"WXYZ")
    assert text.text() == "abcd\n[1004 bytes are left out here]\nWXYZ"


_CHATTY = """
i=0
while [ $i -lt 400 ]; do printf %0100000d $i >&2; i=$((i+1)); done
printf 'the reason' >&2
exit 3
"""


def test_messages_of_a_storage_daemon_are_bounded_and_shown(tmp_path: Path) -> None:
    """An image can make a daemon print: 40 MB here."""
    script, image = tmp_path / "daemon", tmp_path / "image"
    script.write_text(_CHATTY)
    image.touch()
    daemon = StorageDaemon(("/bin/sh", str(script)), ImageFile(image, "qcow2"))
    with pytest.raises(DeviceError) as failed:
        daemon.start(1)
    assert str(failed.value).endswith("the reason")
    assert "bytes are left out here" in str(failed.value)
    assert len(str(failed.value)) < 40000


_DYING = r"""
printf '{"QMP": {}}\n{"return": {}}\n'
read line
printf 'qemu-storage-daemon: assertion failed' >&2
exit 3
"""


def test_a_storage_daemon_that_dies_is_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    script, image = tmp_path / "daemon", tmp_path / "image"
    script.write_text(_DYING)
    image.touch()
    daemon = StorageDaemon(("/bin/sh", str(script)), ImageFile(image, "qcow2"))
    daemon._start(None)
    assert daemon.process is not None
    daemon.process.wait(20)
    daemon.stop()
    assert [record.getMessage() for record in caplog.records] == [
        f"the storage daemon of {image} had ended with status 3: assertion failed"
    ]
