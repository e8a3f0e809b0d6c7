"""State machines of a migration, brought into each of their phases."""

from __future__ import annotations

from vmbus.machine.migration.configuration import Configuration
from vmbus.machine.migration.state_machine import (
    Action,
    Carrier,
    MigrationStateMachine,
    Switchover,
)
from vmbus.saving import Reason, StateRefused

SENT = Configuration(mode="normal", memory_stays=False, answered=True, refusal="")


ONE_WAY = Configuration(mode="normal", memory_stays=False, answered=False, refusal="")


SHARED = Configuration(mode="normal", memory_stays=True, answered=True, refusal="")


POSTCOPY = Configuration(mode="normal", memory_stays=False, answered=True, refusal="postcopy-ram: no")


NOT_SAVED = StateRefused(Reason.DEVICE_FAILED, "a disk in the middle of something")


END = [Action.END_TRACKING]
BEGIN = [Action.BEGIN_TRACKING, Action.EXAMINE]
FAILED = [Action.END_TRACKING, Action.READ_LAST_RUN_STATE]

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
