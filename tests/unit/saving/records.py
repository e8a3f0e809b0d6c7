"""Hypothesis strategies for every saved record."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st
from vmbus.wire.chunk import ChunkKind
from vmbus.wire.packet import GpaRange, TransferPages, TransferRange
from vmbus.wire.pfn_runs import PFN_LIMIT
from vmbus.wire.saved import (
    ChannelAxes,
    ChannelIdentity,
    SavedChannel,
    SavedChannelRecords,
    SavedCompletion,
    SavedDevice,
    SavedEnd,
    SavedGpadl,
    SavedMachine,
    SavedMemory,
    SavedOpen,
    SavedOutgoing,
    SavedPacket,
    SavedPages,
    SavedRefusal,
    SavedSection,
    SavedTaken,
)


@dataclass(frozen=True)
class Pages:
    """A record with only a page list."""

    pfns: tuple[int, ...]


u16, u32, u64 = (st.integers(0, (1 << bits) - 1) for bits in (16, 32, 64))
blob = st.binary(max_size=200)
text = st.text(max_size=30)


def members(of: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(of, max_size=4).map(tuple)


@st.composite
def gpa_ranges(draw: st.DrawFn) -> GpaRange:
    byte_count, byte_offset = draw(st.integers(0, 20_000)), draw(st.integers(0, 4095))
    pages = (byte_count + byte_offset + 4095) // 4096
    pfns = draw(st.lists(st.integers(0, PFN_LIMIT - 1), min_size=pages, max_size=pages))
    return GpaRange(byte_count, byte_offset, tuple(pfns))


identities = st.builds(ChannelIdentity, st.uuids(), st.uuids(), u16)
opens = st.builds(
    SavedOpen, u32, u32, u32, u32, st.binary(max_size=120), u16, st.none() | u16, st.none() | u32
)
channels = st.builds(
    SavedChannel,
    identities,
    st.integers(0, 15).map(ChannelAxes),
    *(u32,) * 7,
    *(u16,) * 3,
    u64,
    st.none() | opens,
    members(st.builds(SavedGpadl, u32, u32)),
    text,
)
packets = st.builds(
    SavedPacket,
    u16,
    u16,
    u64,
    blob,
    members(gpa_ranges()),
    st.none() | st.builds(TransferPages, u16, members(st.builds(TransferRange, u32, u32))),
)
outgoing = st.builds(SavedOutgoing, blob, blob)
page_contents = st.binary(max_size=200).map(lambda content: content.rstrip(b"\0"))
saved_pages = st.dictionaries(st.integers(0, PFN_LIMIT - 1), page_contents, min_size=1, max_size=8).map(
    lambda found: SavedPages(tuple(sorted(found)), tuple(found[pfn] for pfn in sorted(found)))
)
sections = st.builds(SavedSection, text, u16, blob)

RECORD_STRATEGIES: dict[ChunkKind, st.SearchStrategy[Any]] = {
    ChunkKind.CHANNEL: channels,
    ChunkKind.OUTSTANDING: outgoing,
    ChunkKind.UNSENT: outgoing,
    ChunkKind.COMPLETION: st.builds(SavedCompletion, u64, blob),
    ChunkKind.TAKEN: packets | st.builds(SavedTaken, packets, blob),
    ChunkKind.DEVICE: st.builds(SavedDevice, blob),
    ChunkKind.MACHINE: st.builds(SavedMachine, text),
    ChunkKind.HYPERVISOR: sections,
    ChunkKind.BUS: sections,
    ChunkKind.CHANNEL_RECORDS: st.builds(SavedChannelRecords, identities, members(blob)),
    ChunkKind.MEMORY: st.builds(
        SavedMemory,
        st.uuids(),
        *(u64,) * 3,
        members(st.integers(0, PFN_LIMIT - 1)),
        u64,
        u64,
        blob,
    ),
    ChunkKind.PAGES: saved_pages,
    ChunkKind.REFUSAL: st.builds(SavedRefusal, text, text),
    ChunkKind.END: st.builds(SavedEnd, u32, u32),
}
kinds_and_records = st.sampled_from(list(ChunkKind)).flatmap(
    lambda kind: st.tuples(st.just(kind), RECORD_STRATEGIES[kind])
)
