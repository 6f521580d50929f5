"""Every task of reasoning-gym: its reward for answers without content."""

import random
import warnings

import msgspec
import pytest

from penstock.contracts.vocabulary import UNUSABLE_TASKS
from penstock_reward.functions.registry import load

pytestmark = pytest.mark.slow

NUM_ENTRIES = 3
MOST_FOR_NOTHING = 0.5  # per answer; partial credit for a nearly correct form stays below
SLOW = {"composite", "futoshiki"}  # a mixture of other tasks; a minute for one puzzle
PROSE = "Let me think step by step. I do not know the answer to this question, and so I give none."


# Its library leaves files open.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_no_task_pays_for_empty_random_or_copied_answers_and_none_fails_by_them() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import reasoning_gym
        from reasoning_gym.factory import DATASETS

        score, letters = load("reasoning_gym"), random.Random(1)
        paid: dict[str, float] = {}
        for task in sorted(set(DATASETS) - SLOW - set(UNUSABLE_TASKS)):
            for entry in reasoning_gym.create_dataset(task, size=NUM_ENTRIES, seed=11):
                carried = msgspec.msgpack.decode(msgspec.msgpack.encode(entry, enc_hook=str))
                noise = "".join(letters.choice("abcdefgh []{}()+*/.,") for _ in range(40))
                for text in ("", " ", "?", PROSE, noise, entry["question"]):
                    value = score(prompt="", completion=text, answer="", metadata={"task": task, "entry": carried})
                    if value >= MOST_FOR_NOTHING and text.strip() != entry["answer"]:
                        paid[f"{task}: {text[:40]!r}"] = value
    assert paid == {}
