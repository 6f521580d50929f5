"""One of several ranks that torchrun starts for test_ranks: `ranks_worker.py MODE FOLDER`.

MODE `train` runs all cases of `CASES` and writes the results of rank 0 to FOLDER/<case>/2. With `wait` the followers
wait for a command that never comes. With `fail` a follower fails.
"""

import json
import os
import signal
import sys
import threading
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from penstock.config import Config
from penstock.contracts import ScoredGroup
from penstock.contracts.log_ratios import unpack_log_ratios
from penstock.errors import PenstockError
from penstock_trainer.distributed.rank import RankInfo
from penstock_trainer.distributed.ranks import Ranks
from penstock_trainer.learner.learner import Learner
from penstock_trainer.learner.rank_commands import Follower, Gather, LeadingLearner
from penstock_trainer.learner.update import StepResult
from penstock_trainer.weights.files import Format
from penstock_trainer.weights.staging import Staging
from tests.unit.trainer.episode_groups import branching_group
from tests.unit.trainer.model.noisy_sampler import routed_group
from tests.unit.trainer.trainer_groups import completion, config_for, example_groups, scored_group

NUM_STEPS = 3
NUM_RUN_STEPS = 12
CANARY = (4, 9, 5, 7, 11, 4)


@dataclass(frozen=True)
class Case:
    """A model (`llama` ties its embeddings, `qwen3` does not; else a family), and the settings that differ from the
    default.
    """

    model: str
    kl_ctl: float = 0.0
    dtype: str = "float32"
    gradient_checkpointing: bool = False
    loss: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)
    ref: dict[str, Any] = field(default_factory=dict)
    teacher: str = ""
    router_replay: bool = False


CASES = {
    "tied": Case("llama"),
    "untied-kl": Case("qwen3", kl_ctl=0.1),
    "moving-reference": Case("llama", kl_ctl=0.3, ref={"sync_steps": 2, "mixup_alpha": 0.5}),
    "teacher": Case("llama", teacher="qwen3", loss={"num_minibatches": 2, "selection": {"covariance": "kl"}}),
    "family": Case(
        "llama",
        kl_ctl=0.1,
        loss={
            "num_minibatches": 2,
            "proximal": "recomputed",
            "correction": {"weight": "tis", "gates": ["m2po"], "m2po_tau": 0.1},
            "kl": {"place": "reward", "estimator": "k1"},
            "entropy_bonus": 0.01,
        },
    ),
    "figures-of-a-step": Case(
        "qwen3",
        loss={
            "proximal": "recomputed",
            "correction": {"weight": "sequence_clip", "low": 0.1, "high": 5.0, "normalized": True},
            "selection": {"entropy_share": 0.7, "covariance": "clip", "covariance_share": 0.1, "covariance_low": 0.01},
            "advantage": {"baseline": "none", "scale": "none", "whitening": "tokens"},
        },
    ),
    "lora": Case("llama", kl_ctl=0.1, lora={"rank": 3, "alpha": 6}),
    "lora-head": Case("qwen3", loss={"num_minibatches": 2}, lora={"rank": 1, "target_modules": ["q_proj", "lm_head"]}),
    "bfloat16": Case("llama", kl_ctl=0.1, dtype="bfloat16", gradient_checkpointing=True),
    "experts": Case("qwen3_moe", kl_ctl=0.1),
    "experts-checkpointing": Case("qwen3_moe", dtype="bfloat16", gradient_checkpointing=True),
    "experts-replay": Case("qwen3_moe", kl_ctl=0.1, gradient_checkpointing=True, router_replay=True),
    "hybrid": Case("qwen3_next"),
    "hybrid-lora": Case("qwen3_5", kl_ctl=0.1, lora={"rank": 2}),
    "lora-bfloat16": Case("llama", kl_ctl=0.1, dtype="bfloat16", gradient_checkpointing=True, lora={"rank": 3}),
}


def case_config(folder: Path, case: Case) -> Config:
    actor = {
        "path": str(folder / case.model),
        "dtype": case.dtype,
        "gradient_checkpointing": case.gradient_checkpointing,
        "max_tokens_per_micro_batch": 24,
        "lora": case.lora,
        "router_replay": case.router_replay,
    }
    optimizer = {"lr": 1e-3, "weight_decay": 0.1, "warmup_steps": 2, "schedule": "linear"}
    rollout = {"engine": {"dtype": case.dtype}}
    teacher = {"path": str(folder / case.teacher), "kl_ctl": 0.5} if case.teacher else {}
    sections = {
        "teacher": teacher,
        "actor": actor,
        "ref": case.ref,
        "optimizer": optimizer,
        "loss": case.loss,
        "rollout": rollout,
    }
    return config_for(folder / case.model, kl_ctl=case.kl_ctl, **sections)


