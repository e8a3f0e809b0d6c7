"""The error tree: one class per decision of the code, or of the person, that handles the error.

    VmbusError
    ├── GuestError               the guest is at fault: its request fails, or its channel stops
    │   ├── GuestAddressError    an address or page number that is not RAM
    │   ├── MalformedError       bytes that no declaration in ``vmbus.wire`` accepts
    │   ├── ProtocolError        a valid request that is not allowed in the present state
    │   └── RingError            a ring buffer in a state that no correct writer leaves it in
    ├── UserError                the user can correct it: exit status 1
    │   ├── UsageError           the command line is wrong: exit status 2
    │   └── MissingRequirement   something must be installed or specified first
    ├── QemuError                QEMU refused, failed, or ended
    │   ├── QemuGone             QEMU ended, or closed a socket
    │   ├── QemuUnsuitable       QEMU runs without an option that the emulator needs
    │   └── GatewayError         the trap gateway has another version, or violated its protocol
    ├── DeviceError              a device class, possibly a third party's, raised or violated its contract
    └── InternalError            a bug of the emulator, to be reported

Asserts are never used to check input: everything that a guest, a user or QEMU can cause raises one of these. The
message of an error for users says what happened, why, and what to do.
"""

from __future__ import annotations


class VmbusError(Exception):
    """Root of all errors that the emulator raises."""


class GuestError(VmbusError):
    """An error of the guest; ``reason``: a stable name, the key of counters and log lines."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail


class GuestAddressError(GuestError):
    """A range of guest physical addresses that is not all RAM; ``length`` in bytes."""

    def __init__(self, gpa: int, length: int = 1) -> None:
        super().__init__("not-ram", f"{length} bytes at guest physical address {gpa:#x} are not all RAM")
        self.gpa = gpa
        self.length = length


class MalformedError(GuestError):
    """Bytes that cannot be parsed: too short, or with an invalid field."""


class TooNewError(MalformedError):
    """Bytes of a later release with a part that this release does not know and must not ignore."""


class ProtocolError(GuestError):
    """A valid request that is not allowed in the present state."""


class RingError(GuestError):
    """A ring buffer with invalid indices or packets; the channel stops."""


class UserError(VmbusError):
    """An error that the user can correct; the message says how."""

    exit_status = 1


class UsageError(UserError):
    """An error of the command line."""

    exit_status = 2


class MissingRequirement(UserError):
    """A missing program, package, file or option; the message says how to get it."""


class QemuError(VmbusError):
    """An error of QEMU: it refused a command, failed or ended."""


class QemuGone(QemuError):
    """The end of QEMU, or of the connection to one of its sockets."""


class QemuUnsuitable(QemuError):
    """A QEMU that runs without an option that the emulator needs; the message names the option."""


class GatewayError(QemuError):
    """A trap gateway of another version, or one that violated its protocol."""


class DeviceError(VmbusError):
    """A device class that raised an unexpected exception or violated its contract."""


class InternalError(VmbusError):
    """A bug in the emulator."""


def system_reason(error: OSError) -> str:
    """Return what the system says: the reason of a failed call, after the file that it was about."""
    reason = error.strerror or str(error)
    return f"{error.filename}: {reason}" if error.filename else reason
