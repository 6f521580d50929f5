"""`penstock samples`: completions of a run as a person reads them.

Owns which are shown, and how. Invariant: files of a run are only read, a line at a time, whether it runs or has ended;
no text of a model or a dataset does anything to the terminal; without `--limit` a terminal gets at most one screen.
"""

import argparse
import heapq
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import msgspec
from rich.console import Console
from rich.text import Text

from penstock.contracts.vocabulary import MAIN_SET
from penstock.errors import ConfigError, DataError
from penstock.readable import harmless
from penstock.records import DEFAULT_ROOT, RunRecords, find_run, newest_run
from penstock.records.figures import set_of
from penstock.records.files import COMPLETIONS_FILE, DROPPED_FILE, EVALUATIONS_FILE
from penstock.records.samples import DroppedLine, SampleLine
from penstock.records.step_numbers import number_of, parse_steps
from penstock_launch.help_text import examples
from penstock_launch.watch.figures import DROPPED

PIPED = 20  # samples that a pipe or a file gets without --limit
MARGIN_LINES = 3  # of a screen: the last line of a page, and the shell's prompt
TEXT_LINES = 6  # of a prompt or a completion on a screen; the rest is left out in the middle
OF_A_GROUP = ("prompt", "answer")
LABEL_STYLE, HEAD_STYLE = "dim", "bold"


