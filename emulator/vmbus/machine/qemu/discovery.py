"""Finds what a running QEMU consists of, through QMP and its process: the user need not repeat any of it.

===================  ==============================================================================
fact                 where it is found
===================  ==============================================================================
guest RAM            ``qom-get /machine memory-backend``, then ``mem-path``, ``share``, ``size``
its layout           ``info mtree -f``, address space ``memory``: the lines of that memory region with ``@offset``
qtest socket         ``query-chardev``, label ``qtest``
gateway socket       the ``-plugin`` option on the command line of the QMP socket's peer process
vCPU → APIC id       ``qom-get`` ``apic-id`` of each CPU of ``query-cpus-fast``; for those that may be
                     added, from their place in ``query-hotpluggable-cpus`` and ``/machine smp``
RAM elsewhere        ``query-memory-devices``: there must be none but persistent memory
state carrier        ``qom-list /objects``: the ``addr`` of the object of type ``dbus-vmstate``
atomic guest         ``query-hotpluggable-cpus``: there can be two vCPUs or more
===================  ==============================================================================

Guest and host share words in which each changes bits of its own, event flags above all. The guest uses locked
instructions for that. In a machine that can never have a second vCPU (``-smp 1``, QEMU's default), TCG translates
them to plain loads and stores without barriers: what the host stores in between is lost, a signal for example, and
its channel then waits for ever. With ``-smp 1,maxcpus=2`` they are atomic.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vmbus.errors import QemuError, QemuUnsuitable
from vmbus.machine.memory import VIDEO_MEMORY, RamRegion
from vmbus.machine.qemu.memory_devices import PERSISTENT, MemoryDevice, memory_devices
from vmbus.machine.qemu.qmp import Qmp

_logger = logging.getLogger(__name__)

_MTREE_LINE = re.compile(
    r"^\s*([0-9a-f]{16})-([0-9a-f]{16}) \(prio -?\d+, (?:ram|rom)\): (\S+)(?: @([0-9a-f]+))?\s*$"
)


@dataclass(frozen=True, slots=True)
class QemuFacts:
    """What the emulator needs of a QEMU to attach to it. Sizes in bytes."""

    pid: int
    version: str
    machine: str
    name: str | None
    running: bool
    ram_path: Path
    ram_size: int
    ram_regions: tuple[RamRegion, ...]
    qtest_socket: str
    gateway_socket: str
    apic_ids: tuple[int, ...]
    """APIC ids by the vCPUs' numbers, those of vCPUs that may be added later included."""
    vcpus: int
    """Number of vCPUs that exist now."""
    memory_devices: tuple[MemoryDevice, ...] = ()
    """Persistent memory, which is not part of ``ram_regions``."""
    dbus_address: str | None = None
    """Address of the daemon that QEMU's ``dbus-vmstate`` object uses; ``None``: QEMU has no such object."""
    atomic: bool = True
    """Whether the guest's locked instructions are atomic; if not, signals can be lost."""


def parse_layout(tree: str, region_name: str) -> tuple[RamRegion, ...]:
    """Return the guest's RAM in ``info mtree -f``, as devices see it: that of the address space ``memory``.

    What only System Management Mode sees there (SMRAM) is no RAM for devices. What is between 640 KiB and 1 MiB is
    left out in any case: firmware changes it while it runs, and makes SMRAM and read-only copies of ROM of it.
    """
    pieces = []
    devices_see_it = False
    for line in tree.splitlines():
        if line.startswith("FlatView #"):
            devices_see_it = False
        elif line.strip().startswith('AS "memory",'):
            devices_see_it = True
        elif devices_see_it and (found := _MTREE_LINE.match(line)) and found.group(3) == region_name:
            start, end = int(found.group(1), 16), int(found.group(2), 16) + 1
            pieces.append((start, end, start - int(found.group(4) or "0", 16)))
    regions: list[tuple[int, int, int]] = []
    for start, end, delta in sorted(pieces):
        for low, high in ((start, min(end, VIDEO_MEMORY.start)), (max(start, VIDEO_MEMORY.stop), end)):
            if low >= high:
                continue
            if regions and regions[-1][1] >= low and regions[-1][2] == delta:
                low, high = regions[-1][0], max(high, regions.pop()[1])
            regions.append((low, high, delta))
    return tuple(RamRegion(gpa=low, size=high - low, offset=low - delta) for low, high, delta in regions)


