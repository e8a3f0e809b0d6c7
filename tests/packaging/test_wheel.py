"""What a user gets from ``pip install``: commands and devices that need no source tree."""

from __future__ import annotations

import json
import re
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.packaging.conftest import Environment

VERBS = (
    *("doctor", "setup", "run", "attach", "qemu-args", "status", "device", "cont", "shutdown"),
    *("migrate", "snapshot", "guest-info", "demo"),
)
RESOURCES = """
import os, sys
from pathlib import Path
import vmbus, vmbus_devices
from vmbus.devices.registry import Registry
from vmbus.machine.engine import build as engine_build
from vmbus.machine.gateway import build as gateway_build
from vmbus.provision import initramfs, system_disk
print(os.path.dirname(vmbus.__file__), os.path.dirname(vmbus_devices.__file__))
assert initramfs._INIT.read_bytes().startswith(b"#!"), initramfs._INIT
assert system_disk._HOOK.read_bytes().startswith(b"#!"), system_disk._HOOK
for library in (gateway_build.LIBRARY, engine_build.LIBRARY, *Registry().native_libraries()):
    built = library.build(Path(sys.argv[1]))
    print(built.name, built.stat().st_size > 0)
"""
HELP = """
import contextlib, sys
from vmbus.cli import main
for verb in sys.argv[1:]:
    with contextlib.suppress(SystemExit):
        main([verb, "--help"])
"""
INSTANCE = "0b0a7f6e-2a53-4c57-9d6b-5f2b8c1f7a02"


def members(path: Path) -> set[str]:
    """The files in a source distribution or a wheel."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as archive:
            return set(archive.namelist())
    with tarfile.open(path) as archive:
        return {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}


def test_the_sdist_has_what_a_developer_needs(sdist: Path) -> None:
    found = members(sdist)
    wanted = {
        *("CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md", "SECURITY.md", "mkdocs.yml"),
        *("docs/api.md", "docs/devices.md", "examples/adder/pyproject.toml", "qemu-config/vmbus.asl"),
        *("tests/packaging/test_wheel.py", "tests/guest/programs/echo_client.c", ".ci/run"),
        *("emulator/vmbus/provision/bootstrap.sh", "emulator/vmbus/machine/gateway/plugin/COPYING"),
    }
    assert wanted - found == set()
    assert [name for name in found if "__pycache__" in name or name.endswith((".so", ".o", ".pyc"))] == []


def test_the_wheel_has_no_generic_names(wheel: Path) -> None:
    top = {name.partition("/")[0] for name in members(wheel)}
    assert {name for name in top if not name.endswith(".dist-info")} == {"vmbus", "vmbus_devices"}


def test_site_packages_has_no_emulator_and_no_device(installed: Environment) -> None:
    found = {path.name for path in installed.site_packages.iterdir()}
    assert {"vmbus", "vmbus_devices"} <= found
    assert found & {"emulator", "device", "tests", "docs", "examples"} == set()


def test_type_checkers_see_the_annotations(wheel: Path) -> None:
    assert {"vmbus/py.typed", "vmbus_devices/py.typed"} <= members(wheel)


def test_both_licences_are_in_the_wheel(wheel: Path) -> None:
    names = [name.rpartition("/")[2] for name in members(wheel) if ".dist-info/licenses/" in name]
    assert sorted(names) == ["COPYING", "LICENSE"]


def test_the_command_is_there(installed: Environment) -> None:
    assert installed.run("vmbus", "--help").stdout.startswith("usage: vmbus ")
    assert installed.run("python", "-m", "vmbus", "--version").stdout.startswith("vmbus ")
    shown = installed.python(HELP, *VERBS)
    assert [verb for verb in VERBS if f"usage: vmbus {verb} " not in shown] == []


def test_every_device_is_found_by_its_entry_point(installed: Environment) -> None:
    listed = installed.run("vmbus", "run", "--device", "help").stdout
    assert {"heartbeat", "shutdown", "timesync", "echo", "scsi"} <= set(
        re.findall(r"^(\w+) ", listed, re.MULTILINE)
    )
    assert "(broken" not in listed
    assert "image=<text>" in installed.run("vmbus", "run", "--device", "scsi,help").stdout


def test_doctor_looks_without_a_source_tree(installed: Environment, tmp_path: Path) -> None:
    """An empty cache has neither QEMU nor guest, so the exit status is that of a machine that lacks something."""
    done = installed.run("vmbus", "doctor", "--json", variables={"VMBUS_CACHE": str(tmp_path)}, status=1)
    checks = {check["name"]: check for check in json.loads(done.stdout)}
    assert checks["Python packages"]["state"] == "ok"
    assert checks["trap gateway"]["state"] == checks["fast path"]["state"] == "optional"


def test_resources_are_found_where_the_wheel_is_installed(installed: Environment, tmp_path: Path) -> None:
    where, *libraries = installed.python(RESOURCES, tmp_path).splitlines()
    assert where.split() == [str(installed.site_packages / name) for name in ("vmbus", "vmbus_devices")]
    assert [re.sub(r"-[0-9a-f]{16}\.so", "", line) for line in libraries] == [
        "vmbus-gateway True",
        "vmbus-engine True",
        "vmbus-fastpath True",
    ]


def test_resources_are_found_in_a_zip(installed: Environment, wheel: Path, tmp_path: Path) -> None:
    """A wheel is a zip that Python can import from; so are zipapps."""
    where, *libraries = installed.python(
        RESOURCES, tmp_path, variables={"PYTHONPATH": str(wheel)}
    ).splitlines()
    assert where.split() == [f"{wheel}/vmbus", f"{wheel}/vmbus_devices"]
    assert len(libraries) == 3


def test_the_example_package_is_found(with_adder: Environment) -> None:
    listed = with_adder.run("vmbus", "run", "--device", "help").stdout
    assert re.search(r"^adder +Adds up what the guest sends\.$", listed, re.MULTILINE)
    assert "start=<integer>" in with_adder.run("vmbus", "run", "--device", "adder,help").stdout
    script = "from vmbus.api import Registry; print(Registry().create('adder,start=5').status())"
    assert with_adder.python(script) == "{'sum': 5}\n"


@pytest.mark.guest
def test_a_guest_boots_and_sees_the_devices(with_adder: Environment) -> None:
    """The demo's first steps, from the wheel: boot, connect to VMBus, see the offers, one of them a third party's."""
    words = ["run", "--timeout", "180", "--device", "adder,start=5", "--", "ls", "/sys/bus/vmbus/devices"]
    seen = with_adder.run("vmbus", *words).stdout.split()
    assert INSTANCE in seen
    assert len(seen) == 4
