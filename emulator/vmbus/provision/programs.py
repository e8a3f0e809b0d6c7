"""The interpreter and the libraries that a program from this machine needs to run in the guest.

They are read from the ELF files (``DT_NEEDED``, ``PT_INTERP``, ``DT_RUNPATH``, ``DT_RPATH``); nothing is run. What a
program loads later (``dlopen``: name services, plug-ins) is not found this way.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile

from vmbus.errors import UsageError, UserError

LIBRARY_FOLDER = "/lib/added"
"""The folder for libraries in the guest; its init sets LD_LIBRARY_PATH to it."""

_SYSTEM_FOLDERS = (
    "/lib/x86_64-linux-gnu",
    "/usr/lib/x86_64-linux-gnu",
    "/lib64",
    "/usr/lib64",
    "/lib",
    "/usr/lib",
    "/usr/local/lib",
)


def is_program(path: Path) -> bool:
    """Return whether ``path`` is executable and an ELF file or a script (some mounts mark all files executable)."""
    try:
        with path.open("rb") as file:
            return os.access(path, os.X_OK) and file.read(4).startswith((b"\x7fELF", b"#!"))
    except OSError:
        return False


def needed_libraries(programs: Iterable[Path]) -> dict[str, Path]:
    """Return path in the guest -> file here, of all libraries and interpreters of ``programs``.

    Raises :class:`UsageError` for a program of another processor, :class:`UserError` for a missing library.
    """
    found: dict[str, Path] = {}
    waiting = [(program, program) for program in programs]
    while waiting:
        file, program = waiting.pop()
        for place, path in _direct_needs(file, program):
            if place not in found:
                found[place] = path
                waiting.append((path, program))
    return found


def _direct_needs(file: Path, program: Path) -> Iterator[tuple[str, Path]]:
    try:
        with file.open("rb") as stream:
            if stream.read(4) != b"\x7fELF":
                return
            elf = ELFFile(stream)
            if elf["e_machine"] not in ("EM_X86_64", "EM_386"):
                raise UsageError(
                    f"{file} is a program for another processor ({elf['e_machine']}); the guest's is x86-64"
                )
            interpreter, needed, run_path = _dynamic(elf)
    except ELFError as error:
        raise UsageError(f"{file}: damaged ELF file: {error}") from error
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror}") from error
    if interpreter:
        path = Path(interpreter)
        if not path.is_file():
            raise UserError(
                f"{program} needs the interpreter {interpreter}, which is not on this machine: "
                "install it, or link the "
                "program statically"
            )
        yield interpreter, path
    folders = [
        Path(entry.replace("$ORIGIN", str(file.parent)).replace("${ORIGIN}", str(file.parent)))
        for entry in run_path
    ]
    folders += [Path(entry) for entry in (*_configured_folders(), *_SYSTEM_FOLDERS)]
    bits = elf.elfclass
    for name in needed:
        path_or_none = next((x for folder in folders if _is_class(x := folder / name, bits)), None)
        if path_or_none is None:
            raise UserError(
                f"{program} needs {name}, which is not on this machine: install it, or link the program statically"
            )
        if not name.startswith("ld-linux"):
            yield f"{LIBRARY_FOLDER}/{name}", path_or_none


def _dynamic(elf: Any) -> tuple[str, list[str], list[str]]:
    """Return interpreter, DT_NEEDED and run path of an open ELF file."""
    interpreter = ""
    needed: list[str] = []
    run_path: list[str] = []
    for segment in elf.iter_segments():
        if segment["p_type"] == "PT_INTERP":
            interpreter = segment.get_interp_name()
        elif segment["p_type"] == "PT_DYNAMIC":
            for tag in segment.iter_tags():
                if tag.entry.d_tag == "DT_NEEDED":
                    needed.append(tag.needed)
                elif tag.entry.d_tag == "DT_RUNPATH":
                    run_path += tag.runpath.split(":")
                elif tag.entry.d_tag == "DT_RPATH":
                    run_path += tag.rpath.split(":")
    return interpreter, needed, run_path


def _is_class(path: Path, bits: int) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(5) == b"\x7fELF" + bytes([1 if bits == 32 else 2])
    except OSError:
        return False


def _configured_folders() -> list[str]:
    folders = []
    for path in sorted(Path("/etc/ld.so.conf.d").glob("*.conf")):
        try:
            lines = path.read_text(errors="replace").splitlines()
        except OSError:
            continue
        folders += [line.strip() for line in lines if re.match(r"\s*/", line)]
    return folders
