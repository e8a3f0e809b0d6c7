"""VMBus: contact and versions, offers, GPADLs, channels, rings, interrupts.

``Bus`` (in ``server``) is where to begin.
"""
