"""Track objects through a job or a task on a CVAT server, from the command line.

Owns the command line; the rooms behind it are in `cvat_task/`. It needs more than the function: see
`requirements-task.txt`.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path

import platformdirs
import urllib3
from cvat_sdk.core.auth import configure_client_auth_arguments

from clips.tracking_client import open_tracking_client
from cvat_task.connection import CvatConnection, CvatError
from cvat_task.job_writer import Journal
from cvat_task.loop import run
from cvat_task.plan import BATCH_FRAMES, RunOptions, describe, make_plan
from errors import SettingsError, TrackerError

EXIT_INTERRUPTED = 130


@contextmanager
def _stop_on_interrupt() -> Iterator[threading.Event]:
    """Give an event that Ctrl-C sets; a second Ctrl-C ends the program at once."""
    stop = threading.Event()

    def ask(*_: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="track_task",
        description="Track objects through a CVAT job or task and write the tracks back.",
        epilog="Exit codes: 0 done, 1 nothing to do or a bad setting, 2 bad option, 3 not logged "
        "in, 4 no such job, 5 no right, 6 the server fails, 7 its certificate is not trusted, 8 it "
        "refuses what was sent, 130 interrupted.",
    )
    configure_client_auth_arguments(parser)
    parser.add_argument("--server", dest="server_host", help="the same as --server-host")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--job", type=int, metavar="ID", help="the job to track in")
    what.add_argument("--task", type=int, metavar="ID", help="all its jobs, one after the other")
    parser.add_argument("--from-frame", type=int, help="default: the first that has objects")
    parser.add_argument("--to-frame", type=int, help="default: the last; backwards: the first")
    parser.add_argument(
        "--objects",
        type=_object_names,
        default=(),
        metavar="IDS",
        help="follow only these, by the ids that --dry-run shows: 12,13 or shape:12,track:13",
    )
    parser.add_argument("--label", help="follow only objects of this label")
    parser.add_argument("--backwards", action="store_true", help="track towards frame 0")
    parser.add_argument(
        "--keyframe-every", type=_positive, default=1, metavar="N", help="for tracks; default: 1"
    )
    parser.add_argument(
        "--batch",
        type=_positive,
        default=BATCH_FRAMES,
        metavar="FRAMES",
        help=f"frames between two writes, lost at most in a crash; default: {BATCH_FRAMES}",
    )
    parser.add_argument("--url", help="a running function; default: track in this process")
    parser.add_argument("--out", type=Path, help="folder for contact_sheet.png")
    parser.add_argument("--dry-run", action="store_true", help="show what would change, and end")
    parser.add_argument(
        "--restart", action="store_true", help="begin anew where an earlier run was interrupted"
    )
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from 1")
    return int(text)


def _object_names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if not all(re.fullmatch(r"((shape|track):)?\d+", name) for name in names):
        raise argparse.ArgumentTypeError(f"{text!r}: expected ids: 12,13 or shape:12,track:13")
    return names


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    options = _parser().parse_args(arguments)
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # it tells of each repeated request
    if options.insecure:
        urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)
    request = RunOptions(
        from_frame=options.from_frame,
        to_frame=options.to_frame,
        objects=options.objects,
        label=options.label,
        backwards=options.backwards,
        every=options.keyframe_every,
        batch=options.batch,
    )
    try:
        with _stop_on_interrupt() as stop, closing(CvatConnection(options)) as server:
            return _main(server, options, request, stop)
    except CvatError as err:
        print(f"track_task: {err}", file=sys.stderr)
        return err.exit_code
    except (TrackerError, SettingsError) as err:
        print(f"track_task: {err}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("track_task: interrupted; a repeat goes on after the last batch", file=sys.stderr)
        return EXIT_INTERRUPTED


def _main(
    server: CvatConnection, options: argparse.Namespace, request: RunOptions, stop: threading.Event
) -> int:
    asked = asdict(request) | {"server": server.url, "job": options.job, "task": options.task}
    asked["objects"] = list(request.objects)  # as JSON gives it back
    del asked["batch"]  # how often is written, not what
    journal = Journal(platformdirs.user_state_path("sam2-cvat-tracker"), asked)
    job_ids = [options.job] if options.task is None else server.task_jobs(options.task)
    plan = make_plan(
        server, job_ids, request, journal, restart=options.restart, dry=options.dry_run
    )
    print("\n".join(describe(plan, request)), flush=True)
    if options.dry_run:
        return 0
    with closing(open_tracking_client(options.url, os.environ)) as client:
        outcome = run(server, plan, request, client, journal, out=options.out, stop=stop)
    rate = outcome.frames / outcome.seconds if outcome.seconds else 0.0
    print(f"{outcome.frames} frames tracked in {outcome.seconds:.0f} s, {rate:.2f} frames/s")
    for one in plan.objects:
        print(f"{one.name}: lost on {outcome.lost[one.name]} of {outcome.frames} frames")
    if outcome.interrupted:
        print("interrupted: what was tracked is written; the same command goes on from here")
        return EXIT_INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
