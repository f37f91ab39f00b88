from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import fakeredis
import pytest
import redis
import yaml
from cvat_cli._internal import agent_driver_tracking as driver
from cvat_cli._internal.agent_driver import BadArError

from agent import shared_states
from agent.shared_states import KNOWN_VERSIONS, SharedStates, TrackingState, cvat_cli_is_known
from errors import StateStoreUnavailableError
from state_token import StateToken, new_id
from testbed.redis_server import RedisServer

REPOSITORY = Path(__file__).parent.parent
DIMS = (320, 180)
TTL_S = 100


@pytest.fixture
def states(client: redis.Redis) -> SharedStates:
    """The state container of one agent."""
    return SharedStates(client=client, ttl_s=TTL_S)


def token() -> StateToken:
    """Return the token of some step."""
    return StateToken(new_id(), new_id())


def test_installed_cvat_cli_is_known() -> None:
    """A new version in the test environment fails here until it is tested."""
    assert cvat_cli_is_known()


def test_one_cvat_cli_is_pinned_everywhere() -> None:
    """Requirements and image install the newest known version, and the guide lists all."""
    texts = [
        (REPOSITORY / name).read_text()
        for name in ("requirements-dev.txt", "agent/Dockerfile", "agent/README.md")
    ]
    pins = [re.findall(r"cvat-cli==([\d.]+\d)", text) for text in texts]

    assert all(pins)
    assert {pin for found in pins for pin in found} == {list(KNOWN_VERSIONS)[-1]}
    assert all(known in texts[-1] for known in KNOWN_VERSIONS)


def test_cvat_cli_of_another_version_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even with equal code."""
    monkeypatch.setattr(shared_states, "version", lambda _: "2.81.0")

    assert not cvat_cli_is_known()


def test_cvat_cli_with_changed_code_is_unknown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Even with a known version."""
    changed = tmp_path / "agent_driver_tracking.py"
    changed.write_text(Path(driver.__file__).read_text() + "\n# changed\n")
    monkeypatch.setattr(driver, "__file__", str(changed))

    assert not cvat_cli_is_known()


def test_cvat_cli_without_the_driver_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """A version of cvat-cli without the module is unknown."""
    monkeypatch.setattr(shared_states, "driver", None)

    assert not cvat_cli_is_known()


def test_cvat_cli_uses_the_installed_container(
    states: SharedStates, monkeypatch: pytest.MonkeyPatch
) -> None:
    """cvat-cli's worker gets the shared container when it creates one."""
    for name in ("_TrackingStateContainer", "_tracking_states", "_tracking_state_id_generator"):
        monkeypatch.setattr(driver, name, vars(driver).get(name), raising=False)

    states.install()
    driver.AgentTrackingFunctionDriver.init_worker(str)

    assert driver._tracking_states is states
    driver._tracking_states.prune()


def test_every_method_of_the_container_is_there() -> None:
    """The shared container has all methods that cvat-cli's container has."""
    theirs = {name for name in vars(driver._TrackingStateContainer) if not name.startswith("_")}

    assert theirs <= set(vars(SharedStates))


def test_state_comes_back_from_another_agent(
    states: SharedStates, redis_server: RedisServer
) -> None:
    """Another agent reads the state and its shape type, and its updates are shared."""
    first = token()
    other = SharedStates(client=redis_server.client(), ttl_s=TTL_S)
    name = states.store(TrackingState(first), "mask", 7, DIMS)

    followed, shape_type = other.retrieve(name, 7, DIMS)
    assert (followed.token, shape_type) == (first, "mask")

    followed.token = newest = token()
    other.update([followed])
    assert states.retrieve(name, 7, DIMS)[0].token == newest


def test_state_lives_from_its_last_frame(states: SharedStates, client: redis.Redis) -> None:
    """Each update renews the TTL."""
    name = states.store(TrackingState(token()), "mask", 7, DIMS)
    (key,) = client.keys(f"*{name.partition('.')[0]}*:agent:*")
    client.expire(key, 5)

    states.update([states.retrieve(name, 7, DIMS)[0]])

    assert TTL_S - 5 < int(client.ttl(key)) <= TTL_S


def test_failed_update_changes_no_state() -> None:
    """An outage of the store leaves every state of the request unchanged and is reported."""
    server = fakeredis.FakeServer()
    states = SharedStates(client=fakeredis.FakeRedis(server=server), ttl_s=TTL_S)
    first = [token(), token()]
    names = [states.store(TrackingState(old), "mask", 7, DIMS) for old in first]
    updated = [states.retrieve(name, 7, DIMS)[0] for name in names]
    for state in updated:
        state.token = token()

    server.connected = False
    with pytest.raises(StateStoreUnavailableError, match="nothing is lost"):
        states.update(updated)
    with pytest.raises(BadArError, match="nothing is lost"):
        states.retrieve(names[0], 7, DIMS)
    server.connected = True

    assert [states.retrieve(name, 7, DIMS)[0].token for name in names] == first


@pytest.mark.parametrize(
    ("name", "task", "dims", "reason"),
    [
        (None, 8, DIMS, "is not for task #8"),
        (None, 7, DIMS[::-1], "Image sizes .* are different"),
        (f"{'a' * 22}.{'b' * 22}", 7, DIMS, "not found - possibly expired"),
        ("rubbish", 7, DIMS, "not found - possibly expired"),
        (12, 7, DIMS, "not found - possibly expired"),
    ],
)
def test_refusals_are_those_of_cvat_cli(
    states: SharedStates,
    monkeypatch: pytest.MonkeyPatch,
    name: Any,
    task: int,
    dims: tuple[int, int],
    reason: str,
) -> None:
    """A state that is unknown, of another task or image size gets cvat-cli's own message."""
    theirs = driver._TrackingStateContainer()
    monkeypatch.setattr(driver, "_tracking_state_id_generator", new_id, raising=False)
    for container in (states, theirs):
        stored = container.store(TrackingState(token()), "mask", 7, DIMS)
        asked = stored if name is None else name

        with pytest.raises(BadArError, match=reason):
            container.retrieve(state_id=asked, task_id=task, image_dims=dims)


def test_compose_file_sets_what_the_agent_reads() -> None:
    """Every variable of the compose files is known to settings.py or to cvat-cli."""
    known = (REPOSITORY / "settings.py").read_text()
    cli = {"CVAT_ACCESS_TOKEN", "REDISCLI_AUTH", "OMP_NUM_THREADS"}
    for name in ("compose.yaml", "compose.gpu.yaml"):
        services = yaml.safe_load((REPOSITORY / "agent" / name).read_text())["services"]
        for service in services.values():
            for variable in service.get("environment", {}):
                assert variable in cli or f'"{variable}"' in known, variable
