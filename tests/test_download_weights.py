from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest

from deploy.download_weights import download
from model_loader import find_files
from settings import DEFAULT_MODEL_ID, Settings

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = b"weights" * 1000


class Hub(BaseHTTPRequestHandler):
    """Answers as Hugging Face's hub does for one file of one model."""

    def do_HEAD(self) -> None:
        """Answer with the branch's commit and the file's size and digest."""
        found = self.path == f"/{DEFAULT_MODEL_ID}/resolve/main/sam2.1_hiera_tiny.pt"
        self.send_response(200 if found else 404)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{"a" * 64}"')
        self.send_header("Content-Length", str(len(WEIGHTS)))
        self.end_headers()

    def do_GET(self) -> None:
        """Send the file."""
        self.do_HEAD()
        self.wfile.write(WEIGHTS)

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Replace Hugging Face's hub and cache with a local server and an empty folder."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        url + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    yield tmp_path
    server.shutdown()
    server.server_close()
    thread.join()


def test_weights_baked_at_build_time_load_without_a_network(
    hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The function finds the downloaded file offline, and writes nothing."""
    baked = Path(download(DEFAULT_MODEL_ID))
    assert baked.read_bytes() == WEIGHTS

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    before = sorted(hub.rglob("*"))
    _, checkpoint = find_files(Settings())

    assert checkpoint == baked
    assert sorted(hub.rglob("*")) == before
    assert all(os.access(path, os.R_OK) for path in before)


def test_bundled_model_needs_no_download(hub: Path) -> None:
    """An image for a site without internet can be built with it."""
    assert "weights/micro" in download("micro")
    assert list(hub.iterdir()) == []


def test_unknown_model_stops_the_build_with_the_known_ones() -> None:
    """The build fails, rather than the start of the function."""
    with pytest.raises(SystemExit, match=r"'facebook/sam3' is not known: expected one of micro, "):
        download("facebook/sam3")
