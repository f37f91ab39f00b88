from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).parent.parent
NAME = "pth-facebookresearch-sam2-tracker"
INTERACTOR = REPOSITORY / "interactor"
BASE_IMAGE = "cvat.pytorch.facebookresearch.sam2_tracker.base"
NETWORK = '{"attributes": {"network": "cvat_cvat"}}'
STAGED = "<staged>"
IMAGE = "{{.Config.Image}}"  # how the dashboard's version is asked for

# What the scripts need besides docker, nuctl, curl and kubectl.
SHELL_TOOLS = [
    *("basename", "bash", "cat", "chmod", "cp", "dirname", "env", "mkdir", "mktemp", "rm", "sed"),
    "sh",
]
TOOLS = ("docker", "nuctl", "curl", "kubectl")
EXIT_FAILED, EXIT_USAGE, EXIT_MISSING, EXIT_SELF_TEST = 1, 2, 3, 4

Answer = tuple[str, list[str], str, int]


def function_status(**changes: str) -> str:
    """Return what `nuctl get function --output json` prints, with some fields changed."""
    fields = {"project": "cvat", "namespace": "nuclio", "type": "tracker", "state": "ready"}
    fields |= changes
    status = {
        "metadata": {
            "name": NAME,
            "namespace": fields["namespace"],
            "labels": {"nuclio.io/project-name": fields["project"]},
            "annotations": {"name": "Segment Anything 2: Tracker", "type": fields["type"]},
        },
        "spec": {"handler": "main:handler"},
        "status": {"state": fields["state"], "httpPort": 49153},
    }
    return json.dumps(status, indent="\t") + "\n"


HEALTHY: list[Answer] = [
    ("docker", [IMAGE], "quay.io/nuclio/dashboard:1.13.0-amd64\n", 0),
    ("docker", ["info"], '{"Runtimes": {"nvidia": {}, "runc": {}}}\n', 0),
    ("nuctl", ["version"], 'Client version:\n"Label: 1.13.0, Git commit: 0, OS: linux"\n', 0),
    ("nuctl", ["get", "project"], "", 1),
    ("nuctl", ["get", "function"], function_status(), 0),
    ("curl", ["http://127.0.0.1:49153/healthz"], '{"status": "ok"}', 0),
    ("curl", ["http://127.0.0.1:49153/"], '{"shapes": [], "states": ["track.step"]}', 0),
]


@dataclass(frozen=True)
class Outcome:
    """Exit status and output of a script, and the command lines that it ran."""

    status: int
    text: str
    calls: list[list[str]]

    def of(self, *prefix: str) -> list[list[str]]:
        """Return the calls that begin with these words."""
        return [call for call in self.calls if tuple(call[: len(prefix)]) == prefix]


# Replaces docker, nuctl, curl and kubectl: records its command line, copies the folder that a
# deployment names, and prints a given answer.
STUB = """#!/bin/sh
printf '%s\\n' "${{0##*/}}" "$@" . >> {calls}
has() {{
    word=$1
    shift
    for given in "$@"; do [ "$given" != "$word" ] || return 0; done
    return 1
}}
keep_function() {{
    while [ "$1" != --file ]; do shift; done
    cp -Rp "${{2%/*}}" {staged}
}}
if has deploy "$@"; then keep_function "$@"; fi
{answers}
"""


