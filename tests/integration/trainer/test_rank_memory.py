"""The estimate of a sharded trainer's memory against what two real ranks hold."""

from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.memory_estimate import Case, run_case
from tests.unit.launch.gpus.test_trainer_memory import FEW_BYTES, SHAPE, WITHIN

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "case", [Case("bfloat16", 256, num_ranks=2), Case("float32", 128, lora_rank=8, num_ranks=2)], ids=str
)
def test_estimate_is_near_what_each_rank_holds(tmp_path: Path, case: Case) -> None:
    LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True)).save_pretrained(tmp_path / "model")
    result = run_case(case, str(tmp_path / "model"), tmp_path)
    seen, held = result["counted"], result["held_estimate"]
    assert 0 <= seen["held_bytes"] - held < FEW_BYTES
    moving = seen["peak_bytes"] - seen["held_bytes"]
    assert result["estimate"] - held == pytest.approx(moving, rel=WITHIN), result["parts"]
