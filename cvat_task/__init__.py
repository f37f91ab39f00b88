"""Track objects in a job or task of a CVAT server; `track_task.py` is the command line."""