@dataclass(frozen=True)
class Machine:
    """A PATH with stand-ins for docker, nuctl, curl and kubectl, and a few shell tools.

    Attributes:
        folder: For the stand-ins and their records.
        shell_tools: Folder of links to the shell tools.
        checkout: A small checkout of the repository, with stand-ins for the code and the weights.
    """

    folder: Path
    shell_tools: Path
    checkout: Path

    @property
    def bin(self) -> Path:
        """The folder of the stand-ins, the first of PATH."""
        return self.folder / "bin"

    @property
    def interactor(self) -> Path:
        """The interactor's folder in the small checkout."""
        return self.checkout / "interactor"

    def remove(self, tool: str) -> None:
        """Remove a tool from PATH."""
        (self.bin / tool).unlink()

    def run(
        self,
        script: str | Path,
        *arguments: str | Path,
        answers: list[Answer] | None = None,
        env: dict[str, str] | None = None,
    ) -> Outcome:
        """Run a deploy script to its end.

        Args:
            script: Path, absolute or from the root of the small checkout.
            arguments: Of the script.
            answers: What differs from a machine on which every command succeeds; the first match
                wins.
            env: What the environment holds besides PATH and HOME.
        """
        calls = self.folder / "calls"
        calls.write_text("")
        shutil.rmtree(self.folder / "staged", ignore_errors=True)
        for tool in TOOLS:
            if (self.bin / tool).exists():
                self._write_stub(tool, [*(answers or []), *HEALTHY])
        done = subprocess.run(
            [str(self.checkout / script), *map(str, arguments)],
            env={"PATH": f"{self.bin}:{self.shell_tools}", "HOME": "/"} | (env or {}),
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        noted = [call.splitlines() for call in calls.read_text().split("\n.\n") if call]
        return Outcome(done.returncode, done.stdout, [_unstage(call) for call in noted])

    def _write_stub(self, tool: str, answers: list[Answer]) -> None:
        lines = []
        for answering, words, output, status in answers:
            if answering == tool:
                test = " && ".join(f'has {shlex.quote(word)} "$@"' for word in words)
                lines.append(f"if {test}; then printf %s {shlex.quote(output)}; exit {status}; fi")
        stub = STUB.format(
            calls=shlex.quote(str(self.folder / "calls")),
            staged=shlex.quote(str(self.folder / "staged")),
            answers="\n".join(lines),
        )
        (self.bin / tool).write_text(stub)


def _unstage(call: list[str]) -> list[str]:
    """Replace the name of the temporary folder, which differs from run to run."""
    if call[:2] == ["nuctl", "deploy"]:
        staged = str(Path(call[call.index("--file") + 1]).parent)
    elif call[:2] == ["docker", "build"]:
        staged = call[-1]
    else:
        return call
    return [word.replace(staged, STAGED) for word in call]


@pytest.fixture(scope="module")
def shell_tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Link the shell tools into a folder of their own."""
    folder = tmp_path_factory.mktemp("shell_tools")
    for tool in SHELL_TOOLS:
        path = shutil.which(tool)
        assert path, f"{tool} is missing on this machine"
        (folder / tool).symlink_to(path)
    return folder


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the small checkout: the real one would be copied in every run, weights and all."""
    folder = copy_function(tmp_path_factory.mktemp("checkout") / "nuclio", scripts=True)
    shutil.copytree(INTERACTOR, folder / "interactor")
    return folder


@pytest.fixture
def machine(tmp_path: Path, shell_tools: Path, checkout: Path) -> Machine:
    """Give a machine on which nothing is missing and every command succeeds."""
    (tmp_path / "bin").mkdir()
    for tool in TOOLS:
        (tmp_path / "bin" / tool).touch(0o755)
    return Machine(tmp_path, shell_tools, checkout)


def nuctl_deploy(config: str, *options: str, platform: str = "local") -> list[str]:
    """Return the deploy command line of CVAT's scripts, followed by these options."""
    return [
        *("nuctl", "deploy", "--project-name", "cvat", "--path", STAGED),
        *("--file", f"{STAGED}/{config}", "--platform", platform, *options),
    ]


def docker_build(folder: Path, *options: str) -> list[str]:
    """Return the command line that builds the base image from the copied function."""
    return [
        *("docker", "build", "--tag", BASE_IMAGE, *options),
        *("--file", f"{folder}/Dockerfile", STAGED),
    ]


def cvat_redis() -> list[str]:
    """Return the options with which CVAT's scripts name its own Redis."""
    return [
        *("--env", "CVAT_FUNCTIONS_REDIS_HOST=cvat_redis_ondisk"),
        *("--env", "CVAT_FUNCTIONS_REDIS_PORT=6666"),
    ]


def test_cpu_deployment_runs_the_command_lines_of_cvats_script(machine: Machine) -> None:
    """They build the base image, create the project, and deploy and test the function."""
    outcome = machine.run(REPOSITORY / "deploy_cpu.sh")

    assert outcome.status == 0, outcome.text
    assert outcome.of("docker", "build") == [docker_build(REPOSITORY)]
    assert outcome.of("nuctl", "create") == [
        ["nuctl", "create", "project", "cvat", "--platform", "local"]
    ]
    assert outcome.of("nuctl", "deploy") == [
        nuctl_deploy("function.yaml", *cvat_redis(), "--platform-config", NETWORK)
    ]
    assert "CVAT will list it: AI Tools, Trackers, Segment Anything 2: Tracker" in outcome.text


def test_gpu_deployment_builds_no_base_image(machine: Machine) -> None:
    """Like CVAT's script: function-gpu.yaml builds from public images only."""
    outcome = machine.run("deploy_gpu.sh")

    assert outcome.status == 0, outcome.text
    assert outcome.of("docker", "build") == []
    assert outcome.of("nuctl", "deploy") == [
        nuctl_deploy("function-gpu.yaml", *cvat_redis(), "--platform-config", NETWORK)
    ]


@pytest.mark.parametrize("given", ["sam2 tracker", "sam2 tracker/nuclio"])
def test_folder_with_spaces_stays_one_word(machine: Machine, given: str) -> None:
    """The argument may be the function's folder or, as in CVAT's layout, its parent."""
    folder = copy_function(machine.folder / "my functions" / "sam2 tracker" / "nuclio")

    outcome = machine.run("deploy_cpu.sh", machine.folder / "my functions" / given)

    assert outcome.status == 0, outcome.text
    assert outcome.of("docker", "build") == [docker_build(folder)]
    assert len(outcome.of("nuctl", "deploy")) == 1


def test_scripts_in_a_cvat_checkout_deploy_their_own_folder(machine: Machine) -> None:
    """The base image then gets the same tag as from CVAT's own script."""
    serverless = machine.folder / "cvat" / "serverless"
    folder = copy_function(
        serverless / "pytorch" / "facebookresearch" / "sam2_tracker" / "nuclio", scripts=True
    )

    outcome = machine.run(folder / "deploy_cpu.sh")

    assert outcome.status == 0, outcome.text
    assert outcome.of("docker", "build") == [docker_build(folder)]
    assert cvats_docker_build(folder / "function.yaml")[3] == BASE_IMAGE


@pytest.mark.parametrize("name", ["function.yaml", "function-gpu.yaml"])
def test_cvats_own_scripts_deploy_the_tracker_and_then_the_interactor(
    name: str, tmp_path: Path
) -> None:
    """They deploy every such file in the folder, in the order of bash's listing."""
    copied = tmp_path / "nuclio"
    for path in repository_files():
        if path.name == name:
            (copied / path.relative_to(REPOSITORY)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copied / path.relative_to(REPOSITORY))
    listing = subprocess.run(
        ["bash", "-O", "globstar", "-c", f'printf "%s\\n" "$0"/**/{name}', copied],
        capture_output=True,
        text=True,
        check=True,
    )

    assert listing.stdout.splitlines() == [
        str(copied / name),
        str(copied / "interactor" / name),
    ]
    assert not (INTERACTOR / "Dockerfile").exists()  # CVAT's script would build it without the code


@pytest.mark.parametrize("folder", [REPOSITORY, INTERACTOR])
def test_base_image_has_the_tag_that_cvats_own_script_gives(folder: Path) -> None:
    """The tag is made from the tracker's path in a checkout of CVAT."""
    checkout = Path("/cvat/serverless/pytorch/facebookresearch/sam2_tracker/nuclio/function.yaml")

    assert f"baseImage: {cvats_docker_build(checkout)[3]}" in (folder / "function.yaml").read_text()


def interactor_answers(**changes: str) -> list[Answer]:
    """Return the answers on a machine on which the interactor is deployed."""
    answer = '{"mask":[[0,1]],"shapes":[{"type":"mask","points":[0,1,1,0,1,0]}]}'
    return [
        ("nuctl", ["get", "function"], function_status(**{"type": "interactor"} | changes), 0),
        ("curl", ["http://127.0.0.1:49153/"], answer, 0),
    ]


def test_interactor_is_deployed_from_the_same_checkout(machine: Machine) -> None:
    """With its yaml, the code in the script's folder, the tracker's base image, and no Redis."""
    outcome = machine.run(REPOSITORY / "deploy_cpu.sh", INTERACTOR, answers=interactor_answers())

    assert outcome.status == 0, outcome.text
    assert outcome.of("docker", "build") == [docker_build(REPOSITORY)]
    assert outcome.of("nuctl", "deploy") == [
        nuctl_deploy("function.yaml", "--platform-config", NETWORK)
    ]
    staged = machine.folder / "staged"
    assert (staged / "function.yaml").read_text() == (INTERACTOR / "function.yaml").read_text()
    assert (staged / "interaction" / "main.py").exists()
    assert (staged / "weights" / "micro" / "config.yaml").exists()
    assert "CVAT will list it: AI Tools, Interactors, Segment Anything 2: Interactor" in (
        outcome.text
    )


def test_interactor_on_a_gpu_uses_the_trackers_image(machine: Machine) -> None:
    """No base image is built; the model is the tracker's."""
    outcome = machine.run(
        "deploy_gpu.sh",
        machine.interactor,
        "--model",
        "facebook/other",
        answers=interactor_answers(),
    )

    assert outcome.status == 0, outcome.text
    assert outcome.of("docker", "image") == [
        ["docker", "image", "inspect", "cvat.pth.facebookresearch.sam2_tracker:latest-gpu"]
    ]
    assert outcome.of("docker", "build") == []
    assert outcome.of("nuctl", "deploy") == [
        nuctl_deploy("function-gpu.yaml", "--platform-config", NETWORK)
    ]
    assert "the model facebook/other is ignored" in outcome.text


def test_missing_image_of_the_tracker_is_reported(machine: Machine) -> None:
    """Without the check, Docker would look for it on the internet."""
    outcome = machine.run(
        "deploy_gpu.sh", machine.interactor, answers=[("docker", ["image"], "", 1)]
    )

    assert outcome.status == EXIT_MISSING
    assert "sam2_tracker:latest-gpu does not exist: deploy the tracker first" in outcome.text
    assert outcome.of("nuctl", "deploy") == []


@pytest.mark.parametrize("script", ["deploy_cpu.sh", "deploy_gpu.sh"])
def test_interactor_runs_in_an_image_of_the_tracker(machine: Machine, script: str) -> None:
    """A site without internet needs only one image: the handler is set in the yaml."""
    outcome = machine.run(
        script, machine.interactor, "--image", "lab/sam2-tracker:1",
        answers=[*interactor_answers(), ("docker", ["image"], "", 1)],
    )  # fmt: skip

    assert outcome.status == 0, outcome.text
    (call,) = outcome.of("nuctl", "deploy")
    name = Path(call[call.index("--file") + 1]).name
    staged = yaml.safe_load((machine.folder / "staged" / name).read_text())
    original = yaml.safe_load((INTERACTOR / name).read_text())
    original["spec"].pop("build")
    assert call[call.index("--run-image") + 1] == "lab/sam2-tracker:1"
    assert staged == original
    assert staged["spec"]["handler"] == "interaction.main:handler"


def test_interactor_in_a_cvat_checkout_uses_the_code_of_its_parent_folder(
    machine: Machine,
) -> None:
    """The layout is the same as in this repository."""
    serverless = machine.folder / "cvat" / "serverless"
    folder = copy_function(
        serverless / "pytorch" / "facebookresearch" / "sam2_tracker" / "nuclio", scripts=True
    )
    shutil.copytree(INTERACTOR, folder / "interactor")

    outcome = machine.run(
        folder / "deploy_cpu.sh", folder / "interactor", answers=interactor_answers()
    )

    assert outcome.status == 0, outcome.text
    assert outcome.of("docker", "build") == [docker_build(folder)]
    assert cvats_docker_build(folder / "function.yaml")[3] == BASE_IMAGE


def test_self_test_of_the_interactor_asks_for_a_click(machine: Machine) -> None:
    """It asks for the health, then for a click on the bright square, as CVAT does."""
    outcome = machine.run("deploy_cpu.sh", machine.interactor, answers=interactor_answers())

    health, click = outcome.of("curl")
    body = json.loads(click[click.index("--data") + 1])
    assert health[-1] == "http://127.0.0.1:49153/healthz"
    assert body.pop("image")
    assert body == {"pos_points": [[32, 32]], "neg_points": [], "obj_bbox": []}
    assert "Self-test passed: the function is healthy and answers a click" in outcome.text


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (("curl", ["http://127.0.0.1:49153/"], "", 22), "does not answer a click"),
        (("curl", ["http://127.0.0.1:49153/"], "{}", 0), "answered a click with no shape"),
        (
            ("nuctl", ["get", "function"], function_status(), 0),
            "CVAT will not list it: its annotation type is not interactor",
        ),
    ],
)
def test_interactor_that_does_not_answer_fails_the_self_test(
    machine: Machine, answer: Answer, message: str
) -> None:
    """The message says which step failed."""
    outcome = machine.run(
        "deploy_cpu.sh", machine.interactor, answers=[answer, *interactor_answers()]
    )

    assert outcome.status == EXIT_SELF_TEST
    assert message in outcome.text


