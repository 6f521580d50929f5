"""How fast the learner trains models of three sizes: as packed tries, as packs of full sequences, and padded.

Owns the batches and the figures. All sides train the same completions with the same loss; tries compute each common
prefix once, "full sequences" is the same learner on sequences that begin differently (each with its own copy of the
prompt, without padding), "padded" is the loop of `benchmarks.learner_plain`. Weights are random.

    model FLOPs utilisation = operations that were asked for (`shapes.Work`) / (seconds x peak of the GPU)

It counts every sequence in full, so that tries may pass 1; "of what it computed" counts the rows that were computed.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from benchmarks.gpu.checks import config_of, even_logprobs, free, groups_of
from benchmarks.gpu.kernels import profiled
from benchmarks.gpu.machine import gpu_name, peak_tflops
from benchmarks.gpu.options import Options
from benchmarks.gpu.record import Recorder
from benchmarks.gpu.shapes import Shape, asked_work, packed_work, save_random, shapes
from benchmarks.learner_cases import Case, ragged_case
from benchmarks.learner_plain import PlainTrainer
from benchmarks.learner_side import LR, timed
from penstock_trainer.batching.batch import make_batch
from penstock_trainer.batching.packing import make_packs
from penstock_trainer.learner.learner import Learner
from penstock_trainer.learner.recipe import make_recipe

MAX_TOKENS, CPU_MAX_TOKENS = 16384, 512  # of a micro-batch
MICRO_BATCH = 4  # sequences, of the padded side: its logits are the largest tensor of all
NUM_STEPS, CPU_NUM_STEPS = 3, 1
SCALE = 2  # of the completions' lengths on a GPU: 32 to 1024 tokens
MODEL_SECONDS = 75.0

Step = Callable[[Case], None]


def run(options: Options, record: Recorder) -> None:
    peak = options.peak_tflops or peak_tflops(gpu_name())
    if peak is None:
        record.skip("utilisation", f"no peak is known for {gpu_name() or 'this CPU'}; give --peak-tflops")
    for shape in shapes(cpu=options.cpu):
        if not record.has_time(f"learner, {shape.name}", MODEL_SECONDS if not options.cpu else 5):
            return
        with tempfile.TemporaryDirectory(prefix="penstock-learner-") as folder:
            model = save_random(shape, Path(folder), options.device)
            measure_shape(options, record, shape, model, peak)


def measure_shape(options: Options, record: Recorder, shape: Shape, model: Path, peak: float | None) -> None:
    """All sides of one shape, one after the other: each has the GPU for itself."""
    case = ragged_case(shape.num_prompts, 1 if options.cpu else SCALE)
    sides: dict[str, Callable[[], None]] = {
        "packed tries": lambda: measure_learner(options, record, shape, model, case, peak, shared=True),
        "full sequences": lambda: measure_learner(options, record, shape, model, case, peak, shared=False),
        "padded": lambda: measure_padded(options, record, shape, model, case, peak),
    }
    for side, measure in sides.items():
        name = f"{shape.name}, {side}"
        if not record.has_time(name, MODEL_SECONDS / 3 if not options.cpu else 1):
            return
        with record.attempt(name):
            try:
                measure()
            except torch.cuda.OutOfMemoryError as error:
                record.skip(name, f"it does not fit on this GPU: {str(error).splitlines()[0]}")
        free(options)


def measure_learner(
    options: Options, record: Recorder, shape: Shape, model: Path, case: Case, peak: float | None, *, shared: bool
) -> None:
    max_tokens = CPU_MAX_TOKENS if options.cpu else MAX_TOKENS
    config = config_of(model, options.dtype, max_tokens_per_micro_batch=max_tokens)
    groups = groups_of(case, shared=shared)
    learner = Learner(config)

    def step(_: Case) -> None:
        if not learner.update(groups, version=0).changed:
            raise RuntimeError(f"a step of {shape.name} changed nothing: expected a finite gradient")

    side = "packed tries" if shared else "full sequences"
    name = f"{shape.name}, {side}"
    rules = make_recipe(config).rules
    computed = packed_work(make_packs(make_batch(groups, rules, version=0).samples, max_tokens))
    seconds = measure_steps(options, record, name, step, case, shape, peak)
    record.figure(name, "rows computed per row asked for", computed.rows / asked_work(case).rows)
    record.figure(name, "rows computed per second", computed.rows / seconds, "rows/s")
    if peak is not None:
        share = computed.flops(shape.config) / (seconds * peak * 1e12)
        record.figure(name, "utilisation, of what it computed", share)
    if shared:
        profile_step(options, record, name, lambda: step(case))


def measure_padded(
    options: Options, record: Recorder, shape: Shape, model: Path, case: Case, peak: float | None
) -> None:
    device = torch.device(options.device)
    trainer = PlainTrainer(str(model), getattr(torch, options.dtype), LR, MICRO_BATCH, device)
    even = even_logprobs(case)
    measure_steps(options, record, f"{shape.name}, padded", lambda case: trainer.update(case, even), case, shape, peak)


def measure_steps(
    options: Options, record: Recorder, name: str, step: Step, case: Case, shape: Shape, peak: float | None
) -> float:
    """Seconds of a step, the median of those after the first, which compiles."""
    if not options.cpu:
        torch.cuda.reset_peak_memory_stats()
    record.figure(name, "first step", timed(step, case), "s", note="compiles kernels")
    seconds = median([timed(step, case) for _ in range(CPU_NUM_STEPS if options.cpu else NUM_STEPS)])
    record.figure(name, "step", seconds, "s")
    record.figure(name, "trained tokens per second", case.num_loss_tokens / seconds, "tokens/s")
    record.figure(name, "tokens per second", case.num_sequence_tokens / seconds, "tokens/s", note="prompts counted")
    if not options.cpu:
        record.figure(name, "peak memory", torch.cuda.max_memory_allocated() / 2**30, "GiB")
    if peak is not None:
        share = asked_work(case).flops(shape.config) / (seconds * peak * 1e12)
        record.figure(name, "model FLOPs utilisation", share, note=f"peak {peak:g} TFLOP/s")
    return seconds


def profile_step(options: Options, record: Recorder, name: str, step: Callable[[], None]) -> None:
    """Shares of the time that the device was busy."""
    if not record.has_time(f"{name}, profile", 20 if not options.cpu else 1):
        return
    seen = profiled(step, cuda=not options.cpu)
    case = f"{name}, profile"
    record.figure(case, "matrix products", seen.matrix, "of busy time")
    record.figure(case, "attention", seen.attention, "of busy time")
    record.figure(case, "busy", seen.busy, "of the step", note="the rest waits for the host")
    for kernel, share in seen.top_others:
        record.figure(case, f"other: {kernel[:80]}", share, "of busy time")
