"""The memory that one rank of the trainer needs, from the configuration and the model's shape.

Owns the formulas. Each counts the tensors that `penstock_trainer` holds: a test compares them with the live bytes of
real updates, and fails if the trainer gets a kind of tensor that is not counted here. They are exact for weights,
gradients and moments; activations are those of decoders built like Llama (RMS norms, rotary positions, a gated
perceptron), and an estimate for others.

Legend: N weights, T trained ones, R ranks, P rows of a pack (actor.max_tokens_per_micro_batch), D hidden size, I inner
size, A heads times head size, V vocabulary, L layers, c bytes of actor.dtype (2 or 4), r bytes of the residual stream.
"""

from dataclasses import dataclass
from functools import cached_property
from math import prod

from penstock.config import Config
from penstock.contracts.weight_sources import ITEM_BYTES
from penstock.weights.manifest import KEPT_VERSIONS
from penstock_launch.gpus.memory import CONTEXT_BYTES, MIB, MemoryNeed, Part
from penstock_launch.gpus.model_shape import ModelShape

MASTER_BYTES = 4  # float32
MOMENT_BYTES = 8  # AdamW's two, float32
CHUNK_BYTES = {"cpu": 64 * MIB, "cuda": 512 * MIB}  # MAX_LOGIT_BYTES of penstock_trainer.model.pack_model
BLOCK_BYTES = {"cpu": 4 * MIB, "cuda": 32 * MIB}  # of penstock_trainer.model.token_logprobs
NUM_BLOCKS = 3  # of one evaluation: scaled logits, probabilities, their product
COPIES_OF_A_GATHER = 2  # FSDP gathers the next layer while one is computed
FRAGMENTATION = 0.05  # assumption: what PyTorch's allocator loses of what comes and goes, on a GPU

LOADING, CHECKPOINT_COPY = "model while ranks load it", "copy for a checkpoint"
SIZE, RANKS, PACK = "actor.path", "trainer.num_ranks", "actor.max_tokens_per_micro_batch"
LORA, DTYPE, CHECKPOINTING = "actor.lora.rank", "actor.dtype", "actor.gradient_checkpointing"


