"""One part in a process of its own: `python -m benchmarks.gpu.part NAME [options]`.

Owns how a part ends: whatever happens, its last line says how. The parent ends it if it does not end in its time.
"""

import argparse
import importlib
import sys
import traceback

from benchmarks.gpu.options import add_options, options_of
from benchmarks.gpu.record import Recorder

PARTS = {
    "checks": "does the trainer compute the same on this GPU as by definition?",
    "learner": "tokens per second, utilisation, and what the time goes into",
    "rollout": "the rollout service against bare SGLang",
    "pushes": "weights to an engine by each transport",
    "loop": "full runs, and their gap to ideal",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=list(PARTS))
    add_options(parser)
    arguments = parser.parse_args()
    options = options_of(parser, arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    record = Recorder(options.out, arguments.part, options.minutes)
    try:
        # Importing torch takes seconds, and fails on a machine that lacks a library: both belong to the part.
        import torch

        from benchmarks.gpu.machine import facts

        if not options.cpu and not torch.cuda.is_available():
            record.skip(arguments.part, "torch sees no GPU; give --cpu to try the kit without one")
            record.end("done")
            return 0
        record.facts(facts(cpu=options.cpu))
        importlib.import_module(f"benchmarks.gpu.{arguments.part}").run(options, record)
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        record.end("failed", f"{type(error).__name__}: {' '.join(str(error).split())[:500]}")
        return 1
    record.end("done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
