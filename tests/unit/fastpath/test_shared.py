"""The structures that C and Python share have one declaration, and both sides lay them out in the same way."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest
from vmbus import native
from vmbus.errors import MissingRequirement
from vmbus_devices.scsi.fast import shared
from vmbus_devices.scsi.fast.build import SOURCE, layout

SIZES = {"Region": 24, "Unit": 1120, "Shared": 286_936}
OFFSETS = {
    ("Unit", "max_transfer"): 20,
    ("Unit", "fua_flags"): 28,
    ("Unit", "queue"): 32,
    ("Unit", "reads"): 40,
    ("Unit", "depth"): 72,
    ("Unit", "buckets"): 96,
    ("Shared", "ram"): 8,
    ("Shared", "region"): 24,
    ("Shared", "unit"): 216,
}


def compile_text(folder: Path, text: str, header: str) -> int:
    """Return the compiler's exit status for ``text`` with ``header`` as layout.h."""
    (folder / "layout.h").write_text(header)
    (folder / "text.c").write_text(text)
    try:
        command = native.compiler()
    except MissingRequirement as error:
        pytest.skip(str(error))
    line = [command, "-std=c11", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-I", str(folder)]
    return subprocess.run([*line, str(folder / "text.c")], capture_output=True, check=False).returncode


def test_sizes_and_offsets_are_these() -> None:
    assert {each.__name__: ctypes.sizeof(each) for each in shared.STRUCTURES} == SIZES
    assert {(name, field): getattr(getattr(shared, name), field).offset for name, field in OFFSETS} == OFFSETS


def test_the_generated_header_compiles_by_itself(tmp_path: Path) -> None:
    assert compile_text(tmp_path, '#include "layout.h"\nstruct shared shared;\n', layout()) == 0


@pytest.mark.parametrize(
    ("old", "new"),
    [("    uint32_t fua_flags;\n", ""), ("int64_t delta;", "int32_t delta;"), ("unit[256]", "unit[255]")],
)
def test_a_header_with_another_layout_does_not_compile(tmp_path: Path, old: str, new: str) -> None:
    changed = layout().replace(old, new)
    assert changed != layout()
    assert compile_text(tmp_path, '#include "layout.h"\nstruct shared shared;\n', changed) != 0


@pytest.mark.parametrize("structure", [each.__name__.lower() for each in shared.STRUCTURES])
def test_no_shared_structure_is_declared_a_second_time(structure: str) -> None:
    for path in [*SOURCE.glob("*.c"), *SOURCE.glob("*.h")]:
        assert f"struct {structure} {{" not in path.read_text(), path.name


def test_a_completion_packet_fits_the_engine_s_place_for_it() -> None:
    from vmbus.wire import packet, storvsp

    assert packet.DESCRIPTOR_SIZE + storvsp.PACKET_SIZE <= 128
