"""The mirror that a successor finds: begun, kept until the journal has what was passed on, left and taken back."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterator
from pathlib import Path

import pytest
from vmbus.errors import InternalError
from vmbus.machine.engine.layout import MAGIC, Mirror, Owner
from vmbus.machine.engine.mirror import SlotState
from vmbus.machine.io.addresses import address_of

from tests.unit.engine.engine_guest import EngineGuest, compile_device


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_device(tmp_path_factory.mktemp("device"))


class Kept:
    """A guest whose engine's mirror outlives it; ``memory`` was used by an engine of before."""

    def __init__(self, device: Path) -> None:
        self.memory = mmap.mmap(-1, ctypes.sizeof(Mirror))
        self.mirror = Mirror.from_buffer(self.memory)
        self.mirror.header.epoch = 6
        self.mirror.channel[3].gives = 9
        self.mirror.slot[1000].state = SlotState.TAKEN
        self.guest = EngineGuest(device)
        self.engine = self.guest.engine

    def begin(self) -> None:
        self.engine.begin_mirror(address_of(self.memory))

    def states(self) -> dict[int, int]:
        """Numbers of the requests in slots that are not free → their states."""
        return {slot.taken_number: slot.state for slot in self.mirror.slot if slot.state != SlotState.FREE}

    def wait_for(self, states: dict[int, int]) -> None:
        self.guest.dispatch(lambda: self.states() == states)

    def recall_with_answers(self) -> None:
        """Recall the channel while answers wait for room."""
        self.guest.give()
        self.guest.fill()
        self.guest.recall()
        assert self.guest.answers


@pytest.fixture
def kept(device: Path) -> Iterator[Kept]:
    made = Kept(device)
    with made.guest:
        yield made


def test_it_is_empty_and_has_another_epoch(kept: Kept) -> None:
    kept.begin()
    header = kept.mirror.header
    assert (header.magic, header.epoch, kept.mirror.channel[3].gives, kept.states()) == (MAGIC, 7, 0, {})


def test_it_cannot_begin_after_a_channel_was_given(kept: Kept) -> None:
    kept.guest.give()
    kept.guest.recall()
    with pytest.raises(InternalError):
        kept.begin()
    assert kept.mirror.header.epoch == 6


def test_it_counts_the_gives_and_says_who_has_the_channel(kept: Kept) -> None:
    kept.begin()
    for count in (1, 2, 3):
        assert kept.engine.link(0) == (0, count - 1, False, ())
        kept.guest.give()
        assert kept.engine.link(0) == (0, count, True, ())
        assert (kept.mirror.channel[0].gives, kept.mirror.channel[0].owner) == (count, Owner.ENGINE)
        kept.guest.recall()
        assert kept.mirror.channel[0].owner == Owner.PYTHON


def test_what_was_passed_on_stays_until_it_is_recorded(kept: Kept) -> None:
    kept.begin()
    kept.recall_with_answers()
    passed_on = kept.states()
    assert set(passed_on.values()) == {SlotState.PYTHON}
    assert sorted(kept.engine.link(0)[3]) == sorted(passed_on)
    assert kept.guest.outstanding == len(passed_on)
    kept.engine.recorded(0)
    kept.wait_for({})
    assert kept.engine.link(0)[3] == ()


def test_what_was_passed_on_is_not_outstanding(kept: Kept) -> None:
    kept.begin()
    kept.recall_with_answers()
    assert kept.engine.outstanding(0) == 0
    count = len(kept.guest.answers)
    kept.guest.give()
    kept.guest.recall()
    assert kept.guest.outstanding == len(kept.guest.answers) - count


def test_nothing_is_written_into_a_mirror_that_was_left(kept: Kept) -> None:
    kept.begin()
    kept.recall_with_answers()
    kept.engine.switch_mirror(ctypes.addressof(kept.guest.mirror))
    before = bytes(kept.memory)
    kept.engine.recorded(0)
    kept.engine.switch_mirror(ctypes.addressof(kept.guest.mirror))  # after which all are free
    assert bytes(kept.memory) == before
    # Taken back: slots that are free by now are so there, too.
    kept.engine.switch_mirror(ctypes.addressof(kept.mirror))
    assert kept.states() == {}
