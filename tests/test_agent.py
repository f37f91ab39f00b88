from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import cvat_sdk.auto_annotation as cvataa
import numpy as np
import pytest
from cvat_cli._internal import agent_driver_tracking as driver
from PIL import Image

from settings import Settings
from shapes import encode_cvat_rle
from testbed.cvat_agent_stub import TOKEN, CvatStub, RequestFailedError
from testbed.drawn_frames import base64_text, blob_mask, block_mask, jpeg_frames
from testbed.functions import Function
from testbed.redis_server import RedisServer

REPOSITORY = Path(__file__).parent.parent
FUNCTION_FILE = ["--function-file", str(REPOSITORY / "agent" / "func.py")]
INTERACTOR_FILE = ["--function-file", str(REPOSITORY / "agent" / "interactor.py")]


def png_frames(count: int, **options: Any) -> list[bytes]:
    """Return frames as CVAT serves those of a video."""
    pictures = [
        cv2.imdecode(np.frombuffer(frame, np.uint8), cv2.IMREAD_COLOR)
        for frame in jpeg_frames(count, **options)
    ]
    return [
        cv2.imencode(".png", picture)[1].tobytes() for picture in pictures if picture is not None
    ]


FRAMES = png_frames(21)
TASK, OTHER_TASK, MIXED_TASK = 7, 8, 9
TASKS = {
    TASK: FRAMES,
    OTHER_TASK: png_frames(2, seed=1),
    MIXED_TASK: [FRAMES[0], *png_frames(1, size_hw=(90, 160))],
}
MASK = {"type": "mask", "points": encode_cvat_rle(blob_mask())}
SHAPES = [
    MASK,
    {"type": "mask", "points": encode_cvat_rle(block_mask())},
    {"type": "polygon", "points": [30.0, 60.0, 90.0, 60.0, 90.0, 120.0, 30.0, 120.0]},
    {"type": "rectangle", "points": [220.0, 40.0, 271.0, 101.0]},
    {"type": "ellipse", "points": [60.0, 90.0, 90.0, 60.0]},
]
RECTANGLE = 3
ID = re.compile(r"[\w-]{22}\.[\w-]{22}")


