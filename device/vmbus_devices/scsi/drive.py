"""The unit that the options of a ``--device scsi`` line describe."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass, replace
from pathlib import Path

from vmbus.devices.options import parse_size
from vmbus.errors import DeviceError, UsageError, UserError

from vmbus_devices.nbd.client import AddressConnector, Client
from vmbus_devices.nbd.uri import is_uri, parse_uri
from vmbus_devices.nbd.wire import ExportFlag
from vmbus_devices.scsi.backend import Backend, MemoryBackend, NullBackend
from vmbus_devices.scsi.blocks import TRANSFER_HEADROOM, BlockUnit, ReadErrors, WriteErrors
from vmbus_devices.scsi.cdrom import CdRom
from vmbus_devices.scsi.copies import FileCopies
from vmbus_devices.scsi.disk import Disk
from vmbus_devices.scsi.faults import FaultPlan, parse_faults
from vmbus_devices.scsi.file import Cache, FileBackend
from vmbus_devices.scsi.image import DetectZeroes, ImageBackend, ImageFile, ImageServers, probe
from vmbus_devices.scsi.nbd import MIN_MAXIMUM, NbdBackend

_OTHER_URI = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_SERIAL = re.compile(r"[!-~]{1,64}")
BLOCK_SIZES = (512, 4096)
_MAX_IMAGE_CONNECTIONS = 2
"""To the server of an image: each takes sixteen requests at a time."""


class Format(enum.Enum):
    """The format of the image, or no image at all."""

    RAW = "raw"
    AUTO = "auto"
    QCOW2 = "qcow2"
    QCOW = "qcow"
    QED = "qed"
    VMDK = "vmdk"
    VDI = "vdi"
    VHDX = "vhdx"
    VPC = "vpc"
    PARALLELS = "parallels"
    NULL = "null"
    MEMORY = "memory"


class Media(enum.Enum):
    """The kind of device that the guest sees."""

    DISK = "disk"
    CDROM = "cdrom"


@dataclass(frozen=True, slots=True)
class DriveOptions:
    """The options of the command line; ``max_transfer`` is the controller's, in bytes."""

    image: str | None = None
    format: Format = Format.RAW
    size: str | None = None
    media: Media | None = None
    readonly: bool = False
    cache: Cache = Cache.NONE
    discard: bool = True
    serial: str | None = None
    detect_zeroes: DetectZeroes = DetectZeroes.OFF
    backing: str = "off"
    data_file: str | None = None
    extents: bool = False
    copies: str | None = None
    reconnect: float = 5.0
    connections: int = 4
    block: int = 512
    rotation: int = 1
    fault: str = ""
    write_errors: WriteErrors = WriteErrors.REPORT
    read_errors: ReadErrors = ReadErrors.REPORT
    max_transfer: int = 256 << 10


def open_drive(options: DriveOptions, default_serial: str, images: ImageServers | None = None) -> BlockUnit:
    """Return the unit that ``options`` describe; ``images`` opens images of other formats than raw.

    Raises :class:`~vmbus.errors.UsageError` for wrong options, :class:`~vmbus.errors.UserError` for an image that
    cannot be opened.
    """
    if options.image == "":
        raise UsageError(
            "image= names nothing; write a file, a block device or an NBD URI behind it, or leave it out"
        )
    if options.image is not None and _OTHER_URI.match(options.image) and not is_uri(options.image):
        raise UsageError(
            f"image={options.image}: NBD is the only protocol; write nbd://HOST/EXPORT, or a file's name"
        )
    if options.block not in BLOCK_SIZES:
        raise UsageError(f"block={options.block}: the block size must be 512 or 4096")
    serial = options.serial or default_serial
    if not _SERIAL.fullmatch(serial):
        raise UsageError(
            f"serial={serial}: a serial number has 1 to 64 printable ASCII characters, without blanks"
        )
    cdrom = (options.media or _media(options.image)) is Media.CDROM
    faults = FaultPlan(parse_faults(options.fault))
    unit = _unit(options, images, serial, faults, cdrom=cdrom)
    unit.write_errors, unit.read_errors = options.write_errors, options.read_errors
    return unit


def _unit(
    options: DriveOptions, images: ImageServers | None, serial: str, faults: FaultPlan, *, cdrom: bool
) -> BlockUnit:
    backend = _backend(options, images, read_only=options.readonly or cdrom)
    try:
        if cdrom:
            return CdRom(backend, serial, max_transfer=options.max_transfer, faults=faults)
        if backend.alignment > options.block:
            raise UsageError(
                f"direct I/O needs blocks of {backend.alignment} bytes; "
                f"set block={backend.alignment}, or cache=writeback"
            )
        if backend.block_minimum > options.block:
            raise UsageError(
                f"the server needs blocks of {backend.block_minimum} bytes; set block={backend.block_minimum}"
            )
        if not backend.size:
            raise UsageError("the image is empty: a disk needs at least one block")
        return Disk(
            backend,
            serial,
            block_size=options.block,
            max_transfer=options.max_transfer,
            rotation=options.rotation,
            faults=faults,
        )
    except UserError as error:
        backend.close()
        raise type(error)(f"{options.image or options.format.value}: {error}") from error
    except BaseException:
        backend.close()
        raise


