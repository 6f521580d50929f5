"""`penstock compare`: how runs differ, in their configurations and in what came of them.

A key that was changed when a run was resumed has all its values, each with the first step that was trained with it, as
the trainer's log names it. Figures are of all lives of a run (`penstock.records.figures`); rewards are also shown after
the same numbers of steps, which is the only fair comparison of runs of which one is longer.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from penstock.config.changes import Settings, differences
from penstock.config.keys import flat
from penstock.contracts.ledger import StepRecord, WeightsRecord
from penstock.errors import ConfigError
from penstock.readable import cut
from penstock.records import RunRecords, find_run, list_runs
from penstock.records.draws import compared_draws, drawn
from penstock.records.figures import REWARD_WINDOW_STEPS, of_set
from penstock.records.files import STEP_FILES, read_document
from penstock.records.step_numbers import number_of
from penstock_launch.commands.columns import columns
from penstock_launch.watch.figures import UNKNOWN, duration, heldout_figure, number
from penstock_launch.watch.report import share

OF_THE_RUN = ("run.name", "run.root", "run.existing")  # they always differ, and change nothing
MOST_STEP_COUNTS = 8
VALUE_CHARACTERS = 48
ABSENT = "(not there)"


def compare_runs(names: Sequence[str], root: str) -> list[str]:
    """The lines that `penstock compare` prints."""
    if len(names) < 2:
        there = ", ".join(run.name for run in list_runs(root)) or "none"
        raise ConfigError(f"compare: saw {len(names)} run; expected at least two (in {root}: {there})")
    runs = [find_run(name, root) for name in names]
    shown = _distinct_names(runs)
    figures = [run.figures() for run in runs]
    found = ["configuration (keys that differ)", *_indented([["", *shown], *_differences(runs)])]
    found += ["", "figures", *_indented([["", *shown], *_figures(runs, figures)])]
    if len({each["heldout_digest"] for each in figures}) > 1:
        found.append("  held-out prompts differ: their figures cannot be compared")
    for name in _sets(figures):
        if len({each["heldout_sets"][name]["digest"] for each in figures if name in each["heldout_sets"]}) > 1:
            found.append(f"  prompts of the held-out set {name} differ: its figures cannot be compared")
    if draws := list(_draws(runs, shown)):
        found += ["", f"draws, compared with {shown[0]}", *(f"  {line}" for line in columns(draws))]
    if rewards := _rewards_after_steps(runs, [each["steps"] for each in figures]):
        title = f"training reward, mean of the {REWARD_WINDOW_STEPS} steps up to each step"
        found += ["", title, *_indented([["step", *shown], *rewards])]
    return found


def _draws(runs: Sequence[RunRecords], shown: Sequence[str]) -> Iterator[list[str]]:
    first, *others = (drawn(run.ledger()) for run in runs)
    for name, other in zip(shown[1:], others, strict=True):
        if first is not None and other is not None:
            yield [name, compared_draws(first, other)]


def _indented(rows: Sequence[Sequence[str]]) -> list[str]:
    if len(rows) == 1:
        return ["  none"]
    return [f"  {line}" for line in columns(rows)]


def _distinct_names(runs: Sequence[RunRecords]) -> list[str]:
    """Names, or folders if two runs have one name."""
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.folder) for run in runs]


def _differences(runs: Sequence[RunRecords]) -> Iterator[list[str]]:
    configs = [dict(flat(run.config())) for run in runs]
    changes = [_changes(run) for run in runs]
    keys = dict.fromkeys(key for config in configs for key in config if key not in OF_THE_RUN)
    for key in keys:
        values = [_value(config, key) for config in configs]
        if len(set(values)) > 1 or any(key in changed for changed in changes):
            shown = [cut(value, VALUE_CHARACTERS) for value in values]
            yield [key, *(changed.get(key, value) for changed, value in zip(changes, shown, strict=True))]


def _changes(run: RunRecords) -> dict[str, str]:
    """By key: its values over the lives of a run, of those that were changed after the first step."""
    found: dict[str, str] = {}
    before: Settings = {}
    for step, settings in _settings(run):
        for key, old, new in differences(before, settings):
            first = found.get(key) or cut(_shown(old), VALUE_CHARACTERS)
            found[key] = f"{first} -> {cut(_shown(new), VALUE_CHARACTERS)} from step {step} on"
        before = settings
    return found


def _settings(run: RunRecords) -> Iterator[tuple[int, Settings]]:
    """Each configuration that steps were trained with, after the number of the first; none that cannot be read."""
    digest = ""
    for record in run.ledger():
        if not isinstance(record, StepRecord | WeightsRecord) or record.settings in ("", digest):
            continue  # weights have settings of their own if a later life trained the step that they follow
        digest = record.settings
        if settings := read_document(run.folder / STEP_FILES / f"settings-{digest}.json"):
            yield number_of(record.step) if isinstance(record, StepRecord) else record.steps, settings


def _value(config: Mapping[str, Any], key: str) -> str:
    if key not in config:
        return ABSENT
    return _shown(config[key])


def _shown(value: object) -> str:
    return value if isinstance(value, str) and value else json.dumps(value)


def _figures(runs: Sequence[RunRecords], figures: Sequence[Mapping[str, Any]]) -> Iterator[list[str]]:
    yield ["state", *(run.state().name for run in runs)]
    names = _sets(figures)
    rows = [_shown_figures(each, names) for each in figures]
    for name in rows[0]:
        values = [row[name] for row in rows]
        if any(value != UNKNOWN for value in values):
            yield [name, *values]


def _sets(figures: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of the held-out sets of any run, beside the main ones."""
    return list(dict.fromkeys(name for each in figures for name in each["heldout_sets"]))


