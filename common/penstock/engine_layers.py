"""Whether the engine builds the layers that a model's config.json names.

Shared by the launcher and both services that have the model: SGLang does not read some keys, loads what it can of such
a model and generates nonsense, or does not load it. Owns these keys, as SGLang 0.5.21 reads them (its models and
configs of Qwen).

    key                          what SGLang builds                 refused
    mlp_only_layers,             experts in all layers              a layer that is dense
    decoder_sparse_step
    layer_types                  full attention in every n-th       another order; a folder without n
                                 layer, n = full_attention_interval
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from penstock.errors import ConfigError

CONFIG_FILE = "config.json"
ALL_EXPERTS = frozenset({"qwen2_moe", "qwen3_moe", "qwen3_next"})
IN_INTERVALS = frozenset({"qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"})
INTERVAL = "full_attention_interval"
ALL_HAVE = "since SGLang takes all layers for ones with experts"
NONSENSE = "it would generate nonsense: choose another model"


def require_layers(path: str, key: str, config_file: str | None = None) -> None:
    """ConfigError that names `key` if the engine would build other layers than those of the model `path`.

    `config_file`: of a name on the hub, once it has been fetched. A model without a file that can be read is left to
    those that load it.
    """
    try:
        config = json.loads(Path(config_file or Path(path) / CONFIG_FILE).read_bytes())
    except (OSError, ValueError):
        return
    for part in (config, config.get("text_config") or {}):
        wrong = _dense_layers(part) or _other_order(part)
        if wrong:
            raise ConfigError(f"{key} is {path!r}, whose {CONFIG_FILE} has {wrong}")


def _dense_layers(config: Mapping[str, Any]) -> str:
    """What says that layers have no experts, and the way out; empty if all have some, or SGLang reads it."""
    if config.get("model_type") not in ALL_EXPERTS:
        return ""
    num_layers, step = config.get("num_hidden_layers") or 0, config.get("decoder_sparse_step") or 1
    dense = [each for each in config.get("mlp_only_layers") or () if each < num_layers]
    if dense:
        return f"mlp_only_layers {dense}: expected none, {ALL_HAVE}; {NONSENSE}"
    if step != 1:
        return f"decoder_sparse_step {step}: expected 1, {ALL_HAVE}; {NONSENSE}"
    return ""


def full_attention_interval(layer_types: list[str]) -> int | None:
    """n if each n-th layer has full attention and the others are linear; None of another order, or without both.

    >>> full_attention_interval(["linear_attention", "full_attention"] * 2)
    2
    >>> full_attention_interval(["full_attention", "linear_attention"]) is None
    True
    """
    if set(layer_types) != {"linear_attention", "full_attention"}:
        return None
    interval = layer_types.index("full_attention") + 1
    return interval if layer_types == _order(interval, len(layer_types)) else None


def _order(interval: int, num_layers: int) -> list[str]:
    return ["linear_attention" if number % interval else "full_attention" for number in range(1, num_layers + 1)]


def _other_order(config: Mapping[str, Any]) -> str:
    """What says that layers are in another order than SGLang builds, and the way out; empty if they are not."""
    if config.get("model_type") not in IN_INTERVALS:
        return ""
    interval, layer_types = config.get(INTERVAL), config.get("layer_types")
    if not isinstance(interval, int) or interval < 1:
        found = full_attention_interval(layer_types or [])
        return (
            f"{INTERVAL} {interval!r}: expected a number, since SGLang reads no other key for the order of layers and "
            f"does not load the model without it; add {INTERVAL} to its {CONFIG_FILE}"
            + (f" ({found} by its layer_types)" if found else "")
        )
    if layer_types is not None and layer_types != _order(interval, len(layer_types)):
        return (
            f"layer_types {layer_types} beside {INTERVAL} {interval}: expected full attention in each layer whose "
            f"number is a multiple of it, since SGLang reads that key alone; {NONSENSE}"
        )
    return ""
