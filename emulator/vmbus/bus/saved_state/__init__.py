"""The saved state of the bus: plain values (``values``), their bytes (``layout``), checks (``restore``)."""
