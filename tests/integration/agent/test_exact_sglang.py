"""Episodes of an agent that branches, by a real SGLang in float32, with new weights in the middle: each span's
log-probabilities are those of the weights that it names. `benchmarks.agents.exact` is the long form."""

import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from benchmarks.agents.exact.cases import HERE, Case
from benchmarks.agents.exact.episodes import Setting, make_groups
from benchmarks.agents.exact.recompute import recompute
from benchmarks.push_setup import RolloutServer
from penstock.broker.embedded import EmbeddedServer
from tests.integration.rollout.sglang_pair import PYTHON, VOCABULARY
from tests.integration.rollout.sglang_world import tolerance_of
from tests.patience import START_SECONDS

GROUP_SIZE = 3
NUM_GROUPS = 4
TEMPLATE = (
    "{% for message in messages %}<start> {{ message['role'] }} {{ message['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<start> assistant {% endif %}"
)
ROW = {
    "system": "w10 w11 w12",
    "question": "w20 w21 w22 w23",
    "next": "w30 w31",
    "edit": "w40",
    "helper": "w50 w51",
    "summary": "w60 w61",
    "title": "w70 w71",
    "answer": "",
}
WANDERING = Case(
    "wandering",
    {"environment": "environments:wander", "modules_path": HERE, "max_turns": 16, "max_tokens": 1000},
    lambda count: [ROW] * count,
    max_new_tokens=64,
)
BRANCHES = {"sibling", "edited", "subagent", "compacted"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.skipif(not PYTHON.exists(), reason="no environment with SGLang: `make envs` makes one"),
]


def with_chat(model: Path, folder: Path) -> Path:
    """The model's folder, with a tokenizer that has a chat template."""
    shutil.copytree(model, folder)
    words = ["w0", "<end>", "<start>", "system", "user", "assistant", *(f"w{each}" for each in range(6, VOCABULARY))]
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="w0", eos_token="<end>", additional_special_tokens=["<start>"]
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


async def test_episodes_with_branches_have_the_log_probabilities_of_their_weights(
    sglang_pair: list[RolloutServer],
    sglang_models: tuple[Path, ...],
    redis_server: EmbeddedServer,
    tmp_path: Path,
) -> None:
    weights = tuple(AutoModelForCausalLM.from_pretrained(each, dtype=torch.float32) for each in sglang_models)
    setting = Setting(
        tmp_path,
        with_chat(sglang_models[0], tmp_path / "chat"),
        weights,
        sglang_pair[0],
        redis_server,
        GROUP_SIZE,
        sessions=2 * GROUP_SIZE,  # two groups at once, so that a push finds one in the middle
        wait_seconds=START_SECONDS,
    )
    made = await make_groups(setting, WANDERING, NUM_GROUPS, {1, 2})
    found = recompute(made, weights, setting.temperature)
    assert not found.failures
    assert found.num_episodes == NUM_GROUPS * GROUP_SIZE
    assert found.differences[-1] <= max(map(tolerance_of, sglang_models))
    assert min(span.by_others for span in found.spans if span.by_others is not None) > 0.01  # it would show
    assert set(found.branches) >= BRANCHES
    assert found.num_split_episodes > 0
    assert found.num_cached_tokens > 0
