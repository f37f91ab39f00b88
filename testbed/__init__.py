"""Servers, replicas, drawn frames and random weights that tests and benchmarks share."""
