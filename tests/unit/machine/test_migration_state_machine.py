"""The emulator's decisions in migrations: every status in every phase, and any order of events."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from vmbus.errors import UserError
from vmbus.machine.migration.configuration import Configuration
from vmbus.machine.migration.report import Report
from vmbus.machine.migration.state_machine import (
    Action,
    Actions,
    Carrier,
    MigrationStateMachine,
    Phase,
    Switchover,
)
from vmbus.saving import Reason, StateRefused, read_machine

SENT = Configuration(mode="normal", memory_stays=False, answered=True, refusal="")
ONE_WAY = Configuration(mode="normal", memory_stays=False, answered=False, refusal="")
SHARED = Configuration(mode="normal", memory_stays=True, answered=True, refusal="")
POSTCOPY = Configuration(mode="normal", memory_stays=False, answered=True, refusal="postcopy-ram: no")
NOT_SAVED = StateRefused(Reason.DEVICE_FAILED, "a disk in the middle of something")

STATUSES = (
    *("setup", "active", "device", "pre-switchover", "cancelling", "completed", "failed", "cancelled"),
    *("wait-unplug", "postcopy-active", "something new"),
)


def migrating(
    configuration: Configuration = SENT, switchover: Switchover = Switchover.OWN
) -> MigrationStateMachine:
    machine = MigrationStateMachine(switchover)
    assert machine.migration("setup") == [Action.BEGIN_TRACKING, Action.EXAMINE]
    machine.configuration_read(machine.report, configuration)
    machine.migration("active")
    return machine


def in_the_pause(
    configuration: Configuration = SENT, switchover: Switchover = Switchover.OWN
) -> MigrationStateMachine:
    machine = migrating(configuration, switchover)
    assert machine.stopped() == (Action.READ_RUN_STATE,)
    assert machine.migration("pre-switchover") == [Action.SWITCH_OVER]
    return machine


def prepared(
    configuration: Configuration = SENT,
    switchover: Switchover = Switchover.OWN,
    carrier: Carrier = Carrier.STREAM,
) -> MigrationStateMachine:
    """Everything is prepared, and QEMU is asked whether it still waits."""
    machine = in_the_pause(configuration, switchover)
    report = machine.report
    found = machine.switch_over(report, configuration, carrier)
    if configuration.memory_stays:
        assert found == (Action.PREPARE_FENCE,)
        found = machine.fence_prepared(report)
    assert found == (Action.SETTLE,)
    assert machine.settled(report, in_time=True) == (Action.END_TRACKING, Action.QUIESCE)
    assert machine.quiet(report) == (Action.SAVE,)
    after_save = machine.saved(report, b"state")
    if not configuration.memory_stays:
        assert after_save == (Action.MARK_PAGES,)
        after_save = machine.pages_marked(report)
    if carrier is Carrier.SIDE_CHANNEL:
        assert after_save == (Action.DELIVER,)
        after_save = machine.delivered(report)
    own = switchover is Switchover.OWN
    assert after_save == ((Action.CHECK_AND_CONTINUE,) if own else (Action.CHECK,))
    return machine


def ready(
    configuration: Configuration = SENT, switchover: Switchover = Switchover.OWN
) -> MigrationStateMachine:
    machine = prepared(configuration, switchover)
    assert machine.status_read(machine.report, "pre-switchover") == ()
    assert machine.ready
    return machine


def left(configuration: Configuration = SENT) -> MigrationStateMachine:
    machine = ready(configuration)
    assert machine.save_requested() == b"state"
    machine.migration("device")
    fence = [Action.FENCE] if configuration.answered else []
    assert machine.migration("completed") == [Action.END_TRACKING, *fence]
    return machine


def incoming() -> MigrationStateMachine:
    machine = MigrationStateMachine()
    assert machine.expect() == (Action.PAUSE,)
    return machine


def loaded() -> MigrationStateMachine:
    machine = incoming()
    machine.load_requested()
    machine.loaded()
    return machine


def lost() -> MigrationStateMachine:
    machine = incoming()
    machine.state_missing("it did not come")
    return machine


def in_a_snapshot() -> MigrationStateMachine:
    machine = MigrationStateMachine()
    assert machine.begin_snapshot() == (Action.SETTLE,)
    assert machine.settled(machine.report, in_time=True) == (Action.END_TRACKING, Action.QUIESCE)
    assert machine.quiet(machine.report) == (Action.SAVE,)
    assert machine.saved(machine.report, b"state") == ()
    return machine


MAKERS: dict[Phase, Callable[[], MigrationStateMachine]] = {
    Phase.IDLE: MigrationStateMachine,
    Phase.MIGRATING: migrating,
    Phase.READY: ready,
    Phase.LEFT: left,
    Phase.SNAPSHOT: in_a_snapshot,
    Phase.INCOMING: incoming,
    Phase.LOADED: loaded,
    Phase.LOST: lost,
}
END = [Action.END_TRACKING]
BEGIN = [Action.BEGIN_TRACKING, Action.EXAMINE]
FAILED = [Action.END_TRACKING, Action.READ_LAST_RUN_STATE]
OWN_MIGRATION = {
    "setup": (Phase.MIGRATING, BEGIN),
    "pre-switchover": (None, [Action.SWITCH_OVER]),
    "completed": (None, END),
    "failed": (None, END),
    "cancelled": (None, END),
}
"""Status → phase after it (None: as before) and actions, unless the table below has something else."""
EXPECTED: dict[Phase, dict[str, tuple[Phase | None, list[Action]]]] = {
    Phase.IDLE: OWN_MIGRATION,
    # Without a pause there was no state in QEMU's stream.
    Phase.MIGRATING: {
        **OWN_MIGRATION,
        "completed": (Phase.IDLE, END),
        "failed": (Phase.IDLE, END),
        "cancelled": (Phase.IDLE, END),
    },
    # With a guest that ran, RESUME follows, unless it was stopped at the last moment.
    Phase.READY: {
        **OWN_MIGRATION,
        "completed": (Phase.LEFT, [*END, Action.FENCE]),
        "failed": (None, FAILED),
        "cancelled": (None, FAILED),
    },
    # It was fenced: nothing but a refusal.
    Phase.LEFT: {"setup": (None, [Action.CANCEL_WHEN_SENDING])},
    Phase.SNAPSHOT: {},
    Phase.INCOMING: {"completed": (None, [Action.TAKE_STATE])},
    # A guest that ran before was resumed by now. What QEMU has read behind the state may be damaged.
    Phase.LOADED: {"completed": (Phase.IDLE, []), "failed": (Phase.INCOMING, [Action.FORGET_GUEST])},
    Phase.LOST: OWN_MIGRATION,
}


def test_the_table_is_complete() -> None:
    assert set(EXPECTED) == set(MAKERS) == set(Phase)


@pytest.mark.parametrize("status", STATUSES)
@pytest.mark.parametrize("phase", Phase)
def test_every_status_in_every_phase(phase: Phase, status: str) -> None:
    machine = MAKERS[phase]()
    assert machine.phase is phase
    if phase is Phase.READY and status == "completed":
        machine.save_requested()
    after, actions = EXPECTED[phase].get(status, (None, []))
    assert list(machine.migration(status)) == actions
    assert machine.phase is (after or phase)
    followed = phase not in (Phase.SNAPSHOT, Phase.INCOMING, Phase.LOADED)
    assert (machine.report.status == status) == followed


@pytest.mark.parametrize("phase", Phase)
def test_resume_in_every_phase(phase: Phase) -> None:
    machine = MAKERS[phase]()
    if phase is Phase.LEFT:
        assert machine.resumed() == (Action.STOP_GUEST,)
        assert (machine.phase, machine.fenced) == (Phase.LEFT, True)
        return
    assert machine.resumed() == (Action.RESUME,)
    # Its user stopped it and resumes it; or QEMU does, and its report that the migration has failed follows.
    assert machine.phase is (phase if phase is Phase.MIGRATING else Phase.IDLE)
    assert not machine.good
    assert machine.prepared is None


@pytest.mark.parametrize("phase", Phase)
def test_save_in_every_phase(phase: Phase) -> None:
    machine = MAKERS[phase]()
    prepared_for = phase in (Phase.READY, Phase.SNAPSHOT)
    assert machine.save_requested() == (b"state" if prepared_for else None)


@pytest.mark.parametrize("phase", Phase)
def test_load_in_every_phase(phase: Phase) -> None:
    machine = MAKERS[phase]()
    if phase is Phase.INCOMING:
        machine.load_requested()
    else:
        with pytest.raises(StateRefused, match="behind the emulator's back"):
            machine.load_requested()


# --- the transitions of the module's table ---


@pytest.mark.parametrize("end", ["failed", "cancelled"])
def test_a_guest_that_ran_is_ready_until_it_is_resumed(end: str) -> None:
    machine = ready()
    machine.migration(end)
    assert (machine.phase, machine.ready) == (Phase.READY, False)
    assert machine.save_requested() is None
    assert machine.resumed() == (Action.RESUME,)
    assert (machine.phase, machine.prepared) == (Phase.IDLE, None)


@pytest.mark.parametrize("end", ["failed", "cancelled"])
def test_a_guest_that_was_stopped_before_is_idle_at_once_and_stays_paused(end: str) -> None:
    machine = migrating()
    machine.migration("pre-switchover")
    machine.switch_over(machine.report, SENT, Carrier.STREAM)
    assert list(machine.migration(end)) == END
    assert machine.phase is Phase.IDLE
    assert machine.settled(machine.report, in_time=True) == (), "devices' work ends later"


def test_memory_that_stays_is_not_tracked_and_not_marked() -> None:
    machine = MigrationStateMachine()
    machine.migration("setup")
    assert machine.configuration_read(machine.report, SHARED) == [Action.END_TRACKING]
    assert prepared(SHARED).phase is Phase.READY


def test_memory_that_is_sent_is_read_anew() -> None:
    machine = MigrationStateMachine()
    machine.migration("setup")
    assert machine.configuration_read(machine.report, SENT) == [Action.FORGET_WRITTEN]


def test_a_migration_that_cannot_work_is_cancelled_when_qemu_sends() -> None:
    machine = MigrationStateMachine()
    machine.migration("setup")
    assert machine.configuration_read(machine.report, POSTCOPY) == [
        Action.FORGET_WRITTEN,
        Action.CANCEL_WHEN_SENDING,
    ]
    assert machine.report.refusal == "postcopy-ram: no"


def test_a_configuration_that_is_read_in_the_pause_refuses_as_well() -> None:
    machine = MigrationStateMachine()
    machine.migration("setup")
    machine.migration("pre-switchover")
    report = machine.report
    assert machine.switch_over(report, POSTCOPY, Carrier.STREAM) == (Action.SETTLE,)
    machine.settled(report, in_time=True)
    machine.saved(report, b"state")
    assert machine.pages_marked(report) == (Action.CHECK,), "migrate-continue is not sent"
    assert machine.status_read(report, "pre-switchover") == (Action.CANCEL,)
    assert not machine.ready


def test_a_guest_that_cannot_be_saved_continues_at_once() -> None:
    machine = in_the_pause()
    report = machine.report
    machine.switch_over(report, SENT, Carrier.STREAM)
    machine.settled(report, in_time=True)
    assert machine.save_refused(report, NOT_SAVED) == (Action.CHECK,)
    assert machine.status_read(report, "pre-switchover") == (Action.CANCEL,)
    assert "in the middle" in report.refusal
    sent = machine.save_requested()
    assert sent is not None
    with pytest.raises(StateRefused, match="in the middle"):
        read_machine(sent)


def test_work_that_does_not_end_is_a_refusal_and_the_host_is_paused() -> None:
    machine = in_the_pause()
    report = machine.report
    machine.switch_over(report, SENT, Carrier.STREAM)
    assert machine.settled(report, in_time=False) == (Action.END_TRACKING, Action.PAUSE, Action.CHECK)
    assert "did not end in time" in report.refusal


def test_without_a_carrier_nothing_is_sent() -> None:
    machine = in_the_pause()
    report = machine.report
    machine.switch_over(report, SENT, Carrier.NONE)
    machine.settled(report, in_time=True)
    machine.saved(report, b"state")
    assert machine.pages_marked(report) == (Action.CHECK,)
    assert "--carrier" in report.refusal


def test_a_state_that_the_target_refuses_is_not_sent_by_qemu() -> None:
    machine = in_the_pause()
    report = machine.report
    machine.switch_over(report, SENT, Carrier.SIDE_CHANNEL)
    machine.settled(report, in_time=True)
    machine.saved(report, b"state")
    assert machine.pages_marked(report) == (Action.DELIVER,)
    assert machine.delivered(report, "another machine") == (Action.CHECK,)
    assert machine.status_read(report, "pre-switchover") == (Action.CANCEL,)


def test_a_side_channel_delivers_before_qemu_continues() -> None:
    assert prepared(carrier=Carrier.SIDE_CHANNEL).report.refusal == ""


def test_a_program_that_drives_qemu_sends_migrate_continue() -> None:
    machine = ready(switchover=Switchover.OBSERVE)
    assert machine.save_requested() == b"state"


@pytest.mark.parametrize("when", ["migrating", "in the pause", "prepared"])
def test_a_save_before_the_state_is_good_is_refused_and_the_guest_stays(when: str) -> None:
    machine = {"migrating": migrating, "in the pause": in_the_pause, "prepared": prepared}[when]()
    if when == "migrating":
        machine.stopped()
    assert machine.save_requested() is None
    machine.status_read(machine.report, "device")
    assert list(machine.migration("completed")) == [*END, Action.RESUME_GUEST]
    assert not machine.fenced
    assert machine.resumed() == (Action.RESUME,)
    assert machine.phase is Phase.IDLE


def test_a_refused_save_of_a_stopped_guest_leaves_it_stopped_here() -> None:
    machine = migrating()
    assert machine.save_requested() is None
    assert list(machine.migration("completed")) == END
    assert machine.phase is Phase.IDLE


def test_a_save_may_overtake_all_events_of_its_migration() -> None:
    machine = MigrationStateMachine()
    machine.migration("setup")
    assert machine.save_requested() is None, "of the next migration"
    machine.migration("cancelled")
    machine.resumed()
    machine.migration("setup")
    machine.stopped()
    machine.migration("pre-switchover")
    assert Action.RESUME_GUEST in machine.migration("completed")


def test_a_refused_save_before_a_migration_does_not_keep_the_guest_here() -> None:
    machine = migrating()
    assert machine.save_requested() is None, "savevm without the emulator"
    machine.stopped()
    machine.migration("pre-switchover")
    report = machine.report
    machine.switch_over(report, SENT, Carrier.STREAM)
    machine.settled(report, in_time=True)
    machine.saved(report, b"state")
    machine.pages_marked(report)
    machine.status_read(report, "pre-switchover")
    assert machine.save_requested() == b"state"
    machine.migration("completed")
    assert machine.phase is Phase.LEFT


@pytest.mark.parametrize(
    "step", ["switch_over", "fence_prepared", "settled", "quiet", "pages_marked", "delivered"]
)
@pytest.mark.parametrize("what", ["cancelled", "resumed", "another migration"])
def test_an_answer_that_comes_too_late_has_no_effect(step: str, what: str) -> None:
    machine = in_the_pause()
    report = machine.report
    if step != "switch_over":
        machine.switch_over(report, SENT, Carrier.STREAM)
    machine.migration("cancelled")
    if what != "cancelled":
        machine.resumed()
    if what == "another migration":
        machine.migration("setup")
    before = (machine.phase, machine.report.refusal)
    answers: dict[str, Callable[[], Actions]] = {
        "switch_over": lambda: machine.switch_over(report, SENT, Carrier.STREAM),
        "fence_prepared": lambda: machine.fence_prepared(report),
        "settled": lambda: machine.settled(report, in_time=True),
        "quiet": lambda: machine.quiet(report),
        "pages_marked": lambda: machine.pages_marked(report),
        "delivered": lambda: machine.delivered(report),
    }
    assert answers[step]() == ()
    assert machine.status_read(report, "pre-switchover") == () or what == "cancelled"
    assert (machine.phase, machine.report.refusal) == before
    assert machine.save_requested() is None
    assert not machine.may_mark(report)


def test_a_configuration_of_the_migration_before_is_ignored() -> None:
    machine = MigrationStateMachine()
    machine.migration("setup")
    old = machine.report
    machine.migration("cancelled")
    machine.migration("setup")
    assert machine.configuration_read(old, POSTCOPY) == ()
    assert (machine.configuration, machine.report.refusal) == (None, "")


def test_where_the_target_does_not_answer_the_guest_is_not_fenced() -> None:
    machine = left(ONE_WAY)
    assert not machine.fenced
    assert machine.resumed() == (Action.RESUME,)
    assert machine.phase is Phase.IDLE


def test_a_guest_that_left_is_taken_back() -> None:
    machine = left()
    machine.check_left()
    assert machine.take_back() == (Action.UNFENCE, Action.LIFT_FENCE, Action.RESUME_GUEST)
    assert machine.resumed() == (Action.RESUME,)
    with pytest.raises(UserError, match="nothing to take back"):
        machine.check_left()


def test_a_guest_that_left_is_not_sent_again_and_can_still_be_taken_back() -> None:
    machine = left()
    for status in ("setup", "active", "pre-switchover", "cancelled"):
        machine.migration(status)
        assert machine.save_requested() is None, "the state is sent once"
    assert machine.report.refusal == "the guest has left already"
    assert (machine.phase, machine.fenced, machine.prepared) == (Phase.LEFT, True, b"state")
    machine.check_left()
    assert machine.take_back() == (Action.UNFENCE, Action.LIFT_FENCE, Action.RESUME_GUEST)


def test_a_target_without_dbus_takes_the_state_of_the_side_channel() -> None:
    machine = incoming()
    assert machine.migration("completed") == (Action.TAKE_STATE,)
    assert machine.state_taken(ran=True) == (Action.RESUME_ARRIVED,)
    assert machine.phase is Phase.LOADED
    machine = incoming()
    assert machine.state_taken(ran=False) == ()
    assert machine.phase is Phase.IDLE
    machine = incoming()
    machine.state_missing("nothing came")
    assert (machine.phase, machine.load_refused) == (Phase.LOST, "nothing came")


def test_a_snapshot_that_is_refused_is_prepared_as_a_refusal() -> None:
    machine = MigrationStateMachine()
    machine.begin_snapshot()
    assert machine.settled(machine.report, in_time=False) == (Action.END_TRACKING, Action.PAUSE)
    assert "did not end in time" in machine.report.refusal
    assert machine.save_requested() is None
    machine.end_snapshot()
    assert machine.phase is Phase.IDLE


def test_a_guest_that_is_resumed_during_a_snapshot_is_not_saved() -> None:
    machine = MigrationStateMachine()
    machine.begin_snapshot()
    report = machine.report
    machine.resumed()
    assert machine.settled(report, in_time=True) == ()
    assert machine.phase is Phase.IDLE
    assert machine.save_requested() is None


def test_the_end_of_a_snapshot_does_not_end_a_migration() -> None:
    machine = MigrationStateMachine()
    machine.begin_snapshot()
    machine.resumed()
    machine.migration("setup")
    machine.end_snapshot()
    assert machine.phase is Phase.MIGRATING


@pytest.mark.parametrize("carrier", [Carrier.STREAM, Carrier.SIDE_CHANNEL])
def test_a_guest_whose_refusal_was_sent_has_not_left(carrier: Carrier) -> None:
    """Another program continues QEMU although the state was refused, and no target can say that it is refused."""
    machine = in_the_pause(ONE_WAY, Switchover.OBSERVE)
    report = machine.report
    machine.switch_over(report, ONE_WAY, carrier)
    assert machine.save_refused(report, NOT_SAVED) == (Action.CHECK,)
    assert machine.status_read(report, "pre-switchover") == (Action.CANCEL,)
    answer = machine.save_requested()
    assert answer is not None
    with pytest.raises(StateRefused, match="a disk in the middle of something"):
        read_machine(answer)
    machine.migration("device")
    assert machine.migration("completed") == [Action.END_TRACKING, Action.RESUME_GUEST]
    assert machine.resumed() == (Action.RESUME,)
    assert machine.phase is Phase.IDLE


def test_a_guest_whose_state_nothing_carries_has_not_left() -> None:
    """QEMU has no dbus-vmstate, so there is no Save()."""
    for delivered in (False, True):
        machine = in_the_pause(ONE_WAY, Switchover.OBSERVE)
        report = machine.report
        machine.switch_over(report, ONE_WAY, Carrier.SIDE_CHANNEL)
        machine.saved(report, b"state")
        if delivered:
            machine.delivered(report)
        machine.migration("device")
        found = machine.migration("completed")
        assert machine.phase is (Phase.LEFT if delivered else Phase.READY)
        assert (Action.RESUME_GUEST in found) is not delivered


def test_a_guest_that_its_user_stops_does_not_run_there_and_is_not_waited_for_here() -> None:
    for stopped_for_it in ("finish-migrate", "postmigrate", "running"):
        machine = migrating()
        machine.stopped()
        machine.run_state_read(machine.report, stopped_for_it)
        assert machine.guest_ran
    for other in ("paused", "io-error", "guest-panicked"):
        machine = migrating()
        assert machine.stopped() == (Action.READ_RUN_STATE,)
        machine.run_state_read(Report(), other)
        assert machine.guest_ran, "of another migration"
        machine.run_state_read(machine.report, other)
        machine.migration("pre-switchover")
        machine.switch_over(machine.report, SENT, Carrier.STREAM)
        assert not machine.guest_ran
        assert list(machine.migration("cancelled")) == END
        assert machine.phase is Phase.IDLE


def test_a_guest_that_its_user_resumes_while_it_migrates_runs_afterwards() -> None:
    machine = migrating()
    machine.stopped()
    machine.run_state_read(machine.report, "paused")
    assert machine.resumed() == (Action.RESUME,)
    assert machine.phase is Phase.MIGRATING
    machine.stopped()
    machine.run_state_read(machine.report, "finish-migrate")
    assert machine.guest_ran


@pytest.mark.parametrize("state", ["paused", "running"])
def test_a_stop_at_the_last_moment_before_the_pause_is_found_out_when_it_failed(state: str) -> None:
    machine = ready()
    assert machine.migration("cancelled") == FAILED
    machine.last_run_state_read(Report(), state)
    assert machine.phase is Phase.READY, "of another migration"
    machine.last_run_state_read(machine.report, state)
    assert machine.phase is (Phase.IDLE if state == "paused" else Phase.READY)


def test_a_fence_is_lifted_before_the_guest_may_run_here() -> None:
    for end in ("failed", "cancelled"):
        found = list(ready(SHARED).migration(end))
        assert found == [Action.END_TRACKING, Action.LIFT_FENCE, Action.READ_LAST_RUN_STATE]
    machine = in_the_pause(SHARED, Switchover.OBSERVE)
    machine.save_was_refused()
    assert machine.migration("completed") == [*END, Action.LIFT_FENCE, Action.RESUME_GUEST]


def test_a_command_that_qemu_refuses_costs_the_migration_and_not_the_guest() -> None:
    machine = prepared()
    report = machine.report
    assert machine.step_failed(report, Action.CHECK, "no") == (Action.CANCEL_WHEN_SENDING,)
    assert report.refusal.endswith("no")
    for action in (Action.RESUME_GUEST, Action.STOP_GUEST, Action.CANCEL):
        assert migrating().step_failed(report, action, "no") == ()
    machine = migrating()
    assert machine.step_failed(report, Action.EXAMINE, "no") == (), "of another migration"
    assert not machine.report.refusal


def test_a_guest_that_qemu_does_not_resume_stays_fenced() -> None:
    machine = left()
    machine.take_back()
    assert machine.not_taken_back(fenced=True) == (Action.FENCE,)
    assert machine.resumed() == (Action.STOP_GUEST,)


def test_a_stopped_guest_that_came_may_be_loaded_or_moved_again() -> None:
    for machine in (loaded(), loaded()):
        machine.stay_stopped()
        assert machine.phase is Phase.IDLE
        assert machine.migration("setup") == BEGIN
    machine = loaded()
    machine.migration("completed")
    machine.expect(instead=True)
    machine.load_requested()


def test_a_guest_is_forgotten_only_for_one_that_comes() -> None:
    machine = MigrationStateMachine()
    assert machine.expect(instead=True) == (Action.PAUSE,)
    assert machine.replaces
    machine.expect_no_more(Phase.IDLE)
    assert (machine.phase, machine.replaces) == (Phase.IDLE, False)
    assert machine.resumed() == (Action.RESUME,)
    machine.expect(instead=True)
    assert machine.abandon() == (Action.FORGET_GUEST,)
    assert incoming().abandon() == ()
    machine = incoming()
    machine.loaded()
    machine.expect_no_more(Phase.IDLE)
    assert machine.phase is Phase.LOADED


# --- any order of events ---


class AnyOrder(RuleBasedStateMachine):
    """A QEMU, a program that may drive it, and a target that may refuse; events and answers are delayed at will.

    QEMU's events, and its answers to ``query-migrate``, arrive in their order; all else overtakes each other. At the
    end of every story all that is under way ends, and the guest is at one place.
    """

    def __init__(self) -> None:
        super().__init__()
        self.machine = MigrationStateMachine()
        self.events: deque[tuple[str, str]] = deque()
        self.chains: list[tuple[Report, deque[Action]]] = []
        """Tasks: the actions that each has still to perform, in order."""
        self.status = "none"
        self.runs = True
        self.ran = True
        self.host_paused = False
        self.target_has_it = False
        self.saved: bytes | None = None
        self.fenced = False
        self.waiting: set[tuple[int, Action]] = set()
        """Migrations, by the identity of their reports, for which the coordinator waits for devices or for QEMU."""
        self.asked: deque[tuple[Report, deque[Action]]] = deque()
        """Tasks that wait for an answer of QEMU's."""
        self.answered: dict[str, Callable[[Report, str], Actions]] = {
            "ANSWER": self.machine.status_read,
            "RUN_STATE": self.machine.run_state_read,
            "LAST_RUN_STATE": self.machine.last_run_state_read,
        }

    @initialize(
        ran=st.booleans(),
        switchover=st.sampled_from(Switchover),
        configuration=st.sampled_from([SENT, ONE_WAY, SHARED, POSTCOPY]),
        carrier=st.sampled_from([Carrier.STREAM, Carrier.SIDE_CHANNEL]),
        fine=st.booleans(),
    )
    def begin(
        self, ran: bool, switchover: Switchover, configuration: Configuration, carrier: Carrier, fine: bool
    ) -> None:
        self.runs = self.ran = ran
        self.fine = fine  # whether what is under way at the end succeeds
        self.machine.switchover = switchover
        self.configuration = configuration
        self.carrier = carrier

    # --- QEMU ---

    def become(self, status: str) -> None:
        self.status = status
        self.events.append(("MIGRATION", status))

    def fail(self, status: str) -> None:
        self.become(status)
        if self.ran:
            self.runs = True
            self.events.append(("RESUME", ""))

    @precondition(lambda self: self.status in ("none", "failed", "cancelled") and not self.target_has_it)
    @rule()
    def a_migration_begins(self) -> None:
        self.saved = None
        self.become("setup")

    @precondition(lambda self: self.status == "setup")
    @rule(connects=st.sampled_from([True, True, True, False]))
    def qemu_connects(self, connects: bool) -> None:
        self.ran = self.runs
        if connects:
            self.become("active")
        else:
            self.become("failed")

    @precondition(lambda self: self.status in ("setup", "active") and self.runs)
    @rule()
    def its_user_stops_the_guest(self) -> None:
        self.runs = self.ran = False
        self.events.append(("STOP", ""))

    @precondition(lambda self: self.status in ("setup", "active") and not self.runs)
    @rule()
    def its_user_resumes_the_guest(self) -> None:
        self.runs = self.ran = True
        self.events.append(("RESUME", ""))

    def run_state(self) -> str:
        if self.runs:
            return "running"
        return {
            "pre-switchover": "finish-migrate",
            "device": "finish-migrate",
            "completed": "postmigrate",
        }.get(self.status, "paused")

    @precondition(lambda self: self.status == "active")
    @rule()
    def qemu_pauses(self) -> None:
        self.ran = self.runs
        if self.runs:
            self.runs = False
            self.events.append(("STOP", ""))
        self.become("pre-switchover")

    def cancel(self) -> None:
        if self.status in ("setup", "active"):
            self.become("cancelled")
        elif self.status == "pre-switchover":
            self.fail("cancelled")

    @rule(really=st.sampled_from([True, False, False]))
    def another_program_cancels(self, really: bool) -> None:
        if really:
            self.cancel()

    @precondition(lambda self: self.machine.switchover is Switchover.OBSERVE)
    @rule(only_if_ready=st.booleans())
    def another_program_continues(self, only_if_ready: bool) -> None:
        if self.machine.ready or not only_if_ready:
            self.continue_migration()

    def continue_migration(self) -> None:
        """QEMU sends the rest, with the state; until the target has answered, its main loop is blocked."""
        if self.status != "pre-switchover":
            return
        self.become("device")
        while any(name == "ANSWER" for name, _ in self.events):
            self.read_event()  # Save() waits for the answer of a query-migrate that was sent before
        self.saved = self.machine.save_requested()

    @precondition(lambda self: self.status == "device")
    @rule(target_fails=st.booleans())
    def the_target_answers(self, target_fails: bool) -> None:
        self.target_ends(target_fails)

    def target_ends(self, target_fails: bool) -> None:
        accepted = self.saved == b"state" and not target_fails
        if accepted:
            self.target_has_it = True
        if accepted or not self.configuration.answered:
            self.become("completed")
        else:
            self.fail("failed")

    # --- the coordinator ---

    @precondition(lambda self: self.events)
    @rule()
    def an_event_arrives(self) -> None:
        self.read_event()

    def read_event(self) -> None:
        name, status = self.events.popleft()
        if name in self.answered:
            report, waiting = self.asked.popleft()
            waiting.extendleft(reversed(self.answered[name](report, status)))
            return
        machine = self.machine
        actions = {
            "MIGRATION": lambda: machine.migration(status),
            "STOP": machine.stopped,
            "RESUME": machine.resumed,
        }[name]()
        for action in actions:
            if not self.at_once(action):
                self.chains.append((machine.report, deque([action])))

    def at_once(self, action: Action) -> bool:
        if action is Action.RESUME:
            self.host_paused = False
        elif action is Action.PAUSE:
            self.host_paused = True
        elif action is Action.FENCE:
            self.fenced = True
        return action in (
            *(Action.RESUME, Action.PAUSE, Action.FENCE, Action.UNFENCE),
            *(Action.BEGIN_TRACKING, Action.END_TRACKING),
        )

    @precondition(lambda self: self.chains)
    @rule(data=st.data())
    def a_task_continues(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.chains) - 1))
        self.step(index, data.draw(st.booleans()))

    def step(self, index: int, fine: bool = True) -> None:
        """Perform the next action of a task, and what the coordinator does after it without a wait."""
        report, actions = self.chains[index]
        if any(chain[1] is actions for chain in self.asked):
            return
        if actions:
            self.perform(report, actions, fine)
        while actions and (
            self.at_once(actions[0]) or actions[0] in (Action.SETTLE, Action.QUIESCE, Action.SAVE)
        ):
            if actions[0] in (Action.SETTLE, Action.QUIESCE):
                if (id(report), actions[0]) in self.waiting:
                    break
                self.waiting.add((id(report), actions[0]))
                self.host_paused = True
            elif actions[0] is Action.SAVE:
                self.perform(report, actions, fine)
            else:
                actions.popleft()
        waits = any(chain[1] is actions for chain in self.asked)
        if not actions and not waits:
            self.chains = [chain for chain in self.chains if chain[1] is not actions]

    def perform(self, report: Report, actions: deque[Action], fine: bool) -> None:
        """Perform one action, or its first half; ``fine``: devices, the save and the delivery succeed."""
        machine, action = self.machine, actions[0]
        following: Actions = ()
        if action is Action.EXAMINE:
            following = machine.configuration_read(report, self.configuration)
        elif action is Action.CANCEL_WHEN_SENDING:
            if machine.report is report and report.status == "setup":
                return  # the coordinator waits for the next event
            if machine.report is report and report.status in ("active", "device", "pre-switchover"):
                following = (Action.CANCEL,)
        elif action is Action.SWITCH_OVER:
            following = machine.switch_over(report, self.configuration, self.carrier)
        elif action is Action.PREPARE_FENCE:
            following = machine.fence_prepared(report)
        elif action is Action.SETTLE:
            self.waiting.discard((id(report), action))
            following = machine.settled(report, in_time=fine)
        elif action is Action.QUIESCE:
            self.waiting.discard((id(report), action))
            following = machine.quiet(report)
        elif action is Action.SAVE:
            following = machine.saved(report, b"state") if fine else machine.save_refused(report, NOT_SAVED)
        elif action is Action.MARK_PAGES:
            following = machine.pages_marked(report)
        elif action is Action.DELIVER:
            following = machine.delivered(report, "" if fine else "another machine")
        elif action in (Action.CHECK, Action.CHECK_AND_CONTINUE):
            actions.popleft()
            self.events.append(("ANSWER", self.status))
            self.asked.append((report, actions))
            if action is Action.CHECK_AND_CONTINUE:
                self.continue_migration()
            return
        elif action in (Action.READ_RUN_STATE, Action.READ_LAST_RUN_STATE):
            actions.popleft()
            last = action is Action.READ_LAST_RUN_STATE
            self.events.append(("LAST_RUN_STATE" if last else "RUN_STATE", self.run_state()))
            self.asked.append((report, actions))
            return
        elif action is Action.CANCEL:
            self.cancel()
        elif action is Action.STOP_GUEST:
            self.runs = False
        elif action is Action.RESUME_GUEST and not self.runs:
            self.runs = True
            self.events.append(("RESUME", ""))
        actions.popleft()
        actions.extendleft(reversed(following))

    # --- the end ---

    def end(self) -> None:
        """Let everything end that is under way."""
        for _ in range(200):
            if self.events:
                self.read_event()
            elif self.chains and self.progress():
                continue
            elif self.status == "device":
                self.target_ends(False)
            else:
                return
        raise AssertionError(f"no end: {self.chains}, {self.events}")

    def progress(self) -> bool:
        for index in range(len(self.chains)):
            before = [list(chain[1]) for chain in self.chains], len(self.events)
            self.step(index, self.fine)
            if before != ([list(chain[1]) for chain in self.chains], len(self.events)):
                return True
        return False

    def teardown(self) -> None:
        self.end()
        if self.status in ("setup", "active", "pre-switchover"):
            assert self.status != "pre-switchover" or self.machine.switchover is Switchover.OBSERVE, (
                "QEMU waits, and migrate-continue is not sent"
            )
            self.cancel()
            self.end()
        if self.target_has_it:
            assert not self.runs, "the guest runs twice"
            assert self.machine.phase is Phase.LEFT
            assert self.machine.fenced == self.fenced == self.configuration.answered
            return
        if self.status == "completed" and self.saved == b"state":
            assert not self.configuration.answered
            self.machine.check_left()  # the target failed and could not say so: the guest can be taken back
            return
        assert not self.machine.fenced
        assert self.machine.phase is Phase.IDLE
        if self.ran and self.status != "none":
            assert self.runs, "the guest is paused here, and is nowhere else"
        if self.runs:
            assert not self.host_paused, "the guest runs, and its host does not"


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