def plugin_socket(arguments: list[str]) -> str | None:
    """Return the gateway's ``socket=`` among the ``-plugin`` options of a command line."""
    for position, argument in enumerate(arguments[:-1]):
        if argument in ("-plugin", "--plugin"):
            options = arguments[position + 1].replace(",,", "\0").split(",")
            values = dict(option.partition("=")[::2] for option in options)
            if "socket" in values and Path(values.get("file", options[0])).name.startswith("vmbus-gateway"):
                return values["socket"].replace("\0", ",")
    return None


def chardev_path(filename: str) -> str | None:
    """Return the path in a chardev's ``filename`` such as ``disconnected:unix:/run/q.sock,server=on``."""
    _, found, rest = filename.partition("unix:")
    if not found:
        return None
    return rest.removesuffix(",server=on").removesuffix(",server")


async def discover(qmp: Qmp) -> QemuFacts:
    """Return the facts of a running QEMU. Raises :class:`QemuUnsuitable` with every option that is missing."""
    missing: list[str] = []
    version = await qmp.execute("query-version")
    numbers = version["qemu"]
    machine = str(await qmp.execute("qom-get", {"path": "/machine", "property": "type"}))
    status = await qmp.execute("query-status")
    name = (await qmp.execute("query-name")).get("name")

    kvm = await qmp.execute("query-kvm")
    if kvm.get("enabled"):
        missing.append("-accel tcg (it runs with KVM, where no plug-in can see the guest's instructions)")

    backend = str(await qmp.execute("qom-get", {"path": "/machine", "property": "memory-backend"}))
    ram_path: Path | None = None
    size = 0
    if backend:
        try:
            ram_path = Path(
                str(await qmp.execute("qom-get", {"path": backend, "property": "mem-path"})).removeprefix(
                    "rom "
                )
            )
            shared = await qmp.execute("qom-get", {"path": backend, "property": "share"})
            size = int(await qmp.execute("qom-get", {"path": backend, "property": "size"}))
        except QemuError:
            ram_path, shared = None, False
        if not shared:
            ram_path = None
    if ram_path is None:
        missing.append(
            "-object memory-backend-file,id=ram,mem-path=FILE,share=on,size=SIZE -machine memory-backend=ram"
        )

    qtest: str | None = None
    for chardev in await qmp.execute("query-chardev"):
        if chardev["label"] == "qtest":
            qtest = chardev_path(chardev["filename"])
    if qtest is None:
        missing.append("-qtest unix:SOCKET,server=on,wait=off -qtest-log none")

    process = Path("/proc") / str(qmp.pid)
    try:
        raw = (process / "cmdline").read_bytes()
    except OSError as error:
        raise QemuUnsuitable(
            f"cannot read the command line of QEMU (process {qmp.pid}): {error.strerror}; "
            "run the emulator on the same host, in the same process namespace, as the same user"
        ) from error
    arguments = [part.decode("utf-8", "surrogateescape") for part in raw.split(b"\0")]
    gateway = plugin_socket(arguments)
    if gateway is None:
        missing.append("-plugin PATH/vmbus-gateway.so,socket=SOCKET")

    if missing or ram_path is None or qtest is None or gateway is None:
        listed = "".join(f"\n  {option}" for option in missing)
        raise QemuUnsuitable(
            f"the QEMU at {qmp.path} runs without options that the emulator needs; add:{listed}\n"
            "`vmbus qemu-args` prints these options ready to use"
        )

    # `memory-backend` names the object; the tree shows the region by the object's last path component.
    layout = parse_layout(await qmp.monitor("info mtree -f"), backend.rsplit("/", 1)[-1])
    if not layout or sum(region.size for region in layout) > size + (2 << 20):
        raise QemuUnsuitable(
            f"cannot find the guest's RAM ({backend}) in the output of `info mtree -f`; please report this"
        )

    devices = await memory_devices(qmp)
    if volatile := tuple(device for device in devices if device.kind not in PERSISTENT):
        raise QemuUnsuitable(
            f"the QEMU at {qmp.path} has RAM outside its memory backend, which the emulator cannot reach: "
            f"{', '.join(map(str, volatile))}; start it with all of the guest's RAM in -m SIZE and without "
            "memory devices"
        )

    present = {}
    for cpu in await qmp.execute("query-cpus-fast"):
        apic_id = await qmp.execute("qom-get", {"path": cpu["qom-path"], "property": "apic-id"})
        present[int(cpu["cpu-index"])] = int(apic_id)
    if len(present) > 1 and {"-icount", "--icount"} & set(arguments):
        raise QemuUnsuitable(
            f"the QEMU at {qmp.path} runs {len(present)} vCPUs with -icount: they take turns in counted "
            "instructions, so that one that waits for the emulator stops the others, and the guest stalls; leave out "
            "-icount, or use -smp 1,maxcpus=2"
        )
    possible = await _possible_cpus(qmp)

    def absolute(path: str) -> str:
        return path if path.startswith("/") else str((process / "cwd").resolve() / path)

    return QemuFacts(
        pid=qmp.pid,
        version=f"{numbers['major']}.{numbers['minor']}.{numbers['micro']}",
        machine=machine.removesuffix("-machine"),
        name=name,
        running=bool(status["running"]),
        ram_path=Path(absolute(str(ram_path))),
        ram_size=size,
        ram_regions=layout,
        qtest_socket=absolute(qtest),
        gateway_socket=absolute(gateway),
        apic_ids=possible_apic_ids(present, *possible) if possible else tuple(present.values()),
        vcpus=max(present) + 1,
        memory_devices=devices,
        dbus_address=await _dbus_address(qmp),
        atomic=possible is None or len(possible[0]) != 1,
    )


