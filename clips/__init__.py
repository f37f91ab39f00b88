"""Track objects through video files and folders of images; `track_video.py` is the command line."""
