"""The host's end of an open channel: rings, packets both ways, and the base of every device."""
