"""VMBus: contact and versions, offers, GPADLs, channels, rings, interrupts.

Begin with :class:`vmbus.bus.server.Bus`.
"""
