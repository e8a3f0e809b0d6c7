"""Journals whose stores are recorded one by one, to see the memory as it is after any of them."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import SupportsIndex

import pytest
from vmbus.machine.journal import store
from vmbus.machine.journal.store import Journal, read
from vmbus.wire import journal as wire

Changes = Mapping[bytes, bytes | None]
SMALL = wire.MIN_SIZE
"""Bytes of a memory whose halves have a page each."""


@dataclass(frozen=True)
class Store:
    """One store: ``data`` at ``offset``; ``word``: a single aligned one."""

    offset: int
    data: bytes
    word: bool


class Recorder:
    """Both views of a memory. Each assignment is applied, and kept."""

    def __init__(self, memory: memoryview, stores: list[Store], *, words: bool) -> None:
        self._memory = memory
        self._stores = stores
        self._words = words

    def __setitem__(self, key: slice | SupportsIndex, value: bytes | int) -> None:
        if isinstance(value, int):
            assert self._words
            assert not isinstance(key, slice)
            done = Store(int(key) * 8, value.to_bytes(8, "little"), True)
        else:
            assert not self._words
            assert isinstance(key, slice)
            assert key.step is None
            done = Store(key.start, bytes(value), False)
            assert key.stop - key.start == len(value)
        self._memory[done.offset : done.offset + len(done.data)] = done.data
        self._stores.append(done)

    def release(self) -> None:
        """Release nothing: the test has the memory."""


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Store]:
    """Record the stores of all journals that are made from now on."""
    stores: list[Store] = []

    def views(memory: memoryview) -> tuple[Recorder, Recorder]:
        return Recorder(memory, stores, words=False), Recorder(memory, stores, words=True)

    monkeypatch.setattr(store, "views", views)
    return stores


@dataclass(frozen=True)
class Step:
    """A store of a transaction that turns the values ``before`` into ``after``."""

    store: Store
    before: dict[bytes, bytes]
    after: dict[bytes, bytes]
    sequence: int
    """Number of the transaction."""
    last: bool
    """Whether the transaction is complete with it."""


def applied(values: Mapping[bytes, bytes], changes: Changes) -> dict[bytes, bytes]:
    """Return ``values`` after ``changes``."""
    merged = {**values, **changes}
    return {key: value for key, value in merged.items() if value is not None}


def steps_of(journal: Journal, stores: list[Store], session: Iterable[Changes]) -> list[Step]:
    """Run a session; return each of its stores."""
    steps = []
    for changes in session:
        before = dict(journal.values)
        stores.clear()
        journal.commit(changes)
        after = applied(before, changes)
        assert dict(journal.values) == after
        steps += [Step(each, before, after, journal.sequence, each is stores[-1]) for each in tuple(stores)]
    return steps


def some_session(count: int, seed: int, *, longest: int = 300) -> list[Changes]:
    """Return transactions with few keys, so that they fit into a small journal for ever."""
    rng = random.Random(seed)
    keys = [b"k%d" % number for number in range(6)] + [b"K" * wire.MAX_KEY]
    session: list[Changes] = []
    for _ in range(count):
        chosen = rng.sample(keys, rng.choice((1, 1, 1, 2, 4)))
        session.append(
            {
                key: None if rng.random() < 0.2 else rng.randbytes(rng.randrange(longest) * rng.randrange(2))
                for key in chosen
            }
        )
    return session


def torn(done: Store, seed: int) -> Iterator[Sequence[int]]:
    """Yield orders in which the bytes of a store may reach the memory: forward, backward, any other."""
    size = len(done.data)
    shuffled = list(range(size))
    random.Random(seed).shuffle(shuffled)
    yield range(size)
    yield range(size - 1, -1, -1)
    yield shuffled


def state(memory: bytearray | memoryview) -> tuple[dict[bytes, bytes], int]:
    """Return the values and the sequence number that a reader finds."""
    found = read(memoryview(memory))
    return dict(found.values), found.sequence
