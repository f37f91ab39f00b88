"""Track objects through a video file or a folder of images, without CVAT.

The command line; the work is done in `clips/`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from clips.reader import open_clip
from clips.shape_files import read_initial_shapes
from clips.track_clip import track_clip
from clips.tracking_client import open_tracking_client
from errors import SettingsError, TrackerError

EXIT_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    options = _parser().parse_args(arguments)
    try:
        return _run(options)
    except (TrackerError, SettingsError) as err:
        print(f"track_video: {err}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("track_video: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="track_video",
        description="Track objects through a video file or a folder of images, without CVAT.",
    )
    parser.add_argument("clip", type=Path, help="a video file or a folder of images")
    parser.add_argument(
        "--shapes",
        type=Path,
        required=True,
        help="what to track: JSON list of label, type, points, frame; or CVAT for video 1.1 XML",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--last-frame", type=int, help="where to stop; default: the clip's end")
    parser.add_argument("--backwards", action="store_true", help="track towards frame 0")
    parser.add_argument("--url", help="a running function; default: track in this process")
    return parser


def _run(options: argparse.Namespace) -> int:
    clip = open_clip(options.clip)
    initial_shapes = read_initial_shapes(options.shapes)
    with closing(open_tracking_client(options.url, os.environ)) as client:
        summary = track_clip(
            clip,
            initial_shapes,
            client,
            options.out,
            last_frame=options.last_frame,
            backwards=options.backwards,
        )
    for track, initial in enumerate(initial_shapes):
        print(f"{track} {initial.label}: lost on {summary.lost[track]} of {summary.frames} frames")
    print(f"wrote annotations.xml, tracks.json, overlay.mp4 and contact_sheet.png to {options.out}")
    if summary.interrupted:
        print("interrupted: what was tracked so far is written", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
