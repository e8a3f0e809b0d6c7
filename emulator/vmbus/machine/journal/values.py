"""What a journal has of a guest, besides the sections and chunks of a saved state: layouts and keys.

| key                  | value                                                                               |
| ``about``            | form of the journal, resets of the machine that the host has handled                |
| ``hypervisor``       | the hypervisor section of a saved state                                             |
| ``bus``              | the bus section                                                                     |
| ``timers``           | the synthetic timers of all processors, which are newer than those of the section   |
| ``answers``          | answers to traps, and how many posts were handled: given once all this is stored    |
| ``marks``            | the message slots that are written once all this is stored                          |
| ``devices``          | the lines of the devices, which make them again                                     |
| ``channel`` identity | where the host stands in the rings, what compiled code has of the channel, and the  |
|                      | chunks of its saved state                                                           |
| ``ended``            | why the journal goes no further                                                     |
"""

from __future__ import annotations

from dataclasses import dataclass

import construct as c

from vmbus.machine.gateway.traps import GivenAnswer
from vmbus.wire.codec import Record
from vmbus.wire.plain import Blob, Nested, Text, VarTuple
from vmbus.wire.saved import CHANNEL_IDENTITY, ChannelIdentity

FORM = 2
"""Form of the values; another one is not read."""

ABOUT, HYPERVISOR, BUS, TIMERS, ANSWERS, MARKS, DEVICES, ENDED = (
    b"about",
    b"hypervisor",
    b"bus",
    b"timers",
    b"answers",
    b"marks",
    b"devices",
    b"ended",
)
_CHANNEL = b"channel"

NO_EXPIRATION = 0xFFFF_FFFF_FFFF_FFFF
"""In place of an expiration: the timer does not run."""


def channel_key(identity: ChannelIdentity) -> bytes:
    """Return the key of a channel."""
    return _CHANNEL + CHANNEL_IDENTITY.build(identity)


def identity_of(key: bytes) -> ChannelIdentity:
    """Return the channel of a key. Raises :class:`~vmbus.errors.MalformedError`."""
    found, _ = CHANNEL_IDENTITY.parse_all(key.removeprefix(_CHANNEL))
    return found


def is_channel(key: bytes) -> bool:
    """Return whether ``key`` is that of a channel."""
    return key.startswith(_CHANNEL)


@dataclass(frozen=True, slots=True)
class About:
    """The first value. ``resets``: the gateway's counter, as of the last reset that the host had handled."""

    form: int
    resets: int


ABOUT_VALUE = Record(About, "form" / c.Int32ul, "resets" / c.Int32ul)

_ANSWER = Record(
    GivenAnswer,
    "place" / c.Int32ul,
    "sequence" / c.Int64ul,
    "verdict" / c.Int32ul,
    "value" / c.Int64ul,
)


@dataclass(frozen=True, slots=True)
class Answers:
    """What follows the transaction. ``posts``: number of posts that were handled, modulo 2^64."""

    posts: int
    answers: tuple[GivenAnswer, ...]


ANSWERS_VALUE = Record(Answers, "posts" / c.Int64ul, "answers" / VarTuple(Nested(_ANSWER)))


@dataclass(frozen=True, slots=True)
class SlotMark:
    """The mark of the first message in the queue of a SINT."""

    vp: int
    sint: int
    mark: int


_MARK = Record(SlotMark, "vp" / c.Int32ul, "sint" / c.Int16ul, "mark" / c.Int16ul)


@dataclass(frozen=True, slots=True)
class Marks:
    """All of them."""

    slots: tuple[SlotMark, ...]


MARKS_VALUE = Record(Marks, "slots" / VarTuple(Nested(_MARK)))


@dataclass(frozen=True, slots=True)
class Devices:
    """The devices of the host, as lines of ``--device``; of one that was made by code there is none."""

    lines: tuple[str, ...]


DEVICES_VALUE = Record(Devices, "lines" / VarTuple(Text))


@dataclass(frozen=True, slots=True)
class Timer:
    """A synthetic timer; ``expiration`` may be :data:`NO_EXPIRATION`."""

    config: int
    count: int
    expiration: int


_TIMER = Record(Timer, "config" / c.Int64ul, "count" / c.Int64ul, "expiration" / c.Int64ul)


@dataclass(frozen=True, slots=True)
class Timers:
    """Those of all processors, each with as many."""

    timers: tuple[Timer, ...]


TIMERS_VALUE = Record(Timers, "timers" / VarTuple(Nested(_TIMER)))


@dataclass(frozen=True, slots=True)
class Link:
    """:class:`~vmbus.ports.FastLink`: how what compiled code had of a channel is found in its mirror."""

    epoch: int
    channel: int
    opening: int
    gives: int
    given: int
    adopted: tuple[int, ...]


_LINK = Record(
    Link,
    "epoch" / c.Int32ul,
    "channel" / c.Int32ul,
    "opening" / c.Int32ul,
    "gives" / c.Int32ul,
    "given" / c.Int8ul,
    "adopted" / VarTuple(c.Int32ul),
)


@dataclass(frozen=True, slots=True)
class ChannelValue:
    """A channel. ``read``, ``write``: indices of its rings, if it has any (``is_open``); ``chunks``: its state.

    ``links``: one, if compiled code keeps what a successor needs of the channel.
    """

    is_open: int
    read: int
    write: int
    links: tuple[Link, ...]
    chunks: bytes


CHANNEL_VALUE = Record(
    ChannelValue,
    "is_open" / c.Int8ul,
    "read" / c.Int32ul,
    "write" / c.Int32ul,
    "links" / VarTuple(Nested(_LINK)),
    "chunks" / Blob,
)
