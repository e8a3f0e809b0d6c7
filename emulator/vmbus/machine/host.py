"""The Hyper-V host of one running QEMU: what binds the wires to the state machines.

    gateway ── traps ──→ Partition ── messages ──→ Bus ──→ Channel ──→ device
            ── doorbells ─────────── event ports ──────────┘
    QMP     ── RESET, STOP, RESUME, SHUTDOWN ──→ this module
    Partition, Bus ── interrupts ──→ qtest        all of them ── guest memory ──→ mapping

Everything runs on one event loop; nothing here blocks it but a write through qtest, which QEMU's main loop
answers at once. The life of a host:

    attach() → serve() … QEMU ends, or stop() is called → close()
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import time
from collections.abc import Coroutine, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from vmbus.bus.channel.channel import Channel
from vmbus.bus.contact import MESSAGE_SINT
from vmbus.bus.io.channel_io import ChannelDevice, ChannelIo
from vmbus.bus.io.device import Device, DeviceEnvironment
from vmbus.bus.messages import PostResult
from vmbus.bus.server import Bus
from vmbus.errors import GatewayError, QemuError, QemuGone
from vmbus.hypervisor.cpuid import cpuid_table
from vmbus.hypervisor.crash import CrashReport
from vmbus.hypervisor.features import Features
from vmbus.hypervisor.hypercalls import AcknowledgedEarly, HypercallRegisters, UndefinedOpcode
from vmbus.hypervisor.msrs import GeneralProtection
from vmbus.hypervisor.partition import Partition, PartitionEvents
from vmbus.machine import takeover as succession
from vmbus.machine.clock import TcgClock
from vmbus.machine.gateway.client import Gateway
from vmbus.machine.gateway.traps import Fault, Trap
from vmbus.machine.io.engines import NativeEngines
from vmbus.machine.io.workers import WorkerThreads
from vmbus.machine.memory import MappedMemory
from vmbus.machine.migration.coordinator import Coordinator, Phase, Switchover
from vmbus.machine.qemu.discovery import QemuFacts, discover
from vmbus.machine.qemu.local_apics import LocalApics
from vmbus.machine.qemu.qmp import Qmp
from vmbus.machine.qemu.qtest import Qtest
from vmbus.wire.gateway import GuestState, TrapKind
from vmbus.wire.hypercall import CallCode, HvStatus
from vmbus.wire.version import Version

_logger = logging.getLogger(__name__)


class ExitReason(Enum):
    """Why :meth:`Host.serve` returned."""

    POWERED_OFF = "powered off"
    QEMU_GONE = "QEMU ended"
    STOPPED = "stopped"
    MIGRATED = "migrated"


@dataclass(frozen=True, slots=True)
class HostOptions:
    """What the user may choose of the host."""

    features: Features = field(default_factory=Features)
    max_version: Version = Version.COPPER
    take_over: bool = False
    reset: bool = False
    """Reset a guest whose emulator is gone, and with it what it knew (see ``succession``)."""
    hold_limit: float = 0.0
    """Seconds that a guest waits for an emulator that has gone before its messages are refused with the status on
    which guests try again; 0: it waits for ever."""
    switchover: Switchover = Switchover.OWN
    """Who sends ``migrate-continue`` in a migration that somebody else began."""


@dataclass(frozen=True, slots=True)
class AttachedDevice:
    """A device, its primary channel, and what goes through it."""

    device: Device
    io: ChannelIo
    channel: Channel


@dataclass(slots=True)
class HostEvents:
    """What happened to the guest so far; each list is short and bounded by :data:`_KEEP`."""

    crashes: list[CrashReport] = field(default_factory=list)
    resets: int = 0
    guest_panicked: int = 0


_KEEP = 16

#: Seconds in which QEMU's last QMP events must have come once another of its sockets broke.
_LAST_WORDS = 5.0

SETTLE_LIMIT = 10.0
"""Seconds that devices' work in threads may take to end before the host lets go of guest memory."""

