"""The emulator's decisions in migrations: any order of events leaves the guest at one place."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
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

from tests.unit.machine.migrating import (
    NOT_SAVED,
    ONE_WAY,
    POSTCOPY,
    SENT,
    SHARED,
)

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
        self.unwritten: Report | None = None
        """The migration whose state was not written when its view was taken."""
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
        later=st.sampled_from(["", "written", "refused"]),
    )
    def begin(
        self,
        ran: bool,
        switchover: Switchover,
        configuration: Configuration,
        carrier: Carrier,
        fine: bool,
        later: str,
    ) -> None:
        self.later = later  # what becomes of a state that may be written later
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
        self.write_state()
        while any(name == "ANSWER" for name, _ in self.events):
            self.read_event()  # Save() waits for the answer of a query-migrate that was sent before
        self.saved = self.machine.save_requested()

    def write_state(self) -> None:
        report, self.unwritten = self.unwritten, None
        if report is None or not self.machine.awaits_state(report):
            return
        if self.later == "refused":
            self.machine.save_refused(report, NOT_SAVED)
        else:
            self.machine.state_written(b"state")

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
            if not fine:
                following = machine.save_refused(report, NOT_SAVED)
            elif self.later and machine.may_save_later:
                self.unwritten = report
                following = machine.to_be_saved(report)
            else:
                following = machine.saved(report, b"state")
        elif action is Action.MARK_PAGES:
            following = machine.pages_marked(report)
        elif action is Action.DELIVER:
            following = machine.delivered(report, "" if fine else "another machine")
        elif action in (Action.CHECK, Action.CHECK_AND_CONTINUE):
            actions.popleft()
            if action is Action.CHECK:
                self.write_state()
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
            if not self.events and not self.chains:
                self.write_state()
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
