"""Tracking a job or task of a CVAT server: the rooms behind `track_task.py`."""
