from __future__ import annotations

import fnmatch
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from settings import DEFAULT_MODEL_ID, Limits, Settings
from shapes import ShapeType

REPOSITORY = Path(__file__).parent.parent
CPU = REPOSITORY / "function.yaml"
GPU = REPOSITORY / "function-gpu.yaml"
KUBERNETES = REPOSITORY / "deploy" / "kubernetes" / "tracker.yaml"
INTERACTOR_CPU = REPOSITORY / "interactor" / "function.yaml"
INTERACTOR_GPU = REPOSITORY / "interactor" / "function-gpu.yaml"
INTERACTOR_KUBERNETES = REPOSITORY / "deploy" / "kubernetes" / "interactor.yaml"
TRACKERS = [CPU, GPU, KUBERNETES]
INTERACTORS = [INTERACTOR_CPU, INTERACTOR_GPU, INTERACTOR_KUBERNETES]
CONFIGS = [*TRACKERS, *INTERACTORS]
ON_DOCKER = [CPU, GPU, INTERACTOR_CPU, INTERACTOR_GPU]
DOCKERFILE = REPOSITORY / "Dockerfile"

# Fields and types of Nuclio's function configuration: a dict names all its fields, `{...: type}`
# is a map with free keys, `[type]` a list.
# Source: pkg/functionconfig/types.go, pkg/processor/trigger/http/types.go and
# pkg/platform/local/types.go of Nuclio; Kubernetes' core v1 types for what these embed.
TEXTS = {...: str}
QUANTITIES = {...: (str, int)}
DIRECTIVE = {"kind": str, "value": str}
KEY_OF = {"name": str, "key": str, "optional": bool}
ENV = {
    "name": str,
    "value": str,
    "valueFrom": {"secretKeyRef": KEY_OF, "configMapKeyRef": KEY_OF},
}
RESTART_POLICY = {"name": str, "maximumRetryCount": int}
HTTP_ATTRIBUTES = {
    "port": int,
    "readBufferSize": int,
    "maxRequestBodySize": int,
    "reduceMemoryUsage": bool,
    "disablePortPublishing": bool,
    "serviceType": str,
    "ingresses": {...: {"host": str, "paths": [str], "pathType": str, "secretName": str}},
}
TRIGGER = {
    "class": str,
    "kind": str,
    "name": str,
    "disabled": bool,
    "numWorkers": int,
    "url": str,
    "annotations": TEXTS,
    "workerTerminationTimeout": str,
    "workerAvailabilityTimeoutMilliseconds": int,
    "attributes": HTTP_ATTRIBUTES,
}
BUILD = {
    "path": str,
    "registry": str,
    "baseImageRegistry": str,
    "image": str,
    "noBaseImagesPull": bool,
    "noCache": bool,
    "baseImage": str,
    "commands": [str],
    "directives": {"preCopy": [DIRECTIVE], "postCopy": [DIRECTIVE]},
    "onbuildImage": str,
    "offline": bool,
    "buildTimeoutSeconds": int,
    "mode": str,
    "args": TEXTS,
    "flags": [str],
}
VOLUME = {
    "volume": {
        "name": str,
        "secret": {"secretName": str, "optional": bool},
        "hostPath": {"path": str, "type": str},
        "persistentVolumeClaim": {"claimName": str, "readOnly": bool},
        "emptyDir": {"medium": str, "sizeLimit": str},
    },
    "volumeMount": {"name": str, "mountPath": str, "subPath": str, "readOnly": bool},
}
TOLERATION = {
    "key": str,
    "operator": str,
    "value": str,
    "effect": str,
    "tolerationSeconds": int,
}
SPEC = {
    "description": str,
    "disable": bool,
    "handler": str,
    "runtime": str,
    "env": [ENV],
    "resources": {"limits": QUANTITIES, "requests": QUANTITIES},
    "image": str,
    "replicas": int,
    "minReplicas": int,
    "maxReplicas": int,
    "targetCPU": int,
    "triggers": {...: TRIGGER},
    "volumes": [VOLUME],
    "build": BUILD,
    "runRegistry": str,
    "imagePullSecrets": str,
    "loggerSinks": [{"level": str, "sink": str}],
    "platform": {
        "attributes": {
            "network": str,
            "restartPolicy": RESTART_POLICY,
            "healthCheckInterval": (str, int),
        }
    },
    "readinessTimeoutSeconds": int,
    "waitReadinessTimeoutBeforeFailure": bool,
    "serviceType": str,
    "imagePullPolicy": str,
    "securityContext": {
        "runAsUser": int,
        "runAsGroup": int,
        "runAsNonRoot": bool,
        "fsGroup": int,
    },
    "serviceAccount": str,
    "nodeSelector": TEXTS,
    "tolerations": [TOLERATION],
    "priorityClassName": str,
    "eventTimeout": str,
}
CONFIG = {
    "metadata": {"name": str, "namespace": str, "labels": TEXTS, "annotations": TEXTS},
    "spec": SPEC,
}


