"""Programs that measure; each prints what it measured and on which machine."""
