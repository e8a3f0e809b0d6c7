"""The options that a QEMU needs for the emulator: one list, three forms.

``vmbus qemu-args`` prints them for a command line, as a ``-readconfig`` fragment, or as libvirt's
``<qemu:commandline>``; ``vmbus run`` starts its own QEMU with the same list, and the files in ``qemu-config/``
are made from it, too. Some options have no ``-readconfig`` form in QEMU; they stay on the command line.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import quoteattr

from vmbus.errors import UsageError
from vmbus.machine.migration.vmstate import HELPER_ID, dbus_address


def escape(value: str | Path) -> str:
    """Return a value for a QEMU option list: commas are doubled."""
    return str(value).replace(",", ",,")


@dataclass(frozen=True, slots=True)
class Option:
    """One QEMU option. ``section`` is its ``-readconfig`` section where QEMU knows one."""

    name: str
    first: str  # the part before the first comma: "tcg", "unix:/path"; may be empty
    values: tuple[tuple[str, str], ...] = ()
    section: str | None = None
    why: str = ""

    @property
    def argv(self) -> tuple[str, str]:
        listed = [escape(self.first)] if self.first else []
        listed += [f"{key}={escape(value)}" for key, value in self.values]
        return f"-{self.name}", ",".join(listed)

    @property
    def config(self) -> str:
        """Return the ``-readconfig`` section, with the reason as a comment."""
        lines = [f"# {self.why}"] if self.why else []
        lines.append(f"[{self.section}]")
        for key, value in self.values:
            if key != "id":
                escaped = value.replace("\\", "\\\\").replace('"', '\\"')
                lines.append(f'  {key} = "{escaped}"')
        return "\n".join(lines) + "\n"


@dataclass(frozen=True, slots=True)
class EmulatorOptions:
    """Paths and sizes in the options. Sizes in bytes."""

    memory_path: Path
    memory_size: int
    gateway_library: Path
    gateway_socket: Path
    qtest_socket: Path
    qmp_socket: Path
    acpi_table: Path
    wait: bool = True
    dbus_socket: Path | None = None
    """Socket of the D-Bus daemon that carries the emulator's state; ``None``: the guest cannot be migrated."""

    def options(self) -> tuple[Option, ...]:
        """Return the options. Raises :class:`~vmbus.errors.UsageError` for a path that QEMU has no form for."""
        if ":" in str(self.acpi_table):
            raise UsageError(
                f"{self.acpi_table}: QEMU takes a colon here for the end of a file name; use a folder without one"
            )
        mebibytes = self.memory_size >> 20
        return (
            Option("accel", "tcg", why="the gateway is a TCG plug-in"),
            Option(
                "object",
                "memory-backend-file",
                (
                    ("id", "vmbus-ram"),
                    ("mem-path", str(self.memory_path)),
                    ("share", "on"),
                    ("size", f"{mebibytes}M"),
                ),
                why="guest RAM is in a file that the emulator maps, too",
            ),
            Option(
                "machine",
                "",
                (("memory-backend", "vmbus-ram"),),
                section="machine",
                why="use the memory backend vmbus-ram for guest RAM",
            ),
            Option(
                "m",
                "",
                (("size", f"{mebibytes}M"),),
                section="memory",
                why="RAM size, equal to that of vmbus-ram",
            ),
            Option(
                "chardev",
                "socket",
                (("id", "vmbus-qmp"), ("path", str(self.qmp_socket)), ("server", "on"), ("wait", "off")),
                section='chardev "vmbus-qmp"',
                why="QMP socket for the emulator only: a monitor serves one client",
            ),
            Option(
                "object",
                "monitor-qmp",
                (("id", "vmbus-mon"), ("chardev", "vmbus-qmp")),
                why="QMP on that socket",
            ),
            Option(
                "qtest",
                f"unix:{self.qtest_socket}",
                (("server", "on"), ("wait", "off")),
                why="the emulator raises interrupts through qtest",
            ),
            Option("qtest-log", "none"),
            Option(
                "acpitable",
                "",
                (("file", str(self.acpi_table)),),
                why="ACPI device by which the guest finds VMBus",
            ),
            Option(
                "plugin",
                str(self.gateway_library),
                (("socket", str(self.gateway_socket)), ("wait", "on" if self.wait else "off")),
                why="passes traps of the guest to the emulator",
            ),
            *self._state_options(),
        )

    def _state_options(self) -> tuple[Option, ...]:
        if self.dbus_socket is None:
            return ()
        return (
            Option(
                "object",
                "dbus-vmstate",
                (
                    ("id", "vmbus-state"),
                    ("addr", dbus_address(self.dbus_socket)),
                    ("id-list", HELPER_ID),
                ),
                why="carries the emulator's state in migrations and snapshots",
            ),
        )

    def argv(self) -> list[str]:
        return [word for option in self.options() for word in option.argv]


def readconfig(options: Sequence[Option]) -> tuple[str, list[str]]:
    """Return ``(text of the fragment, options that stay on the command line)``."""
    sections = [_config_section(option) for option in options]
    text = "\n".join(section for section in sections if section is not None)
    rest = [
        word
        for option, section in zip(options, sections, strict=True)
        if section is None
        for word in option.argv
    ]
    return text, rest


def _config_section(option: Option) -> str | None:
    if option.section is None:
        return None
    if option.name == "chardev":
        return Option(
            option.name, "", (("backend", option.first), *option.values), option.section, option.why
        ).config
    return option.config


def libvirt(options: Iterable[Option]) -> str:
    """Return a ``<qemu:commandline>`` element; the domain needs ``xmlns:qemu`` as the comment in it says."""
    lines = [
        "<!-- inside <domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'> -->",
        "<qemu:commandline>",
    ]
    for option in options:
        for word in option.argv:
            lines.append(f"  <qemu:arg value={quoteattr(word)}/>")
    lines.append("</qemu:commandline>")
    return "\n".join(lines) + "\n"
