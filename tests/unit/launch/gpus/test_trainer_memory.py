"""The estimate of a trainer's memory against the tensors that real updates hold."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from benchmarks.counted_memory import counted, groups_of, held_bytes
from benchmarks.memory_estimate import HELD, Case, config_of, staged_bytes
from penstock.config import Config
from penstock_launch.gpus.model_shape import read_shape
from penstock_launch.gpus.trainer_memory import BLOCK_BYTES, CHUNK_BYTES, host_need, trainer_need
from penstock_trainer.learner.learner import Learner
from penstock_trainer.model import pack_model, token_logprobs

SHAPE: dict[str, Any] = {
    "vocab_size": 1500,
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
}
FEW_BYTES = 16 * 1024  # steps of the optimizer, the random state, tables of positions
WITHIN = 0.15  # of what comes and goes; weights and moments are exact


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A model that ties its embeddings, and one that normalizes heads and does not."""
    folder = Path(tmp_path_factory.mktemp("shapes"))
    LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True)).save_pretrained(folder / "llama")
    Qwen3ForCausalLM(Qwen3Config(**SHAPE, tie_word_embeddings=False)).save_pretrained(folder / "qwen3")
    return {name: str(folder / name) for name in ("llama", "qwen3")}


CASES = [
    ("llama", Case("bfloat16", 256)),
    ("llama", Case("float32", 256)),
    ("llama", Case("bfloat16", 256, checkpointing=True)),
    ("llama", Case("bfloat16", 256, lora_rank=8)),
    ("llama", Case("float32", 128, lora_rank=8, kl_ctl=0.1)),
    ("qwen3", Case("bfloat16", 128, kl_ctl=0.1)),
    ("qwen3", Case("float32", 128, teacher=True)),
    ("llama", Case("float32", 128, lora_rank=8, teacher=True)),
    ("qwen3", Case("float32", 256, checkpointing=True)),
]


@pytest.mark.parametrize(("model", "case"), CASES, ids=[f"{model}: {case}" for model, case in CASES])
def test_estimate_is_near_what_an_update_holds(models: dict[str, str], model: str, case: Case) -> None:
    config = config_of(case, models[model])
    before = held_bytes()  # of other tests
    learner = Learner(config)
    groups = groups_of(case.rows, 2, range(3, SHAPE["vocab_size"]))
    update = partial(learner.update, groups, version=0)
    update()
    seen = counted(update)
    need = trainer_need(config, read_shape(models[model]), device="cpu")
    held = sum(map(need.of, HELD))
    others = seen.held_bytes - before - held
    assert 0 <= others < FEW_BYTES, f"{others} bytes are held that are neither weights nor moments: count their kind"
    estimate, moving = need.num_bytes - held, seen.peak_bytes - seen.held_bytes
    assert estimate == pytest.approx(moving, rel=WITHIN), need.parts


def test_copies_for_a_push_and_a_checkpoint_are_counted(models: dict[str, str], tmp_path: Path) -> None:
    follows = {"kl_ctl": 0.1, "ref": {"sync_steps": 2}}
    for case, changes in (
        (Case("bfloat16", 64), {}),
        (Case("float32", 64, lora_rank=4), {}),
        (Case("float32", 64), follows),
    ):
        config = Config.model_validate(config_of(case, models["llama"]).model_dump() | changes)
        learner, need = Learner(config), host_need(config, read_shape(models["llama"]))
        for version in range(2):  # a reference that has not moved yet is in no checkpoint
            learner.update(groups_of(case.rows, 2, range(3, SHAPE["vocab_size"])), version=version)
        saved = sum(each.nbytes for each in learner.snapshot(tmp_path).state.values())
        assert 0 <= saved - need.of("copy for a checkpoint") < FEW_BYTES
        assert staged_bytes(learner) == need.of("staged weights")


def test_sizes_of_chunks_are_those_of_the_trainer() -> None:
    assert CHUNK_BYTES == pack_model.MAX_LOGIT_BYTES
    assert BLOCK_BYTES == {"cpu": token_logprobs.CPU_BLOCK_BYTES, "cuda": token_logprobs.GPU_BLOCK_BYTES}
