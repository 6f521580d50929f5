"""The table of other libraries' names: each leads to a key that exists, and none is a key of ours."""

import pytest

from penstock.config.keys import find_key
from penstock.config.reference.described import described_keys
from penstock.config.reference.other_names import OTHER_NAMES, OtherName, called, ending_like, other_names_of

KEYS = {key.name for key in described_keys()}


@pytest.mark.parametrize("other", OTHER_NAMES, ids=lambda other: f"{other.library}-{other.name}")
def test_a_name_leads_to_a_key_with_a_value(other: OtherName) -> None:
    assert other.key in KEYS
    assert find_key(other.name) is None  # else no message would ever show it
    assert other in called(other.name)
    assert other.note == other.note.strip()


def test_every_key_that_a_note_names_exists() -> None:
    sections = {key.split(".")[0] for key in KEYS if "." in key}
    for other in OTHER_NAMES:
        for word in other.note.replace(",", " ").replace(";", " ").replace(":", " ").split():
            if word.split(".")[0] in sections and "." in word and not word.endswith(".md"):
                theirs = any(each.name == word for each in OTHER_NAMES)
                assert theirs or find_key(word) is not None, (other, word)


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("learning_rate", {"optimizer.lr"}),
        ("Learning-Rate", {"optimizer.lr"}),
        ("num_generations", {"actor.group_size"}),
        ("rollout.n", {"actor.group_size"}),
        ("n", {"actor.group_size", "eval.samples_per_prompt"}),
        ("kl_coef", {"kl_ctl"}),
        ("actor_rollout_ref.actor.kl_loss_coef", {"kl_ctl"}),
        ("data.train_batch_size", {"data.batch_size"}),
        ("train_batch_size", {"loss.num_minibatches"}),  # OpenRLHF's own, not the end of verl's
        ("batch_size", {"data.batch_size"}),
        ("ate", set()),
        ("", set()),
    ],
)
def test_a_name_is_found_in_full_or_by_its_last_parts(name: str, keys: set[str]) -> None:
    assert {other.key for other in called(name)} == keys


def test_a_name_is_found_in_a_section_of_ours() -> None:
    assert {other.key for other in ending_like("optimizer.learning_rate")} == {"optimizer.lr"}
    assert {other.key for other in ending_like("a.b.rollout.n")} == {"actor.group_size"}
    assert ending_like("learning_rates.x") == ()


def test_a_key_has_the_names_of_all_libraries() -> None:
    assert [(other.library, other.name) for other in other_names_of("actor.group_size")] == [
        ("TRL", "num_generations"),
        ("verl", "actor_rollout_ref.rollout.n"),
        ("AReaL", "gconfig.n_samples"),
        ("OpenRLHF", "n_samples_per_prompt"),
    ]