@dataclass
class Machine:
    """Starts agents: with which CVAT, variables and folder."""

    cvat: CvatStub
    environment: Mapping[str, str]
    folder: Path
    agents: list[Agent] = field(default_factory=list)

    def with_(self, environment: Mapping[str, str]) -> Machine:
        """Return the same machine with further variables."""
        return replace(self, environment={**self.environment, **environment})

    def cli(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run `cvat-cli function …` until it exits."""
        return subprocess.run(
            self._command(arguments),
            env=self.environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
        )

    def start_agent(
        self, function: int, file: Sequence[str] = FUNCTION_FILE, **environment: str
    ) -> Agent:
        """Start `cvat-cli function run-agent` without --burst."""
        log = self.folder / f"{time.monotonic_ns()}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                self._command(["run-agent", str(function), *file]),
                env={**self.environment, **environment},
                cwd=self.folder,
                stderr=output,
                start_new_session=True,
            )
        self.agents.append(Agent(self.cvat, function, process, log))
        return self.agents[-1]

    def _command(self, arguments: Sequence[str]) -> list[str]:
        host = ["--server-host", self.cvat.url]
        return [sys.executable, "-m", "cvat_cli", *host, "function", *arguments]


@dataclass
class Agent:
    """A running agent."""

    cvat: CvatStub
    function: int
    process: subprocess.Popen[bytes]
    log: Path

    def ask(self, **params: Any) -> dict[str, Any]:
        """Return the answer to a request.

        Raises:
            RequestFailedError: With the agent's message.
        """
        answer = self.cvat.submit(self.function, **params)
        while not wait([answer], timeout=0.1, return_when=FIRST_COMPLETED).done:
            assert self.process.poll() is None, self.log.read_text()
        return answer.result()

    def start(self, shapes: Sequence[Any], *, task: int = TASK) -> list[str]:
        """Start objects on frame 0 and return their states."""
        answer = self.ask(type="init_tracking", task=task, frame=0, shapes=shapes)
        states: list[str] = answer["states"]
        return states

    def track(self, frame: int, states: Sequence[str], *, task: int = TASK) -> list[Any]:
        """Track objects on a frame and return their shapes."""
        answer = self.ask(type="track", task=task, frame=frame, states=states)
        assert answer["states"] == states
        shapes: list[Any] = answer["shapes"]
        return shapes

    @property
    def worker(self) -> int:
        """The id of the process that holds the model."""
        (*_, last) = re.findall(r"'process': '(\d+)'", self.log.read_text())
        return int(last)

    def kill(self) -> None:
        """Kill the agent and its worker."""
        with suppress(ProcessLookupError):  # it has ended
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def stop(self) -> str:
        """Interrupt the agent as Ctrl-C does and return its log."""
        self.process.send_signal(signal.SIGINT)
        self.process.wait(30)
        return self.log.read_text()


def is_running(process: int) -> bool:
    """Tell whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


class Expected:
    """The Nuclio function's answers for the same frames and shapes."""

    def __init__(self, function: Function, shapes: Sequence[Any]) -> None:
        self._function = function
        self._states = function.track(base64_text(FRAMES[0]), list(shapes), [])["states"]

    def track(self, frame: int) -> list[Any]:
        """Return the shapes on the next frame, without `outside`, which agents cannot send."""
        no_shapes = [None] * len(self._states)
        answer = self._function.track(base64_text(FRAMES[frame]), no_shapes, self._states)
        self._states = answer["states"]
        return [
            None if shape is None else {"type": shape["type"], "points": shape["points"]}
            for shape in answer["shapes"]
        ]


@pytest.fixture(scope="module")
def cvat() -> Iterator[CvatStub]:
    """Serve the tasks of this module."""
    stub = CvatStub(TASKS)
    yield stub
    stub.close()


@pytest.fixture(scope="module")
def model(micro: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The variables of a very small model that loses the rectangle, and later the second mask."""
    import torch

    weights = torch.load(micro["SAM2_CHECKPOINT"], weights_only=True)
    # The model's object scores lie between 1.07 and 1.1: now some of them are below zero.
    weights["model"]["sam_mask_decoder.pred_obj_score_head.layers.2.bias"] -= 1.085
    path = tmp_path_factory.mktemp("weights") / "forgetful.pt"
    torch.save(weights, path)
    # equal bits need equal numbers of threads
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    return micro | threads | {"SAM2_CHECKPOINT": str(path)}


@pytest.fixture(scope="module")
def function(
    start_function: Callable[[dict[str, str]], Function],
    model: dict[str, str],
    redis_server: RedisServer,
) -> Function:
    """The Nuclio function with this model."""
    return start_function(model | redis_server.environment)


@pytest.fixture(scope="module")
def machine(
    cvat: CvatStub, model: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Machine]:
    """A machine without Redis; all its agents are killed when the module ends."""
    other = {
        name: os.environ[name] for name in os.environ if not name.startswith(("SAM2_", "CVAT_"))
    }
    environment = other | model | {"CVAT_ACCESS_TOKEN": TOKEN}
    started = Machine(cvat, environment, tmp_path_factory.mktemp("agents"))
    yield started
    for agent in started.agents:
        agent.kill()


@pytest.fixture(scope="module")
def pool(machine: Machine, redis_server: RedisServer) -> Machine:
    """The same machine, whose agents share a Redis server."""
    return machine.with_(redis_server.environment | {"CVAT_FUNCTIONS_REDIS_TIMEOUT": "1"})


@pytest.fixture(scope="module")
def registered(machine: Machine) -> int:
    """The id of a function made by `create-native`."""
    done = machine.cli("create-native", "SAM 2", *FUNCTION_FILE)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.fixture
def own(cvat: CvatStub, registered: int) -> int:
    """The id of a function without agents of other tests."""
    return cvat.register(cvat.functions[registered])


@pytest.fixture(scope="module")
def agent(pool: Machine, registered: int) -> Agent:
    """An agent for the tests that do not stop it."""
    return pool.start_agent(registered)


@pytest.fixture(scope="module")
def interactor_agent(machine: Machine) -> Agent:
    """An agent of the interactor, registered by `create-native`."""
    done = machine.cli("create-native", "Interactor", *INTERACTOR_FILE)
    assert done.returncode == 0, done.stderr
    return machine.start_agent(int(done.stdout), INTERACTOR_FILE)


def test_registering_tells_cvat_the_shapes(cvat: CvatStub, registered: int) -> None:
    """`create-native` registers a tracker of all four shape types."""
    assert cvat.functions[registered] == {
        "id": registered,
        "provider": "native",
        "name": "SAM 2",
        "visibility": "private",
        "kind": "tracker",
        "supported_shape_types": ["ellipse", "mask", "polygon", "rectangle"],
    }


def test_registering_needs_no_model() -> None:
    """A function can be registered on a machine without weights or GPU."""
    from agent.tracking_function import create

    made = create(config="not_here.yaml", checkpoint="/not/here.pt", device="cuda:99")

    assert made.spec.supported_shape_types == {"mask", "polygon", "rectangle", "ellipse"}


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ({"image_size": 500}, "SAM2_IMAGE_SIZE='500' is not allowed: expected a multiple of 32"),
        ({"device": "gpu"}, "SAM2_DEVICE='gpu' is not allowed: expected auto, cpu, cuda or cuda:N"),
        ({"batch_objects": 1.5}, "SAM2_BATCH_OBJECTS='1.5' is not allowed: expected a whole"),
        ({"config": "c.yaml"}, "SAM2_CHECKPOINT is not set: SAM2_CONFIG and SAM2_CHECKPOINT go"),
        (
            {"model_id": "micro", "config": "c.yaml", "checkpoint": "c.pt"},
            "model_id and config with",
        ),
        ({"size": 512}, "parameter size is not known: expected some of model_id, config"),
    ],
)
def test_wrong_parameter_is_refused(parameters: dict[str, Any], reason: str) -> None:
    """A wrong parameter ends the command with the allowed values."""
    from agent.tracking_function import create

    with pytest.raises(SystemExit, match=f"^cannot start: {re.escape(reason)}"):
        create(**parameters)


def test_refusal_is_one_line(machine: Machine) -> None:
    """cvat-cli prints only the reason, and registers nothing."""
    known = dict(machine.cvat.functions)

    done = machine.cli("create-native", "wrong", *FUNCTION_FILE, "-p", "image_size=int:500")

    assert done.returncode == 1
    assert re.fullmatch(r"cannot start: SAM2_IMAGE_SIZE='500' is not allowed: .*\n", done.stderr)
    assert machine.cvat.functions == known


def test_agent_that_cannot_serve_does_not_start(machine: Machine, registered: int) -> None:
    """Missing weights end the agent before it takes a request, with a message."""
    parameter = ["-p", "checkpoint=str:/not/here.pt"]

    done = machine.cli("run-agent", str(registered), *FUNCTION_FILE, *parameter, "--burst")

    assert done.returncode != 0
    assert "SystemExit: cannot start: /not/here.pt does not exist" in done.stderr
    assert "Got assigned" not in done.stderr


def test_model_parameter_overrides_the_environment(machine: Machine) -> None:
    """SAM2_CONFIG does not replace the model of a parameter."""
    from agent.worker import MODEL_PARAMETERS, read_settings

    parameters = {"model_id": "micro", "image_size": 256}
    settings = read_settings(parameters, MODEL_PARAMETERS, machine.environment)

    assert (settings.model_id, settings.config, settings.image_size) == ("micro", None, 256)


def test_answers_equal_the_functions(agent: Agent, function: Function) -> None:
    """Over 20 frames every shape equals the Nuclio function's, bit for bit.

    A lost object is None, but a lost rectangle keeps its last box.
    """
    expected = Expected(function, SHAPES)

    states = agent.start(SHAPES)
    tracked = [agent.track(frame, states) for frame in range(1, len(FRAMES))]

    assert all(map(ID.fullmatch, states))
    assert tracked == [expected.track(frame) for frame in range(1, len(FRAMES))]
    rectangles = [shapes.pop(RECTANGLE) for shapes in tracked]
    assert None not in rectangles
    assert any(before == after for before, after in pairwise(rectangles))
    assert {shape is None for shapes in tracked for shape in shapes} == {False, True}


def test_objects_of_a_request_are_tracked_together(agent: Agent) -> None:
    """One request is one run of the tracker, although cvat-cli asks for one object at a time."""
    states = agent.start(SHAPES)
    before = agent.log.read_text()

    agent.track(1, states)

    (line,) = re.findall(r"tracked: .*", agent.log.read_text()[len(before) :])
    assert f"'started': 0, 'continued': {len(SHAPES)}," in line


def test_another_agent_takes_over(pool: Machine, own: int, function: Function) -> None:
    """With Redis another agent, also one in burst mode, continues after the first was killed.

    No process of the killed agent stays behind with the model on the GPU.
    """
    expected = Expected(function, SHAPES)
    first = pool.start_agent(own)
    states = first.start(SHAPES)
    tracked = [first.track(1, states)]
    worker = first.worker
    assert is_running(worker)

    first.process.kill()
    first.process.wait()
    while is_running(worker):  # until pytest's timeout
        time.sleep(0.05)
    answer = pool.cvat.submit(own, task=TASK, type="track", frame=2, states=states)
    done = pool.cli("run-agent", str(own), *FUNCTION_FILE, "--burst")

    assert done.returncode == 0, done.stderr
    tracked.append(answer.result(timeout=0)["shapes"])
    assert tracked == [expected.track(frame) for frame in (1, 2)]


def test_outage_of_the_store_loses_no_track(
    agent: Agent, redis_server: RedisServer, function: Function
) -> None:
    """While Redis does not answer, requests fail with a reason; later they succeed."""
    expected = Expected(function, [MASK])
    states = agent.start([MASK])

    redis_server.process.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(RequestFailedError, match=r"state store failed .* nothing is lost"):
            agent.track(1, states)
    finally:
        redis_server.process.send_signal(signal.SIGCONT)

    assert agent.track(1, states) == expected.track(1)


def test_track_with_missing_steps_is_refused(agent: Agent, redis_server: RedisServer) -> None:
    """An error while objects are tracked fails the request with its reason, not the agent."""
    deleted, existing = agent.start([MASK, MASK])
    track, _, step = deleted.partition(".")
    with redis_server.client() as client:
        assert client.delete(f"sam2:{{{track}}}:step:{step}") == 1
    worker = agent.worker

    with pytest.raises(RequestFailedError, match=r"states\[1\] expired .* start the track again"):
        agent.track(1, [existing, deleted])

    assert agent.track(1, [existing])[0]["type"] == "mask"
    assert agent.worker == worker


@pytest.mark.parametrize("state", ["rubbish", "a" * 22 + "." + "b" * 22, "", "{}", "a" * 10_000])
def test_unknown_state_is_refused(agent: Agent, state: str) -> None:
    """A state that was never given out is not found."""
    with pytest.raises(RequestFailedError, match=r"Tracking state '.*' not found"):
        agent.track(1, [state])


def test_state_belongs_to_its_task(agent: Agent) -> None:
    """A state gives no access to another task."""
    states = agent.start([MASK])

    with pytest.raises(RequestFailedError, match=f"is not for task #{OTHER_TASK}"):
        agent.track(1, states, task=OTHER_TASK)


def test_state_belongs_to_its_image_size(agent: Agent) -> None:
    """A state is not used on frames of another size."""
    states = agent.start([MASK], task=MIXED_TASK)

    with pytest.raises(RequestFailedError, match=r"Image sizes .* are different"):
        agent.track(1, states, task=MIXED_TASK)


def test_refused_request_changes_no_state(agent: Agent, function: Function) -> None:
    """One bad state fails its request before any object of it is tracked."""
    expected = Expected(function, [MASK])
    states = agent.start([MASK])

    with pytest.raises(RequestFailedError, match="not found"):
        agent.track(1, [*states, "rubbish"])

    assert agent.track(1, states) == expected.track(1)


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ({"type": "cuboid", "points": [0.0] * 16}, "Unsupported shape type 'cuboid'"),
        ({"type": "mask", "points": [1, 2, 3]}, "mask has 3 numbers"),
        ({"type": "polygon", "points": [0.0, 0.0, 5.0]}, "polygon has 3 numbers"),
    ],
)
def test_bad_shape_is_refused_with_its_reason(
    agent: Agent, shape: dict[str, Any], reason: str
) -> None:
    """An annotator is told what is wrong with a shape."""
    with pytest.raises(RequestFailedError, match=f"Invalid annotation request: .*{reason}"):
        agent.start([shape])


def test_agent_without_redis_tracks_alone(machine: Machine, own: int, function: Function) -> None:
    """Without Redis the answers are the same; the log says that tracks end with the agent."""
    expected = Expected(function, SHAPES)
    alone = machine.start_agent(own)

    states = alone.start(SHAPES)
    tracked = [alone.track(frame, states) for frame in (1, 2)]
    with pytest.raises(RequestFailedError, match="is not for task"):
        alone.track(1, states, task=OTHER_TASK)
    log = alone.stop()

    assert tracked == [expected.track(1), expected.track(2)]
    assert "CVAT_FUNCTIONS_REDIS_HOST is not set: tracks end with this agent" in log


def test_untested_cvat_cli_is_not_changed(
    pool: Machine, function: Function,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """Another version of cvat-cli uses its own states, and each object is tracked alone."""
    from agent import tracking_function

    monkeypatch.setattr(tracking_function, "cvat_cli_is_known", lambda: False)
    container = driver._TrackingStateContainer
    expected = Expected(function, SHAPES)
    context: Any = None
    pictures = [Image.open(io.BytesIO(frame)) for frame in FRAMES[:2]]

    tracker = tracking_function.TrackingFunction(Settings.from_env(pool.environment))
    tracker.start_agent()
    frame = tracker.preprocess_image(context, pictures[0])
    shapes = [cvataa.TrackableShape(**shape) for shape in SHAPES]
    states = [tracker.init_tracking_state(context, frame, shape) for shape in shapes]
    frame = tracker.preprocess_image(context, pictures[1])
    tracked = [tracker.track(context, frame, state) for state in states]

    assert driver._TrackingStateContainer is container
    assert [
        None if shape is None else {"type": shape.type, "points": shape.points}
        for shape in tracked
        if not isinstance(shape, tracking_function.PendingShape)
    ] == expected.track(1)
    assert "is not a tested version, so its states are not shared" in caplog.text


def test_interactor_takes_points_and_boxes(cvat: CvatStub, interactor_agent: Agent) -> None:
    """CVAT is told that either a point or a box is enough."""
    fields = {"kind", "min_pos_points", "min_neg_points", "startswith_box_optional"}
    registered = cvat.functions[interactor_agent.function]

    assert {name: registered[name] for name in fields} == {
        "kind": "interactor",
        "min_pos_points": 0,
        "min_neg_points": 0,
        "startswith_box_optional": True,
    }


def test_interactor_answers_equal_the_functions(
    interactor_agent: Agent,
    start_interactor: Callable[[dict[str, str]], Function],
    model: dict[str, str],
) -> None:
    """Clicks, corrections and boxes get the Nuclio function's answers; one frame is encoded."""
    interactor = start_interactor(model)
    click: dict[str, Any] = {"pos_points": [[60.0, 90.5]], "neg_points": [], "obj_bbox": []}
    prompts = [
        click,
        click | {"neg_points": [[200.0, 20.0]]},
        click | {"obj_bbox": [[30.0, 60.0], [90.0, 120.0]]},
        {"pos_points": [], "neg_points": [], "obj_bbox": [[220, 40], [271, 101]]},
    ]
    before = interactor_agent.log.read_text()

    shapes = [
        interactor_agent.ask(type="interact", task=TASK, frame=0, **prompt)["shapes"]
        for prompt in prompts
    ]

    image = base64_text(FRAMES[0])
    answers = [interactor.call({"image": image} | prompt)[1] for prompt in prompts]
    assert shapes == [answer["shapes"] for answer in answers]
    assert all(shapes)
    log = interactor_agent.log.read_text()[len(before) :]
    assert re.findall(r"'encoded': (\w+)", log) == ["True", "False", "False", "False"]
    assert re.findall(r"'refined': (\w+)", log) == ["False", "True", "False", "False"]


@pytest.mark.parametrize(
    ("points", "reason"), [([], "nothing to segment"), ([[60, 900]], "is outside the 320 x 180")]
)
def test_interactor_says_what_is_wrong(
    interactor_agent: Agent, points: list[Any], reason: str
) -> None:
    """An invalid prompt is refused with the reason."""
    prompt = {"pos_points": points, "neg_points": [[1, 1]], "obj_bbox": []}

    with pytest.raises(RequestFailedError, match=f"Invalid annotation request: .*{reason}"):
        interactor_agent.ask(type="interact", task=TASK, frame=0, **prompt)


def test_stub_serves_what_agents_ask_for_and_no_more(cvat: CvatStub, agent: Agent) -> None:
    """The stub of CVAT has no route that cvat-cli does not use."""
    agent.track(1, agent.start([MASK]))
    with pytest.raises(RequestFailedError):
        agent.track(1, ["rubbish"])
    routes = {
        (method, route.path)
        for route in cvat.routes
        for method in route.methods or ()
        if method != "HEAD"
    }

    while cvat.asked != routes:  # until the agent has asked for its queue, or pytest's timeout
        time.sleep(0.05)
