"""The tracker as an auto-annotation function for cvat-cli's agents."""
