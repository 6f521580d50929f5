"""Saves the final weights as a folder that `AutoModelForCausalLM.from_pretrained` loads.

The bytes are those of the last published version: rounded as servers got them, with a merged adapter. The folder also
holds the adapter alone, in peft's own format.
"""

import copy
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
from transformers import PreTrainedModel
from transformers.utils.hub import cached_file

from penstock.contracts import Dtype
from penstock.durable import RUN_FOLDER_KEY, writing
from penstock.engine_layers import INTERVAL, full_attention_interval
from penstock.records.files import TRAINED_FILE
from penstock_trainer.weights.files import (
    WEIGHTS_NAME,
    Format,
    Weights,
    write_weights,
)

ADAPTER_FOLDER = "adapter"  # in the folder of exported weights
COPIED_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


def config_json(model: PreTrainedModel, dtype: Dtype) -> bytes:
    """The model's config.json for weights in `dtype`.

    transformers drops a key, once it has the layers that it means, which an engine reads instead of them.
    """
    config = copy.deepcopy(model.config)
    config.dtype = dtype
    config.architectures = [type(model).__name__]
    if (interval := full_attention_interval(getattr(config, "layer_types", None) or [])) is not None:
        setattr(config, INTERVAL, interval)
    return config.to_json_string().encode()


def save_folder(
    model: PreTrainedModel,
    weights: Weights,
    original: str,
    folder: Path,
    form: Format,
    save_adapter: Callable[[Path], None] | None,
    num_steps: int,
    key: str = RUN_FOLDER_KEY,
) -> None:
    """Write weights, config and the files of `original` that come with a tokenizer; replaces an earlier folder.

    `num_steps`: that it was trained for, which the folder says too. `key`: what chooses another folder. PenstockError,
    and nothing left behind, if there is no room.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with writing(f"model {folder}", key):
            temporary.mkdir(parents=True)
            write_weights(temporary / WEIGHTS_NAME, weights, form, durable=True)
            (temporary / "config.json").write_bytes(config_json(model, form.dtype))
            (temporary / TRAINED_FILE).write_bytes(msgspec.json.encode({"steps": num_steps}) + b"\n")
            if save_adapter is not None:
                save_adapter(temporary / ADAPTER_FOLDER)
            for name in COPIED_FILES:
                found = cached_file(original, name, _raise_exceptions_for_missing_entries=False)
                if found is not None:
                    shutil.copyfile(found, temporary / name)
            shutil.rmtree(folder, ignore_errors=True)
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
