"""A client of network block devices (the NBD protocol).

wire         the layouts
uri          the address of a server
handshake    the negotiation between client and server
connection   one connection: requests out, replies in
client       several connections to one export, and their replacement
"""

from vmbus_devices.nbd.client import Client
from vmbus_devices.nbd.handshake import Export
from vmbus_devices.nbd.uri import Address, is_uri, parse_uri

__all__ = ["Address", "Client", "Export", "is_uri", "parse_uri"]
