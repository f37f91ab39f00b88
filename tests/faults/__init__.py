"""Faults, hostile input and load: what tests and `soak` disturb the function with."""
