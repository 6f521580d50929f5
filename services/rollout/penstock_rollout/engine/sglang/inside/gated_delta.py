"""GatedDeltaNet (Qwen3.5, Qwen3-Next) on a CPU without AMX: the operators that SGLang takes from its AMX build.

SGLang's CPU code for these layers imports `sgl_kernel.mamba` and calls operators of `torch.ops.sgl_kernel`. Without the
build for AMX it has neither, and takes such a model for an unknown one. Here they are plain torch; the delta rule is
that of transformers, with which the trainer computes these layers on a CPU, too.

Owns the shapes of these calls. Invariant: the state of each sequence is read from and written to its own slot, and no
other slot changes. Calls for anything else (drafts, states in the middle of a prefill) fail: these functions do not
take their arguments.

Runs inside SGLang's scheduler; `launcher` defines these names before SGLang is imported.

Shapes: B sequences, T tokens of all sequences, S slots; K and V heads of keys and values, D and E their sizes; C
channels of the convolution, W its width.
"""

import types
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import conv1d, silu, softplus

Hook = Callable[..., torch.Tensor]

NORM = "sglang.kernels.ops.attention.fla.layernorm_gated.RMSNorm.forward"


def hooks() -> dict[str, Hook]:
    """The hooks around SGLang's methods, by their full names."""
    return {NORM: normed_and_gated}


def define(kernels: types.ModuleType) -> types.ModuleType:
    """Define the operators, and return the module `mamba` of the module `sgl_kernel`, which is given."""
    for operator in (
        fused_gdn_gating_cpu,
        fused_sigmoid_gating_delta_rule_update_cpu,
        fused_sigmoid_mul_cpu,
        fused_qk_gemma_rmsnorm_cpu,
        fused_qk_gemma_rmsnorm_with_gate_cpu,
        fused_qkvzba_split_reshape_cat_contiguous_cpu,
    ):
        setattr(torch.ops.sgl_kernel, operator.__name__, operator)
    mamba = types.ModuleType(f"{kernels.__name__}.mamba")
    for function in (causal_conv1d_fn_cpu, causal_conv1d_update_cpu, chunk_gated_delta_rule_cpu):
        setattr(mamba, function.__name__, function)
    return mamba


def causal_conv1d_fn_cpu(
    input_CT: torch.Tensor,
    weight_CW: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    activation: str,
    conv_states: torch.Tensor,
    has_initial_state: torch.Tensor,
    cache_indices: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens_cpu: list[int],
) -> torch.Tensor:
    """The convolution over new tokens of each sequence, after its last inputs in conv_states[S, C, W - 1]."""
    states = conv_states[cache_indices]
    states[~has_initial_state] = 0
    output = torch.empty_like(input_CT)
    for sequence, (start, length) in enumerate(zip(query_start_loc.tolist(), seq_lens_cpu, strict=False)):
        new = input_CT[:, start : start + length]
        output[:, start : start + length], states[sequence] = _convolved(
            states[sequence, None], new[None], weight_CW, bias, activation
        )
    conv_states[cache_indices] = states
    return output


def causal_conv1d_update_cpu(
    input_BC: torch.Tensor,
    conv_states: torch.Tensor,
    weight_CW: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    *,
    conv_state_indices: torch.Tensor,
) -> torch.Tensor:
    """The convolution over one new token of each sequence."""
    output, states = _convolved(conv_states[conv_state_indices], input_BC[..., None], weight_CW, bias, activation)
    conv_states[conv_state_indices] = states.to(conv_states.dtype)
    return output[..., 0]


