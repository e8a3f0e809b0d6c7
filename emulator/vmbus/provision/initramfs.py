"""The initramfs of the embedded guest: busybox, an init program, kernel modules, the user's files, one command.

The archive is not compressed, because under TCG a guest needs longer to inflate it than QEMU to copy it. Images are
kept in the cache, named by a hash of their inputs.
"""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import shlex
import subprocess
import time
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path

from vmbus.errors import MissingRequirement, UsageError, UserError
from vmbus.provision import cache, programs
from vmbus.provision.cpio import CpioWriter
from vmbus.provision.kernel import GuestKernel, find_busybox, is_32_bit
from vmbus.provision.modules import Module, ModuleTree, canonical, read_image

KERNEL_ARGUMENTS = ("console=ttyS0", "panic=-1", "random.trust_cpu=on", "cryptomgr.notests")
"""Arguments for the embedded guest's kernel.

``panic=-1`` reboots at once (see ``-no-reboot``); without the crypto self-tests it boots about 0.4 s sooner.
"""

ROOT_MODULES = ("crc32c_generic", "ext4")
"""Modules that are loaded for a root file system on a disk, if the kernel has them as modules."""

ROOT_VIEW = "/run/initramfs"
"""The folder in which a command in a root file system finds the files of the initramfs."""

_FORMAT = 1
_KEPT_IMAGES = 16
_SYSTEM_FILES = {
    "/etc/passwd": "root::0:0:root:/root:/bin/sh\n",
    "/etc/group": "root:x:0:\n",
    "/etc/hostname": "vmbus-guest\n",
}
_INIT = resources.files("vmbus.provision").joinpath("guest-init")


def parse_add(argument: str) -> tuple[Path, str]:
    """Return the file and its path in the guest of ``--add FILE[:PATH]``.

    Without PATH a program goes to ``/bin``, any other file to ``/root``.

    Raises :class:`UsageError` if there is no such file.
    """
    name, _, place = argument.rpartition(":") if ":" in argument else (argument, "", "")
    if ":" in argument and not Path(name).is_file() and Path(argument).is_file():
        name, place = argument, ""
    path = Path(name)
    if not path.is_file():
        raise UsageError(f"--add {argument}: there is no file {name}")
    if not place:
        place = f"/bin/{path.name}" if programs.is_program(path) else f"/root/{path.name}"
    elif place.endswith("/"):
        place += path.name
    if not place.startswith("/"):
        raise UsageError(f"--add {argument}: {place} is not an absolute path in the guest")
    return path, place


def command_script(
    command: Sequence[str], add: Sequence[tuple[Path, str]] = (), *, in_root: bool = False
) -> str:
    """Return the shell script that runs ``command``: its words unchanged, or one word with blanks as a shell line.

    A program in ``add`` takes precedence over a busybox applet of its name (the shell would choose the applet).
    ``in_root``: the command runs in a root file system, which has the initramfs at :data:`ROOT_VIEW`.
    """
    if not command:
        raise UsageError("the command to run in the guest is empty: give one after --")
    if len(command) == 1 and any(character.isspace() for character in command[0]):
        return command[0] + "\n"
    view = ROOT_VIEW if in_root else ""
    places = {posixpath.basename(place): view + place for path, place in add if programs.is_program(path)}
    return f"exec {shlex.join([places.get(command[0], command[0]), *command[1:]])}\n"


def build_initramfs(
    kernel: GuestKernel,
    *,
    modules: Sequence[str] = (),
    available: Sequence[str] = (),
    add: Sequence[tuple[Path, str]] = (),
    command: Sequence[str] | None = None,
    stdin: bytes | None = None,
    terminal: bool = False,
    shell: bool = False,
    in_root: bool = False,
    folder: Path | None = None,
) -> Path:
    """Return the initramfs image for ``kernel``; build it unless the cache ``folder`` has it.

    ``modules`` are loaded at start, with their dependencies; ``available`` ones can be loaded with ``modprobe``.
    ``add`` are (file here, path in the guest); the libraries of dynamically linked programs are added too.
    ``command`` is run with ``stdin`` as its input, and its status is reported
    (:mod:`vmbus.provision.command_output`); with ``terminal`` the second serial port is its terminal. Without a
    command the guest waits to be shut down. ``shell``: start a shell on the console. ``in_root``: the kernel's
    command line has a ``root=``; the command runs there.

    Raises :class:`UsageError`, :class:`MissingRequirement`, :class:`~vmbus.provision.modules.ModuleError`.
    """
    folder = folder or cache.cache_folder()
    if is_32_bit(kernel.vmlinuz):
        raise UsageError(
            f"{kernel.vmlinuz} is a 32-bit kernel, and the embedded initramfs has 64-bit programs: give an initramfs "
            "of your own with --initrd, or a 64-bit kernel"
        )
    busybox = find_busybox(folder)
    loaded, present = _modules(kernel, modules, available)
    libraries = programs.needed_libraries(path for path, _ in add)
    inputs = [busybox, *(path for path, _ in add), *libraries.values()]
    inputs += [module.path for module in present if module.path is not None]
    key = _key(
        kernel.release,
        inputs,
        hashlib.sha256(_INIT.read_bytes()).hexdigest(),
        [place for _, place in add],
        sorted(libraries),
        [module.name for module in loaded],
        list(command) if command is not None else None,
        hashlib.sha256(stdin).hexdigest() if stdin is not None else None,
        terminal,
        shell,
        in_root,
    )
    image = folder / "initramfs" / f"{key}.cpio"
    if image.is_file():
        os.utime(image)
        return image
    writer = CpioWriter()
    # The user's files first: they may replace an applet.
    for path, place in add:
        writer.file(place, _content(path), 0o755 if os.access(path, os.X_OK) else 0o644)
    for place, path in sorted(libraries.items()):
        if place not in writer:
            writer.file(place, _content(path), 0o755)
    _base_system(writer, busybox)
    _write_modules(writer, kernel.release, loaded, present)
    if command is not None:
        script = command_script(command, add, in_root=in_root)
        writer.file("/etc/vmbus-command", os.fsencode(script))  # words as they came, in any encoding
    if stdin is not None:
        writer.file("/etc/vmbus-input", stdin)
    if terminal:
        writer.file("/etc/vmbus-terminal", b"")
    if shell:
        writer.file("/etc/vmbus-shell", b"")
    cache.write_atomically(image, writer.finish())
    _prune(image.parent)
    return image


