"""LoRA through peft: trained low-rank matrices next to frozen weights.

    W x + (alpha / rank) B A x        W [out, in] frozen, A [rank, in], B [out, rank]; arXiv 2106.09685

Owns which layers are adapted, the first values of A and B, and the merged weights W + (alpha / rank) B A under the
names of the model without an adapter. Invariant: W never changes; A and B are float32, and their first values depend on
run.seed and the model's shapes alone, so that a restart and every rank have the same; B begins as 0, and merged weights
are then W bit for bit. There is no dropout: ratios need one function. Weights may be sharded over ranks, which then
merge them together. peft is an extra, imported when a model is adapted.
"""

import contextlib
import copy
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import xxhash
from torch import Tensor, nn
from transformers import PreTrainedModel

from penstock.config import Config, LoraSection
from penstock.errors import ConfigError
from penstock_trainer.batching.packing import Pack
from penstock_trainer.model.experts import has_fused_experts
from penstock_trainer.model.fsdp import full_tensor
from penstock_trainer.model.token_model import TokenModel
from penstock_trainer.weights.files import (
    Format,
    LazyWeights,
    LiveWeights,
    Weights,
    master_weights,
    published_weights,
    write_weights,
)

if TYPE_CHECKING:
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer

NAME = "default"  # peft's own name for an adapter that was given none
FILE = "adapter_model.safetensors"
PARTS_OF_EXPERTS = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}  # of any layer, to peft
SAMPLED_VALUES = 2**16  # of each weight: any training changes some of them, and reading them costs nothing
ALPHA, BASE = "lora.alpha", "lora.base"


