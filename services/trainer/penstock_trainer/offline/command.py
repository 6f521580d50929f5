"""The commands `penstock replay` and `penstock bundle`.

Owns their output, the exit code (0: every digest is the recorded one, 1: one is not, or none could be compared), and
the check that the configuration is that of the run.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

import yaml

from penstock.config import Config
from penstock.config.changes import Settings, differences, step_settings
from penstock.config.keys import flat
from penstock.contracts.ledger import LedgerState
from penstock.errors import DataError
from penstock.records.step_numbers import number_of, shown_steps, spans
from penstock_trainer.offline.bundle import opened_bundle, write_bundle
from penstock_trainer.offline.draws import check_draws
from penstock_trainer.offline.recording import Plan, Recording, open_run
from penstock_trainer.offline.replay import Compared, DigestVerdict, Replay, why_not_exact


def replay_run(config: Config, given: Collection[str], steps: str, ask_ledger: Callable[[], LedgerState]) -> int:
    """Replay steps of a run from its folder, with their own settings but for the keys in `given`; the exit code."""
    return _replay(open_run(config, ask_ledger, given), steps)


def replay_bundle(path: Path, settings: Sequence[str], steps: str) -> int:
    """Replay a bundle; `settings` (--key value) override its configuration. The exit code."""
    with opened_bundle(path, settings) as bundle:
        for note in bundle.notes:
            _say(f"note: {note}")
        return _replay(bundle.recording, steps or bundle.steps)


def bundle_run(
    config: Config, steps: str, ask_ledger: Callable[[], LedgerState], out: Path, *, with_model: bool
) -> int:
    """Write a bundle of a run's steps; the exit code."""
    recording = open_run(config, ask_ledger)
    plan = recording.plan(steps)
    for note in changed_keys(recording, plan):
        _say(f"note: {note}")
    write_bundle(recording, plan, out, with_model=with_model)
    start = f"checkpoint {plan.checkpoint}" if plan.checkpoint else "the initial weights"
    megabytes = out.stat().st_size / 1e6
    _say(f"{out}: steps {shown_steps(plan.first, plan.end)} of run {config.run.name}, from {start}; {megabytes:.1f} MB")
    if not with_model:
        _say(f"it refers to the model {config.actor.path}; --with-model includes it")
    _say(f"replay it with: penstock replay --bundle {out}")
    return 0


def changed_keys(recording: Recording, plan: Plan) -> Iterator[str]:
    """Notes on values with which a replay trains steps otherwise than the run did.

    An older run has recorded no settings with its steps; the values that its launcher wrote stand for them.
    """
    record = recording.steps[plan.first]
    if record.settings:
        before, when = recording.step_files.settings.read(record.settings), f"step {number_of(record.step)} was trained"
    else:
        before, when = _launched(recording.folder / "config.yaml"), "the run was started"
    for key, old, new in differences(before, step_settings(recording.config_of(plan.first))):
        yield f"{key} is {new!r} and was {old!r} when {when}"


def _launched(path: Path) -> Settings:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return {}
    return dict(flat(tree)) if isinstance(tree, Mapping) else {}


def _replay(recording: Recording, steps: str) -> int:
    plan = recording.plan(steps)
    start = f"checkpoint {plan.checkpoint}" if plan.checkpoint else "the initial weights"
    asked = shown_steps(plan.first, plan.end)
    _say(f"run {recording.config.run.name}: steps {asked}, from {start} (after {plan.start} steps)")
    left = [step for step in recording.steps if step not in recording.available]
    if left:
        _say(f"steps {spans(left)} are recorded, but their files are gone (checkpoint.keep_step_bytes)")
    try:
        if found := check_draws(recording):
            _say(found)
    except DataError as error:
        _say(str(error))
        return 1
    for note in changed_keys(recording, plan):
        _say(f"note: {note}")
    replay = Replay(recording, plan)
    for reason in why_not_exact(replay.learner, recording, plan):
        _say(f"note: an unequal digest will prove nothing: {reason}")
    seen = []
    for compared in replay.run():
        seen.append(compared)
        _say(_line(compared, is_start=compared.result is None, is_lead_in=compared.step < plan.first))
    return _conclude(seen)


def _line(compared: Compared, *, is_start: bool, is_lead_in: bool) -> str:
    if compared.verdict is DigestVerdict.DAMAGED:
        return f"step {number_of(compared.step):5}  {compared.verdict.value}: {compared.problem}"
    place = "start     " if is_start else f"step {number_of(compared.step):5}"
    recorded = f"recorded {compared.recorded.policy}" if compared.recorded else "recorded -"
    figures = ""
    if compared.result is not None:
        result = compared.result
        figures = f"  loss {result.loss:.6g}  grad_norm {result.grad_norm:.6g}  {compared.seconds:.1f} s"
    before = "  (before the steps asked for)" if is_lead_in and not is_start else ""
    return f"{place}  {compared.found}  {recorded}  {compared.verdict.value}{figures}{before}"


def _conclude(seen: Sequence[Compared]) -> int:
    """Print the result; the exit code."""
    unequal = next(
        (each for each in seen if each.verdict not in (DigestVerdict.EQUAL, DigestVerdict.NOT_RECORDED)), None
    )
    num_equal = sum(each.verdict is DigestVerdict.EQUAL and each.result is not None for each in seen)
    if unequal is None:
        num_steps = sum(each.result is not None for each in seen)
        _say(f"{num_equal} of {num_steps} steps have the recorded digest, and none another")
        return 0 if num_equal else 1
    found = unequal.found.digest if unequal.found else "no weights, since its step file is damaged"
    expected = unequal.recorded.policy.digest if unequal.recorded else "nothing"
    place = "the weights to start from" if unequal is seen[0] else f"step {number_of(unequal.step)}"
    doubt = "; this proves nothing, see the notes above" if unequal.verdict is DigestVerdict.NOT_EXACT else ""
    _say(f"first difference: {place}: {found}; recorded is {expected}{doubt}")
    return 1


def _say(text: str) -> None:
    print(text, flush=True)
