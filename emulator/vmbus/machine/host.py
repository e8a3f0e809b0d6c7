"""The Hyper-V host of one running QEMU: connects QEMU's sockets to the state machines.

    gateway ── traps ──→ Partition ── messages ──→ Bus ──→ Channel ──→ device
            ── doorbells ─────────── event ports ──────────┘
    QMP     ── RESET, STOP, RESUME, SHUTDOWN ──→ Host
    QMP     ── MIGRATION, STOP, RESUME ──→ migration.Coordinator
    Partition, Bus ── interrupts ──→ qtest        all of them ── guest memory ──→ mapping

Everything runs on one event loop, but answers to QEMU over D-Bus (:mod:`vmbus.machine.migration.vmstate`). Only
writes through qtest block it, until QEMU's main loop has answered. The life of a host:

    attach() → serve() … QEMU ends, or stop() is called → close()
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import time
from collections.abc import Coroutine, Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

from vmbus.bus.contact import MESSAGE_SINT
from vmbus.bus.io.channel_io import ChannelDevice, ChannelIo
from vmbus.bus.io.device import Device, DeviceEnvironment
from vmbus.bus.messages import POSTED
from vmbus.bus.server import Bus
from vmbus.errors import GatewayError, InternalError, QemuError, QemuGone, UserError
from vmbus.hypervisor.cpuid import cpuid_table
from vmbus.hypervisor.crash import CrashReport
from vmbus.hypervisor.partition import Partition, PartitionEvents
from vmbus.machine import takeover
from vmbus.machine.auto_eoi import AutoEoi
from vmbus.machine.clock import TcgClock
from vmbus.machine.engine.data_path import EngineDataPath
from vmbus.machine.engine.library import EngineLibrary, VcpuSignals
from vmbus.machine.gateway.client import Gateway
from vmbus.machine.gateway.posts import ram_ranges
from vmbus.machine.gateway_service import EVENT_CONNECTIONS, GatewayService, ServedParts
from vmbus.machine.host_parts import AttachedDevice as AttachedDevice
from vmbus.machine.host_parts import ExitReason as ExitReason
from vmbus.machine.host_parts import HostEvents as HostEvents
from vmbus.machine.host_parts import HostOptions as HostOptions
from vmbus.machine.host_parts import MakeDevices
from vmbus.machine.io.engines import NativeEngines
from vmbus.machine.io.workers import WorkerThreads
from vmbus.machine.journal.areas import areas
from vmbus.machine.journal.reading import Contents
from vmbus.machine.journal.recorder import RecordedParts, Recorder
from vmbus.machine.journal.recovery import RecoveredGuest
from vmbus.machine.journal.store import Journal
from vmbus.machine.memory import MappedMemory
from vmbus.machine.migration import lost_channels, missing_devices
from vmbus.machine.migration.coordinator import Coordinator
from vmbus.machine.migration.host_state import HostState
from vmbus.machine.migration.ports import MigrationPorts
from vmbus.machine.migration.state_machine import Phase
from vmbus.machine.once import Once
from vmbus.machine.problems import Problems
from vmbus.machine.qemu import memory_devices
from vmbus.machine.qemu.discovery import QemuFacts, discover
from vmbus.machine.qemu.qmp import Qmp
from vmbus.machine.qemu.qtest import LocalApics, Qtest
from vmbus.saving import StateRefused
from vmbus.wire.gateway import GuestState
from vmbus.wire.hypercall import CallCode, HvStatus
from vmbus.wire.saved import ChannelIdentity

_logger = logging.getLogger(__name__)


_KEEP = 16

_QMP_TIMEOUT = 5.0
"""Seconds for QEMU's last QMP events after another of its sockets broke."""

SETTLE_TIMEOUT = 10.0
"""Seconds that devices' work in threads may take to end before the host unmaps guest memory."""

RELIDS = 2048
"""Number of relids; 0 is not used."""