#: Connection ids of channels (``Channel.connection_id``): 0x2000 + relid.
EVENT_CONNECTIONS = 0x2000

#: How many relids there are; 0 is none of them.
RELIDS = 2048


#: How long a vCPU looks for its answer before it sleeps: a message takes 30 to 60 us here, and being woken from
#: sleep costs a vCPU as much again (docs/performance.md).
SPIN_NS = 100_000

#: Times that a busy guest is looked at again before everybody else has a turn.
GATEWAY_ROUNDS = 64


class Host:
    """Serves one guest. Made by :meth:`attach`."""

    class _Events(PartitionEvents):
        def __init__(self, host: Host) -> None:
            self._host = host

        def crashed(self, report: CrashReport) -> None:
            self._host._crashed(report)

        def guest_os_changed(self, os_id: int) -> None:
            self._host.gateway.guest = GuestState.ENGAGED if os_id else GuestState.FREE
            # A guest enables its reference TSC page before it names itself; the TSC may become known later.
            self._host._tsc_page_waits = bool(os_id)

        def synic_changed(self, vp: int) -> None:
            # Signals while a processor cannot take them are dropped. One that slept (S3) would wait for ever.
            if self._host.partition.synic.vps[vp].can_signal(MESSAGE_SINT):
                for channel in self._host.bus.channels:
                    if channel.target_vp == vp:
                        channel.signal_guest()

        def reset_requested(self) -> None:
            self._host.background(self._host.qmp.execute("system_reset"))

        def auto_eoi_changed(self, vp: int, vectors: AbstractSet[int]) -> None:
            self._host.gateway.set_auto_eoi(vp, vectors)

    def __init__(
        self, facts: QemuFacts, qmp: Qmp, qtest: Qtest, gateway: Gateway, options: HostOptions
    ) -> None:
        self.facts = facts
        self.qmp = qmp
        self.qtest = qtest
        self.gateway = gateway
        self.events = HostEvents()
        self.started = time.monotonic()
        loop = asyncio.get_running_loop()
        self._loop = loop
        self._tasks: set[asyncio.Task[Any]] = set()
        self._ended: asyncio.Future[ExitReason] = loop.create_future()
        self._shutdown_reason: str | None = None
        self._lost_because: QemuError | None = None
        self.memory = MappedMemory.map_file(
            facts.ram_path, facts.ram_regions, code_pages=gateway.code_pages, through=qtest
        )
        self.clock = TcgClock(gateway.clock)
        self.partition = Partition(
            vp_count=len(facts.apic_ids),
            memory=self.memory,
            interrupts=LocalApics(qtest, facts.apic_ids, self._lost),
            clock=self.clock,
            timers=loop,
            features=options.features,
            events=Host._Events(self),
        )
        self.bus = Bus(
            memory=self.memory,
            synic=self.partition.synic,
            timers=loop,
            max_version=options.max_version,
        )
        for connection in (1, 4):
            self.partition.connect_message_port(connection, self._message)
        # Whoever looks for long instead of sleeping takes a processor, and with none to spare a vCPU's.
        self._spare = len(os.sched_getaffinity(0)) > len(facts.apic_ids)
        self.workers = WorkerThreads(loop)
        self.workers.engines = NativeEngines(
            loop, self.memory, self.workers.ended, spare_processor=self._spare
        )
        self.environment = DeviceEnvironment(
            memory=self.memory,
            timers=loop,
            reference_time=self.partition.reference_time.now,
            offers=self.bus,
            workers=self.workers,
            native=self.workers.engines,
            stop_guest=self.stop_guest,
        )
        #: Why devices stopped the guest, until it goes on.
        self.stopped_because: list[str] = []
        self.devices: list[AttachedDevice] = []
        self.migration = Coordinator(self, switchover=options.switchover)
        self._tsc_page_waits = False
        self._gateway_again: asyncio.Handle | None = None
        self.gateway_traps = 0
        self.gateway_doorbells = 0

    @classmethod
    async def attach(
        cls, qmp_socket: Path | str | Qmp, devices: Sequence[Device], options: HostOptions | None = None
    ) -> Host:
        """Attach to the QEMU behind a QMP socket and offer ``devices``.

        Raises :class:`~vmbus.errors.QemuUnsuitable` naming what is missing,
        :class:`~vmbus.errors.GatewayError` when another emulator is attached, and
        :class:`~vmbus.machine.takeover.GuestLost` for a guest whose emulator is gone with what it knew.
        """
        options = options or HostOptions()
        qmp = qmp_socket if isinstance(qmp_socket, Qmp) else await Qmp.connect(str(qmp_socket))
        qtest: Qtest | None = None
        gateway: Gateway | None = None
        try:
            facts = await discover(qmp)
            qtest = Qtest.connect(facts.qtest_socket)
            gateway = Gateway.attach(facts.gateway_socket, take_over=options.take_over)
            if await succession.end_migration(qmp):
                facts = await discover(qmp)
            await succession.check_guest(qmp, gateway, reset=options.reset)
            let_go = options.reset and await succession.reset_guest(qmp, gateway)
            host = cls(facts, qmp, qtest, gateway, options)
            if not facts.atomic:
                _logger.warning(
                    "this QEMU can have one vCPU only, and its guest's locked instructions are not atomic: now and "
                    "then a signal is lost, and a channel hangs. Start it with -smp 1,maxcpus=2"
                )
        except BaseException:
            if gateway is not None:
                gateway.close()
            if qtest is not None:
                qtest.close()
            if not isinstance(qmp_socket, Qmp):
                await qmp.close()
            raise
        try:
            for device in devices:
                host.add_device(device)
            if not facts.running:
                host.clock.stop()
            await host.migration.start()
            host._activate(options)
            if let_go:
                await qmp.cont()
        except BaseException:
            await host.close()
            raise
        return host

    def channel_end(self, device: ChannelDevice) -> ChannelIo:
        """The host's end of a channel of ``device`` that is about to be offered."""
        longest = device.poll_window if self._spare else min(device.poll_window, Device.poll_window)
        return ChannelIo(device, self._loop, poll_window=longest)

    def add_device(self, device: Device) -> AttachedDevice:
        """Offer one more device; the guest sees it at once if it has asked for offers."""
        io = self.channel_end(device)
        device.start(self.environment)
        attached = AttachedDevice(device, io, self.bus.offer(device.offer(), io))
        self.devices.append(attached)
        return attached

    def remove_device(self, attached: AttachedDevice) -> None:
        """Take a device's offer back (hot removal); the guest lets go of it in its own time."""
        self.devices.remove(attached)
        self.bus.revoke(attached.channel)
        attached.device.stop()

    def _activate(self, options: HostOptions) -> None:
        self.gateway.set_cpuid(cpuid_table(options.features, len(self.facts.apic_ids)))
        self.gateway.set_doorbells(self.partition.doorbell_rules(EVENT_CONNECTIONS, RELIDS))
        self.gateway.set_hold_limit(
            options.hold_limit, {CallCode.POST_MESSAGE: HvStatus.INSUFFICIENT_BUFFERS}
        )
        if len(os.sched_getaffinity(0)) > 1:  # with one processor a vCPU that looks keeps the answer away
            self.gateway.set_spin(SPIN_NS)
        self.gateway.activate()
        self._loop.add_reader(self.gateway.fileno(), self._gateway_ready)
        self.look_at_gateway()
        self.background(self._follow_life())

    def _message(self, vp: int, connection_id: int, payload: bytes) -> int | AcknowledgedEarly:
        if self.bus.can_acknowledge_early(payload):
            return AcknowledgedEarly(functools.partial(self._handle_acknowledged, connection_id, payload))
        result = self.bus.handle_message(vp, connection_id, payload)
        return HvStatus.SUCCESS if result is PostResult.OK else HvStatus.INSUFFICIENT_BUFFERS

    # --- the gateway ------------------------------------------------------------------------------------

    def _gateway_ready(self) -> None:
        gateway = self.gateway
        try:
            gateway.awake()
            if self.migration.fenced:
                return
            for _ in range(GATEWAY_ROUNDS):
                self.serve_gateway()
                if self._tsc_page_waits and self.clock.tsc_known:
                    self._tsc_page_waits = False
                    self.partition.publish_reference_tsc()
                if not gateway.sleep_prepare():
                    return
            if not self._ended.done():
                self.look_at_gateway()
        except (GatewayError, QemuGone) as error:
            self._lost(error)

    def look_at_gateway(self) -> None:
        """There may be traps and doorbells that nobody was woken for."""
        self._gateway_again = self._loop.call_soon(self._gateway_ready)

    def _leave_gateway(self) -> None:
        self._loop.remove_reader(self.gateway.fileno())
        if self._gateway_again is not None:
            self._gateway_again.cancel()

    def serve_gateway(self) -> None:
        """Answer the traps that wait, take the doorbells that were rung."""
        for trap in self.gateway.traps():
            self._serve(trap)
        for index in self.gateway.doorbells():
            self.gateway_doorbells += 1
            self.partition.synic.ring_event_port(EVENT_CONNECTIONS + index)

    def _serve(self, trap: Trap) -> None:
        self.gateway_traps += 1
        act_afterwards = None
        try:
            if trap.kind is TrapKind.WRMSR:
                self.partition.write_msr(trap.vcpu, trap.msr, trap.msr_value)
                value = 0
            elif trap.kind is TrapKind.RDMSR:
                value = self.partition.read_msr(trap.vcpu, trap.msr)
            else:
                value, act_afterwards = self.partition.hypercall(
                    trap.vcpu,
                    HypercallRegisters(
                        trap.long_mode, trap.rax, trap.rbx, trap.rcx, trap.rdx, trap.rsi, trap.rdi, trap.r8
                    ),
                )
        except GeneralProtection:
            self.gateway.answer_fault(trap, Fault.GP)
        except UndefinedOpcode:
            self.gateway.answer_fault(trap, Fault.UD)
        except (GatewayError, QemuGone):
            raise
        except Exception:
            _logger.exception(
                "a %s of vCPU %d could not be answered; please report this", trap.kind.name, trap.vcpu
            )
            if trap.kind is TrapKind.VMCALL:
                self.gateway.answer(trap, HvStatus.OPERATION_FAILED)
            else:
                self.gateway.answer_fault(trap, Fault.GP)
        else:
            self.gateway.answer(trap, value)
            if act_afterwards is not None:
                act_afterwards()

    def _handle_acknowledged(self, connection_id: int, payload: bytes) -> None:
        try:
            self.bus.handle_acknowledged(connection_id, payload)
        except (GatewayError, QemuGone):
            raise
        except Exception:
            _logger.exception("a message of the guest could not be acted on; please report this")

    # --- the guest's life --------------------------------------------------------------------------------

    async def _follow_life(self) -> None:
        async for name, data in self.qmp.events():
            _logger.debug("QMP event %s %s", name, data)
            if name == "RESET":
                self.events.resets += 1
                self.reset()
            elif name == "STOP":
                self.clock.stop()
            elif name == "RESUME":
                self.gateway.clock.arm()
                self.clock.go()
            elif name == "SHUTDOWN":
                self._shutdown_reason = str(data.get("reason", ""))
            elif name == "GUEST_PANICKED":
                self.events.guest_panicked += 1
            self.migration.event(name, data)
            if name == "RESUME":
                self._goes_on()
        self._ended_by_itself(None)

    def stop_guest(self, reason: str) -> None:
        """A device cannot go on as things are: stop the guest until somebody has mended that (``cont``)."""
        if not self.stopped_because:
            self.background(self._stop_guest())
        if reason not in self.stopped_because and len(self.stopped_because) < _KEEP:
            _logger.warning("the guest is stopped: %s", reason)
            self.stopped_because.append(reason)

    async def _stop_guest(self) -> None:
        await self.qmp.execute("stop")

    def _goes_on(self) -> None:
        self.stopped_because.clear()
        for attached in tuple(self.devices):
            try:
                attached.device.guest_resumed()
            except Exception:
                _logger.exception("%s does not go on; please report this", attached.device.name)

    def reset(self) -> None:
        """The machine was reset: everything that the guest had set up is gone, the offers stay."""
        _logger.info("the machine was reset")
        self.gateway.forget_requests()
        self.bus.reset()
        self.partition.reset()

    def _crashed(self, report: CrashReport) -> None:
        if len(self.events.crashes) < _KEEP:
            _logger.warning("the guest reports a crash: %s", report)
            self.events.crashes.append(report)

    def background(self, work: Coroutine[Any, Any, None]) -> None:
        """Run ``work`` beside everything else; an error of QEMU's in it ends the host, another one fails it."""
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._background_done)

    def _background_done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            if isinstance(error, QemuGone):
                self._lost(error)
            elif isinstance(error, QemuError):
                self._end(ExitReason.QEMU_GONE, error)
            elif not self._ended.done():
                self._ended.set_exception(error)

    def _lost(self, error: QemuError) -> None:
        """A socket of QEMU's broke. What that means (a power-off, a crash) is for the QMP events still to come."""
        self._leave_gateway()
        if self._shutdown_reason:
            self._ended_by_itself(error)
        elif self._lost_because is None:
            _logger.info("%s", error)
            self._lost_because = error
            self._loop.call_later(_LAST_WORDS, self._ended_by_itself, error)

    def _ended_by_itself(self, error: QemuError | None) -> None:
        if self.migration.phase is Phase.LEFT:  # QEMU is ended when nobody needs it any more
            self._end(ExitReason.MIGRATED, error)
        else:
            self._end(ExitReason.POWERED_OFF if self._shutdown_reason else ExitReason.QEMU_GONE, error)

    def _end(self, exit_reason: ExitReason, error: Exception | None) -> None:
        if error is not None:
            _logger.info("%s: %s", exit_reason.value, error)
        self._leave_gateway()
        if not self._ended.done():
            self._ended.set_result(exit_reason)

    async def serve(self) -> ExitReason:
        """Serve the guest until QEMU ends or :meth:`stop` is called."""
        return await asyncio.shield(self._ended)

    def stop(self, exit_reason: ExitReason = ExitReason.STOPPED) -> None:
        """Let :meth:`serve` return; QEMU goes on, its guest waits for the next emulator."""
        self._end(exit_reason, None)

    async def close(self) -> None:
        """Let go of QEMU and of guest memory."""
        self._leave_gateway()
        self.partition.pause()  # no timer of it fires any more
        for channel in self.bus.channels:  # and no turn of a channel finds guest memory unmapped
            if isinstance(channel.endpoint, ChannelIo):
                channel.endpoint.pause()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.migration.close()
        if not await self.workers.settle(SETTLE_LIMIT):
            _logger.warning(
                "%d pieces of devices' work are not done; they are left behind", self.workers.unfinished
            )
        for attached in self.devices:
            attached.device.stop()
        for attached in self.devices:
            if not await asyncio.to_thread(attached.device.wait_closed, SETTLE_LIMIT):
                _logger.warning("%s has not let go of all it has", attached.device.name)
        self.workers.close()
        self.gateway.close()
        self.qtest.close()
        await self.qmp.close()
        self.memory.close()
