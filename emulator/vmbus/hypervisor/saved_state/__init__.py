"""The saved state of a partition: its values, their layout as bytes, and how they are restored."""