def test_folder_of_another_function_is_refused(machine: Machine) -> None:
    """The script knows neither its base image nor how to test it."""
    folder = copy_function(machine.folder / "function")
    config = folder / "function.yaml"
    config.write_text(config.read_text().replace("type: tracker", "type: detector"))

    outcome = machine.run("deploy_cpu.sh", folder)

    assert (outcome.status, outcome.calls) == (EXIT_USAGE, [])
    assert "neither a tracker nor an interactor" in outcome.text


def test_nuctl_gets_a_copy_of_the_functions_files(machine: Machine) -> None:
    """It leaves out a virtual environment: 5 GB, with links that nuctl cannot copy."""
    folder = copy_function(machine.folder / "function")
    (folder / ".venv").mkdir()
    (folder / ".venv" / "lib64").symlink_to(folder)
    (folder / "main.py").chmod(0o600)

    outcome = machine.run("deploy_cpu.sh", folder)

    assert outcome.status == 0, outcome.text
    staged = machine.folder / "staged"
    assert not (staged / ".venv").exists()
    assert (staged / "function.yaml").exists()
    assert not (staged / "function-gpu.yaml").exists()
    assert (staged / "weights" / "micro" / "config.yaml").exists()
    assert (staged / "main.py").stat().st_mode & 0o444 == 0o444
    assert staged.stat().st_mode & 0o555 == 0o555


