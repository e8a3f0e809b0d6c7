"""``python -m tests.unit.engine.load ENGINE DEVICE``: an engine under load, for a run under a sanitizer.

Gives and recalls a channel again and again, with requests under way, and prints how many were sent and answered.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from vmbus.wire.gateway import IdleState

from tests.unit.engine.engine_guest import FLAGS_PAGE, PAGE, EngineGuest

ROUNDS = 60


def main(engine: str, device: str) -> None:
    for busy_waits in (True, False):
        with EngineGuest(Path(device), engine=engine, busy_waits=busy_waits) as guest:
            os.pwrite(guest.file, bytes(64 * PAGE), 0)
            answered = sum(_round(guest, number) for number in range(ROUNDS))
            guest.engine.counts()
            print(guest.next_id - 1, answered)


def _round(guest: EngineGuest, number: int) -> int:
    """Send some requests; return how many were answered."""
    guest.idle = (IdleState.RUNNING, IdleState.HALTED)[number % 2]
    guest.answers.clear()
    guest.give()
    count = 1 + number % 20
    guest.send(*[guest.read_order(each) if each % 2 else guest.order(1) for each in range(count)])
    if number % 3:
        answered = len(guest.receive(count))
        guest.recall()
        return answered
    guest.recall()
    answered = len(guest.reader.read()[0])
    guest.memory.pages([FLAGS_PAGE]).store_u32(0, 0)
    end = time.monotonic() + 20
    while guest.engine.in_flight and time.monotonic() < end:
        guest.engine.dispatch()
    guest.engine.dispatch()
    guest.give()
    if left := count - answered - len(guest.answers):  # what was not taken before the recall
        answered += len(guest.receive(left))
    guest.recall()
    return answered + len(guest.answers)


if __name__ == "__main__":
    main(*sys.argv[1:])
