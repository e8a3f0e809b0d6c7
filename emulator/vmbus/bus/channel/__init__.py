"""One channel of the bus: its states, its GPADLs, its signals, and the end that serves it."""
