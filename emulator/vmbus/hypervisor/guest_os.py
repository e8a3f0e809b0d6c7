"""The operating system that the guest identifies itself as: GUEST_OS_ID, decoded.

Source: TLFS 3.6, docs/protocol/discovery.md#operating-system-and-hypercall-page.
"""

from __future__ import annotations

from vmbus.wire.msr import OPEN_SOURCE_OS_ID, PROPRIETARY_OS_ID

_OPEN_SOURCE_NAMES = {1: "Linux", 2: "FreeBSD", 3: "Xen", 4: "illumos"}
_MICROSOFT_NAMES = {1: "MS-DOS", 2: "Windows 3", 3: "Windows 9x", 4: "Windows NT", 5: "Windows CE"}
_MICROSOFT = 1
_LINUX = 1


def describe_guest_os(os_id: int) -> str:
    """Return name and version as text, such as ``Linux 6.1.0``; ``none`` for 0.

    Linux writes its version code, in which minor and patch numbers are at most 255.
    """
    if os_id == 0:
        return "none"
    if os_id >> 63:
        open_source = OPEN_SOURCE_OS_ID.parse(os_id)
        name = _OPEN_SOURCE_NAMES.get(open_source.os_type, f"open-source system {open_source.os_type}")
        if open_source.os_type == _LINUX:
            version = open_source.version
            return f"{name} {version >> 16}.{version >> 8 & 0xFF}.{version & 0xFF}"
        return f"{name} version {open_source.version:#x} build {open_source.build}"
    system = PROPRIETARY_OS_ID.parse(os_id)
    name = f"vendor {system.vendor} system {system.os_id}"
    if system.vendor == _MICROSOFT:
        name = _MICROSOFT_NAMES.get(system.os_id, f"Microsoft system {system.os_id}")
    return f"{name} {system.major}.{system.minor} build {system.build} service {system.service_version}"
