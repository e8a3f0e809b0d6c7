"""Takes part in every migration of the guest, whichever program started it: its state is ready when QEMU asks.

:mod:`~vmbus.machine.migration.state_machine` decides; the coordinator passes QEMU's events to it and has
:mod:`~vmbus.machine.migration.actions` perform its actions: the steps of a switch-over
(:mod:`~vmbus.machine.migration.switchover`), and here commands on QMP, the fence, the host paused and resumed.

In ``Save()`` and ``Load()`` nothing is asked of QEMU, whose main loop waits for the answer. If the event loop waits
for QEMU's main loop at that time, no state is prepared: :mod:`~vmbus.machine.migration.vmstate` refuses for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Protocol

from vmbus.bus.io.snapshots import SnapshotDisk
from vmbus.errors import QemuError, UserError, VmbusError
from vmbus.machine.migration.actions import ActionRunner, StepFailed
from vmbus.machine.migration.configuration import CAPABILITIES, read_configuration
from vmbus.machine.migration.dirty_pages import DirtyPageTracker, remember
from vmbus.machine.migration.fence import SourceFence
from vmbus.machine.migration.ports import MigrationPorts
from vmbus.machine.migration.refused import RefusalNotices
from vmbus.machine.migration.report import Report
from vmbus.machine.migration.side_channel import CarrierAddress, SideChannel
from vmbus.machine.migration.state_machine import (
    Action,
    Actions,
    MigrationStateMachine,
    Phase,
    Switchover,
)
from vmbus.machine.migration.switchover import SavableState, SwitchoverSteps, check_all_can_leave
from vmbus.machine.migration.vmstate import VmStateHelper
from vmbus.saving import Reason, StateRefused, refusal_stream
from vmbus.saving.stream import BUFFER_SIZE
from vmbus.wire.frame import REFERENCE, REFERENCE_MAGIC
from vmbus.wire.gateway import GuestState

_logger = logging.getLogger(__name__)

_ANSWER_TIMEOUT = 5.0
"""Seconds for an answer that QEMU has sent."""
_POLL = 0.005
"""Seconds between two ``query-status`` until QEMU has ended a migration."""
_SAME_MOMENT = 0.1
"""Seconds for the tasks that handle what was read from QEMU together."""

_BEHIND = StateRefused(
    Reason.WRONG_STATE,
    "QEMU saved the guest without the emulator, while guest memory was being written; use `vmbus snapshot`, "
    "or a migration with pause-before-switchover",
)


class MachineState(SavableState, Protocol):
    """The state of a host as a whole; :class:`~vmbus.machine.migration.host_state.HostState`."""

    def resume(self) -> None:
        """Resume all."""

    def reset(self) -> None:
        """Drop all that belongs to the guest: another state follows."""

    def restore(self, data: bytes, *, allow_missing: bool = False) -> None:
        """Restore a state, paused; ``allow_missing``: without the channels whose devices are not here.

        Raises :class:`~vmbus.saving.StateRefused`.
        """

    def check(self, data: bytes, *, allow_missing: bool = False) -> None:
        """Raise :class:`~vmbus.saving.StateRefused` for a state that cannot be restored."""

    def outside_snapshots(self) -> list[str]:
        """Return what the guest can write to and a snapshot does not hold."""

    def snapshot_disks(self) -> Mapping[str, SnapshotDisk]:
        """Return the disks that snapshots take in, by name."""

    def check_fits(self, data: bytes, *, allow_missing: bool = False) -> None:
        """Raise :class:`~vmbus.saving.StateRefused` for a state that cannot replace the guest that is here."""

    def check_memory(self, data: bytes) -> None:
        """Raise :class:`~vmbus.saving.StateRefused` if memory that was not copied changed since the save."""


class Coordinator:
    """The emulator's part in migrations and snapshots of one guest. Started by :meth:`start`."""

    def __init__(
        self,
        ports: MigrationPorts,
        state: MachineState,
        *,
        switchover: Switchover = Switchover.OWN,
        buffer_size: int = BUFFER_SIZE,
        allow_missing_devices: bool = False,
    ) -> None:
        self.ports = ports
        self.state = state
        self.tracker = DirtyPageTracker(ports.memory, ports.qtest, ports.workers)
        self.allow_missing_devices = allow_missing_devices
        """Whether a guest may arrive although devices of it are missing here: it loses their channels."""
        self._snapshot_without_devices = False
        self.command = ""
        """See :mod:`~vmbus.machine.migration.alone`."""
        self.side_channel = SideChannel(ports.qmp)
        self._machine = MigrationStateMachine(switchover)
        self._source_fence = SourceFence(ports.qmp)
        self._notices = RefusalNotices(ports.qmp)
        self._helper: VmStateHelper | None = None
        self._watchers: set[Callable[[], None]] = set()
        self._steps = steps = SwitchoverSteps(
            ports, state, self._machine, self.side_channel, self.tracker, self._changed
        )
        steps.buffer_size = buffer_size
        at_once: Mapping[Action, Callable[[], None]] = {
            Action.BEGIN_TRACKING: self._begin_tracking,
            Action.END_TRACKING: self._end_tracking,
            Action.FENCE: self._fence,
            Action.UNFENCE: self._unfence,
            Action.FORGET_GUEST: self._forget_guest,
            Action.PAUSE: self._pause,
            Action.RESUME: self._resume,
        }
        in_time: Mapping[Action, Callable[[Report], Awaitable[Actions]]] = {
            Action.READ_RUN_STATE: self._read_run_state,
            Action.READ_LAST_RUN_STATE: self._read_last_run_state,
            Action.EXAMINE: self._examine,
            Action.FORGET_WRITTEN: self._forget_written,
            Action.CANCEL_WHEN_SENDING: self._cancel_when_sending,
            Action.SWITCH_OVER: steps.begin,
            Action.PREPARE_FENCE: self._prepare_fence,
            Action.LIFT_FENCE: self._lift_fence,
            Action.SETTLE: steps.settle,
            Action.QUIESCE: steps.quiesce,
            Action.SAVE: steps.save,
            Action.MARK_PAGES: steps.mark_pages,
            Action.DELIVER: steps.deliver,
            Action.CHECK: steps.check_only,
            Action.CHECK_AND_CONTINUE: steps.check_and_continue,
            Action.CANCEL: self._cancel,
            Action.TAKE_STATE: self._take_state,
            Action.STOP_GUEST: self._stop_guest,
            Action.RESUME_GUEST: self._resume_guest,
            Action.RESUME_ARRIVED: self._resume_arrived,
        }
        self._runner = ActionRunner(ports.service, at_once, in_time, self._step_failed)

    async def start(self) -> None:
        """Join the D-Bus daemon and set QEMU's capabilities. The host has not been activated yet.

        Raises :class:`~vmbus.errors.QemuUnsuitable` when no D-Bus daemon answers.
        """
        qmp, address = self.ports.qmp, self.ports.dbus_address
        status = await qmp.execute("query-status")
        if status["status"] == "inmigrate":
            self.expect()
            await self._notices.learn()
            await self.ports.qtest.settled()
            if address is None:  # QEMU must not run the guest before the state is restored
                await qmp.execute("stop")
        await self._set_capabilities()
        await self.join()

    async def join(self) -> None:
        """Join the D-Bus daemon of QEMU's ``dbus-vmstate``, if it has one. Raises as :meth:`start` does."""
        address = self.ports.dbus_address
        if address is not None:
            self._helper = await VmStateHelper.connect(address, self, self.ports.qtest.waits)

    async def close(self) -> None:
        """Leave the D-Bus daemon, and close what is open for a migration."""
        self._source_fence.leave()
        await self.side_channel.close()
        if self._helper is not None:
            await self._helper.close()

    async def _set_capabilities(self) -> None:
        wanted = [{"capability": name, "state": True} for name in CAPABILITIES]
        try:
            await self.ports.qmp.execute("migrate-set-capabilities", {"capabilities": wanted})
        except QemuError as error:  # a migration is under way, or other capabilities exclude these
            _logger.warning(
                "this guest cannot be migrated or saved until QEMU accepts the capabilities: %s", error
            )

    # --- state ---

    @property
    def phase(self) -> Phase:
        """Phase of the guest."""
        return self._machine.phase

    @property
    def report(self) -> Report:
        """Report of the migration or snapshot under way, or the last one; a new one begins with each."""
        return self._machine.report

    @report.setter
    def report(self, report: Report) -> None:
        self._machine.report = report

    @property
    def buffer_size(self) -> int:
        """Bytes of the buffer that channels are saved into at first."""
        return self._steps.buffer_size

    @buffer_size.setter
    def buffer_size(self, size: int) -> None:
        self._steps.buffer_size = size

    @property
    def switchover(self) -> Switchover:
        """Which program sends ``migrate-continue``."""
        return self._machine.switchover

    @switchover.setter
    def switchover(self, switchover: Switchover) -> None:
        self._machine.switchover = switchover

    @property
    def fenced(self) -> bool:
        """Whether the guest is known to be elsewhere: it is not served, and may not run here."""
        return self._machine.fenced

    @property
    def load_refused(self) -> str:
        """Why the last ``Load()`` was refused; empty if it was not."""
        return self._machine.load_refused

    @property
    def handed_over(self) -> bool:
        """Whether QEMU, or the target, got the state of the migration or snapshot under way, or the last one."""
        return self._machine.handed_over

    @property
    def ready(self) -> bool:
        """Whether the state is prepared: ``migrate-continue`` may be sent."""
        return self._machine.ready

    # --- QMP events ---

    def event(self, name: str, data: Mapping[str, Any]) -> None:
        """Handle a QMP event; called in the order in which QEMU sent them."""
        if name == "RESUME":
            self._resumed()
        elif name == "STOP":
            self._react(self._machine.stopped())
        elif name == "RESET":
            self._react(self._machine.was_reset())
        elif name == "MIGRATION":
            self._migration(str(data.get("status")))
        else:
            return
        self._changed()

    def _resumed(self) -> None:
        self._react(self._machine.resumed())

    def _migration(self, status: str) -> None:
        _logger.info("migration: %s", status)
        if self.phase is Phase.INCOMING and not self._machine.replaces:
            if status in ("setup", "active"):
                self.ports.service.background(self._notices.learn())
            elif status == "failed" and not self.load_refused:
                self.ports.service.background(self._notices.leave_words_of_qemu())
        self._react(self._machine.migration(status))

    def _react(self, actions: Actions) -> None:
        self._runner.react(actions, self.report)

    def _step_failed(self, report: Report, failed: StepFailed) -> None:
        self._react(self._machine.step_failed(report, failed.action, failed.reason))
        self._changed()

    def _changed(self) -> None:
        for watcher in tuple(self._watchers):
            watcher()

    # --- actions ---

    def _fence(self) -> None:
        self._source_fence.close()
        self.ports.gateway.guest = GuestState.LEFT

    def _unfence(self) -> None:
        self._source_fence.open()
        self.ports.gateway.guest = GuestState.ENGAGED
        self.ports.service.look_at_gateway()

    def _begin_tracking(self) -> None:
        self.tracker.begin()

    def _end_tracking(self) -> None:
        self.tracker.end()
        self._steps.drop_view()

    def _forget_guest(self) -> None:
        self.state.reset()

    def _pause(self) -> None:
        self.state.pause()

    def _resume(self) -> None:
        self.side_channel.reference = None
        if self._steps.marking:  # it was cancelled meanwhile: an index would go back to what it was
            self.ports.qtest.settle()
        self.state.resume()

    async def _read_run_state(self, report: Report) -> Actions:
        found = await self.ports.qmp.execute("query-status")
        return self._machine.run_state_read(report, str(found["status"]))

    async def _read_last_run_state(self, report: Report) -> Actions:
        while True:
            state = str((await self.ports.qmp.execute("query-status"))["status"])
            if state != "finish-migrate":
                break
            await asyncio.sleep(_POLL)
        actions = self._machine.last_run_state_read(report, state)
        self._changed()
        return actions

    async def _prepare_fence(self, report: Report) -> Actions:
        await self._source_fence.prepare()
        return self._machine.fence_prepared(report)

    async def _lift_fence(self, report: Report) -> Actions:
        await self._source_fence.lift()
        return ()

    async def _examine(self, report: Report) -> Actions:
        configuration = await read_configuration(self.ports.qmp)
        try:
            check_all_can_leave(self.state)
        except StateRefused as error:  # now, and not when all of memory has been sent
            configuration = replace(configuration, refusal=configuration.refusal or str(error))
        return self._machine.configuration_read(report, configuration)

    async def _forget_written(self, report: Report) -> Actions:
        """QEMU reads all of memory after ``setup``: what was written until then need not be marked."""
        pages = self.ports.memory.take_dirty()
        if (await self.ports.qmp.execute("query-migrate")).get("status") != "setup":
            remember(self.ports.memory, pages)
        return ()

    async def _cancel_when_sending(self, report: Report) -> Actions:
        """Cancel the migration, if it is still under way when QEMU sends.

        Cancelled in ``setup``, QEMU 11.1 may wait for the target's answer before it has sent anything itself, and
        block its main loop until the target ends.
        """
        await self.until(lambda: self.report is not report or report.status != "setup", None)
        if self.report is report and report.status in ("active", "device", "pre-switchover"):
            return (Action.CANCEL,)
        return ()

    async def _cancel(self, report: Report) -> Actions:
        with contextlib.suppress(QemuError):
            await self.ports.qmp.execute("migrate_cancel")
        return ()

    async def _take_state(self, report: Report) -> Actions:
        if self.phase is not Phase.INCOMING:
            return ()
        actions: Actions = ()
        try:
            frame = self.side_channel.frame()
            self.state.restore(frame.state, allow_missing=self.allow_missing_devices)
        except VmbusError as error:
            self._machine.state_missing(str(error))
            self._notices.leave(str(error))
        else:
            actions = self._machine.state_taken(ran=frame.ran)
        self._changed()
        return actions

    async def _stop_guest(self, report: Report) -> Actions:
        await self.ports.qmp.execute("stop")
        return ()

    async def _resume_guest(self, report: Report) -> Actions:
        await self.ports.qmp.cont()
        return ()

    async def _resume_arrived(self, report: Report) -> Actions:
        await self.ports.qmp.execute("cont")  # at once: the guest arrived here, QEMU has no migration to end
        return ()

    # --- commands ---

    async def take_back(self) -> None:
        """Resume a guest that has left here: its target is known to have failed.

        Raises :class:`~vmbus.errors.UserError` for a guest that has not left, and for one that ran at the target in
        the same memory.
        """
        machine = self._machine
        machine.check_left()
        if machine.configuration is not None and machine.configuration.memory_stays and machine.prepared:
            try:
                self.state.check_memory(machine.prepared)
            except StateRefused as error:
                raise UserError(
                    f"the guest ran at the target, in the memory that is here: {error}"
                ) from error
        fenced = machine.fenced
        try:
            await self._runner.perform(machine.take_back(), self.report)
        except StepFailed as failed:
            self._react(machine.not_taken_back(fenced=fenced))
            if fenced and machine.configuration is not None and machine.configuration.memory_stays:
                await self._source_fence.prepare()  # it was lifted before
                self._source_fence.close()
            raise UserError(f"QEMU does not resume the guest here: {failed.reason}") from failed

    async def listen(self, address: CarrierAddress) -> None:
        """Expect the state over a side channel. Raises :class:`~vmbus.errors.UserError`."""
        if self.phase is not Phase.INCOMING:
            raise UserError(
                f"--carrier {address} is for a QEMU that waits for a guest: this one is {self.phase.value}"
            )
        await self.side_channel.listen(address, self._check_arriving)

    def _check_arriving(self, state: bytes) -> None:
        """Raise :class:`~vmbus.saving.StateRefused` for a state of the side channel that cannot be restored.

        The address stays open when the guest is here, and a check offers the sub-channels of a state.
        """
        if self.phase is not Phase.INCOMING:
            raise StateRefused(
                Reason.WRONG_STATE, f"no guest is expected here: the guest is {self.phase.value}"
            )
        self.state.check(state, allow_missing=self.allow_missing_devices)

    async def begin_snapshot(self) -> None:
        """Prepare the state for a snapshot. The guest is stopped; the caller then asks QEMU for the save.

        ``report.refusal`` says why the guest cannot be saved. If another program resumed the guest meanwhile, the
        phase is not ``Phase.SNAPSHOT`` afterwards.
        """
        actions = self._machine.begin_snapshot()
        await self._runner.perform(actions, self.report)

    def end_snapshot(self) -> None:
        """End what :meth:`begin_snapshot` began."""
        self._machine.end_snapshot()

    @contextlib.contextmanager
    def driven_here(self) -> Iterator[None]:
        """Have this process send ``migrate-continue`` in the meantime."""
        before, self.switchover = self.switchover, Switchover.OWN
        try:
            yield
        finally:
            self.switchover = before

    def expect(self) -> None:
        """Expect that a state is loaded before the guest runs (again)."""
        self._react(self._machine.expect())

    def expect_instead(self, *, allow_missing_devices: bool = False) -> None:
        """Expect a state that replaces the guest that is here; it is dropped only when the state comes.

        ``allow_missing_devices``: although devices of the guest that comes are missing here.
        """
        self._snapshot_without_devices = allow_missing_devices
        self._react(self._machine.expect(instead=True))

    def expect_no_more(self, phase: Phase) -> None:
        """Go back to ``phase``, that of before :meth:`expect_instead`: nothing was changed."""
        self._machine.expect_no_more(phase)

    def stay_stopped(self) -> None:
        """Note that the guest that was loaded stays stopped."""
        self._machine.stay_stopped()

    def abandon(self) -> None:
        """Expect no state any more; guest memory may be replaced already."""
        self._react(self._machine.abandon())

    # --- requests of QEMU over D-Bus: no QMP, no qtest ---

    async def save(self) -> bytes:
        """Answer ``Save()``: the state that was prepared, a reference to it, or a refusal."""
        self._steps.write_state()
        check = self._steps.check
        if check is not None and not check.done():
            await self._await_check(check)
        state = self._machine.save_requested()
        if state is not None:
            reference = self.side_channel.reference
            return state if reference is None or self.report.refusal else reference
        _logger.error("%s", _BEHIND)
        return self.save_refusal

    async def _await_check(self, check: asyncio.Task[Actions]) -> None:
        """Wait until the answer of ``query-migrate`` was read, or cannot come before that of ``Save()``.

        QEMU's answers and events come in one stream, and it has continued before it calls ``Save()``. If its event of
        that is read and the answer was not, its main loop answers only after ``Save()``.
        """
        report = self.report
        continued = asyncio.ensure_future(
            self.until(
                lambda: self.report is not report or report.status != "pre-switchover", _ANSWER_TIMEOUT
            )
        )
        try:
            await asyncio.wait({check, continued}, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait({check}, timeout=_SAME_MOMENT)
        finally:
            continued.cancel()
            await asyncio.gather(continued, return_exceptions=True)

    @property
    def save_refusal(self) -> bytes:
        """The refusal that ``Save()`` returns if no state was prepared; for any thread."""
        return refusal_stream(_BEHIND)

    def save_was_refused(self) -> None:
        """Note that ``Save()`` was answered with :attr:`save_refusal` while the event loop waited for QEMU."""
        _logger.error("%s", _BEHIND)
        self._machine.save_was_refused()

    def load(self, state: bytes) -> None:
        """Answer ``Load(state)``. Raises :class:`~vmbus.errors.VmbusError` to refuse it."""
        try:
            self._machine.load_requested()
            if state.startswith(REFERENCE_MAGIC):
                state = self.side_channel.frame(REFERENCE.parse(state).digest).state
            replaces = self._machine.replaces
            allowed = self._snapshot_without_devices if replaces else self.allow_missing_devices
            if replaces:
                self.state.check_fits(state, allow_missing=allowed)
                self.state.reset()
            with self.ports.qtest.loading():
                self.state.restore(state, allow_missing=allowed)
        except VmbusError as error:
            self._machine.load_failed(str(error))
            if not self._machine.replaces:
                self._notices.leave(str(error))
            raise
        self._machine.loaded()

    # --- waiting ---

    async def until_ready(self, timeout: float) -> bool:
        """Wait until :attr:`ready`, in the migration under way or the next one; return False if it ends before.

        Raises ``TimeoutError`` after ``timeout`` seconds.
        """
        before = self.report if self.phase is Phase.IDLE else None

        def ended() -> bool:
            return self.report is not before and self.report.ended

        await self.until(lambda: self.ready or ended(), timeout)
        return self.ready

    async def until(self, condition: Callable[[], bool], timeout: float | None) -> None:
        """Wait until ``condition()`` holds; it is evaluated after each event.

        Raises ``TimeoutError`` after ``timeout`` seconds; ``None``: never.
        """
        changed = asyncio.Event()
        self._watchers.add(changed.set)
        try:
            async with asyncio.timeout(timeout):
                while not condition():
                    changed.clear()
                    await changed.wait()
        finally:
            self._watchers.discard(changed.set)
