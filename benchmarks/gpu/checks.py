"""Checks that the trainer computes the same on this GPU as by definition: nothing here is about speed.

Owns what is compared and how much may differ. Each figure is the norm of a difference over the norm of what is right,
unless it says otherwise, with the limit that it must not pass. The right side is in float32, on the same device.
"""

import gc
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM

from benchmarks import weight_delta
from benchmarks.gpu.options import Options
from benchmarks.gpu.record import Recorder
from benchmarks.gpu.shapes import Shape, save_random, shapes
from benchmarks.learner_cases import Case, ragged_case, scored_groups, short_case
from benchmarks.learner_plain import MAX_GRAD_NORM, PlainTrainer
from benchmarks.learner_side import LR, Behaviour, kept_gradients, relative_difference
from penstock.config import Config
from penstock.contracts import Dtype, ScoredGroup
from penstock.weights.local_folder import shared_memory
from penstock_trainer.batching.batch import make_batch
from penstock_trainer.batching.packing import make_packs, pack_of_sequence
from penstock_trainer.learner.learner import Learner
from penstock_trainer.learner.recipe import make_recipe
from penstock_trainer.model.attention import TrieAttention, trie_attention, trie_mask
from penstock_trainer.model.token_logprobs import Projection, projected_logprobs
from penstock_trainer.weight_sync.canary import BFLOAT16_TOLERANCE, FLOAT32_TOLERANCE
from penstock_trainer.weights.files import Format, LiveWeights, digests

ROUNDING: dict[Dtype, float] = {"float32": 1e-4, "bfloat16": 0.02}
"""Limits: float32 sums thousands of numbers in another order; one bfloat16 rounds by up to 0.004, and a few follow."""
GRADIENT: dict[Dtype, float] = {"float32": 1e-3, "bfloat16": 0.05}
"""Through all layers of a model; 0.01 in bfloat16 with 135M random weights on a CPU."""
HEADS = {"135M": (9, 3, 64), "1.5B": (12, 2, 128)}
CPU_HEADS = {"tiny": (4, 2, 16)}
DELTA_LR = 1e-5  # changes some of the published weights each step, as in a run
LEARNER_SECONDS = 60.0


def run(options: Options, record: Recorder) -> None:
    """All checks, the ones that most depends on first."""
    check_attention(options, record)
    with record.attempt("head in chunks"):
        check_head(options, record)
    shape = shapes(cpu=options.cpu)[0]
    with tempfile.TemporaryDirectory(prefix="penstock-checks-") as folder:
        model = save_random(shape, Path(folder) / "model", options.device)
        if record.has_time("learner", LEARNER_SECONDS):
            with record.attempt("learner"):
                check_learner(options, record, model, shape)
        if record.has_time("weights", LEARNER_SECONDS / 2):
            with record.attempt("weights"):
                check_weights(options, record, model, shape)


def dtypes(options: Options) -> tuple[Dtype, ...]:
    return ("float32",) if options.cpu else ("float32", "bfloat16")


# Attention over tries: the product's own function, by FlexAttention on a GPU, against the dense mask.


class _Layer(nn.Module):
    """What transformers' attention interface reads from a layer."""

    is_causal = True

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.num_key_value_groups = groups


def pack_shapes(*, cpu: bool) -> Iterator[tuple[str, Tensor]]:
    """Names and subtree ends: single sequences around the size of a block, and packs as batches give them."""
    for length in (2, 100) if cpu else (2, 100, 129, 130, 1025, 4097):
        yield f"sequence of {length - 1}", pack_of_sequence(range(length)).subtree_end_P
    cases = {"ragged": ragged_case(1 if cpu else 4), "short": short_case()}
    for name, case in cases.items():
        for rows in (256,) if cpu else (1000, 16384):
            samples = make_batch(groups_of(case), make_recipe(config_of(Path("unused"), "float32")).rules, version=0)
            for number, pack in enumerate(make_packs(samples.samples, rows)[:2]):
                yield f"{name}, pack {number} of {pack.num_rows}", pack.subtree_end_P


def check_attention(options: Options, record: Recorder) -> None:
    heads = CPU_HEADS if options.cpu else HEADS
    for model, sizes in heads.items():
        for name, subtree_end_P in pack_shapes(cpu=options.cpu):
            for dtype in dtypes(options):
                case = f"attention, {model}, {name}, {dtype}"
                if not record.has_time(case, 5):
                    return
                with record.attempt(case):
                    seen, right = _attended(subtree_end_P.to(options.device), sizes, dtype)
                    record.figure(case, "output", _relative(seen[:1], right[:1]), limit=ROUNDING[dtype])
                    record.figure(case, "gradients", _relative(seen[1:], right[1:]), limit=ROUNDING[dtype])
    if not options.cpu:
        record.figure("attention", "graphs compiled", counters["stats"]["unique_graphs"], limit=64)
        with record.attempt("attention, a long pack"):
            _check_memory(record)


