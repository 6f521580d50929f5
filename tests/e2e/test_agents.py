"""A run with agents through `penstock launch local`: all services, an environment with `step`, and an engine that
computes no model. Every ticket is accounted for, and every token has the weights that the ledger knows."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.contracts import Episode, PolicyIdentity
from penstock.contracts.ledger import LedgerState
from penstock_trainer.checkpoints.journal import Journal
from penstock_trainer.checkpoints.step_files import StepFiles
from tests.integration.launch.user_commands import UserCommands

pytestmark = [pytest.mark.redis, pytest.mark.slow]

NUM_STEPS = 4
ENVIRONMENT = '''
class Vowels:
    """Say vowels; each turn shows how many there were."""

    def reset(self, turns: int, **row):
        self.left, self.found = turns, 0
        return "a="

    def step(self, text: str):
        if self.left == 1 and self.found == 0 and "q" in text:
            raise RuntimeError("q breaks it")
        self.left -= 1
        self.found += sum(text.count(vowel) for vowel in "aeiou")
        return f"{self.found % 10}=" if self.left else float(self.found)
'''


@pytest.fixture
def user(tmp_path: Path, tiny_model: Path) -> Iterator[UserCommands]:
    commands = UserCommands(tmp_path, tiny_model)
    try:
        yield commands
    finally:
        commands.end()


def test_a_run_with_agents_accounts_for_every_ticket_and_token(user: UserCommands) -> None:
    user.use_pure_engine()
    (user.folder / "envs.py").write_text(ENVIRONMENT)
    user.write_rows(*({"prompt": f"{number}+1=", "answer": "", "turns": number % 3 + 1} for number in range(4)))
    (user.folder / "held_out.jsonl").write_text(json.dumps({"prompt": "9+9=", "answer": "", "turns": 2}) + "\n")
    del user.document["reward"]
    user.document |= {
        "total_train_epochs": NUM_STEPS * 2 // 4,
        "agent": {
            "environment": "envs:Vowels",
            "template": "plain",
            "max_tokens": 64,
            "max_attempts": 2,
            "max_failure_share": 1.0,
        },
        "data": {"train": {"path": "train.jsonl"}, "eval": {"path": "held_out.jsonl"}, "batch_size": 2},
        "eval": {"every_steps": 2},
    }
    user.document["actor"]["group_size"] = 4
    code, output = user.launch()
    assert code == 0, output[-20_000:]

    ledger = Journal(user.run_folder / "steps").read()
    assert sorted([*ledger.trained, *ledger.dropped]) == list(range(2 * NUM_STEPS)), output[-5000:]
    known = {str(policy) for policy in ledger.policies.values()}
    files = StepFiles(user.run_folder / "steps", keep_bytes=0)
    episodes = [
        (episode, score)
        for record in ledger.steps
        for scored in files.read(record)
        for episode, score in zip(scored.group.episodes, scored.scores, strict=True)
    ]
    assert episodes
    for episode, score in episodes:
        assert isinstance(episode, Episode)
        assert score.value == episode.score.value
        for node in episode.nodes:
            assert node.is_sampled == (node.role == "assistant")
        assert {str(span.policy) for span in episode.spans} <= known
        assert all(ledger.policies[span.policy.number] == span.policy for span in episode.spans)
    assert {episode.counts.num_turns for episode, score in episodes if score.value is not None} == {1, 2, 3}
    assert known_versions(ledger) == list(range(len(ledger.policies)))
    summary = json.loads((user.run_folder / "trainer_summary.json").read_text())
    assert summary["steps"] == len(ledger.steps)
    assert summary["heldout_prompts"] == 1
    assert summary["heldout_accuracy_end"] is not None


def known_versions(ledger: LedgerState) -> list[int]:
    policies: list[PolicyIdentity] = list(ledger.policies.values())
    return sorted(policy.number for policy in policies)
