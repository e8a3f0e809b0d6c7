"""One channel of the bus: its states, its GPADLs, its signals, and its endpoint."""
