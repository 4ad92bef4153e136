"""Decisions of the device: estimates in, plan out. Pure: no clock, no I/O, no gRPC; time comes in as an argument."""