def name_of(path: Path) -> str:
    """Return a configuration's path within the repository."""
    return str(path.relative_to(REPOSITORY))


def complaints(value: Any, schema: Any, path: str = "") -> list[str]:
    """Return where a value differs from a schema of fields and types."""
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            return [f"{path}: expected a mapping, not {value!r}"]
        listed = []
        for key, item in value.items():
            inner = schema.get(key, schema.get(...))
            if inner is None:
                listed.append(f"{path}.{key}: unknown field")
            else:
                listed += complaints(item, inner, f"{path}.{key}")
        return listed
    if isinstance(schema, list):
        if not isinstance(value, list):
            return [f"{path}: expected a list, not {value!r}"]
        return [
            complaint
            for index, item in enumerate(value)
            for complaint in complaints(item, schema[0], f"{path}[{index}]")
        ]
    types = schema if isinstance(schema, tuple) else (schema,)
    if type(value) in types:  # not isinstance: a bool is an int
        return []
    return [f"{path}: expected {' or '.join(kind.__name__ for kind in types)}, not {value!r}"]


def read(path: Path) -> dict[str, Any]:
    """Return a function configuration."""
    config = yaml.safe_load(path.read_text())
    assert isinstance(config, dict)
    return config


def trigger(path: Path) -> dict[str, Any]:
    """Return the only trigger of a configuration."""
    (only,) = read(path)["spec"]["triggers"].values()
    assert isinstance(only, dict)
    return only


def directives(path: Path, when: str, kind: str) -> list[str]:
    """Return the values of all build directives of a kind."""
    listed = read(path)["spec"]["build"]["directives"][when]
    return [directive["value"] for directive in listed if directive["kind"] == kind]


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_every_field_is_one_that_nuclio_knows(path: Path) -> None:
    """Nuclio ignores unknown fields silently, so a typing error would go unnoticed."""
    assert complaints(read(path), CONFIG) == []


def test_schema_finds_unknown_fields_and_wrong_types() -> None:
    """`maxWorkers`, which Nuclio 1.13 ignores, counts as unknown."""
    config = {
        "metadata": {"annotations": {"version": 2}},
        "spec": {"triggers": {"http": {"maxWorkers": 2, "numWorkers": True}}, "env": {}},
    }

    assert complaints(config, CONFIG) == [
        ".metadata.annotations.version: expected str, not 2",
        ".spec.triggers.http.maxWorkers: unknown field",
        ".spec.triggers.http.numWorkers: expected int, not True",
        ".spec.env: expected a list, not {}",
    ]


