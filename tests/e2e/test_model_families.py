"""Models that are no plain Llama through the full loop, with a real SGLang: each push reaches all of their weights.

Nothing is stale in these runs, so that the trainer's weights at a step are those that sampled its tokens. Then their
log-probabilities are equal within rounding, at each step, if and only if the engine has the weights that were trained.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedConfig, Qwen3MoeConfig
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig

from benchmarks.chaos.model import save_tokenizer
from penstock.contracts import ScoredGroup
from penstock.contracts.log_ratios import SUFFIX, LogRatiosFile, unpack_log_ratios
from penstock_trainer.checkpoints.journal import Journal
from penstock_trainer.checkpoints.step_files import StepFiles
from tests.integration.launch.user_commands import UserCommands
from tests.tolerance import logprob_tolerance

pytestmark = [pytest.mark.redis, pytest.mark.slow]

NUM_STEPS = 4
BATCH_SIZE = 2
GROUP_SIZE = 6
MAX_NEW_TOKENS = 12
# Hardly ever equal for all completions of a step, which would then have no gradient and make no version.
DISTINCT = "def distinct(prompt, completion, answer, metadata):\n    return float(len(set(completion)))\n"
LONGEST = 6 + MAX_NEW_TOKENS

SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
}
EXPERTS: dict[str, Any] = {
    "num_hidden_layers": 3,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
}
LINEAR: dict[str, Any] = {
    "num_hidden_layers": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "full_attention_interval": 2,
}


@pytest.fixture
def user(tmp_path: Path) -> Iterator[UserCommands]:
    commands = UserCommands(tmp_path, tmp_path / "model")
    try:
        yield commands
    finally:
        commands.end()


@pytest.mark.timeout(900)
def test_a_mixture_of_experts_is_trained_through_the_experts_of_the_engine(
    user: UserCommands, sglang_python: str
) -> None:
    make_model(user, Qwen3MoeConfig(**SHAPE, **EXPERTS))
    train(user, sglang_python, router_replay=True)
    assert all(each.group.prompt_experts is not None for each in groups(user))


@pytest.mark.timeout(900)
def test_a_hybrid_of_recurrent_layers_and_attention_is_trained(user: UserCommands, sglang_python: str) -> None:
    make_model(user, Qwen3_5TextConfig(**SHAPE, **LINEAR))
    train(user, sglang_python)


def make_model(user: UserCommands, config: PreTrainedConfig) -> None:
    """A random one, in the form of published checkpoints."""
    folder = user.folder / "model"
    config.vocab_size = save_tokenizer(folder)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)


def train(user: UserCommands, sglang_python: str, **actor: Any) -> None:
    """A run of a few steps, to its end: each step trained what its own weights had sampled, and all of these moved."""
    user.write_rows(*({"prompt": f"{row}+1=", "answer": "a"} for row in range(NUM_STEPS * BATCH_SIZE)))
    del user.document["weights"]  # the engine computes the model, so that the canary is on
    user.document |= {
        "total_train_epochs": 1,
        "sampling": {"max_new_tokens": MAX_NEW_TOKENS},
        "optimizer": {"lr": 3.0e-3},
        "staleness": {"max_staleness": 0},
    }
    user.score_by("distinct", DISTINCT)
    user.document["actor"] |= {"group_size": GROUP_SIZE, **actor}
    user.document["rollout"]["engine"] |= {"python": sglang_python, "dtype": "float32", "max_total_tokens": 4096}
    code, output = user.launch()
    assert code == 0, output[-20_000:]
    assert_every_step_is_of_its_version(user)
    assert_every_push_arrived(user)
    assert_all_weights_moved(user)


def assert_every_step_is_of_its_version(user: UserCommands) -> None:
    """And every ticket is trained."""
    lines = steps(user)
    assert [line["version"] for line in lines] == list(range(1, NUM_STEPS + 1))
    assert [line["staleness_max"] for line in lines] == [0] * NUM_STEPS
    ledger = Journal(user.run_folder / "steps").read()
    assert sorted(ledger.policies) == list(range(NUM_STEPS + 1))
    assert len({policy.digest for policy in ledger.policies.values()}) == NUM_STEPS + 1
    num_tickets = NUM_STEPS * BATCH_SIZE
    summary = json.loads((user.run_folder / "summary.json").read_text())
    assert summary["tickets"] == {"issued": num_tickets, "trained": num_tickets, "dropped": {}, "outstanding": 0}


def assert_every_push_arrived(user: UserCommands) -> None:
    """Also of the first update, before which nothing was pushed but the model's own weights."""
    model = AutoModelForCausalLM.from_pretrained(user.run_folder / "final", dtype=torch.float32)
    tolerance = logprob_tolerance(model, LONGEST)
    found = list(log_ratios(user))
    assert len(found) == NUM_STEPS
    for ratios in found:
        assert ratios
        assert max(map(abs, ratios)) < tolerance
    for line in steps(user):
        assert line["statistics"]["behaviour_kl"] < tolerance**2  # half of it, to second order


def assert_all_weights_moved(user: UserCommands) -> None:
    """Each of them: what is not trained could not show that it was not pushed."""
    before, after = (
        load_file(each / "model.safetensors") for each in (user.folder / "model", user.run_folder / "final")
    )
    assert before.keys() == after.keys()
    assert [name for name in before if torch.equal(before[name], after[name])] == []


def steps(user: UserCommands) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (user.run_folder / "steps.jsonl").read_text().splitlines()]


def log_ratios(user: UserCommands) -> Iterator[list[float]]:
    """By step, of the tokens that it computed: the trainer's log-probability minus the engine's."""
    for path in sorted((user.run_folder / "steps").glob(f"*{SUFFIX}")):
        content = msgspec.msgpack.decode(path.read_bytes(), type=LogRatiosFile)
        values = [value for group in content.groups for data in group for value in unpack_log_ratios(data)]
        yield [value for value in values if not math.isnan(value)]


def groups(user: UserCommands) -> list[ScoredGroup]:
    files = StepFiles(user.run_folder / "steps", keep_bytes=0)
    return [each for record in Journal(user.run_folder / "steps").read().steps for each in files.read(record)]
