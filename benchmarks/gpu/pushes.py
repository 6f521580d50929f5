"""Pushes of weights by each transport, against moving the same bytes by the same means, and the pause that they make.

Owns the raw costs on a GPU; the rest is `benchmarks.weight_push`. Per transport: seconds to stage and to push, their
ratio to the raw seconds, the pause that the service reports, and the pause that a running completion shows (the longest
gap between two of its tokens, less the usual one). nccl needs a GPU for each side.
"""

import asyncio
import json
import os
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import torch

from benchmarks.gpu.engine import START_SECONDS, engine_section, has_engine, versions_of
from benchmarks.gpu.options import Options
from benchmarks.gpu.record import Recorder
from benchmarks.push_setup import ModelSource, RolloutServer, pusher, rollout_server
from benchmarks.weight_push import SHAPES, TRANSPORTS, RawCost, config_of, make_model, measure_one
from penstock.config import WeightsSection

TINY = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
NUM_TOKENS = 400  # of the completion that runs during a push; the models' context is 512
TOKENS_BEFORE = 4  # they show the usual gap
MODEL_SECONDS = 150.0


def run(options: Options, record: Recorder) -> None:
    if not has_engine(options, record, "pushes"):
        return
    two = not options.cpu and torch.cuda.device_count() > 1
    if two:
        show_second_gpu()
    for name in ("tiny",) if options.cpu else ("135M", "1B"):
        if not record.has_time(f"pushes, {name}", MODEL_SECONDS if not options.cpu else 30):
            return
        with tempfile.TemporaryDirectory(prefix="penstock-pushes-") as folder:
            asyncio.run(measure(options, record, name, Path(folder), two=two))


async def measure(options: Options, record: Recorder, name: str, folder: Path, *, two: bool) -> None:
    """All transports with one model and one engine, which is on a GPU of its own if there are two."""
    shape = TINY if name == "tiny" else SHAPES[name]
    source = await asyncio.to_thread(make_model, shape, folder / name, options.device)
    section = engine_section(options)
    if not options.cpu:
        measure_links(record, 2 * sum(weight.numel() for weight in source.masters.values()), two=two)
    async with AsyncExitStack() as stack:
        started = config_of(folder / name, folder, {}, section)
        server = await stack.enter_async_context(rollout_server(f"push-{name}", started, options.out))
        async with asyncio.timeout(START_SECONDS):
            await server.engine.up.wait()
        record.facts(await versions_of(server.server.url))
        for lease, transport in enumerate(TRANSPORTS, start=1):
            case = f"{name}, {transport}"
            if transport == "nccl" and not (options.cpu or two):
                record.skip(case, "NCCL refuses two processes on one GPU, and this machine shows one")
            elif record.has_time(case, 20 if not options.cpu else 5):
                with record.attempt(case):
                    await measure_transport(options, record, case, transport, source, server, folder, lease)


