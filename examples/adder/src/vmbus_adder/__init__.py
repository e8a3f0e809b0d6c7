"""A device for the VMBus host emulator: adds up what the guest sends."""