@pytest.mark.parametrize("path", TRACKERS, ids=name_of)
def test_cvat_reads_a_tracker_for_four_shape_types(path: Path) -> None:
    """CVAT's server (cvat/apps/lambda_manager) reads the annotations by these rules."""
    metadata = read(path)["metadata"]
    annotations = metadata["annotations"]

    assert metadata["name"] == "pth-facebookresearch-sam2-tracker"
    assert metadata["labels"]["nuclio.io/project-name"] == "cvat"
    assert annotations.get("name", metadata["name"]) == "Segment Anything 2: Tracker"
    assert annotations["type"] == "tracker"
    assert json.loads(annotations.get("spec") or "[]") == []
    assert int(annotations.get("version", "1")) == 2
    assert int(annotations.get("min_pos_points", 1)) == 1
    assert int(annotations.get("min_neg_points", -1)) == -1
    # read with bool(str): any text, "false" too, would count as true
    assert not annotations.keys() & {"startswith_box", "startswith_box_optional"}
    types = annotations["supported_shape_types"].split(",")
    assert [ShapeType(name) for name in types] == list(dict.fromkeys(map(ShapeType, types)))
    assert set(types) == set(ShapeType)
    assert read(path)["spec"]["description"]


@pytest.mark.parametrize("path", INTERACTORS, ids=name_of)
def test_cvat_reads_an_interactor_that_takes_a_box_or_points(path: Path) -> None:
    """The same rules; CVAT sends a box without points only if `min_pos_points` is 0."""
    metadata = read(path)["metadata"]
    annotations = metadata["annotations"]

    assert metadata["name"] == "pth-facebookresearch-sam2-interactor"
    assert metadata["labels"]["nuclio.io/project-name"] == "cvat"
    assert annotations["name"] == "Segment Anything 2: Interactor"
    assert annotations["type"] == "interactor"
    assert json.loads(annotations.get("spec") or "[]") == []
    assert int(annotations["version"]) == 2  # below there is no Interact button
    assert int(annotations["min_pos_points"]) == 0
    assert int(annotations["min_neg_points"]) == 0
    assert bool(annotations["startswith_box_optional"])
    assert "startswith_box" not in annotations  # the text false would count as true
    assert "supported_shape_types" not in annotations
    assert {"left clicks", "right clicks", "box"} <= set(
        re.findall("left clicks|right clicks|box", annotations["help_message"])
    )
    assert not re.search("extreme|-most", annotations["help_message"])  # off by default
    assert read(path)["spec"]["description"]


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_handler_exists(path: Path) -> None:
    """Nuclio imports the module and calls both of its functions."""
    module, _, handler = read(path)["spec"]["handler"].partition(":")
    source = (REPOSITORY / f"{module.replace('.', '/')}.py").read_text()

    assert f"def {handler}(context" in source
    assert "def init_context(context" in source


def test_interactor_is_built_on_the_trackers_images() -> None:
    """Those images hold code and weights; the interactor's folder holds only its two yaml files."""
    folder = INTERACTOR_CPU.parent
    build = read(INTERACTOR_CPU)["spec"]["build"]
    gpu_build = read(INTERACTOR_GPU)["spec"]["build"]
    images = {read(path)["spec"]["build"]["image"] for path in ON_DOCKER}

    assert build["baseImage"] == read(CPU)["spec"]["build"]["baseImage"]
    assert gpu_build["baseImage"] == read(GPU)["spec"]["build"]["image"]
    assert build["directives"] == gpu_build["directives"]
    assert build["directives"] == read(CPU)["spec"]["build"]["directives"]
    assert len(images) == len(ON_DOCKER)
    assert set(folder.iterdir()) == {INTERACTOR_CPU, INTERACTOR_GPU}


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_all_configurations_describe_the_same_function(path: Path) -> None:
    """The yaml files differ in where the function runs, not in what it is."""
    reference = read(CPU if path in TRACKERS else INTERACTOR_CPU)

    config = read(path)

    assert config["metadata"] == reference["metadata"]
    for field in ("description", "runtime", "handler"):
        assert config["spec"][field] == reference["spec"][field]
    ours, expected = trigger(path), trigger(CPU)
    ours["attributes"].pop("serviceType", None)
    port = ours["attributes"].pop("port", None)
    on_docker = 32270 if path in TRACKERS else 32271
    assert port == (on_docker if path in ON_DOCKER else None)  # Kubernetes has services instead
    expected["attributes"].pop("port")
    assert ours == expected


