"""`python -m benchmarks.scale`: a real queue, trainer and reward service, a thousand rollout services without engines.

Owns the options. Exit code 1 if a ticket was lost or trained twice, a token was too old, memory grew, or a group cost
the queue more than 1.3 times as much as with few services, while none ended; the last lines name which.

    make scale                                                            # ten minutes and what surrounds them
    make scale ARGS="--many 60 --seconds 20 --compared-seconds 10 --per-host 22 --batch-size 32"
"""

import argparse
import asyncio
import os
import shutil
import sys
from dataclasses import fields
from pathlib import Path

from benchmarks.scale.plan import ScalePlan
from benchmarks.scale.run import ScaleError, scale_run
from penstock.quiet import quiet_libraries


def main() -> None:
    quiet_libraries(os.environ)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for each in fields(ScalePlan):
        default: int | float = each.default  # type: ignore[assignment]
        name = f"--{each.name.replace('_', '-')}"
        parser.add_argument(name, type=type(default), default=default, help=f"default: {default:g}")
    parser.add_argument("--out", type=Path, default=Path("runs/scale"), help="is emptied first")
    arguments = vars(parser.parse_args())
    out = arguments.pop("out").resolve()
    shutil.rmtree(out, ignore_errors=True)
    try:
        with scale_run(ScalePlan(**arguments), out) as run:
            verdict = asyncio.run(run.carry_out())
    except ScaleError as error:
        sys.exit(f"scale: {error}")
    verdict.write(out / "verdict.json")
    print("\n".join(verdict.lines()))
    print(out / "verdict.json")
    if wrong := [*verdict.broken_rules(), *verdict.missed_aims()]:
        sys.exit("\n".join(f"scale: {each}" for each in wrong))
    print("scale: all aims are met")


if __name__ == "__main__":
    main()