def test_redis_settings_are_passed_on_and_the_password_is_not_printed(machine: Machine) -> None:
    """Neither in the commands nor in nuctl's output when it fails."""
    password = "p&ss w$rd"
    env = {
        "CVAT_FUNCTIONS_REDIS_HOST": "redis.example.com",
        "CVAT_FUNCTIONS_REDIS_PORT": "6380",
        "CVAT_FUNCTIONS_REDIS_PASSWORD": password,
        "CVAT_FUNCTIONS_REDIS_SSL": "true",
    }
    expected = nuctl_deploy(
        "function.yaml",
        *("--env", "CVAT_FUNCTIONS_REDIS_HOST=redis.example.com"),
        *("--env", "CVAT_FUNCTIONS_REDIS_PORT=6380"),
        *("--env", f"CVAT_FUNCTIONS_REDIS_PASSWORD={password}"),
        *("--env", "CVAT_FUNCTIONS_REDIS_SSL=true"),
        *("--platform-config", NETWORK),
    )

    fine = machine.run("deploy_cpu.sh", env=env)
    noisy = machine.run(
        "deploy_cpu.sh",
        env=env,
        answers=[("nuctl", ["deploy"], f"docker run --env X='{password}' failed\n", 1)],
    )
    dry = machine.run("deploy_cpu.sh", "--dry-run", env=env)

    assert fine.of("nuctl", "deploy") == [expected]
    assert "docker run --env X='***' failed" in noisy.text
    for outcome in (fine, noisy, dry):
        assert "CVAT_FUNCTIONS_REDIS_PASSWORD=***" in outcome.text
        assert "w$rd" not in outcome.text
        assert "w\\$rd" not in outcome.text


def test_password_given_as_an_option_is_hidden_too(machine: Machine) -> None:
    """--env of a Redis setting is the same as the variable in the environment."""
    outcome = machine.run(
        "deploy_gpu.sh",
        *("--env", "CVAT_FUNCTIONS_REDIS_HOST=h", "--env", "CVAT_FUNCTIONS_REDIS_PASSWORD=hunter2"),
        *("--env", "SAM2_DEVICE=cuda:1"),
    )

    assert "hunter2" not in outcome.text
    assert outcome.of("nuctl", "deploy") == [
        nuctl_deploy(
            "function-gpu.yaml",
            *("--env", "CVAT_FUNCTIONS_REDIS_HOST=h"),
            *("--env", "CVAT_FUNCTIONS_REDIS_PASSWORD=hunter2"),
            *("--env", "SAM2_DEVICE=cuda:1"),
            *("--platform-config", NETWORK),
        )
    ]


