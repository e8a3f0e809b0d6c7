"""The QEMU, and the gateway compiled for it."""

from __future__ import annotations

from pathlib import Path

import pytest
from vmbus.errors import MissingRequirement
from vmbus.machine.gateway import build as gateway_build
from vmbus.provision.qemu import find_qemu


@pytest.fixture(scope="session")
def qemu() -> list[str]:
    """The command that starts a suitable QEMU."""
    try:
        return list(find_qemu().argv_prefix)
    except MissingRequirement as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The compiled gateway."""
    try:
        return gateway_build.build(tmp_path_factory.mktemp("gateway"))
    except MissingRequirement as error:
        pytest.skip(str(error))
