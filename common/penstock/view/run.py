"""One run as the page asks about it: its indexes, kept up with the files, and an answer to each question.

Owns the indexes, and where ids of steps become numbers: a page is read and typed by people, who count from 1, so
questions and answers have numbers, and the indexes below have ids. What an answer holds of a file as it is (`line`,
`record`) keeps its ids. Invariant: one thread at a time asks; each answer is of the files as they are now.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from penstock.contracts import ScoredGroup
from penstock.contracts.vocabulary import MAIN_SET
from penstock.errors import DataError
from penstock.records import RunRecords, RunState
from penstock.records.dead_letters import DeadLetterLine
from penstock.records.early_stop import why_stopped_early
from penstock.records.figures import first_and_last, heldout_accuracy, heldout_reward, others, set_of
from penstock.records.files import DEAD_FILE, DROPPED_FILE, EVALUATIONS_FILE, STEP_FILES, read_document
from penstock.records.lines import as_written
from penstock.records.samples import DroppedLine
from penstock.records.step_numbers import id_of, number_of
from penstock.view.advantages import advantages_of, shaped_rewards
from penstock.view.curves import Curve
from penstock.view.groups import beside, prompt_of, summary
from penstock.view.last_lines import newest
from penstock.view.lines import LineIndex
from penstock.view.log_ratios import LogRatioReader, StepLogRatios, largest_of
from penstock.view.pieces import Pieces
from penstock.view.search import Wanted, search
from penstock.view.step_files import StepFileReader
from penstock.view.step_search import Place, search_steps
from penstock.view.steps import StepTable
from penstock.view.tickets import Committed, Ledger
from penstock.view.timeline import push_bars, server_bars, trainer_bars
from penstock.view.tokens import token_page

MOST_STEPS_OF_TIMELINE = 16
MOST_DRAWS = 12  # of one prompt: each is a step file to read

Answer = dict[str, Any]


class RunView:
    """The questions of a page about one run."""

    def __init__(self, key: str, records: RunRecords, tokenizer: Path | None = None) -> None:
        """`key`: its name in addresses. `tokenizer`: a model's folder, in place of the one that the run names."""
        self.key = key
        self._records = records
        self._table = StepTable(records.folder)
        self._ledger = Ledger(records.folder)
        self._files = StepFileReader(records.folder)
        self._searched = StepFileReader(records.folder, most_held=1)
        self._ratios = LogRatioReader(records.folder)
        self._evaluations = LineIndex(records.folder / EVALUATIONS_FILE)
        self._results: list[Answer] = []
        self._tokenizer = tokenizer
        self._pieces: Pieces | None = None

    @property
    def folder(self) -> str:
        return str(self._records.folder)

    def state(self) -> RunState:
        """Whether it runs, or how it ended."""
        return self._records.state()

    def overview(self) -> Answer:
        """What the run is, and how far it has come."""
        self._table.refresh()
        self._ledger.refresh()
        state = self.state()
        return {
            "key": self.key,
            "folder": self.folder,
            "state": state.name,
            "reason": state.reason,
            "stopped_early": self._why_stopped_early(),
            "num_steps": len(self._table),
            "last_step": self._last_step,
            **self._first_and_last_evaluation(),
            "columns": self._table.names,
            "trained": self._ledger.num_trained,
            "dropped": self._ledger.dropped,
            "checkpoints": [{"steps": each.steps, "name": each.name} for each in self._ledger.checkpoints],
            "dataset_length": self._ledger.run.dataset_length if self._ledger.run else None,
        }

    def _why_stopped_early(self) -> str:
        """In words; "" if it did not, or was trained on."""
        found = self._ledger.early_stop
        return why_stopped_early(msgspec.structs.asdict(found)) if found and found.steps == len(self._table) else ""

    def curves(self, names: Sequence[str], most: int, first: int, last: int | None) -> Answer:
        """Columns of the steps first to last, each with at most `most` points."""
        self._table.refresh()
        return {name: _numbered(self._table.curve(name, most, id_of(first), last)) for name in names}

    def steps(self, names: Sequence[str], before: int | None, limit: int) -> Answer:
        """Rows of the table, the newest first, from the one before step `before` on."""
        self._table.refresh()
        end = len(self._table)
        if before is not None and (row := self._table.row_of(id_of(before))) is not None:
            end = row
        rows = range(end - 1, max(-1, end - 1 - limit), -1)
        return {
            "total": len(self._table),
            "rows": [
                {"step": self._number(row), **{name: self._table.value(name, row) for name in names}} for row in rows
            ],
        }

    def step(self, step: int) -> Answer:
        """A step: its line, what the ledger has of it, and its groups; `missing` says why there are none."""
        self._table.refresh()
        row = self._table.row_of(id_of(step))
        record = self._record(step)
        answer: Answer = {
            "step": step,
            "line": self._table.line(row) if row is not None else {},
            "record": record,
            "unchanged": id_of(step) in self._ledger.unchanged,
            "last_step": self._last_step,
            "groups": [],
            "missing": "",
        }
        try:
            groups = self._groups(record, step)
        except DataError as error:
            return {**answer, "missing": str(error)}
        version = record.version if record else None
        ratios = self._ratios_of(record, groups)
        return {
            **answer,
            "log_ratios_missing": ratios.missing,
            "groups": [
                {**summary(index, each, version), "largest_log_ratio": largest_of(ratios.largest(index))}
                for index, each in enumerate(groups)
            ],
        }

    def group(self, step: int, index: int, base: int | None) -> Answer:
        """A group with its completions next to each other."""
        record = self._record(step)
        groups, group = self._group(record, step, index)
        settings = self._settings(record)
        rows = advantages_of(groups, settings)
        ratios = self._ratios_of(record, groups)
        return {
            "largest_log_ratios": ratios.largest(index),
            "summary": summary(index, group, record.version if record else None),
            "num_groups": len(groups),
            "prompt": prompt_of(group),
            "has_advantages": rows is not None,
            **beside(
                group,
                shaped_rewards(group, settings),
                None if rows is None else rows[index],
                base,
                self._decoder,
            ),
        }

    def tokens(self, step: int, index: int, completion: int, offset: int, limit: int) -> Answer:
        """The tokens of a completion or an episode, by columns."""
        record = self._record(step)
        groups, group = self._group(record, step, index)
        if not 0 <= completion < len(group.scores):
            raise DataError(f"group {index} of step {step} has {len(group.scores)} completions; saw {completion}")
        rows = advantages_of(groups, self._settings(record))
        ratios = self._ratios_of(record, groups)
        page = token_page(
            group,
            completion,
            self._decoder,
            offset=offset,
            limit=limit,
            version=record.version if record else None,
            max_lag=record.max_lag if record else None,
            log_ratios=ratios.of(index, completion),
        )
        return {
            **page,
            "log_ratios_missing": ratios.missing,
            "version": record.version if record else None,
            "advantage": None if rows is None else rows[index][completion],
            "recorded": {number: self._ledger.policies.get(int(number), "") for number in page["asserted"]},
        }

    def evaluations(self) -> list[Answer]:
        """The figures of each evaluation, without its rows, in the order in which they ended.

        Those of an earlier release have `accuracy` by the present definition: of the prompts that have a reward.
        """
        return self._refreshed_evaluations()

    def evaluation(self, number: int) -> Answer:
        """All of one evaluation, by its place. failed: rows without a reward, of an earlier release some of them."""
        if not 0 <= number < len(self._refreshed_evaluations()):
            raise DataError(f"saw evaluation {number}; expected one of {len(self._results)}")
        line = as_written(self._evaluations.read(number))
        lacking = [each for each in line.get("samples", []) if each["reward"] is None]
        return {"failed": lacking, **line, **self._results[number]}

    def samples(self, wanted: Wanted, end: int | None, limit: int) -> Answer:
        """Completions that were kept for people and fit."""
        found = search(self._records.folder, _by_ids(wanted), end, limit)
        return {**found, "lines": [msgspec.structs.replace(line, step=number_of(line.step)) for line in found["lines"]]}

    def search_steps(self, wanted: Wanted, start: tuple[int, int] | None, limit: int) -> Answer:
        """All completions that fit, of the step files that are there. start: number of a step, and a group of it."""
        self._ledger.refresh()
        found = search_steps(
            sorted(self._ledger.steps, reverse=True),
            lambda step: self._searched.groups(self._ledger.steps[step]),
            _by_ids(wanted),
            self._decoder,
            None if start is None else Place(id_of(start[0]), start[1]),
            limit,
        )
        at = found["next"]
        return {
            **found,
            "lines": [msgspec.structs.replace(line, step=number_of(line.step)) for line in found["lines"]],
            "next": None if at is None else {"step": number_of(at.step), "group": at.group},
            "no_text": self._decoder.reason,
        }

    def tickets(self, reason: str, offset: int, limit: int) -> Answer:
        """Tickets that ended without being trained; of the reason poison, the dead letters."""
        self._ledger.refresh()
        total, drops = self._ledger.drops(reason, offset, limit)
        return {
            "trained": self._ledger.num_trained,
            "dropped": self._ledger.dropped,
            "total": total,
            "drops": drops,
        }

    def ticket(self, number: int) -> Answer:
        """How a ticket ended, and what became of the other draws of its prompt, the newest first."""
        self._ledger.refresh()
        draws = [self._draw(each) for each in self._ledger.draws_of_same_prompt(number, MOST_DRAWS)]
        return {**self._end_of(number), "draws": draws}

    def dropped(self, reason: str, ticket: int | None, limit: int) -> list[DroppedLine]:
        """Completions without a reward that the run kept of dropped groups, the newest first.

        reason: why their group was dropped, "": any. ticket: None: of any.
        """

        def fits(line: DroppedLine) -> bool:
            return reason in ("", line.dropped) and ticket in (None, line.ticket)

        lines = newest(self._records.folder / DROPPED_FILE, DroppedLine, fits, limit)
        return [msgspec.structs.replace(line, step=number_of(line.step)) for line in lines]

    def dead_letters(self, ticket: str | None, limit: int) -> list[DeadLetterLine]:
        """Messages that no service could use, the newest first. ticket: as the message says; None: of any."""
        path = self._records.folder / DEAD_FILE
        return newest(path, DeadLetterLine, lambda line: ticket in (None, line.ticket), limit)

    def timeline(self, first: int, last: int) -> Answer:
        """Bars of the trainer and the servers, and pushes, over the steps first to last."""
        self._table.refresh()
        answer: Answer = {"trainer": [], "servers": [], "pushes": [], "missing": ""}
        for step in range(first, min(last + 1, first + MOST_STEPS_OF_TIMELINE)):
            row = self._table.row_of(id_of(step))
            if row is None:
                continue
            line = self._table.line(row)
            answer["trainer"] += trainer_bars(step, line)
            answer["pushes"] += push_bars(step, line)
            try:
                answer["servers"] += server_bars(step, self._groups(self._record(step), step))
            except DataError as error:
                answer["missing"] = "" if self._is_just_trained(step) else str(error)
        return answer

    def _draw(self, ticket: int) -> Answer:
        ended = self._end_of(ticket)
        length = self._ledger.run.dataset_length if self._ledger.run else 0
        answer = {**ended, "epoch": ticket // length if length else None, "summary": None, "missing": ""}
        if ended["end"] != "trained":
            return answer
        record = self._ledger.steps.get(id_of(ended["step"]))
        try:
            groups = self._groups(record, ended["step"])
        except DataError as error:
            return {**answer, "missing": str(error)}
        found = (place for place, each in enumerate(groups) if each.group.ticket.number == ticket)
        place = next(found, None)
        if place is None or record is None:
            return answer
        return {**answer, "summary": summary(place, groups[place], record.version)}

    def _end_of(self, ticket: int) -> Answer:
        ended = self._ledger.end_of(ticket)
        return {**ended, "step": number_of(ended["step"])} if "step" in ended else ended

    @property
    def _last_step(self) -> int | None:
        return self._number(-1)

    def _number(self, row: int) -> int | None:
        step = self._table.value("step", row)
        return None if step is None else number_of(int(step))

    @property
    def _decoder(self) -> Pieces:
        if self._pieces is None:
            self._pieces = Pieces(self._records.config(), self._tokenizer)
        return self._pieces

    def _record(self, step: int) -> Committed | None:
        self._ledger.refresh()
        return self._ledger.steps.get(id_of(step))

    def _groups(self, record: Committed | None, step: int) -> tuple[ScoredGroup, ...]:
        if record is None and self._is_just_trained(step):
            raise DataError(f"step {step} has just been trained: its groups are shown once its weights are recorded")
        if record is None:
            raise DataError(f"step {step} is not in the ledger of this run; expected one of {len(self._ledger.steps)}")
        return self._files.groups(record)

    def _is_just_trained(self, step: int) -> bool:
        """Whether it has a line and the journal has not come to it: that waits for its weights."""
        return self._table.row_of(id_of(step)) is not None and id_of(step) > max(self._ledger.steps, default=-1)

    def _group(self, record: Committed | None, step: int, index: int) -> tuple[tuple[ScoredGroup, ...], ScoredGroup]:
        groups = self._groups(record, step)
        if not 0 <= index < len(groups):
            raise DataError(f"step {step} has {len(groups)} groups; saw {index}")
        return groups, groups[index]

    def _ratios_of(self, record: Committed | None, groups: Sequence[ScoredGroup]) -> StepLogRatios:
        return StepLogRatios((), "the step is not in the ledger") if record is None else self._ratios.of(record, groups)

    def _settings(self, record: Committed | None) -> Mapping[str, Any]:
        """Those with which the step was trained; an older ledger names none: those of the configuration."""
        settings: Mapping[str, Any] = {}
        if record is not None and record.settings.isalnum():
            settings = read_document(self._records.folder / STEP_FILES / f"settings-{record.settings}.json")
        return settings or dict(_flat(self._records.config()))

    def _first_and_last_evaluation(self) -> Answer:
        """As `penstock runs` and the ending of a launch choose them: of the main set, and of each other one by name."""
        every = sorted(self._refreshed_evaluations(), key=lambda line: int(line["steps"]))
        sets = {name: [line for line in every if line["set"] == name] for name in (MAIN_SET, *others(every))}
        ends = {name: first_and_last(lines) for name, lines in sets.items()}
        start, end = ends.pop(MAIN_SET)
        return {
            "num_evaluations": len(every),
            "first_evaluation": start,
            "last_evaluation": end,
            "sets": {name: {"first": first, "last": last} for name, (first, last) in ends.items()},
        }

    def _refreshed_evaluations(self) -> list[Answer]:
        replaced, lines = self._evaluations.new_lines()
        if replaced or not len(self._evaluations):
            self._results = []
        for line in lines:
            try:
                self._results.append(_evaluation(as_written(line)))
            except (ValueError, KeyError, TypeError, msgspec.MsgspecError) as error:
                self._evaluations.forget()
                raise DataError(f"{EVALUATIONS_FILE} of {self.folder} ({error}): expected JSON lines") from None
        return self._results


def _evaluation(line: Answer) -> Answer:
    """The figures of an evaluation; None for those that are of no prompt, since each reward failed."""
    figures = {name: value for name, value in line.items() if name not in ("samples", "failed")}
    scored = int(line["num_prompts"]) - int(line["num_failed"])
    means = {"accuracy": heldout_accuracy(line), "reward_mean": heldout_reward(line)}
    return {**figures, **means, "num_scored": scored, "set": set_of(line)}


def _by_ids(wanted: Wanted) -> Wanted:
    """With ids of steps for their numbers."""
    bounds = {"step_min": wanted.step_min, "step_max": wanted.step_max}
    return wanted.model_copy(update={name: None if each is None else id_of(each) for name, each in bounds.items()})


def _numbered(curve: Curve) -> Curve:
    """Over the numbers of steps; a point that stands for several lies between them."""
    return replace(curve, x=[each + number_of(0) for each in curve.x])


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