def test_value_with_a_single_quote_is_refused(machine: Machine) -> None:
    """On the local platform nuctl puts values between single quotes in a shell, unescaped."""
    env = {"CVAT_FUNCTIONS_REDIS_PASSWORD": "it's"}

    refused = machine.run("deploy_cpu.sh", env=env)
    on_kubernetes = machine.run(
        "deploy_cpu.sh", "--platform", "kube", "--registry", "r.example.com", env=env
    )

    assert (refused.status, refused.calls) == (EXIT_USAGE, [])
    assert "single quote" in refused.text
    assert on_kubernetes.of("nuctl", "deploy")


def test_empty_redis_host_leaves_the_tracks_in_the_function(machine: Machine) -> None:
    """A variable that is set but empty is not replaced by CVAT's Redis."""
    outcome = machine.run("deploy_cpu.sh", env={"CVAT_FUNCTIONS_REDIS_HOST": ""})

    assert outcome.of("nuctl", "deploy") == [
        nuctl_deploy("function.yaml", "--platform-config", NETWORK)
    ]


def test_kubernetes_deployment_names_registry_and_namespace(machine: Machine) -> None:
    """No Docker network, no Redis of CVAT's compose files; the self-test goes through kubectl."""
    proxy = f"/api/v1/namespaces/cvat/services/nuclio-{NAME}:8080/proxy"
    started = '{"states": ["track.step"]}'

    outcome = machine.run(
        "deploy_gpu.sh",
        *("--platform", "kube", "--namespace", "cvat", "--registry", "registry.example.com/cv"),
        env={"CVAT_FUNCTIONS_REDIS_HOST": "redis.cvat.svc"},
        answers=[
            ("nuctl", ["get", "function"], function_status(namespace="cvat"), 0),
            ("kubectl", ["create"], started, 0),
        ],
    )

    assert outcome.status == 0, outcome.text
    assert outcome.of("nuctl", "create") == [
        ["nuctl", "create", "project", "cvat", "--platform", "kube", "--namespace", "cvat"]
    ]
    assert outcome.of("nuctl", "deploy") == [
        nuctl_deploy(
            "function-gpu.yaml",
            *("--namespace", "cvat", "--registry", "registry.example.com/cv"),
            *("--env", "CVAT_FUNCTIONS_REDIS_HOST=redis.cvat.svc"),
            platform="kube",
        )
    ]
    assert outcome.of("docker", "network") == []
    assert outcome.of("kubectl") == [
        ["kubectl", "get", "--raw", f"{proxy}/healthz"],
        ["kubectl", "create", "--raw", f"{proxy}/", "--filename", "-"],
        ["kubectl", "create", "--raw", f"{proxy}/", "--filename", "-"],
    ]
    assert "CVAT will list it" in outcome.text


def test_existing_project_is_left_alone(machine: Machine) -> None:
    """On Kubernetes, creating an existing project is an error."""
    outcome = machine.run("deploy_cpu.sh", answers=[("nuctl", ["get", "project"], "cvat\n", 0)])

    assert outcome.of("nuctl", "create") == []
    assert outcome.status == 0, outcome.text


@pytest.mark.parametrize(
    ("script", "yaml_line", "build_words"),
    [
        ("deploy_cpu.sh", None, ["--build-arg", "SAM2_MODEL_ID=facebook/sam2.1-hiera-large"]),
        ("deploy_gpu.sh", "value: SAM2_MODEL_ID=facebook/sam2.1-hiera-large", None),
    ],
)
def test_model_is_chosen_by_one_option_or_variable(
    machine: Machine, script: str, yaml_line: str | None, build_words: list[str] | None
) -> None:
    """It becomes a build argument of the base image, or one in the copied GPU yaml."""
    outcome = machine.run(script, env={"SAM2_MODEL_ID": "facebook/sam2.1-hiera-large"})

    assert outcome.status == 0, outcome.text
    if build_words:
        assert outcome.of("docker", "build")[0][4:6] == build_words
    if yaml_line:
        staged = (machine.folder / "staged" / "function-gpu.yaml").read_text()
        assert yaml_line in staged
        assert "SAM2_MODEL_ID=facebook/sam2.1-hiera-tiny" not in staged


def test_existing_image_is_deployed_without_building(machine: Machine) -> None:
    """A build section in the yaml, or a path, would make nuctl build."""
    outcome = machine.run("deploy_gpu.sh", "--image", "lab/sam2-tracker:1")

    assert outcome.status == 0, outcome.text
    (call,) = outcome.of("nuctl", "deploy")
    assert "--path" not in call
    assert call[call.index("--run-image") + 1] == "lab/sam2-tracker:1"
    staged = yaml.safe_load((machine.folder / "staged" / "function-gpu.yaml").read_text())
    original = yaml.safe_load((REPOSITORY / "function-gpu.yaml").read_text())
    original["spec"].pop("build")
    assert staged == original


def test_image_is_built_on_a_machine_without_cvat_and_gpu(machine: Machine) -> None:
    """A site without internet then deploys it with --image."""
    outcome = machine.run(
        "deploy_gpu.sh",
        "--build-only",
        answers=[("docker", ["network"], "", 1), ("docker", ["info"], "{}", 0)],
    )

    assert outcome.status == 0, outcome.text
    deploy, delete = outcome.of("nuctl", "deploy"), outcome.of("nuctl", "delete")
    assert deploy == [
        ["nuctl", "deploy", f"{NAME}-build", *nuctl_deploy("function-gpu.yaml", "--disable")[2:]]
    ]
    assert delete == [["nuctl", "delete", "function", f"{NAME}-build", "--platform", "local"]]
    assert outcome.of("nuctl", "get", "function") == []
    assert "--image cvat.pth.facebookresearch.sam2_tracker:latest-gpu" in outcome.text


