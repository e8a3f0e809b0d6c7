"""The emulator's part in migrations and snapshots of one guest, as a state machine without I/O.

    source    idle ──MIGRATION setup──▶ migrating ──pre-switchover──▶ ready ──completed──▶ left
                ▲                           │                           │                    │
                └────── failed, cancelled ──┴──── RESUME, or paused ────┘      take_back() ──┘
    target    incoming ──Load()──▶ loaded ──RESUME──▶ idle          (also of a snapshot that is loaded)
                └──── refused ────▶ lost ──RESET, RESUME, or another snapshot──▶ idle
    snapshot  idle ──▶ in a snapshot ──▶ idle                       (started by ``snapshots``)

Events are method calls: QMP events (:meth:`migration`, :meth:`stopped`, :meth:`resumed`, :meth:`was_reset`), requests
over D-Bus, and the answers to actions. Each returns the actions that the coordinator performs, in order. What follows
one ``pre-switchover``, each step after the answer to the one before:

    SWITCH_OVER ─▶ SETTLE ─▶ QUIESCE ─▶ SAVE ─▶ MARK_PAGES ─▶ DELIVER ─▶ CHECK, or CHECK_AND_CONTINUE ─▶ (CANCEL)
                                             (if memory is   (if there is
                                              copied)         a side channel)

An answer names the migration that it belongs to by its :class:`Report`. An answer that comes when QEMU has left
``pre-switchover``, or when another migration has begun, has no effect.

``good`` is true only from the answer of ``query-migrate`` that QEMU still waits, when everything was prepared (of the
state, the view at least, see ``may_save_later``): then QEMU was not continued before that. A ``Save()`` at any other
time (``savevm`` without the emulator, a migration without the pause, a ``migrate-continue`` that came too early) gets
a refusal in place of a state: QEMU cannot fail a save for that, but a target that loads it fails, with the reason.

Whether the guest runs after a migration (here if it fails, there otherwise) depends on who stopped it: QEMU for the
switch-over, or its user at any time before. STOP is the same in both cases; QEMU's run state after it is not, and is
read. The guest has left only if the target has, or can have, its state: a refusal in place of it is none.

A guest that has left must not run twice. Where the target answers (``return-path``), ``completed`` says that the
target has everything: from then on the source is *fenced*. If the guest is resumed at the source all the same, it is
stopped again, until :meth:`take_back`; and it is not sent a second time. Without an answer (``file:``, ``exec:``)
only the program that drives QEMU can tell where the guest is, and a guest that is resumed at the source is served.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from enum import Enum

from vmbus.errors import UserError
from vmbus.machine.migration.configuration import Configuration
from vmbus.machine.migration.report import Report
from vmbus.saving import Reason, StateRefused, refusal_stream

_logger = logging.getLogger(__name__)


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
    """Which program sends ``migrate-continue`` after ``pre-switchover``."""

    OWN = "own"
    OBSERVE = "observe"


class Carrier(Enum):
    """What carries the emulator's state of a migration."""

    STREAM = "QEMU's stream"
    SIDE_CHANNEL = "a side channel"
    NONE = "nothing"


