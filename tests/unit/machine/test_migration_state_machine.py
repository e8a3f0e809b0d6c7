"""The emulator's decisions in migrations: each transition, and what it guards against."""

from __future__ import annotations

from collections.abc import Callable

import pytest
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
from vmbus.saving import StateRefused, read_machine

from tests.unit.machine.migrating import (
    BEGIN,
    END,
    FAILED,
    NOT_SAVED,
    ONE_WAY,
    POSTCOPY,
    SENT,
    SHARED,
    in_the_pause,
    incoming,
    left,
    loaded,
    lost,
    migrating,
    prepared,
    ready,
)

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


def test_a_guest_that_is_reset_before_its_state_is_written_continues_at_once() -> None:
    machine = in_the_pause()
    report = machine.report
    machine.switch_over(report, SENT, Carrier.STREAM)
    machine.settled(report, in_time=True)
    assert machine.may_save_later
    assert machine.to_be_saved(report) == (Action.MARK_PAGES,)
    assert machine.awaits_state(report)
    assert machine.was_reset() == (Action.CANCEL,)
    assert machine.pages_marked(report) == (Action.CHECK,), "migrate-continue is not sent"
    machine.state_written(b"state")
    assert machine.status_read(report, "pre-switchover") == (Action.CANCEL,)
    sent = machine.save_requested()
    assert sent is not None
    with pytest.raises(StateRefused, match="was reset"):
        read_machine(sent)


@pytest.mark.parametrize("status", ["failed", "cancelled", "setup"])
def test_no_state_is_written_for_a_migration_that_has_ended(status: str) -> None:
    machine = in_the_pause()
    report = machine.report
    machine.switch_over(report, SENT, Carrier.STREAM)
    machine.settled(report, in_time=True)
    machine.to_be_saved(report)
    machine.migration(status)
    assert not machine.awaits_state(report)
    assert machine.save_requested() is None


@pytest.mark.parametrize(
    ("configuration", "switchover", "carrier"),
    [
        (SHARED, Switchover.OWN, Carrier.STREAM),
        (SENT, Switchover.OBSERVE, Carrier.STREAM),
        (SENT, Switchover.OWN, Carrier.SIDE_CHANNEL),
    ],
)
def test_a_state_that_is_needed_before_is_not_written_later(
    configuration: Configuration, switchover: Switchover, carrier: Carrier
) -> None:
    machine = in_the_pause(configuration, switchover)
    machine.switch_over(machine.report, configuration, carrier)
    assert not machine.may_save_later


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


@pytest.mark.parametrize("carrier", [Carrier.STREAM, Carrier.SIDE_CHANNEL])
def test_a_migration_that_is_refused_never_sends_the_state(carrier: Carrier) -> None:
    """Another program continues QEMU between the refusal and the cancel: the guest would run at both ends."""
    machine = in_the_pause(SENT if carrier is Carrier.SIDE_CHANNEL else POSTCOPY, Switchover.OBSERVE)
    report = machine.report
    machine.switch_over(report, SENT, carrier)
    machine.saved(report, b"state")
    if carrier is Carrier.SIDE_CHANNEL:
        assert machine.delivered(report, "no confirmation came") == (Action.CHECK,)
    assert machine.status_read(report, "pre-switchover") == (Action.CANCEL,)
    answer = machine.save_requested()
    assert answer is not None
    with pytest.raises(StateRefused, match=r"no confirmation came|postcopy-ram: no"):
        read_machine(answer)
    machine.migration("device")
    assert Action.RESUME_GUEST in machine.migration("completed")


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


def test_a_guest_that_is_lost_stays_so_over_a_migration_and_a_snapshot_of_another_program() -> None:
    """Its memory has no state: what is here would be sent in place of it, as if the guest were well."""
    for end in ("completed", "failed", "cancelled"):
        machine = lost()
        assert machine.migration("setup") == (Action.CANCEL_WHEN_SENDING,)
        assert machine.save_requested() is None
        machine.migration(end)
        assert machine.phase is Phase.LOST
    machine = lost()
    machine.migration("setup")
    assert machine.migration("pre-switchover") == ()
    assert machine.report.refusal


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
