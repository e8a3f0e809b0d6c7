"""The embedded guest's initramfs: what is in it for what was asked for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from vmbus.errors import MissingRequirement, UsageError, UserError
from vmbus.provision import cache
from vmbus.provision.initramfs import build_initramfs, command_script, parse_add
from vmbus.provision.kernel import GuestKernel

from tests.unit.provision.elf_writer import program
from tests.unit.provision.fake_programs import write_program
from tests.unit.provision.kernel_folder import RELEASE, KernelFolder
from tests.unit.provision.test_cpio import Entry, read_archive
from tests.unit.provision.test_kernel import bz_image


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A cache that has a busybox with three applets."""
    with cache.filling(tmp_path / "cache/busybox/1", {"busybox": "bin/busybox"}) as temporary:
        write_program(
            temporary / "bin/busybox", "printf 'bin/sh\\nbin/ls\\nsbin/poweroff\\nlinuxrc\\nbin/busybox\\n'"
        )
    return tmp_path / "cache"


@pytest.fixture
def modules(tmp_path: Path) -> KernelFolder:
    return KernelFolder(tmp_path)


@pytest.fixture
def kernel(tmp_path: Path, modules: KernelFolder) -> GuestKernel:
    return GuestKernel("own", RELEASE, tmp_path / "vmlinuz", modules.folder)


def contents(image: Path) -> dict[str, Entry]:
    return read_archive(image.read_bytes())


def test_the_base_system_boots_by_itself(kernel: GuestKernel, folder: Path) -> None:
    found = contents(build_initramfs(kernel, folder=folder))
    assert found["init"].data.startswith(b"#!/bin/sh")
    assert found["init"].mode & 0o111
    assert found["bin/sh"].data == b"/bin/busybox"
    assert found["sbin/poweroff"].data == b"/bin/busybox"
    assert found["dev/console"].device == (5, 1)
    assert found["etc/vmbus-modules"].data == b""
    assert "linuxrc" not in found
    assert "etc/vmbus-command" not in found


def test_a_command_in_a_root_file_system_finds_what_was_added(
    kernel: GuestKernel, folder: Path, tmp_path: Path
) -> None:
    added = write_program(tmp_path / "prog", "true")
    command = ["prog", "-x"]
    add = [(added, "/bin/prog")]
    found = contents(build_initramfs(kernel, add=add, command=command, in_root=True, folder=folder))
    assert found["etc/vmbus-command"].data == b"exec /run/initramfs/bin/prog -x\n"
    found = contents(build_initramfs(kernel, add=add, command=command, folder=folder))
    assert found["etc/vmbus-command"].data == b"exec /bin/prog -x\n"


def test_modules_are_listed_in_the_order_of_loading(
    kernel: GuestKernel, modules: KernelFolder, folder: Path
) -> None:
    modules.module("kernel/drivers/hv/hv_vmbus.ko")
    modules.module("kernel/drivers/hv/hv_utils.ko", "alias=vmbus:00", depends="hv_vmbus")
    modules.module("kernel/drivers/uio/uio.ko")
    found = contents(build_initramfs(kernel, modules=["hv_utils"], available=["uio"], folder=folder))
    base = f"lib/modules/{RELEASE}"
    assert found["etc/vmbus-modules"].data.decode().splitlines() == [
        f"/{base}/kernel/hv_vmbus.ko",
        f"/{base}/kernel/hv_utils.ko",
    ]
    assert found[f"{base}/modules.dep"].data.decode().splitlines() == [
        "kernel/hv_vmbus.ko:",
        "kernel/hv_utils.ko: kernel/hv_vmbus.ko",
        "kernel/uio.ko:",
    ]
    assert found[f"{base}/modules.alias"].data == b"alias vmbus:00 hv_utils\n"
    assert found[f"{base}/kernel/uio.ko"].data.startswith(b"\x7fELF")


def test_a_module_of_another_kernel_is_refused(
    kernel: GuestKernel, modules: KernelFolder, folder: Path
) -> None:
    modules.module("kernel/a.ko", release="5.0-other")
    with pytest.raises(UserError, match=rf"is for kernel 5\.0-other, but the guest's is {RELEASE}"):
        build_initramfs(kernel, modules=["a"], folder=folder)


def test_a_32_bit_kernel_is_refused_before_it_is_booted(folder: Path, tmp_path: Path) -> None:
    image = bz_image(tmp_path / "vmlinuz", load_flags=0)
    with pytest.raises(UsageError, match=r"32-bit kernel.*--initrd"):
        build_initramfs(GuestKernel("own", RELEASE, image, None), folder=folder)


def test_modules_for_a_kernel_without_any_are_refused(folder: Path, tmp_path: Path) -> None:
    bare = GuestKernel("own", RELEASE, tmp_path / "vmlinuz", None)
    with pytest.raises(MissingRequirement, match="--modules DIR"):
        build_initramfs(bare, modules=["hv_vmbus"], folder=folder)
    assert build_initramfs(bare, folder=folder).is_file()