def _media(image: str | None) -> Media:
    return Media.CDROM if image is not None and image.lower().endswith(".iso") else Media.DISK


def _nbd(options: DriveOptions, uri: str, *, read_only: bool) -> Backend:
    address = parse_uri(uri)
    client = Client(
        AddressConnector(address), uri, connections=options.connections, reconnect=options.reconnect
    )
    try:
        export = client.open()
    except DeviceError as error:
        raise UserError(str(error)) from error
    try:
        if export.flags & ExportFlag.READ_ONLY and not read_only:
            raise UserError(f"{uri}: the export is read-only; set readonly=on")
        needed = max(MIN_MAXIMUM, options.max_transfer + TRANSFER_HEADROOM)
        if export.maximum < needed:
            raise UserError(
                f"{uri}: the server accepts at most {export.maximum} bytes in a request; {needed} are needed"
            )
    except BaseException:
        client.close()
        raise
    return NbdBackend(client, export, read_only=read_only, cache=options.cache, can_discard=options.discard)


def _image(options: DriveOptions, images: ImageServers | None, *, read_only: bool) -> Backend:
    if options.image is None:
        raise UsageError(f"format={options.format.value} needs image=")
    if is_uri(options.image):
        raise UsageError(f"format={options.format.value}: an NBD server provides raw data; remove format=")
    if options.size is not None:
        raise UsageError("size= applies only to format=null and format=memory; an image has its own size")
    if images is None:
        raise UsageError(f"format={options.format.value} needs qemu-storage-daemon; `vmbus setup` fetches it")
    image = ImageFile(
        Path(options.image),
        options.format.value,
        read_only=read_only,
        cache=options.cache,
        discard=options.discard,
        detect_zeroes=options.detect_zeroes,
        backing=_backing(options.backing),
        data_file=_data_file(options),
        extents=options.extents,
    )
    return ImageBackend(
        images,
        image,
        connections=min(options.connections, _MAX_IMAGE_CONNECTIONS),
        reconnect=options.reconnect,
    )


def _keep_copies(file: FileBackend, folder: Path) -> None:
    try:
        if file.read_only:
            raise UsageError("copies= is for disks that the guest writes to")
        file.snapshot_disk = FileCopies(file, folder)
    except UserError:
        file.close()
        raise


def _backing(text: str) -> bool | tuple[Path, ...]:
    """Return what ``backing=`` allows: nothing, every file, or the files of a list."""
    if text in ("off", "on"):
        return text == "on"
    return tuple(Path(each) for each in text.split(";") if each)


def _data_file(options: DriveOptions) -> Path | None:
    if options.data_file is not None and options.format is not Format.QCOW2:
        raise UsageError("data_file= applies only to format=qcow2")
    return Path(options.data_file) if options.data_file is not None else None


def _backend(options: DriveOptions, images: ImageServers | None, *, read_only: bool) -> Backend:
    if options.copies is not None and (options.image is None or is_uri(options.image)):
        raise UsageError("copies= applies only to raw files")
    if options.format is Format.AUTO and options.image is not None and not is_uri(options.image):
        options = replace(options, format=Format(probe(Path(options.image))))
    elif options.format is Format.AUTO:
        options = replace(options, format=Format.RAW)
    if options.format not in (Format.RAW, Format.NULL, Format.MEMORY):
        if options.copies is not None:
            raise UsageError("copies= applies only to raw files; a qcow2 keeps its snapshots in itself")
        return _image(options, images, read_only=read_only)
    if options.detect_zeroes is not DetectZeroes.OFF:
        raise UsageError("detect_zeroes= applies only to images that are not raw")
    if options.backing != "off" or options.data_file is not None or options.extents:
        raise UsageError("backing=, data_file= and extents= apply only to images that are not raw")
    if options.format is Format.RAW:
        if options.image is None:
            raise UsageError(f"format={options.format.value} needs image=")
        if options.size is not None:
            raise UsageError("size= applies only to format=null and format=memory; an image has its own size")
        if is_uri(options.image):
            return _nbd(options, options.image, read_only=read_only)
        file = FileBackend(
            Path(options.image), read_only=read_only, cache=options.cache, can_discard=options.discard
        )
        file.reconnect = options.reconnect
        if options.copies is not None:
            _keep_copies(file, Path(options.copies))
        return file
    if options.image is not None:
        raise UsageError(f"format={options.format.value} uses no image; remove image=")
    kind = NullBackend if options.format is Format.NULL else MemoryBackend
    backend = kind(parse_size(options.size or "1G"))
    backend.read_only = read_only
    backend.can_discard = options.discard and not read_only
    return backend