def _modules(
    kernel: GuestKernel, modules: Sequence[str], available: Sequence[str]
) -> tuple[tuple[Module, ...], tuple[Module, ...]]:
    """Return the modules to load, in this order, and those to be present."""
    if not modules and not available:
        return (), ()
    if kernel.modules is None:
        raise MissingRequirement(
            f"the kernel {kernel.release} was given without modules, which the devices need: add --modules DIR"
        )
    tree = ModuleTree(kernel.modules)
    loaded = tree.load_order(modules)
    for module in loaded:
        release = module.vermagic.split(" ", 1)[0]
        if release and kernel.release != "unknown" and release != kernel.release:
            raise UserError(
                f"{module.path} is for kernel {release}, but the guest's is {kernel.release}: give "
                "its modules with --modules"
            )
    return loaded, tree.load_order([*modules, *available])


def _base_system(writer: CpioWriter, busybox: Path) -> None:
    for name in ("dev", "proc", "sys", "run", "tmp", "root", "mnt", "var", "etc", "usr/bin", "usr/sbin"):
        writer.folder(name)
    # Linux opens /dev/console before init can mount anything.
    writer.device("/dev/console", "c", 5, 1)
    writer.device("/dev/null", "c", 1, 3, 0o666)
    writer.file("/init", _INIT.read_bytes(), 0o755)
    writer.file("/bin/busybox", busybox.read_bytes(), 0o755)
    for applet in _applets(busybox):
        if applet not in writer:
            writer.link(applet, "/bin/busybox")
    for path, text in _SYSTEM_FILES.items():
        if path not in writer:
            writer.file(path, text.encode())


def _applets(busybox: Path) -> list[str]:
    try:
        done = subprocess.run(
            [busybox, "--list-full"], capture_output=True, text=True, check=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise MissingRequirement(
            f"{busybox} does not run on this machine: {error}; fetch it again with `vmbus setup --update`"
        ) from error
    return sorted(set(done.stdout.split()) - {"init", "linuxrc", "bin/busybox"})


def _write_modules(
    writer: CpioWriter, release: str, loaded: Sequence[Module], present: Sequence[Module]
) -> None:
    base = f"/lib/modules/{release}"
    writer.folder(base)
    places = {module.name: f"kernel/{module.name}.ko" for module in present}
    dependencies, aliases = [], []
    for module in present:
        if module.path is not None:
            writer.file(f"{base}/{places[module.name]}", read_image(module.path))
        needs = [places[name] for name in _all_needed(module, present)]
        dependencies.append(f"{places[module.name]}: {' '.join(needs)}".rstrip())
        aliases += [f"alias {alias} {module.name}" for alias in module.aliases]
    writer.file(f"{base}/modules.dep", "".join(f"{line}\n" for line in dependencies).encode())
    writer.file(f"{base}/modules.alias", "".join(f"{line}\n" for line in aliases).encode())
    order = "".join(f"{base}/{places[module.name]}\n" for module in loaded)
    writer.file("/etc/vmbus-modules", order.encode())


def _all_needed(module: Module, present: Sequence[Module]) -> list[str]:
    """Return the modules to load before ``module``; the one to load first is last (as in modules.dep)."""
    by_name = {other.name: other for other in present}
    found: list[str] = []
    waiting = list(module.depends)
    while waiting:
        name = canonical(waiting.pop(0))
        if name in by_name:
            if name in found:
                found.remove(name)
            found.append(name)
            waiting += by_name[name].depends
    return found


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error


def _key(release: str, inputs: Iterable[Path], *rest: object) -> str:
    described = [_FORMAT, release, rest]
    for path in inputs:
        state = path.stat()
        described.append([str(path), state.st_size, state.st_mtime_ns, state.st_mode])
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:32]


def _prune(folder: Path) -> None:
    """Keep the images that were used last, and any image that may be about to be started."""
    images = sorted(folder.glob("*.cpio"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in images[_KEPT_IMAGES:]:
        if time.time() - path.stat().st_mtime > 3600:
            path.unlink(missing_ok=True)
