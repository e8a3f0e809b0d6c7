"""How a target finds out that the memory it maps is the guest's, as the guest left it."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from vmbus.machine.memory import MappedMemory, RamRegion
from vmbus.machine.migration.shared_memory import check, describe
from vmbus.ports import PAGE_SIZE
from vmbus.saving import Reason, StateRefused
from vmbus.wire.saved import SAVED_MEMORY, parse_record

SIZE = 4 << 20
ELSEWHERE = UUID(int=1)


def mapped(path: Path) -> MappedMemory:
    return MappedMemory.map_file(path, [RamRegion(0, SIZE, 0)], code_pages=None, through=None)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "memory"
    path.write_bytes(bytes(range(256)) * (SIZE // 256))
    return path


def test_the_same_file_unchanged_is_taken(path: Path) -> None:
    source = mapped(path)
    source.write(5 * PAGE_SIZE + 3, b"a packet")
    saved = describe(source, [])
    assert 5 in saved.pages
    assert parse_record(SAVED_MEMORY, SAVED_MEMORY.build(saved)) == saved
    check(saved, mapped(path))


def test_another_file_is_refused_whatever_is_in_it(path: Path) -> None:
    saved = describe(mapped(path), [])
    copy = path.with_name("copy")
    shutil.copy(path, copy)
    with pytest.raises(StateRefused, match="in another file"):
        check(saved, mapped(copy))


def test_after_a_reboot_of_the_host_the_contents_count(path: Path) -> None:
    source = mapped(path)
    source.write(0, b"0")
    saved = dataclasses.replace(describe(source, []), boot=ELSEWHERE)
    copy = path.with_name("copy")
    shutil.copy(path, copy)
    check(saved, mapped(copy))
    copy.write_bytes(bytes(SIZE))
    with pytest.raises(StateRefused, match="not as the guest left it"):
        check(saved, mapped(copy))


@pytest.mark.parametrize("page", [5, 700])
def test_memory_that_was_written_since_is_refused(path: Path, page: int) -> None:
    source = mapped(path)
    source.write(5 * PAGE_SIZE, b"a packet")
    saved = describe(source, [])  # so small a memory is looked at in whole
    source.write(page * PAGE_SIZE + 9, b"?")
    with pytest.raises(StateRefused, match="not as the guest left it"):
        check(saved, mapped(path))


def test_another_size_is_refused(path: Path) -> None:
    saved = describe(mapped(path), [])
    with pytest.raises(StateRefused, match="of 8192 bytes, and the target has 4194304"):
        check(dataclasses.replace(saved, size=8192), mapped(path))


@pytest.mark.parametrize("change", [{"pages": (SIZE // PAGE_SIZE,)}, {"first": 1 << 30}, {"step": 0}])
def test_pages_that_do_not_exist_are_refused(path: Path, change: dict[str, Any]) -> None:
    saved = dataclasses.replace(describe(mapped(path), []), **change)
    with pytest.raises(StateRefused) as error:
        check(saved, mapped(path))
    assert error.value.reason is Reason.INCONSISTENT


def test_memory_that_is_no_file_cannot_stay(path: Path) -> None:
    memory = MappedMemory(memoryview(bytearray(SIZE)), [RamRegion(0, SIZE, 0)])
    with pytest.raises(StateRefused, match="is not in a file"):
        describe(memory, [])
    with pytest.raises(StateRefused, match="no file"):
        check(describe(mapped(path), []), memory)
