"""The completion that the live view shows, from files that grow while it reads them."""

import json
from pathlib import Path

from penstock_launch.watch.sample import TAIL_BYTES, NewestSample, Sample

PROMPT = "Add:\n2+2=\n\n"
FIRST = {"prompt": PROMPT, "completion": "5", "answer": "4", "reward": 0.0}


def add(path: Path, line: object, end: str = "\n") -> None:
    with path.open("a") as file:
        file.write(json.dumps(line) + end)


def test_the_newest_complete_line_of_either_file(tmp_path: Path) -> None:
    samples = NewestSample(tmp_path)
    assert samples.read() is None
    add(tmp_path / "evals.jsonl", {"steps": 0, "accuracy": 0.5, "samples": [FIRST, {**FIRST, "completion": "6"}]})
    first = samples.read()
    assert first == Sample(PROMPT, "5", 0.0, "2+2=")
    add(tmp_path / "samples.jsonl", {**FIRST, "step": 0, "completion": "3", "reward": None}, end="")
    assert samples.read() is first  # the line is not complete
    with (tmp_path / "samples.jsonl").open("a") as file:
        file.write("\n")
    assert samples.read() == Sample(PROMPT, "3", None, "2+2=")
    add(tmp_path / "evals.jsonl", {"steps": 10, "samples": [{**FIRST, "completion": "4"}]})
    assert samples.read() == Sample(PROMPT, "4", 0.0, "2+2=")
    (tmp_path / "evals.jsonl").unlink()
    assert samples.read() == Sample(PROMPT, "4", 0.0, "2+2=")


def test_only_the_end_of_a_large_file_is_read(tmp_path: Path) -> None:
    for completion in ("a", "b" * TAIL_BYTES, "c"):
        add(tmp_path / "samples.jsonl", {**FIRST, "completion": completion})
    assert NewestSample(tmp_path).read() == Sample(PROMPT, "c", 0.0, "2+2=")


def test_of_prompts_that_end_alike_the_part_that_differs_is_shown(tmp_path: Path) -> None:
    samples = [{**FIRST, "prompt": f"Say the word.\n{word}\nAnswer with that word only."} for word in ("red", "blue")]
    add(tmp_path / "evals.jsonl", {"steps": 0, "samples": samples})
    reader = NewestSample(tmp_path)
    found = reader.read()
    assert found is not None
    assert found.asked == "red"
    add(tmp_path / "samples.jsonl", samples[1])
    found = reader.read()
    assert found is not None
    assert found.asked == "blue"


def test_why_the_last_group_was_dropped(tmp_path: Path) -> None:
    reader = NewestSample(tmp_path)
    reader.read()
    assert reader.why_dropped == ""
    for why in ("gone", "HTTP 503"):
        add(tmp_path / "dropped.jsonl", {**FIRST, "reward": None, "failure": why, "dropped": "reward_failed"})
    assert reader.read() is None, "it was not trained"
    assert reader.why_dropped == "HTTP 503"
