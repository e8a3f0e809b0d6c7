"""A kernel's modules: what they are, what they need, and which VMBus devices they drive.

All of it is read from the modules (their ``.modinfo`` section), because a folder that was only unpacked has neither
``modules.dep`` nor ``modules.alias``. Drivers that are linked into the kernel are listed in ``modules.builtin`` and
``modules.builtin.modinfo``.

A VMBus driver's alias is ``vmbus:`` and the interface type GUID's 16 bytes as they are on the wire, in hexadecimal
(docs/protocol/messages.md#interface-guids; the wire form has the first three groups little-endian).
"""

from __future__ import annotations

import difflib
import io
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import zstandard
from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile

from vmbus.errors import UserError

_SUFFIX = re.compile(r"\.ko(\.(xz|zst|gz))?$")
_LIKELY_DRIVER = re.compile(r"(^|_)(hv|hyperv|vmbus)(_|$)")
_LIKELY_FOLDERS = ("drivers/hv/", "drivers/net/hyperv/", "drivers/gpu/drm/hyperv/")
_FOREIGN_FOLDERS = ("updates", "extra", "misc")


class ModuleError(UserError):
    """A module file that cannot be used; the message says which and why."""


@dataclass(frozen=True, slots=True)
class Module:
    """One kernel module; ``path`` is None if it is linked into the kernel. Names have underscores."""

    name: str
    path: Path | None
    depends: tuple[str, ...] = ()
    soft_before: tuple[str, ...] = ()
    soft_after: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    vermagic: str = ""

    @property
    def builtin(self) -> bool:
        return self.path is None


def canonical(name: str) -> str:
    """Return the kernel's name of a module, from its file name or from what a user typed."""
    return _SUFFIX.sub("", name).replace("-", "_")


def read_image(path: Path) -> bytes:
    """Return the module's ELF file, decompressed. Raises :class:`ModuleError`, :class:`MissingRequirement`."""
    decompress = _DECOMPRESSORS.get(path.suffix)
    try:
        data = path.read_bytes()
        return decompress(data) if decompress is not None else data
    except (OSError, EOFError, lzma.LZMAError, zlib.error, ValueError) as error:
        raise ModuleError(f"{path}: cannot be read: {error}") from error


def read_module(path: Path) -> Module:
    """Return what the ``.modinfo`` section of a ``.ko``, ``.ko.xz``, ``.ko.zst`` or ``.ko.gz`` says."""
    try:
        section = ELFFile(io.BytesIO(read_image(path))).get_section_by_name(".modinfo")
        if section is None:
            raise ModuleError(f"{path}: is not a kernel module (it has no .modinfo section)")
        data = bytes(section.data())
    except ELFError as error:
        raise ModuleError(f"{path}: is not a kernel module: {error}") from error
    pairs = [entry.partition("=")[::2] for entry in data.decode("utf-8", "replace").split("\0") if entry]
    return _from_pairs(canonical(path.name), path, pairs)


def _from_pairs(name: str, path: Path | None, pairs: Iterable[Sequence[str]]) -> Module:
    depends: list[str] = []
    before: list[str] = []
    after: list[str] = []
    aliases: list[str] = []
    vermagic = ""
    for key, value in pairs:
        if key == "name":
            name = canonical(value)
        elif key == "depends":
            depends += [canonical(word) for word in value.split(",") if word]
        elif key == "softdep":
            target = before
            for word in value.split():
                if word in ("pre:", "post:"):
                    target = before if word == "pre:" else after
                else:
                    target.append(canonical(word))
        elif key == "alias":
            aliases.append(value)
        elif key == "vermagic":
            vermagic = value
    return Module(name, path, tuple(depends), tuple(before), tuple(after), tuple(aliases), vermagic)


