"""The newc archive: what Linux' own unpacker would read from it."""

from __future__ import annotations

import stat
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vmbus.errors import UsageError
from vmbus.provision.cpio import CpioWriter


@dataclass
class Entry:
    mode: int
    data: bytes
    device: tuple[int, int]
    inode: int
    time: int


def read_archive(archive: bytes) -> dict[str, Entry]:
    """A reader written from the format's description, not from the writer."""
    found: dict[str, Entry] = {}
    at = 0
    while True:
        assert archive[at : at + 6] == b"070701"
        assert at % 4 == 0
        field = [int(archive[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        inode, mode, _, _, _, time, size, _, _, major, minor, name_size, check = field
        assert check == 0
        name = archive[at + 110 : at + 110 + name_size]
        assert name.endswith(b"\0")
        data_at = at + 110 + name_size
        data_at += -data_at % 4
        if name == b"TRAILER!!!\0":
            assert not archive[data_at:].strip(b"\0")
            return found
        found[name[:-1].decode()] = Entry(
            mode, archive[data_at : data_at + size], (major, minor), inode, time
        )
        at = data_at + size
        at += -at % 4


def test_files_links_and_devices_come_back() -> None:
    writer = CpioWriter()
    writer.file("/bin/tool", b"\x7fELF" + bytes(3), 0o755)
    writer.link("/bin/sh", "tool")
    writer.device("/dev/console", "c", 5, 1)
    writer.folder("/tmp", 0o1777)
    found = read_archive(writer.finish())
    assert stat.S_ISREG(found["bin/tool"].mode)
    assert found["bin/tool"].mode & 0o777 == 0o755
    assert found["bin/tool"].data == b"\x7fELF\0\0\0"
    assert stat.S_ISLNK(found["bin/sh"].mode)
    assert found["bin/sh"].data == b"tool"
    assert stat.S_ISCHR(found["dev/console"].mode)
    assert found["dev/console"].device == (5, 1)
    assert found["tmp"].mode == stat.S_IFDIR | 0o1777


def test_folders_come_before_what_is_in_them() -> None:
    writer = CpioWriter()
    writer.file("/a/b/c/d", b"")
    assert list(read_archive(writer.finish())) == ["a", "a/b", "a/b/c", "a/b/c/d"]


def test_inodes_differ_and_times_are_zero() -> None:
    writer = CpioWriter()
    for name in "abc":
        writer.file(name, b"")
    entries = read_archive(writer.finish()).values()
    assert len({entry.inode for entry in entries}) == 3
    assert {entry.time for entry in entries} == {0}


def test_the_same_name_twice_is_refused() -> None:
    writer = CpioWriter()
    writer.file("/etc/passwd", b"")
    with pytest.raises(UsageError, match="/etc/passwd would be in the initramfs twice"):
        writer.file("etc//passwd", b"")


def test_a_file_is_no_folder_for_another() -> None:
    writer = CpioWriter()
    writer.file("/etc", b"")
    with pytest.raises(UsageError, match="not a folder"):
        writer.file("/etc/passwd", b"")


@settings(deadline=None)
@given(st.dictionaries(st.from_regex(r"[a-z]{1,9}", fullmatch=True), st.binary(max_size=600)))
def test_any_contents_come_back_and_the_same_input_makes_the_same_bytes(files: dict[str, bytes]) -> None:
    archives = []
    for _ in range(2):
        writer = CpioWriter()
        for name, data in files.items():
            writer.file(name, data)
        archives.append(writer.finish())
    assert {name: entry.data for name, entry in read_archive(archives[0]).items()} == files
    assert archives[0] == archives[1]
    assert len(archives[0]) % 512 == 0
