"""What an address of a migration needs on this machine, opened for QEMU.

    fd:N           a descriptor that came with the request
    exec:COMMAND   a pipe to the command, which is started here: QEMU's sandbox lets it start no programs
    file:PATH      descriptors of the file: QEMU's sandbox lets it open only the files of its command line

A guest is written to a new file beside PATH, which replaces what is there when all of the guest is in it: a
migration that fails, or never begins, costs no guest that was written before. With an offset, the file itself is
written to.

All other addresses QEMU opens by itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import secrets
import subprocess
import threading
from collections.abc import AsyncIterator
from pathlib import Path

from vmbus import durable
from vmbus.errors import QemuError, UsageError, UserError
from vmbus.machine.migration.addresses import descriptor_number
from vmbus.machine.migration.ports import Monitor

_logger = logging.getLogger(__name__)

COMMAND_TIMEOUT = 60.0
"""Seconds for the command of ``exec:`` to end after QEMU has written all of the guest."""


@contextlib.asynccontextmanager
async def handed_over(
    qmp: Monitor,
    uri: str,
    descriptor: int | None,
    *,
    incoming: bool = False,
    directory: Path | None = None,
) -> AsyncIterator[str]:
    """Yield ``uri`` for a command of ``qmp``, which has what it stands for in the meantime.

    ``incoming``: the guest comes from there. ``directory``: where a command is started, if not where this process
    was. Raises :class:`~vmbus.errors.UserError` when a file or a command cannot
    be opened.
    """
    kind, _, rest = uri.partition(":")
    opened: contextlib.AbstractAsyncContextManager[str]
    if descriptor is not None:
        opened = _named(qmp, descriptor)
    elif descriptor_number(uri) is not None:
        raise UsageError(f"{uri}: the request came without a descriptor")
    elif kind == "exec" and rest:
        opened = _command(qmp, rest, incoming, directory)
    elif kind == "file" and rest and not rest.startswith("/dev/fdset/"):
        opened = _file(qmp, rest, incoming)
    else:
        opened = contextlib.nullcontext(uri)
    async with opened as address:
        yield address


@contextlib.asynccontextmanager
async def _named(qmp: Monitor, descriptor: int) -> AsyncIterator[str]:
    name = f"vmbus-{secrets.token_hex(4)}"
    await qmp.hand_over(descriptor, name)
    try:
        yield f"fd:{name}"
    finally:
        if qmp.connected:
            with contextlib.suppress(QemuError):  # QEMU has used it, and closed or kept it
                await qmp.execute("closefd", {"fdname": name})


@contextlib.asynccontextmanager
async def _command(qmp: Monitor, command: str, incoming: bool, directory: Path | None) -> AsyncIterator[str]:
    reading, writing = os.pipe2(os.O_CLOEXEC)
    ours, theirs = (reading, writing) if incoming else (writing, reading)
    try:
        process = subprocess.Popen(  # noqa: ASYNC220 - takes no time
            ["/bin/sh", "-c", command],
            stdin=subprocess.DEVNULL if incoming else theirs,
            stdout=theirs if incoming else subprocess.DEVNULL,
            cwd=directory,
            start_new_session=True,
        )
    except OSError as error:
        os.close(ours)
        where = f" in {directory}" if directory is not None else ""
        raise UserError(f"exec:{command}: cannot start a shell{where}: {error.strerror}") from error
    finally:
        os.close(theirs)
    name = f"vmbus-{secrets.token_hex(4)}"
    try:
        try:
            await qmp.hand_over(ours, name)
        finally:
            os.close(ours)  # the command must see it when QEMU closes its copy
        try:
            yield f"fd:{name}"
        finally:
            if qmp.connected:
                with contextlib.suppress(QemuError):
                    await qmp.execute("closefd", {"fdname": name})
    finally:
        if incoming:
            threading.Thread(target=process.wait, daemon=True).start()  # it lasts as long as the guest comes
        else:
            await _ended(process, command)


async def _ended(process: subprocess.Popen[bytes], command: str) -> None:
    """Wait for the command: what it makes of the guest is complete only when it has ended."""
    try:
        status = await asyncio.to_thread(process.wait, COMMAND_TIMEOUT)
    except subprocess.TimeoutExpired:
        _logger.warning("exec:%s still runs %g s after the migration", command, COMMAND_TIMEOUT)
        return
    if status:
        _logger.warning(
            "exec:%s ended with status %d: if the guest did not arrive, and was kept (--keep), take it back",
            command,
            status,
        )


@contextlib.asynccontextmanager
async def _file(qmp: Monitor, text: str, incoming: bool) -> AsyncIterator[str]:
    path, comma, offset = text.partition(",offset=")
    access = os.O_RDONLY if incoming else os.O_WRONLY
    opened, new = path, False
    descriptors: list[int] = []
    try:
        try:
            if incoming or comma:
                create = 0 if incoming else os.O_CREAT
                descriptors.append(os.open(path, access | create | os.O_CLOEXEC, 0o600))
            else:
                descriptor, opened, new = _new_file(path)
                descriptors.append(descriptor)
        except OSError as error:
            raise UserError(f"file:{path}: {error.strerror}") from error
        with contextlib.suppress(OSError):  # for the parameter direct-io, where the file system has that
            descriptors.append(os.open(opened, access | os.O_DIRECT | os.O_CLOEXEC))
        number = await qmp.lend(descriptors)
    except BaseException:
        if new:
            Path(opened).unlink(missing_ok=True)
        raise
    finally:
        for each in descriptors:
            os.close(each)
    try:
        yield f"file:/dev/fdset/{number}{comma}{offset}"
    except BaseException:
        if new and qmp.connected:
            Path(opened).unlink(missing_ok=True)
        elif new:
            _logger.warning("QEMU has ended; what it wrote of the guest is in %s", opened)
        raise
    else:
        if new:
            await asyncio.to_thread(_complete, path, Path(opened))
    finally:
        if qmp.connected:
            with contextlib.suppress(QemuError):  # QEMU closes what it has opened of the set by itself
                await qmp.execute("remove-fd", {"fdset-id": number})


def _new_file(path: str) -> tuple[int, str, bool]:
    """Open a file for a guest that is to be at ``path``; return its descriptor and path, and if it is a new one.

    What is no regular file, and a file in a folder that this user cannot write to, is written to itself. Raises
    ``OSError``.
    """
    place = Path(path).resolve()
    flags = os.O_WRONLY | os.O_CLOEXEC
    if place.exists():
        if not place.is_file():
            return os.open(place, flags), path, False
        if not os.access(place, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    unfinished = place.with_name(f"{place.name}.{secrets.token_hex(8)}.part")
    try:
        descriptor = os.open(unfinished, flags | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        if not place.exists() or error.errno not in (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG):
            raise
        return os.open(place, flags | os.O_TRUNC), path, False
    return descriptor, str(unfinished), True


def _complete(path: str, unfinished: Path) -> None:
    """Put a file with all of a guest in its place, safe on the medium. Raises :class:`~vmbus.errors.UserError`."""
    place = Path(path).resolve()
    try:
        durable.synchronize(unfinished)
        durable.replace(unfinished, place)
    except OSError as error:
        raise UserError(
            f"file:{path}: {error.strerror}; QEMU has written all of the guest to {unfinished}: use that file, or "
            "resume the guest here with `vmbus migrate --take-back`"
        ) from error
