"""The error tree: one class per decision that a reader of the error takes.

    VmbusError
    ├── GuestError               the guest did wrong: costs the guest its request or its channel
    │   ├── GuestAddressError    an address or page number that is not RAM
    │   ├── MalformedError       bytes that no declaration in ``vmbus.wire`` accepts
    │   ├── ProtocolError        well-formed, but not allowed now
    │   └── RingError            a ring buffer in a state that no writer may leave it in
    ├── UserError                the person at the keyboard can mend it: exit status 1
    │   ├── UsageError           the command line itself is wrong: exit status 2
    │   └── MissingRequirement   something has to be installed or given first
    ├── QemuError                QEMU refused, failed, or is gone
    │   ├── QemuGone             QEMU ended, or closed a socket
    │   ├── QemuUnsuitable       it runs, but lacks an option that the emulator needs
    │   └── GatewayError         the trap gateway speaks another version, or broke its protocol
    ├── DeviceError              a device class (perhaps a third party's) raised or broke its contract
    └── InternalError            our bug: please report

Asserts are never used to check input; everything from a guest, a user or QEMU raises one of these.
"""

from __future__ import annotations


class VmbusError(Exception):
    """Root of everything that the emulator raises on purpose."""


class GuestError(VmbusError):
    """The guest is at fault. ``reason`` is a stable name that counters and logs are keyed by."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


class GuestAddressError(GuestError):
    """A guest physical address, or a page number, that is not RAM."""

    def __init__(self, gpa: int, length: int = 1) -> None:
        super().__init__("not-ram", f"{length} bytes at guest physical address {gpa:#x} are not all RAM")
        self.gpa = gpa
        self.length = length


class MalformedError(GuestError):
    """Bytes that do not parse as what they claim to be (short, or with an impossible field)."""


class ProtocolError(GuestError):
    """A well-formed request that is not allowed in the present state."""


class RingError(GuestError):
    """A ring buffer whose indices or packets are impossible; the channel stops."""


class UserError(VmbusError):
    """Something the user can mend; the message says how."""

    exit_status = 1


class UsageError(UserError):
    """The command line is wrong."""

    exit_status = 2


class MissingRequirement(UserError):
    """A program, package, file or option is missing; the message says how to get it."""


class QemuError(VmbusError):
    """QEMU refused or failed."""


class QemuGone(QemuError):
    """QEMU ended, or one of its sockets closed."""


class QemuUnsuitable(QemuError):
    """A running QEMU lacks something; the message names the option that adds it."""


class GatewayError(QemuError):
    """The trap gateway in QEMU speaks another version or broke its protocol."""


class DeviceError(VmbusError):
    """A device class raised an unexpected exception or broke its contract."""


class InternalError(VmbusError):
    """A bug in the emulator."""
