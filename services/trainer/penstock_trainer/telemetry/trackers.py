"""The experiment trackers: TensorBoard, W&B and trackio, each through its own library.

Owns the calls of each library. Invariant: importing this module imports none of them, and nothing here is called on
the event loop but `require_trackers`, before training starts: each tracker lives in the thread of its feed, which
catches what it raises.
"""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import msgspec
import psutil

from penstock.config import TrackingSection
from penstock.config.shown import as_yaml
from penstock.errors import ConfigError
from penstock.records.samples import SampleLine
from penstock.runtime.process import KILL_SECONDS
from penstock_trainer.telemetry.records import Histogram

if TYPE_CHECKING:
    import wandb
    from torch.utils.tensorboard import SummaryWriter
    from trackio.run import Run as TrackioRun

STEP = "step"  # the x axis of W&B; its own counter only rises, and an evaluation may end after later steps
WANDB_SERVICE = "wandb-core"
SAMPLES = "samples"
UPLOAD_SHARE = 0.8  # of the time to close: the rest is for W&B's service to end


@dataclass(frozen=True)
class TrackedRun:
    """The run as a tracker gets it. `config` holds no secret; `first_step`: the first number of this life."""

    id: str
    name: str
    folder: Path
    config: Mapping[str, Any]
    first_step: int


@dataclass(frozen=True)
class Point:
    """What a tracker logs at one place of the x axis: a step or an evaluation.

    step: the number of steps trained by then. histograms: of the batch. samples: rows of the table of completions.
    """

    step: int
    values: Mapping[str, float]
    histograms: Mapping[str, Histogram] = field(default_factory=dict)
    samples: Sequence[SampleLine] = ()


class Tracker(Protocol):
    """One library. All methods but `abandon` are called in one thread, and may block or raise."""

    @property
    def name(self) -> str: ...
    @property
    def rewinds(self) -> bool:
        """Whether opening at `first_step` takes back what an earlier life logged from that step on."""

    def open(self, run: TrackedRun) -> None:
        """Import the library and begin the run, or go on with it."""

    def log(self, point: Point) -> None:
        """Log curves, histograms, and a table of completions if there are any."""

    def close(self) -> None:
        """Flush and end."""

    def abandon(self) -> None:
        """End everything of a hanging library that would keep the process from ending. Called in another thread."""


class TensorBoardTracker:
    """Event files in `tensorboard/` of the run's folder."""

    name = "tensorboard"
    rewinds = True

    def __init__(self) -> None:
        self._writer: SummaryWriter | None = None

    def open(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.first_step)
        text = as_yaml(run.config)
        self._writer.add_text("config", f"```yaml\n{text}```", run.first_step)

    def log(self, point: Point) -> None:
        assert self._writer is not None
        for name, value in point.values.items():
            self._writer.add_scalar(name, value, point.step)
        for name, histogram in point.histograms.items():
            self._writer.add_histogram_raw(
                name,
                min=histogram.lowest,
                max=histogram.highest,
                num=sum(histogram.counts),
                sum=histogram.moment(1),
                sum_squares=histogram.moment(2),
                bucket_limits=histogram.edges[1:].tolist(),
                bucket_counts=list(histogram.counts),
                global_step=point.step,
            )
        if point.samples:
            self._writer.add_text(SAMPLES, _as_markdown(point.samples), point.step)
        self._writer.flush()

    def close(self) -> None:
        assert self._writer is not None
        self._writer.close()

    def abandon(self) -> None:
        """Its thread ends with the process."""