@pytest.mark.parametrize("path", CONFIGS, ids=name_of)
def test_limits_of_nuclio_fit_those_of_the_function_and_of_cvat(path: Path) -> None:
    """CVAT waits 120 s: a call waits less for a worker, and is not killed earlier."""
    cvat_timeout_s = 120
    spec = read(path)["spec"]
    seconds = re.fullmatch(r"(\d+)s", spec["eventTimeout"])
    assert seconds

    assert trigger(path)["attributes"]["maxRequestBodySize"] == Limits().body_bytes
    assert trigger(path)["numWorkers"] == 1
    assert int(seconds[1]) > 2 * cvat_timeout_s
    assert 10_000 < trigger(path)["workerAvailabilityTimeoutMilliseconds"] < 1000 * cvat_timeout_s
    assert trigger(path)["workerTerminationTimeout"] == f"{Settings().request_limit_s:g}s"
    assert spec["readinessTimeoutSeconds"] >= 300


@pytest.mark.parametrize("path", ON_DOCKER, ids=name_of)
def test_docker_brings_a_dead_function_back(path: Path) -> None:
    """Nuclio's processor exits when one of its workers ends."""
    attributes = read(path)["spec"]["platform"]["attributes"]

    assert attributes["restartPolicy"]["name"] == "always"


@pytest.mark.parametrize("path", ON_DOCKER, ids=name_of)
def test_store_is_left_to_the_command_line(path: Path) -> None:
    """A Redis host in the yaml would conflict with the one that scripts pass with --env."""
    assert "env" not in read(path)["spec"]
    assert read(path)["spec"]["minReplicas"] == read(path)["spec"]["maxReplicas"] == 1


def test_gpu_is_asked_for_where_it_is_needed() -> None:
    """Docker and Kubernetes give a GPU only to a container that has this limit."""
    for path in CONFIGS:
        asked = read(path)["spec"]["resources"]["limits"].get("nvidia.com/gpu", 0)
        assert asked == (path not in {CPU, INTERACTOR_CPU})
    (environment, start) = directives(GPU, "preCopy", "ENV")
    assert "NVIDIA_VISIBLE_DEVICES=all" in environment.split()
    assert "SAM2_DEVICE=cuda" in start.split()


@pytest.mark.parametrize("path", ON_DOCKER, ids=name_of)
def test_image_is_built_as_root_and_runs_as_another_user(path: Path) -> None:
    """Nuclio installs its wheels, as root, before postCopy; Kubernetes wants a user number."""
    steps = read(path)["spec"]["build"]["directives"]

    assert steps["postCopy"][-1] == {"kind": "USER", "value": "1000:1000"}
    assert steps["postCopy"][-2]["value"] == "chmod -R a+rX /opt/nuclio"
    if path != GPU:
        assert steps["preCopy"] == [{"kind": "USER", "value": "root"}]


def test_kubernetes_overlays_differ_in_what_redis_needs() -> None:
    """Node selection, user and resources are equal for both functions."""
    tracker, interactor = read(KUBERNETES)["spec"], read(INTERACTOR_KUBERNETES)["spec"]
    differing = {"description", "handler", "env", "volumes", "minReplicas", "maxReplicas"}

    assert "build" not in interactor
    assert not interactor.keys() & {"env", "volumes"}
    assert {name for name in tracker if tracker[name] != interactor.get(name)} == differing


