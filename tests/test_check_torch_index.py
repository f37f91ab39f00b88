from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from deploy.check_torch_index import check

PAGE = '<a href="/whl/cu126/torch-2.13.0%2Bcu126-cp311-cp311-manylinux_2_28_x86_64.whl">torch</a>'


@pytest.fixture(scope="module")
def index() -> Iterator[str]:
    """Serve an index that has one wheel, for CUDA 12.6."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            exists = self.path == "/whl/cu126/torch/"
            self.send_response(200 if exists else 404)
            self.end_headers()
            self.wfile.write(PAGE.encode() if exists else b"")

        def log_message(self, *_: object) -> None:
            """Keep the tests' output clean."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/whl"
    server.shutdown()
    server.server_close()


@pytest.fixture
def requirements(tmp_path: Path) -> Path:
    """Write a file that pins torch among others."""
    path = tmp_path / "requirements-torch.txt"
    path.write_text("# pinned\nsetuptools==84.2.1\ntorch==2.13.0\ntorchvision==0.28.0\n")
    return path


@pytest.mark.parametrize("end", ["", "/"])
def test_index_with_the_pinned_version_is_accepted(
    index: str, requirements: Path, end: str
) -> None:
    """The version is compared with its local part, which the index's URL names."""
    assert check(f"{index}/cu126{end}", requirements) == "torch-2.13.0+cu126"


def test_index_without_the_pinned_version_is_refused(index: str, requirements: Path) -> None:
    """Pip would silently take another index's wheel, of gigabytes."""
    requirements.write_text("torch==2.14.0\n")

    with pytest.raises(SystemExit, match=r"has no torch-2\.14\.0\+cu126; .* of 2\.13\.0\+cu126"):
        check(f"{index}/cu126", requirements)


@pytest.mark.parametrize("url", ["{index}/cu999", "http://127.0.0.1:1/whl/cpu", "nonsense"])
def test_index_that_does_not_answer_is_refused(index: str, requirements: Path, url: str) -> None:
    """The message names the URL and what an index looks like."""
    with pytest.raises(SystemExit, match=r"cannot be read .* expected an index"):
        check(url.format(index=index), requirements)


def test_file_without_torch_is_refused(index: str, requirements: Path) -> None:
    """There is nothing to look for."""
    requirements.write_text("numpy==2.4.6\n")

    with pytest.raises(SystemExit, match="does not pin torch"):
        check(index, requirements)