class WandbTracker:
    """A run of Weights & Biases; offline, a file in `wandb/` of the run's folder."""

    name = "wandb"
    rewinds = False

    def __init__(self, section: TrackingSection) -> None:
        self._section = section
        self._run: wandb.Run | None = None

    def open(self, run: TrackedRun) -> None:
        import wandb

        settings = wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            save_code=False,
            finish_timeout=UPLOAD_SHARE * self._section.close_seconds,
            x_disable_meta=True,  # it holds the command line, and so the secrets in it
            x_save_requirements=False,
        )
        self._run = wandb.init(
            project=self._section.project,
            entity=self._section.wandb_entity or None,
            id=run.id,
            name=run.name,
            resume="allow",
            mode=self._section.wandb_mode,
            dir=str(run.folder),
            config=dict(run.config),
            allow_val_change=True,
            settings=settings,
        )
        self._run.define_metric(STEP)
        self._run.define_metric("*", step_metric=STEP)

    def log(self, point: Point) -> None:
        import wandb

        assert self._run is not None
        shown: dict[str, Any] = {
            name: wandb.Histogram(np_histogram=each.as_numpy) for name, each in point.histograms.items()
        }
        if point.samples:
            shown[SAMPLES] = wandb.Table(columns=list(COLUMNS), data=[_row(each) for each in point.samples])
        self._run.log({STEP: point.step, **point.values, **shown})

    def close(self) -> None:
        import wandb

        assert self._run is not None
        self._run.finish()
        wandb.teardown()

    def abandon(self) -> None:
        """Kill its service, for which an exit hook of the library waits without a deadline."""
        for child in psutil.Process().children():
            if child.name() == WANDB_SERVICE:
                child.kill()
                child.wait(KILL_SECONDS)


class TrackioTracker:
    """A run in trackio's database, which `trackio show` reads; TRACKIO_DIR is its folder."""

    name = "trackio"
    rewinds = False

    def __init__(self, section: TrackingSection) -> None:
        self._project = section.project
        self._run: TrackioRun | None = None

    def open(self, run: TrackedRun) -> None:
        import trackio

        # It resumes by name: the id, so that a run that replaces another of its name does not go on with its curves.
        self._run = trackio.init(
            project=self._project,
            name=run.id,
            config=dict(run.config),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, point: Point) -> None:
        import trackio

        assert self._run is not None
        shown: dict[str, Any] = {
            name: trackio.Histogram(np_histogram=each.as_numpy) for name, each in point.histograms.items()
        }
        if point.samples:
            shown[SAMPLES] = trackio.Table(columns=list(COLUMNS), data=[_row(each) for each in point.samples])
        self._run.log({**point.values, **shown}, step=point.step)

    def close(self) -> None:
        assert self._run is not None
        self._run.finish()

    def abandon(self) -> None:
        """Its thread ends with the process."""


COLUMNS = SampleLine.__struct_fields__
"""Of the table of samples, in every tracker."""


def _row(sample: SampleLine) -> list[Any]:
    """The cells of a sample: each column has values of one type, or none."""
    cells = {**msgspec.structs.asdict(sample), "rewards": _shown_rewards(sample)}
    return [cells[name] for name in COLUMNS]


def _shown_rewards(sample: SampleLine) -> str:
    return ", ".join(f"{name} {'failed' if value is None else f'{value:g}'}" for name, value in sample.rewards.items())


def _as_markdown(samples: Sequence[SampleLine]) -> str:
    """A table; texts are quoted, so that they neither end a cell nor begin another one."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    lines += ["| " + " | ".join(map(_cell, _row(each))) + " |" for each in samples]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, str):
        return html.escape(value).replace("|", "&#124;").replace("\n", "<br>")
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def make_trackers(section: TrackingSection) -> list[Tracker]:
    """The trackers of the configuration. Imports none of their libraries."""
    return [_make(name, section) for name in section.to]


def _make(name: Literal["tensorboard", "wandb", "trackio"], section: TrackingSection) -> Tracker:
    match name:
        case "tensorboard":
            return TensorBoardTracker()
        case "wandb":
            return WandbTracker(section)
        case "trackio":
            return TrackioTracker(section)


def require_trackers(section: TrackingSection) -> None:
    """ConfigError if a library is not installed, or if W&B's server is configured without a key."""
    for name in section.to:
        spec = find_spec(name)
        if spec is None or spec.origin is None:  # without an origin it is only a folder of that name, such as ./wandb
            raise ConfigError(
                f"tracking.to names {name}, and its library is not installed; expected it: run "
                f"`pip install 'penstock[{name}]'`, or take {name} out of tracking.to"
            )
    if "wandb" in section.to and section.wandb_mode == "online":
        _require_wandb_key()


def _require_wandb_key() -> None:
    import wandb

    try:
        found = wandb.login(verify=False)
    except wandb.errors.UsageError as error:
        raise ConfigError(
            f"tracking.wandb_mode is online, and W&B reports: {error}; expected WANDB_API_KEY or a stored login; "
            "set tracking.wandb_mode to offline to write into the run's folder"
        ) from None
    if not found:
        raise ConfigError("tracking.wandb_mode is online, and W&B has no login; expected one, or offline")
