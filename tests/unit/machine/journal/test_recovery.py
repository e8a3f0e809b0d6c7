"""What a journal has of a guest: it is read as it was written, and refused with its reason where it cannot be."""

from __future__ import annotations

import dataclasses
import mmap
import re
from collections.abc import Callable

import pytest
from vmbus.machine.gateway.traps import GivenAnswer
from vmbus.machine.journal.recorder import Recorder, Round
from vmbus.machine.journal.recovery import recover
from vmbus.machine.journal.store import Journal, JournalRefused
from vmbus.machine.journal.values import (
    ABOUT,
    ABOUT_VALUE,
    ANSWERS,
    BUS,
    CHANNEL_VALUE,
    ENDED,
    FORM,
    TIMERS,
    TIMERS_VALUE,
    About,
    Timers,
    channel_key,
    identity_of,
    is_channel,
)

Recorded = tuple[mmap.mmap, Journal, Recorder]


async def test_a_guest_is_read_as_it_was_written(recorded: Recorded) -> None:
    memory, journal, recorder = recorded
    found = recover(memory)
    assert (found.posts, found.answers, found.marks, found.resets) == (7, (), {}, 3)
    assert {each.identity for each in found.state.channels}
    assert {channel_key(each.identity) for each in found.state.channels} == set(
        filter(is_channel, journal.values)
    )
    answer = GivenAnswer(1, 2, 0, 1 << 63)
    recorder.round_ended(Round([answer], timers=1))
    assert recover(memory).answers == (answer,)
    commits = recorder.commits
    recorder.round_ended(Round([answer]))
    assert recorder.commits == commits, "a round that changes nothing writes nothing"


async def test_a_guest_that_was_given_up_is_refused_with_the_reason(recorded: Recorded) -> None:
    memory, journal, recorder = recorded
    recorder.pause("it was passed on")
    assert set(journal.values) == {ENDED}
    with pytest.raises(JournalRefused, match="it was passed on") as refused:
        recover(memory)
    assert refused.value.reason == "ended"
    recorder.round_ended(Round(guest=True))
    assert set(journal.values) == {ENDED}
    recorder.begin()
    assert recover(memory).posts == 7


def damaged(value: bytes) -> bytes:
    channel = CHANNEL_VALUE.parse(value)
    return CHANNEL_VALUE.build(dataclasses.replace(channel, chunks=channel.chunks[:-1] + b"\xff"))


@pytest.mark.parametrize(
    ("key", "change", "reason", "words"),
    [
        (ABOUT, lambda value: ABOUT_VALUE.build(About(FORM + 1, 3)), "version", f"form {FORM + 1}"),
        (ABOUT, lambda value: None, "state", "'about'"),
        (BUS, lambda value: None, "state", "'bus'"),
        (ANSWERS, lambda value: value + b"\0", "state", "canonical"),
        (TIMERS, lambda value: TIMERS_VALUE.build(Timers(())), "state", "0 timers"),
    ],
)
async def test_what_cannot_be_read_is_refused(
    recorded: Recorded, key: bytes, change: Callable[[bytes], bytes | None], reason: str, words: str
) -> None:
    memory, journal, _ = recorded
    key = next(each for each in journal.values if each.startswith(key))
    journal.commit({key: change(journal.values[key])})
    with pytest.raises(JournalRefused, match=words) as refused:
        recover(memory)
    assert refused.value.reason == reason


@pytest.mark.parametrize(
    ("change", "words"),
    [(damaged, "chunk|checksum|damaged"), (lambda value: value[:5], "bytes|malformed|truncated")],
)
async def test_a_channel_that_cannot_be_read_is_lost_alone(
    recorded: Recorded, change: Callable[[bytes], bytes], words: str
) -> None:
    memory, journal, _ = recorded
    [key] = filter(is_channel, journal.values)
    journal.commit({key: change(journal.values[key])})
    found = recover(memory)
    assert list(found.lost) == [identity_of(key)]
    assert re.search(words, found.lost[identity_of(key)])
    assert (found.state.channels, found.positions) == ((), {})
    assert found.posts == 7


async def test_a_channel_whose_name_cannot_be_read_is_refused(recorded: Recorded) -> None:
    memory, journal, _ = recorded
    journal.commit({b"channel of nobody": b""})
    with pytest.raises(JournalRefused) as refused:
        recover(memory)
    assert refused.value.reason == "state"
