"""Follows every migration of the guest, whoever started it, and has its state ready when QEMU asks.

    source  idle ──MIGRATION setup──▶ migrating ──pre-switchover──▶ ready ──completed──▶ left
              ▲                           │                           │                    │
              └────── failed, cancelled ──┴───────────── RESUME ──────┘      take_back() ──┘
    target  incoming ──Load()──▶ loaded ──RESUME──▶ idle          (also of a snapshot that is loaded)
              └──── refused ────▶ lost ──reset or another snapshot──▶ idle
    snapshot  idle ──▶ in a snapshot ──▶ idle                     (driven by ``snapshots``)

At ``pre-switchover`` QEMU has stopped the guest and waits: the host is frozen, its state saved, every page that
was written through the mapping is in that state or marked, and only if QEMU still waits then is the state good to
be taken. In ``Save()`` and ``Load()`` nothing is asked of QEMU. A ``Save()`` for which nothing was made ready
(``savevm`` behind the emulator's back, a migration without the pause) gets a refusal in place of a state: QEMU
cannot fail a save for that, but whoever loads it fails, with the reason.

A guest that has left must not live twice. Where the target answers (``return-path``), ``completed`` says that it
has everything: from then on the source is fenced. If somebody lets it go on all the same, it is stopped again,
unless :meth:`Coordinator.take_back` was told that the target is no more. Without an answer (``file:``, ``exec:``)
only who drives QEMU knows who has it, and a guest that goes on is served.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from enum import Enum
from typing import TYPE_CHECKING, Any

from vmbus.errors import QemuError, UserError, VmbusError
from vmbus.machine.migration.configuration import CAPABILITIES, Configuration, read_configuration
from vmbus.machine.migration.dirty_pages import DirtyPageTracker, WrittenPages, remember
from vmbus.machine.migration.host_state import HostState
from vmbus.machine.migration.report import Report
from vmbus.machine.migration.side_channel import CARRIED_LIMIT, CarrierAddress, SideChannel
from vmbus.machine.migration.vmstate import VmStateHelper
from vmbus.saving import Reason, StateRefused, refusal_stream
from vmbus.saving.stream import BUFFER_SIZE, STREAM_LIMIT
from vmbus.wire.frame import REFERENCE, REFERENCE_MAGIC
from vmbus.wire.gateway import GuestState

if TYPE_CHECKING:
    from vmbus.machine.host import Host

_logger = logging.getLogger(__name__)

SETTLE_LIMIT = 10.0
"""Seconds that devices have to end their work (reads of files, mostly) once the guest is stopped."""

_ANSWER_LIMIT = 5.0
"""Seconds for an answer that QEMU has sent."""


class Phase(Enum):
    """States of the module's table."""

    IDLE = "idle"
    MIGRATING = "migrating"
    READY = "ready"
    LEFT = "left"
    SNAPSHOT = "in a snapshot"
    INCOMING = "incoming"
    LOADED = "loaded"
    LOST = "without the state that its memory needs"


class Switchover(Enum):
    """Who lets QEMU go on after ``pre-switchover``."""

    OWN = "own"
    OBSERVE = "observe"


