"""The saved state of a partition: plain values, their layout in bytes, and their restoration."""