def _shown_sets(figures: Mapping[str, Any], names: Sequence[str]) -> dict[str, str]:
    shown = {}
    for name in names:
        found = of_set(figures, name) if name in figures["heldout_sets"] else {}
        for when, word in (("start", "before"), ("end", "after")):
            shown[f"accuracy {name}, {word}"] = heldout_figure(found, "accuracy", when)
    return shown


def _shown_figures(figures: Mapping[str, Any], sets: Sequence[str]) -> dict[str, str]:
    completions, groups = figures["completions"], figures["groups"]
    staleness = figures["staleness_max"]
    return {
        "steps": str(figures["steps"]),
        "training reward, first": number(figures["reward_mean_first"]),
        "training reward, last": number(figures["reward_mean_last"]),
        "accuracy, before": heldout_figure(figures, "accuracy", "start"),
        "accuracy, after": heldout_figure(figures, "accuracy", "end"),
        "held-out reward, before": heldout_figure(figures, "reward", "start"),
        "held-out reward, after": heldout_figure(figures, "reward", "end"),
        **_shown_sets(figures, sets),
        "training time": duration(figures["seconds_training"]),
        "seconds per step": number(figures["seconds_per_step"].get("step")),
        "tokens/s": number(figures["tokens_per_second"], 0),
        "tokens/s while generating": number(figures["generation_tokens_per_second"], 0),
        "gap to ideal": number(figures["gap_to_ideal"]),
        "completions without a reward": share(completions["failed"], completions["num"]),
        "groups without a signal": share(groups["no_signal"], groups["num"]),
        "completions cut off": UNKNOWN
        if completions["truncated"] is None
        else share(completions["truncated"], completions["of_steps"]),
        "staleness, at most": UNKNOWN if staleness is None else str(staleness),
        "tickets dropped": str(sum(figures["tickets"]["dropped"].values())),
    }


def _rewards_after_steps(runs: Sequence[RunRecords], num_steps: Sequence[int]) -> list[list[str]]:
    """The moving average of the training reward at numbers of steps that all runs have."""
    common = min(num_steps)
    counts = sorted({max(1, round(common * n / MOST_STEP_COUNTS)) for n in range(1, MOST_STEP_COUNTS + 1)})
    if not common:
        return []
    found = [[line["reward_mean"] for line in islice(run.steps(), common)] for run in runs]
    return [[str(count), *(number(_average(rewards[:count])) for rewards in found)] for count in counts]


def _average(rewards: Sequence[float]) -> float:
    last = rewards[-REWARD_WINDOW_STEPS:]
    return sum(last) / len(last)
