"""The front end of vhost-user: it has a server process do the requests of a virtqueue.

wire         the layouts
front_end    the negotiation, by which a server gets the memory and the queue
"""

from vmbus_devices.vhost_user.front_end import VhostUserError, offer_queue

__all__ = ["VhostUserError", "offer_queue"]
