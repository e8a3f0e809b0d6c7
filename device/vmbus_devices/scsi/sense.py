"""The error with which a command ends in a CHECK CONDITION."""

from __future__ import annotations

from vmbus.wire.scsi import Sense, sense_data


class ReservationConflict(Exception):
    """The command ends with the status RESERVATION CONFLICT, which has no sense data."""


class CheckCondition(Exception):
    """The command is refused or has failed; the guest gets ``sense``. Raised by units, caught by the controller.

    ``information``: the first LBA that failed.
    """

    def __init__(self, sense: Sense, information: int | None = None) -> None:
        super().__init__(sense.name)
        self.sense = sense
        self.information = information

    def data(self) -> bytes:
        """18 bytes of sense data."""
        return sense_data(self.sense, self.information)
