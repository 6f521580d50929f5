"""Recomputes the log-probabilities of episodes with transformers, by the weights that each span names.

A real SGLang in float32 with SmolLM2-135M, the rollout service's HTTP, a queue, and agent services as processes. Three
kinds of agents, one after the other: the calculator (a class with `step`, plain text), a class of tools (the chat
template, calls in hermes' form), and an agent of one's own that edits its history, forgets, asks the same twice at
once, sends a second agent and asks for a title. In the middle of each, weights are pushed two times. Start it from the
repository's root, after `make demo-agent` has loaded the model:

    .venv/bin/python -m benchmarks.agents.exact                      # 200 episodes; 20 minutes on two busy cores
    .venv/bin/python -m benchmarks.agents.exact --groups 2 --cases calculator

It exits with 1 if a span differs by more than the bound, an episode fails, or none has two versions.
"""

import argparse
import asyncio
import copy
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.agents.exact.cases import CASES, MAX_TOKENS, ROOT, Case
from benchmarks.agents.exact.episodes import Setting, make_groups
from benchmarks.agents.exact.recompute import Findings, recompute
from benchmarks.push_setup import rollout_server
from penstock.broker.embedded import EmbeddedServer
from penstock.config import Config

MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"
PYTHON = ROOT / ".venv-sglang" / "bin" / "python"
BOUND = 1e-4
"""Nats, of a log-probability at temperature 1. Far below what tells versions apart; the bound of `tests/tolerance.py`,
which holds for the worst logits that the weights allow, is 0.3 for this model."""
NUM_MODELS = 3  # one more than pushes in a case
NOISE = 0.02  # of a weight's deviation: enough to tell one version from another, too little to make the text random
GROUPS = {"calculator": 12, "tools": 8, "own agent": 5}
GROUP_SIZE = 8
SESSIONS = 24  # three groups at once, so that a push finds episodes in all states
START_SECONDS = 600.0
GROUP_SECONDS = 600.0


def make_models() -> tuple[Any, ...]:
    """The model, and others a little away from it."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    models = [model]
    for seed in range(1, NUM_MODELS):
        other = copy.deepcopy(model)
        draw = torch.Generator().manual_seed(seed)
        for weight in other.parameters():
            if weight.dim() > 1:
                weight.add_(torch.randn(weight.shape, generator=draw) * (NOISE * weight.std()))
        models.append(other)
    return tuple(models)


def engine_config(folder: Path) -> Config:
    engine = {"python": str(PYTHON), "device": "cpu", "dtype": "float32", "max_running_requests": SESSIONS}
    return Config.model_validate(
        {
            "actor": {"path": str(MODEL), "dtype": "float32"},
            "data": {"train": {"path": "unused"}},
            "run": {"root": str(folder), "name": "exact"},
            "rollout": {"engine": {**engine, "max_total_tokens": 24576, "context_length": MAX_TOKENS}},
        }
    )


async def check(folder: Path, models: tuple[Any, ...], groups: dict[str, int]) -> list[str]:
    """Make the episodes of all cases, one after the other by one engine, and recompute them; what is wrong."""
    wrong = []
    with EmbeddedServer(folder / "redis") as redis:
        async with rollout_server("rollout", engine_config(folder), folder) as server:
            async with asyncio.timeout(START_SECONDS):
                await server.engine.up.wait()
            setting = Setting(folder, MODEL, models, server, redis, GROUP_SIZE, SESSIONS, GROUP_SECONDS)
            for case, number in _chosen(groups):
                made = await make_groups(setting, case, number, {number // 3, 2 * number // 3})
                findings = await asyncio.to_thread(recompute, made, models, setting.temperature)
                print(shown(case.name, findings), flush=True)
                wrong += faults(case.name, findings)
    return wrong


def _chosen(groups: dict[str, int]) -> list[tuple[Case, int]]:
    return [(case, groups[case.name]) for case in CASES if case.name in groups]


def shown(name: str, findings: Findings) -> str:
    """A row of the table."""
    found = findings.differences
    others = sorted(span.by_others for span in findings.spans if span.by_others is not None)
    cells = [
        name,
        f"{findings.num_episodes}, {findings.num_split_episodes}",
        f"{findings.num_turns}, {findings.num_split_turns}",
        len(found),
        sum(span.num_tokens for span in findings.spans),
        findings.num_paths,
        findings.num_tool_calls,
        ", ".join(f"{reason} {count}" for reason, count in sorted(findings.branches.items())) or "none",
        f"{findings.num_cached_tokens / findings.num_prompt_tokens:.2f}",
        f"{_quantile(found, 0.5):.1e}, {_quantile(found, 0.99):.1e}, {found[-1]:.1e}",
        f"{others[0]:.1e}, {_quantile(others, 0.5):.1e}" if others else "",
    ]
    return f"| {' | '.join(map(str, cells))} |"


COLUMNS = (
    *("agents", "episodes, with two versions", "sampled turns, with two versions", "spans", "tokens", "paths"),
    *("tool calls", "branches", "cached share", "difference of a span: median, 99 %, largest"),
    "by other weights: smallest, median",
)


def faults(name: str, findings: Findings) -> list[str]:
    """What is wrong with a case."""
    found = [f"{name}: {count} episodes failed: {reason}" for reason, count in findings.failures.items()]
    num_wrong = sum(difference > BOUND for difference in findings.differences)
    if num_wrong:
        found.append(f"{name}: {num_wrong} spans differ by more than {BOUND:g}")
    if not findings.num_split_episodes:
        found.append(f"{name}: no episode has two versions")
    return found


def _quantile(values: Sequence[float], share: float) -> float:
    return values[min(len(values) - 1, int(share * len(values)))]


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; 1 if something is wrong."""
    parser = argparse.ArgumentParser(description="are the log-probabilities of episodes those of their weights?")
    parser.add_argument("--cases", nargs="+", choices=list(GROUPS), default=list(GROUPS))
    parser.add_argument("--groups", type=int, default=0, help=f"of each case; 0: {GROUPS}")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    models = make_models()
    print(f"load {os.getloadavg()[0]:.1f}", flush=True)
    began = time.monotonic()
    print(f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        groups = {case: arguments.groups or GROUPS[case] for case in arguments.cases}
        wrong = asyncio.run(check(Path(name), models, groups))
    print(f"{time.monotonic() - began:.0f} s; load {os.getloadavg()[0]:.1f}")
    print("\n".join(wrong))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
