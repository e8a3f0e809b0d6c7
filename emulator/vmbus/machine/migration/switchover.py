"""The steps between QEMU's ``pre-switchover`` and its next state, each performed for one action.

    begin ─▶ settle ─▶ quiesce ─▶ save ─▶ mark_pages ─▶ deliver ─▶ check, or check_and_continue
                               (view)                                 continue, then (write)

A small state that travels in QEMU's stream is written (``write_state``) when QEMU has been told to continue: it sends
the rest of memory meanwhile, and asks for the state after that. What could refuse the save was asked before, when the
view was taken: devices. Should the state be refused when it is written, ``Save()`` answers with the refusal.
:mod:`vmbus.machine.migration.state_machine` decides which step follows, and has the same picture with the reasons.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from vmbus.errors import QemuError
from vmbus.machine.migration.configuration import read_configuration
from vmbus.machine.migration.dirty_pages import DirtyPageTracker, WrittenPages
from vmbus.machine.migration.ports import MigrationPorts
from vmbus.machine.migration.report import Report
from vmbus.machine.migration.side_channel import CARRIED_LIMIT, SideChannel
from vmbus.machine.migration.state_machine import Actions, Carrier, MigrationStateMachine, Phase
from vmbus.saving import Reason, SavedState, StateRefused
from vmbus.saving.pages import MAX_CARRIED
from vmbus.saving.stream import BUFFER_SIZE, STREAM_LIMIT
from vmbus.wire.saved import ChannelIdentity

SETTLE_TIMEOUT = 10.0
"""Seconds that devices have to end their work (reads of files, mostly) once the guest is stopped."""

TURNS_OF_CLIENT = 8
"""Turns of the event loop in which the client of the monitor has written the commands it was given. If it needs more,
they are written a little later, and that is all."""


class SavableState(Protocol):
    """What is saved of a host; :class:`~vmbus.machine.migration.host_state.HostState`."""

    def pause_channels(self) -> None:
        """Take no more packets; work under way may end."""

    def pause(self) -> None:
        """Pause all; no work is under way."""

    def bound_to_process(self) -> Sequence[str]:
        """Return names of what the guest has written and what ends with this process."""

    def begin_save(self) -> bool:
        """Take the view of the paused host that :meth:`save` writes; return whether its state is certainly small.

        Raises :class:`~vmbus.saving.StateRefused`.
        """

    def abandon_save(self) -> None:
        """Undo :meth:`begin_save`, if nothing was saved since."""

    def save(self, buffer_size: int, *, memory_stays: bool, pages: Sequence[int], limit: int) -> SavedState:
        """Return the state of the paused host. Raises :class:`~vmbus.saving.StateRefused`."""

    def release_devices(self) -> None:
        """Have devices release what the process that continues the guest will use."""

    def names(self) -> dict[ChannelIdentity, str]:
        """Return the names of the channels' devices."""

    def unclaimed_answers(self) -> int:
        """Return how many answers to traps the state has."""

    def owned_bytes(self) -> Mapping[int, int]:
        """Return, by page frame number, the offset of a byte that only the host writes now."""


def check_all_can_leave(state: SavableState) -> None:
    """Raise :class:`~vmbus.saving.StateRefused` if something of the guest would be lost where it goes."""
    if bound := state.bound_to_process():
        raise StateRefused(
            Reason.WRONG_STATE,
            f"what the guest has written there would be lost with this emulator: {', '.join(bound)}; give it an "
            "image in place of that, in /dev/shm for example",
        )


