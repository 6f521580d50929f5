"""What a model's files say of its shape: config.json, and the headers of its safetensors files.

Owns reading them without torch: the launcher must know how large a model is before a process loads it. Invariant: the
weights of a folder with safetensors files are counted from their headers; only without such files are they derived from
config.json, for models that are built like Llama.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from penstock.errors import WeightsError
from penstock.weights.manifest import WEIGHT_FILES, tensor_shapes

Shapes = Mapping[str, tuple[int, ...]]
LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")


class NoShapeError(Exception):
    """The shape of a model cannot be known before it is loaded; the text is the reason."""


@dataclass(frozen=True)
class ModelShape:
    """A causal language model. weights: name -> shape, of tied ones only the first.

    intermediate_size: width of the multi-layer perceptron that one token passes; with experts, of those together that
    it is sent to.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    head_size: int
    vocab_size: int
    context_length: int
    weights: Shapes

    @cached_property
    def num_weights(self) -> int:
        return sum(map(prod, self.weights.values()))

    @cached_property
    def layer(self) -> Shapes:
        """The weights of the largest layer."""
        layers: dict[int, dict[str, tuple[int, ...]]] = {}
        for name, shape in self.weights.items():
            if found := LAYER.search(name):
                layers.setdefault(int(found[1]), {})[name] = shape
        return max(layers.values(), key=_num_weights, default={})

    @cached_property
    def outside(self) -> Shapes:
        """The weights outside of layers: embeddings, the last norm, the projection."""
        return {name: shape for name, shape in self.weights.items() if not LAYER.search(name)}

    @property
    def layer_weights(self) -> int:
        return _num_weights(self.layer)

    @property
    def layer_matrices(self) -> Shapes:
        """Name -> [outputs, inputs] of the linear maps of a layer; of experts, all of them."""
        return {name: shape for name, shape in self.layer.items() if len(shape) > 1}

    @property
    def outside_weights(self) -> int:
        return _num_weights(self.outside)

    @property
    def projection_weights(self) -> int:
        """Of the projection onto the vocabulary, which may be the embeddings."""
        return self.vocab_size * self.hidden_size

    @property
    def is_tied(self) -> bool:
        """Whether the projection is the embeddings."""
        return self.outside_weights < 2 * self.projection_weights

    @property
    def is_gated(self) -> bool:
        """Whether the multi-layer perceptron has a gate beside its first map."""
        return any("gate" in name for name in self.layer)

    @property
    def normalizes_heads(self) -> bool:
        """Whether queries and keys are normalized."""
        return any("q_norm" in name for name in self.layer)


def read_shape(path: str) -> ModelShape:
    """The model of a folder, or of a hub name that this host has loaded before. NoShapeError if it cannot be known."""
    folder = _folder(path)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        weights = {name: shape for file in _weight_files(folder) for name, shape in tensor_shapes(file).items()}
        return shape_of_config(config, weights)
    except (OSError, ValueError, KeyError, TypeError, WeightsError) as error:
        raise NoShapeError(f"{folder} cannot be read ({error})") from error


def shape_of_config(config: Mapping[str, Any], weights: Shapes | None = None) -> ModelShape:
    """From the content of config.json; without `weights`, those of a model that is built like Llama."""
    if not isinstance(config, Mapping):
        raise NoShapeError("config.json is no JSON object")
    nested = config.get("text_config")
    text = nested if isinstance(nested, Mapping) else config
    try:
        hidden, heads = int(text["hidden_size"]), int(text["num_attention_heads"])
        layers, vocab = int(text["num_hidden_layers"]), int(text["vocab_size"])
        inner = int(text.get("moe_intermediate_size") or text["intermediate_size"])
    except (KeyError, TypeError) as error:
        raise NoShapeError(f"config.json of a {text.get('model_type')} model has no {error}") from error
    if min(hidden, heads, layers, vocab, inner) < 1:
        raise NoShapeError("config.json has a size below 1")
    experts = int(text.get("num_experts_per_tok") or 1)
    shape = ModelShape(
        hidden_size=hidden,
        intermediate_size=inner * experts,
        num_layers=layers,
        num_heads=heads,
        num_key_value_heads=int(text.get("num_key_value_heads") or heads),
        head_size=int(text.get("head_dim") or hidden // heads),
        vocab_size=vocab,
        context_length=int(text.get("max_position_embeddings") or 0),
        weights=weights or {},
    )
    tied = bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", False)))
    if not weights:
        if experts > 1:
            raise NoShapeError("a model with experts has no safetensors files to count its weights from")
        weights = dict(_like_llama(shape, text, tied=tied))
    counted = {name: each for name, each in weights.items() if not (tied and name.endswith("lm_head.weight"))}
    return ModelShape(**{**vars(shape), "weights": counted})


def _folder(path: str) -> Path:
    folder = Path(path)
    if (folder / "config.json").is_file():
        return folder
    try:  # only a hub name needs it, and its import takes a while
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError
    except ModuleNotFoundError as error:
        raise NoShapeError(f"{path!r} may be a hub name, and huggingface_hub is not installed here") from error
    try:
        cached = try_to_load_from_cache(path, "config.json")
    except HFValidationError as error:
        raise NoShapeError(f"{path!r} is no folder with config.json") from error
    if not isinstance(cached, str):
        raise NoShapeError(f"{path!r} is a hub name, and this host has not loaded it yet")
    return Path(cached).parent


def _weight_files(folder: Path) -> list[Path]:
    """None unless all are there: a download may have ended early."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return sorted(folder.glob(WEIGHT_FILES))
    names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    files = [folder / name for name in sorted(names)]
    return files if all(file.is_file() for file in files) else []


def _like_llama(shape: ModelShape, text: Mapping[str, Any], *, tied: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner = shape.hidden_size, shape.intermediate_size
    queries, keys = shape.num_heads * shape.head_size, shape.num_key_value_heads * shape.head_size
    has_bias = text.get("attention_bias", text.get("model_type") == "qwen2")
    yield "model.embed_tokens.weight", (shape.vocab_size, hidden)
    for number in range(shape.num_layers):
        layer = f"model.layers.{number}"
        for name, size in (("q", queries), ("k", keys), ("v", keys)):
            yield f"{layer}.self_attn.{name}_proj.weight", (size, hidden)
            if has_bias:
                yield f"{layer}.self_attn.{name}_proj.bias", (size,)
        if text.get("model_type") == "qwen3":
            yield f"{layer}.self_attn.q_norm.weight", (shape.head_size,)
            yield f"{layer}.self_attn.k_norm.weight", (shape.head_size,)
        yield f"{layer}.self_attn.o_proj.weight", (hidden, queries)
        yield f"{layer}.mlp.gate_proj.weight", (inner, hidden)
        yield f"{layer}.mlp.up_proj.weight", (inner, hidden)
        yield f"{layer}.mlp.down_proj.weight", (hidden, inner)
        yield f"{layer}.input_layernorm.weight", (hidden,)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    if not tied:
        yield "lm_head.weight", (shape.vocab_size, hidden)


def _num_weights(shapes: Shapes) -> int:
    return sum(map(prod, shapes.values()))
