"""Real servers, replicas and random weights that tests and benchmarks share."""
