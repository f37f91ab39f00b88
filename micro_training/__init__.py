"""How the bundled `micro` weights are made: synthetic clips, training, and measurement."""
