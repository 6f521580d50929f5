"""`python -m benchmarks.gpu [PART ...] --out FOLDER`: runs parts one after the other; `... report FOLDER` shows them.

Owns the processes of the parts. Invariant: a part that hangs is ended with all that it started, and costs no other part
its time; what it had measured stays.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu.options import add_options, options_of
from benchmarks.gpu.part import PARTS
from benchmarks.gpu.record import append, lines_of, path_of
from benchmarks.gpu.report import failures, report
from penstock.runtime.process import ProcessIdentity, kill_all

GRACE_SECONDS = 30.0  # past its time, in which a part ends in order
KILL_SECONDS = 10.0


def main() -> int:
    """0 if all parts ended and all their checks passed."""
    if sys.argv[1:2] == ["report"]:
        return show(parse_report().folder, list(PARTS))
    arguments = parse_arguments()
    parts = arguments.parts or list(PARTS)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for part in parts:
        run_part(part, arguments)
    return show(arguments.out, parts)


def show(folder: Path, parts: list[str]) -> int:
    lines = {part: lines_of(folder, part) for part in parts}
    print(report(lines))
    return 1 if failures(lines) or not any(lines.values()) else 0


def run_part(part: str, arguments: argparse.Namespace) -> None:
    """Run one part to its end, or to the end of its time."""
    command = [sys.executable, "-m", "benchmarks.gpu.part", part, *sys.argv[1 + len(arguments.parts) :]]
    path = path_of(arguments.out, part)
    path.unlink(missing_ok=True)
    log = arguments.out / f"{part}.log"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if arguments.cpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    print(f"{part}: {PARTS[part]} (at most {arguments.minutes:g} minutes; log: {log})", flush=True)
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
        try:
            process.wait(60 * arguments.minutes + GRACE_SECONDS)
            ended = ("failed", f"it ended with {process.returncode}; see {log}")
        except subprocess.TimeoutExpired:
            ended = ("killed", f"it did not end within {arguments.minutes:g} minutes; see {log}")
        finally:
            identity = ProcessIdentity.of(process.pid)
            if process.poll() is None and identity is not None:
                kill_all([identity], KILL_SECONDS)
            process.wait()
    lines = lines_of(arguments.out, part)
    if not lines or lines[-1]["kind"] != "end":
        append(
            path, {"part": part, "kind": "end", "state": ended[0], "seconds": 60 * arguments.minutes, "note": ended[1]}
        )


def parse_arguments() -> argparse.Namespace:
    listed = "\n".join(f"  {part:9} {what}" for part, what in PARTS.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=f"Measure Penstock on this machine's GPU. Parts (default: all):\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="python -m benchmarks.gpu report FOLDER shows the results of a folder. More: benchmarks/gpu/README.md",
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help="see above; all of them come before the options")
    add_options(parser)
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.parts) - set(PARTS))
    if unknown:
        parser.error(f"no part is named {unknown[0]!r}: expected some of {', '.join(PARTS)}")
    if sys.argv[1 : 1 + len(arguments.parts)] != arguments.parts:
        parser.error("expected the parts before the options")
    options_of(parser, arguments)
    return arguments


def parse_report() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu report")
    parser.add_argument("folder", type=Path, help="the --out of the parts")
    return parser.parse_args(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
