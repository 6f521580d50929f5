"""The rollout service against bare SGLang: the same server, prompts, lengths and number of completions at once.

Owns the load and the figures. "Bare" sends one request per completion straight to SGLang, without log-probabilities
and with them, which training needs; "groups" sends one request per prompt, as the service does. "Service" is the real
service as a process, with a real queue: tickets in, groups out. All of them run in turns against one engine.

    where the difference goes     slots held by the finished   a group ends with its longest completion
                                  slots idle                   between a group's end and the next one's start
                                  CPU of service, queue        cores that are busy meanwhile
"""

import asyncio
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from statistics import median

import httpx
import psutil
import torch
from transformers import AutoModelForCausalLM

from benchmarks.chaos.model import make_tiny_model
from benchmarks.gpu.engine import bare_engine, engine_section, generate, has_engine, together, versions_of
from benchmarks.gpu.options import Options
from benchmarks.gpu.record import Recorder
from benchmarks.gpu.rollout_service import Service, running_service
from benchmarks.push_setup import ModelSource
from penstock.config import Config
from penstock.contracts import RolloutGroup, Sampling

GROUP_SIZE = 8
NUM_TURNS = 3
BARE = ("bare", "bare, log-probabilities", "bare, log-probabilities, groups")
ROLLOUT_SECONDS = 150.0


@dataclass(frozen=True)
class Load:
    """Prompts of one group each; `at_once`: completions that run at the same time."""

    prompts: tuple[tuple[int, ...], ...]
    max_new_tokens: int
    at_once: int

    @classmethod
    def of(cls, options: Options, vocabulary: int) -> "Load":
        """Four times what runs at once: shorter ends than starts."""
        at_once, length, new = (16, 20, 16) if options.cpu else (256, 200, 256)
        random, first = Random(0), min(1000, vocabulary // 2)
        count = 4 * at_once // GROUP_SIZE
        return cls(tuple(tuple(random.choices(range(first, vocabulary), k=length)) for _ in range(count)), new, at_once)

    @property
    def sampling(self) -> Sampling:
        return Sampling(1.0, self.max_new_tokens, ())


@dataclass(frozen=True)
class Result:
    """Of one turn. busy: CPU seconds of each process, per second."""

    seconds: float
    num_tokens: int
    busy: dict[str, float]
    idle_slots: float = 0.0
    finished_slots: float = 0.0

    @property
    def rate(self) -> float:
        return self.num_tokens / self.seconds


def run(options: Options, record: Recorder) -> None:
    if not has_engine(options, record, "rollout"):
        return
    if options.model is None and not options.cpu:
        record.skip("rollout", "no model with a tokenizer; give --model")
        return
    if record.has_time("rollout", ROLLOUT_SECONDS if not options.cpu else 30):
        with tempfile.TemporaryDirectory(prefix="penstock-rollout-") as folder:
            asyncio.run(measure(options, record, Path(folder)))


async def measure(options: Options, record: Recorder, folder: Path) -> None:
    model = options.model or folder / "model"
    if options.model is None:
        make_tiny_model(model)
    source = ModelSource(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32))
    vocabulary = source.model.config.get_text_config().vocab_size
    load = Load.of(options, vocabulary)
    config = config_of(options, model, folder, load)
    log = options.out / "rollout-engine.log"
    async with (
        bare_engine(config.rollout.engine, model, log) as server,
        running_service(config, source, server.url, folder, options.out) as service,
    ):
        record.facts(await versions_of(server.url))
        bare = partial(measure_bare, server.url, load, server.pid)
        await bare(1, True)  # caches and kernels settle
        forms: dict[str, Callable[[], Awaitable[Result]]] = {
            BARE[0]: partial(bare, 1, False),
            BARE[1]: partial(bare, 1, True),
            BARE[2]: partial(bare, GROUP_SIZE, True),
            "service": partial(measure_service, load, server.pid, service),
        }
        results: dict[str, list[Result]] = {form: [] for form in forms}
        for turn in range(NUM_TURNS):
            took = [result.seconds for each in results.values() for result in each]
            if took and not record.has_time(f"rollout, turn {turn}", 1.5 * len(forms) * max(took)):
                break
            for form, once in forms.items():
                results[form].append(await once())
        show(record, load, results)