def test_the_same_image_is_built_once(kernel: GuestKernel, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "data"
    file.write_text("one")
    first = build_initramfs(kernel, add=[(file, "/root/data")], folder=folder)
    built = first.stat().st_ino
    assert build_initramfs(kernel, add=[(file, "/root/data")], folder=folder) == first
    assert first.stat().st_ino == built
    file.write_text("three")
    assert build_initramfs(kernel, add=[(file, "/root/data")], folder=folder) != first


def test_every_option_makes_another_image(kernel: GuestKernel, folder: Path) -> None:
    images = [
        build_initramfs(kernel, folder=folder),
        build_initramfs(kernel, folder=folder, shell=True),
        build_initramfs(kernel, folder=folder, command=["true"]),
        build_initramfs(kernel, folder=folder, command=["true"], stdin=b"x"),
        build_initramfs(kernel, folder=folder, command=["true"], terminal=True),
    ]
    assert len(set(images)) == len(images)
    assert contents(images[3])["etc/vmbus-input"].data == b"x"


def test_a_program_brings_its_interpreter_and_libraries(
    kernel: GuestKernel, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "libdeep.so").write_bytes(program())
    (tmp_path / "libtool.so").write_bytes(program(needed=["libdeep.so"], run_path="$ORIGIN"))
    (tmp_path / "loader").write_bytes(b"\x7fELF")
    tool = tmp_path / "tool"
    tool.write_bytes(
        program(interpreter=str(tmp_path / "loader"), needed=["libtool.so"], run_path=str(tmp_path))
    )
    tool.chmod(0o755)
    (tmp_path / "loader").write_bytes(program())
    found = contents(build_initramfs(kernel, add=[parse_add(str(tool))], folder=folder))
    assert found["bin/tool"].mode & 0o111
    assert {"lib/added/libtool.so", "lib/added/libdeep.so", str(tmp_path / "loader")[1:]} <= set(found)


def test_a_library_that_is_nowhere_is_named(kernel: GuestKernel, folder: Path, tmp_path: Path) -> None:
    tool = tmp_path / "tool"
    tool.write_bytes(program(needed=["libnowhere.so.9"]))
    with pytest.raises(UserError, match=r"tool needs libnowhere\.so\.9"):
        build_initramfs(kernel, add=[(tool, "/bin/tool")], folder=folder)


def test_a_program_for_another_processor_is_refused(
    kernel: GuestKernel, folder: Path, tmp_path: Path
) -> None:
    tool = tmp_path / "tool"
    tool.write_bytes(program(machine=183))
    with pytest.raises(UsageError, match="another processor"):
        build_initramfs(kernel, add=[(tool, "/bin/tool")], folder=folder)


def test_a_user_s_program_stands_in_place_of_an_applet(
    kernel: GuestKernel, folder: Path, tmp_path: Path
) -> None:
    own = write_program(tmp_path / "ls", "echo mine")
    found = contents(build_initramfs(kernel, add=[parse_add(str(own))], command=["ls", "-l"], folder=folder))
    assert b"echo mine" in found["bin/ls"].data
    assert found["etc/vmbus-command"].data == b"exec /bin/ls -l\n"


def test_init_cannot_be_replaced_by_accident(kernel: GuestKernel, folder: Path, tmp_path: Path) -> None:
    own = write_program(tmp_path / "init", ":")
    with pytest.raises(UsageError, match="/init would be in the initramfs twice"):
        build_initramfs(kernel, add=[(own, "/init")], folder=folder)


def test_places_of_added_files(tmp_path: Path) -> None:
    tool = write_program(tmp_path / "tool", ":")
    data = tmp_path / "data.bin"
    data.write_bytes(b"x")
    data.chmod(0o755)  # as everything is on some mounted folders
    odd = tmp_path / "a:b"
    odd.write_bytes(b"x")
    assert parse_add(str(tool)) == (tool, "/bin/tool")
    assert parse_add(str(data)) == (data, "/root/data.bin")
    assert parse_add(f"{data}:/etc/conf") == (data, "/etc/conf")
    assert parse_add(f"{data}:/opt/") == (data, "/opt/data.bin")
    assert parse_add(str(odd)) == (odd, "/root/a:b")
    with pytest.raises(UsageError, match="not an absolute path"):
        parse_add(f"{data}:etc")
    with pytest.raises(UsageError, match="there is no file"):
        parse_add(str(tmp_path / "nothing"))


def test_a_command_s_words_stay_words_and_one_word_with_blanks_is_a_shell_line() -> None:
    assert command_script(["echo", "a b", "$HOME"]) == "exec echo 'a b' '$HOME'\n"
    assert command_script(["ls | wc"]) == "ls | wc\n"
    with pytest.raises(UsageError):
        command_script([])


def test_old_images_go_and_new_ones_stay(kernel: GuestKernel, folder: Path) -> None:
    images = [build_initramfs(kernel, command=[f"c{n}"], folder=folder) for n in range(18)]
    for image in images[:17]:
        os.utime(image, (0, 0))
    build_initramfs(kernel, command=["one more"], folder=folder)
    assert images[17].exists()
    assert len(list((folder / "initramfs").glob("*.cpio"))) == 16


def test_words_and_names_that_are_no_utf_8_reach_the_guest_as_they_are(
    kernel: GuestKernel, folder: Path, tmp_path: Path
) -> None:
    added = tmp_path / os.fsdecode(b"caf\xe9")
    added.write_bytes(b"data")
    image = build_initramfs(
        kernel, folder=folder, add=[parse_add(str(added))], command=["cat", os.fsdecode(b"/root/caf\xe9")]
    )
    data = image.read_bytes()
    assert b"root/caf\xe9\0" in data
    assert b"exec cat '/root/caf\xe9'\n" in data
