"""What an address of a migration stands for: opened here, and handed over to QEMU."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from vmbus.cli import migrate as verb
from vmbus.cli import parser
from vmbus.errors import QemuError, UserError
from vmbus.machine import rundir
from vmbus.machine.migration.opened import handed_over
from vmbus.machine.migration.ports import Monitor


class Qmp:
    """A QEMU that writes one line to what it is handed."""

    connected = True

    async def hand_over(self, descriptor: int, name: str) -> None:
        os.write(descriptor, b"all of the guest\n")

    async def lend(self, descriptors: Sequence[int]) -> int:
        self.lent = os.open(f"/proc/self/fd/{descriptors[0]}", os.O_WRONLY)  # as QEMU opens one of its set
        return 7

    def write(self) -> None:
        os.write(self.lent, b"all of the guest\n")
        os.close(self.lent)

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


async def test_a_guest_replaces_the_file_of_another_when_all_of_it_is_there(tmp_path: Path) -> None:
    file = tmp_path / "guest"
    (tmp_path / "link").symlink_to("guest")
    for path in (file, file, tmp_path / "link"):  # the first is a new one
        before = file.read_bytes() if file.exists() else None
        qmp = Qmp()
        async with handed_over(cast(Monitor, qmp), f"file:{path}", None) as address:
            assert address == "file:/dev/fdset/7"
            assert (file.read_bytes() if file.exists() else None) == before
            qmp.write()
        assert file.read_bytes() == b"all of the guest\n"
        assert file.stat().st_mode & 0o777 == 0o600
        file.write_bytes(b"another guest")
    assert sorted(each.name for each in tmp_path.iterdir()) == ["guest", "link"]
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("refused", [True, False])
async def test_a_migration_that_fails_costs_no_guest_that_was_written_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: bool
) -> None:
    file = tmp_path / "guest"
    file.write_bytes(b"another guest")
    qmp = Qmp()

    async def no_descriptor(descriptors: Sequence[int]) -> int:
        raise QemuError("QEMU refused add-fd")

    if refused:
        monkeypatch.setattr(qmp, "lend", no_descriptor)
    with pytest.raises(QemuError):
        async with handed_over(cast(Monitor, qmp), f"file:{file}", None):
            qmp.write()
            raise QemuError("QEMU refused migrate")
    assert file.read_bytes() == b"another guest"
    assert [each.name for each in tmp_path.iterdir()] == ["guest"]


async def test_a_guest_at_an_offset_is_written_into_the_file(tmp_path: Path) -> None:
    file = tmp_path / "guest"
    file.write_bytes(b"another guest, and more")
    qmp = Qmp()
    async with handed_over(cast(Monitor, qmp), f"file:{file},offset=0x1000", None) as address:
        assert address == "file:/dev/fdset/7,offset=0x1000"
        qmp.write()
    assert file.read_bytes() == b"all of the guest\nd more"


async def test_what_qemu_wrote_is_kept_where_it_cannot_get_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    qmp = Qmp()
    monkeypatch.setattr(Path, "replace", lambda self, target: self.joinpath("no").read_bytes())
    with pytest.raises(UserError, match=r"QEMU has written all of the guest to .*part.*--take-back"):
        async with handed_over(cast(Monitor, qmp), f"file:{tmp_path}/guest", None):
            qmp.write()
    [part] = tmp_path.iterdir()
    assert part.read_bytes() == b"all of the guest\n"
