"""Checksums of the engine's tensors against the files, as SGLang names, joins and pads them."""

import hashlib
import json
import re
import struct
from pathlib import Path

import pytest

from penstock.errors import WeightsMismatchError
from penstock_rollout.engine.sglang.checksums import check_checksums

LAYER = "model.layers.0."
TENSORS = {
    "model.embed_tokens.weight": ([3, 2], b"emb" * 2),
    f"{LAYER}self_attn.q_proj.weight": ([2], b"qq"),
    f"{LAYER}self_attn.k_proj.weight": ([1], b"k"),
    f"{LAYER}self_attn.v_proj.weight": ([1], b"v"),
    f"{LAYER}mlp.gate_proj.weight": ([2], b"gg"),
    f"{LAYER}mlp.up_proj.weight": ([2], b"uu"),
    f"{LAYER}mlp.down_proj.weight": ([2], b"dd"),
}


def checksum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


PADDED = checksum(b"embemb" + bytes(2 * 61))
REPORTED = {
    "model.embed_tokens.weight": PADDED,
    "lm_head.weight": PADDED,  # tied, so in no file
    f"{LAYER}self_attn.qkv_proj.weight": checksum(b"qqkv"),
    f"{LAYER}mlp.gate_up_proj.weight": checksum(b"gguu"),
    f"{LAYER}mlp.down_proj.weight": checksum(b"dd"),
    f"{LAYER}self_attn.rotary.scale": "0" * 16,  # only the engine has it
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    records, data = {"__metadata__": {"format": "pt"}}, b""
    for name, (shape, content) in TENSORS.items():
        record = {"dtype": "U8", "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
        records[name] = record  # type: ignore[assignment]
        data += content
    header = json.dumps(records).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data)
    return tmp_path


def test_joined_and_padded_tensors_are_compared_and_unknown_ones_left_out(folder: Path) -> None:
    assert check_checksums(folder, REPORTED) == len(REPORTED) - 1


@pytest.mark.parametrize("name", [name for name in REPORTED if "rotary" not in name])
def test_any_other_byte_is_named(folder: Path, name: str) -> None:
    with pytest.raises(WeightsMismatchError, match=rf"1 of 5 tensors with other bytes .*{re.escape(name)}"):
        check_checksums(folder, {**REPORTED, name: "f" * 16})


def test_tensors_of_which_none_is_known_prove_nothing(folder: Path) -> None:
    with pytest.raises(WeightsMismatchError, match="0 of 0 tensors"):
        check_checksums(folder, {"transformer.wte": "0" * 16})
