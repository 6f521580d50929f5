"""A trainer's life as its trackers see it: progress files, steps, evaluations, dropped values."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from msgspec import structs
from prometheus_client import CollectorRegistry, Counter
from pydantic import SecretStr

from penstock.config import ActorSection, Config, DataSection, DatasetSection, RedisSection, RunSection, TrackingSection
from penstock.records.samples import SampleLine
from penstock_trainer.telemetry.progress import Progress
from penstock_trainer.telemetry.records import EvalResult, Histogram, StepLine
from penstock_trainer.telemetry.samples import SampleFile
from penstock_trainer.telemetry.tracking import make_tracking
from tests.patience import START_SECONDS

LINE = StepLine(
    step=0,
    version=1,
    epoch=0.1,
    tickets=(0, 1),
    started_at=100.0,
    ended_at=102.0,
    seconds={"step": 2.0, "wait": 0.5},
    generation_seconds=1.6,
    generated_tokens=32,
    reward_mean=0.0,
    staleness_max=1,
    staleness_mean=0.5,
    statistics={"loss": 0.25, "masked_non_finite": 0.0},
    rewards={"mine:f": {"mean": 0.5, "std": 0.25, "num_failed": 1}},
    failures={"mine:f: gone": 1},
    histograms={"reward": Histogram(0.0, 1.0, (3, 0, 1)), "staleness": Histogram(2.0, 2.0, (4,))},
)
SAMPLE = SampleLine(
    step=0,
    version=1,
    ticket=7,
    index=1,
    prompt="1 | 2\n<b>?",
    completion="3",
    answer="3",
    reward=0.5,
    rewards={"mine:f": 0.5, "judge": None},
    advantage=-1.5,
    num_tokens=4,
)
NAMES = {
    *("version", "epoch", "seconds/step", "seconds/wait", "generation_seconds", "generated_tokens", "reward_mean"),
    *("staleness_max", "staleness_mean", "statistics/loss", "statistics/masked_non_finite"),
    *("rewards/mine:f/mean", "rewards/mine:f/std", "rewards/mine:f/num_failed"),
}
HISTOGRAMS = {"histograms/reward", "histograms/staleness"}
EVAL = EvalResult(0, 0.5, 0.5, 4, 4, 0, 0, 0, ())
EVAL_NAMES = {f"eval/{name}" for name in ("accuracy", "reward_mean", "num_prompts", "num_scored", "num_failed")} | {
    "eval/oldest_version",
    "eval/newest_version",
}
SECRETS = ("pa55", "tok3n")


def make_config(root: Path, *to: str, **tracking: object) -> Config:
    return Config(
        run=RunSection(name="r", root=str(root)),
        actor=ActorSection(path="model"),
        data=DataSection(train=DatasetSection(path="train.jsonl")),
        redis=RedisSection(url="redis://:pa55@db:6379/0", password=SecretStr("pa55")),
        token=SecretStr("tok3n"),
        tracking=TrackingSection.model_validate({"to": to, **tracking}),
    )


def make_dropped() -> Counter:
    return Counter("dropped", "Dropped", ("tracker", "reason"), registry=CollectorRegistry())


def count(dropped: Counter, reason: str = "") -> float:
    """The number of values dropped for the reason, or for any if none is given."""
    samples = [each for metric in dropped.collect() for each in metric.samples if each.name == "dropped_total"]
    return sum(each.value for each in samples if reason in ("", each.labels["reason"]))


class Life:
    """One life of a trainer: its progress files and its trackers."""

    def __init__(self, config: Config) -> None:
        self.folder = Path(config.run.root) / config.run.name
        self.progress = Progress(self.folder)
        self.dropped = make_dropped()
        self.samples = SampleFile(self.folder)
        self.tracking = make_tracking(config, self.folder, self.progress, self.samples, self.dropped)
        self.tracking.start()

    def step(self, step: int, *, tracked: bool = True) -> None:
        line = replace(LINE, step=step, reward_mean=step / 8)
        self.samples.add(step, [structs.replace(SAMPLE, step=step, completion=text) for text in ("3", f"at {step}")])
        self.progress.add_step(line)
        if tracked:
            self.tracking.step(line)

    def evaluation(self, steps: int) -> None:
        result = replace(EVAL, steps=steps, accuracy=steps / 4)
        self.progress.add_eval(result)
        self.tracking.evaluation(result)


def wait_for(condition: Callable[[], bool], seconds: float = START_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "too late"
        time.sleep(0.01)
