"""The saved state of the bus: its values, their layout as bytes, and whether they can be restored here."""
