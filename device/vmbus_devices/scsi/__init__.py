"""Storage: a StorVSP controller with disks and CD-ROMs (docs/storage.md).

controller   the channel's protocol, units and their places, resets, hot plugging
absent       what the controller answers for units that are not there
handshake    how the guest's driver and the host agree first
request      one command on its way
unit, blocks, disk, cdrom    SCSI
backend, file, nbd, image    where the blocks are
faults       what a disk can be told to get wrong
drive        from options to a unit
saved        what survives a migration
"""

from vmbus_devices.scsi.device import Scsi

__all__ = ["Scsi"]
