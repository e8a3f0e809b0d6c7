"""Compiled code that touches memory which the guest, its vCPUs and this process change at the same time."""