def test_kubernetes_overlay_takes_an_image_and_secrets() -> None:
    """With a build section nuctl would build an image; a password in a yaml would be readable."""
    spec = read(KUBERNETES)["spec"]
    env = {variable["name"]: variable for variable in spec["env"]}

    assert "build" not in spec
    assert "secretKeyRef" in env["CVAT_FUNCTIONS_REDIS_PASSWORD"]["valueFrom"]
    assert spec["minReplicas"] >= 1
    values = {name: variable.get("value", "a secret") for name, variable in env.items()}
    redis = Settings.from_env(values).redis
    assert redis is not None
    assert redis.ssl
    assert redis.ssl_ca_certs == "/etc/redis-ca/ca.crt"
    assert {volume["volumeMount"]["mountPath"] for volume in spec["volumes"]} == {"/etc/redis-ca"}


# Dockerfile


def instructions(text: str) -> list[tuple[str, str]]:
    """Return a Dockerfile's instructions with their arguments, continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE)
    parsed = []
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        if line.strip():
            name, _, arguments = line.partition(" ")
            parsed.append((name, arguments.strip()))
    return parsed


def values_of(name: str) -> list[str]:
    """Return the arguments of all instructions of a kind in our Dockerfile."""
    return [value for kind, value in instructions(DOCKERFILE.read_text()) if kind == name]


def test_dockerfile_follows_the_rules_of_hadolint_that_apply_to_it() -> None:
    """The full check is run by hand (`hadolint Dockerfile`); these rules an edit may break."""
    parsed = instructions(DOCKERFILE.read_text())
    kinds = [kind for kind, _ in parsed]
    known = {"ARG", "CMD", "COPY", "ENV", "EXPOSE", "FROM", "HEALTHCHECK", "RUN", "USER", "WORKDIR"}

    assert set(kinds) <= known  # DL3020: COPY, not ADD; DL4000: no MAINTAINER
    assert kinds.count("CMD") == kinds.count("HEALTHCHECK") == 1  # DL4003, DL3012
    assert all(re.search(r":\d[^:]*$", image) for image in values_of("FROM"))  # DL3006, DL3007
    assert all(path.startswith("/") for path in values_of("WORKDIR"))  # DL3000
    assert values_of("USER")[-1] not in {"root", "0"}  # DL3002
    assert "ENTRYPOINT" not in kinds  # Nuclio sets the command only
    for command in values_of("RUN"):
        assert not re.search(r"\b(sudo|cd |apt |latest)", command)  # DL3004, DL3003, DL3027
        assert "|" not in command.replace("||", "")  # DL4006
        for install in re.findall(r"pip install [^&]*", command):
            assert "--requirement" in install  # DL3013: pinned, see below
    assert "PIP_NO_CACHE_DIR=1" in " ".join(values_of("ENV"))  # DL3042
    for command in values_of("CMD"):
        assert json.loads(command)[0] == "python"  # DL3025: as JSON
    (check,) = values_of("HEALTHCHECK")
    assert json.loads(check[check.index("[") :])[:2] == ["python", "-c"]


def test_layers_that_change_least_come_first() -> None:
    """A change of code must not install PyTorch or download the weights again."""
    text = DOCKERFILE.read_text()
    order = [
        "requirements-torch.txt requirements.txt",
        "deploy/download_weights.py",
        "weights/",
        "*.py",
    ]

    positions = [text.index(f"COPY {sources}") for sources in order]

    assert positions == sorted(positions)
    assert text.index("ARG SAM2_MODEL_ID") > text.index("--no-build-isolation")


def test_everything_that_is_copied_exists_and_is_not_ignored() -> None:
    """.dockerignore excludes everything but what the Dockerfiles copy."""
    allowed = [
        line[1:].rstrip("/")
        for line in (REPOSITORY / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    ]
    sources = [source for value in values_of("COPY") for source in value.split()[:-1]]

    assert "*" in (REPOSITORY / ".dockerignore").read_text().splitlines()
    for source in sources:
        assert list(REPOSITORY.glob(source)), f"{source} does not exist"
        assert any(fnmatch.fnmatch(source.rstrip("/"), pattern) for pattern in allowed), source
    assert not any(fnmatch.fnmatch(".venv", pattern) for pattern in allowed)


def test_cpu_and_gpu_images_are_built_alike() -> None:
    """Same Python, same pins, same model; only the index of PyTorch's wheels differs."""
    assert read(GPU)["spec"]["build"]["baseImage"] == values_of("FROM")[0]
    gpu = dict(value.split("=", 1) for value in directives(GPU, "preCopy", "ARG"))
    cpu = dict(value.split("=", 1) for value in values_of("ARG"))

    assert gpu.keys() == cpu.keys()
    assert gpu["SAM2_MODEL_ID"] == cpu["SAM2_MODEL_ID"] == DEFAULT_MODEL_ID
    assert cpu["TORCH_INDEX"] == "https://download.pytorch.org/whl/cpu"
    assert re.fullmatch(r"https://download\.pytorch\.org/whl/cu12\d", gpu["TORCH_INDEX"])
    # the same commands, except for the check of the wheel and the compiler for SAM2_COMPILE
    assert_line = re.compile(r'&& python -c ".*"')
    commands = [
        [assert_line.sub("", " ".join(command.split())).strip() for command in image_commands]
        for image_commands in (
            values_of("RUN"),
            [*directives(GPU, "preCopy", "RUN"), *directives(GPU, "postCopy", "RUN")],
        )
    ]
    (compiler,) = (command for command in commands[1] if command.startswith("apt-get"))
    assert commands[0] == [command for command in commands[1] if command != compiler]