def add_samples_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the parser of the command."""
    samples = commands.add_parser(
        "samples",
        help="show completions of a run: of training, or of its evaluations",
        description="Show completions of a run that runs, has ended or was copied, the newest step first: at most one "
        "screen, or with --limit as many as asked for. Without RUN: of the run that has written last. Without steps, "
        "--worst, --best, --failed and --search: of the last step. Exit code 1: there is none.",
        epilog=examples(
            "penstock samples",
            "penstock samples my-run --worst --limit 5",
            "penstock samples my-run --steps 11:20 --search 42",
            "penstock samples my-run --evaluation",
            settings=False,
        ),
        usage="penstock samples [RUN] [--step N | --steps A:B] [--worst | --best | --failed] [--search TEXT]\n"
        "                        [--evaluation] [--set NAME] [--limit N] [--root FOLDER]",
        allow_abbrev=False,
    )
    samples.add_argument("run", nargs="?", default="", metavar="RUN", help="a name in the folder of runs, or a folder")
    steps = samples.add_mutually_exclusive_group()
    steps.add_argument("--step", type=_not_negative, metavar="N", help="only of this step; the first one is step 1")
    steps.add_argument("--steps", default="", metavar="A:B", help="only of steps A to B; A or B may be left out")
    order = samples.add_mutually_exclusive_group()
    order.add_argument("--worst", action="store_true", help="those with the lowest rewards first")
    order.add_argument("--best", action="store_true", help="those with the highest rewards first")
    order.add_argument("--failed", action="store_true", help="only those without a reward, with the reason")
    samples.add_argument("--search", default="", metavar="TEXT", help="only those that hold this text, in any case")
    samples.add_argument(
        "--evaluation",
        action="store_true",
        help="held-out prompts: the completion of the last evaluation, or of that after --step steps, and of the first",
    )
    samples.add_argument(
        "--set",
        default=MAIN_SET,
        metavar="NAME",
        help="with --evaluation: of this set of eval.sets; default: data.eval",
    )
    samples.add_argument("--limit", type=_at_least_one, metavar="N", help="so many, with all of their text")
    samples.add_argument(
        "--root", default=DEFAULT_ROOT, metavar="FOLDER", help=f"folder of runs, run.root; default: {DEFAULT_ROOT}"
    )


def _not_negative(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"saw {text!r}; expected the number of a step")
    return int(text)


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"saw {text!r}; expected a number >= 1")
    return int(text)


@dataclass(frozen=True)
class Shown:
    """A completion, or one of an evaluation with the one before it: a title, and labelled texts.

    group: has the same prompt and answer.
    """

    step: int
    group: int
    reward: float | None
    head: str
    rows: tuple[tuple[str, str], ...]

    def holds(self, text: str) -> bool:
        return any(text in value.casefold() for _, value in self.rows)


def show_samples(arguments: argparse.Namespace, console: Console) -> tuple[str, int]:
    """What the arguments of the command ask for, as text, and the exit code: 1 if there is none."""
    if arguments.set != MAIN_SET and not arguments.evaluation:
        raise ConfigError(f"saw --set {arguments.set} without --evaluation: expected both, or neither")
    records = find_run(arguments.run, arguments.root) if arguments.run else newest_run(arguments.root)
    found = _of_evaluation(records, arguments) if arguments.evaluation else _of_training(records, arguments)
    if arguments.failed or arguments.worst or arguments.best:
        found = (each for each in found if (each.reward is None) == arguments.failed)
    if arguments.search:
        found = (each for each in found if each.holds(arguments.search.casefold()))
    on_screen = console.is_terminal and arguments.limit is None
    most = arguments.limit or (console.height if on_screen else PIPED)
    counted = _Counted(found)
    chosen = _ordered(counted, most, arguments)
    with console.capture() as shown:
        num_shown = _print(chosen, console, console.height - MARGIN_LINES if on_screen else None)
        note = f"{num_shown} of {counted.number} samples of {records.folder}"
        if not counted.number:
            note = _why_none(records, arguments)
        elif num_shown < counted.number:
            note += f"; --limit {counted.number} shows all"
        note += _unrecorded(records, arguments) or _selected(records, arguments)
        console.print(Text(note, LABEL_STYLE), soft_wrap=True)
    return shown.get(), 0 if counted.number else 1


class _Counted:
    """Passes samples on, and counts them."""

    def __init__(self, samples: Iterable[Shown]) -> None:
        self._samples = samples
        self.number = 0

    def __iter__(self) -> Iterator[Shown]:
        for each in self._samples:
            self.number += 1
            yield each


def _ordered(samples: Iterable[Shown], most: int, arguments: argparse.Namespace) -> list[Shown]:
    """At most `most`: by reward if that is asked for, else the newest step first."""
    numbered = enumerate(samples)
    if arguments.worst or arguments.best:
        sign = 1 if arguments.worst else -1
        chosen = heapq.nsmallest(most, numbered, key=lambda pair: (sign * (pair[1].reward or 0.0), -pair[0]))
    else:
        chosen = heapq.nsmallest(most, numbered, key=lambda pair: (-pair[1].step, pair[0]))
    return [each for _, each in chosen]


def _of_training(records: RunRecords, arguments: argparse.Namespace) -> Iterator[Shown]:
    """Those of the steps that are asked for; of the last step, if nothing else is."""
    steps = steps_of(arguments)
    if steps is None and not (arguments.worst or arguments.best or arguments.failed or arguments.search):
        last = max((line.step for line in _lines(records)), default=-1)
        steps = range(last, last + 1)
        return (_shown(line) for line in _lines(records) if line.step in steps)
    lines = chain(_lines(records), _dropped(records))
    return (_shown(line) for line in lines if steps is None or line.step in steps)


def steps_of(arguments: argparse.Namespace) -> range | None:
    """The ids of the steps of --step or --steps; None without both. ConfigError for what is no range."""
    asked = arguments.steps if arguments.step is None else str(arguments.step)
    if not asked:
        return None
    first, end = parse_steps(asked)
    return range(first or 0, sys.maxsize if end is None else end)


def _evaluations_of(arguments: argparse.Namespace) -> range | None:
    """The numbers of steps after which an evaluation is asked for; None: any. 0 is before the first step."""
    if arguments.step is not None:
        return range(arguments.step, arguments.step + 1)
    steps = steps_of(arguments)
    return steps and range(steps.start + bool(steps.start), min(steps.stop, sys.maxsize - 1) + 1)


def _lines(records: RunRecords) -> Iterator[SampleLine]:
    try:
        for line in records.completions():
            yield msgspec.convert(line, SampleLine)
    except (msgspec.MsgspecError, ValueError) as error:
        raise _unreadable(records, COMPLETIONS_FILE, error) from None


def _dropped(records: RunRecords) -> Iterator[DroppedLine]:
    try:
        for line in records.dropped():
            yield msgspec.convert(line, DroppedLine)
    except (msgspec.MsgspecError, ValueError) as error:
        raise _unreadable(records, DROPPED_FILE, error) from None


def _shown(line: SampleLine) -> Shown:
    parts = [f"step {number_of(line.step)}", f"ticket {line.ticket}.{line.index}", f"reward {_number(line.reward)}"]
    if len(line.rewards) > 1:
        parts.append("(" + ", ".join(f"{name} {_number(value)}" for name, value in line.rewards.items()) + ")")
    if line.advantage is not None:
        parts.append(f"advantage {line.advantage:+.3g}")
    parts.append(f"{line.num_tokens} tokens" + (", cut off by its limit" if line.truncated else ""))
    if line.version is not None:
        parts.append(f"version {line.version}")
    if isinstance(line, DroppedLine):
        parts.append(f"its group was dropped: {DROPPED.get(line.dropped, line.dropped)}")
    rows = [("prompt", line.prompt), ("completion", line.completion)]
    rows += [(name, text) for name, text in (("answer", line.answer), ("failed", line.failure)) if text]
    return Shown(line.step, line.ticket, line.reward, "  ".join(parts), tuple(rows))


def _of_evaluation(records: RunRecords, arguments: argparse.Namespace) -> Iterator[Shown]:
    """The recorded samples of the last evaluation, or of the one after --step steps, each with that of the first."""
    try:
        rounds = sorted(_rounds(records, arguments), key=lambda line: line["steps"])
        asked = _evaluations_of(arguments)
        wanted = [line for line in rounds if asked is None or line["steps"] in asked]
        if not wanted:
            return
        last, before = wanted[-1], {sample["prompt"]: sample for sample in rounds[0]["samples"]}
        for number, sample in enumerate(_rows(last)):
            earlier = before.get(sample["prompt"]) if last is not rounds[0] else None
            yield _compared(number, sample, last["steps"], earlier, rounds[0]["steps"])
    except (msgspec.MsgspecError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(records, EVALUATIONS_FILE, error) from None


def _rounds(records: RunRecords, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The evaluations of the set that is asked for."""
    return (line for line in records.evaluations() if set_of(line) == arguments.set)