_LEVELS = (
    ("socket-id", "sockets"),
    ("die-id", "dies"),
    ("module-id", "modules"),
    ("core-id", "cores"),
    ("thread-id", "threads"),
)
"""The levels of a processor's place, the highest first: its name in a place, and its number in ``/machine smp``."""


def possible_apic_ids(
    present: Mapping[int, int], places: Sequence[Mapping[str, int]], smp: Mapping[str, int]
) -> tuple[int, ...]:
    """Return the APIC ids of all vCPUs that can exist, by their numbers.

    ``present``: those of the vCPUs that exist, by number. An APIC id has a field of bits for each level of a
    processor's place. If that does not give the ids in ``present``, return these alone: a vCPU that is added later
    then has no VMBus.
    """
    ids = []
    for place in places:
        apic_id = 0
        for name, count in _LEVELS:
            width = (max(int(smp.get(count, 1)), 1) - 1).bit_length()
            apic_id = apic_id << width | int(place.get(name, 0))
        ids.append(apic_id)
    ids.sort()
    if any(index >= len(ids) or ids[index] != apic_id for index, apic_id in present.items()):
        _logger.warning(
            "this QEMU numbers its processors in an unknown way: vCPUs that are added while the guest runs cannot "
            "use VMBus; start QEMU with all of them (-smp N)"
        )
        return tuple(apic_id for _, apic_id in sorted(present.items()))
    return tuple(ids)


async def _possible_cpus(qmp: Qmp) -> tuple[list[dict[str, int]], dict[str, int]] | None:
    """Return the places of all vCPUs that can exist and the machine's ``smp``; None: the vCPUs are fixed."""
    try:
        slots = await qmp.execute("query-hotpluggable-cpus")
        smp = await qmp.execute("qom-get", {"path": "/machine", "property": "smp"})
    except QemuError:
        return None
    return [slot["props"] for slot in slots], smp


async def _dbus_address(qmp: Qmp) -> str | None:
    for found in await qmp.execute("qom-list", {"path": "/objects"}):
        if found["type"] == "child<dbus-vmstate>":
            path = f"/objects/{found['name']}"
            return str(await qmp.execute("qom-get", {"path": path, "property": "addr"}))
    return None
