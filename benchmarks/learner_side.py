"""One side of the learner's benchmark, in a process of its own: trains on the cases and writes what it measured.

Owns how time and memory are measured, the same for both sides.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import PreTrainedModel

from benchmarks.learner_cases import Case, ragged_case, scored_groups, short_case
from benchmarks.learner_plain import MAX_GRAD_NORM, PlainTrainer
from penstock.config import Config
from penstock_trainer.learner.keep_memory import keep_freed_memory
from penstock_trainer.learner.learner import Learner

LR = 1e-12  # too small to change the weights: every step of every process computes the same gradient
NUM_SHORT_STEPS = 3

Behaviour = dict[str, list[list[list[float]]]]
Update = Callable[[Case], None]


class PeakMemory:
    """A step's memory peaks: of all memory, and of the loss part above what was in use when that part began.

    The loss part runs from the last hidden states to their gradient: projection, loss, and the backward pass to there.
    Memory is, on the CPU, the resident set of a process whose allocator returns freed blocks at once; on a GPU, what
    PyTorch has allocated.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._floor = 0
        self.peak_bytes = 0
        self.loss_bytes = 0
        register_module_forward_hook(self._forward_done)

    def _forward_done(self, module: nn.Module, inputs: object, output: Any) -> None:
        if isinstance(module, PreTrainedModel) and module.get_output_embeddings() is None:
            self.restart()
            output.last_hidden_state.register_hook(self._loss_part_done)

    def _loss_part_done(self, gradient: Tensor) -> None:
        self.loss_bytes = max(self.loss_bytes, self._peak() - self._floor)

    def restart(self) -> None:
        """Start a new peak at what is in use now."""
        self.peak_bytes = max(self.peak_bytes, self._peak())
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
            self._floor = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
            self._floor = status_bytes("VmRSS")

    def _peak(self) -> int:
        return torch.cuda.max_memory_allocated() if self._cuda else status_bytes("VmHWM")


def status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def penstock_side(arguments: argparse.Namespace, behaviour: Behaviour) -> tuple[Update, dict[str, Tensor]]:
    learner = Learner(
        Config.model_validate(
            {
                "actor": {"path": arguments.model, "dtype": arguments.dtype, "num_threads": arguments.threads},
                "data": {"train": {"path": "none"}},
                "optimizer": {"lr": LR, "max_grad_norm": MAX_GRAD_NORM},
            }
        )
    )

    def update(case: Case) -> None:
        if not learner.update(scored_groups(case, behaviour[case.name]), version=0).changed:
            raise RuntimeError(f"the step on {case.name} changed nothing: expected a finite gradient")

    return update, dict(learner.weights())


def plain_side(arguments: argparse.Namespace, behaviour: Behaviour) -> tuple[Update, dict[str, Tensor]]:
    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)
    trainer = PlainTrainer(arguments.model, getattr(torch, arguments.dtype), LR, arguments.micro_batch, _device())
    return lambda case: trainer.update(case, behaviour[case.name]), dict(trainer.model.named_parameters())


def sampler_side(arguments: argparse.Namespace, cases: list[Case]) -> Behaviour:
    """The behaviour log-probabilities: the model's own, changed a little, so that ratios vary and none is clipped."""
    torch.set_num_threads(arguments.threads)
    trainer = PlainTrainer(arguments.model, torch.float32, LR, arguments.micro_batch, _device())
    return {
        case.name: [
            [[value + 0.05 * (-1) ** place for place, value in enumerate(values)] for values in group]
            for group in trainer.logprobs(case)
        ]
        for case in cases
    }


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def timed(update: Update, case: Case) -> float:
    _synchronize()
    start = time.perf_counter()
    update(case)
    _synchronize()
    return time.perf_counter() - start


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def measure_time(update: Update, cases: list[Case]) -> dict[str, Any]:
    """Seconds of every case's steps; the short case runs once more before them, as the warm-up of both."""
    ragged, short = cases
    seconds = [timed(update, short) for _ in range(NUM_SHORT_STEPS + 1)][1:]
    if torch.cuda.is_available():
        timed(update, ragged)  # compiles
    return {"seconds": {"short": seconds, "ragged": [timed(update, ragged)]}}


def measure_memory(update: Update, cases: list[Case], weights: dict[str, Tensor], folder: Path) -> dict[str, Any]:
    """Peaks of one step of every case; writes the gradients to files in `folder`."""
    results: dict[str, Any] = {"loss_bytes": {}, "peak_bytes": {}}
    memory = PeakMemory(_device())
    for case in cases:
        memory.peak_bytes = memory.loss_bytes = 0
        memory.restart()
        memory.peak_bytes = 0
        with kept_gradients(weights) as gradients:
            update(case)
        memory.restart()
        results["loss_bytes"][case.name], results["peak_bytes"][case.name] = memory.loss_bytes, memory.peak_bytes
        torch.save({name: gradient.cpu() for name, gradient in gradients.items()}, folder / f"{case.name}.pt")
        gradients.clear()
    return results


@contextmanager
def kept_gradients(weights: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """The gradients of an optimizer step within the block, by the name of their weight."""
    names = {weight.data_ptr(): name for name, weight in weights.items()}
    gradients: dict[str, Tensor] = {}

    def keep(optimizer: torch.optim.Optimizer, *_: object) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        gradients.update({names[each.data_ptr()]: each.grad for each in parameters})

    hook = register_optimizer_step_pre_hook(keep)
    try:
        yield gradients
    finally:
        hook.remove()


def relative_difference(ours: Mapping[str, Tensor], plain: Mapping[str, Tensor]) -> float:
    """Norm of the difference of the gradients, divided by the norm of the plain one."""
    if ours.keys() != plain.keys():
        sys.exit(f"learner: expected both sides to train the same weights: {sorted(ours.keys() ^ plain.keys())[:4]}")
    squares = [((ours[key] - plain[key]).double().square().sum(), plain[key].double().square().sum()) for key in plain]
    return float((sum(each[0] for each in squares) / sum(each[1] for each in squares)) ** 0.5)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="One side of benchmarks.learner.")
    parser.add_argument("side", choices=["penstock", "plain", "sampler"])
    parser.add_argument("--measure", choices=["time", "memory"], default="time")
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--prompts", type=int, required=True)
    parser.add_argument("--micro-batch", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.measure == "time":
        keep_freed_memory()
    cases = [ragged_case(arguments.prompts), short_case()]
    behaviour_file = arguments.folder / "behaviour.json"
    if arguments.side == "sampler":
        behaviour_file.write_text(json.dumps(sampler_side(arguments, cases)), encoding="utf-8")
        return
    behaviour = json.loads(behaviour_file.read_text(encoding="utf-8"))
    side = penstock_side if arguments.side == "penstock" else plain_side
    update, weights = side(arguments, behaviour)
    folder = arguments.folder / arguments.side
    folder.mkdir(exist_ok=True)
    if arguments.measure == "time":
        results = measure_time(update, cases)
    else:
        results = measure_memory(update, cases, weights, folder)
    results["num_parameters"] = sum(weight.numel() for weight in weights.values())
    (folder / f"{arguments.measure}.json").write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    main()
