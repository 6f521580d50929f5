"""A run with a class of tools through `penstock launch local`, with a real SGLang: calls are sampled, read, answered,
recorded, scored and trained."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from penstock.contracts import Episode
from penstock_trainer.checkpoints.journal import Journal
from penstock_trainer.checkpoints.step_files import StepFiles
from tests.integration.launch.user_commands import UserCommands

pytestmark = [pytest.mark.redis, pytest.mark.slow]

NUM_STEPS = 2
BATCH_SIZE = 2
MAX_TURNS = 3
CALL = ("<tool_call>", '{"name":', '"look",', '"arguments":', "{}}", "</tool_call>")
WORDS = ("unknown", "<end>", "<start>", "system", "user", "assistant", "tool", "seen", "enough", *CALL)
SIZE = 32
CERTAIN = 12.0  # logits; those of all other words are 0
ASKS, ENDS = 7.7, 7.0  # the model calls the tool in two thirds of its turns
TEMPLATE = (
    "{% for message in messages %}<start> {{ message['role'] }} {{ message['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<start> assistant {% endif %}"
)
ENVIRONMENT = '''
class Look:
    """Look twice; a third look fails."""

    def reset(self, **row):
        self.number = 0
        return "seen enough"

    def look(self) -> str:
        """Look."""
        self.number += 1
        if self.number == 3:
            raise ValueError("nothing is left")
        return "seen"

    def get_reward(self) -> float:
        return self.number
'''


def make_model(folder: Path) -> Path:
    """A model that, for its turn, either calls the tool or writes one word: each word follows from the one before."""
    chain = [(one, other, CERTAIN) for one, other in zip(CALL, (*CALL[1:], "<end>"), strict=True)]
    chain += [("assistant", CALL[0], ASKS), ("assistant", "enough", ENDS), ("enough", "<end>", CERTAIN)]
    config = LlamaConfig(
        vocab_size=SIZE,
        hidden_size=SIZE,
        intermediate_size=SIZE,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).float()
    layer, head = model.model.layers[0], torch.zeros(SIZE, SIZE)
    for before, after, logit in chain:
        head[WORDS.index(after), WORDS.index(before)] = logit / SIZE**0.5  # the norm makes a unit vector this long
    with torch.no_grad():
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(SIZE))
        model.lm_head.weight.copy_(head)
    model.save_pretrained(folder)
    known = {word: number for number, word in enumerate((*WORDS, *(f"w{each}" for each in range(len(WORDS), SIZE))))}
    words = Tokenizer(models.WordLevel(known, unk_token="unknown"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="unknown", eos_token="<end>", additional_special_tokens=["<start>"]
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def user(tmp_path: Path) -> Iterator[UserCommands]:
    commands = UserCommands(tmp_path, make_model(tmp_path / "model"))
    try:
        yield commands
    finally:
        commands.end()


@pytest.mark.timeout(900)
def test_calls_of_tools_are_trained(user: UserCommands, sglang_python: str) -> None:
    (user.folder / "envs.py").write_text(ENVIRONMENT)
    user.write_rows(*({"prompt": "seen", "answer": ""} for _ in range(NUM_STEPS * BATCH_SIZE)))
    del user.document["reward"], user.document["weights"]
    user.document |= {
        "total_train_epochs": 1,
        "sampling": {"max_new_tokens": 12},
        "agent": {"environment": "envs:Look", "tool_format": "hermes", "max_turns": MAX_TURNS, "max_tokens": 512},
    }
    user.document["actor"]["group_size"] = 8
    user.document["rollout"]["engine"] |= {"python": sglang_python, "dtype": "float32", "max_total_tokens": 16384}
    code, output = user.launch()
    assert code == 0, output[-20_000:]

    ledger = Journal(user.run_folder / "steps").read()
    assert sorted(ledger.trained) == list(range(NUM_STEPS * BATCH_SIZE)), output[-5000:]
    files = StepFiles(user.run_folder / "steps", keep_bytes=0)
    groups = [scored for record in ledger.steps for scored in files.read(record)]
    episodes = [
        (each, score) for scored in groups for each, score in zip(scored.group.episodes, scored.scores, strict=True)
    ]
    for episode, score in episodes:
        assert isinstance(episode, Episode)
        counts = episode.counts
        assert score.value is not None
        assert not counts.branches  # each call goes on from the turn before
        assert score.value <= counts.num_tool_calls  # what the class saw of them
        roles = [node.role for node in episode.nodes]
        assert roles == [role for turn in range(counts.num_turns) for role in ("tool" if turn else "user", "assistant")]
        assert all(ledger.policies[span.policy.number] == span.policy for span in episode.spans)
    assert {episode.counts.num_turns for episode, _ in episodes} == set(range(1, MAX_TURNS + 1))
    assert {score.value for _, score in episodes} >= {0.0, float(MAX_TURNS)}
    assert all(episode.counts.num_failed_tool_calls == (score.value == 3) for episode, score in episodes)
    assert len({str(policy) for policy in ledger.policies.values()}) > 1  # something was learned
