"""The tracker and the interactor as auto-annotation functions for cvat-cli's agents."""
