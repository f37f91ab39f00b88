"""Make the bundled `micro` weights: synthetic clips, training, and evaluation."""
