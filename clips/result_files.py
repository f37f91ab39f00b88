"""Write all result files of a tracked clip: annotations, masks, a video and a contact sheet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from clips.coco_tracks import CocoTracksWriter
from clips.cvat_xml import CvatXmlWriter
from clips.overlays import ContactSheet, OverlayWriter, draw_masks
from clips.reader import Clip
from shapes import Shape, SizeHW, shape_to_mask
from tracker import TrackedObject

SHEET_FRAMES = 12


class ResultFiles:
    """Writes `annotations.xml`, `tracks.json`, `overlay.mp4` and `contact_sheet.png`.

    Args:
        out: The folder to write to.
        clip: The clip that is tracked.
        labels: One per track.
        size_hw: Height and width of the frames.
        first: Number of the first frame that is tracked.
        last: Number of the last frame that is tracked; before `first` when tracking backwards.
    """

    def __init__(
        self, out: Path, clip: Clip, labels: Sequence[str], size_hw: SizeHW, first: int, last: int
    ) -> None:
        self._labels = labels
        self._size_hw = size_hw
        self._xml = CvatXmlWriter(out / "annotations.xml", labels, clip.frame_count)
        self._coco = CocoTracksWriter(out / "tracks.json", labels, size_hw)
        self._overlay = OverlayWriter(out / "overlay.mp4", size_hw, clip.fps)
        shown = np.linspace(first, last, SHEET_FRAMES).round().astype(int).tolist()
        self._sheet = ContactSheet(out / "contact_sheet.png", shown)
        self._last_shapes: dict[int, Shape] = {}

    def add(self, number: int, frame: Image.Image, objects: Mapping[int, TrackedObject]) -> None:
        """Add a frame.

        Args:
            number: The frame's number.
            frame: RGB.
            objects: The objects on it, by track.
        """
        masks = {}
        for track, obj in objects.items():
            # A lost object keeps its last shape, marked as outside.
            shape = obj.shape or self._last_shapes[track]
            self._last_shapes[track] = shape
            self._xml.add(track, number, shape, outside=obj.lost)
            if not obj.lost:
                masks[track] = shape_to_mask(shape, self._size_hw) if obj.mask is None else obj.mask
                self._coco.add(track, number, masks[track], obj.score)
        picture = draw_masks(np.asarray(frame), masks, self._labels)
        self._overlay.add(picture)
        self._sheet.add(number, picture)

    def close(self) -> None:
        """Complete the files."""
        for file in (self._xml, self._coco, self._overlay, self._sheet):
            file.close()
