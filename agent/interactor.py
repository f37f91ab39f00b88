"""Load the interactor for cvat-cli (`--function-file`).

cvat-cli function create-native "SAM 2: Interactor" --function-file agent/interactor.py
cvat-cli function run-agent <id> --function-file agent/interactor.py -p device=str:cuda
"""

import sys
from pathlib import Path

# cvat-cli loads this file by its path; the project's modules are in the parent folder.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from agent.interaction_function import create

__all__ = ["create"]
