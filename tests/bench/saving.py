"""What saving and restoring one channel costs: microseconds, and bytes a second, without a guest.

An idle channel, into a buffer that all chunks fit in, and into one of 4 KiB. And a channel of a storage controller
with 256 reads of 512 KiB under way, with pages that lie scattered as in a guest that has run for a while: the
controller is the real one, its disk delays every read, and the limits that keep such a state small are lifted (within
them, a guest has some 110 of these reads under way). Saving begins when the channel is paused; restoring is reading,
checking and applying, up to where the channel may be started.
"""

from __future__ import annotations

import statistics
import time

from vmbus.saving import ChannelSaver, NtStatus, Restore, read_machine, save_machine
from vmbus.saving.state import SavableChannel

from tests.bench.report import Result
from tests.unit.saving.model_channel import ModelChannel
from tests.unit.scsi.waiting_reads import MOST_PAGES, send_reads, storage_channel

ROUNDS = 200
READ_ROUNDS = 20
REQUESTS = 256
BUFFERS = {"64 KiB": 64 << 10, "4 KiB": 4 << 10}


def add_saving(result: Result) -> None:
    """Rows for ``result``."""
    for buffer_name, size in BUFFERS.items():
        channel = ModelChannel()
        channel.guest_opens()
        channel.start()
        times, saved = [], 0
        for _ in range(ROUNDS):
            begun = time.perf_counter()
            saved = _save(channel, size)
            times.append((time.perf_counter() - begun) * 1e6)
        row = f"save of a channel idle, buffer {buffer_name}"
        _add(result, row, times, saved, "< 512")
    saves, loads, saved = _reads()
    _add(result, f"save of a channel with {REQUESTS} reads under way", saves, saved)
    _add(result, f"restore of a channel with {REQUESTS} reads under way", loads, saved)


def _add(result: Result, row: str, times: list[float], saved: int, aim: str = "") -> None:
    result.add(row, times)
    result.figure(f"{row}: bytes", saved, "bytes", aim)
    result.figure(f"{row}: speed", saved / statistics.median(times), "MB/s")


def _save(channel: SavableChannel, size: int) -> int:
    """Bytes saved."""
    saver = ChannelSaver()
    saver.pause(channel)
    if saver.save_begin(channel) != NtStatus.STATUS_SUCCESS:
        raise SystemExit(f"SaveBegin: {saver.refusal(channel)}")
    buffer, total = bytearray(size), 0
    status = NtStatus.STATUS_BUFFER_OVERFLOW
    while status == NtStatus.STATUS_BUFFER_OVERFLOW:
        status, filled, required = saver.save_continue(channel, buffer, len(buffer))
        total += filled
        if status == NtStatus.STATUS_BUFFER_TOO_SMALL:
            buffer, status = bytearray(required), NtStatus.STATUS_BUFFER_OVERFLOW
    saver.save_end(channel)
    saver.start(channel)
    return total


def _reads() -> tuple[list[float], list[float], int]:
    """Microseconds of saves and of restores, and bytes of the state."""
    saves, loads = [], []
    with storage_channel() as (guest, channel, saver):
        guest.negotiate()
        send_reads(guest, REQUESTS, MOST_PAGES)
        for _ in range(READ_ROUNDS):
            saver.pause(channel)
            begun = time.perf_counter()
            state = save_machine(saver, [channel])
            saves.append((time.perf_counter() - begun) * 1e6)
            saver.start(channel)
        for _ in range(READ_ROUNDS):
            with storage_channel() as (there, restored, other):
                other.pause(restored)
                there.io.detach()
                begun = time.perf_counter()
                Restore(other, [restored]).apply(read_machine(state.data))
                loads.append((time.perf_counter() - begun) * 1e6)
    return saves, loads, state.channels[0].size