def config_of(options: Options, model: Path, folder: Path, load: Load) -> Config:
    longest = max(map(len, load.prompts)) + load.max_new_tokens
    engine = engine_section(
        options,
        max_running_requests=load.at_once,
        max_total_tokens=load.at_once * (longest + 64) if options.cpu else 0,
    )
    return Config.model_validate(
        {
            "actor": {"path": str(model), "group_size": GROUP_SIZE, "dtype": options.dtype},
            "data": {"train": {"path": "unused"}},
            "run": {"name": "rollout", "root": str(folder / "runs")},
            "sampling": {"max_new_tokens": load.max_new_tokens},
            "rollout": {"engine": engine},
            "staleness": {"heartbeat_seconds": 600, "claim_idle_seconds": 600},
        }
    )


def show(record: Recorder, load: Load, results: dict[str, list[Result]]) -> None:
    case = f"{load.at_once} completions at once, {load.max_new_tokens} new tokens"
    for form, turns in results.items():
        record.figure(f"{case}, {form}", "tokens per second", median(each.rate for each in turns), "tokens/s")
        for process in turns[0].busy:
            cores = median(each.busy[process] for each in turns)
            record.figure(f"{case}, {form}", f"CPU of {process}", cores, "cores")
    ours = results["service"]
    for other in BARE:
        ratio = median(one.rate / bare.rate for one, bare in zip(ours, results[other], strict=True))
        record.figure(case, f"service / {other}", ratio, "of the tokens per second")
    record.figure(case, "slots held by the finished", median(each.finished_slots for each in ours), "of all slots")
    record.figure(case, "slots idle", median(each.idle_slots for each in ours), "of all slots")


class Cpu:
    """CPU time of processes with their descendants, from its making on."""

    def __init__(self, pids: dict[str, int]) -> None:
        self._pids = pids
        self._before, self._began = self._now(), time.monotonic()

    def cores(self) -> dict[str, float]:
        seconds, now = time.monotonic() - self._began, self._now()
        return {name: (now[name] - self._before[name]) / seconds for name in self._pids}

    def _now(self) -> dict[str, float]:
        found = {}
        for name, pid in self._pids.items():
            tree = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
            found[name] = sum(sum(each.cpu_times()[:2]) for each in tree if each.is_running())
        return found


async def measure_bare(url: str, load: Load, engine_pid: int, per_request: int, return_logprob: bool) -> Result:
    """`per_request`: completions of a request."""
    sampling = {"temperature": 1.0, "max_new_tokens": load.max_new_tokens}
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, trust_env=False, timeout=600, limits=limits) as client:
        calls = [
            partial(generate, client, prompt, sampling, per_request, return_logprob=return_logprob)
            for prompt in load.prompts
            for _ in range(GROUP_SIZE // per_request)
        ]
        cpu, began = Cpu({"engine": engine_pid}), time.monotonic()
        num_tokens = sum(await together(load.at_once // per_request, calls))
        return Result(time.monotonic() - began, num_tokens, cpu.cores())


async def measure_service(load: Load, engine_pid: int, service: Service) -> Result:
    """All groups at once as tickets: the service takes as many as run at the same time."""
    cpu = Cpu({"engine": engine_pid, **service.pids})
    began = time.monotonic()
    groups = await service.generate(load.prompts, GROUP_SIZE, load.sampling)
    return result_of(groups, load, time.monotonic() - began, cpu.cores())


def result_of(groups: list[RolloutGroup], load: Load, seconds: float, cores: dict[str, float]) -> Result:
    """Slots are counted as completions times seconds, between the first start and the last end."""
    lengths = [[each.num_tokens for each in group.completions] for group in groups]
    spans = [group.ended_at - group.started_at for group in groups]
    held = sum(span * len(each) for span, each in zip(spans, lengths, strict=True))
    used = sum(span * sum(each) / max(each) for span, each in zip(spans, lengths, strict=True) if max(each))
    wall = max(group.ended_at for group in groups) - min(group.started_at for group in groups)
    return Result(
        seconds,
        sum(map(sum, lengths)),
        cores,
        idle_slots=max(0.0, 1 - held / (load.at_once * wall)) if wall else 0.0,
        finished_slots=1 - used / held if held else 0.0,
    )
