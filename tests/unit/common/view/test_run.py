"""What the page says of a run is what its files hold."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from benchmarks.synthetic_run import completion, group, identity, write_long_run
from penstock.contracts.ledger import (
    ArchivedRecord,
    DropRecord,
    EarlyStopRecord,
    RunRecord,
    StepRecord,
    decode_record,
    encode_record,
)
from penstock.contracts.vocabulary import DropReason
from penstock.errors import ConfigError, DataError
from penstock.records import RunRecords
from penstock.view.run import RunView
from penstock.view.search import Wanted
from penstock.view.step_files import MOST_HELD
from tests.unit.common.view.conftest import Made, other_weights


def test_dead_letters_are_told_the_newest_first_and_by_ticket(made: Made) -> None:
    assert made.view.dead_letters(None, 50) == []
    for ticket, text in (("5", "one"), ("", "two"), ("5", "three")):
        made.run.bury(ticket, "MalformedMessageError", text)
    with (made.run.folder / "dead.jsonl").open("ab") as file:
        file.write(b'{"id": 7}\n{"cut off')
    assert [each.text for each in made.view.dead_letters(None, 50)] == ["three", "two", "one"]
    assert [each.text for each in made.view.dead_letters(None, 1)] == ["three"]
    assert [each.text for each in made.view.dead_letters("5", 50)] == ["three", "one"]


def test_groups_are_marked_as_failed_flat_or_different(made: Made) -> None:
    different, flat, failed = made.view.step(1)["groups"]
    assert (different["is_flat"], different["is_failed"], different["num_failed"]) == (False, False, 1)
    assert different["mean"] == pytest.approx(2 / 3)
    assert different["std"] == pytest.approx(math.sqrt(2) / 3)
    assert (flat["is_flat"], flat["is_failed"], flat["std"]) == (True, False, 0.0)
    assert (failed["is_flat"], failed["is_failed"], failed["num_failed"]) == (False, True, 3)
    assert [each["server"] for each in made.view.step(1)["groups"]] == ["rollout-0", "rollout-1", "rollout-0"]


def test_completions_are_cut_where_they_first_differ(made: Made) -> None:
    found = made.view.group(1, 0, None)
    assert found["base"] == 0
    parts = [(each["before"], each["at"], each["behind"]) for each in found["completions"]]
    assert parts == [("four", "", ""), ("four", "!", ""), ("f", "i", "ve"), ("", "", "")]
    assert [each["same"] for each in found["completions"]] == [4, 4, 1, 0]
    other = made.view.group(1, 0, 2)["completions"]
    assert [(each["before"], each["at"]) for each in other[:3]] == [("f", "o"), ("f", "o"), ("five", "")]
    failed = found["completions"][3]
    assert (failed["reward"], failed["failure"], failed["advantage"]) == (None, "judge: TimeoutError", None)
    assert [each["shaped_reward"] for each in found["completions"]] == [each["reward"] for each in found["completions"]]


def test_a_token_has_the_weights_that_the_engine_asserted(made: Made) -> None:
    page = made.view.tokens(2, 0, 0, 0, 100)
    prompt, sampled = page["segments"]
    assert (prompt["kind"], sampled["kind"], sampled["start"]) == ("prompt", "sampled", 4)
    assert page["versions"] == [None] * 4 + [0, 0, 0] + [1] * 3
    assert page["asserted"] == page["recorded"] == {str(n): identity(n).digest for n in (0, 1)}
    assert page["trained"] == [False] * 4 + [True] * 6
    assert page["logprobs"][:4] == [None] * 4
    assert page["special"] == [9]
    assert page["pieces"][-1] == "<|end|>"


def test_weights_that_the_ledger_does_not_have_are_shown_beside_its_own(made: Made) -> None:
    lying = completion([1, 2], 0)
    span = msgspec.structs.replace(lying.spans[0], policy=other_weights(0))
    made.run.add_step([group(9, "p", [1], [msgspec.structs.replace(lying, spans=(span,))], [1.0])])
    page = made.view.tokens(3, 0, 0, 0, 10)
    assert (page["asserted"], page["recorded"]) == ({"0": "f" * 16}, {"0": identity(0).digest})


def test_a_character_of_several_tokens_is_with_the_last_of_them(made: Made) -> None:
    page = made.view.tokens(2, 0, 0, 0, 100)
    assert page["pieces"][4:] == ["f", "", "\N{LATIN SMALL LETTER U WITH DIAERESIS}", "n", "f", "<|end|>"]
    assert made.view.tokens(2, 0, 0, 6, 100)["pieces"][0] == "\N{LATIN SMALL LETTER U WITH DIAERESIS}"


def test_an_episode_is_shown_as_its_tree(made: Made) -> None:
    page = made.view.tokens(2, 1, 0, 0, 1000)
    assert [(each["kind"], each["role"], each["parent"]) for each in page["segments"]] == [
        ("context", "user", None),
        ("sampled", "assistant", 0),
        ("context", "tool", 1),
        ("sampled", "assistant", 2),
        ("sampled", "assistant", 2),
    ]
    assert "".join(page["pieces"]) == "12+3?calc 12+3<|end|>1515<|end|>51<|end|>"
    assert [logprob is None for logprob in page["logprobs"]] == [version is None for version in page["versions"]]


def test_pages_of_tokens_are_pieces_of_the_full_list(made: Made) -> None:
    full = made.view.tokens(2, 1, 0, 0, 1000)
    for offset in range(full["total"]):
        page = made.view.tokens(2, 1, 0, offset, 3)
        for name in ("ids", "pieces", "logprobs", "versions", "trained"):
            assert page[name] == full[name][offset : offset + 3]


def test_without_a_tokenizer_there_are_ids_and_the_reason(made: Made) -> None:
    view = RunView("mine", RunRecords(made.run.folder), made.run.folder)
    page = view.tokens(1, 0, 0, 0, 10)
    assert page["pieces"] is None
    assert page["ids"][4:] == made.encode("four")
    assert "tokenizer.json" in page["no_text"]
    assert view.group(1, 0, None)["completions"][0]["before"].split() == [str(each) for each in made.encode("four")]


def test_a_ticket_says_why_it_ended(made: Made) -> None:
    assert made.view.ticket(3)["end"] == "trained"
    assert made.view.ticket(3)["step"] == 2
    dead = made.view.ticket(5)
    assert (dead["end"], dead["reason"], dead["why"][:21]) == ("dropped", "poison", "MalformedMessageError")
    assert made.view.ticket(99)["end"] == "outstanding"
    tickets = made.view.tickets("", 0, 10)
    assert (tickets["trained"], tickets["dropped"]) == (5, {"degenerate": 1, "poison": 1})
    assert [each["ticket"] for each in tickets["drops"]] == [6, 5]
    assert [each["ticket"] for each in made.view.tickets("poison", 0, 10)["drops"]] == [5]


def test_the_draws_of_a_prompt_are_those_of_the_same_prompt(tmp_path: Path) -> None:
    run = write_long_run(tmp_path / "long", tmp_path, num_steps=20, num_groups=16)
    view = RunView("long", RunRecords(run.folder))
    draws = view.ticket(70)["draws"]
    epochs = [each["epoch"] for each in draws]
    assert epochs == sorted(epochs, reverse=True)
    assert len(epochs) == len(set(epochs)) == 5
    assert 70 in [each["ticket"] for each in draws]
    assert all(each["summary"]["ticket"] == each["ticket"] for each in draws)
    everything = [tuple(each["ticket"] for each in view.ticket(number)["draws"]) for number in range(64, 128)]
    assert sorted(ticket for some in everything for ticket in some) == list(range(320))


def test_of_a_run_that_draws_otherwise_no_other_draw_is_taken_for_one_of_the_prompt(tmp_path: Path) -> None:
    run = write_long_run(tmp_path / "long", tmp_path, num_steps=20, num_groups=16)
    path = run.folder / "steps" / "ledger.jsonl"
    first, *others = path.read_bytes().splitlines(keepends=True)
    begun = decode_record(first)
    assert isinstance(begun, RunRecord)
    shuffled = encode_record(msgspec.structs.replace(begun, draws="in the order of the rows")) + b"\n"
    path.write_bytes(shuffled + b"".join(others))
    view = RunView("long", RunRecords(run.folder))
    assert [each["ticket"] for each in view.ticket(70)["draws"]] == [70]


def test_a_pruned_and_a_damaged_step_file_are_missed_and_the_rest_is_shown(made: Made) -> None:
    first, second = sorted((made.run.folder / "steps").glob("*.pack"))
    first.unlink()
    second.write_bytes(second.read_bytes()[:-1] + b"x")
    pruned, damaged = made.view.step(1), made.view.step(2)
    assert "checkpoint.keep_step_bytes" in pruned["missing"]
    assert "digest" in damaged["missing"]
    assert pruned["line"]["reward_mean"] == pytest.approx(6 / 8)
    with pytest.raises(DataError, match="is gone"):
        made.view.group(1, 0, None)


@pytest.mark.parametrize("name", ["../../secret", "00000000.1.pack/../x", "/etc/passwd"])
def test_the_ledger_leads_to_no_file_but_step_files(made: Made, name: str) -> None:
    path = made.run.folder / "steps" / "ledger.jsonl"
    path.write_text(path.read_text().replace("00000000.1.pack", name))
    assert "expected <step>.<lease>.pack" in made.view.step(1)["missing"]


def test_records_that_moved_to_the_archive_are_still_there(made: Made) -> None:
    """The journal is written anew then, without them; what lies behind their length in the archive does not count."""
    before = (made.view.overview(), made.view.tickets("", 0, 10), made.view.step(1), made.view.ticket(0))
    journal = made.run.folder / "steps" / "ledger.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    run, *records = [decode_record(line) for line in lines]
    assert isinstance(run, RunRecord)
    num_archived = next(
        place for place, each in enumerate(records, 1) if isinstance(each, StepRecord) and each.step == 1
    )
    oldest = b"".join(lines[:num_archived])
    archived = ArchivedRecord(run, 1, len(oldest), (), 0, {}, ())
    (journal.parent / "archive.jsonl").write_bytes(oldest + encode_record(DropRecord(99, DropReason.POISON)) + b"\n")
    journal.write_bytes(encode_record(archived) + b"\n" + b"".join(lines[num_archived:]))
    after = (made.view.overview(), made.view.tickets("", 0, 10), made.view.step(1), made.view.ticket(0))
    assert after == before
    fresh = RunView("run", RunRecords(made.run.folder))
    assert fresh.overview()["trained"] == before[0]["trained"]
    assert fresh.ticket(0) == before[3]


def test_why_a_run_stopped_early_is_shown_until_it_is_trained_on(made: Made) -> None:
    assert made.view.overview()["stopped_early"] == ""
    record = EarlyStopRecord(2, metric="reward", best=1.0, best_steps=2, solved_tickets=80, success=0.5)
    with (made.run.folder / "steps" / "ledger.jsonl").open("ab") as file:
        file.write(encode_record(record) + b"\n")
    assert made.view.overview()["stopped_early"].startswith("solved: in the last 80 tickets no reward was below 1,")
    made.run.add_step([group(7, "p", [1], [completion([1], 2)] * 2, [0.0, 1.0])])
    assert made.view.overview()["stopped_early"] == ""


def test_what_is_appended_is_seen_and_a_step_trained_again_replaces_its_line(made: Made) -> None:
    assert made.view.overview()["num_steps"] == 2
    made.run.add_step([group(7, "p", [1], [completion([1], 2)] * 2, [0.0, 1.0])])
    assert made.view.overview()["num_steps"] == 3
    path = made.run.folder / "steps.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:1]))
    assert made.view.steps(["reward_mean"], None, 10)["rows"] == [{"step": 1, "reward_mean": 0.75}]


def test_a_run_that_was_killed_in_the_middle_of_a_line_is_shown(made: Made) -> None:
    for name in ("steps.jsonl", "evals.jsonl", "samples.jsonl", "steps/ledger.jsonl"):
        path = made.run.folder / name
        path.write_bytes(path.read_bytes()[:-20])
    assert made.view.overview()["num_steps"] == 1
    assert len(made.view.evaluations()) == 1
    assert [each["ticket"] for each in made.view.tickets("", 0, 10)["drops"]] == [5]


def test_figures_that_are_not_numbers_are_no_points(tmp_path: Path, made: Made) -> None:
    made.run.add_step([group(8, "p", [1], [completion([1], 2)], [1.0])], loss=math.nan)
    path = made.run.folder / "steps.jsonl"
    path.write_text(path.read_text().replace('"loss":null', '"loss":NaN'))
    curve = made.view.curves(["statistics/loss", "nonsense"], 10, 1, None)
    assert (curve["statistics/loss"].x, curve["nonsense"].x) == ([1, 2], [])
    assert made.view.steps(["statistics/loss"], None, 1)["rows"] == [{"step": 3, "statistics/loss": None}]


def test_a_figure_that_a_line_lacks_is_no_point(made: Made) -> None:
    """A step without a trained token has no loss; the steps around it keep theirs."""
    path = made.run.folder / "steps.jsonl"
    for ticket in (8, 9):
        made.run.add_step([group(ticket, "p", [1], [completion([1], 2)], [1.0])], loss=0.5)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    del lines[-2]["statistics"]["loss"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert made.view.curves(["statistics/loss"], 10, 1, None)["statistics/loss"].x == [1, 2, 4]
    rows = made.view.steps(["statistics/loss"], None, 2)["rows"]
    assert rows == [{"step": 4.0, "statistics/loss": 0.5}, {"step": 3.0, "statistics/loss": None}]


@pytest.mark.parametrize(
    ("wanted", "tickets"),
    [
        ({}, [3, 4, 0, 1, 2]),
        ({"text": "TICKET 1"}, [1]),
        ({"reward_max": 0.5}, [3]),
        ({"failed": True}, [2]),
        ({"reward_min": 1, "step_max": 1}, [0, 1]),
        ({"length_min": 5}, [3, 4]),
        ({"text": "nowhere"}, []),
    ],
)
def test_completions_are_found_by_what_they_hold(made: Made, wanted: dict[str, object], tickets: list[int]) -> None:
    found = made.view.samples(Wanted.model_validate(wanted), None, 50)
    assert sorted(line.ticket for line in found["lines"]) == sorted(tickets)
    assert found["next"] is None


def test_a_search_goes_on_where_it_stopped(made: Made) -> None:
    seen, end = [], None
    while True:
        found = made.view.samples(Wanted(), end, 2)
        seen += [line.ticket for line in found["lines"]]
        end = found["next"]
        if end is None:
            break
    assert seen == [4, 3, 2, 1, 0]


def test_a_timeline_has_the_phases_of_the_trainer_and_the_groups_of_each_server(made: Made) -> None:
    found = made.view.timeline(1, 2)
    assert [bar["phase"] for bar in found["trainer"]] == ["wait", "commit", "update", "push_wait"] * 2
    assert [bar["ticket"] for bar in found["servers"]] == [0, 1, 2, 3, 4]
    lines = list(RunRecords(made.run.folder).steps())
    times = [(each["started_at"], each["ended_at"]) for line in lines for each in line["pushes"]]
    assert [(bar["start"], bar["end"]) for bar in found["pushes"]] == times
    assert [(bar["step"], bar["version"], bar["is_measured"]) for bar in found["pushes"]] == [
        (1, 0, True),
        (2, 1, True),
    ]
    assert all(bar["end"] > bar["start"] for bar in found["trainer"] + found["servers"] + found["pushes"])


def test_a_step_whose_weights_are_not_recorded_yet_is_no_fault(made: Made) -> None:
    """The journal has a step once its weights are recorded, after its line is written."""
    path = made.run.folder / "steps" / "ledger.jsonl"
    records = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(line for line in records if getattr(decode_record(line), "step", 0) != 1))
    view = RunView("running", RunRecords(made.run.folder))
    assert "step 2 has just been trained" in view.step(2)["missing"]
    found = view.timeline(1, 2)
    assert (found["missing"], {bar["step"] for bar in found["trainer"]}) == ("", {1, 2})
    assert {bar["step"] for bar in found["servers"]} == {1}
    assert "step 3 is not in the ledger" in view.step(3)["missing"]


def test_a_push_of_an_earlier_release_has_its_length_and_is_drawn_in_its_step(made: Made) -> None:
    path = made.run.folder / "steps.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        del line["pushes"]
    lines[1]["seconds"]["push"] = 0.0
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    [bar] = RunView("older", RunRecords(made.run.folder)).timeline(1, 2)["pushes"]
    assert (bar["step"], bar["version"], bar["is_measured"]) == (1, None, False)
    assert bar["end"] - bar["start"] == pytest.approx(0.5)


def test_no_more_than_a_few_step_files_are_held(tmp_path: Path) -> None:
    run = write_long_run(tmp_path / "long", tmp_path, num_steps=12, num_groups=2)
    view = RunView("long", RunRecords(run.folder))
    for step in range(1, 13):
        view.step(step)
    assert len(view._files._held) == MOST_HELD


def test_a_ticket_that_was_never_issued_is_looked_for_in_no_epoch(made: Made) -> None:
    found = made.view.ticket(10**12)
    assert (found["end"], [each["ticket"] for each in found["draws"]]) == ("outstanding", [10**12])


@pytest.mark.parametrize("name", ["steps.jsonl", "evals.jsonl", "steps/ledger.jsonl"])
def test_a_broken_line_is_an_error_each_time_until_it_is_mended(made: Made, name: str) -> None:
    path = made.run.folder / name
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"{", b"?", 1))
    for _ in range(2):
        with pytest.raises(DataError, match=name.rpartition("/")[2]):
            made.view.overview()
    path.write_bytes(whole)
    assert made.view.overview()["num_steps"] == 2
    assert len(made.view.evaluations()) == 2


def test_steps_are_counted_from_1_in_questions_and_answers(made: Made) -> None:
    overview, second = made.view.overview(), made.view.step(2)
    assert (overview["last_step"], second["last_step"]) == (2, 2)
    assert (second["step"], second["line"]["step"], second["record"].step) == (2, 1, 1)  # a file's line has its id
    assert [each["ticket"] for each in second["groups"]] == [3, 4]
    assert [row["step"] for row in made.view.steps([], None, 10)["rows"]] == [2, 1]
    assert [row["step"] for row in made.view.steps([], 2, 10)["rows"]] == [1]
    for first, last, expected in ((1, None, [1, 2]), (2, None, [2]), (1, 1, [1]), (2, 2, [2])):
        assert made.view.curves(["reward_mean"], 10, first, last)["reward_mean"].x == expected
    assert {bar["step"] for bar in made.view.timeline(2, 2)["trainer"]} == {2}
    assert {bar["step"] for bar in made.view.timeline(2, 2)["servers"]} == {2}
    second_alone = Wanted(step_min=2, step_max=2)
    assert [(each.step, each.ticket) for each in made.view.samples(second_alone, None, 9)["lines"]] == [(2, 4), (2, 3)]
    assert [draw["step"] for draw in made.view.ticket(4)["draws"]] == [2]


def test_there_is_no_step_before_the_first(made: Made) -> None:
    asks: list[Callable[[], object]] = [
        lambda: made.view.step(0),
        lambda: made.view.group(0, 0, None),
        lambda: made.view.timeline(0, 2),
        lambda: made.view.samples(Wanted(step_min=0), None, 9),
        lambda: made.view.curves(["reward_mean"], 10, 0, None),
    ]
    for ask in asks:
        with pytest.raises(ConfigError, match="saw step 0; expected steps from 1 on"):
            ask()
    assert made.view.step(3)["missing"].startswith("step 3 is not in the ledger")


def test_a_failed_heldout_reward_is_in_no_figure_and_its_row_says_why(made: Made) -> None:
    made.run.evaluate(0.95, [("7+7=", "14", "14", 1.0)], failed=["judge: TimeoutError"])
    made.run.evaluate(None, [], failed=["judge: gone"] * 20)
    some, none = made.view.evaluations()[2:]
    assert (some["accuracy"], some["num_scored"], some["num_failed"]) == (0.95, 19, 1)
    assert (none["accuracy"], none["reward_mean"], none["num_scored"], none["num_failed"]) == (None, None, 0, 20)
    assert not {"samples", "failed"} & some.keys()
    assert [each["failure"] for each in made.view.evaluation(2)["failed"]] == ["judge: TimeoutError"]
    assert len(made.view.evaluation(3)["failed"]) == 20


def test_an_evaluation_of_an_earlier_release_is_converted(made: Made) -> None:
    sample = {"prompt": "p", "completion": "c", "answer": "a", "reward": None}
    line = {"steps": 2, "accuracy": 0.5, "reward_mean": 0.8, "num_prompts": 4, "num_failed": 1, "samples": [sample]}
    with (made.run.folder / "evals.jsonl").open("ab") as file:
        file.write(msgspec.json.encode(line) + b"\n")
    found = made.view.evaluation(2)
    assert found == {**made.view.evaluations()[2], "samples": [sample], "failed": [sample]}
    assert (found["accuracy"], found["num_scored"], found["reward_mean"]) == (pytest.approx(2 / 3), 3, 0.8)


def test_the_overview_compares_the_evaluations_that_the_ending_compares(made: Made) -> None:
    made.run.evaluate(0.75, [], failed=["judge: gone"] * 4)
    path = made.run.folder / "evals.jsonl"
    first, *rest = path.read_text().splitlines(keepends=True)
    path.write_text("".join([first.replace('"prompts":"0000', '"prompts":"ffff'), *rest]))
    overview, ending = made.view.overview(), RunRecords(made.run.folder).figures()
    for name, when in (("first_evaluation", "start"), ("last_evaluation", "end")):
        seen = overview[name]
        shown = (seen["steps"], seen["accuracy"], seen["reward_mean"], seen["num_failed"])
        figures = ("steps", "accuracy", "reward", "failed")
        assert shown == tuple(ending[f"heldout_{figure}_{when}"] for figure in figures)
    assert (overview["first_evaluation"]["accuracy"], overview["last_evaluation"]["accuracy"]) == (0.5, 0.75)


def test_completions_of_dropped_groups_are_shown_the_newest_first(made: Made) -> None:
    assert made.view.dropped("", None, 9) == []
    for ticket in (7, 8):
        made.run.drop_without_rewards(group(ticket, "p", [1], [completion([1], 2)], [None]), "judge: gone")
    path = made.run.folder / "dropped.jsonl"
    path.write_bytes(path.read_bytes() + b"junk\n" + path.read_bytes()[:20])
    lines = made.view.dropped("", None, 9)
    assert [(line.ticket, line.step, line.failure) for line in lines] == [(8, 3, "judge: gone"), (7, 3, "judge: gone")]
    cases: list[tuple[str, int | None, int, list[int]]] = [
        ("reward_failed", None, 9, [8, 7]),
        ("stale", None, 9, []),
        ("", 7, 9, [7]),
        ("", None, 1, [8]),
    ]
    for reason, number, limit, expected in cases:
        assert [line.ticket for line in made.view.dropped(reason, number, limit)] == expected


def test_each_held_out_set_has_its_own_first_and_last_evaluation(made: Made) -> None:
    before = made.view.overview()
    path = made.run.folder / "evals.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    named = [{**msgspec.json.decode(line), "set": "hard", "accuracy": 0.25 * (n + 1)} for n, line in enumerate(lines)]
    with path.open("ab") as file:
        file.writelines(msgspec.json.encode(line) + b"\n" for line in named)
    found = made.view.overview()
    assert [found[f"{when}_evaluation"] for when in ("first", "last")] == [
        before[f"{when}_evaluation"] for when in ("first", "last")
    ]
    assert (before["sets"], list(found["sets"])) == ({}, ["hard"])
    assert [found["sets"]["hard"][when]["accuracy"] for when in ("first", "last")] == [0.25, 0.25 * len(lines)]
    assert [line["set"] for line in made.view.evaluations()] == ["main"] * len(lines) + ["hard"] * len(lines)