def batches(config: Config) -> list[list[ScoredGroup]]:
    """Ragged batches, one of episodes, one that gives work to a single rank, one without a gradient.

    With router replay the first ones have experts.
    """
    ragged = [example_groups(num_groups=5, seed=seed) for seed in range(NUM_STEPS)]
    if config.actor.router_replay:
        ragged = [list(map(routed_group, groups)) for groups in ragged]
    answers = [completion([7], [-3.0]), completion([8], [-2.0])]
    episodes = [branching_group(0), branching_group(1, (0.0, 1.0))]
    return [
        *ragged,
        episodes,
        [scored_group(0, [4, 5], answers, [1.0, 0.0])],
        [scored_group(1, [4], answers, [1.0, 1.0])],
    ]


def train(learner: Learner, folder: Path) -> None:
    """Train all batches; write the results, a canary, a checkpoint, the export in `final`, a staged version in
    `weights`.
    """
    results = [learner.update(groups, version=3) for groups in batches(learner.config)]
    (folder / "checkpoint").mkdir(parents=True)
    snapshot = learner.snapshot(folder / "checkpoint")
    writer = threading.Thread(target=snapshot.write, args=[folder / "checkpoint"])
    writer.start()
    later = learner.update(batches(learner.config)[0], version=3)  # while the writer runs
    writer.join()
    canary = learner.sequence_logprobs(CANARY)
    learner.save_pretrained(folder / "final", 1)
    staging = Staging(learner, folder / "weights", Format("float32", "nearest"))
    identity = staging.write(1, 1)
    learner.load(folder / "checkpoint")
    again = learner.update(batches(learner.config)[0], version=3)
    continued = staging.digest(1) == identity and again.loss == later.loss
    torch.save({name: weight.clone() for name, weight in learner.weights().items()}, folder / "weights.pt")
    learner.use(other_settings(learner.config), num_steps=2 * NUM_RUN_STEPS)
    other = shown(learner.update(batches(learner.config)[1], version=3))
    document = {"results": list(map(shown, results)), "continued": continued, "canary": canary, "other": other}
    document["log_ratios"] = [log_ratios(*each) for each in zip(results, batches(learner.config), strict=True)]
    (folder / "results.json").write_text(json.dumps(document))


def other_settings(config: Config) -> Config:
    """With another optimizer, objective and temperature."""
    sections = {
        "optimizer": config.optimizer.model_copy(update={"lr": 5e-3}),
        "loss": config.loss.model_copy(update={"aggregation": "token-mean"}),
        "sampling": config.sampling.model_copy(update={"temperature": 0.8}),
    }
    return config.model_copy(update=sections)


def take_over(learner: Learner, source: Path, target: Path) -> None:
    """Read one checkpoint and write it again."""
    learner.load(source)
    target.mkdir(parents=True)
    learner.snapshot(target).write(target)


def shown(result: StepResult) -> dict[str, Any]:
    names = ("changed", "loss", "grad_norm", "learning_rate", "num_packs", "num_rows")
    statistics = {key: value for key, value in asdict(result.statistics).items() if value is not None}
    statistics.pop("experts", None)  # of rows, of which ranks compute more: they share fewer prefixes
    return {**{name: getattr(result, name) for name in names}, **statistics.pop("masked"), **statistics}


def log_ratios(result: StepResult, groups: list[ScoredGroup]) -> list[list[list[float]]]:
    """By group and trajectory; nan: not computed."""
    by_trajectory = result.log_ratios.by_trajectory(groups, version=3, max_lag=None)
    return [[unpack_log_ratios(data) for data in row] for row in by_trajectory]


def run(mode: str, folder: Path) -> None:
    info = RankInfo.of(os.environ)
    if mode == "train":
        ranks = Ranks(info)
        for name, case in CASES.items():
            config = case_config(folder, case)
            if info.is_follower:
                Follower(Learner(config, ranks), ranks).run()
            else:
                learner = LeadingLearner(config, ranks, num_steps=NUM_RUN_STEPS)
                train(learner, folder / name / "2")
                take_over(learner, folder / name / "1" / "checkpoint", folder / name / "1-on-2")
                learner.close()
        ranks.leave()
        return
    ranks = Ranks(info)
    (folder / f"pid-{info.rank}").write_text(str(os.getpid()))
    config = case_config(folder, CASES["tied"])
    if info.is_follower:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # like `follow`: torchrun's signal does not end it
        Follower(Learner(config, ranks), ranks).run()
    elif mode == "fail":
        learner = LeadingLearner(config, ranks)
        learner._command(Gather("no.such.weight"))
        learner.update(batches(learner.config)[0], version=3)
    else:
        (folder / "waiting").touch()
        signal.pause()


if __name__ == "__main__":
    try:
        run(sys.argv[1], Path(sys.argv[2]))
    except PenstockError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