SPIN_NS = 100_000
"""Nanoseconds that a vCPU polls for its answer before it sleeps. A message takes 30 to 60 us here, and to wake a vCPU
costs as much again (docs/performance.md)."""

POLL_NS = 300_000
"""Nanoseconds that a vCPU polls for an interrupt before it halts, at most."""


class Host:
    """The host of one guest. Made by :meth:`attach`."""

    class _Events(PartitionEvents):
        def __init__(self, host: Host) -> None:
            self._host = host
            self._reset = Once(host.background, lambda: host.qmp.execute("system_reset"), again=False)

        def crashed(self, report: CrashReport) -> None:
            self._host._crashed(report)

        def guest_os_changed(self, os_id: int) -> None:
            self._host.gateway.guest = GuestState.ENGAGED if os_id else GuestState.FREE

        def synic_changed(self, vp: int) -> None:
            for channel in self._host.bus.channels:
                if channel.target_vp == vp and isinstance(channel.endpoint, ChannelIo):
                    channel.endpoint.recall()  # compiled code signals it at an address and with a vector
            # Signals to a processor that cannot take them are dropped. A guest would wait for them after S3.
            if self._host.partition.synic.vps[vp].can_signal(MESSAGE_SINT):
                for channel in self._host.bus.channels:
                    if channel.target_vp == vp:
                        channel.signal_guest()

        def reset_requested(self) -> None:
            self._reset.request()

        def auto_eoi_changed(self, vp: int, vectors: AbstractSet[int]) -> None:
            self._host.auto_eoi.changed(vp, vectors)

    class _Owner:
        """:class:`~vmbus.machine.gateway_service.ServiceOwner`."""

        def __init__(self, host: Host) -> None:
            self._host = host

        @property
        def fenced(self) -> bool:
            return self._host.migration.fenced

        @property
        def paused(self) -> bool:
            return self._host.state.paused

        @property
        def ended(self) -> bool:
            return self._host._ended.done()

        def lost(self, error: GatewayError | QemuGone) -> None:
            self._host._lost(error)

        def broken(self, error: Exception) -> None:
            self._host._fail(error)

    def __init__(
        self, facts: QemuFacts, qmp: Qmp, qtest: Qtest, gateway: Gateway, options: HostOptions
    ) -> None:
        self.facts = facts
        self.options = options
        self.qmp = qmp
        self.qtest = qtest
        self.gateway = gateway
        self.events = HostEvents()
        self.problems = Problems()
        self.auto_eoi = AutoEoi(gateway, self.problems)
        self.report_other_ram(facts.memory_devices)
        self._other_ram = Once(self.background, self._look_for_other_ram, again=True)
        self.started = time.monotonic()
        loop = asyncio.get_running_loop()
        self._loop = loop
        self._tasks: set[asyncio.Task[Any]] = set()
        self._following: asyncio.Task[Any] | None = None
        self._closing: asyncio.Task[None] | None = None
        self._ended: asyncio.Future[ExitReason] = loop.create_future()
        self._shutdown_reason: str | None = None
        self._lost_because: QemuError | None = None
        library = EngineLibrary.open()
        self.memory = MappedMemory.map_file(
            facts.ram_path,
            facts.ram_regions,
            code_pages=gateway.code_pages,
            through=qtest,
            set_bits=library.set_bits if library else None,
        )
        vcpus = VcpuSignals(library, gateway.pending.addresses()) if library else None
        self.interrupts = LocalApics(qtest, facts.apic_ids, self._lost, vcpus)
        self.clock = TcgClock(gateway.clock)
        self.partition = Partition(
            vp_count=len(facts.apic_ids),
            present=facts.vcpus,
            memory=self.memory,
            interrupts=self.interrupts,
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
        self.service = GatewayService(
            loop,
            gateway,
            ServedParts(self.partition, self.bus, self.clock, self.interrupts, self.auto_eoi),
            Host._Owner(self),
        )
        for connection in (1, 4):
            self.partition.connect_message_port(connection, self.service.message)
        # A long poll window occupies a processor: with none to spare, it would be a vCPU's.
        self._spare = len(os.sched_getaffinity(0)) > facts.vcpus
        self.workers = WorkerThreads(loop)
        self._engines = NativeEngines(self.memory, self._start_data_path if library else lambda: None)
        self.workers.engines = self._engines
        self.environment = DeviceEnvironment(
            memory=self.memory,
            timers=loop,
            reference_time=self.partition.reference_time.now,
            offers=self.bus,
            workers=self.workers,
            native=self._engines,
            stop_guest=self.stop_guest,
            budget=self.bus.budget,
        )
        self.recorder: Recorder | None = None
        """Keeps the journal of the guest, if it has one."""
        self._mirror: memoryview | None = None
        """Beside the journal: where compiled code keeps what it has."""
        self.stopped_because: list[str] = []
        """Why devices stopped the guest, until it is resumed."""
        self.devices: list[AttachedDevice] = []
        self.migration = self._coordinator(options)

    def _start_data_path(self) -> EngineDataPath | None:
        return EngineDataPath.start(
            self._loop,
            self.memory,
            self.gateway,
            self.qtest,
            self.interrupts,
            self.workers.ended,
            busy_waits=self._spare,
        )

    def _coordinator(self, options: HostOptions) -> Coordinator:
        ports = MigrationPorts(
            qmp=self.qmp,
            qtest=self.qtest,
            memory=self.memory,
            gateway=self.gateway,
            workers=self.workers,
            service=self,
            dbus_address=self.facts.dbus_address,
        )
        self.state = HostState(
            partition=self.partition,
            bus=self.bus,
            memory=self.memory,
            clock=self.clock,
            gateway=self.gateway,
            service=self,
        )
        return Coordinator(
            ports,
            self.state,
            switchover=options.switchover,
            allow_missing_devices=options.allow_missing_devices,
        )

    @classmethod
    async def attach(
        cls,
        qmp_socket: Path | str | Qmp,
        devices: Sequence[Device] | MakeDevices,
        options: HostOptions | None = None,
    ) -> Host:
        """Attach to the QEMU behind a QMP socket and offer ``devices``, or those that the emulator of before had.

        Raises :class:`~vmbus.errors.QemuUnsuitable` with what is missing, :class:`~vmbus.errors.GatewayError` when
        another emulator is attached, and :class:`~vmbus.machine.takeover.GuestLost` for a guest whose state ended
        with its emulator.
        """
        options = options or HostOptions()
        qmp = qmp_socket if isinstance(qmp_socket, Qmp) else await Qmp.connect(str(qmp_socket))
        qtest: Qtest | None = None
        gateway: Gateway | None = None
        try:
            facts = await discover(qmp)
            qtest = Qtest.connect(facts.qtest_socket)
            gateway = Gateway.attach(facts.gateway_socket, takeover=options.takeover)
            if await takeover.end_migration(qmp):
                facts = await discover(qmp)
            found = None if options.reset else takeover.find_guest(gateway, takeover=options.takeover)
            await takeover.check_guest(qmp, gateway, reset=options.reset, found=found)
            if callable(devices):
                devices = await asyncio.to_thread(devices, takeover.devices_of(gateway))
            if found is not None:
                options = dataclasses.replace(options, journal=True)
            elif not options.journal:
                takeover.retire_journal(gateway)
            resume = options.reset and await takeover.reset_guest(qmp, gateway)
            host = cls(facts, qmp, qtest, gateway, options)
            if not facts.atomic:
                _logger.warning(
                    "this QEMU can have only one vCPU, so its guest's locked instructions are not atomic: a signal "
                    "can be lost, and its channel then hangs. Start QEMU with -smp 1,maxcpus=2"
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
            if isinstance(found, RecoveredGuest):
                host._open_journal(found.contents)
                host._recover(found)
            if await takeover.guest_is_here(qmp):
                for device in devices:
                    await asyncio.to_thread(device.claim)
            if not facts.running:
                host.clock.stop()
            await host.migration.start()
            if isinstance(found, RecoveredGuest):
                host._resume_recovered(found)
            else:
                host._activate()
            if resume:
                await qmp.cont()
        except BaseException:
            await host.close()
            raise
        return host

    @classmethod
    def adopt(
        cls,
        facts: QemuFacts,
        qmp: Qmp,
        qtest: Qtest,
        gateway: Gateway,
        devices: Sequence[Device],
        options: HostOptions,
    ) -> Host:
        """Return a paused host of a QEMU that another process serves; :meth:`begin` takes its place."""
        host = cls(facts, qmp, qtest, gateway, options)
        for device in devices:
            host.add_device(device)
        host.state.begin_paused()
        return host

    async def begin(self) -> None:
        """Serve the guest, whose state was restored, from now on; the process of before has ended its service.

        Raises :class:`~vmbus.errors.QemuGone`.
        """
        await self.qmp.begin()
        self.gateway.take()
        self._engines.use_gateway()
        self._set_tables()
        if self.options.journal:
            # The process of before has left its journal valid: it is, until this one's first transaction.
            self._open_journal(takeover.journal_of(self.gateway))
            self.state.journal = self.recorder
        if self.facts.running:
            self.clock.resume()
        self.state.resume()
        self._begin_mirror()
        self.begin_service()
        await self.migration.join()

    @property
    def stopped(self) -> bool:
        """Whether the guest is stopped: by its user, a migration, or a device."""
        return self.clock.stopped

    def channel_end(self, device: ChannelDevice) -> ChannelIo:
        """Return the host's end for a channel of ``device`` that is about to be offered."""
        longest = device.poll_window if self._spare else min(device.poll_window, Device.poll_window)
        record = self._record_channel if self.options.journal else None
        return ChannelIo(device, self._loop, poll_window=longest, record=record)

    def _record_channel(self, io: ChannelIo) -> None:
        if self.recorder is not None:
            self.recorder.channel(io)

    def _open_journal(self, found: Contents | None = None) -> None:
        """Make the journal, which is not valid until it is begun, or go on with the one of the emulator of before."""
        memory, self._mirror = areas(self.gateway.journal_memory())
        journal = Journal.create(memory) if found is None else Journal.resume(memory, found)
        self.recorder = self.service.recorder = Recorder(
            self._loop,
            journal,
            RecordedParts(self.partition, self.bus, self.clock, self.gateway, self.state),
            broken=self._fail,
            full=lambda why: self.problems.report(
                "journal", f"the guest is lost if this emulator is killed: {why}"
            ),
        )
        self.partition.synic.gate = self.recorder.want
        self.gateway.posts.hold = True
        self._record_devices()

    def _record_devices(self) -> None:
        if self.recorder is not None:
            self.recorder.devices([line for attached in self.devices for line in attached.device.lines()])

    def _recover(self, found: RecoveredGuest) -> None:
        """Restore a guest whose emulator was killed; the host is paused until :meth:`_resume_recovered`."""
        self.state.begin_paused()
        with self.qtest.loading():
            try:
                self.state.restore_recovered(found.state, found.positions, found.again, found.lost)
            except StateRefused as error:
                raise takeover.GuestLost(
                    f"the guest's emulator was killed, and what it has left cannot be restored: {error}. The guest "
                    "was not changed and waits: reset it with `vmbus attach --reset`, or end this QEMU"
                ) from error
        self.partition.synic.take_delivered(found.marks)

    def _resume_recovered(self, found: RecoveredGuest) -> None:
        self._set_tables()
        self.gateway.activate()
        if self.facts.running:
            self.clock.resume()
        else:
            self.clock.stopped_at = found.tsc or None
        for answer in found.answers:
            self.gateway.repeat_answer(answer)
        self.gateway.posts.begin_at(found.posts)
        self.interrupts.retry(self.gateway.pending.waiting())
        self.state.journal = self.recorder
        self.state.resume()
        self._begin_mirror()
        self.begin_service()
        _logger.info("the guest was taken over from an emulator that was killed")

    def add_device(self, device: Device) -> AttachedDevice:
        """Offer one more device; the guest gets the offer at once if it has asked for offers.

        Raises :class:`~vmbus.errors.UserError` as :meth:`check_device` does.
        """
        self.check_device(device)
        io = self.channel_end(device)
        device.start(self.environment)
        attached = AttachedDevice(device, io, self.bus.offer(device.offer(), io))
        self.devices.append(attached)
        self._record_devices()
        return attached

    def check_device(self, device: Device) -> None:
        """Raise :class:`~vmbus.errors.UserError` for a device that the journal of the guest cannot cover."""
        if self.options.journal and (lost := device.lost_with_process()):
            raise UserError(
                f"{', '.join(lost)}: it cannot go on after the death of this emulator, so a guest with --journal or "
                "--supervise cannot have it. Use a raw image that is not read-only, or leave that option out"
            )

    def remove_device(self, attached: AttachedDevice) -> None:
        """Rescind a device's offer (hot removal) and stop the device. The guest releases the channel later.

        What the guest had asked for, and has not read the answer of, is lost: :mod:`~vmbus.machine.removal` waits.
        """
        self.devices.remove(attached)
        self._record_devices()
        self.bus.revoke(attached.channel)
        attached.device.stop()

    def _activate(self) -> None:
        self.gateway.pending.forget()  # of an emulator that ended in the middle of a signal
        self._set_tables()
        if self.options.journal:
            self._open_journal()
            self._begin_journal()
        self.gateway.activate()
        self.begin_service()

    def _begin_journal(self) -> None:
        self.state.journal = self.recorder
        if self.recorder is not None:
            self.recorder.begin()
        self._begin_mirror()

    def _begin_mirror(self) -> None:
        """Have compiled code keep what it does beside the journal, which says nothing of the mirror of before now."""
        if self._mirror is not None:
            self._engines.use_mirror(self._mirror)

    def _set_tables(self) -> None:
        options = self.options
        self.gateway.set_cpuid(cpuid_table(options.features, len(self.facts.apic_ids)))
        self.gateway.set_doorbells(self.partition.doorbell_rules(EVENT_CONNECTIONS, RELIDS))
        self.gateway.set_constant_msrs(self.partition.constant_msrs())
        self.gateway.set_posts(self.partition.post_rule(POSTED), ram_ranges(self.memory.regions))
        self.gateway.pending.set_apic_ids(self.facts.apic_ids)
        self.gateway.set_poll(POLL_NS if self._spare else 0)
        self.gateway.set_hold_timeout(
            options.hold_timeout, {CallCode.POST_MESSAGE: HvStatus.INSUFFICIENT_BUFFERS}
        )
        if len(os.sched_getaffinity(0)) > 1:  # with one processor, a vCPU that polls delays the answer
            self.gateway.set_spin(SPIN_NS)

    def begin_service(self) -> None:
        """Serve the gateway and follow the guest's life, from now on or again."""
        self.service.begin()
        if self._following is None:
            self._following = self.background(self._follow_life())

    # --- the gateway ---

    def serve_gateway(self) -> None:
        """Serve the gateway once."""
        self.service.serve()

    def look_at_gateway(self) -> None:
        """Serve the gateway in the next turn of the event loop: it may have traps and doorbells without a wake-up."""
        self.service.look()

    def leave_gateway(self) -> None:
        """Serve the gateway no more: what is in it waits for :meth:`begin_service`, or for the next emulator."""
        self.service.leave()

    def _fail(self, error: Exception) -> None:
        """End the attachment after a bug, which :meth:`serve` raises; the guest waits for the next emulator."""
        self.leave_gateway()
        if self._ended.done():
            _logger.error(
                "internal error after the end of the attachment; please report this", exc_info=error
            )
            return
        _logger.error("internal error while the guest was served", exc_info=error)
        reason = InternalError(
            f"the guest is not served any more, because of an internal error ({error!r}); please report this"
        )
        reason.__cause__ = error
        self._ended.set_exception(reason)

    def give_gateway(self) -> None:
        """Touch nothing of the gateway any more, after :meth:`leave_gateway`: another process may take it."""
        if self.recorder is not None:
            self.recorder.leave()
        self._engines.leave_gateway()

    def take_gateway_back(self) -> None:
        """Undo :meth:`give_gateway`, if it was called: no other process has taken the gateway."""
        self._engines.return_to_gateway()

    async def tasks_done(self, timeout: float) -> bool:
        """Wait until no task is under way but that which follows the guest's life; return False on timeout."""
        if others := self._tasks - {self._following}:
            _, pending = await asyncio.wait(others, timeout=timeout)
            return not pending
        return True

    # --- the guest's life ---

    async def _follow_life(self) -> None:
        async for name, data in self.qmp.events():
            _logger.debug("QMP event %s %s", name, data)
            if name == "RESET":
                self.events.resets += 1
                self.reset()
            elif name == "STOP":
                self.clock.stop()
                if self.recorder is not None:
                    self.recorder.want()
            elif name == "RESUME":
                self.gateway.clock.arm()
                self.clock.resume()
            elif name == "SHUTDOWN":
                self._shutdown_reason = str(data.get("reason", ""))
            elif name == "GUEST_PANICKED":
                self.events.guest_panicked += 1
            elif name in memory_devices.EVENTS:
                self._other_ram.request()
            self.migration.event(name, data)
            if name == "RESUME":
                self._resumed()
        self._ended_by_itself(None)

    async def _look_for_other_ram(self) -> None:
        try:
            self.report_other_ram(await memory_devices.memory_devices(self.qmp))
        except QemuGone:
            raise
        except QemuError as error:
            _logger.warning("cannot see which memory devices QEMU has: %s", error)

    def report_other_ram(self, devices: tuple[memory_devices.MemoryDevice, ...]) -> None:
        """Name RAM that is not in the mapped file, or withdraw the problem if there is none."""
        if devices:
            self.problems.report("other-ram", memory_devices.out_of_reach(devices))
        else:
            self.problems.withdraw("other-ram")

    def report_missing_devices(self, channels: Sequence[ChannelIdentity]) -> None:
        """Name the devices that a guest had before it was restored here, and lost. A reset withdraws the problem."""
        self.problems.report("missing-devices", missing_devices.lost(channels))

    def report_lost_channels(self, lost: Mapping[str, str]) -> None:
        """Name the devices whose channels were lost with the emulator of before. A reset withdraws the problem."""
        self.problems.report("lost-channels", lost_channels.sentence(lost))

    def stop_guest(self, reason: str) -> None:
        """Stop the guest: a device cannot work until the user removes the cause and resumes the guest (``cont``)."""
        if not self.stopped_because:
            self.background(self._stop_guest())
        if reason not in self.stopped_because and len(self.stopped_because) < _KEEP:
            _logger.warning("the guest is stopped: %s", reason)
            self.stopped_because.append(reason)

    async def _stop_guest(self) -> None:
        await self.qmp.execute("stop")

    def _resumed(self) -> None:
        self.stopped_because.clear()
        self.devices_resumed()

    def devices_resumed(self) -> None:
        """Tell the devices that their guest goes on here."""
        for attached in tuple(self.devices):
            try:
                attached.device.guest_resumed()
            except Exception:
                _logger.exception(
                    "internal error: %s cannot continue; please report this", attached.device.name
                )

    def reset(self) -> None:
        """Drop everything that the guest had set up, after a reset of the machine; keep the offers."""
        _logger.info("the machine was reset")
        self.problems.withdraw("missing-devices")
        self.problems.withdraw("lost-channels")
        self.gateway.forget_requests()
        self.bus.reset()
        self.partition.reset()
        if self.recorder is not None:
            self.recorder.reset()

    def _crashed(self, report: CrashReport) -> None:
        if len(self.events.crashes) < _KEEP:
            _logger.warning("the guest reports a crash: %s", report)
            self.events.crashes.append(report)

    def background(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run ``work`` as a task.

        A command that QEMU refuses is logged; the end of QEMU in it ends the host; another error is raised by
        :meth:`serve`.
        """
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._background_done)
        return task

    def _background_done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            if isinstance(error, QemuGone):
                self._lost(error)
            elif isinstance(error, GatewayError):
                self._end(ExitReason.QEMU_GONE, error)
            elif isinstance(error, QemuError):  # one command: the guest goes on as it is
                _logger.error("%s", error)
            elif not self._ended.done():
                self._ended.set_exception(error)

    def _lost(self, error: QemuError) -> None:
        """Handle a broken socket of QEMU. QMP events that are still to come say whether it was a power-off."""
        self.leave_gateway()
        if self._shutdown_reason:
            self._ended_by_itself(error)
        elif self._lost_because is None:
            _logger.info("%s", error)
            self._lost_because = error
            self._loop.call_later(_QMP_TIMEOUT, self._ended_by_itself, error)

    def _ended_by_itself(self, error: QemuError | None) -> None:
        if self.migration.phase is Phase.LEFT:  # QEMU is ended when it is not needed any more
            self._end(ExitReason.MIGRATED, error)
        else:
            self._end(ExitReason.POWERED_OFF if self._shutdown_reason else ExitReason.QEMU_GONE, error)

    def _end(self, exit_reason: ExitReason, error: Exception | None) -> None:
        if error is not None:
            _logger.info("%s: %s", exit_reason.value, error)
        self.leave_gateway()
        if not self._ended.done():
            self._ended.set_result(exit_reason)

    async def serve(self) -> ExitReason:
        """Serve the guest until QEMU ends or :meth:`stop` is called."""
        return await asyncio.shield(self._ended)

    def stop(self, exit_reason: ExitReason = ExitReason.STOPPED) -> None:
        """Make :meth:`serve` return. QEMU is not ended; its guest waits for the next emulator."""
        self._end(exit_reason, None)

    async def close(self) -> None:
        """Close the connections to QEMU, and unmap guest memory when devices do not use it any more.

        A second call waits for the first.
        """
        if self._closing is None:
            self._closing = asyncio.ensure_future(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        self.leave_gateway()
        if self.recorder is not None:
            self.recorder.end()
        self.partition.pause()  # none of its timers fires any more
        self.bus.close()
        for channel in self.bus.channels:  # and no channel uses guest memory after it is unmapped
            if isinstance(channel.endpoint, ChannelIo):
                channel.endpoint.pause()
        self._engines.leave_gateway()  # what it has not answered is the next emulator's
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.migration.close()
        if not await self.workers.settle(SETTLE_TIMEOUT):
            _logger.warning(
                "%d pieces of devices' work did not end in time and are abandoned", self.workers.unfinished
            )
        for attached in self.devices:
            attached.device.stop()
        for attached in self.devices:
            if not await asyncio.to_thread(attached.device.wait_closed, SETTLE_TIMEOUT):
                _logger.warning("%s did not end all its work in time", attached.device.name)
        self.workers.close()
        self.gateway.close()
        self.qtest.close()
        await self.qmp.close()
        self.memory.close()
