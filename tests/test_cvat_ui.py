"""Run the tests of the annotation action for CVAT's UI, with a real `local_server.py`."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from testbed.drawn_frames import jpeg_frames
from testbed.forked_replica import ForkedReplica
from testbed.functions import ROOT, Replica
from tests.reference import write_frames

UI = ROOT / "cvat_ui"
FRAMES = 12
SCRIPT = "/usr/share/nginx/html/sam2_tracker_action.js"
SNIPPET = "/etc/nginx/conf.d/sam2_tracker.conf"


@pytest.fixture(scope="module")
def node() -> str:
    """The path of node; skips or fails if anything that the tests need is not installed."""
    found = shutil.which("node") or ""
    need(Path(found).is_file(), "node is missing: install Node.js 20 or newer")
    for program, package in (("/usr/bin/chromium", "chromium"), ("/usr/sbin/nginx", "nginx-light")):
        need(Path(program).exists(), f"{program} is missing: install Debian's package {package}")
    need(
        (UI / "node_modules" / ".package-lock.json").exists(),
        "the development tools of cvat_ui are missing: run make ui-setup",
    )
    return found


def need(present: object, reason: str) -> None:
    """Skip if something is missing; fail in CI."""
    if not present:
        (pytest.fail if "CI" in os.environ else pytest.skip)(reason)


@pytest.fixture(scope="module")
def function_server(model_environment: dict[str, str]) -> Iterator[Replica]:
    """The function over HTTP, without Redis, on the small test model and one thread."""
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SAM2_", "CVAT_FUNCTIONS_"))
    }
    server = ForkedReplica(clean | model_environment | {"OMP_NUM_THREADS": "1"})
    server.wait()
    yield server
    server.kill()


def run_node(node: str, *arguments: str, **environment: str) -> str:
    """Run node in `cvat_ui` and return what it prints; that is also shown if it fails."""
    result = subprocess.run(
        [node, *arguments],
        cwd=UI,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


@pytest.mark.parametrize("name", ["action", "keyframes", "notice", "registering"])
def test_the_action_works_in_chromium(
    node: str, function_server: Replica, tmp_path: Path, name: str
) -> None:
    """The action's own tests pass on a page with CVAT's API and the real function behind it."""
    frames = write_frames(tmp_path / "frames", jpeg_frames(FRAMES))
    output = run_node(
        node,
        "--test",
        f"tests/{name}.test.js",
        FRAMES=str(frames),
        FUNCTION_URL=str(function_server.client.base_url),
    )

    assert "\n# skipped 0\n" in output
    assert "\n# pass 0\n" not in output


def test_the_snippet_changes_html_only(node: str) -> None:
    """Under a real nginx the script tag is in the page, and other files are unchanged."""
    output = run_node(node, "--test", "tests/nginx.test.js")

    assert "\n# skipped 0\n" in output
    assert "\n# pass 0\n" not in output


def test_the_action_is_typed_and_lint_clean(node: str) -> None:
    """TypeScript and ESLint report nothing."""
    run_node(node, "node_modules/typescript/bin/tsc")
    run_node(node, "node_modules/eslint/bin/eslint.js", "--max-warnings=0", ".")


def test_every_deployment_mounts_the_same_two_files() -> None:
    """Compose file, chart values and patch mount the script and the snippet to the same paths."""
    compose = yaml.safe_load((UI / "compose.cvat-ui.yml").read_text())
    assert list(compose["services"]) == ["cvat_ui"]
    assert list(compose["services"]["cvat_ui"]) == ["volumes"]  # nothing is replaced
    mounts = [volume.rsplit(":", 2) for volume in compose["services"]["cvat_ui"]["volumes"]]
    assert [(target, mode) for _, target, mode in mounts] == [(SCRIPT, "ro"), (SNIPPET, "ro")]
    for source, target, _ in mounts:
        assert source.endswith(f"/cvat_ui/{Path(target).name}")

    maps = yaml.safe_load((UI / "kustomization.yaml").read_text())["configMapGenerator"]
    assert maps[0]["files"] == [Path(target).name for _, target, _ in mounts]
    assert all((UI / name).is_file() for name in maps[0]["files"])
    frontend = yaml.safe_load((UI / "helm.cvat-ui.yaml").read_text())["cvat"]["frontend"]
    pod = yaml.safe_load((UI / "patch.cvat-ui.yaml").read_text())["spec"]["template"]["spec"]
    assert pod["volumes"] == frontend["additionalVolumes"]
    assert pod["volumes"][0]["configMap"]["name"] == maps[0]["name"]
    volume_mounts = pod["containers"][0]["volumeMounts"]
    assert volume_mounts == frontend["additionalVolumeMounts"]
    assert [(mount["mountPath"], mount["subPath"]) for mount in volume_mounts] == [
        (target, Path(target).name) for _, target, _ in mounts
    ]


def test_the_action_has_the_name_of_the_function() -> None:
    """The tests look for the action by the name in the function files."""
    name = yaml.safe_load((ROOT / "function.yaml").read_text())["metadata"]["annotations"]["name"]

    assert f"export const NAME = '{name}';" in (UI / "tests" / "harness.js").read_text()
