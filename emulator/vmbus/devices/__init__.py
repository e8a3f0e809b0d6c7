"""What devices are made from: registry, options, parts, saved state, counters. Devices are packages of their own."""