class Action(Enum):
    """What the coordinator does for the state machine, and the method that takes the answer."""

    BEGIN_TRACKING = "track pages that devices fill"
    END_TRACKING = "track them no longer"
    READ_RUN_STATE = "ask QEMU for its run state"
    """``run_state_read``"""
    READ_LAST_RUN_STATE = "ask QEMU for its run state, once it has ended the migration"
    """``last_run_state_read``"""
    EXAMINE = "read QEMU's configuration"
    """``configuration_read``"""
    FORGET_WRITTEN = "forget which pages were written before QEMU reads any"
    CANCEL_WHEN_SENDING = "cancel the migration as soon as QEMU sends"
    SWITCH_OVER = "read QEMU's configuration, if it is not known yet"
    """``switch_over``"""
    PREPARE_FENCE = "prepare that QEMU refuses cont"
    """``fence_prepared``"""
    LIFT_FENCE = "undo that, before QEMU is to run the guest"
    SETTLE = "pause channels, wait for devices' work"
    """``settled``"""
    QUIESCE = "pause the rest of the host, wait until QEMU has its last interrupts"
    """``quiet``"""
    SAVE = "save the host"
    """``saved``, ``save_refused``"""
    MARK_PAGES = "mark pages that the state does not carry"
    """``pages_marked``"""
    DELIVER = "send the state over the side channel"
    """``delivered``"""
    CHECK = "ask QEMU whether it still waits"
    """``status_read``"""
    CHECK_AND_CONTINUE = (
        "ask QEMU whether it still waits, and send migrate-continue without waiting for the answer"
    )
    """``status_read``"""
    CANCEL = "send migrate_cancel"
    TAKE_STATE = "restore the state that came over the side channel"
    """``state_taken``, ``state_missing``"""
    FENCE = "have QEMU refuse cont, and note that the guest has left, for later emulators"
    UNFENCE = "note that the guest is here, and serve it"
    FORGET_GUEST = "drop all that belongs to the guest that is here"
    PAUSE = "pause the host"
    RESUME = "resume the host: its guest runs"
    STOP_GUEST = "send stop"
    RESUME_GUEST = "send cont, as soon as QEMU accepts it"
    RESUME_ARRIVED = "send cont at once"


Actions = Sequence[Action]

_STEPS = frozenset(
    {
        Action.EXAMINE,
        Action.FORGET_WRITTEN,
        Action.SWITCH_OVER,
        Action.PREPARE_FENCE,
        Action.SETTLE,
        Action.QUIESCE,
        Action.SAVE,
        Action.MARK_PAGES,
        Action.DELIVER,
        Action.CHECK,
        Action.CHECK_AND_CONTINUE,
    }
)
"""Actions without which a migration cannot go on."""

_WAITING = "pre-switchover"
_RUNS = frozenset({"running", "suspended"})
"""Run states of a guest that is not stopped; a guest in ACPI S3 is suspended."""
_STOPPED_BY_QEMU = _RUNS | {"finish-migrate", "postmigrate"}
"""Run states after QEMU has stopped a guest for a migration, which may have ended by now."""
_NO_CARRIER = (
    "nothing carries the emulator's state: QEMU runs without dbus-vmstate, so use `vmbus migrate --carrier`"
)


