from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
MODULES = [
    "errors",
    "settings",
    "shapes",
    "images",
    "state_token",
    "object_requests",
    "protocol",
    "interaction.protocol",
    "state_store",
]
# object_requests has no logic of its own to test
TESTS = [f"tests.test_{name.replace('.', '_')}" for name in MODULES if name != "object_requests"]


def test_modules_without_a_model_and_their_tests_need_no_torch() -> None:
    """Requests, shapes, settings and stores can be used and tested without torch installed."""
    code = f"""
import importlib, sys
class Forbid:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "torchvision", "sam2", "safetensors"):
            raise ImportError("forbidden: " + name)
sys.meta_path.insert(0, Forbid())
for name in {[*MODULES, *TESTS, "tests.conftest"]}:
    importlib.import_module(name)
print("imported")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )

    assert done.stdout.strip() == "imported", done.stderr