@dataclass
class ModuleTree:
    """The modules of one kernel: ``folder`` is ``.../lib/modules/RELEASE``. Files are read on demand."""

    folder: Path
    _read: dict[str, Module] = field(default_factory=dict, repr=False)

    @cached_property
    def files(self) -> dict[str, Path]:
        """Module name -> file, of all loadable modules. ``updates`` and ``extra`` take precedence, as for depmod."""
        found: dict[str, Path] = {}
        for base, folders, names in os.walk(self.folder):
            folders[:] = sorted(folder for folder in folders if folder not in ("build", "source"))
            for name in names:
                if _SUFFIX.search(name):
                    path = Path(base, name)
                    key = canonical(name)
                    if key not in found or path.relative_to(self.folder).parts[0] in _FOREIGN_FOLDERS:
                        found[key] = path
        return found

    @cached_property
    def builtins(self) -> dict[str, Module]:
        """Module name -> :class:`Module`, of those that are linked into the kernel."""
        pairs: dict[str, list[tuple[str, str]]] = {}
        for line in self._text("modules.builtin").splitlines():
            pairs[canonical(Path(line.strip()).name)] = []
        for entry in self._text("modules.builtin.modinfo").split("\0"):
            name, _, rest = entry.partition(".")
            key, equals, value = rest.partition("=")
            if equals and canonical(name) in pairs:
                pairs[canonical(name)].append((key, value))
        return {name: _from_pairs(name, None, found) for name, found in pairs.items()}

    def module(self, name: str) -> Module:
        """Return the module called ``name``. Raises :class:`ModuleError` if this kernel has none."""
        key = canonical(name)
        if key not in self._read:
            if key in self.builtins:
                self._read[key] = self.builtins[key]
            elif key in self.files:
                self._read[key] = read_module(self.files[key])
            else:
                near = difflib.get_close_matches(key, [*self.files, *self.builtins], n=3)
                hint = f"; did you mean {', '.join(near)}?" if near else ""
                raise ModuleError(f"there is no module {name} in {self.folder}{hint}")
        return self._read[key]

    def has(self, name: str) -> bool:
        return canonical(name) in self.builtins or canonical(name) in self.files

    def named(self, name: str) -> tuple[str, ...]:
        """Return the modules that a soft dependency on ``name`` means: that module, or those with such an alias.

        Of several, only the generic one: the others need a processor that has them. None if this kernel has none.
        """
        key = canonical(name)
        if self.has(key):
            return (key,)
        if any(key in map(canonical, module.aliases) for module in self.builtins.values()):
            return ()
        found = self._aliased.get(key, ())
        generic = tuple(each for each in found if each.endswith("_generic"))
        return generic[:1] or found

    @cached_property
    def _aliased(self) -> dict[str, tuple[str, ...]]:
        """Alias -> loadable modules, from ``modules.alias`` if depmod has run, else from the modules of algorithms.

        Only algorithms are named by aliases in soft dependencies; to read all modules takes half a minute.
        """
        pairs = re.findall(r"^alias ([^\s*?[]+) (\S+)$", self._text("modules.alias"), re.MULTILINE)
        if not pairs:
            names = [
                name
                for name, path in self.files.items()
                if {"crypto", "lib"} & set(path.relative_to(self.folder).parts[:-1])
            ]
            pairs = [(alias, name) for name in names for alias in self.module(name).aliases]
        found: dict[str, list[str]] = {}
        for alias, name in pairs:
            if self.has(name) and canonical(name) not in found.setdefault(canonical(alias), []):
                found[canonical(alias)].append(canonical(name))
        return {alias: tuple(sorted(names)) for alias, names in found.items()}

    def load_order(self, names: Iterable[str]) -> tuple[Module, ...]:
        """Return the loadable modules among ``names`` and all their dependencies, each after what it needs.

        Modules that are linked in need no loading and are left out. Raises :class:`ModuleError` for a missing module,
        and for dependencies in a circle.
        """
        order: dict[str, Module] = {}
        path: list[str] = []

        def visit(name: str) -> None:
            key = canonical(name)
            if key in order:
                return
            if key in path:
                raise ModuleError(f"modules depend on each other in a circle: {' -> '.join([*path, key])}")
            module = self.module(key)
            path.append(key)
            for other in module.depends:
                visit(other)
            visit_soft(module.soft_before)
            path.pop()
            order[key] = module
            visit_soft(module.soft_after)

        def visit_soft(names: Iterable[str]) -> None:
            for name in names:
                for other in self.named(name):
                    if other not in path:
                        visit(other)

        for name in names:
            visit(name)
        return tuple(module for module in order.values() if not module.builtin)

    def likely_drivers(self) -> tuple[Module, ...]:
        """Return every module that may drive a VMBus device, loadable or linked in.

        They are found by name and folder, by ``modules.alias`` if depmod has run, and all modules that were added to
        the kernel's own are among them.
        """
        names = {name for name in [*self.files, *self.builtins] if _LIKELY_DRIVER.search(name)}
        for name, path in self.files.items():
            inside = path.relative_to(self.folder)
            if inside.parts[0] in _FOREIGN_FOLDERS or any(part in f"{inside}" for part in _LIKELY_FOLDERS):
                names.add(name)
        hint = re.compile(r"^alias vmbus:\S+ (\S+)$", re.MULTILINE)
        names |= {canonical(name) for name in hint.findall(self._text("modules.alias")) if self.has(name)}
        names |= {name for name, module in self.builtins.items() if _vmbus_aliases(module)}
        return tuple(self.module(name) for name in sorted(names))

    def _text(self, name: str) -> str:
        try:
            return (self.folder / name).read_text(errors="replace")
        except OSError:
            return ""


def _vmbus_aliases(module: Module) -> list[str]:
    return [alias[6:38] for alias in module.aliases if re.match(r"vmbus:[0-9a-fA-F]{32}", alias)]


def vmbus_interfaces(module: Module) -> tuple[bytes, ...]:
    """Return the interface type GUIDs, 16 wire bytes each, that a module declares to drive."""
    return tuple(bytes.fromhex(alias) for alias in _vmbus_aliases(module))


def _decompress_zstd(data: bytes) -> bytes:
    try:
        return zstandard.ZstdDecompressor().decompressobj().decompress(data)
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from error


_DECOMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    ".xz": lzma.decompress,
    ".zst": _decompress_zstd,
    ".gz": lambda data: zlib.decompress(data, wbits=31),
}
