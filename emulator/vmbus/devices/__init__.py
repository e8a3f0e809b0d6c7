"""What devices are made from: the registry, options, saved state, counters. The devices are packages of their own."""
