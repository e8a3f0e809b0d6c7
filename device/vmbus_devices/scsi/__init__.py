"""Storage: a StorVSP controller with disks and CD-ROMs (docs/storage.md).

controller   the channel's protocol, resets, hot plugging, saving
unit_table   the units, their places and images, and their removal
outstanding  the requests under way, and the channels that wait for them
handshake    the negotiation between the guest's driver and the host
request      one command on its way, and the errors with which it can end
unit, blocks, disk, cdrom    SCSI
backend, file, nbd, image    the blocks of a disk
faults       injected faults
drive        from options to a unit
saved        what survives a migration
fast         ordinary reads and writes in compiled code
"""

from vmbus_devices.scsi.device import Scsi

__all__ = ["Scsi"]
