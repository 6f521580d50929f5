"""Penstock's demo in TRL: the same model, prompts, reward and optimizer in TRL's GRPOTrainer.

Owns TRL's settings at each level of tuning, and the clock of its steps. Invariant: no step's time includes evaluation,
or anything before the first step. It runs in TRL's virtual environment, whose interpreter must be started with the
variables of `__main__.TRL_ALLOCATOR`.

Levels: `installed`: TRL's defaults. `settings`: the best that settings reach. `code`: these, and `trl_tuned`.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
import trl  # type: ignore[import-not-found]
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from benchmarks.against_trl.trl_tuned import TunedGRPOTrainer

PROMPTS_PER_STEP = 8
MAX_NEW_TOKENS = 4
SETTINGS: dict[str, dict[str, Any]] = {
    "installed": {},
    "settings": {
        "bf16": False,  # float32: without AMX or AVX512-BF16, bfloat16 products are several times slower
        "gradient_checkpointing": False,
        "optim": "adamw_torch_fused",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "skip_memory_metrics": True,
    },
}
SETTINGS["code"] = SETTINGS["settings"]


class StepClock(transformers.TrainerCallback):
    """Wall and CPU seconds of each step by phase; evaluates after every `every_steps` steps, outside their time."""

    def __init__(self, evaluate: Any, every_steps: int) -> None:
        self._evaluate, self._every_steps = evaluate, every_steps
        self.steps: list[dict[str, Any]] = []
        self.evals: list[dict[str, Any]] = []
        self.reward_mean = 0.0
        self._reset()

    def _reset(self) -> None:
        self._started_at = time.time()
        self._wall, self._cpu = time.perf_counter(), time.process_time()
        self._phases: dict[str, tuple[float, float]] = {}

    def lap(self, phase: str) -> None:
        """Count the time since the last lap as `phase`."""
        wall, cpu = time.perf_counter(), time.process_time()
        before = self._phases.get(phase, (0.0, 0.0))
        self._phases[phase] = (before[0] + wall - self._wall, before[1] + cpu - self._cpu)
        self._wall, self._cpu = wall, cpu

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._run_evaluation(0)
        self._reset()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.lap("optimizer")
        self.steps.append(
            {
                "step": state.global_step - 1,
                "started_at": self._started_at,
                "ended_at": time.time(),
                "seconds": {phase: wall for phase, (wall, _) in self._phases.items()},
                "cpu_seconds": {phase: cpu for phase, (_, cpu) in self._phases.items()},
                "reward_mean": self.reward_mean,
            }
        )
        spent = self.steps[-1]["ended_at"] - self._started_at
        print(f"TRL step {state.global_step}: {spent:.2f} s, reward {self.reward_mean:.2f}", flush=True)
        if state.global_step % self._every_steps == 0:
            self._run_evaluation(state.global_step)
        self._reset()

    def _run_evaluation(self, steps: int) -> None:
        start = time.perf_counter()
        accuracy = self._evaluate()
        self.evals.append({"steps": steps, "accuracy": accuracy, "seconds": time.perf_counter() - start})
        print(f"TRL held-out accuracy after {steps} steps: {accuracy:.2f}", flush=True)


def clocked(base: type[Any], clock: StepClock) -> type[Any]:
    """`base` with laps at the ends of generation and of the backward pass."""

    class Clocked(base):  # type: ignore[misc]
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            clock.lap("other")
            result = super()._generate_and_score_completions(inputs)
            clock.lap("generation")
            return result

        def training_step(self, *positional: Any, **named: Any) -> Any:
            result = super().training_step(*positional, **named)
            clock.lap("forward_backward")
            return result

    return Clocked


def exact_match(completion: str, answer: str) -> float:
    """1 if the completion up to its newline is the answer, as Penstock's `exact_match`, which stops at a newline."""
    return float(completion.partition("\n")[0].strip() == answer.strip())


def read_rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def greedy_accuracy(model: Any, tokenizer: Any, rows: list[dict[str, str]], end_ids: list[int]) -> float:
    """Share of prompts whose greedy completion is the answer."""
    inputs = tokenizer([row["prompt"] for row in rows], return_tensors="pt", padding=True, padding_side="left")
    config = transformers.GenerationConfig(
        max_new_tokens=MAX_NEW_TOKENS, do_sample=False, eos_token_id=end_ids, pad_token_id=tokenizer.pad_token_id
    )
    with torch.no_grad():
        ids = model.generate(**inputs, generation_config=config)[:, inputs["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return sum(exact_match(text, row["answer"]) for text, row in zip(texts, rows, strict=True)) / len(rows)


def make_trainer(options: argparse.Namespace, folder: str) -> tuple[Any, StepClock]:
    """The trainer at its level of tuning, and its clock."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    end_ids = [tokenizer.eos_token_id, *tokenizer("\n").input_ids]
    model.generation_config.eos_token_id = end_ids
    heldout = read_rows(options.heldout)
    clock = StepClock(lambda: greedy_accuracy(model, tokenizer, heldout, end_ids), options.eval_every_steps)

    def reward(completions: list[str], answer: list[str], **_: Any) -> list[float]:
        values = [exact_match(completion, right) for completion, right in zip(completions, answer, strict=True)]
        clock.reward_mean = sum(values) / len(values)
        return values

    config = GRPOConfig(
        output_dir=folder,
        use_cpu=True,
        seed=options.seed,
        max_steps=options.steps,
        per_device_train_batch_size=options.group_size * PROMPTS_PER_STEP,
        num_generations=options.group_size,
        max_completion_length=MAX_NEW_TOKENS,
        temperature=1.0,
        learning_rate=2e-5,
        warmup_steps=5,
        lr_scheduler_type="constant_with_warmup",
        beta=0.0,  # no reference model
        num_iterations=1,
        report_to="none",
        save_strategy="no",
        **SETTINGS[options.level],
    )
    trainer = clocked(TunedGRPOTrainer if options.level == "code" else GRPOTrainer, clock)(
        model=model,
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_list(read_rows(options.train)),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    return trainer, clock


def main() -> None:
    parser = argparse.ArgumentParser(description="Run Penstock's demo in TRL and write its step times as JSON.")
    parser.add_argument("--level", choices=sorted(SETTINGS), default="code")
    parser.add_argument("--model", required=True)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--heldout", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--group-size", type=int, required=True)
    parser.add_argument("--eval-every-steps", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trainer, clock = make_trainer(options, folder)
        trainer.train()
    versions = {"trl": trl.__version__, "transformers": transformers.__version__, "torch": torch.__version__}
    result = {"level": options.level, "versions": versions, "steps": clock.steps, "evals": clock.evals}
    options.out.write_text(json.dumps(result) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
