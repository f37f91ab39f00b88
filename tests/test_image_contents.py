from __future__ import annotations

import fnmatch
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from testbed.functions import ROOT

WORKSTATION_ONLY = {"track_video.py", "track_task.py"}
DEVELOPMENT_ONLY = {"cvat_cli", "cvat_sdk", "matplotlib", "platformdirs", "pytest", "testbed"}

# Imports every module below the current folder, in one process, and prints where each came from.
IMPORT_ALL = """
import importlib, json, pathlib, sys
files = sorted(pathlib.Path().rglob("*.py"))
names = [".".join(file.with_suffix("").parts) for file in files]
names = [name.removesuffix(".__init__") for name in names]
places = {name: importlib.import_module(name).__file__ for name in names}
print(json.dumps({"places": places, "loaded": [name.partition(".")[0] for name in sys.modules]}))
"""


def is_ignored(path: str) -> bool:
    """Tell whether .dockerignore keeps a path out of the build context."""
    ignored = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.lstrip("!").rstrip("/").removeprefix("**/")
        matches = any(
            fnmatch.fnmatch(part, pattern)
            for part in (path, *map(str, Path(path).parents), *Path(path).parts[1:])
        )
        if pattern and not line.startswith("#") and matches:
            ignored = not line.startswith("!")
    return ignored


def image_files(dockerfile: str = "Dockerfile") -> set[str]:
    """Return the paths that a Dockerfile copies into the image's working directory."""
    files: set[str] = set()
    for line in (ROOT / dockerfile).read_text().splitlines():
        keyword, *words = line.split() or [""]
        if keyword != "COPY" or words[-1].startswith("/"):
            continue
        for pattern in words[:-1]:
            for found in ROOT.glob(pattern.rstrip("/")):
                paths = found.rglob("*") if found.is_dir() else [found]
                files |= {str(path.relative_to(ROOT)) for path in paths if path.is_file()}
    return {path for path in files if not is_ignored(path)}


@pytest.mark.parametrize(
    ("dockerfile", "expected"),
    [
        ("Dockerfile", {"main.py", "interaction/main.py", "weights/micro/config.yaml"}),
        ("agent/Dockerfile", {"tracker.py", "agent/func.py", "weights/micro/config.yaml"}),
    ],
)
def test_image_holds_what_it_can_import_and_nothing_more(
    tmp_path: Path, dockerfile: str, expected: set[str]
) -> None:
    """Every shipped module imports in a folder that holds only the shipped files."""
    shipped = image_files(dockerfile)
    for path in shipped:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / path)

    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert shipped >= expected
    assert not shipped & WORKSTATION_ONLY
    assert all(Path(place).is_relative_to(tmp_path) for place in report["places"].values())
    if dockerfile == "Dockerfile":
        assert not DEVELOPMENT_ONLY & set(report["loaded"])


def test_deploy_scripts_hand_nuctl_what_the_dockerfile_copies(tmp_path: Path) -> None:
    """The copy of the function's folder has the same files as the CPU image."""
    script = (ROOT / "deploy" / "deploy_lib.sh").read_text()
    (body,) = re.findall(
        r"^stage_function\(\) \{\n(.*?)^\}", script, flags=re.DOTALL | re.MULTILINE
    )
    (copying,) = re.findall(
        r"^    # what the Dockerfile copies.*?(?=^    if )", body, re.DOTALL | re.MULTILINE
    )
    (tmp_path / "stage").mkdir()

    subprocess.run(
        ["bash", "-euc", copying],
        env={
            "PATH": "/usr/bin:/bin",
            "code": str(ROOT),
            "folder": str(ROOT),
            "config": "function.yaml",
            "stage": str(tmp_path / "stage"),
        },
        check=True,
    )

    staged = {
        str(path.relative_to(tmp_path / "stage"))
        for path in (tmp_path / "stage").rglob("*")
        if path.is_file()
    }
    assert {path for path in staged if path.endswith(".py") or path.startswith("weights/")} == (
        image_files() | {"deploy/check_torch_index.py", "deploy/download_weights.py"}
    )


def test_root_holds_what_the_image_holds() -> None:
    """Beside two command lines, every module of the repository's root is in the tracker's image."""
    root_modules = {path.name for path in ROOT.glob("*.py")}

    assert root_modules - image_files() == WORKSTATION_ONLY