def test_building_an_image_leaves_the_running_function_alone(machine: Machine) -> None:
    """Nuclio stops a function when one of its name is deployed disabled."""
    outcome = machine.run("deploy_cpu.sh", "--build-only")

    assert outcome.status == 0, outcome.text
    names = [call[2] for call in outcome.of("nuctl", "deploy")]
    assert names == [f"{NAME}-build"]
    assert [call[3] for call in outcome.of("nuctl", "delete")] == names


def staged_port(machine: Machine, config: str) -> object:
    """Return the port in the yaml that nuctl was given."""
    staged = yaml.safe_load((machine.folder / "staged" / config).read_text())
    return staged["spec"]["triggers"]["http"]["attributes"].get("port")


def test_functions_on_one_host_have_ports_of_their_own(machine: Machine) -> None:
    """Docker would give a container another port at each start, and CVAT would call the first."""
    ports = {}
    for folder in (REPOSITORY, INTERACTOR):
        for config in ("function.yaml", "function-gpu.yaml"):
            attributes = yaml.safe_load((folder / config).read_text())["spec"]["triggers"]["http"]
            ports[folder.name, config] = attributes["attributes"]["port"]

    assert len(set(ports.values())) == 2
    assert machine.run("deploy_gpu.sh").status == 0
    assert staged_port(machine, "function-gpu.yaml") == ports[REPOSITORY.name, "function-gpu.yaml"]


def test_port_can_be_chosen(machine: Machine) -> None:
    """The yaml in the checkout stays as it is."""
    outcome = machine.run("deploy_cpu.sh", "--port", "31999")

    assert outcome.status == 0, outcome.text
    assert staged_port(machine, "function.yaml") == 31999
    assert "It listens on port 49153 of this machine" in outcome.text  # which nuctl answered


def test_port_of_another_program_is_found_before_anything_is_built(machine: Machine) -> None:
    """Docker would refuse to start the container after the build."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        outcome = machine.run("deploy_cpu.sh", "--port", str(server.getsockname()[1]))

    assert outcome.status == EXIT_MISSING
    assert "is used by another program: choose another with --port" in outcome.text
    assert outcome.of("docker", "build") == []


@pytest.mark.parametrize(
    ("container", "status"), [("other-function", EXIT_MISSING), (f"nuclio-nuclio-{NAME}", 0)]
)
def test_port_of_a_container_is_free_only_for_its_own_function(
    machine: Machine, container: str, status: int
) -> None:
    """A deployment replaces the function's earlier container."""
    outcome = machine.run("deploy_cpu.sh", answers=[("docker", ["ps"], f"{container}\n", 0)])

    assert outcome.status == status, outcome.text
    assert ("used by the container other-function" in outcome.text) == bool(status)


def test_port_that_changed_at_a_restart_is_noticed(machine: Machine) -> None:
    """Nuclio says ready and names the old port; deployed anew, both agree."""
    first = machine.run("deploy_cpu.sh", answers=[("docker", ["port"], "0.0.0.0:49153\n", 0)])
    restarted = machine.run(
        "deploy_cpu.sh",
        answers=[("docker", ["port"], "0.0.0.0:32772\n", 0), ("curl", [], "", 7)],
    )

    assert first.status == 0, first.text
    assert restarted.status == EXIT_SELF_TEST
    assert "Nuclio calls it on port 49153, but its container has port 32772" in restarted.text


@pytest.mark.parametrize("script", ["deploy_cpu.sh", "deploy_gpu.sh"])
def test_index_of_pytorch_reaches_the_build(machine: Machine, script: str) -> None:
    """As a build argument of the base image, or in the copied GPU yaml."""
    url = f"https://mirror.example.com/whl/{'cpu' if script == 'deploy_cpu.sh' else 'cu130'}"

    outcome = machine.run(script, "--torch-index", f"{url}/")

    assert outcome.status == 0, outcome.text
    if script == "deploy_cpu.sh":
        arguments = ["--build-arg", f"TORCH_INDEX={url}"]
        assert outcome.of("docker", "build") == [docker_build(machine.checkout, *arguments)]
    else:
        staged = (machine.folder / "staged" / "function-gpu.yaml").read_text()
        assert re.findall(r"value: TORCH_INDEX=(.*)", staged) == [url]


def test_missing_buildx_is_found_before_the_build(machine: Machine) -> None:
    """Docker's command line without the plugin fails at the first build."""
    missing = [("docker", ["buildx"], "", 1)]

    assert machine.run("deploy_gpu.sh", answers=missing).status == 0  # Nuclio builds without it
    outcome = machine.run("deploy_cpu.sh", answers=missing)

    assert outcome.status == EXIT_MISSING
    assert "buildx plugin is not installed" in outcome.text


def test_builds_of_a_clone_and_of_an_archive_are_the_same(machine: Machine) -> None:
    """Docker's build cache compares modes, which git gives a clone and an archive differently."""
    modes = []
    for mode in (0o664, 0o644):
        folder = copy_function(machine.folder / f"{mode}")
        for path in folder.rglob("*"):
            path.chmod(mode | 0o111 if path.is_dir() else mode)
        assert machine.run("deploy_cpu.sh", folder).status == 0
        staged = machine.folder / "staged"
        modes.append(
            {str(path.relative_to(staged)): path.stat().st_mode for path in staged.rglob("*")}
        )

    assert modes[0] == modes[1]


