"""What an address of a migration stands for: opened here, and handed over to QEMU."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest
from vmbus.cli import migrate as verb
from vmbus.cli import parser
from vmbus.errors import UserError
from vmbus.machine import rundir
from vmbus.machine.migration.opened import handed_over
from vmbus.machine.migration.ports import Monitor


class Qmp:
    """A QEMU that writes one line to what it is handed."""

    connected = True

    async def hand_over(self, descriptor: int, name: str) -> None:
        os.write(descriptor, b"all of the guest\n")

    async def execute(self, command: str, arguments: Mapping[str, Any] | None = None) -> object:
        return {}


async def test_the_command_of_exec_runs_where_the_caller_is(tmp_path: Path) -> None:
    """The emulator was started somewhere else, perhaps on another day."""
    async with handed_over(cast(Monitor, Qmp()), "exec:cat > guest", None, directory=tmp_path) as address:
        assert address.startswith("fd:vmbus-")
    assert (tmp_path / "guest").read_text() == "all of the guest\n"


async def test_a_folder_that_is_gone_is_named(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    with pytest.raises(UserError, match=f"cannot start a shell in {gone}: No such file"):
        async with handed_over(cast(Monitor, Qmp()), "exec:cat > guest", None, directory=gone):
            pass


@pytest.mark.parametrize(("uri", "given"), [("exec:cat > guest", True), ("tcp:host:1", False)])
def test_the_command_line_says_where_it_was_typed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, uri: str, given: bool
) -> None:
    asked: dict[str, Any] = {}

    def ask(control: Path, command: str, **request: Any) -> object:
        asked.update(request)
        raise UserError("that is all")

    monkeypatch.setattr(verb, "ask", ask)
    monkeypatch.setattr(rundir, "find", lambda name: tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="that is all"):
        verb.main(parser().parse_args(["migrate", "web", uri]))
    assert asked["uri"] == uri
    assert asked.get("directory") == (str(tmp_path) if given else None)