def _rows(evaluation: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What is recorded of an evaluation: its samples, and all rows without a reward, each once."""
    scored = [sample for sample in evaluation["samples"] if sample["reward"] is not None]
    failed = [sample for sample in evaluation["samples"] if sample["reward"] is None]
    return [*scored, *(evaluation.get("failed") or failed)]  # an older release recorded no other


def _unrecorded(records: RunRecords, arguments: argparse.Namespace) -> str:
    """How many rows without a reward the file does not have, if they are asked for."""
    if not (arguments.evaluation and arguments.failed):
        return ""
    asked = _evaluations_of(arguments)
    wanted = [line for line in _rounds(records, arguments) if asked is None or line["steps"] in asked]
    last = max(wanted, key=lambda line: int(line["steps"]), default={})
    missing = last.get("num_failed", 0) - sum(row["reward"] is None for row in _rows(last)) if last else 0
    return f"; {missing} more failed, and were not recorded" if missing > 0 else ""


def _selected(records: RunRecords, arguments: argparse.Namespace) -> str:
    """How many completions of training failed, of which samples are a selection, if all of them are asked for."""
    if arguments.evaluation or not arguments.failed or arguments.search or steps_of(arguments) is not None:
        return ""
    kept = sum(line.reward is None for line in chain(_lines(records), _dropped(records)))
    try:
        failed = int(records.figures()["completions"]["failed"])
    except DataError:  # samples can be read without the other files
        return ""
    if failed <= kept:
        return ""
    return f"; {failed:,} completions failed in the run, and {kept:,} of them were kept (tracking.samples_per_step)"


def _compared(
    number: int, sample: Mapping[str, Any], steps: int, earlier: Mapping[str, Any] | None, first_steps: int
) -> Shown:
    then = [] if earlier is None else [(first_steps, earlier)]
    rewards = [_number(each["reward"]) for _, each in (*then, (steps, sample))]
    answers = [(f"after {at} steps", each["completion"]) for at, each in (*then, (steps, sample))]
    rows = [("prompt", sample["prompt"]), ("answer", sample["answer"]), *answers]
    rows += [("failed", sample["failure"])] if sample.get("failure") else []
    head = f"evaluation after {steps} steps  reward {' -> '.join(rewards)}"
    return Shown(steps, number, sample["reward"], head, tuple(rows))


def _print(samples: Iterable[Shown], console: Console, most_lines: int | None) -> int:
    """Print the samples that fit into so many lines, at least one; their number. A group has its prompt once."""
    printed = used = 0
    before: Shown | None = None
    for each in samples:
        is_same_group = before is not None and (before.step, before.group) == (each.step, each.group)
        rows = [row for row in each.rows if not (is_same_group and row[0] in OF_A_GROUP)]
        lines = _rendered(each.head, rows, console, most_lines)
        if most_lines is not None and printed and used + len(lines) > most_lines:
            break
        for line in lines:
            console.print(line, soft_wrap=True)
        before, printed, used = each, printed + 1, used + len(lines)
    return printed


def _rendered(head: str, rows: Sequence[tuple[str, str]], console: Console, most_lines: int | None) -> list[Text]:
    """The lines of a sample, wrapped to the width of a terminal; a pipe or a file gets them whole."""
    label_width = max(len(label) for label, _ in rows) + 4
    terminal = console.width if console.is_terminal else sys.maxsize
    width = max(20, terminal - label_width)
    lines = list(Text(harmless(head), HEAD_STYLE).wrap(console, terminal))
    for label, text in rows:
        body = text.rstrip()
        wrapped = [part for line in body.split("\n") for part in _wrapped(line, console, width)]
        if most_lines is not None:
            wrapped = _within(wrapped, min(TEXT_LINES, max(2, most_lines // 3)))
        if body != text:  # it may be why an exact match failed
            wrapped[-1] += Text(f" (+ {text[len(body) :]!r})", LABEL_STYLE)
        for number, part in enumerate(wrapped):
            lines.append(Text.assemble((f"  {label if not number else '':<{label_width - 2}}", LABEL_STYLE), part))
    return [*lines, Text()]


def _wrapped(line: str, console: Console, width: int) -> list[Text]:
    return list(Text(harmless(line.expandtabs(4))).wrap(console, width, overflow="fold")) or [Text()]


def _within(lines: list[Text], most: int) -> list[Text]:
    """Beginning and end of more lines than that."""
    if len(lines) <= most:
        return lines
    head = most // 2
    left_out = len(lines) - most + 1
    return [*lines[:head], Text(f"... {left_out} lines ...", LABEL_STYLE), *lines[len(lines) - (most - head - 1) :]]


def _number(value: float | None) -> str:
    return "failed" if value is None else f"{value:g}"


def _why_none(records: RunRecords, arguments: argparse.Namespace) -> str:
    name = EVALUATIONS_FILE if arguments.evaluation else COMPLETIONS_FILE
    path = records.folder / name
    if not path.exists():
        return f"{records.folder} has no {name}: no step has ended yet, or tracking.samples_per_step is 0"
    steps = [line["steps"] for line in _rounds(records, arguments)] if arguments.evaluation else _steps(records)
    if not steps and (sets := sorted({set_of(line) for line in records.evaluations()} if arguments.evaluation else ())):
        return f"{path} has no evaluation of a set {arguments.set!r}: expected --set {' or '.join(sets)}"
    if not steps:
        return f"{path} is empty"
    of = "evaluations after" if arguments.evaluation else "steps"
    return f"no sample matches: {path} has {of} {min(steps)} to {max(steps)}{' steps' * arguments.evaluation}"


def _steps(records: RunRecords) -> list[int]:
    numbers = (number_of(line.step) for line in _lines(records))
    first = next(numbers, None)
    return [] if first is None else [first, max(numbers, default=first)]


def _unreadable(records: RunRecords, name: str, error: Exception) -> DataError:
    reason = " ".join(str(error).split())
    return DataError(f"{records.folder / name} cannot be read ({reason}): expected lines as the trainer writes them")
