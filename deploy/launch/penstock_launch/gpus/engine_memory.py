"""The memory that an inference engine needs on each of its GPUs, and what it leaves to a trainer there.

Owns the formulas, and what SGLang (0.5.21 and 0.5.23) does with `--mem-fraction-static`: B is the memory that is free
when the engine starts, f the fraction. Its key-value cache gets what is free after the weights are loaded, less
B (1 - f); activations and CUDA graphs have to fit into the rest. So a fraction means another size if somebody else
takes memory first, or in between.

An engine that shares its GPU with a trainer is therefore bounded by the number of tokens of its cache, which no order
of starts changes, and gets f = 1 - slack / total. In any order it then finds room for that many tokens: the cache gets
at least total - T - weights, if the trainer has taken T by then, less B slack / total, which is at most the slack.
"""

from dataclasses import dataclass
from itertools import pairwise
from math import prod

from penstock.config import EngineSection
from penstock.config.services import FRACTION_FLAG, flag_in
from penstock.contracts.weight_sources import ITEM_BYTES
from penstock_launch.gpus.memory import CONTEXT_BYTES, GIB, MIB, MemoryNeed, Part
from penstock_launch.gpus.model_shape import ModelShape

WORKSPACE_BYTES = GIB  # assumption: what attention kernels and matrix products reserve
GRAPH_BYTES = 2 * MIB  # SGLang's own figure, for each request of the largest decoding graph
PREFILL_GRAPH_BYTES = 8 * MIB  # likewise, for each size of a prefill's graph
SAMPLING_COPIES = 3  # of float32 logits: themselves, probabilities, sorted
SHORT_TOKENS = 256  # of a request for which the cache must have room at least
TENSORS, ENGINE_DTYPE = "rollout.engine.tensor_parallel_size", "rollout.engine.dtype"
TOKENS, FRACTION = "rollout.engine.max_total_tokens", "rollout.engine.memory_fraction"
REQUESTS = "rollout.engine.max_running_requests"

# Up to this many MiB of a GPU: tokens of a prefill, requests of the largest graph with fewer than 4 GPUs, with more.
CAPACITIES = (
    (20 * 1024, 2048, 8, 8),
    (35 * 1024, 4096, 48, 160),
    (60 * 1024, 4096, 32, 160),
    (90 * 1024, 8192, 256, 512),
    (160 * 1024, 8192, 256, 512),
)
LARGEST = (16384, 512)
LARGE_MIB, LARGE_RESERVE_MIB = 60 * 1024, 10 * 1024