def test_proxies_reach_the_build_without_being_printed(machine: Machine) -> None:
    """A proxy's URL may hold a password: Docker reads it from the environment."""
    proxy = "http://user:hunter2@proxy.example.com:3128"

    outcome = machine.run("deploy_cpu.sh", env={"https_proxy": proxy})

    assert outcome.of("docker", "build")[0][4:6] == ["--build-arg", "https_proxy"]
    assert "hunter2" not in outcome.text


def test_dry_run_prints_the_commands_and_runs_none(machine: Machine) -> None:
    """It needs neither docker nor nuctl."""
    machine.remove("docker")
    machine.remove("nuctl")

    outcome = machine.run("deploy_cpu.sh", "--dry-run")

    assert (outcome.status, outcome.calls) == (0, [])
    printed = [line for line in outcome.text.splitlines() if line.startswith("+ ")]
    assert [line.split()[1:3] for line in printed] == [
        ["docker", "build"],
        ["nuctl", "create"],
        ["nuctl", "deploy"],
    ]


@pytest.mark.parametrize(
    ("tool", "message"),
    [
        ("docker", "docker is not installed"),
        ("nuctl", "nuctl is not installed"),
        ("curl", "curl is not installed"),
    ],
)
def test_missing_tool_is_named_before_anything_is_built(
    machine: Machine, tool: str, message: str
) -> None:
    """One run lists everything that is missing."""
    machine.remove(tool)

    outcome = machine.run("deploy_cpu.sh")

    assert outcome.status == EXIT_MISSING
    assert message in outcome.text
    assert outcome.of("docker", "build") == []
    assert outcome.of("nuctl", "deploy") == []


@pytest.mark.parametrize(
    ("script", "answer", "message"),
    [
        ("deploy_cpu.sh", ("docker", ["info"], "", 1), "Docker daemon does not answer"),
        (
            "deploy_cpu.sh",
            ("docker", ["network"], "", 1),
            "Docker network cvat_cvat does not exist",
        ),
        (
            "deploy_gpu.sh",
            ("docker", ["--format", "{{json .}}"], "{}", 0),
            "Docker has no access to GPUs",
        ),
    ],
)
def test_missing_requirement_of_the_machine_is_reported(
    machine: Machine, script: str, answer: Answer, message: str
) -> None:
    """The message names it, and what to do."""
    outcome = machine.run(script, answers=[answer])

    assert outcome.status == EXIT_MISSING
    assert message in outcome.text
    assert outcome.of("nuctl", "deploy") == []


def test_missing_registry_for_kubernetes_is_reported(machine: Machine) -> None:
    """The cluster pulls the image from it."""
    outcome = machine.run("deploy_gpu.sh", "--platform", "kube")

    assert outcome.status == EXIT_MISSING
    assert "--registry" in outcome.text


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            ("docker", [IMAGE], "dashboard:1.8.14-amd64", 0),
            "the version of nuctl is 1.13.0, that of Nuclio's dashboard 1.8.14",
        ),
        (("docker", [IMAGE], "", 1), "no container named nuclio"),
    ],
)
def test_other_version_of_nuclio_is_a_warning(
    machine: Machine, answer: Answer, message: str
) -> None:
    """Different versions often work together, and the dashboard may start later."""
    outcome = machine.run("deploy_cpu.sh", answers=[answer])

    assert outcome.status == 0, outcome.text
    assert f"Warning: {message}" in outcome.text


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (("docker", ["build"], "no space left on device\n", 1), "base image was not built"),
        (("nuctl", ["create"], "forbidden\n", 1), "project cvat was not created"),
    ],
)
def test_nothing_is_deployed_after_a_failure(
    machine: Machine, answer: Answer, message: str
) -> None:
    """The output has the failed command's message, then what it means."""
    outcome = machine.run("deploy_cpu.sh", answers=[answer])

    assert outcome.status == EXIT_FAILED
    assert answer[2] in outcome.text
    assert message in outcome.text
    assert outcome.of("nuctl", "deploy") == []


def test_failed_deployment_is_not_tested(machine: Machine) -> None:
    """An answer would come from an earlier function."""
    outcome = machine.run("deploy_cpu.sh", answers=[("nuctl", ["deploy"], "boom\n", 1)])

    assert outcome.status == EXIT_FAILED
    assert "was not deployed" in outcome.text
    assert outcome.of("curl") == []


