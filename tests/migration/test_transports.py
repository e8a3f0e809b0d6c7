"""What QEMU does with the stream on its way: compressed, encrypted, several channels, past the host's page cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from vmbus.machine.migration.drive import arrived, migrate, receive

from tests.guest.matrix import full
from tests.migration.journey import Journey
from tests.migration.load import LIMIT, Program, guest_resumed, place, put, tcp_uri, under_load, went_well

pytestmark = pytest.mark.guest

CHANNELS = 4
MULTIFD: dict[str, Any] = {"multifd-channels": CHANNELS}
ZSTD = {"multifd-compression": "zstd"}
MAX_SAMPLES = 4096
"""Pages in a GiB that QEMU looks at, at most, for a dirty rate."""
PLAIN = {"multifd-compression": "none", "tls-creds": ""}
SERVER, CLIENT = "psk-server", "psk-client"


def credentials(folder: Path) -> list[str]:
    """Return QEMU's options for a key that both ends share."""
    folder.mkdir()
    (folder / "keys.psk").write_text(f"vmbus:{'5a' * 32}\n")
    words = []
    for end in (f"{SERVER},endpoint=server", f"{CLIENT},endpoint=client,username=vmbus"):
        words += ["-object", f"tls-creds-psk,dir={folder},id={end}"]
    return words


async def over_tcp(guest: Journey, parameters: dict[str, Any], *, multifd: bool, tls: bool) -> None:
    """Move over TCP, compressed, encrypted, or both."""
    there = await place(guest, {"multifd": multifd}, PLAIN | parameters)
    if tls:
        await put(there.host, {}, {"tls-creds": SERVER})
        await put(guest.host, {}, {"tls-creds": CLIENT})
    uri = await tcp_uri(there)
    went_well(await migrate(guest.host.migration, uri, timeout=LIMIT))
    used = await guest.host.qmp.execute("query-migrate-parameters")
    assert used["tls-creds"] == (CLIENT if tls else "")
    assert not multifd or used["multifd-compression"] == parameters.get("multifd-compression", "none")
    await arrived(there.host.migration, timeout=LIMIT)
    await guest.settle_at(there)
    await guest_resumed(guest)


async def through_a_file_past_the_page_cache(guest: Journey, file: Path) -> None:
    capabilities = {"mapped-ram": True, "multifd": True}
    parameters = {**MULTIFD, "direct-io": True}
    await put(guest.host, {}, PLAIN)  # a file with a place for each page is neither compressed nor encrypted
    await put(guest.host, capabilities, parameters)
    went_well(await migrate(guest.host.migration, f"file:{file}", timeout=LIMIT))
    there = await place(guest, capabilities, parameters)
    await receive(there.host.migration, f"file:{file}")
    await arrived(there.host.migration, timeout=LIMIT)
    await guest.settle_at(there)
    await put(guest.host, {"mapped-ram": False, "multifd": False}, {"direct-io": False})
    await guest_resumed(guest)


async def the_dirty_rate(guest: Journey, mode: str) -> int:
    """Let QEMU measure for a second how fast the guest writes; return MiB/s."""
    qmp = guest.host.qmp
    samples = {"sample-pages": MAX_SAMPLES} if mode == "page-sampling" else {}
    await qmp.execute("calc-dirty-rate", {"calc-time": 1, "mode": mode, **samples})

    async def measured() -> bool:
        return bool((await qmp.execute("query-dirty-rate"))["status"] == "measured")

    await guest.here.until(measured, "dirty rate")
    found = await qmp.execute("query-dirty-rate")
    assert found["mode"] == mode
    await guest_resumed(guest)
    return int(found["dirty-rate"])


async def test_compressed_encrypted_past_the_page_cache_and_measured(
    tmp_path: Path, guest_program: Program
) -> None:
    keys = credentials(tmp_path / "keys")
    async with under_load(tmp_path, guest_program, extra=keys, reachable=(tmp_path,)) as guest:
        # The load writes to few pages, and QEMU looks at one in 64, chosen at random.
        await guest.here.until(lambda: the_dirty_rate(guest, "page-sampling"), "a written page in a sample")
        await over_tcp(guest, MULTIFD | ZSTD, multifd=True, tls=True)
        await through_a_file_past_the_page_cache(guest, tmp_path / "guest")


@pytest.mark.parametrize(
    ("parameters", "multifd", "tls"),
    [
        full({**MULTIFD, **ZSTD}, True, False, id="zstd"),
        full({**MULTIFD, "multifd-compression": "zlib"}, True, False, id="zlib"),
        full({}, False, True, id="tls"),
        full(MULTIFD, True, True, id="multifd-tls"),
    ],
)
async def test_each_of_these_twice(
    tmp_path: Path, guest_program: Program, parameters: dict[str, Any], multifd: bool, tls: bool
) -> None:
    keys = credentials(tmp_path / "keys")
    async with under_load(tmp_path, guest_program, extra=keys, reachable=(tmp_path,)) as guest:
        for _ in range(2):
            await over_tcp(guest, parameters, multifd=multifd, tls=tls)


@pytest.mark.full
async def test_dirty_rates_are_measured_before_and_after_a_move(
    tmp_path: Path, guest_program: Program
) -> None:
    """By samples of pages, and by the bitmap in which QEMU also finds what a migration has to send again."""
    async with under_load(tmp_path, guest_program) as guest:
        for mode in ("page-sampling", "dirty-bitmap"):
            await the_dirty_rate(guest, mode)
            went_well(await guest.move())
            await the_dirty_rate(guest, mode)
            await guest_resumed(guest)
