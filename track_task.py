"""Track objects through a job or a task on a CVAT server.

The command line; the work is done in `cvat_task/`. It needs `requirements-task.txt`.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import platformdirs
import urllib3
from cvat_sdk.core.auth import configure_client_auth_arguments

from clips.tracking_client import open_tracking_client
from cvat_task.connection import CvatConnection, CvatError
from cvat_task.interrupts import Interrupts
from cvat_task.journal import Journal
from cvat_task.loop import run
from cvat_task.plan import BATCH_FRAMES, RunOptions, describe, make_plan
from errors import SettingsError, TrackerError

EXIT_INTERRUPTED = 130


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
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # it warns of each repeated request
    if options.insecure:
        urllib3.disable_warnings(urllib3.exceptions.InsecureRequestWarning)
    try:
        with (
            Interrupts() as interrupts,
            closing(CvatConnection(options, pause=interrupts.sleep)) as server,
        ):
            return _run(server, options, interrupts)
    except CvatError as err:
        print(f"track_task: {err}", file=sys.stderr)
        return err.exit_code
    except (TrackerError, SettingsError) as err:
        print(f"track_task: {err}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("track_task: interrupted; a repeat goes on after the last batch", file=sys.stderr)
        return EXIT_INTERRUPTED


def _run(server: CvatConnection, options: argparse.Namespace, interrupts: Interrupts) -> int:
    run_options = RunOptions(
        from_frame=options.from_frame,
        to_frame=options.to_frame,
        objects=options.objects,
        label=options.label,
        backwards=options.backwards,
        keyframe_interval=options.keyframe_every,
        batch_frames=options.batch,
    )
    command = asdict(run_options) | {
        "server": server.url,
        "job": options.job,
        "task": options.task,
        "objects": list(options.objects),  # as JSON gives it back
    }
    del command["batch_frames"]  # another batch size is no other command
    journal = Journal(platformdirs.user_state_path("sam2-cvat-tracker"), command)
    job_ids = [options.job] if options.task is None else server.task_jobs(options.task)
    plan = make_plan(
        server, job_ids, run_options, journal, restart=options.restart, dry=options.dry_run
    )
    print("\n".join(describe(plan, run_options)), flush=True)
    if options.dry_run:
        return 0
    with closing(open_tracking_client(options.url, os.environ)) as client:
        summary = run(
            server, plan, run_options, client, journal, out=options.out, interrupts=interrupts
        )
    rate = summary.frames / summary.seconds if summary.seconds else 0.0
    print(f"{summary.frames} frames tracked in {summary.seconds:.0f} s, {rate:.2f} frames/s")
    for obj in plan.objects:
        name = obj.spec.name
        print(f"{name}: lost on {summary.lost[name]} of {summary.frames} frames")
    if summary.interrupted:
        print("interrupted: what was tracked is written; the same command goes on from here")
        return EXIT_INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
