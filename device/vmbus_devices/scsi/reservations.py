"""Persistent reservations of one disk (SPC-4 5.13), with a single initiator, the guest.

no key --REGISTER key--> registered --RESERVE--> reserved --RELEASE--> registered --REGISTER 0--> no key
                              '---- CLEAR ----> no key <---- CLEAR, REGISTER 0 ----'

| refused with              | when                                                             |
| RESERVATION CONFLICT      | the key is not the registered one; another type is held          |
| 5/24 invalid field in CDB | an unknown service action, scope or type                         |
| 5/26 invalid field in list| SPEC_I_PT is set                                                 |
| 5/26/04 invalid release   | RELEASE of another type than the one held                        |
| 5/1A parameter list length| the parameter list is not 24 bytes long                          |

APTPL (keys survive a loss of power) is accepted, as Linux sets it with every registration (drivers/scsi/sd.c): of a
target that refused it, as SPC-4 allows, Linux could register nothing. Keys and reservations survive resets,
migrations and snapshots in any case, and end with the guest, without a file beside the image: the initiators that a
key would keep out of the disk are other guests, and each has reservations of its own.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from vmbus.errors import MalformedError
from vmbus.wire.scsi import RESERVATION_LIST, Sense

from vmbus_devices.scsi.request import CheckCondition, ReservationConflict

REGISTER, RESERVE, RELEASE, CLEAR, PREEMPT, PREEMPT_AND_ABORT, REGISTER_AND_IGNORE = range(7)
READ_KEYS, READ_RESERVATION, REPORT_CAPABILITIES = range(3)

TYPES = (1, 3, 5, 6, 7, 8)
"""Write exclusive and exclusive access; both for registrants only; both for all registrants."""

_TYPE_MASK = sum(1 << (each + 8 if each < 8 else 0) for each in TYPES)
_SPEC_I_PT, _APTPL = 0x08, 0x01
_PTPL_CAPABLE, _PTPL_ACTIVATED, _TYPES_VALID = 0x01, 0x01, 0x80


@dataclass(slots=True)
class Reservations:
    """``key`` 0: the guest is not registered; ``type`` 0: nothing is reserved."""

    key: int = 0
    type: int = 0
    generation: int = 0
    through_power_loss: bool = False
    """APTPL of the last registration."""

    def change(self, action: int, scope_and_type: int, data: bytes) -> None:
        """Execute PERSISTENT RESERVE OUT. Raises CheckCondition or ReservationConflict before any change."""
        try:
            wanted = RESERVATION_LIST.parse(data)
        except MalformedError:
            raise CheckCondition(Sense.PARAMETER_LIST_LENGTH) from None
        if len(data) != RESERVATION_LIST.size:
            raise CheckCondition(Sense.PARAMETER_LIST_LENGTH)
        if wanted.flags & _SPEC_I_PT:
            raise CheckCondition(Sense.INVALID_FIELD_IN_LIST)
        if action in (RESERVE, RELEASE, PREEMPT, PREEMPT_AND_ABORT):
            kind = scope_and_type & 0xF
            if scope_and_type >> 4 or kind not in TYPES:
                raise CheckCondition(Sense.INVALID_FIELD_IN_CDB)
        if action in (REGISTER, REGISTER_AND_IGNORE):
            if action == REGISTER and wanted.key != self.key:
                raise ReservationConflict
            self.key = wanted.action_key
            self.type = self.type if self.key else 0
            self.generation += 1
            self.through_power_loss = bool(self.key and wanted.flags & _APTPL)
            return
        if action not in (RESERVE, RELEASE, CLEAR, PREEMPT, PREEMPT_AND_ABORT):
            raise CheckCondition(Sense.INVALID_FIELD_IN_CDB)
        if not self.key or wanted.key != self.key:
            raise ReservationConflict
        if action == RESERVE:
            if self.type not in (0, kind):
                raise ReservationConflict
            self.type = kind
        elif action == RELEASE:
            if self.type not in (0, kind):
                raise CheckCondition(Sense.INVALID_RELEASE)
            self.type = 0
        elif action == CLEAR:
            self.key = self.type = 0
            self.through_power_loss = False
            self.generation += 1
        else:
            if wanted.action_key != self.key:
                raise ReservationConflict
            self.type = kind
            self.generation += 1

    def report(self, action: int) -> bytes:
        """Return the data of PERSISTENT RESERVE IN. Raises CheckCondition."""
        generation = self.generation & 0xFFFFFFFF
        if action == READ_KEYS:
            keys = struct.pack(">Q", self.key) if self.key else b""
            return struct.pack(">II", generation, len(keys)) + keys
        if action == READ_RESERVATION:
            held = struct.pack(">Q5xB2x", self.key, self.type) if self.type else b""
            return struct.pack(">II", generation, len(held)) + held
        if action == REPORT_CAPABILITIES:
            activated = _TYPES_VALID | (_PTPL_ACTIVATED if self.through_power_loss else 0)
            return struct.pack(">HBBH2x", 8, _PTPL_CAPABLE, activated, _TYPE_MASK & 0xFFFF)
        raise CheckCondition(Sense.INVALID_FIELD_IN_CDB)
