"""Download a model's weights into Hugging Face's cache while an image is built."""

from __future__ import annotations

import argparse

from huggingface_hub import hf_hub_download
from sam2.build_sam import HF_MODEL_ID_TO_FILENAMES

BUNDLED = "micro"


def download(model_id: str) -> str:
    """Fetch the checkpoint of one model, so that it loads later with `HF_HUB_OFFLINE=1`.

    Args:
        model_id: One of SAM 2's Hugging Face ids, or `micro`, whose weights are in `weights/`.

    Returns:
        The checkpoint's path; for `micro`, a text that says where its weights are.

    Raises:
        SystemExit: The model is not known.

    Side effects: Writes below `HF_HOME`.
    """
    if model_id == BUNDLED:
        return f"{BUNDLED}: nothing to download, its weights are in weights/{BUNDLED}"
    if model_id not in HF_MODEL_ID_TO_FILENAMES:
        known = ", ".join([BUNDLED, *HF_MODEL_ID_TO_FILENAMES])
        raise SystemExit(f"SAM2_MODEL_ID={model_id!r} is not known: expected one of {known}")
    _, checkpoint = HF_MODEL_ID_TO_FILENAMES[model_id]
    # No revision: offline, the loader looks up the default branch, and only a download of that
    # branch records its commit in the cache.
    return hf_hub_download(repo_id=model_id, filename=checkpoint)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model_id", help="for example facebook/sam2.1-hiera-tiny, or micro")
    print(download(parser.parse_args().model_id))