class Coordinator:
    """The emulator's part in migrations and snapshots of one guest. Made by :meth:`start`."""

    def __init__(
        self,
        host: Host,
        *,
        switchover: Switchover = Switchover.OWN,
        buffer_size: int = BUFFER_SIZE,
    ) -> None:
        self.state = HostState(host)
        self.early = DirtyPageTracker(host.memory, host.qtest, host.workers)
        self.phase = Phase.IDLE
        self.report = Report()
        self.switchover = switchover
        self.buffer_size = buffer_size
        #: Why the last Load() was refused; empty if it was not.
        self.load_refused = ""
        self._host = host
        self._helper: VmStateHelper | None = None
        self._data: bytes | None = None
        self._good = False
        self._looking: asyncio.Task[None] | None = None
        self._configuration: Configuration | None = None
        #: Whether the guest is known to be elsewhere: nothing is served, and it may not go on here.
        self.fenced = False
        self._refused_to_save = False
        self._stopped = False
        #: What takes the state if QEMU's stream does not.
        self.side_channel = SideChannel(host.qmp)
        self._watchers: set[Callable[[], None]] = set()

    async def start(self) -> None:
        """Join the carrier and see to QEMU's capabilities. The host has not been activated yet.

        Raises :class:`~vmbus.errors.QemuUnsuitable` when the carrier's daemon is not there.
        """
        status = await self._host.qmp.execute("query-status")
        if status["status"] == "inmigrate":
            self.expect()
            if (
                self._host.facts.dbus_address is None
            ):  # QEMU must not let the guest go before it has its state
                await self._host.qmp.execute("stop")
        await self._set_capabilities()
        if self._host.facts.dbus_address is not None:
            self._helper = await VmStateHelper.connect(self._host.facts.dbus_address, self)

    async def close(self) -> None:
        """Leave the carrier."""
        await self.side_channel.close()
        if self._helper is not None:
            await self._helper.close()

    async def _set_capabilities(self) -> None:
        qmp = self._host.qmp
        wanted = [{"capability": name, "state": True} for name in CAPABILITIES]
        try:
            await qmp.execute("migrate-set-capabilities", {"capabilities": wanted})
        except QemuError as error:  # a migration is under way, or other capabilities exclude these
            _logger.warning("migrations of this guest will not be followed: %s", error)

    # --- what QEMU tells -----------------------------------------------------------------------------------

    def event(self, name: str, data: dict[str, Any]) -> None:
        """A QMP event, in order."""
        if name == "RESUME":
            self._resumed()
        elif name == "STOP":
            self._stopped = self.phase is Phase.MIGRATING
        elif name == "MIGRATION":
            self._migration(str(data.get("status")))
        else:
            return
        self._changed()

    def _changed(self) -> None:
        for watcher in tuple(self._watchers):
            watcher()

    def _migration(self, status: str) -> None:
        _logger.info("migration: %s", status)
        if self.phase in (Phase.SNAPSHOT, Phase.INCOMING, Phase.LOADED):
            if self.phase is Phase.INCOMING and status == "completed":  # and no Load() has come
                self._host.background(self._take())
            return
        if status == "setup":
            self.report = Report()
            self.phase = Phase.MIGRATING
            self.early.begin()
            self._configuration = None
            self._refused_to_save = self._stopped = False
            self._host.background(self._examine_configuration())
        self.report.statuses.append(status)
        if self.report.ended:
            self.early.end()
        if status == "pre-switchover":
            self._host.background(self._switch_over(self.report))
        elif status == "completed" and self._refused_to_save:
            self._host.background(self._stay())
        elif status == "completed" and self.phase is Phase.READY:
            self._left()
        elif status in ("failed", "cancelled"):
            # With a guest that ran before, RESUME thaws. One that was stopped before stays so, and frozen.
            self._data = None
            self._good = False
            if self.phase is Phase.MIGRATING or (self.phase is Phase.READY and not self._stopped):
                self.phase = Phase.IDLE

    def _left(self) -> None:
        self.phase = Phase.LEFT
        self.fenced = self._configuration is not None and self._configuration.answered
        if self.fenced:
            self._host.gateway.guest = GuestState.LEFT

    def _resumed(self) -> None:
        if self.fenced:
            _logger.error(
                "somebody let the guest go on here, but it has left, and the target has it: it is stopped again. If "
                "the target is no more, `vmbus migrate NAME --take-back` lets it go on"
            )
            self._host.background(self._stop())
            return
        if self.phase is Phase.LEFT:
            _logger.warning("the guest goes on here after it was sent away; nobody else may let it run now")
        if self.phase is Phase.LOST:
            _logger.error("the guest goes on %s: until it is reset, its devices are gone", self.phase.value)
        self._data = self.side_channel.reference = None
        self._good = False
        self.phase = Phase.IDLE
        self.state.thaw()

    async def _stop(self) -> None:
        await self._host.qmp.execute("stop")

    async def take_back(self) -> None:
        """The guest has left, but the target is known to have failed: it goes on here.

        Raises :class:`~vmbus.errors.UserError` for a guest that has not left, and for one that went on at the
        target in the very memory that is here.
        """
        if self.phase is not Phase.LEFT:
            raise UserError(
                f"the guest has not left, there is nothing to take back: it is {self.phase.value}"
            )
        if self._configuration is not None and self._configuration.memory_stays and self._data is not None:
            try:
                self.state.check_memory(self._data)
            except StateRefused as error:
                raise UserError(
                    f"the guest went on at the target, in the memory that is here: {error}"
                ) from error
        if self.fenced:
            self.fenced = False
            self._host.gateway.guest = GuestState.ENGAGED
            self._host.look_at_gateway()
        await self._host.qmp.cont()

    async def _examine_configuration(self) -> None:
        report = self.report
        self._configuration = await read_configuration(self._host.qmp)
        if self._configuration.memory_stays:
            self.early.end()
        else:
            await self._forget_written()
        if why := "the guest has left already" if self.fenced else self._configuration.refusal:
            _logger.error("migration cancelled: %s", why)
            report.refusal = why
            if await self._begun(report):
                await self._cancel()

    async def _begun(self, report: Report) -> bool:
        """Wait until QEMU sends; whether the migration is still under way then.

        Cancelled in ``setup``, QEMU 11.1 may wait for the target's word before it has said anything itself, and
        stand still with all of its main loop until the target goes.
        """
        await self.until(lambda: self.report is not report or report.status != "setup", None)
        return self.report is report and report.status in ("active", "device", "pre-switchover")

    async def _forget_written(self) -> None:
        """QEMU reads all of memory after ``setup``: what was written until then need not be marked."""
        pages = self._host.memory.take_dirty()
        if (await self._host.qmp.execute("query-migrate")).get("status") != "setup":
            remember(self._host.memory, pages)

    async def _switch_over(self, report: Report) -> None:
        begun = time.monotonic()
        how = self._configuration or await read_configuration(self._host.qmp)
        if not self._paused(report):
            return  # the guest goes on already
        written = await self._prepare(Phase.READY, memory_stays=how.memory_stays)
        if not self._paused(report):
            return
        report.refusal = report.refusal or how.refusal
        if not how.memory_stays:
            report.pages_marked_early = self.early.pages
        if written is not None:
            report.pages_marked = await written.mark(
                self._host,
                lambda: self.phase is Phase.READY and self._paused(report),
            )
        if self.side_channel.used:
            if self._data is not None and not report.refusal:
                await self._deliver(self._data)
        elif self._helper is None:
            report.refusal = report.refusal or (
                "nothing carries the emulator's state: QEMU runs without dbus-vmstate, so use "
                "`vmbus migrate --carrier`"
            )
        report.prepared_in = time.monotonic() - begun
        # QEMU takes one command after the other, so its answer to the first is on its way before it goes on. The
        # answer to the second may come after its Save(), for which it keeps everything else waiting.
        self._looking = asyncio.ensure_future(self._look_whether_it_waits(report))
        if self.switchover is Switchover.OWN and not report.refusal:
            await asyncio.gather(self._looking, self._go_on())
        else:
            await self._looking
        if self._good and report.refusal:
            # Nothing that QEMU could send would be taken: the guest goes on here, at once.
            await self._cancel()

    async def _go_on(self) -> None:
        with contextlib.suppress(QemuError):  # it was cancelled in this moment: an event tells
            await self._host.qmp.execute("migrate-continue", {"state": "pre-switchover"})

    async def _look_whether_it_waits(self, report: Report) -> None:
        """If it does, nobody let QEMU go on before everything was ready for it."""
        found = await self._host.qmp.execute("query-migrate")
        ours = self.report is report and self.phase is Phase.READY
        self._good = ours and found.get("status") == "pre-switchover"
        self._changed()

    def _paused(self, report: Report) -> bool:
        """Whether nothing has come from QEMU since it stopped the guest in that migration."""
        return self.report is report and report.status == "pre-switchover"

    async def _deliver(self, state: bytes) -> None:
        """Over the second carrier; the target has it afterwards, or ``report.refusal`` says why not."""
        try:
            await self.side_channel.deliver(state, ran=self._stopped)
        except StateRefused as error:
            _logger.error("the state was not delivered: %s", error)
            self.report.refusal = str(error)

    async def listen(self, address: CarrierAddress) -> None:
        """Expect the state over the second carrier. Raises :class:`~vmbus.errors.UserError`."""
        if self.phase is not Phase.INCOMING:
            raise UserError(
                f"--carrier {address} is for a QEMU that waits for a guest: this one is {self.phase.value}"
            )
        await self.side_channel.listen(address, self.state.check)

    async def _take(self) -> None:
        """QEMU has taken the guest, and knows of no state of the emulator's."""
        if self.phase is not Phase.INCOMING:
            return
        try:
            frame = self.side_channel.frame()
            self.state.restore(frame.state)
        except VmbusError as error:
            _logger.error("the guest came without its state, and stays stopped: %s", error)
            self.load_refused = str(error)
            self.abandon()
        else:
            self.phase = Phase.LOADED
            if frame.ran:
                await self._host.qmp.execute("cont")  # at once: it came here, nothing is wound up
        self._changed()

    async def _stay(self) -> None:
        """QEMU takes the guest for gone, and no target can have it: what was sent had no state in it."""
        _logger.error("the migration completed without the emulator's state: the guest goes on here")
        if self._stopped:
            await self._host.qmp.cont()
        else:
            self.phase = Phase.IDLE

    async def _cancel(self) -> None:
        with contextlib.suppress(QemuError):
            await self._host.qmp.execute("migrate_cancel")

    # --- preparing -----------------------------------------------------------------------------------------

    async def make_ready(self) -> None:
        """For a snapshot: the guest is stopped, and the next Save() is asked for by who calls this."""
        self.report = Report()
        await self._prepare(Phase.SNAPSHOT)
        self._good = True

    async def _prepare(self, phase: Phase, *, memory_stays: bool = False) -> WrittenPages | None:
        """Freeze and save; the guest is stopped. What went wrong is in ``report.refusal``.

        Returns the pages that are to be marked, if the state is made and QEMU copies memory.
        """
        self.phase = phase
        self._good = False
        self._host.clock.stop()
        self.state.hold()
        settled = await self._host.workers.settle(SETTLE_LIMIT)
        self.early.end()
        if self.phase is not phase:
            return None  # it goes on already
        self.state.freeze()
        written = None  # a snapshot is taken of all of memory, after this
        try:
            if not settled:
                raise StateRefused(Reason.WRONG_STATE, "a device's work did not end in time")
            limit = CARRIED_LIMIT if self.side_channel.used and phase is Phase.READY else STREAM_LIMIT
            if not memory_stays and phase is Phase.READY:
                written = WrittenPages.of(self._host)
            theirs = written.theirs if written is not None else ()
            saved = self.state.save(self.buffer_size, memory_stays=memory_stays, pages=theirs, limit=limit)
        except StateRefused as error:
            _logger.error("the guest cannot be saved: %s", error)
            self.report.refusal = str(error)
            self._data = refusal_stream(error)
            return None
        else:
            self._data = saved.data
            self.report.pages_carried = len(saved.pages)
            self.report.state_bytes = len(saved.data)
            self.report.channels = saved.channels
            self.report.names = self.state.names()
            self.report.answers_carried = len(self._host.gateway.unclaimed())
            return written.without(saved.pages) if written is not None else None

    @contextlib.contextmanager
    def driven_here(self) -> Iterator[None]:
        """Meanwhile migrations are this process's own: nobody else sends ``migrate-continue``."""
        before, self.switchover = self.switchover, Switchover.OWN
        try:
            yield
        finally:
            self.switchover = before

    def expect(self) -> None:
        """A state will be loaded before the guest runs (again)."""
        self.phase = Phase.INCOMING
        self.load_refused = ""
        self.state.freeze()

    def abandon(self) -> None:
        """The state that was expected did not come, and guest memory may be replaced already."""
        self.phase = Phase.LOST

    # --- what QEMU asks over D-Bus: no QMP, no qtest in here -------------------------------------------------

    async def save(self) -> bytes:
        """``Save()``."""
        if self._looking is not None:
            # QEMU has answered already, but what it says here may be read before what it said there.
            await asyncio.wait({self._looking}, timeout=_ANSWER_LIMIT)
        if self._good and self._data is not None:
            return self.side_channel.reference or self._data
        error = StateRefused(
            Reason.WRONG_STATE,
            "the machine was saved behind the emulator's back, while guest memory was being written; use `vmbus "
            "snapshot`, or a migration with pause-before-switchover",
        )
        _logger.error("%s", error)
        self._refused_to_save = True
        return refusal_stream(error)

    def load(self, state: bytes) -> None:
        """``Load(state)``."""
        try:
            if self.phase is not Phase.INCOMING:
                raise StateRefused(
                    Reason.WRONG_STATE,
                    "guest memory was replaced behind the emulator's back; use `vmbus snapshot load`",
                )
            if state.startswith(REFERENCE_MAGIC):
                state = self.side_channel.frame(REFERENCE.parse(state).digest).state
            self.state.restore(state)
        except VmbusError as error:
            self.load_refused = str(error)
            raise
        self.phase = Phase.LOADED

    # --- waiting -------------------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Whether the state is made and good: QEMU may be told to go on after ``pre-switchover``."""
        return self.phase is Phase.READY and self._good and not self.report.refusal

    async def until_ready(self, limit: float) -> bool:
        """Wait until :attr:`ready`, of the migration under way or the next one; ``False`` if it ends before that.

        Raises ``TimeoutError`` after ``limit`` seconds.
        """
        before = self.report if self.phase is Phase.IDLE else None

        def ended() -> bool:
            return self.report is not before and self.report.ended

        await self.until(lambda: self.ready or ended(), limit)
        return self.ready

    async def until(self, condition: Callable[[], bool], limit: float | None) -> None:
        """Wait until ``condition()`` holds, looked at after each event. Raises ``TimeoutError``."""
        changed = asyncio.Event()
        self._watchers.add(changed.set)
        try:
            async with asyncio.timeout(limit):
                while not condition():
                    changed.clear()
                    await changed.wait()
        finally:
            self._watchers.discard(changed.set)