class Adapter:
    """The adapter of one model.

    Its methods take the model's `master_weights`, which hold base and adapter, and the base's own names.
    """

    def __init__(self, model: PreTrainedModel, section: LoraSection, *, path: str, seed: int) -> None:
        """Adapt the model of `path` in place, on the CPU; ConfigError when peft or a target is missing."""
        _check_peft(section)
        base = master_weights(model)
        self._section = section
        self._base_names = tuple(base)
        self._fingerprint = _fingerprint(base)
        targets = _targets(model, section)
        self._config, self._layers = _inject(model, section, path, targets)
        if self._layers.keys() != targets:
            differing = sorted(self._layers.keys() ^ targets)
            raise ConfigError(
                f"actor.lora.target_modules is {_shown(section)}, by which peft adapts other layers than the linear "
                f"ones of that name, first {differing[0]}: expected linear layers; name those to adapt"
            )
        self._trained_names = {name: None for module in self._layers for name in _pair(module)}  # in order
        self._initialize(model, seed)

    def _initialize(self, model: PreTrainedModel, seed: int) -> None:
        """As in the paper's code: A uniform within 1 / sqrt(in), B zero."""
        generator = torch.Generator().manual_seed(seed)
        for module in self._layers:
            a, b = (model.get_parameter(name) for name in _pair(module))
            nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
            nn.init.zeros_(b)

    def base(self, masters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The frozen weights, by the base's own names."""
        return {name: masters[self._beside(name)] for name in self._base_names}

    def trained(self, masters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A and B of every adapted layer."""
        return {name: masters[name] for name in self._trained_names}

    def full_weight(self, masters: Mapping[str, Tensor], name: str) -> Tensor:
        """The full merged weight `name` of the base, float32, or the full A or B of that name."""
        if name in self._trained_names:
            return full_tensor(masters[name])
        weight = full_tensor(masters[self._beside(name)])
        module, _, leaf = name.rpartition(".")
        if module not in self._layers or leaf != "weight":
            return weight
        a, b = (full_tensor(masters[each]) for each in _pair(module))
        if not b.any():
            return weight  # adding 0 would make 0 of -0
        return torch.addmm(weight, b, a, alpha=self._section.alpha / self._section.rank)

    def _beside(self, name: str) -> str:
        """The name of the base's weight `name` in the adapted model."""
        module, _, leaf = name.rpartition(".")
        return f"{module}.base_layer.{leaf}" if module in self._layers else name

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Within it the model computes without its adapter.

        peft's own switch also clears requires_grad, which FSDP reads at a layer's first use and never again.
        """
        self._switch(off=True)
        try:
            yield
        finally:
            self._switch(off=False)

    def _switch(self, *, off: bool) -> None:
        for layer in self._layers.values():
            layer._disable_adapters = off
            assert layer.disable_adapters is off

    def marks(self) -> dict[str, Tensor]:
        """Values that must agree before A and B of a checkpoint can be loaded: alpha, and a fingerprint of W."""
        return {ALPHA: torch.tensor(self._section.alpha), BASE: torch.tensor(self._fingerprint)}

    def check_marks(self, folder: Path, found: Mapping[str, Tensor]) -> None:
        """ConfigError if the checkpoint in `folder` is of another alpha or base."""
        alpha = int(found[ALPHA])
        if alpha != self._section.alpha:
            raise ConfigError(
                f"checkpoint {folder} was trained with actor.lora.alpha {alpha}, which is {self._section.alpha} now: "
                "expected the same; set it back or choose another run.name"
            )
        if int(found[BASE]) != self._fingerprint:
            raise ConfigError(
                f"checkpoint {folder} holds an adapter of other weights than those of actor.path: expected the model "
                "that it was trained for; set actor.path back or choose another run.name"
            )

    def save(self, folder: Path, get: Callable[[str], Tensor]) -> None:
        """In peft's own format, as `PeftModel.from_pretrained` loads it. `get`: name of an A or B -> its full value."""
        folder.mkdir()
        tensors = {f"base_model.model.{name.replace(f'.{NAME}.', '.')}": get(name) for name in self._trained_names}
        write_weights(folder / FILE, LiveWeights(tensors), Format("float32", "nearest"), durable=True)
        config = copy.copy(self._config)
        config.inference_mode = True
        config.target_modules = sorted(config.target_modules or ())  # a set has no order
        config.save_pretrained(str(folder))


class WithoutAdapter:
    """The base of an adapted policy as the reference, without a second model."""

    def __init__(self, policy: TokenModel, adapter: Adapter) -> None:
        self._policy = policy
        self._adapter = adapter
        self.shares_prefixes = policy.shares_prefixes
        self.expert_use = policy.expert_use

    def token_logprobs(self, pack: Pack, *, entropy_gradient: bool = False) -> tuple[Tensor, Tensor]:
        """As `PackModel.token_logprobs`."""
        with self._adapter.off():
            return self._policy.token_logprobs(pack, entropy_gradient=entropy_gradient)


def adapted(model: PreTrainedModel, config: Config) -> Adapter | None:
    """The adapter of `config`, attached to the model of actor.path; None without one."""
    section = config.actor.lora
    return Adapter(model, section, path=config.actor.path, seed=config.run.seed) if section.rank else None


def merged_weights(model: PreTrainedModel, adapter: Adapter | None) -> Weights:
    """`published_weights` of a model on one rank, each merged when it is read."""
    if adapter is None:
        return published_weights(model)
    masters = master_weights(model)
    return LazyWeights(model, adapter.base(masters), lambda name: adapter.full_weight(masters, name))


def _check_peft(section: LoraSection) -> None:
    try:
        import peft  # noqa: F401
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"actor.lora.rank is {section.rank}, and {error.name} is not installed: expected peft; "
            "`pip install 'penstock[lora]'`, or set actor.lora.rank to 0"
        ) from error


def _targets(model: PreTrainedModel, section: LoraSection) -> set[str]:
    """Names of the layers to adapt; ConfigError for a target that is no layer, or shares its weight with another."""
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    mixed = PARTS_OF_EXPERTS if has_fused_experts(model) else set()
    if section.target_modules == "all-linear":
        head = model.get_output_embeddings()
        chosen = {name for name, module in linear.items() if module is not head and _end(name) not in mixed}
    else:
        chosen = set()
        for target in section.target_modules:
            matching = {name for name in linear if name == target or name.endswith(f".{target}")}
            if not matching:
                raise ConfigError(
                    f"actor.lora.target_modules names {target!r}, and no linear layer of actor.path has this name: "
                    f"expected some of {_ends(linear)}, or all-linear"
                )
            if _end(target) in mixed:
                raise ConfigError(
                    f"actor.lora.target_modules names {target!r} of a {type(model).__name__}: expected layers outside "
                    "of its experts, since peft takes this name for theirs; leave it out (docs/models.md)"
                )
            chosen |= matching
    if not chosen:
        raise ConfigError(
            f"actor.lora.rank is {section.rank}, and {type(model).__name__} has no linear layer to adapt: expected "
            "a model with some; set actor.lora.rank to 0"
        )
    uses = Counter(id(weight) for weight in model.state_dict(keep_vars=True).values())
    shared = sorted(name for name in chosen if uses[id(linear[name].weight)] > 1)
    if shared:
        raise ConfigError(
            f"actor.lora.target_modules names {shared[0]!r}, whose weight another layer of actor.path uses too: "
            "expected layers with weights of their own, as merging changes them; leave it out"
        )
    return chosen


def _end(name: str) -> str:
    return name.rpartition(".")[2]


def _ends(names: Mapping[str, object]) -> str:
    return ", ".join(sorted(set(map(_end, names))))


def _shown(section: LoraSection) -> str:
    return section.target_modules if isinstance(section.target_modules, str) else ", ".join(section.target_modules)


def _inject(
    model: PreTrainedModel, section: LoraSection, path: str, chosen: set[str]
) -> "tuple[LoraConfig, dict[str, LoraLayer]]":
    """Let peft replace the chosen layers and freeze the rest."""
    from peft import LoraConfig, TaskType, inject_adapter_in_model
    from peft.tuners.lora import Linear, LoraLayer

    targets = section.target_modules
    if targets == "all-linear" and has_fused_experts(model):  # for peft that has their fused experts, too
        targets = tuple(sorted(set(map(_end, chosen))))
    config = LoraConfig(
        r=section.rank,
        lora_alpha=section.alpha,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=path,
    )
    with torch.random.fork_rng(devices=[]):  # peft draws first values, which are then replaced
        inject_adapter_in_model(config, model, NAME)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    assert all(isinstance(layer, Linear) for layer in layers.values())
    return config, layers


def _pair(module: str) -> tuple[str, str]:
    """Names of A and B."""
    return f"{module}.lora_A.{NAME}.weight", f"{module}.lora_B.{NAME}.weight"


def _fingerprint(weights: Mapping[str, Tensor]) -> int:
    """63 bits that differ for weights of another model, or of another training of it."""
    digest = xxhash.xxh3_64()
    for name, weight in weights.items():
        digest.update(name.encode())
        digest.update(weight.reshape(-1)[:SAMPLED_VALUES].contiguous().view(torch.uint8).numpy().tobytes())
    return digest.intdigest() >> 1
