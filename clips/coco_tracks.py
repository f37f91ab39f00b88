"""Write `tracks.json`: masks of tracks in the style of COCO.

The layout is COCO's for instances (https://cocodataset.org/#format-data) with a video's two
additions: `track_id` in every annotation, and the clip's frames as `images`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from shapes import Mask, SizeHW


class CocoTracksWriter:
    """Writes each annotation at once, so that memory does not grow with the clip.

    Args:
        path: The file to write.
        labels: One per track.
        size_hw: Height and width of the frames.
    """

    def __init__(self, path: Path, labels: Sequence[str], size_hw: SizeHW) -> None:
        names = sorted(set(labels))
        self._category_ids = [names.index(label) + 1 for label in labels]
        head = {
            "info": {"description": "Tracks of SAM 2"},
            "categories": [{"id": i, "name": name} for i, name in enumerate(names, start=1)],
            "tracks": [
                {"id": track, "category_id": id_} for track, id_ in enumerate(self._category_ids)
            ],
        }
        self._file = path.open("w", encoding="utf-8")
        self._file.write(json.dumps(head)[:-1] + ', "annotations": [')
        self._count = 0
        self._frames: set[int] = set()
        self._size_hw = size_hw

    def add(self, track: int, frame: int, mask: Mask, score: float | None) -> None:
        """Add an object on a frame.

        Args:
            track: Index of the track.
            frame: Number of the frame, from 0; COCO's `image_id`.
            mask: Boolean mask `(H, W)`.
            score: SAM 2's object score, a logit; None where it is not known.
        """
        coco_rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
        self._count += 1
        self._frames.add(frame)
        annotation: dict[str, Any] = {
            "id": self._count,
            "track_id": track,
            "image_id": frame,
            "category_id": self._category_ids[track],
            "segmentation": {"size": coco_rle["size"], "counts": coco_rle["counts"].decode()},
            "area": int(coco_mask.area(coco_rle)),
            "bbox": [float(edge) for edge in coco_mask.toBbox(coco_rle)],
            "iscrowd": 0,
            "score": score,
        }
        self._file.write((",\n" if self._count > 1 else "\n") + json.dumps(annotation))

    def close(self) -> None:
        """Complete the file."""
        height, width = self._size_hw
        images = [{"id": id_, "height": height, "width": width} for id_ in sorted(self._frames)]
        self._file.write('\n], "images": ' + json.dumps(images) + "}\n")
        self._file.close()
