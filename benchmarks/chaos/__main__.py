"""`python -m benchmarks.chaos [--seed N] [--parts abcd] [--out runs/chaos]`: all parts, then summary.json.

    (a) real SGLang and an embedded queue   (b) the pure engine   (c) the pure engine at max_staleness 0, twice
    (d) as c, with agents: episodes instead of completions

Exit code 1 and the reason when any check fails.
"""

import argparse
import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.chaos.disturb import ChaosError
from benchmarks.chaos.launch import ROOT
from benchmarks.chaos.parts import NOTHING, ChaosPart, figures, run_part
from benchmarks.chaos.schedule import Plan
from penstock.quiet import quiet_libraries

REAL = Plan(
    kills={"rollout": 2, "engine": 2, "reward": 4, "trainer": 4, "queue": 4},
    freezes={},
    num_cuts=0,
    num_lost_tails=0,
    mean_pause_seconds=6.0,
    rest_seconds=35.0,
)
PURE = Plan(
    kills={"rollout": 12, "engine": 12, "reward": 13, "trainer": 7, "queue": 12, "launcher": 4},
    freezes={"rollout": 2, "engine": 2, "reward": 2, "trainer": 1, "queue": 2},
    num_cuts=8,
    num_lost_tails=3,
    mean_pause_seconds=2.5,
    rest_seconds=40.0,
)
SAME_BITS = Plan(
    kills={"rollout": 2, "engine": 3, "reward": 2, "trainer": 2, "queue": 3, "launcher": 1},
    freezes={"rollout": 1, "trainer": 1},
    num_cuts=2,
    num_lost_tails=1,
    mean_pause_seconds=2.5,
    rest_seconds=35.0,
)
AGENTS = Plan(
    kills={
        "agent": 4,
        "environment": 4,
        "rollout": 2,
        "engine": 3,
        "reward": 1,
        "trainer": 1,
        "queue": 2,
        "launcher": 1,
    },
    freezes={"agent": 2, "rollout": 1},
    num_cuts=2,
    num_lost_tails=1,
    mean_pause_seconds=2.5,
    rest_seconds=35.0,
    num_storms=3,
)


def main() -> None:
    """Run what is asked for."""
    quiet_libraries(os.environ)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--parts", default="abcd")
    parser.add_argument("--out", type=Path, default=Path("runs/chaos"))
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    results: dict[str, dict[str, Any]] = {}
    try:
        for name in arguments.parts:
            start = time.monotonic()
            results[name] = PARTS[name](out, arguments.seed)
            results[name]["seconds"] = round(time.monotonic() - start, 1)
            shown = {key: value for key, value in results[name].items() if key != "time_line"}
            print(f"part {name}: {json.dumps(shown)}", flush=True)
    except ChaosError as error:
        sys.exit(f"chaos: {error}")
    summary = {"seed": arguments.seed, "total": total(results), "parts": results}
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print(f"total: {json.dumps(summary['total'])}\n{out / 'summary.json'}")


def part_a(out: Path, seed: int) -> dict[str, Any]:
    python = str(ROOT / ".venv-sglang" / "bin" / "python")
    part = ChaosPart("a", REAL, num_steps=60, max_staleness=1, deadline_seconds=420, sglang_python=python)
    return figures(*run_part(part, out / "a", seed), None)


def part_b(out: Path, seed: int) -> dict[str, Any]:
    part = ChaosPart("b", PURE, num_steps=200, max_staleness=2, deadline_seconds=480, num_servers=2)
    return figures(*run_part(part, out / "b", seed), None)


def part_c(out: Path, seed: int) -> dict[str, Any]:
    shape: dict[str, Any] = {"num_steps": 60, "max_staleness": 0, "deadline_seconds": 300, "num_servers": 2}
    return same_bits(SAME_BITS, shape, out / "c", seed)


def part_d(out: Path, seed: int) -> dict[str, Any]:
    shape: dict[str, Any] = {"num_steps": 12, "max_staleness": 0, "deadline_seconds": 540, "num_servers": 2}
    return same_bits(AGENTS, {**shape, "num_agents": 2}, out / "d", seed)


def same_bits(plan: Plan, shape: dict[str, Any], out: Path, seed: int) -> dict[str, Any]:
    """Run one configuration with and without disturbances; ChaosError unless both trained the same to the same weights.

    The disturbed run writes its versions as deltas, which must make no difference.
    """
    calm_out = out.with_name(f"{out.name}-calm")
    _, calm = run_part(ChaosPart(calm_out.name, NOTHING, **shape), calm_out, seed)
    record, found = run_part(ChaosPart(out.name, plan, full_every=5, **shape), out, seed)
    if found.same() != calm.same():
        raise ChaosError(record.explain(f"it ends with {found.same()}; undisturbed with {calm.same()}", out))
    return figures(record, found, True)


PARTS = {"a": part_a, "b": part_b, "c": part_c, "d": part_d}


def total(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Sums over the parts; the largest staleness; whether the weights were the same in the part that checks it."""
    parts = list(results.values())
    sums = {key: sum(each[key] for each in parts) for key in ("kills", "issued", "trained", "lost", "trained_twice")}
    by_target, dropped = Counter[str](), Counter[str]()
    for each in parts:
        by_target.update(each["kills_by_target"])
        dropped.update(each["dropped"])
    asked = [each["bit_identical"] for each in parts if each["bit_identical"] is not None]
    return {
        **sums,
        "kills_by_target": dict(by_target),
        "dropped": dict(dropped),
        "staleness_max": max((each["staleness_max"] for each in parts), default=0),
        "bit_identical": all(asked) if asked else None,
    }


if __name__ == "__main__":
    main()
