"""Migrations that are cancelled, wrongly asked for, or impossible: the guest goes on as it did before."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from vmbus.errors import QemuError
from vmbus.machine.migration.addresses import structured
from vmbus.machine.migration.drive import MigrationFailed, arrived, migrate, receive
from vmbus.machine.migration.state_machine import Phase, Switchover
from vmbus.machine.qemu.qmp import Qmp

from tests.migration.journey import Journey
from tests.migration.load import LIMIT, Program, guest_resumed, put, swallow, under_load, went_well
from tests.migration.test_live import more_beats

pytestmark = pytest.mark.guest


@contextlib.asynccontextmanager
async def monitor_of(guest: Journey) -> AsyncIterator[Qmp]:
    """Another program, with a monitor of its own."""
    monitor = await Qmp.connect(str(guest.here.guest.directory.user_qmp))
    try:
        yield monitor
    finally:
        await monitor.close()


async def reaches(guest: Journey, *statuses: str) -> None:
    """Wait until the last status that QEMU reported of the migration is one of ``statuses``."""
    coordinator = guest.host.migration
    await guest.here.migration(
        lambda: coordinator.report.statuses[-1:] in [[each] for each in statuses],
        f"status {' or '.join(statuses)}",
    )


async def status(guest: Journey) -> str:
    return str((await guest.host.qmp.execute("query-migrate")).get("status", "none"))


@contextlib.contextmanager
def deaf_listener() -> Any:
    """Yield the address of a listener that accepts no connection: a client waits."""
    with socket.socket() as listener, contextlib.ExitStack() as stack:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
        yield f"tcp:127.0.0.1:{listener.getsockname()[1]}"


async def test_a_migration_may_be_cancelled_at_every_status(tmp_path: Path, guest_program: Program) -> None:
    async with under_load(tmp_path, guest_program) as guest, monitor_of(guest) as other:
        coordinator = guest.host.migration

        async def cancel() -> None:
            await other.execute("migrate_cancel")

        assert await status(guest) == "none"
        await cancel()
        await guest_resumed(guest)

        with deaf_listener() as uri:
            await other.execute("migrate", {"uri": uri})
            await reaches(guest, "setup")
            assert await status(guest) == "setup"
            await cancel()
            await reaches(guest, "cancelling")  # until the connection is made or refused
        await reaches(guest, "cancelled")
        await guest_resumed(guest)

        # While it is cancelled, and when it is.
        there = await guest.target()
        await put(guest.host, {}, {"max-bandwidth": 1 << 20})
        await other.execute("migrate", {"uri": guest.uri(there)})
        await reaches(guest, "active")
        await asyncio.gather(*(guest.host.qmp.execute("migrate_cancel") for _ in range(3)), cancel())
        await reaches(guest, "cancelled")
        assert "cancelling" in coordinator.report.statuses
        await cancel()
        assert await status(guest) == "cancelled"
        await put(guest.host, {}, {"max-bandwidth": 1 << 30})
        await guest_resumed(guest)
        await guest.leave(there)

        there = await guest.target()
        coordinator.switchover = Switchover.OBSERVE
        await other.execute("migrate", {"uri": guest.uri(there)})
        assert await coordinator.until_ready(LIMIT)
        await cancel()
        await reaches(guest, "cancelled")
        coordinator.switchover = Switchover.OWN
        await guest_resumed(guest)
        await guest.leave(there)

        await other.execute("migrate", {"uri": f"unix:{tmp_path}/nobody"})
        await reaches(guest, "failed")
        await cancel()
        assert await status(guest) == "failed"
        await guest_resumed(guest)

        there = await guest.target()
        went_well(await migrate(guest.host.migration, guest.uri(there), timeout=LIMIT))
        await cancel()
        assert await status(guest) == "completed"
        assert coordinator.phase is Phase.LEFT
        await arrived(there.host.migration, timeout=LIMIT)
        await guest.settle_at(there)
        await guest_resumed(guest)


IMPOSSIBLE: list[tuple[str, Mapping[str, bool]]] = [
    ("postcopy-ram", {"postcopy-ram": True}),
    ("postcopy-ram", {"postcopy-ram": True, "postcopy-preempt": True}),
    ("postcopy-ram", {"postcopy-ram": True, "multifd": True}),
    ("release-ram", {"release-ram": True}),
    ("x-colo", {"x-colo": True}),
    ("background-snapshot", {"background-snapshot": True}),
]


async def test_what_cannot_work_is_refused_before_it_begins_and_cancelled_if_somebody_began_it(
    tmp_path: Path, guest_program: Program
) -> None:
    async with contextlib.AsyncExitStack() as stack:
        guest = await stack.enter_async_context(under_load(tmp_path, guest_program))
        other = await stack.enter_async_context(monitor_of(guest))
        coordinator = guest.host.migration
        known = {each["capability"] for each in await other.execute("query-migrate-capabilities")}
        refused = []
        sink = tmp_path / "sink"
        await stack.enter_async_context(await asyncio.start_unix_server(swallow, str(sink)))
        for name, capabilities in IMPOSSIBLE:
            if not known.issuperset(capabilities):
                continue
            # QEMU refuses to have both on.
            await put(guest.host, {"pause-before-switchover": name != "background-snapshot"})
            await put(guest.host, {"return-path": name == "x-colo"})
            try:
                await put(guest.host, capabilities)
            except QemuError:  # not on this host, or not with this machine
                continue
            with pytest.raises(MigrationFailed, match=f"^{name}: .*; the guest continues here"):
                await migrate(guest.host.migration, f"file:{tmp_path}/guest", timeout=LIMIT)
            before = coordinator.report
            await other.execute("migrate", {"uri": f"unix:{sink}"})
            await guest.here.migration(lambda: coordinator.report is not before, "report")
            await reaches(guest, "cancelled", "failed")
            await guest.here.until(lambda: coordinator.report.refusal.startswith(name), "reason")
            if name == "x-colo":  # not before QEMU has its connection: it might wait for the target's word
                with deaf_listener() as uri:
                    await other.execute("migrate", {"uri": uri})
                    await reaches(guest, "setup")
                    await guest.here.until(lambda: coordinator.report.refusal, "reason")
                    await more_beats(guest)
                    assert coordinator.report.statuses == ["setup"]
                await reaches(guest, "failed")
            await put(guest.host, dict.fromkeys(capabilities, False))
            await put(guest.host, {"pause-before-switchover": True})
            await guest_resumed(guest)
            refused.append(name)
        assert {"postcopy-ram", "release-ram", "x-colo"} <= set(refused), refused
        went_well(await guest.move())
        await guest_resumed(guest)


async def test_channels_descriptor_sets_and_addresses_that_make_no_sense(
    tmp_path: Path, guest_program: Program
) -> None:
    async with under_load(tmp_path, guest_program) as guest:
        coordinator = guest.host.migration
        async with monitor_of(guest) as other:
            main: dict[str, Any] = {"channel-type": "main", "addr": structured(f"unix:{tmp_path}/nobody")}
            nonsense: tuple[dict[str, object], ...] = (
                {"uri": f"unix:{tmp_path}/nobody", "channels": [main]},
                {},
                {"channels": []},
                {"channels": [main, main]},
                {"uri": "nonsense"},
                {"uri": "unix:"},
            )
            for wrong in nonsense:
                with pytest.raises(QemuError):
                    await other.execute("migrate", wrong)
            assert coordinator.report.statuses == []
            await guest_resumed(guest)

            # As channels.
            there = await guest.target()
            main["addr"] = structured(guest.uri(there))
            await other.execute("migrate", {"channels": [main]})
            await reaches(guest, "completed")
        await arrived(there.host.migration, timeout=LIMIT)
        await guest.settle_at(there)
        await guest_resumed(guest)

        # Into a set of descriptors that another program gave QEMU, and out of one.
        file = tmp_path / "guest"
        file.write_bytes(b"header".ljust(4096, b"."))
        uri = "file:/dev/fdset/7,offset=0x1000"
        async with monitor_of(guest) as other:
            await give(other, file, "ab")
            went_well(await migrate(guest.host.migration, uri, timeout=LIMIT))
        assert file.read_bytes()[:4096].rstrip(b".") == b"header"
        there = await guest.begin(replace(guest.options, incoming=True))
        await give(there.host.qmp, file, "rb")
        await receive(there.host.migration, uri)
        await arrived(there.host.migration, timeout=LIMIT)
        await guest.settle_at(there)
        await guest_resumed(guest)


async def give(qmp: Qmp, file: Path, mode: str) -> None:
    """Let QEMU have ``file``, opened in ``mode``, as its descriptor set 7."""
    with file.open(mode) as opened:
        qmp._client.send_fd_scm(opened.fileno())
        await qmp.execute("add-fd", {"fdset-id": 7})