def show_second_gpu() -> None:
    """Show the second visible GPU alone to the engines, as the launcher does; this process has begun CUDA with both."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")
    os.environ |= {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": visible[1]}


async def measure_transport(
    options: Options,
    record: Recorder,
    case: str,
    transport: str,
    source: ModelSource,
    server: RolloutServer,
    folder: Path,
    lease: int,
) -> None:
    weights = {**TRANSPORTS[transport], "bucket_bytes": WeightsSection().bucket_bytes}
    name = case.partition(",")[0]
    config = config_of(folder / name, folder, weights, engine_section(options))
    raw = raw_between_gpus if transport == "nccl" and not options.cpu else None
    num_pushes = 2 if options.cpu else 5
    async with pusher(config, source, [server], folder, lease=lease) as pushing:
        row = await measure_one(name, transport, config, source, pushing, [server], num_pushes, folder, raw)
        record.figure(case, "size", row.num_bytes / 1e6, "MB")
        for figure in ("stage", "push", "paused", "total", "exposed", "raw"):
            record.figure(case, figure, getattr(row, figure), "s")
        record.figure(case, "push / raw", row.push / row.raw)
        record.figure(case, "total / raw", row.total / row.raw)
        staged = await pushing.stage()  # before, since a completion is too short to last for both

        async def push() -> None:
            if fenced := (await pushing.publisher.push(staged)).fenced:
                raise RuntimeError(f"the server did not take the push: {fenced}")

        gap, note = await pause_seen(server.server.url, push)
        record.figure(case, "pause that a completion shows", gap, "s", note=note)


async def pause_seen(url: str, push: Callable[[], Awaitable[Any]]) -> tuple[float, str]:
    """The longest gap between two tokens of a completion while `push` runs, less the median gap, in seconds.

    And a note if the completion ended before the push did: the pause may have come after it.
    """
    sampling = {"max_new_tokens": NUM_TOKENS, "ignore_eos": True, "temperature": 1.0}
    body = {"input_ids": [5, 6, 7], "sampling_params": sampling, "stream": True}
    times: list[float] = []
    pushing: asyncio.Task[Any] | None = None
    async with (
        httpx.AsyncClient(base_url=url, trust_env=False, timeout=START_SECONDS) as client,
        client.stream("POST", "/generate", json=body) as response,
    ):
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            if "error" in json.loads(line.removeprefix("data: ")):
                raise RuntimeError(f"SGLang answered {line[:200]!r}: expected the tokens of a completion")
            times.append(time.perf_counter())
            if len(times) == TOKENS_BEFORE:
                pushing = asyncio.ensure_future(push())
        is_over = pushing is not None and pushing.done()
    if pushing is None:
        raise RuntimeError(f"a completion of {NUM_TOKENS} tokens came in {len(times)} pieces: expected a stream")
    await pushing
    gaps = [later - earlier for earlier, later in pairwise(times)]
    note = "" if is_over else "the completion ended before the push: the pause may be longer"
    return max(0.0, max(gaps) - median(gaps)), note


# Raw costs between GPU and host, and between two GPUs: (bytes, bytes of a bucket, folder) -> seconds.


def raw_to_host(num_bytes: int, bucket_bytes: int, _: Path) -> float:
    """From a GPU into pinned memory."""
    size = min(num_bytes, bucket_bytes)
    return _copied(torch.ones(size, dtype=torch.uint8, device="cuda:0"), _pinned(size), num_bytes)


def raw_to_gpu(num_bytes: int, bucket_bytes: int, _: Path) -> float:
    """From pinned memory into a GPU."""
    size = min(num_bytes, bucket_bytes)
    return _copied(_pinned(size), torch.ones(size, dtype=torch.uint8, device="cuda:0"), num_bytes)


def raw_between_gpus(num_bytes: int, bucket_bytes: int, _: Path) -> float:
    """From pinned memory into the first GPU and on to the second, as a broadcast of buckets goes."""
    size = min(num_bytes, bucket_bytes)
    pinned = _pinned(size)
    first, second = (torch.ones(size, dtype=torch.uint8, device=f"cuda:{each}") for each in (0, 1))
    return _copied(pinned, first, num_bytes) + _copied(first, second, num_bytes)


def _pinned(size: int) -> torch.Tensor:
    return torch.ones(size, dtype=torch.uint8, pin_memory=True)


def _copied(source: torch.Tensor, target: torch.Tensor, num_bytes: int) -> float:
    """Seconds for `num_bytes`, in pieces of the tensors' size, after one piece that does not count."""
    target.copy_(source)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for start in range(0, num_bytes, source.numel()):
        size = min(source.numel(), num_bytes - start)
        target[:size].copy_(source[:size], non_blocking=True)
    for index in range(torch.cuda.device_count()):
        torch.cuda.synchronize(index)
    return time.perf_counter() - begin


def measure_links(record: Recorder, num_bytes: int, *, two: bool) -> None:
    """What this machine can move at all."""
    links: dict[str, RawCost] = {"GPU to pinned memory": raw_to_host, "pinned memory to GPU": raw_to_gpu}
    if two:
        links["pinned memory to GPU to GPU"] = raw_between_gpus
    for link, cost in links.items():
        seconds = median(cost(num_bytes, WeightsSection().bucket_bytes, Path()) for _ in range(3))
        record.figure("links", link, num_bytes / seconds / 1e9, "GB/s")