class MigrationStateMachine:
    """Decides what happens in migrations and snapshots of one guest."""

    def __init__(self, switchover: Switchover = Switchover.OWN) -> None:
        self.phase = Phase.IDLE
        self.report = Report()
        """The migration or snapshot under way, or the last one."""
        self.switchover = switchover
        self.configuration: Configuration | None = None
        """Of the migration under way, or the last one; ``None`` until it was read."""
        self.prepared: bytes | None = None
        """The state, or the refusal, that was made last; kept while the guest has left."""
        self._holds_state = False
        """Whether :attr:`prepared` is the state, and no refusal."""
        self._to_be_saved = False
        """Whether the state that follows is still to be written: its view was taken."""
        self.good = False
        """Whether :meth:`save_requested` may return it."""
        self.fenced = False
        """Whether the guest is known to be elsewhere: it is not served, and may not run here."""
        self.carrier = Carrier.STREAM
        """Of the state of the migration under way, or the last one."""
        self.load_refused = ""
        """Why the last ``Load()`` was refused; empty if it was not."""
        self.guest_ran = False
        """Whether QEMU stopped a running guest for the migration under way: RESUME follows, if it fails."""
        self._save_was_refused = False
        """Of the last ``Save()``. A new migration does not reset it: its events may be read after its ``Save()``."""
        self.replaces = False
        """Whether ``Load()`` replaces a guest that is here."""
        self._handed_over = False
        """Whether the target has the state, or QEMU has it for the target."""

    # --- QMP events ---

    def migration(self, status: str) -> Actions:
        """Handle MIGRATION with QEMU's new ``status``."""
        if self.phase in (Phase.SNAPSHOT, Phase.INCOMING, Phase.LOADED):
            return self._migration_to_here(status)
        if self.fenced:
            return self._migration_of_no_guest(status, "the guest has left already")
        if self.phase is Phase.LOST:
            return self._migration_of_no_guest(status, f"the guest is {self.phase.value}")
        actions: list[Action] = []
        if status == "setup":
            self.report = Report()
            self.phase = Phase.MIGRATING
            self.configuration = None
            self.good = self.guest_ran = self._handed_over = self._to_be_saved = False
            actions += (Action.BEGIN_TRACKING, Action.EXAMINE)
        self.report.statuses.append(status)
        if self.report.ended:
            actions.append(Action.END_TRACKING)
        if status == _WAITING:
            actions.append(Action.SWITCH_OVER)
        elif status == "completed":
            if self.phase is Phase.READY and self._handed_over and not self._save_was_refused:
                actions += self._leave()
            elif self._save_was_refused or self.phase in (Phase.MIGRATING, Phase.READY):
                actions += self._stay()
        elif status in ("failed", "cancelled"):
            # If the guest ran before, RESUME follows and resumes the host. Otherwise both stay paused.
            self.prepared = None
            self.good = self._to_be_saved = False
            if self._may_be_shared():
                actions.append(Action.LIFT_FENCE)
            if self.phase is Phase.READY and self.guest_ran:
                actions.append(Action.READ_LAST_RUN_STATE)
            elif self.phase in (Phase.MIGRATING, Phase.READY):
                self.phase = Phase.IDLE
        return actions

    def stopped(self) -> Actions:
        """Handle STOP: the guest was stopped, by QEMU for a switch-over or by a command."""
        self.guest_ran = self.phase is Phase.MIGRATING
        return (Action.READ_RUN_STATE,) if self.guest_ran else ()

    def run_state_read(self, report: Report, state: str) -> Actions:
        """Take QEMU's run state after a STOP in the migration ``report``: did QEMU stop the guest for it?"""
        if self.report is report and state not in _STOPPED_BY_QEMU:
            self.guest_ran = False
        return ()

    def last_run_state_read(self, report: Report, state: str) -> Actions:
        """Take QEMU's run state after the migration ``report`` has failed: a stopped guest gets no RESUME."""
        if self.report is report and self.phase is Phase.READY and state not in _RUNS:
            self.guest_ran = False
            self.phase = Phase.IDLE
        return ()

    def resumed(self) -> Actions:
        """Handle RESUME: the guest runs."""
        if self.fenced:
            _logger.error(
                "the guest was resumed here, but it has left and the target has it: it is stopped again. If the "
                "target has ended, `vmbus migrate NAME --take-back` resumes the guest here"
            )
            return (Action.STOP_GUEST,)
        if self.phase is Phase.LEFT:
            _logger.warning(
                "the guest was resumed here after it was sent away: it must not run anywhere else now"
            )
        if self.phase is Phase.LOST:
            _logger.error(
                "the guest was resumed %s: its devices do not work until it is reset", self.phase.value
            )
        lift = (Action.LIFT_FENCE,) if self.phase is Phase.LEFT and self._may_be_shared() else ()
        self.prepared = None
        self.good = self._to_be_saved = False
        if self.phase is Phase.MIGRATING and not self.report.ended:
            self.guest_ran = False  # its user stopped it, and resumes it now: the migration goes on
        else:
            self.phase = Phase.IDLE
        return (Action.RESUME, *lift)

    def was_reset(self) -> Actions:
        """Handle RESET: what was prepared is the state of the guest before it. QEMU resets in the pause, too."""
        if self.phase is Phase.LOST:
            self.phase = Phase.IDLE  # it begins anew, and lacks nothing
        waits = self.may_mark(self.report)
        prepares = self.prepared is not None or self._to_be_saved
        if not prepares or not (waits or self.phase is Phase.SNAPSHOT):
            return ()
        self.report.refusal = self.report.refusal or "the machine was reset after its state was saved"
        _logger.error("the guest is not sent: %s", self.report.refusal)
        return (Action.CANCEL,) if waits else ()

    # --- answers before the switch-over ---

    def configuration_read(self, report: Report, configuration: Configuration) -> Actions:
        """Take the configuration of the migration ``report``."""
        if self.report is not report:
            return ()
        self.configuration = configuration
        actions = [Action.END_TRACKING if configuration.memory_stays else Action.FORGET_WRITTEN]
        if configuration.refusal:
            actions += self._refuse(configuration.refusal)
        return actions

    # --- the switch-over ---

    def paused(self, report: Report) -> bool:
        """Return whether QEMU has sent nothing since it stopped the guest for the migration ``report``."""
        return self.report is report and report.status == _WAITING and not self.fenced

    def may_mark(self, report: Report) -> bool:
        """Return whether the guest is known to stand still in the pause of the migration ``report``."""
        return self.phase is Phase.READY and self.paused(report)

    def switch_over(self, report: Report, configuration: Configuration, carrier: Carrier) -> Actions:
        """Begin to prepare the state, in the pause of the migration ``report``."""
        if not self.paused(report):
            return ()  # the guest runs already
        self.configuration = self.configuration or configuration
        self.carrier = carrier
        self.phase = Phase.READY
        self.good = False
        report.refusal = report.refusal or configuration.refusal
        return (Action.PREPARE_FENCE,) if self._may_be_shared() else (Action.SETTLE,)

    def fence_prepared(self, report: Report) -> Actions:
        """Continue when QEMU can be made to refuse ``cont``."""
        return (Action.SETTLE,) if self.may_mark(report) else ()

    def settled(self, report: Report, *, in_time: bool) -> Actions:
        """Continue when the work of devices is done; ``in_time``: whether it is."""
        if not (self.may_mark(report) or self._saves_snapshot(report)):
            return ()
        if in_time:
            return (Action.END_TRACKING, Action.QUIESCE)
        error = StateRefused(
            Reason.WRONG_STATE, "a device's work did not end in time; vmbus status shows the disks that wait"
        )
        return (Action.END_TRACKING, Action.PAUSE, *self.save_refused(report, error))

    def quiet(self, report: Report) -> Actions:
        """Continue when the whole host stands still."""
        return (Action.SAVE,) if self.may_mark(report) or self._saves_snapshot(report) else ()

    def saved(self, report: Report, data: bytes) -> Actions:
        """Take the state ``data`` that was saved."""
        self.state_written(data)
        if self._saves_snapshot(report):
            self.good = True  # the guest is stopped, and only the caller asks QEMU to save it
            return ()
        if self.configuration is not None and self.configuration.memory_stays:
            return self.pages_marked(report)
        return (Action.MARK_PAGES,)

    @property
    def may_save_later(self) -> bool:
        """Whether the state may be written when QEMU was told to continue: it is not needed before.

        A program that sends ``migrate-continue`` itself does so when it knows that the state is prepared, and a side
        channel carries it before that.
        """
        return (
            self.phase is Phase.READY
            and self.carrier is Carrier.STREAM
            and self.switchover is Switchover.OWN
            and not self._may_be_shared()
        )

    def to_be_saved(self, report: Report) -> Actions:
        """Continue when the view of the host was taken: its state is written later (:meth:`state_written`)."""
        self.prepared, self._to_be_saved = None, True
        return (Action.MARK_PAGES,)

    def awaits_state(self, report: Report) -> bool:
        """Return whether the state of the migration ``report`` is still to be written."""
        return self._to_be_saved and self.report is report and self.phase is Phase.READY

    def state_written(self, data: bytes) -> None:
        """Take the state ``data`` after :meth:`to_be_saved`."""
        self.prepared, self._holds_state, self._to_be_saved = data, True, False

    def save_refused(self, report: Report, error: StateRefused) -> Actions:
        """Prepare a refusal: the guest cannot be saved."""
        _logger.error("the guest cannot be saved: %s", error)
        report.refusal = str(error)
        self.prepared, self._holds_state, self._to_be_saved = refusal_stream(error), False, False
        return () if self._saves_snapshot(report) else self.pages_marked(report)

    def pages_marked(self, report: Report) -> Actions:
        """Continue when QEMU can read all that the state does not carry."""
        if not self.paused(report):
            return ()
        if self.carrier is Carrier.SIDE_CHANNEL and not report.refusal:
            return (Action.DELIVER,)
        if self.carrier is Carrier.NONE:
            report.refusal = report.refusal or _NO_CARRIER
        return self._check(report)

    def delivered(self, report: Report, refusal: str = "") -> Actions:
        """Continue when the target has the state, or did not accept it because of ``refusal``."""
        if refusal:
            _logger.error("the target did not accept the state: %s", refusal)
            report.refusal = refusal
        elif self.report is report:
            self._handed_over = True
        return self._check(report) if self.paused(report) else ()

    def _check(self, report: Report) -> Actions:
        if self.switchover is Switchover.OWN and not report.refusal:
            return (Action.CHECK_AND_CONTINUE,)
        return (Action.CHECK,)

    def status_read(self, report: Report, status: str) -> Actions:
        """Take the answer of ``query-migrate``: everything was prepared before it was asked."""
        ours = self.report is report and self.phase is Phase.READY
        self.good = ours and status == _WAITING
        # The target would refuse all that QEMU could send now: the guest continues here, at once.
        return (Action.CANCEL,) if self.good and report.refusal else ()

    def step_failed(self, report: Report, action: Action, reason: str) -> Actions:
        """Note that ``action`` failed, for ``reason``: a migration that needs it is cancelled."""
        if action not in _STEPS or self.report is not report or self.phase is Phase.SNAPSHOT or self.fenced:
            _logger.error("%s: %s", action.value, reason)
            return ()
        return self._refuse(f"{action.value}: {reason}")

    @property
    def handed_over(self) -> bool:
        """Whether QEMU, or the target, got the state of the migration or snapshot under way, or the last one."""
        return self._handed_over

    @property
    def ready(self) -> bool:
        """Whether the state is prepared: ``migrate-continue`` may be sent."""
        return self.phase is Phase.READY and self.good and not self.report.refusal

    # --- requests over D-Bus ---

    def save_requested(self) -> bytes | None:
        """Return the answer to ``Save()``: the state, or the refusal that was prepared in place of it.

        ``None``: refuse it, nothing was prepared for it. A migration that is refused is about to be cancelled: a
        program that continues it all the same does not get the state, because the guest continues here.
        """
        answer = self.prepared if self.good else None
        if answer is not None and self.report.refusal and self._holds_state:
            answer = refusal_stream(StateRefused(Reason.WRONG_STATE, self.report.refusal))
        self._handed_over = answer is not None and not self.report.refusal
        self._save_was_refused = not self._handed_over
        return answer

    def save_was_refused(self) -> None:
        """Note that a ``Save()`` was refused without a question."""
        self._handed_over = False
        self._save_was_refused = True

    def load_requested(self) -> None:
        """Raise :class:`~vmbus.saving.StateRefused` for a ``Load()`` that was not expected."""
        if self.phase is not Phase.INCOMING:
            raise StateRefused(
                Reason.WRONG_STATE,
                "QEMU replaced guest memory without the emulator; use `vmbus snapshot load`",
            )

    def loaded(self) -> None:
        """Note that the state was restored."""
        self.phase = Phase.LOADED
        self.replaces = False

    def stay_stopped(self) -> None:
        """Note that the guest that was loaded is stopped, as it was when it was saved: its host stays paused."""
        if self.phase is Phase.LOADED:
            self.phase = Phase.IDLE

    def load_failed(self, reason: str) -> None:
        """Note why ``Load()`` failed: QEMU fails the migration, or the snapshot."""
        self.load_refused = reason

    # --- the target without dbus-vmstate ---

    def state_taken(self, *, ran: bool) -> Actions:
        """Note that the state of the side channel was restored; ``ran``: whether the guest ran at the source."""
        self.loaded()
        if ran:
            return (Action.RESUME_ARRIVED,)
        self.stay_stopped()
        return ()

    def state_missing(self, reason: str) -> None:
        """Note that QEMU has received the guest, and that its state did not come or cannot be restored."""
        _logger.error("the guest arrived without its state and stays stopped: %s", reason)
        self.load_failed(reason)
        self.abandon()

    # --- commands ---

    def expect(self, *, instead: bool = False) -> Actions:
        """Expect that a state is loaded before the guest runs (again); ``instead`` of the guest that is here."""
        self.phase = Phase.INCOMING
        self.load_refused = ""
        self.replaces = instead
        return (Action.PAUSE,)

    def expect_no_more(self, phase: Phase) -> None:
        """Go back to ``phase``, that of before :meth:`expect`: nothing was changed."""
        if self.phase is Phase.INCOMING:
            self.phase = phase
            self.replaces = False

    def abandon(self) -> Actions:
        """Expect no state any more; guest memory may be replaced already."""
        self.phase = Phase.LOST
        was_here, self.replaces = self.replaces, False
        return (Action.FORGET_GUEST,) if was_here else ()

    def begin_snapshot(self) -> Actions:
        """Prepare the state for a snapshot. The guest is stopped; the caller asks QEMU for the save."""
        self.report = Report()
        self.phase = Phase.SNAPSHOT
        self.good = self._handed_over = self._to_be_saved = False
        self.prepared = None
        return (Action.SETTLE,)

    def end_snapshot(self) -> None:
        """Note that the snapshot was made, or was not."""
        if self.phase is Phase.SNAPSHOT:
            self.phase = Phase.IDLE

    def check_left(self) -> None:
        """Raise :class:`~vmbus.errors.UserError` if the guest has not left."""
        if self.phase is not Phase.LEFT:
            raise UserError(
                f"the guest has not left, there is nothing to take back: it is {self.phase.value}"
            )

    def take_back(self) -> Actions:
        """Resume a guest that has left here; its target is known to have failed."""
        was_fenced, self.fenced = self.fenced, False
        actions = (Action.UNFENCE,) if was_fenced else ()
        return (*actions, Action.LIFT_FENCE, Action.RESUME_GUEST)

    def not_taken_back(self, *, fenced: bool) -> Actions:
        """Note that QEMU did not resume the guest after :meth:`take_back`; ``fenced``: whether it was before."""
        self.fenced = fenced
        return (Action.FENCE,) if fenced else ()

    # --- private ---

    def _may_be_shared(self) -> bool:
        """Return whether the target of the migration may run the guest in the memory that is here."""
        return self.configuration is not None and self.configuration.memory_stays

    def _saves_snapshot(self, report: Report) -> bool:
        return self.phase is Phase.SNAPSHOT and self.report is report

    def _leave(self) -> Actions:
        self.phase = Phase.LEFT
        self.good = False  # the state is sent once
        self.fenced = self.configuration is not None and self.configuration.answered
        return (Action.FENCE,) if self.fenced else ()

    def _stay(self) -> Actions:
        """Resume the guest here: what QEMU sent had a refusal in place of the state, and no target can load that."""
        _logger.error(
            "QEMU reports the migration as completed, but its stream holds no emulator state: resuming on the source"
        )
        self._save_was_refused = False
        actions = (Action.LIFT_FENCE,) if self._may_be_shared() else ()
        if self.guest_ran:
            return (*actions, Action.RESUME_GUEST)
        self.phase = Phase.IDLE
        return actions

    def _migration_to_here(self, status: str) -> Actions:
        """Follow the arrival of a guest, or a snapshot."""
        if status == _WAITING:
            # Neither has this status: another program sends the guest that is here, and QEMU would wait for ever.
            _logger.error("migration cancelled: the guest is %s", self.phase.value)
            return (Action.CANCEL,)
        if self.phase is Phase.INCOMING and status == "completed":
            # It has no state yet: its QEMU has no dbus-vmstate, so Load() will not come.
            return (Action.TAKE_STATE,)
        if self.phase is Phase.LOADED and status == "completed":
            self.stay_stopped()  # if it ran before, RESUME came first
        elif self.phase is Phase.LOADED and status == "failed":
            self.phase = Phase.INCOMING  # behind the state, QEMU's stream was damaged; another may come
            return (Action.FORGET_GUEST,)
        return ()

    def _migration_of_no_guest(self, status: str, why: str) -> Actions:
        """Refuse to send a guest that left, or is lost. Its phase stays, and its state, for :meth:`take_back`."""
        actions: Actions = ()
        if status == "setup":
            self.report = Report(refusal=why)
            actions = (Action.CANCEL_WHEN_SENDING,)
        elif status == "active":  # which a snapshot never is
            _logger.error("migration cancelled: %s", why)
        self.report.statuses.append(status)
        return actions

    def _refuse(self, reason: str) -> Actions:
        _logger.error("migration cancelled: %s", reason)
        self.report.refusal = reason
        return (Action.CANCEL_WHEN_SENDING,)
