"""Stands in for docker, nuctl, curl and kubectl: notes its command line, answers as it was told.

Started as `recorder.py <tool> <arguments...>`, with the folder RECORDER_FOLDER holding
`answers.json` (a list of `[tool, words that must occur, output, exit status]`, first match wins)
and receiving `calls.jsonl`. The folder that a deployment names is kept as `staged`.
"""

# ruff: noqa: PTH120, PTH123 - importing pathlib takes longer than all the rest

import json
import os
import sys


def main() -> int:
    """Note the call and answer it."""
    tool, *arguments = sys.argv[1:]
    folder = os.environ["RECORDER_FOLDER"]
    with open(f"{folder}/calls.jsonl", "a") as calls:
        calls.write(json.dumps([tool, *arguments]) + "\n")
    if (tool, arguments[:1]) == ("nuctl", ["deploy"]):
        keep(os.path.dirname(arguments[arguments.index("--file") + 1]), f"{folder}/staged")
    with open(f"{folder}/answers.json") as answers:
        for answering, words, output, status in json.load(answers):
            if answering == tool and set(words) <= set(arguments):
                sys.stdout.write(output)
                return int(status)
    return 0


def keep(source: str, target: str) -> None:
    """Copy a folder, permissions included."""
    import shutil  # noqa: PLC0415 - a slow import that one call in ten needs

    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)


if __name__ == "__main__":
    raise SystemExit(main())
