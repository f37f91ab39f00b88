"""Faults, hostile input and load for the functions: shared by the tests and `soak`."""
