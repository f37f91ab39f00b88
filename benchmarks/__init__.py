"""Command line programs that measure speed; each prints its results and the machine."""
