"""Compiled parts in the cache: what is kept, and what is removed."""

from __future__ import annotations

import ctypes
import os
import time
from pathlib import Path

import pytest
from vmbus.native import KEPT_DAYS, NativeLibrary

OLD = (KEPT_DAYS + 1) * 86400


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    return folder


def build(source: Path, cache: Path, number: int) -> Path:
    (source / "tiny.c").write_text(
        f'__attribute__((visibility("default"))) int tiny(void) {{ return {number}; }}\n'
    )
    return NativeLibrary("tiny", "a tiny library", source).build(cache)


def age(library: Path, seconds: float = OLD) -> None:
    then = time.time() - seconds
    os.utime(library, (then, then))


def test_versions_that_nobody_uses_any_more_are_removed_when_another_is_made(
    source: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    unused, recent, loaded, used = (build(source, cache, number) for number in range(4))
    others = [cache / name for name in ("tiny-0123456789abcdef.json", "other-0123456789abcdef.so")]
    for each in others:
        each.touch()
    held = ctypes.CDLL(str(loaded))
    for each in (unused, loaded, used, *others):
        age(each)
    assert build(source, cache, 3) == used  # a use
    new = build(source, cache, 4)
    assert sorted(cache.iterdir()) == sorted([recent, loaded, used, new, *others])
    assert held.tiny() == 2


def test_a_version_that_is_made_anew_is_found_again(source: Path, tmp_path: Path) -> None:
    first = build(source, tmp_path / "cache", 1)
    age(first)
    second = build(source, tmp_path / "cache", 2)
    assert not first.exists()
    assert build(source, tmp_path / "cache", 1) == first
    assert first.exists()
    assert second.exists()
