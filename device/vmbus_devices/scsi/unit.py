"""What disks and CD-ROM drives have in common: identity, unit attentions, and the commands about the device.

    execute(request) --> refused by sense | unit attention | the command's method --> request.succeed(), give(), ...

A method that raises :class:`~vmbus_devices.scsi.request.CheckCondition` refuses the command. A pending unit attention
is reported once, in place of the next command's result. INQUIRY, REPORT LUNS and REQUEST SENSE are answered
regardless (SPC-4 5.6), and so is MODE SENSE(6, 10), because Linux turns its failures into success: a guest that reads
the mode pages while its disk is resized would never learn of it (docs/protocol/devices.md#storage-results).
"""

from __future__ import annotations

# ruff: noqa: B027 - a disk has no state that a reset would clear
import hashlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vmbus.bus.io.device import DeviceEnvironment
from vmbus.errors import DeviceError, InternalError
from vmbus.wire.scsi import (
    INQUIRY,
    DeviceType,
    Inquiry,
    ModePage,
    Opcode,
    Sense,
    VitalPage,
    caching_page,
    cdb_allocation,
    control_page,
    mode_header_6,
    mode_header_10,
    sense_data,
    vital_page,
)

from vmbus_devices.scsi.backend import Backend
from vmbus_devices.scsi.fast.path import FastUnit
from vmbus_devices.scsi.request import CheckCondition, Request
from vmbus_devices.scsi.statistics import UnitStatistics

_logger = logging.getLogger(__name__)

VENDOR = b"Msft    "
"""The vendor by which Linux's driver recognises a Hyper-V host, and Windows a disk to boot from."""

MAX_ATTENTIONS = 8

WITHOUT_ATTENTION = (
    Opcode.INQUIRY,
    Opcode.REPORT_LUNS,
    Opcode.REQUEST_SENSE,
    Opcode.MODE_SENSE_6,
    Opcode.MODE_SENSE_10,
)
"""Commands that are answered although a unit attention is pending."""

Command = Callable[[Request], None]


@dataclass(frozen=True, slots=True)
class Identity:
    """The identity of a unit; ``serial``: 1 to 64 characters of ASCII, constant for the lifetime of the data."""

    serial: str
    product: str
    revision: str = "1.0"

    @property
    def naa(self) -> bytes:
        """Return a locally assigned NAA identifier (SPC-4 7.8.6.6), made from the serial number."""
        digest = hashlib.sha256(self.serial.encode()).digest()
        return bytes((0x30 | digest[0] & 0x0F,)) + digest[1:8]