class SwitchoverSteps:
    """Performs the steps of one guest's migrations; ``changed`` is called when QEMU's answer was taken."""

    def __init__(
        self,
        ports: MigrationPorts,
        state: SavableState,
        machine: MigrationStateMachine,
        side_channel: SideChannel,
        tracker: DirtyPageTracker,
        changed: Callable[[], None],
    ) -> None:
        self.buffer_size = BUFFER_SIZE
        """Bytes of the buffer that channels are saved into at first."""
        self.check: asyncio.Task[Actions] | None = None
        """Reads the answer of the last ``query-migrate``."""
        self._ports = ports
        self._state = state
        self._machine = machine
        self._side_channel = side_channel
        self._tracker = tracker
        self._changed = changed
        self.marking = 0
        """Not 0: QEMU may still have to write bytes back: the host must not store into them before it has."""
        self._written: WrittenPages | None = None
        """Pages to mark in the pause."""
        self._unwritten: tuple[Report, Sequence[int]] | None = None
        """Whose state is still to be written, and the addresses of the pages that it carries."""
        self._paused_at = 0.0

    async def begin(self, report: Report) -> Actions:
        """Find out what the migration needs, and what carries the state."""
        self._paused_at = time.monotonic()
        self._unwritten = None
        configuration = self._machine.configuration or await read_configuration(self._ports.qmp)
        if self._side_channel.used:
            carrier = Carrier.SIDE_CHANNEL
        else:
            carrier = Carrier.NONE if self._ports.dbus_address is None else Carrier.STREAM
        return self._machine.switch_over(report, configuration, carrier)

    async def settle(self, report: Report) -> Actions:
        """Pause the channels, and wait for the work of their devices."""
        self._state.pause_channels()
        in_time = await self._ports.workers.settle(SETTLE_TIMEOUT)
        return self._machine.settled(report, in_time=in_time)

    async def quiesce(self, report: Report) -> Actions:
        """Pause the rest of the host, and wait until QEMU has its last interrupts."""
        self._state.pause()
        await self._ports.qtest.settled()
        return self._machine.quiet(report)

    async def save(self, report: Report) -> Actions:
        """Save the host, with pages that QEMU does not know to be written; or take its view, if that is enough."""
        self._side_channel.reference = self._written = self._unwritten = None
        machine = self._machine
        snapshot = machine.phase is Phase.SNAPSHOT  # contains all of memory, as it is then
        memory_stays = (
            not snapshot and machine.configuration is not None and machine.configuration.memory_stays
        )
        if not snapshot and not memory_stays:
            report.pages_marked_early = self._tracker.pages
            self._written = WrittenPages.of(self._ports.memory, self._state.owned_bytes())
        in_frame = machine.carrier is Carrier.SIDE_CHANNEL and not snapshot
        pages = self._written.theirs if self._written is not None else ()
        try:
            if not snapshot:
                check_all_can_leave(self._state)
            small = self._state.begin_save()
            if small and self._written is not None and len(pages) <= MAX_CARRIED and machine.may_save_later:
                self._unwritten = report, pages
                self._written = WrittenPages(self._written.ours, ())
                return machine.to_be_saved(report)
            saved = self._state.save(
                self.buffer_size,
                memory_stays=memory_stays,
                pages=pages,
                limit=CARRIED_LIMIT if in_frame else STREAM_LIMIT,
            )
        except StateRefused as error:
            self._written = None
            return machine.save_refused(report, error)
        if not snapshot:
            self._state.release_devices()
        if self._written is not None:
            self._written = self._written.without(saved.pages)
        self._describe(report, saved)
        return machine.saved(report, saved.data)

    def write_state(self) -> None:
        """Write the state whose view was taken by :meth:`save`, unless that was done, or its migration has ended."""
        unwritten, self._unwritten = self._unwritten, None
        if unwritten is None or not self._machine.awaits_state(unwritten[0]):
            return
        report, pages = unwritten
        try:
            saved = self._state.save(self.buffer_size, memory_stays=False, pages=pages, limit=STREAM_LIMIT)
            if len(saved.pages) != len(pages):
                raise StateRefused(Reason.TOO_LARGE, f"{len(saved.data)} bytes, and not all pages")
        except StateRefused as error:
            self._machine.save_refused(report, error)
            return
        self._state.release_devices()
        self._describe(report, saved)
        self._machine.state_written(saved.data)

    def drop_view(self) -> None:
        """Forget a view whose state is not written any more: its migration has ended."""
        if self._unwritten is not None:
            self._unwritten = None
            self._state.abandon_save()

    def _describe(self, report: Report, saved: SavedState) -> None:
        report.pages_carried = len(saved.pages)
        report.state_bytes = len(saved.data)
        report.channels = saved.channels
        report.names = self._state.names()
        report.answers_carried = self._state.unclaimed_answers()

    async def mark_pages(self, report: Report) -> Actions:
        """Mark the pages that the state does not carry."""
        if self._written is not None:
            self.marking += 1
            try:
                report.pages_marked = await self._written.mark(
                    self._ports.memory, self._ports.qtest, lambda: self._machine.may_mark(report)
                )
            finally:
                self.marking -= 1
        return self._machine.pages_marked(report)

    async def deliver(self, report: Report) -> Actions:
        """Send the state over the side channel."""
        state = self._machine.prepared
        if state is None:
            return ()  # the migration was cancelled
        try:
            await self._side_channel.deliver(state, ran=self._machine.guest_ran)
        except StateRefused as error:
            return self._machine.delivered(report, str(error))
        return self._machine.delivered(report)

    async def check_only(self, report: Report) -> Actions:
        """Ask QEMU whether it still waits."""
        self.write_state()
        return await self._ask(report)

    async def check_and_continue(self, report: Report) -> Actions:
        """Ask QEMU whether it still waits, and have it continue."""
        # QEMU executes one command after the other, so its answer to the first is on its way before it continues. The
        # answer to the second may come after its Save(), for which it keeps everything else waiting.
        asking = self._ask(report)
        continuing = asyncio.ensure_future(self._continue())
        if self._unwritten is not None:
            for _ in range(TURNS_OF_CLIENT):
                await asyncio.sleep(0)
            self.write_state()
        actions, _ = await asyncio.gather(asking, continuing)
        return actions

    def _ask(self, report: Report) -> asyncio.Task[Actions]:
        report.prepared_in = time.monotonic() - self._paused_at
        self.check = asyncio.ensure_future(self._query_status(report))
        return self.check

    async def _query_status(self, report: Report) -> Actions:
        found = await self._ports.qmp.execute("query-migrate")
        actions = self._machine.status_read(report, str(found.get("status")))
        self._changed()
        return actions

    async def _continue(self) -> None:
        with contextlib.suppress(QemuError):  # it was cancelled in this moment: an event follows
            await self._ports.qmp.execute("migrate-continue", {"state": "pre-switchover"})
