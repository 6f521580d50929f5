"""Keys by words: the best first, and the key of exactly this name alone."""

import pytest

from penstock.config.reference.described import described_keys, search


@pytest.mark.parametrize(
    ("words", "first"),
    [
        (["optimizer.lr"], ["optimizer.lr"]),
        (["Optimizer.LR"], ["optimizer.lr"]),
        (["learning_rate"], ["optimizer.lr"]),
        (["learning-rate"], ["optimizer.lr"]),
        (["rollout.n"], ["actor.group_size"]),
        (["temperature"], ["sampling.temperature", "eval.temperature"]),
        (["group", "size"], ["actor.group_size"]),
        (["kl"], ["kl_ctl", "teacher.kl_ctl"]),
        (["staleness", "max"], ["staleness.max_staleness"]),
    ],
)
def test_words_find_keys(words: list[str], first: list[str]) -> None:
    assert [key.name for key in search(words)][: len(first)] == first


def test_a_full_name_finds_one_key_and_a_section_its_keys() -> None:
    assert len(search(["eval.temperature"])) == 1
    assert {"optimizer.lr", "optimizer.eps"} <= {key.name for key in search(["optimizer"])}


def test_all_words_must_fit_and_no_word_finds_all() -> None:
    assert search(["temperature", "qqqq"]) == []
    assert search([]) == list(described_keys())
    assert search(["[("]) == []
