"""Sockets over VMBus (hvsock): how a guest's TL_CONNECT_REQUEST is accepted or refused.

Source: docs/protocol/messages.md#socket-connect.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class SocketRequest:
    """A TL_CONNECT_REQUEST: a stream to the host's service ``service_id``; ``endpoint_id`` is the guest's end."""

    endpoint_id: uuid.UUID
    service_id: uuid.UUID
    silo_id: uuid.UUID | None = None


class SocketListener(Protocol):
    """Accepts or refuses socket requests. An implementation must bound how many accepted requests wait."""

    def connect(self, request: SocketRequest) -> bool:
        """Return whether the request is accepted.

        The listener then offers a channel (``offers.socket_offer`` with the ids of the request) or calls
        :meth:`Bus.refuse_socket`, at any later time.
        """


class NoSockets:
    """A listener that refuses every request."""

    def connect(self, request: SocketRequest) -> bool:
        """Refuse."""
        return False
