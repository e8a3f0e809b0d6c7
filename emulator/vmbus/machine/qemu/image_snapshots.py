"""Internal snapshots of a qcow2 image that no other process has open for writing.

They are made and deleted by a storage daemon, over QMP, which has no command to put one back. ``qemu-img`` does that,
under the same limits and QEMU's locks, and opens nothing but the image itself.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
from collections.abc import Mapping, Sequence

from vmbus.bus.io.snapshots import DiskSnapshot
from vmbus.errors import DeviceError
from vmbus.machine.qemu import confined
from vmbus.machine.qemu.child import in_child
from vmbus.machine.qemu.image_files import Image, check_names, file_node
from vmbus.machine.qemu.qcow2 import CannotLook, read_entries, read_header

TIMEOUT = 300.0
"""Seconds to make, put back or delete a snapshot of one image: its tables are read and written, not its data."""


def read_snapshots(image: Image) -> list[DiskSnapshot]:
    """Return the snapshots of ``image``, which may be open elsewhere.

    Raises :class:`~vmbus.errors.DeviceError` if they cannot be read.
    """
    try:
        with image.path.open("rb") as file:
            found = list(read_entries(file, read_header(file)))
    except (CannotLook, OSError, OverflowError, ValueError, struct.error) as error:
        raise DeviceError(f"the snapshots of {image.path} cannot be read: {error}") from error
    return [DiskSnapshot(each.name.decode(errors="replace"), each.disk_size) for each in found]


def put_back(program: Sequence[str], environment: Mapping[str, str], image: Image, name: str) -> None:
    """Put ``image`` back to its snapshot ``name``; ``program``: command line prefix of ``qemu-img``.

    Raises :class:`~vmbus.errors.DeviceError`. Then the image is as before, unless ``qemu-img`` was killed.
    """
    try:
        check_names(image.path, image.format)
        node = {
            "driver": image.format,
            "file": file_node(image.path, image, read_only=False),
            "backing": None,
        }
    except OSError as error:
        raise DeviceError(f"{image.path}: {error.strerror}") from error
    with in_child(confined.storage_daemon(program, image)) as prepare:
        try:
            done = subprocess.run(
                [*program, "snapshot", "-q", "-a", name, f"json:{json.dumps(node)}"],
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
                timeout=TIMEOUT,
                preexec_fn=prepare,
            )
        except subprocess.TimeoutExpired:
            raise DeviceError(f"qemu-img did not put {image.path} back within {TIMEOUT:g} s") from None
        except (OSError, subprocess.SubprocessError) as error:
            raise DeviceError(f"qemu-img cannot be started: {error}") from error
    if done.returncode:
        raise DeviceError(" ".join(done.stderr.split()) or f"qemu-img ended with status {done.returncode}")
