"""Serves the gateway of one host: answers traps, handles what was posted, and passes doorbells on.

    gateway ── traps ──→ Partition ── messages ──→ Bus
            ── posts ──→ Bus, SynIC
            ── doorbells ──→ event ports

A guest that never stops asking leaves the event loop time for everything else: it is served in rounds.
"""

from __future__ import annotations

import asyncio
import functools
import logging
from dataclasses import dataclass
from typing import Protocol

from vmbus.bus.messages import PostResult
from vmbus.bus.server import Bus
from vmbus.errors import GatewayError, QemuGone
from vmbus.hypervisor.hypercalls import AcknowledgedEarly, HypercallRegisters, UndefinedOpcode
from vmbus.hypervisor.msrs import GeneralProtection
from vmbus.hypervisor.partition import Partition
from vmbus.machine.auto_eoi import AutoEoi
from vmbus.machine.clock import TcgClock
from vmbus.machine.gateway.client import Gateway
from vmbus.machine.gateway.posts import Post
from vmbus.machine.gateway.traps import Fault, Trap
from vmbus.machine.journal.recorder import Recorder, Round
from vmbus.machine.qemu.qtest import LocalApics
from vmbus.wire.gateway import TrapKind
from vmbus.wire.hypercall import HvStatus
from vmbus.wire.msr import STIMER_COUNT, Msr

_logger = logging.getLogger(__name__)

EVENT_CONNECTIONS = 0x2000
"""Connection ids of channels (``Channel.connection_id``) are 0x2000 + relid."""

GATEWAY_ROUNDS = 64
"""Times that a busy guest is served before the event loop runs anything else."""

GATEWAY_POSTS = 64
"""Posts after which the event loop runs something else."""


class ServiceOwner(Protocol):
    """What the service asks, and tells, the host."""

    @property
    def fenced(self) -> bool:
        """Whether the guest may run elsewhere: nothing of it is answered here."""

    @property
    def paused(self) -> bool:
        """Whether the host is paused: traps are answered, and nothing may be posted."""

    @property
    def ended(self) -> bool:
        """Whether the attachment has ended."""

    def lost(self, error: GatewayError | QemuGone) -> None:
        """QEMU has closed a socket, or another emulator took over."""

    def broken(self, error: Exception) -> None:
        """An internal error: the guest is served no more."""


@dataclass(frozen=True, slots=True)
class ServedParts:
    """The parts of a host that its gateway calls."""

    partition: Partition
    bus: Bus
    clock: TcgClock
    interrupts: LocalApics
    auto_eoi: AutoEoi