@dataclass(frozen=True)
class EngineMemory:
    """An engine on a GPU of `memory_bytes`."""

    section: EngineSection
    shape: ModelShape
    memory_bytes: int

    @property
    def weights_bytes(self) -> int:
        """Weights in rollout.engine.dtype, divided among the GPUs of rollout.engine.tensor_parallel_size."""
        return self._dtype_bytes * self.shape.num_weights // self.section.tensor_parallel_size

    @property
    def token_bytes(self) -> int:
        """Of a token in the cache: key and value of each layer and key head here; a head is never divided."""
        heads = max(1, self.shape.num_key_value_heads // self.section.tensor_parallel_size)
        return 2 * self.shape.num_layers * heads * self.shape.head_size * self._dtype_bytes

    @property
    def slack_bytes(self) -> int:
        """What it needs beside weights and cache.

        workspace (assumed) + activations of a prefill: tokens x dtype x (4 D + 3 I) / GPUs + logits: requests x V x 12
        + CUDA graphs: 2 MiB x requests of the largest + 8 MiB x sizes of a prefill
        """
        tokens, graph_requests = self._capacity
        shape, gpus = self.shape, self.section.tensor_parallel_size
        activations = tokens * self._dtype_bytes * (4 * shape.hidden_size + 3 * shape.intermediate_size // gpus)
        logits = self.section.max_running_requests * shape.vocab_size * 4 * SAMPLING_COPIES
        graphs = GRAPH_BYTES * graph_requests + PREFILL_GRAPH_BYTES * num_prefill_graphs(tokens)
        return WORKSPACE_BYTES + activations + logits + graphs

    @property
    def fewest_tokens(self) -> int:
        """Of a cache with which it is worth to start: a short request for each that may run."""
        return self.section.max_running_requests * min(SHORT_TOKENS, self.section.context_length or SHORT_TOKENS)

    @property
    def most_tokens(self) -> int:
        """Of a cache that can be full: the longest sequence for each request that may run."""
        longest = self.section.context_length or self.shape.context_length or SHORT_TOKENS
        return self.section.max_running_requests * longest

    @property
    def fraction(self) -> float:
        """That is used without a trainer on the GPU: the configuration's, or SGLang's default."""
        return given_fraction(self.section) or default_fraction(
            self.memory_bytes, self.section.tensor_parallel_size, self.section.max_running_requests
        )

    @property
    def shared_fraction(self) -> float:
        """For a GPU with a trainer: see the module."""
        return round(max(0.01, 1 - self.slack_bytes / self.memory_bytes), 3)

    def tokens_beside(self, other_bytes: int) -> int:
        """Tokens of the cache that fit if other processes need so much."""
        left = self.memory_bytes - other_bytes - CONTEXT_BYTES - self.slack_bytes - self.weights_bytes
        return min(max(0, left) // self.token_bytes, self.most_tokens)

    def need(self, process: str, num_tokens: int = 0, *, received_bytes: int = 0) -> MemoryNeed:
        """With a cache of `num_tokens`; 0: it takes all that its fraction leaves, and the rest has what is left.

        `received_bytes`: of weights that are received on the GPU at once.
        """
        if num_tokens:
            cache, rest = num_tokens * self.token_bytes, self.slack_bytes + received_bytes
        else:
            static = int(self.fraction * self.memory_bytes)
            cache, rest = max(0, static - self.weights_bytes), max(0, self.memory_bytes - static - CONTEXT_BYTES)
        return MemoryNeed(
            process,
            (
                Part("weights", self.weights_bytes, f"{ENGINE_DTYPE}, {TENSORS}", True),
                Part("key-value cache", cache, f"{TOKENS}, {FRACTION}, {TENSORS}"),
                Part("activations, graphs (assumed)", rest, REQUESTS if num_tokens else FRACTION),
                Part("CUDA context (assumed)", CONTEXT_BYTES, "", True),
            ),
        )

    def received_bytes(self, transport: str, bucket_bytes: int) -> int:
        """Of weights that arrive: with nccl and tensor a bucket at once, at least the largest weight."""
        largest = self._dtype_bytes * max(map(prod, self.shape.weights.values()))
        return max(bucket_bytes, largest) if transport in ("nccl", "tensor") else 0

    @property
    def _dtype_bytes(self) -> int:
        return ITEM_BYTES[self.section.dtype]

    @property
    def _capacity(self) -> tuple[int, int]:
        return capacity(self.memory_bytes, self.section.tensor_parallel_size, self.section.max_running_requests)


def given_fraction(section: EngineSection) -> float:
    """That of the configuration, be it in extra_args; 0: none."""
    for word, following in pairwise((*section.extra_args, "")):
        if flag_in(word, (FRACTION_FLAG,)):
            value = word.partition("=")[2]
            try:
                return float(value or following)
            except ValueError:  # the engine refuses it
                return 0.0
    return section.memory_fraction


def capacity(memory_bytes: int, num_gpus: int, max_requests: int) -> tuple[int, int]:
    """Tokens that SGLang prefills at once, and requests of its largest decoding graph, on a GPU of this size.

    0.5.21 makes graphs for more requests than may run.
    """
    for limit, tokens, few, many in CAPACITIES:
        if memory_bytes < limit * MIB:
            return tokens, min(few if num_gpus < 4 else many, max_requests)
    return LARGEST[0], min(LARGEST[1], max_requests)


def num_prefill_graphs(tokens: int) -> int:
    """Sizes of prefills for which SGLang captures a graph: the finer, the smaller."""
    steps = ((4, 33, 4), (48, 257, 16), (288, 513, 32), (576, 1025, 64), (1280, 4097, 256), (4608, tokens + 1, 512))
    return sum(size <= tokens for start, stop, step in steps for size in range(start, stop, step))


def default_fraction(memory_bytes: int, num_gpus: int, max_requests: int) -> float:
    """SGLang's `--mem-fraction-static` if it is given none (0.5.23, `handle_gpu_memory_settings`), M in MiB:

    1 - reserve / M, reserve = 512 + 1.5 x prefill + 128 x GPUs + 2 x requests + 8 x sizes, above 60 GiB at least 10240
    """
    total_mib = memory_bytes / MIB
    tokens, graph_requests = capacity(memory_bytes, num_gpus, max_requests)
    reserve = 512 + 1.5 * tokens + 128 * num_gpus + 2 * graph_requests + 8 * num_prefill_graphs(tokens)
    if total_mib > LARGE_MIB:
        reserve = max(reserve, LARGE_RESERVE_MIB)
    return round((total_mib - reserve) / total_mib, 3)