def test_gpu_image_has_the_compiler_that_sam2_compile_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Installed while the image is built as root, it is one that the start-up looks for."""
    import torch

    from model_loader import require_compiler

    (install,) = (
        command for command in directives(GPU, "preCopy", "RUN") if command.startswith("apt-get")
    )
    for package in install.partition("--no-install-recommends")[2].partition("&&")[0].split():
        (tmp_path / package).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)

    require_compiler(torch.device("cuda"))
    assert "libc6-dev" in install
    assert install.endswith("rm -rf /var/lib/apt/lists/*")


def test_gpu_yaml_copies_from_nuclios_build_context() -> None:
    """Nuclio copies the function's folder to `handler` in the build context."""
    sources = [
        source for value in directives(GPU, "preCopy", "COPY") for source in value.split()[:-1]
    ]

    assert sources
    for source in sources:
        folder, _, name = source.partition("/")
        assert folder == "handler"
        assert (REPOSITORY / name).is_file()


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-torch.txt"])
def test_every_requirement_of_the_image_is_pinned(name: str) -> None:
    """The same folder builds the same image next year."""
    lines = [line.split("#")[0].strip() for line in (REPOSITORY / name).read_text().splitlines()]

    for line in filter(None, lines):
        assert re.fullmatch(r"-r [\w.-]+|[\w.-]+==[\w.]+", line), line


def test_compose_starts_the_tracker_after_its_redis() -> None:
    """Names, ports and variables are those that the function uses."""
    services = yaml.safe_load((REPOSITORY / "compose.yaml").read_text())["services"]
    tracker = services["tracker"]
    defaults = {
        name: re.sub(r"\$\{\w+:-(.*)\}", r"\1", value)
        for name, value in tracker["environment"].items()
    }

    redis = Settings.from_env(defaults).redis
    assert redis is not None
    assert (redis.host, redis.port, redis.password) == ("redis", 6379, None)
    assert tracker["depends_on"] == {"redis": {"condition": "service_healthy"}}
    assert "healthcheck" in services["redis"]
    assert tracker["image"] == read(CPU)["spec"]["build"]["baseImage"]
    assert tracker["ports"] == [f"127.0.0.1:${{SAM2_PORT:-8070}}:{values_of('EXPOSE')[0]}"]
    assert re.fullmatch(r"redis:\d+\.\d+\.\d+-alpine", services["redis"]["image"])