def _convolved(
    states_BCW: torch.Tensor, new_BCT: torch.Tensor, weight_CW: torch.Tensor, bias: torch.Tensor | None, activation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The outputs of new tokens, and the last inputs."""
    if activation not in ("silu", "swish"):
        raise ValueError(f"the convolution of GatedDeltaNet has activation {activation!r}; expected silu")
    inputs = torch.cat([states_BCW.to(new_BCT.dtype), new_BCT], dim=-1)
    output = conv1d(inputs, weight_CW[:, None].to(new_BCT.dtype), bias, groups=weight_CW.shape[0])
    return silu(output), inputs[..., -states_BCW.shape[-1] :]


def fused_gdn_gating_cpu(
    A_log: torch.Tensor, a_TV: torch.Tensor, b_TV: torch.Tensor, dt_bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-decay and step size, float32[1, T, V] each."""
    decay = -A_log.float().exp() * softplus(a_TV.float() + dt_bias.float())
    return decay[None], b_TV.float().sigmoid()[None]


def chunk_gated_delta_rule_cpu(
    *,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor,
    initial_state_indices: torch.Tensor,
    cu_seqlens: torch.Tensor,
    head_first: bool,
    use_qk_l2norm_in_kernel: bool,
) -> tuple[torch.Tensor, None, None]:
    """The delta rule over new tokens of each sequence, from its state in initial_state[S, V, E, D] on.

    q, k: [1, T, K, D]; v and the result: [1, T, V, E].
    """
    from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule

    if head_first:
        raise ValueError("the delta rule was asked for heads before tokens; expected tokens first")
    output = torch.empty_like(v)
    bounds = cu_seqlens.tolist()
    for slot, start, end in zip(initial_state_indices.tolist(), bounds, bounds[1:], strict=False):
        part = slice(start, end)
        output[:, part], state = torch_chunk_gated_delta_rule(
            _repeated(q[:, part], v.shape[2]),
            _repeated(k[:, part], v.shape[2]),
            v[:, part],
            g[:, part],
            beta[:, part],
            initial_state=initial_state[slot, None].transpose(-1, -2),
            output_final_state=True,
            use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        )
        initial_state[slot] = state[0].transpose(-1, -2).to(initial_state.dtype)
    return output, None, None


def fused_sigmoid_gating_delta_rule_update_cpu(
    *,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    initial_state_source: torch.Tensor,
    initial_state_indices: torch.Tensor,
    cu_seqlens: torch.Tensor,
    use_qk_l2norm_in_kernel: bool,
    softplus_beta: float,
    softplus_threshold: float,
) -> torch.Tensor:
    """The delta rule over one new token of each sequence; shapes as of `chunk_gated_delta_rule_cpu`, with T = B."""
    from transformers.models.qwen3_5.modeling_qwen3_5 import torch_recurrent_gated_delta_rule

    decay, step = fused_gdn_gating_cpu(A_log, a, b, dt_bias)
    found: tuple[torch.Tensor, torch.Tensor] = torch_recurrent_gated_delta_rule(
        _repeated(q, v.shape[2])[0, :, None],
        _repeated(k, v.shape[2])[0, :, None],
        v[0, :, None],
        decay[0, :, None],
        step[0, :, None],
        initial_state=initial_state_source[initial_state_indices].transpose(-1, -2),
        output_final_state=True,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
    )
    output, state = found
    initial_state_source[initial_state_indices] = state.transpose(-1, -2).to(initial_state_source.dtype)
    return output[None, :, 0]


def _repeated(heads: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Each head of keys or queries for all heads of values that share it."""
    return heads.repeat_interleave(num_heads // heads.shape[2], dim=2)


def fused_sigmoid_mul_cpu(values: torch.Tensor, gate: torch.Tensor) -> None:
    """In place."""
    values.mul_(gate.reshape(values.shape).sigmoid())


def fused_qk_gemma_rmsnorm_cpu(
    q: torch.Tensor, k: torch.Tensor, q_weight: torch.Tensor, k_weight: torch.Tensor, eps: float, head_dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each head of queries and keys, normed: one row a head."""
    return _gemma_normed(q.reshape(-1, head_dim), q_weight, eps), _gemma_normed(k.reshape(-1, head_dim), k_weight, eps)


def fused_qk_gemma_rmsnorm_with_gate_cpu(
    q_and_gate: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    eps: float,
    head_dim: int,
    num_heads: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and gates; q_and_gate has a query and a gate of each head."""
    q, gate = q_and_gate.reshape(-1, num_heads, 2 * head_dim).chunk(2, dim=-1)
    return *fused_qk_gemma_rmsnorm_cpu(q, k, q_weight, k_weight, eps, head_dim), gate.contiguous()


def _gemma_normed(rows: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Gemma's norm: its weights are differences from 1."""
    wide = rows.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed * (1.0 + weight.float())).to(rows.dtype)


def fused_qkvzba_split_reshape_cat_contiguous_cpu(
    qkvz: torch.Tensor, ba: torch.Tensor, num_k_heads: int, num_v_heads: int, head_k_dim: int, head_v_dim: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The inputs of the convolution [T, C], z [T, V, E], b and a [T, V], out of two projections."""
    size_v = num_v_heads * head_v_dim
    mixed, z = qkvz.split([2 * num_k_heads * head_k_dim + size_v, size_v], dim=-1)
    b, a = ba.split([num_v_heads, num_v_heads], dim=-1)
    return mixed.contiguous(), z.reshape(-1, num_v_heads, head_v_dim), b.contiguous(), a.contiguous()


def normed_and_gated(original: Hook, norm: Any, values: torch.Tensor, z: torch.Tensor | None = None) -> torch.Tensor:
    """SGLang's gated norm is a kernel for GPUs: norm(values) silu(z), over all of a head."""
    is_plain = norm.group_size is None and norm.norm_before_gate and norm.activation in ("swish", "silu")
    if z is None or not is_plain:
        return original(norm, values, z)
    wide = values.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.eps)
    gated: torch.Tensor = norm.weight * normed.to(values.dtype) * silu(z.float())
    return gated.to(values.dtype)
