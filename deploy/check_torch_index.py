"""Check that an index of Python packages has the pinned PyTorch, before anything is downloaded."""

from __future__ import annotations

import argparse
import re
import urllib.request
from pathlib import Path
from urllib.error import URLError
from urllib.parse import unquote

TIMEOUT_S = 30.0


def check(index: str, requirements: Path) -> str:
    """Check an index.

    Args:
        index: URL of an index like `https://download.pytorch.org/whl/cu126`; its last part is the
            local version of the wheels.
        requirements: File that pins torch.

    Returns:
        The pinned version, with its local part.

    Raises:
        SystemExit: The index does not answer, or lacks this version.
    """
    pinned = re.search(r"^torch==(\S+)", requirements.read_text(encoding="utf-8"), re.MULTILINE)
    if pinned is None:
        raise SystemExit(f"{requirements} does not pin torch")
    wanted = f"torch-{pinned[1]}+{index.rstrip('/').rpartition('/')[2]}"
    page_url = f"{index.rstrip('/')}/torch/"
    try:
        with urllib.request.urlopen(page_url, timeout=TIMEOUT_S) as answer:  # noqa: S310  # the caller's URL
            page = unquote(answer.read().decode(errors="replace"))
    except (URLError, ValueError, OSError) as err:
        raise SystemExit(
            f"TORCH_INDEX={index}: {page_url} cannot be read ({err}): expected an index of "
            "PyTorch's wheels like https://download.pytorch.org/whl/cu126"
        ) from err
    if f"{wanted}-" not in page:
        found = sorted(
            set(re.findall(r"torch-([\w.]+\+\w+)-", page)),
            key=lambda version: [int(number) for number in re.findall(r"\d+", version)],
        )
        raise SystemExit(
            f"TORCH_INDEX={index} has no {wanted}; its newest wheels are of "
            f"{', '.join(found[-3:]) or 'no version'}"
        )
    return wanted


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("index", help="for example https://download.pytorch.org/whl/cpu")
    parser.add_argument("requirements", type=Path, help="requirements-torch.txt")
    options = parser.parse_args()
    print(check(options.index, options.requirements))