def test_self_test_tracks_one_object_on_the_functions_own_port(machine: Machine) -> None:
    """It asks for the health, starts a rectangle, and sends the answered state, as CVAT does."""
    outcome = machine.run("deploy_cpu.sh")

    health, start, go_on = outcome.of("curl")
    assert health[-1] == "http://127.0.0.1:49153/healthz"
    assert "--noproxy" in health
    first, second = (json.loads(call[call.index("--data") + 1]) for call in (start, go_on))
    assert first["shapes"] == [{"type": "rectangle", "points": [16, 16, 48, 48]}]
    assert first["states"] == []
    assert (second["shapes"], second["states"]) == ([None], ["track.step"])
    assert "Self-test passed" in outcome.text


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (("curl", ["http://127.0.0.1:49153/healthz"], "", 22), "is not healthy"),
        (("curl", ["http://127.0.0.1:49153/"], "", 22), "does not start a track"),
        (("curl", ["http://127.0.0.1:49153/"], '{"states": []}', 0), "answered no state"),
        (("nuctl", ["get", "function"], "", 1), "does not find the function"),
    ],
)
def test_function_that_does_not_answer_fails_the_self_test(
    machine: Machine, answer: Answer, message: str
) -> None:
    """The message says which step failed and where the log is."""
    outcome = machine.run("deploy_cpu.sh", answers=[answer])

    assert outcome.status == EXIT_SELF_TEST
    assert message in outcome.text
    assert "CVAT will list it" not in outcome.text


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"project": "default"}, "its project is not cvat"),
        ({"namespace": "lab"}, "its namespace is lab, not nuclio"),
        ({"type": "detector"}, "its annotation type is not tracker"),
        ({"state": "error"}, "its state is not ready"),
    ],
)
def test_function_that_cvat_will_not_list_is_reported(
    machine: Machine, changes: dict[str, str], reason: str
) -> None:
    """This is the most common problem; one line gives the reason."""
    outcome = machine.run(
        "deploy_cpu.sh", answers=[("nuctl", ["get", "function"], function_status(**changes), 0)]
    )

    assert outcome.status == EXIT_SELF_TEST
    assert f"CVAT will not list it: {reason}" in outcome.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--platform", "swarm"], "expected local or kube"),
        (["--platform"], "needs a value"),
        (["--env", "NOVALUE"], "NAME=VALUE"),
        (["--model", "a b"], "not a model id"),
        (["--port", "http"], "expected a number from 1 to 65535"),
        (["--port", "70000"], "expected a number from 1 to 65535"),
        (["--port", "8080", "--platform", "kube"], "cannot be combined with --platform kube"),
        (["--torch-index", "cu130"], "is not a URL like"),
        (["--torch-index", "https://x.org/whl/cu130"], "a URL that ends in /cpu"),
        (["--torch-index", "https://x/cpu", "--image", "x"], "--image, which builds nothing"),
        (["--frobnicate"], "not an option"),
        (["--build-only", "--image", "x"], "cannot be combined with --platform kube or --image"),
        (["one", "two"], "expected one folder, found two: one and two"),
        (["/nowhere"], "has no function.yaml"),
    ],
)
def test_wrong_options_are_refused_with_what_is_expected(
    machine: Machine, arguments: list[str], message: str
) -> None:
    """No command has run."""
    outcome = machine.run("deploy_cpu.sh", *arguments)

    assert (outcome.status, outcome.calls) == (EXIT_USAGE, [])
    assert message in outcome.text


def test_help_names_every_option(machine: Machine) -> None:
    """The help text has all options of the script."""
    script = (REPOSITORY / "deploy" / "deploy_lib.sh").read_text()
    cases = re.findall(r"^ +(--[a-z-]+(?: \| --?[a-z-]+)*)\)", script, flags=re.MULTILINE)
    known = {option for case in cases for option in case.split(" | ") if len(option) > 2}

    outcome = machine.run("deploy_gpu.sh", "--help")

    assert outcome.status == 0
    assert len(known) >= 10
    assert {option for option in known if option not in outcome.text} == set()


@pytest.mark.skipif(
    shutil.which("shellcheck") is None and "CI" not in os.environ, reason="no shellcheck here"
)
@pytest.mark.parametrize(
    "arguments",
    [
        ["--external-sources", "--check-sourced", "deploy_cpu.sh"],
        ["--exclude=SC1091", "deploy_gpu.sh"],  # does not check the shared library a second time
    ],
)
def test_scripts_are_shellcheck_clean(arguments: list[str]) -> None:
    """Neither the scripts nor the library that they source have quoting mistakes."""
    done = subprocess.run(
        ["shellcheck", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stdout


def copy_function(target: Path, *, scripts: bool = False) -> Path:
    """Make a folder like the repository's root, with stand-ins for the code."""
    (target / "weights" / "micro").mkdir(parents=True)
    (target / "weights" / "micro" / "config.yaml").write_text("")
    (target / "main.py").write_text("")
    (target / "interaction").mkdir()
    (target / "interaction" / "main.py").write_text("")
    (target / "deploy").mkdir()
    names = ["function.yaml", "function-gpu.yaml", "Dockerfile", "deploy/download_weights.py"]
    names += ["deploy/check_torch_index.py"]
    names += ["requirements.txt", "requirements-torch.txt"]
    if scripts:
        names += ["deploy_cpu.sh", "deploy_gpu.sh", "deploy/deploy_lib.sh"]
    for name in names:
        shutil.copy(REPOSITORY / name, target / name)
    return target


def cvats_docker_build(config: Path) -> list[str]:
    """Return what CVAT's deploy_cpu.sh starts for a function.yaml below `serverless/`.

    Source: serverless/deploy_cpu.sh of CVAT. The tag is made of the path from `serverless/` to the
    folder above the one that holds the yaml.
    """
    folder = config.parent
    serverless = next(parent for parent in config.parents if parent.name == "serverless")
    tag = str(folder.parent.relative_to(serverless)).replace("/", ".")
    return ["docker", "build", "--tag", f"cvat.{tag}.base", str(folder)]


def repository_files() -> Iterator[Path]:
    """Yield the repository's files, without hidden folders and results."""
    for folder, names, files in os.walk(REPOSITORY):
        names[:] = [name for name in names if not name.startswith(".") and name != "out"]
        yield from (Path(folder, name) for name in files)
