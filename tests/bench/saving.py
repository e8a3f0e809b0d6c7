"""What ``SaveContinue`` costs: microseconds a channel, bytes a second, without a guest.

An idle channel, and one with 256 reads of 512 KiB under way, the most that a storage driver keeps open; into a buffer
that all chunks fit in, and into one of 4 KiB.
"""

from __future__ import annotations

import statistics
import time

from vmbus.saving import ChannelSaver, NtStatus

from tests.bench.report import Result
from tests.unit.saving.model_channel import ModelChannel, request

ROUNDS = 200
REQUESTS = 256
PAGES = 128
BUFFERS = {"64 KiB": 64 << 10, "4 KiB": 4 << 10}


def add_saving(result: Result) -> None:
    """Rows for ``result``."""
    for name, requests in (("idle", 0), (f"with {REQUESTS} reads under way", REQUESTS)):
        for buffer_name, size in BUFFERS.items():
            channel = _channel(requests)
            times, saved = [], 0
            for _ in range(ROUNDS if not requests else ROUNDS // 10):
                begun = time.perf_counter()
                saved = _save(channel, size)
                times.append((time.perf_counter() - begun) * 1e6)
            row = f"save of a channel {name}, buffer {buffer_name}"
            result.add(row, times)
            result.figure(f"{row}: bytes", saved, "bytes", "" if requests else "< 512")
            result.figure(f"{row}: speed", saved / statistics.median(times), "MB/s")


def _channel(requests: int) -> ModelChannel:
    """An open channel that is paused; its requests' pages lie scattered, as in a guest that has run for a while."""
    channel = ModelChannel()
    channel.guest_opens()
    channel.start()
    for number in range(requests):
        pfns = tuple((number * PAGES + page) * 37 % 1_000_000 for page in range(PAGES))
        channel.guest_sends(request(number + 1, bytes(64), pfns))
    return channel


def _save(channel: ModelChannel, size: int) -> int:
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