class GatewayService:
    """Serves ``gateway`` between :meth:`begin` and :meth:`leave`; all calls come from the event loop."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, gateway: Gateway, parts: ServedParts, owner: ServiceOwner
    ) -> None:
        self._loop = loop
        self._gateway = gateway
        self._parts = parts
        self._owner = owner
        self._again: asyncio.Handle | None = None
        self.recorder: Recorder | None = None
        """Keeps the guest's journal: what a round has done is answered once it is there."""
        self._late: list[tuple[Trap, int, Fault | None]] = []
        """Answers of this round, which wait for the journal."""
        self.traps = 0
        """Traps that were answered."""
        self.doorbells = 0
        """Doorbells that were rung."""
        self.posts = 0
        """Posts that were handled."""
        self._messages = False
        """Whether a message was among the posts of this round."""

    def begin(self) -> None:
        """Serve the gateway from now on, or again."""
        self._loop.add_reader(self._gateway.fileno(), self.ready)
        self.look()

    def leave(self) -> None:
        """Serve the gateway no more: what is in it waits for :meth:`begin`, or for the next emulator."""
        self._loop.remove_reader(self._gateway.fileno())
        if self._again is not None:
            self._again.cancel()
            self._again = None

    def look(self) -> None:
        """Serve the gateway in the next turn of the event loop: it may have traps and doorbells without a wake-up."""
        self._again = self._loop.call_soon(self.ready)

    @property
    def looks_again(self) -> bool:
        """Whether :meth:`look` was called, and :meth:`leave` was not since."""
        return self._again is not None

    def ready(self) -> None:
        """Serve the gateway until it has nothing more, or for as long as a busy guest may keep the event loop."""
        gateway, owner, partition = self._gateway, self._owner, self._parts.partition
        try:
            gateway.awake()
            if owner.fenced:
                return
            sleeps = False
            last_post = self.posts + GATEWAY_POSTS
            for _ in range(GATEWAY_ROUNDS):
                self.serve()
                if partition.reference_tsc_waits and self._parts.clock.tsc_known:
                    partition.publish_reference_tsc()
                    if self.recorder is not None:
                        self.recorder.want()
                if (sleeps := not gateway.sleep_prepare()) or self.posts >= last_post:
                    break
            if gateway.pending.failed():
                self._raise_failed()
            if (
                self._parts.auto_eoi.watched
            ):  # after the request for a wake-up: later failures wake this emulator
                self._parts.auto_eoi.look()
            if not sleeps and not owner.ended:
                self.look()
        except (GatewayError, QemuGone) as error:
            owner.lost(error)
        except Exception as error:  # noqa: BLE001 - the event loop would only log it, and all traps hang
            owner.broken(error)

    def _raise_failed(self) -> None:
        self._gateway.set_poll(0)
        self._parts.interrupts.retry(self._gateway.pending.waiting())
        _logger.warning(
            "a vCPU cannot raise interrupts by itself in this machine: all go through QEMU's main loop from now on"
        )

    def serve(self) -> None:
        """Answer the traps that wait, and handle what was posted and the doorbells that were rung.

        What a processor posted before a trap, or before it rang, is in the ring when either is seen.
        """
        before = self.posts
        traps = self._gateway.traps()
        self._handle_posts()
        writes = False  # which may change what can be promised
        for trap in traps:
            self.answer(trap)
            writes = writes or trap.kind is not TrapKind.RDMSR
        if doorbells := self._gateway.doorbells():
            self._handle_posts()
        for index in doorbells:
            self.doorbells += 1
            self._parts.partition.synic.ring_event_port(EVENT_CONNECTIONS + index)
        if self.recorder is not None:
            self._record(self.recorder, traps)
        if writes or self.posts != before or self._owner.paused:
            self._promise()
        if self.recorder is not None:
            self._give_late(self.recorder)

    def _record(self, recorder: Recorder, traps: list[Trap]) -> None:
        """Put into the journal what this round has changed."""
        done = Round([self._gateway.given(*each) for each in self._late], guest=self._messages)
        self._messages = False
        for trap in traps:
            if trap.kind is TrapKind.VMCALL:
                done.guest = True
            elif trap.kind is TrapKind.WRMSR:
                if Msr.STIMER0_CONFIG <= trap.msr < Msr.STIMER0_CONFIG + 2 * STIMER_COUNT:
                    done.timers = max(done.timers, trap.vcpu + 1)
                elif trap.msr != Msr.EOM:  # which has an effect on what the recorder knows of
                    done.guest = True
        recorder.round_ended(done)

    def _give_late(self, recorder: Recorder) -> None:
        late, self._late = self._late, []
        for trap, value, fault in late:
            self._give(trap, value, fault)
        self._gateway.posts.release()
        recorder.deliver()

    def _handle_posts(self) -> None:
        for post in self._gateway.posts.take():
            self.posts += 1
            self._handle_post(post)

    def _handle_post(self, post: Post) -> None:
        partition = self._parts.partition
        if post.kind is TrapKind.VMCALL:
            self._messages = True
            partition.posted_message()
            self._handle_acknowledged(post.connection_id, post.payload)
        else:
            partition.synic.end_of_message(post.vcpu)

    def _promise(self) -> None:
        """Let the gateway post what is certain to succeed from now on."""
        posts, parts = self._gateway.posts, self._parts
        if self._owner.paused or self._gateway.carries:
            posts.withdraw()
        else:
            posts.promise(parts.bus.acknowledgeable if parts.partition.hypercalls_enabled else 0)

    def answer(self, trap: Trap) -> None:
        """Answer one trap, whatever happens."""
        self.traps += 1
        partition = self._parts.partition
        act_afterwards = None
        try:
            if trap.kind is TrapKind.WRMSR:
                partition.write_msr(trap.vcpu, trap.msr, trap.msr_value)
                value = 0
                if not partition.hypercalls_enabled and self.recorder is None:  # the next one raises #UD
                    self._promise()
            elif trap.kind is TrapKind.RDMSR:
                value = partition.read_msr(trap.vcpu, trap.msr)
            else:
                value, act_afterwards = partition.hypercall(
                    trap.vcpu,
                    HypercallRegisters(
                        trap.long_mode, trap.rax, trap.rbx, trap.rcx, trap.rdx, trap.rsi, trap.rdi, trap.r8
                    ),
                )
        except GeneralProtection:
            self._answer(trap, 0, Fault.GP)
        except UndefinedOpcode:
            self._answer(trap, 0, Fault.UD)
        except (GatewayError, QemuGone):
            raise
        except Exception:
            _logger.exception(
                "internal error in the answer to a %s of vCPU %d; please report this",
                trap.kind.name,
                trap.vcpu,
            )
            if trap.kind is TrapKind.VMCALL:
                self._answer(trap, HvStatus.OPERATION_FAILED)
            else:
                self._answer(trap, 0, Fault.GP)
        else:
            self._answer(trap, value)
            if act_afterwards is not None:
                act_afterwards()

    def _answer(self, trap: Trap, value: int, fault: Fault | None = None) -> None:
        if self.recorder is None:
            self._give(trap, value, fault)
        else:
            self._late.append((trap, value, fault))

    def _give(self, trap: Trap, value: int, fault: Fault | None) -> None:
        if fault is None:
            self._gateway.answer(trap, value)
        else:
            self._gateway.answer_fault(trap, fault)

    def message(self, vp: int, connection_id: int, payload: bytes) -> int | AcknowledgedEarly:
        """Handle HvPostMessage: a handler for :meth:`Partition.connect_message_port`."""
        bus = self._parts.bus
        if bus.can_acknowledge_early(payload):
            return AcknowledgedEarly(functools.partial(self._handle_acknowledged, connection_id, payload))
        result = bus.handle_message(vp, connection_id, payload)
        return HvStatus.SUCCESS if result is PostResult.OK else HvStatus.INSUFFICIENT_BUFFERS

    def _handle_acknowledged(self, connection_id: int, payload: bytes) -> None:
        try:
            self._parts.bus.handle_acknowledged(connection_id, payload)
        except (GatewayError, QemuGone):
            raise
        except Exception:
            _logger.exception("internal error in the handling of a guest's message; please report this")
