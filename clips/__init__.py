"""Video files and image folders: reading, tracking and writing results."""