class LogicalUnit(ABC):
    """A unit behind a (target, LUN) of a controller."""

    device_type: DeviceType
    removable = False
    product: str
    block_size: int
    """Bytes."""
    blocks: int

    def __init__(self, backend: Backend, serial: str) -> None:
        self.backend = backend
        self.name(serial)
        self.statistics = UnitStatistics()
        self.attentions: list[Sense] = []
        self.kept: list[Request] = []
        """Commands that failed, and are executed again when the guest, which was stopped for that, is resumed."""
        self.kept_because = ""
        """Why they failed."""
        self.environment: DeviceEnvironment | None = None
        self.has_image = False
        """Whether the image is locked for this guest."""
        self.trouble = ""
        """Why it is not; empty if nothing is wrong."""
        self.changing: Callable[[], None] = lambda: None
        """Called before anything changes that compiled code uses: afterwards no thread of it serves the unit."""
        self._commands: dict[int, Command] = {
            Opcode.TEST_UNIT_READY: self._test_unit_ready,
            Opcode.REQUEST_SENSE: self._request_sense,
            Opcode.INQUIRY: self._inquiry,
            Opcode.MODE_SENSE_6: self._mode_sense,
            Opcode.MODE_SENSE_10: self._mode_sense,
            Opcode.START_STOP_UNIT: self._start_stop,
            Opcode.PREVENT_ALLOW: self._prevent_allow,
        }

    def name(self, serial: str) -> None:
        """Set the serial number; only before a guest sees the unit."""
        self.identity = Identity(serial, self.product)

    def start(self, environment: DeviceEnvironment) -> None:
        """Take the environment; called before the first command."""
        self.environment = environment
        if environment.native is not None:
            self.backend.use_native(environment.native)
        self.backend.use(environment.workers)

    def claim(self, timeout: float) -> None:
        """Lock the image before the guest uses it, which may take ``timeout`` seconds; in any thread.

        Raises :class:`~vmbus.errors.DeviceError` if somebody else uses it.
        """
        self.backend.claim(timeout)
        self.has_image = True

    def take_image(self) -> bool:
        """Lock the image, unless it is locked; return whether that was possible. Does not wait."""
        if not self.has_image:
            try:
                self.backend.lock()
            except DeviceError as error:
                if not self.trouble:
                    _logger.warning("%s: %s", self.identity.serial, error)
                self.trouble = str(error)
                return False
            if self.trouble:
                _logger.warning("%s: the image is free again", self.identity.serial)
            self.has_image = True
            self.trouble = ""
        return True

    def release_image(self) -> None:
        """Release the image: the guest may continue elsewhere. Does not wait."""
        self.changing()
        self.has_image = False
        self.backend.unlock()

    def close(self) -> None:
        """Close the back end; called after removal, when all commands have ended."""
        self.backend.close()

    def reset(self) -> None:
        """Clear what the guest has set: it resets the bus, or opens the controller again."""

    def resized(self) -> bool:
        """Read the size again; return whether it changed."""
        return False

    @property
    def fast_path_eligible(self) -> bool:
        """Whether reads and writes have no special condition now: no pending unit attention, no fault."""
        return False

    def fast_unit(self) -> FastUnit | None:
        """Return the unit's description for compiled code; ``None`` if that cannot do reads and writes."""
        return None

    def attention(self, sense: Sense) -> None:
        """Report ``sense`` with the guest's next command."""
        if sense not in self.attentions and len(self.attentions) < MAX_ATTENTIONS:
            self.changing()
            self.attentions.append(sense)

    def keep(self, request: Request, why: str) -> None:
        """Stop the guest, and keep ``request`` for its resumption.

        Raises :class:`~vmbus.errors.InternalError` where the guest cannot be stopped.
        """
        environment = self.environment
        if environment is None or environment.stop_guest is None:
            raise InternalError(f"{self.identity.serial}: the guest cannot be stopped")
        self.kept.append(request)
        self.kept_because = why
        request.cancel = lambda: self.kept.remove(request)
        environment.stop_guest(f"disk {self.identity.serial}: {why}")

    def take_kept(self) -> list[Request]:
        """Return the commands that were kept, and keep them no longer."""
        kept, self.kept = self.kept, []
        for request in kept:
            request.cancel = None
        return kept

    def execute(self, request: Request) -> None:
        """Execute a command. Raises :class:`CheckCondition`, or a GuestError for a buffer that is not RAM."""
        opcode = request.cdb[0]
        if self.attentions and opcode not in WITHOUT_ATTENTION:
            raise CheckCondition(self.attentions.pop(0))
        command = self._commands.get(opcode)
        if command is None:
            raise CheckCondition(Sense.INVALID_OPCODE)
        command(request)

    # --- commands ---

    def _test_unit_ready(self, request: Request) -> None:
        request.succeed()

    def _request_sense(self, request: Request) -> None:
        if request.cdb[1] & 1:  # descriptor format
            raise CheckCondition(Sense.INVALID_FIELD_IN_CDB)
        sense = self.attentions.pop(0) if self.attentions else Sense.NO_SENSE
        request.give(sense_data(sense), cdb_allocation(request.cdb))

    def _inquiry(self, request: Request) -> None:
        cdb = request.cdb
        if cdb[1] & 1:
            data = self._vital_pages().get(cdb[2])
            if cdb[2] == VitalPage.SUPPORTED:
                data = bytes(sorted((VitalPage.SUPPORTED, *self._vital_pages())))
            if data is None:
                raise CheckCondition(Sense.INVALID_FIELD_IN_CDB)
            request.give(vital_page(self.device_type, cdb[2], data), cdb_allocation(cdb))
            return
        if cdb[1] or cdb[2]:
            raise CheckCondition(Sense.INVALID_FIELD_IN_CDB)
        request.give(
            INQUIRY.build(
                Inquiry(
                    self.device_type,
                    0x80 if self.removable else 0,
                    VENDOR,
                    self.identity.product.encode().ljust(16)[:16],
                    self.identity.revision.encode().ljust(4)[:4],
                )
            ),
            cdb_allocation(cdb),
        )

    def _vital_pages(self) -> Mapping[int, bytes]:
        """Return the data of each vital product data page but 00."""
        return {
            VitalPage.SERIAL_NUMBER: self.identity.serial.encode(),
            VitalPage.IDENTIFICATION: bytes((1, 3, 0, 8)) + self.identity.naa,
        }

    def _mode_sense(self, request: Request) -> None:
        cdb = request.cdb
        control, page, subpage = cdb[2] >> 6, cdb[2] & 0x3F, cdb[3]
        if control == 3:
            raise CheckCondition(Sense.SAVING_NOT_SUPPORTED)
        pages = self._mode_pages()
        if page == ModePage.ALL:
            if subpage not in (0, 0xFF):
                raise CheckCondition(Sense.INVALID_FIELD_IN_CDB)
            found = [pages[number] for number in sorted(pages)]
        elif page in pages and not subpage:
            found = [pages[page]]
        else:
            raise CheckCondition(Sense.INVALID_FIELD_IN_CDB)
        if control == 1:  # changeable values: there are none
            found = [each[:2] + bytes(len(each) - 2) for each in found]
        data = b"".join(found)
        header = mode_header_6 if cdb[0] == Opcode.MODE_SENSE_6 else mode_header_10
        request.give(header(len(data), self._mode_parameter()) + data, cdb_allocation(cdb))

    def _mode_pages(self) -> Mapping[int, bytes]:
        return {
            ModePage.CACHING: caching_page(self.backend.write_cache),
            ModePage.CONTROL: control_page(),
        }

    def _mode_parameter(self) -> int:
        """Return the device-specific parameter of mode headers."""
        return 0

    def _start_stop(self, request: Request) -> None:
        request.succeed()

    def _prevent_allow(self, request: Request) -> None:
        request.succeed()

    @abstractmethod
    def status(self) -> dict[str, Any]:
        """Return what ``vmbus status`` shows."""
