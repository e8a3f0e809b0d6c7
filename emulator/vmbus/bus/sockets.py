"""Sockets over VMBus (hvsock): who answers a guest's TL_CONNECT_REQUEST.

Source: docs/protocol/messages.md#socket-connect.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class SocketRequest:
    """A guest wants a stream to the host's service ``service_id``; ``endpoint_id`` names its own end."""

    endpoint_id: uuid.UUID
    service_id: uuid.UUID
    silo_id: uuid.UUID | None = None


class SocketListener(Protocol):
    """Takes or refuses socket requests. It bounds how many it holds."""

    def connect(self, request: SocketRequest) -> bool:
        """Whether it takes the request: then it offers a channel (``offers.socket_offer`` with the ids of the
        request) or calls :meth:`Bus.refuse_socket`, at any later time.
        """


class NoSockets:
    """Refuses every socket."""

    def connect(self, request: SocketRequest) -> bool:
        return False
