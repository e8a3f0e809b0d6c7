"""``vmbus`` that kills itself at a moment of a migration: ``python -m tests.migration.mortal MOMENT VERB ...``.

======================================  ===========================================================================
moment                                  dies
======================================  ===========================================================================
a status of QEMU's (setup, active, ...)  when QEMU tells of it, before anything is done about it
ready                                   with everything prepared, in place of letting QEMU go on
saving, saved                           before, or just after it answers Save()
loading, loaded                         before, or just after it answers Load()
running                                 when QEMU tells that the guest runs (again)
trap                                    when the guest first needs its host, in place of an answer
======================================  ===========================================================================
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from vmbus.cli import main
from vmbus.machine.gateway_service import GatewayService
from vmbus.machine.migration.coordinator import Coordinator
from vmbus.machine.qemu.qmp import Qmp

_JUST_AFTER = 0.01


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _before(owner: type, name: str, applies: Callable[..., bool] = lambda *_: True) -> None:
    plain = getattr(owner, name)

    def mortal(self: Any, *arguments: Any) -> Any:
        if applies(*arguments):
            die()
        return plain(self, *arguments)

    setattr(owner, name, mortal)


def _after(owner: type, name: str) -> None:
    plain = getattr(owner, name)

    def mortal(self: Any, *arguments: Any) -> Any:
        answer = plain(self, *arguments)
        asyncio.get_running_loop().call_later(_JUST_AFTER, die)
        return answer

    setattr(owner, name, mortal)


def prepare(moment: str) -> None:
    if moment == "ready":
        _before(Qmp, "execute", lambda command, *_: command == "migrate-continue")
    elif moment == "saving":
        _before(Coordinator, "save")
    elif moment == "saved":
        _after(Coordinator, "save")
    elif moment == "loading":
        _before(Coordinator, "load")
    elif moment == "loaded":
        _after(Coordinator, "load")
    elif moment == "running":
        _before(Coordinator, "_resumed")
    elif moment == "trap":
        _before(GatewayService, "answer")
    else:
        _before(Coordinator, "_migration", lambda status: status == moment)


if __name__ == "__main__":
    prepare(sys.argv[1])
    sys.exit(main(sys.argv[2:]))
