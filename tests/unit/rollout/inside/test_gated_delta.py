"""The operators of GatedDeltaNet, called as SGLang calls them, against transformers' layer over each sequence alone."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet, Qwen3_5RMSNorm

from penstock_rollout.engine.sglang.inside import gated_delta

WIDTH, K_HEADS, V_HEADS, K_SIZE, V_SIZE, WINDOW = 24, 2, 4, 6, 10, 4
CHANNELS = 2 * K_HEADS * K_SIZE + V_HEADS * V_SIZE
SLOTS = 7
LENGTHS = (70, 1, 3, 9)  # more than a chunk, and fewer than the window
USED = (5, 2, 6, 1)  # the slots of the sequences


@pytest.fixture
def layer() -> Any:
    torch.manual_seed(0)
    config: Any = Qwen3_5TextConfig(
        hidden_size=WIDTH,
        num_hidden_layers=2,
        linear_num_key_heads=K_HEADS,
        linear_num_value_heads=V_HEADS,
        linear_key_head_dim=K_SIZE,
        linear_value_head_dim=V_SIZE,
        linear_conv_kernel_dim=WINDOW,
    )
    made = Qwen3_5GatedDeltaNet(config, 0)
    for parameter in (made.norm.weight, made.dt_bias):
        torch.nn.init.normal_(parameter.data)
    return made.requires_grad_(False)


class Engine:
    """The layer as SGLang computes it: projections, then the operators on slots of states."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.conv = torch.randn(SLOTS, CHANNELS, WINDOW - 1)  # what other sequences have left there
        self.states = torch.zeros(SLOTS, V_HEADS, V_SIZE, K_SIZE)  # SGLang clears a slot that it gives out

    def prefill(self, parts: Sequence[torch.Tensor], slots: Sequence[int], prefixes: Sequence[bool]) -> torch.Tensor:
        """Output of the new tokens of all sequences, one after the other."""
        mixed, z, b, a = self.project(torch.cat(list(parts)))
        lengths = [len(part) for part in parts]
        starts, indices = torch.tensor([0, *lengths]).cumsum(0), torch.tensor(slots)
        mixed = gated_delta.causal_conv1d_fn_cpu(
            mixed.T, self.layer.conv1d.weight[:, 0], None, activation="silu", conv_states=self.conv,
            has_initial_state=torch.tensor(prefixes), cache_indices=indices, query_start_loc=starts,
            seq_lens_cpu=lengths,
        ).T  # fmt: skip
        decay, step = gated_delta.fused_gdn_gating_cpu(self.layer.A_log, a, b, self.layer.dt_bias)
        q, k, v = self.heads(mixed)
        output, _, _ = gated_delta.chunk_gated_delta_rule_cpu(
            q=q, k=k, v=v, g=decay, beta=step, initial_state=self.states, initial_state_indices=indices,
            cu_seqlens=starts, head_first=False, use_qk_l2norm_in_kernel=True,
        )  # fmt: skip
        return self.close(output, z)

    def decode(self, new: torch.Tensor, slots: Sequence[int]) -> torch.Tensor:
        mixed, z, b, a = self.project(new)
        indices = torch.tensor(slots)
        mixed = gated_delta.causal_conv1d_update_cpu(
            mixed, self.conv, self.layer.conv1d.weight[:, 0], None, "silu", conv_state_indices=indices
        )
        q, k, v = self.heads(mixed)
        output = gated_delta.fused_sigmoid_gating_delta_rule_update_cpu(
            A_log=self.layer.A_log, dt_bias=self.layer.dt_bias, q=q, k=k, v=v, a=a, b=b,
            initial_state_source=self.states, initial_state_indices=indices, cu_seqlens=torch.arange(len(new) + 1),
            use_qk_l2norm_in_kernel=True, softplus_beta=1.0, softplus_threshold=20.0,
        )  # fmt: skip
        return self.close(output, z)

    def project(self, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        layer = self.layer
        qkvz = torch.cat([layer.in_proj_qkv(hidden), layer.in_proj_z(hidden)], dim=-1)
        ba = torch.cat([layer.in_proj_b(hidden), layer.in_proj_a(hidden)], dim=-1)
        return gated_delta.fused_qkvzba_split_reshape_cat_contiguous_cpu(qkvz, ba, K_HEADS, V_HEADS, K_SIZE, V_SIZE)

    @staticmethod
    def heads(mixed: torch.Tensor) -> list[torch.Tensor]:
        size = K_HEADS * K_SIZE
        parts = mixed.split([size, size, V_HEADS * V_SIZE], dim=-1)
        sizes = (K_SIZE, K_SIZE, V_SIZE)
        return [part.reshape(1, len(mixed), -1, each) for part, each in zip(parts, sizes, strict=True)]

    def close(self, output: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        norm = SimpleNamespace(
            weight=self.layer.norm.weight, eps=self.layer.layer_norm_epsilon, group_size=None, norm_before_gate=True,
            activation="swish",
        )  # fmt: skip
        normed = gated_delta.normed_and_gated(never, norm, output.reshape(-1, V_SIZE), z.reshape(-1, V_SIZE))
        projected: torch.Tensor = self.layer.out_proj(normed.reshape(output.shape[1], -1))
        return projected


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("expected the hook to do it itself")


def test_prefill_and_decoding_of_a_batch_equal_each_sequence_alone(layer: Any) -> None:
    sequences = [torch.randn(length + 2, WIDTH) for length in LENGTHS]
    expected = [layer(sequence[None])[0] for sequence in sequences]
    engine = Engine(layer)
    output = engine.prefill([each[:-2] for each in sequences], USED, [False] * len(USED))
    torch.testing.assert_close(output, torch.cat([each[:-2] for each in expected]), rtol=1e-4, atol=1e-5)
    for last in (-2, -1):
        output = engine.decode(torch.stack([each[last] for each in sequences]), USED)
        torch.testing.assert_close(output, torch.stack([each[last] for each in expected]), rtol=1e-4, atol=1e-5)


def test_a_prefill_goes_on_where_a_prefix_ended_beside_sequences_that_begin(layer: Any) -> None:
    first, second = torch.randn(30, WIDTH), torch.randn(5, WIDTH)
    engine = Engine(layer)
    engine.prefill([first[:11]], [3], [False])
    output = engine.prefill([second, first[11:]], [4, 3], [False, True])
    expected = torch.cat([layer(second[None])[0], layer(first[None])[0, 11:]])
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


def test_no_slot_but_those_of_the_batch_changes(layer: Any) -> None:
    engine = Engine(layer)
    engine.states.normal_()
    others = [each for each in range(SLOTS) if each not in USED]
    before = engine.conv[others].clone(), engine.states[others].clone()
    engine.prefill([torch.randn(3, WIDTH) for _ in USED], USED, [True] * len(USED))
    engine.decode(torch.randn(len(USED), WIDTH), USED)
    assert torch.equal(engine.conv[others], before[0])
    assert torch.equal(engine.states[others], before[1])


def test_queries_and_keys_are_normed_by_head_and_gates_are_set_apart() -> None:
    num_heads, num_keys, size, num_tokens = 4, 2, 6, 5
    norms = [Qwen3_5RMSNorm(size) for _ in range(2)]
    for norm in norms:
        torch.nn.init.normal_(norm.weight.data)
    both, keys = torch.randn(num_tokens, num_heads * 2 * size), torch.randn(num_tokens, num_keys * size)
    q, gate = both.view(num_tokens, num_heads, 2 * size).chunk(2, dim=-1)
    found = gated_delta.fused_qk_gemma_rmsnorm_with_gate_cpu(
        both, keys, norms[0].weight.data, norms[1].weight.data, norms[0].eps, size, num_heads
    )
    expected = norms[0](q), norms[1](keys.view(num_tokens, num_keys, size)), gate
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.view(num_tokens, -1), other.reshape(num_tokens, -1))


def test_a_gate_is_multiplied_in_place() -> None:
    values, gate = torch.randn(3, 8), torch.randn(3, 2, 4)
    expected = values * gate.view(3, 8).sigmoid()
    gated_delta.fused_sigmoid_mul_cpu(values, gate)
    torch.testing.assert_close(values, expected)


def test_the_convolution_of_another_activation_is_refused() -> None:
    with pytest.raises(ValueError, match="activation 'relu'; expected silu"):
        gated_delta.causal_conv1d_update_cpu(
            torch.zeros(1, 2), torch.zeros(1, 2, 3), torch.zeros(2, 4), None, "relu",
            conv_state_indices=torch.tensor([0]),
        )  # fmt: skip


def test_a_norm_without_a_gate_is_left_to_sglang() -> None:
    values = torch.randn(2, 3)
    found = gated_delta.normed_and_gated(lambda _, x, z: functional.relu(x), SimpleNamespace(group_size=2), values)
    assert torch.equal(found, functional.relu(values))