def _attended(subtree_end_P: Tensor, sizes: tuple[int, int, int], dtype: Dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Output and gradients of queries, keys and values: by the product, and with the dense mask in float32."""
    num_heads, num_key_heads, size = sizes
    generator = torch.Generator(device=subtree_end_P.device).manual_seed(subtree_end_P.numel())
    layer = _Layer(num_heads // num_key_heads)
    drawn = [
        torch.randn(1, subtree_end_P.numel(), heads, size, generator=generator, device=subtree_end_P.device)
        .to(getattr(torch, dtype))
        .transpose(1, 2)
        for heads in (num_heads, num_key_heads, num_key_heads)
    ]

    def outcome(tensors: list[Tensor], mask: Tensor | None, trie: TrieAttention | None) -> list[Tensor]:
        inputs = [each.detach().requires_grad_() for each in tensors]
        output, _ = trie_attention(layer, inputs[0], inputs[1], inputs[2], mask, trie=trie)
        return [output.detach(), *torch.autograd.grad(output.float().sin().sum(), inputs)]

    dense = outcome([each.float() for each in drawn], trie_mask(subtree_end_P, torch.float32), None)
    return outcome(drawn, None, TrieAttention.of(subtree_end_P)), dense


def _check_memory(record: Recorder) -> None:
    """A long pack must not take what its dense scores would, which the uncompiled form does."""
    num_rows, num_heads = 32768, 9
    query = torch.randn(1, num_heads, num_rows, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    subtree_end_P = torch.full((num_rows,), num_rows, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    output, _ = trie_attention(_Layer(1), query, query, query, None, trie=TrieAttention.of(subtree_end_P))
    output.float().sum().backward()
    share = (torch.cuda.max_memory_allocated() - before) / (2 * num_heads * num_rows**2)
    record.figure("attention, a pack of 32768", "peak memory / dense scores", share, limit=0.2)


def _relative(seen: list[Tensor], right: list[Tensor]) -> float:
    """The largest of the tensors' relative differences."""
    return max(
        float((one.float() - other.float()).norm() / other.float().norm())
        for one, other in zip(seen, right, strict=True)
    )


# The vocabulary projection in chunks, against all logits at once.


@dataclass(frozen=True)
class _Head:
    """Hidden states, the projection, and the pairs (row, token) that are asked for."""

    hidden_RD: Tensor
    linear: nn.Linear
    row_U: Tensor
    token_U: Tensor


def check_head(options: Options, record: Recorder) -> None:
    num_rows, size, vocabulary = (64, 32, 500) if options.cpu else (2048, 896, 151936)
    torch.manual_seed(0)
    with torch.device(options.device):
        head = _Head(
            torch.randn(num_rows, size),
            nn.Linear(size, vocabulary, bias=False),
            torch.arange(num_rows).repeat_interleave(2),
            torch.randint(vocabulary, (2 * num_rows,)),
        )
    right = _head_outcome(head, lambda hidden_RD: _all_logits(head, hidden_RD))
    for dtype in dtypes(options):
        projection = Projection(num_rows // 3 + 1, getattr(torch, dtype), 0.7, entropy_gradient=True)

        def chunked(hidden_RD: Tensor, projection: Projection = projection) -> tuple[Tensor, Tensor]:
            return projected_logprobs(hidden_RD, head.linear, head.row_U, head.token_U, projection)

        seen = _head_outcome(head, chunked)
        case = f"head in chunks, {vocabulary} tokens, {dtype}"
        record.figure(case, "log-probabilities and entropy", _relative(seen[:2], right[:2]), limit=ROUNDING[dtype])
        record.figure(case, "gradients", _relative(seen[2:], right[2:]), limit=ROUNDING[dtype])


def _head_outcome(head: _Head, compute: Callable[[Tensor], tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Log-probabilities, entropy, and the gradients of hidden states and weight."""
    hidden_RD = head.hidden_RD.detach().requires_grad_()
    logprobs_U, entropy_R = compute(hidden_RD)
    loss = (logprobs_U * torch.linspace(-1, 1, logprobs_U.numel(), device=logprobs_U.device)).sum() + entropy_R.sum()
    gradients = torch.autograd.grad(loss, [hidden_RD, head.linear.weight])
    return [logprobs_U.detach(), entropy_R.detach(), *gradients]


def _all_logits(head: _Head, hidden_RD: Tensor) -> tuple[Tensor, Tensor]:
    logprobs_RV = torch.log_softmax(head.linear(hidden_RD) / 0.7, dim=-1)
    return logprobs_RV[head.row_U, head.token_U], -(logprobs_RV.exp() * logprobs_RV).sum(-1)


# The learner: a full update against the plain way, and the canary against a CPU.


def config_of(model: Path, dtype: Dtype, lr: float = LR, **actor: Any) -> Config:
    return Config.model_validate(
        {
            "actor": {"path": str(model), "dtype": dtype, **actor},
            "data": {"train": {"path": "unused"}},
            "optimizer": {"lr": lr, "max_grad_norm": MAX_GRAD_NORM},
        }
    )


def groups_of(
    case: Case, behaviour: list[list[list[float]]] | None = None, *, shared: bool = True
) -> list[ScoredGroup]:
    return scored_groups(case, behaviour or even_logprobs(case), shared=shared)


def even_logprobs(case: Case) -> list[list[list[float]]]:
    """Of a sampler that found every token equally likely in a vocabulary of 50,000."""
    return [[[-10.8] * len(ids) for ids in group] for group in case.completions]


def check_learner(options: Options, record: Recorder, model: Path, shape: Shape) -> None:
    """The gradient of one update on a small ragged batch."""
    case, device = ragged_case(1), torch.device(options.device)
    plain = PlainTrainer(str(model), torch.float32, LR, 4, device)
    behaviour: Behaviour = {case.name: plain.logprobs(case)}
    with kept_gradients(dict(plain.model.named_parameters())) as right:
        plain.update(case, behaviour[case.name])
    del plain
    for dtype in dtypes(options):
        learner = Learner(config_of(model, dtype))
        with kept_gradients(dict(learner.weights())) as seen:
            result = learner.update(groups_of(case, behaviour[case.name]), version=0)
        name = f"learner, {shape.name}, {dtype}"
        record.figure(name, "gradient against the plain way", relative_difference(seen, right), limit=GRADIENT[dtype])
        record.figure(name, "steps that changed nothing", float(not result.changed), limit=0)
        _check_canary(record, name, learner, model, dtype)
        del learner, seen
        free(options)


def _check_canary(record: Recorder, name: str, learner: Learner, model: Path, dtype: Dtype) -> None:
    """What a server's log-probabilities are compared with, against transformers in float32 on the CPU."""
    token_ids = short_case().prompts[0][:16]
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ids_T = torch.tensor(token_ids)
    with torch.no_grad():
        logprobs_TV = torch.log_softmax(reference(input_ids=ids_T[None]).logits[0, :-1], dim=-1)
    right = logprobs_TV.gather(-1, ids_T[1:, None])[:, 0].tolist()
    seen = learner.sequence_logprobs(token_ids)
    difference = sum(abs(one - other) for one, other in zip(seen, right, strict=True)) / len(right)
    limit = FLOAT32_TOLERANCE if dtype == "float32" else BFLOAT16_TOLERANCE
    record.figure(name, "canary, mean difference", difference, "nats", limit=limit)


def free(options: Options) -> None:
    """Give back what deleted models held."""
    gc.collect()
    if not options.cpu:
        torch.cuda.empty_cache()


# Published weights: rounded on this device as on a CPU, and brought to a server as deltas.


class _Stepping:
    """A learner as the source of versions."""

    def __init__(self, learner: Learner, groups: list[ScoredGroup]) -> None:
        self._learner, self._groups = learner, groups
        self.weights, self.config_json = learner.weights, learner.config_json

    def step(self) -> None:
        self._learner.update(self._groups, version=0)


def check_weights(options: Options, record: Recorder, model: Path, shape: Shape) -> None:
    """`measure` verifies each version that it brings; a difference ends it with an error."""
    learner = Learner(config_of(model, options.dtype, DELTA_LR))
    learner.update(groups_of(short_case()), version=0)
    here = LiveWeights({name: weight.cpu() for name, weight in learner.weights().items()})
    for form in (Format("bfloat16", "dithered"), Format("bfloat16", "nearest"), Format("float32", "nearest")):
        seen, right = digests(learner.weights(), form), digests(here, form)
        differing = sum(seen[name] != digest for name, digest in right.items())
        record.figure(f"weights, {shape.name}, {form}", "tensors unlike a CPU's", differing, limit=0)
    with tempfile.TemporaryDirectory(dir=shared_memory(2**33)) as folder:
        rows = weight_delta.measure(_Stepping(learner, groups_of(short_case())), Path(folder), "bfloat16", 2)
    share = max(rows.values["delta / full, bytes"])
    record.figure(f"deltas, {shape.name}", "verified after 2 steps: delta / full", share, "of the bytes", limit=1)
