"""How long each transport takes to bring new weights from the trainer to the servers, against moving the bare bytes.

    python -m benchmarks.weight_push [--models 135M 1B] [--transports disk nccl tensor] [--servers 1] [--pushes 5]
        [--bucket-bytes N]

Random models of those shapes, float32 masters, bfloat16 pushes, real SGLang servers on this host. Per push:

    stage    the trainer rounds, hashes, and copies or writes; it waits for this
    push     from the first request until every server has answered
    paused   the part of the push in which generation was paused
    total    stage + push                    exposed   stage + paused

The raw cost of the same bytes is measured in the same run, in turns with the pushes. For disk: write and read one
file. For nccl: a bare gloo broadcast in buckets of the same size to another process, which keeps nothing. For tensor:
one copy into shared memory and one out of it.
"""

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.chaos.model import make_tiny_model
from benchmarks.push_setup import ModelSource, Pusher, RolloutServer, pusher, rollout_server
from penstock.config import Config, WeightsSection
from penstock_trainer.weight_sync.process_group import Group, MeetingPoint
from penstock_trainer.weight_sync.shared_memory import shared_memory

# Shapes of SmolLM2-135M, and of TinyLlama-1.1B with tied embeddings.
SHAPES: dict[str, dict[str, Any]] = {
    "135M": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "1B": {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
}
ON_CPU: dict[str, Any] = {"device": "cpu", "extra_args": ["--mem-fraction-static", "0.5"]}
"""What the section `rollout.engine` holds besides the rest."""
# What each row changes in the section `weights`.
TRANSPORTS: dict[str, dict[str, Any]] = {
    "disk": {"transport": "disk"},
    "nccl": {"transport": "nccl"},
    "tensor": {"transport": "tensor"},
}
COLUMNS = (
    *("model", "transport", "MB", "stage s", "push s", "paused s", "total s", "exposed s", "raw s"),
    *("push / raw", "total / raw"),
)
RawCost = Callable[[int, int, Path], float]
"""(bytes, bytes of a bucket, folder) -> seconds to move them by the means of a transport, and nothing else."""
STARTS_SECONDS = 600
DEADLINE_SECONDS = 120


@dataclass(frozen=True)
class Row:
    """Medians of one transport, in seconds."""

    model: str
    transport: str
    num_bytes: int
    stage: float
    push: float
    paused: float
    raw: float

    @property
    def total(self) -> float:
        return self.stage + self.push

    @property
    def exposed(self) -> float:
        return self.stage + self.paused


def make_model(shape: dict[str, Any], folder: Path, device: str = "cpu") -> ModelSource:
    """A random model: its float32 masters on `device`, its bfloat16 files in `folder` for the engines to start with."""
    make_tiny_model(folder)  # for its tokenizer
    torch.manual_seed(0)
    config = LlamaConfig(**shape, tie_word_embeddings=True, max_position_embeddings=512, bos_token_id=None)
    model = LlamaForCausalLM(config)
    model.bfloat16().save_pretrained(folder)
    model.float()
    return ModelSource(model.to(torch.device(device)), device)  # type: ignore[arg-type]


def config_of(model: Path, folder: Path, weights: dict[str, Any], engine: dict[str, Any] = ON_CPU) -> Config:
    engine = {"python": ".venv-sglang/bin/python", **engine}
    return Config.model_validate(
        {
            "actor": {"path": str(model), "dtype": "float32"},
            "data": {"train": {"path": "unused"}},
            "run": {"root": str(folder), "name": "weight-push"},
            "rollout": {"engine": {**engine, "dtype": "bfloat16", "max_running_requests": 8, "max_total_tokens": 1024}},
            "weights": {"push_timeout_seconds": DEADLINE_SECONDS, **weights},
        }
    )


async def measure(
    name: str, transports: list[str], num_servers: int, num_pushes: int, bucket_bytes: int, folder: Path
) -> list[Row]:
    """Measure all transports with one model and the same servers."""
    model = folder / name
    source = await asyncio.to_thread(make_model, SHAPES[name], model)
    rows = []
    async with AsyncExitStack() as stack:
        started = config_of(model, folder, {})
        servers = [
            await stack.enter_async_context(rollout_server(f"{name}-{number}", started, folder))
            for number in range(num_servers)
        ]
        async with asyncio.timeout(STARTS_SECONDS):
            await asyncio.gather(*(server.engine.up.wait() for server in servers))
        for lease, transport in enumerate(transports, start=1):
            config = config_of(model, folder, {**TRANSPORTS[transport], "bucket_bytes": bucket_bytes})
            async with pusher(config, source, servers, folder, lease=lease) as pushing:
                rows.append(await measure_one(name, transport, config, source, pushing, servers, num_pushes, folder))
                print(shown(rows[-1]), flush=True)
    return rows


async def measure_one(
    name: str,
    transport: str,
    config: Config,
    source: ModelSource,
    pushing: Pusher,
    servers: list[RolloutServer],
    num_pushes: int,
    folder: Path,
    raw_cost: RawCost | None = None,
) -> Row:
    """Push once without counting it, to form groups and touch memory; then measure pushes and raw costs in turn."""
    num_bytes = sum(2 * weight.numel() for weight in source.masters.values())
    raw_cost = raw_cost or RAW[TRANSPORTS[transport]["transport"]]
    seen: dict[str, list[float]] = {"stage": [], "push": [], "paused": [], "raw": []}
    for turn in range(num_pushes + 1):
        start = time.perf_counter()
        announcement = await pushing.stage()
        staged = time.perf_counter()
        push = await pushing.publisher.push(announcement)
        if len(push.live) != len(servers):
            raise SystemExit(f"{transport}: {push.fenced}; the servers' logs are in {folder}")
        pushing.transport.prune({pushing.version})  # frees memory for the raw cost
        raw = await asyncio.to_thread(raw_cost, num_bytes, config.weights.bucket_bytes, folder)
        if turn:
            for key, value in zip(seen, (staged - start, push.seconds, push.paused_seconds, raw), strict=True):
                seen[key].append(value)
    medians = {key: statistics.median(values) for key, values in seen.items()}
    return Row(name, transport, num_bytes, **medians)


def raw_disk(num_bytes: int, _: int, folder: Path) -> float:
    """Write and read a file in the folder where versions are staged by default."""
    memory = Path("/dev/shm")
    path = (memory if memory.is_dir() else folder) / f"weight-push-{num_bytes}"
    data = memoryview(bytearray(num_bytes))
    start = time.perf_counter()
    try:
        with path.open("wb", buffering=0) as file:
            written = 0
            while written < num_bytes:
                written += file.write(data[written:])
        with path.open("rb", buffering=0) as file:
            read = 0
            while count := file.readinto(data[read:]):
                read += count
        return time.perf_counter() - start
    finally:
        path.unlink()


def raw_broadcast(num_bytes: int, bucket_bytes: int, _: Path) -> float:
    """Broadcast in buckets to a process that does nothing else."""
    point = MeetingPoint("127.0.0.1", 0)
    arguments = [str(value) for value in (point.port, num_bytes, bucket_bytes)]
    with subprocess.Popen([sys.executable, "-m", "benchmarks.push_peer", *arguments], stdout=subprocess.PIPE) as peer:
        group = Group.meet(point.store, "raw", 2, "gloo", torch.device("cpu"), 60)
        data = torch.ones(num_bytes, dtype=torch.uint8)
        start = time.perf_counter()
        for piece in data.split(bucket_bytes):
            group.broadcast(piece, 60)
        assert peer.stdout is not None
        peer.stdout.readline()  # it has everything
        seconds = time.perf_counter() - start
    return seconds


def raw_memory(num_bytes: int, bucket_bytes: int, _: Path) -> float:
    """Copy into shared memory and out of it, in buckets."""
    data, shared = torch.zeros(num_bytes, dtype=torch.uint8), shared_memory(num_bytes).zero_()
    start = time.perf_counter()
    for begin in range(0, num_bytes, bucket_bytes):
        shared[begin : begin + bucket_bytes] = data[begin : begin + bucket_bytes]
    for begin in range(0, num_bytes, bucket_bytes):
        data[begin : begin + bucket_bytes] = shared[begin : begin + bucket_bytes]
    return time.perf_counter() - start


RAW: dict[str, RawCost] = {
    "disk": raw_disk,
    "nccl": raw_broadcast,
    "tensor": raw_memory,
}


def shown(row: Row) -> str:
    seconds = " | ".join(f"{value:.2f}" for value in (row.stage, row.push, row.paused, row.total, row.exposed, row.raw))
    ratios = f"{row.push / row.raw:.2f} | {row.total / row.raw:.2f}"
    return f"| {row.model} | {row.transport} | {row.num_bytes / 1e6:.0f} | {seconds} | {ratios} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--transports", nargs="+", choices=list(TRANSPORTS), default=list(TRANSPORTS))
    parser.add_argument("--servers", type=int, default=1)
    parser.add_argument("--pushes", type=int, default=5)
    parser.add_argument("--bucket-bytes", type=int, default=WeightsSection().bucket_bytes)
    parser.add_argument("--out", type=Path, help="also write the rows as JSON lines")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}", flush=True)
    rows = []
    for name in arguments.models:
        with tempfile.TemporaryDirectory() as folder:
            measured = measure(
                name,
                arguments.transports,
                arguments.servers,
                arguments.pushes,
                arguments.bucket_bytes,
                Path(folder),
            )
            rows += asyncio.run(measured)
    if arguments.out:
        arguments.out.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