def trainer_need(
    config: Config,
    shape: ModelShape,
    reference: ModelShape | None = None,
    teacher: ModelShape | None = None,
    *,
    device: str = "cuda",
) -> MemoryNeed:
    """Of each rank, on its device. `reference`: the model of ref.path, if it is another one; `teacher`: likewise.

    device: cpu or cuda.
    """
    rank = _Rank(config, shape, device)
    ranks = config.trainer.num_ranks
    reference_weights = rank.reference_weights(reference)
    parts = [
        Part("master weights", MASTER_BYTES * rank.num_weights // ranks, f"{SIZE}, {RANKS}", True),
        Part("moments", MOMENT_BYTES * rank.num_trained // ranks, f"{LORA}, {RANKS}", True),
        Part("gradients", MASTER_BYTES * rank.num_trained // ranks, f"{LORA}, {RANKS}", True),
        Part("reference model", MASTER_BYTES * reference_weights // ranks, "kl_ctl, ref.path", True),
        Part("teacher model", MASTER_BYTES * rank.teacher_weights(teacher) // ranks, "teacher.path", True),
        *rank.peak(),
        Part("weights on their way", rank.sent_bytes(), "weights.transport, weights.bucket_bytes"),
    ]
    if device == "cuda":
        moving = sum(part.num_bytes for part in parts if not part.certain)
        parts.append(Part("fragmentation (assumed)", round(FRAGMENTATION * moving), PACK))
        parts.append(Part("CUDA context (assumed)", CONTEXT_BYTES, "", True))
    return MemoryNeed("trainer", tuple(parts))


def host_need(config: Config, shape: ModelShape) -> MemoryNeed:
    """Of the host, for all ranks on it: the model while each loads it, a checkpoint's copy, and staged weights.

    load         4 N R, until the ranks have moved their shards to their GPUs
    checkpoint   4 N + 8 T, or 12 T with LoRA, and 4 N of a reference that moves: copied for the writer while training
                 goes on
    staged       N x bytes of rollout.engine.dtype: one copy for nccl and tensor, three versions in /dev/shm for disk
    """
    rank = _Rank(config, shape, "cuda")
    saved = rank.num_trained if config.actor.lora.rank else rank.num_weights
    saved += rank.reference_weights(None) if config.ref.sync_steps else 0
    published = ITEM_BYTES[config.rollout.engine.dtype]
    copies = KEPT_VERSIONS if config.transport_from("cuda") == "disk" else 1
    return MemoryNeed(
        "host",
        (
            Part(LOADING, MASTER_BYTES * shape.num_weights * config.trainer.num_ranks, RANKS),
            Part(CHECKPOINT_COPY, MASTER_BYTES * saved + MOMENT_BYTES * rank.num_trained, LORA),
            Part("staged weights", copies * published * shape.num_weights, "weights.transport, weights.folder"),
        ),
    )


@dataclass(frozen=True)
class _Rank:
    """The sizes that the formulas use."""

    config: Config
    shape: ModelShape
    device: str

    @property
    def is_sharded(self) -> bool:
        return self.config.trainer.num_ranks > 1

    @property
    def compute_bytes(self) -> int:
        """c."""
        return ITEM_BYTES[self.config.actor.dtype]

    @property
    def residual_bytes(self) -> int:
        """r: of float32 embeddings, unless FSDP has cast them before."""
        return self.compute_bytes if self.is_sharded else 4

    @property
    def casts(self) -> bool:
        """Whether autocast makes a copy of each weight and of each input of a linear map, kept for the backward."""
        return self.compute_bytes == 2 and not self.is_sharded

    @property
    def rows(self) -> int:
        """P. A longer sequence gets a pack of its own."""
        return max(self.config.actor.max_tokens_per_micro_batch, self.config.sampling.max_new_tokens)

    @cached_property
    def adapted(self) -> dict[str, tuple[int, ...]]:
        """The matrices that LoRA adapts, name -> [outputs, inputs]."""
        section = self.config.actor.lora
        if not section.rank:
            return {}
        matrices: dict[str, tuple[int, ...]] = {
            name: each for name, each in self.shape.weights.items() if len(each) == 2
        }
        targets = section.target_modules
        if targets == "all-linear":
            return {name: each for name, each in matrices.items() if name not in self.shape.outside}

        def is_named(name: str) -> bool:
            module = name.removesuffix(".weight")
            return any(module == target or module.endswith(f".{target}") for target in targets)

        return {name: each for name, each in matrices.items() if is_named(name)}

    @property
    def num_adapter_weights(self) -> int:
        """Rank x (outputs + inputs) of each adapted matrix."""
        return sum(self.config.actor.lora.rank * sum(each) for each in self.adapted.values())

    @property
    def num_weights(self) -> int:
        """N, adapters included."""
        return self.shape.num_weights + self.num_adapter_weights

    @property
    def num_trained(self) -> int:
        """T."""
        return self.num_adapter_weights if self.config.actor.lora.rank else self.shape.num_weights

    def reference_weights(self, reference: ModelShape | None) -> int:
        """Weights of a second model: none without KL term, or if the policy without its adapter is the reference."""
        config = self.config
        is_policy = config.ref.path in ("", config.actor.path)
        if config.kl_ctl == 0 or (config.actor.lora.rank and is_policy):
            return 0
        return (reference or self.shape).num_weights

    def teacher_weights(self, teacher: ModelShape | None) -> int:
        """Weights of the teacher: none without one, or if the policy without its adapter is it."""
        path = self.config.teacher.path
        if not path or (self.config.actor.lora.rank and path == self.config.actor.path):
            return 0
        return (teacher or self.shape).num_weights

    def peak(self) -> list[Part]:
        """What comes and goes, at the moment at which it is most, while gradients of earlier packs are there.

        Three moments are compared: the backward of the projection onto the vocabulary, when the activations of all
        layers are held; the backward of the last layer behind it, with checkpointing computed again; and the end, when
        only the gradient of what is outside of layers is to come.
        """
        activations, copies = self._activations(), self._copies_of_a_layer()
        outside, gathered = self._gathered_outside(), self._gathered_outside() + self._gathered_layers()
        again = self.rows * self._layer_row_bytes()
        held, layer = self._held_projection_gradient(), self._layer_backward()
        if self.config.actor.gradient_checkpointing:
            moments = [
                (activations, 0, outside, self._projection()),
                (activations + again, copies, gathered, layer + held),
            ]
        else:
            copies *= self.shape.num_layers
            moments = [
                (activations, copies, outside, self._projection()),
                (activations, copies, gathered, layer + held),
            ]
        activations, copies, gathered, rest = max(*moments, (0, 0, outside, held + self._end()), key=sum)
        return [
            Part("activations", activations, f"{PACK}, {CHECKPOINTING}"),
            Part("weights in actor.dtype", copies, f"{DTYPE}, {CHECKPOINTING}"),
            Part("gathered weights", gathered, DTYPE),
            Part("projection onto the vocabulary", rest, PACK),
        ]

    def _activations(self) -> int:
        """What the backward pass needs of the forward pass.

        without checkpointing   P (L s + outside),  s: `_layer_row_bytes`
        with it                 P (L D r + outside)
        outside                 D (4 + 4 or c) of the last norm, 2 D r of its output and of the projected rows,
                                2 d r of cosines and sines of positions, d: head size
        """
        shape, full = self.shape, not self.config.actor.lora.rank
        hidden, residual = shape.hidden_size, self.residual_bytes
        norm = 4 + (self._normed_bytes if full else 0)
        outside = hidden * (norm + 2 * residual) + 2 * shape.head_size * residual
        by_layer = hidden * residual if self.config.actor.gradient_checkpointing else self._layer_row_bytes()
        return self.rows * (shape.num_layers * by_layer + outside)

    @property
    def _normed_bytes(self) -> int:
        """Of a normalized number before it is scaled, in the type of the residual stream."""
        return self.residual_bytes

    def _layer_row_bytes(self) -> int:
        """s, bytes that a layer keeps of one row.

        norms        2 D (4 input, n normalized if its scale is trained, c output unless autocast copies it)
        inputs       with autocast: c for each input of each linear map, but those counted below
        attention    4 c A (queries, keys and values repeated for each query head, output) + 4 of each head
        head norms   (4 + c if trained) of each query and key, if the model has them
        perceptron   3 c I (gate, its activation, up), 2 c I without a gate; c I of their product
        LoRA         c rank of each adapted map
        """
        shape, c, full = self.shape, self.compute_bytes, not self.config.actor.lora.rank
        hidden, inner = shape.hidden_size, shape.intermediate_size
        attended = shape.num_heads * shape.head_size
        norm = 4 + (self._normed_bytes if full else 0) + (0 if self.casts else c)
        maps = self._layer_maps()
        inputs = c * sum(each[-1] for each in maps.values()) if self.casts else 0
        product = c * inner
        if self.casts:  # the output of attention and the product are inputs: kept themselves, or as a copy for LoRA
            inputs -= c * (attended + inner) if full else 0
            product = product if full else 0
        heads = 0
        if shape.normalizes_heads:
            heads = (4 + (c if full else 0)) * (attended + shape.num_key_value_heads * shape.head_size)
        adapters = c * self.config.actor.lora.rank * len(maps) if not full else 0
        return (
            2 * hidden * norm
            + inputs
            + 4 * c * attended
            + 4 * shape.num_heads
            + heads
            + (3 if shape.is_gated else 2) * c * inner
            + product
            + adapters
        )

    def _layer_maps(self) -> dict[str, tuple[int, ...]]:
        """The linear maps of a layer whose inputs are needed: the trained ones, or those with an adapter."""
        adapted = self.adapted
        return {
            name: each
            for name, each in self.shape.layer_matrices.items()
            if len(each) == 2 and (not adapted or name in adapted)
        }

    def _copies_of_a_layer(self) -> int:
        """c x its matrices, which autocast casts for each pack and keeps for the backward pass."""
        return self.compute_bytes * sum(map(prod, self.shape.layer_matrices.values())) if self.casts else 0

    def _gathered_outside(self) -> int:
        """FSDP: c x what is outside of layers, from the forward pass to the end of the backward pass."""
        return self.compute_bytes * self.shape.outside_weights if self.is_sharded else 0

    def _gathered_layers(self) -> int:
        """FSDP, while a layer is computed: c x 2 layers, and its gradient in c and in float32, to be summed."""
        if not self.is_sharded:
            return 0
        gradient = 0 if self.adapted else (self.compute_bytes + MASTER_BYTES) * self.shape.layer_weights
        return COPIES_OF_A_GATHER * self.compute_bytes * self.shape.layer_weights + gradient

    def _projection(self) -> int:
        """The largest moment of one chunk of C rows, 4 C V <= CHUNK_BYTES.

        weight      c V D in autocast's form
        forward     + 4 C V logits, 3 blocks of them
        backward    + (4 + 2) C V logits and, with bfloat16, their other form, r P D gradient of the rows; if it is
                    trained: 4 V D gradient of the weight, and with bfloat16 2 V D of one chunk
        backward of all rows in one chunk, if it is trained
                    + the larger of (4 + 2) C V logits + c V D gradient, and that gradient + 4 V D as float32
        """
        shape, c = self.shape, self.compute_bytes
        matrix, all_logits = shape.projection_weights, 4 * self.rows * shape.vocab_size
        logits = min(CHUNK_BYTES[self.device], all_logits)
        both = logits * 3 // 2 if c == 2 else logits
        weight = c * matrix if self.casts else 0
        forward = logits + NUM_BLOCKS * min(BLOCK_BYTES[self.device], logits)
        backward = both + self.residual_bytes * self.rows * shape.hidden_size
        if not self.config.actor.lora.rank:
            other = 2 * matrix if c == 2 else 0
            if logits < all_logits:
                backward += MASTER_BYTES * matrix + other
            else:
                backward = max(backward + c * matrix, other + MASTER_BYTES * matrix)
        return weight + max(forward, backward)

    def _held_projection_gradient(self) -> int:
        """Of a projection that is the embeddings: it waits for theirs, to be added; with FSDP, of any: for the sum."""
        if self.config.actor.lora.rank or not (self.shape.is_tied or self.is_sharded):
            return 0
        return (self.compute_bytes if self.is_sharded else MASTER_BYTES) * self.shape.projection_weights

    def _layer_backward(self) -> int:
        """Of one layer: P (3 c I + 3 D r) gradients of its parts, and one matrix's in c and in float32."""
        shape, c = self.shape, self.compute_bytes
        largest = max(map(prod, shape.layer_matrices.values()), default=0)
        matrix = 0 if self.config.actor.lora.rank else (c + (MASTER_BYTES if self.casts else 0)) * largest
        rows = 3 * c * shape.intermediate_size + 3 * shape.hidden_size * self.residual_bytes
        return self.rows * rows + matrix

    def _end(self) -> int:
        """When the embeddings' gradient is made: c V D, 4 without FSDP; with it also what is summed over ranks."""
        if self.config.actor.lora.rank:
            return 0
        if not self.is_sharded:
            return MASTER_BYTES * self.shape.projection_weights
        return (self.compute_bytes + MASTER_BYTES) * self.shape.outside_weights

    def sent_bytes(self) -> int:
        """nccl: a bucket for each server while the next gradient is computed; at least the largest weight."""
        config = self.config
        if config.transport_from(self.device) != "nccl" or self.device == "cpu":
            return 0
        published = ITEM_BYTES[config.rollout.engine.dtype]
        largest = published * max(map(prod, self.shape.weights.values()))
        return config.rollout.num_servers * max(config.weights.bucket_bytes, largest)
