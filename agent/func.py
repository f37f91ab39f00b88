"""Load the tracker for cvat-cli (`--function-file`).

cvat-cli function create-native "SAM 2" --function-file agent/func.py
cvat-cli function run-agent <id> --function-file agent/func.py -p device=str:cuda
"""

import sys
from pathlib import Path

# cvat-cli loads this file by its path; the project's modules are in the parent folder.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from agent.tracking_function import create

__all__ = ["create"]
