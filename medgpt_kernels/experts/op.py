"""The experts of a mixture: gathered grouped products with SwiGLU between, forward and backward.

T tokens, K experts a token, S = T K rows sorted by expert, E experts, H hidden, I intermediate,
R rank of a LoRA pair.
"""

from typing import NamedTuple

import torch

from medgpt_kernels import registry
from medgpt_kernels.mxfp4.op import BLOCK, Mxfp4Tensor, check_mxfp4
from medgpt_kernels.routing.op import RoutingData

_ALPHA, _LIMIT = 1.702, 7.0  # gpt-oss's


class ExpertLora(NamedTuple):
    """A low-rank addition to each expert's weights: W + scaling B A, with W as [out, in].

    A pair is given whole or not at all. Matrices of another float dtype are cast to the input's.

    Attributes:
        gate_up_a: [E, R, H], or None.
        gate_up_b: [E, 2I, R]; its rows are ordered as gate_up_layout says.
        down_a: [E, R, I], or None; this pair's rank may differ.
        down_b: [E, H, R].
        scaling: usually lora_alpha / R, of both pairs.
    """

    gate_up_a: torch.Tensor | None = None
    gate_up_b: torch.Tensor | None = None
    down_a: torch.Tensor | None = None
    down_b: torch.Tensor | None = None
    scaling: float = 1.0


def experts(
    x: torch.Tensor,
    routing_data: RoutingData,
    gate_up_proj: torch.Tensor | Mxfp4Tensor,
    gate_up_proj_bias: torch.Tensor | None,
    down_proj: torch.Tensor | Mxfp4Tensor,
    down_proj_bias: torch.Tensor | None,
    *,
    alpha: float = _ALPHA,
    limit: float = _LIMIT,
    activation: str = "swiglu_oai",
    gate_up_layout: str = "interleaved",
    weight_layout: str = "in_out",
    lora: ExpertLora | None = None,
) -> torch.Tensor:
    """Sum over a token's experts of its routing weight times (down(act(gate_up(x)))).

    The maths is gpt-oss's (arXiv 2508.10925): a bias is added before the routing weight multiplies.

    Args:
        x: [T, H].
        routing_data: which rows go to which expert; see `routing` and `routing_from_topk`. Its
            topk_weights stay fp32 and get a gradient.
        gate_up_proj: [E, H, 2I] or, with weight_layout "out_in", [E, 2I, H], in x's dtype; or an
            Mxfp4Tensor of logical shape [E, 2I, H] whatever weight_layout says, frozen.
        gate_up_proj_bias: [E, 2I] or None. Biases of another float dtype are cast to x's.
        down_proj: [E, I, H] or [E, H, I], or an Mxfp4Tensor of logical shape [E, H, I]. Both
            weights are dense or both are MXFP4.
        down_proj_bias: [E, H] or None.
        alpha, limit: of "swiglu_oai", limit >= 0; "swiglu" has neither and takes only the defaults.
        activation: "swiglu_oai" clamps gate to at most limit and up to [-limit, limit], then takes
            (up + 1) gate sigmoid(alpha gate); "swiglu" is silu(gate) up.
        gate_up_layout: "interleaved" (gate 0, up 0, gate 1, ...) or "concatenated" (gates, ups).
        weight_layout: "in_out" as transformers' gpt-oss, "out_in" as Mixtral and Qwen3-MoE.
        lora: low-rank additions computed inside the products, on dense or MXFP4 weights.

    Returns:
        y [T, H] in x's dtype. Gradients flow to x, topk_weights, dense weights, biases and the LoRA
        matrices, without atomics. Under autocast x and dense weights are cast.

    Raises:
        ValueError: shapes, dtypes, devices or names that do not fit.
    """
    packed = isinstance(gate_up_proj, Mxfp4Tensor)
    if packed != isinstance(down_proj, Mxfp4Tensor):
        raise ValueError(
            f"experts: expected both weights dense or both Mxfp4Tensor, got "
            f"{type(gate_up_proj).__name__} and {type(down_proj).__name__}"
        )
    if packed:
        (x,) = registry.autocast(x)
    else:
        x, gate_up_proj, down_proj = registry.autocast(x, gate_up_proj, down_proj)
    for name, value, names in (
        ("activation", activation, ("swiglu_oai", "swiglu")),
        ("gate_up_layout", gate_up_layout, ("interleaved", "concatenated")),
        ("weight_layout", weight_layout, ("in_out", "out_in")),
    ):
        if value not in names:
            raise ValueError(f"experts: expected {name} {' or '.join(names)}, got {value!r}")
    lora = ExpertLora() if lora is None else lora
    _check_options(routing_data, activation, alpha, limit, lora)
    _check(
        x, routing_data, gate_up_proj, gate_up_proj_bias, down_proj, down_proj_bias,
        weight_layout, lora,
    )  # fmt: skip
    gate_up, gate_up_scales = gate_up_proj if packed else (gate_up_proj, None)
    down, down_scales = down_proj if packed else (down_proj, None)
    gate_up_proj_bias, down_proj_bias, *low_rank = (
        None if t is None else t.to(x.dtype) for t in (gate_up_proj_bias, down_proj_bias, *lora[:4])
    )
    tensors = (
        x, routing_data.topk_weights, routing_data.expert_offs, routing_data.gather_indices,
        routing_data.scatter_indices, gate_up, gate_up_scales, gate_up_proj_bias, down, down_scales,
        down_proj_bias, *low_rank,
    )  # fmt: skip
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    y, _ = _experts_direct(
        *tensors, activation, gate_up_layout, weight_layout, alpha, limit, lora.scaling, keep
    )
    return y


def _fail(expected, got) -> None:
    raise ValueError(f"experts: expected {expected}, got {got}")


_NUMBERS = (int, float, torch.SymInt, torch.SymFloat)


def _check_options(routing_data, activation, alpha, limit, lora) -> None:
    if not isinstance(routing_data, RoutingData):
        _fail("RoutingData", type(routing_data).__name__)
    if not isinstance(lora, ExpertLora):
        _fail("lora as ExpertLora or None", type(lora).__name__)
    for name, value in (("alpha", alpha), ("limit", limit), ("lora's scaling", lora.scaling)):
        if not isinstance(value, _NUMBERS):
            _fail(f"a number for {name}", repr(value))
    if not limit >= 0:  # NaN neither
        _fail("limit >= 0", limit)
    if activation == "swiglu" and (alpha != _ALPHA or limit != _LIMIT):
        _fail("neither alpha nor limit with activation swiglu", f"{alpha} and {limit}")


# Messages are made only when they are needed: a size in a string would fix it in a compiled graph.
def _check(x, routing_data, gate_up, gate_up_bias, down, down_bias, weight_layout, lora) -> None:
    if x.ndim != 2 or not x.dtype.is_floating_point:
        _fail("float x [T, H]", f"{x.dtype} {list(x.shape)}")
    num_experts, width = _check_weights(x, gate_up, down, weight_layout)
    _check_routing(x, routing_data, num_experts)
    optional = {
        "gate_up_proj_bias": (gate_up_bias, (num_experts, width)),
        "down_proj_bias": (down_bias, (num_experts, x.shape[1])),
    }
    for name, inputs, outputs in (("gate_up", x.shape[1], width), ("down", width // 2, x.shape[1])):
        a, b = getattr(lora, f"{name}_a"), getattr(lora, f"{name}_b")
        if (a is None) != (b is None):
            _fail(f"lora's {name}_a and {name}_b both or neither", "one only")
        if a is not None:
            rank = a.shape[1] if a.ndim == 3 else 0
            if rank < 1:
                _fail(f"lora's {name}_a [E, R, in] with R >= 1", list(a.shape))
            optional[f"lora's {name}_a"] = (a, (num_experts, rank, inputs))
            optional[f"lora's {name}_b"] = (b, (num_experts, outputs, rank))
    for name, (t, shape) in optional.items():
        if t is not None and (tuple(t.shape) != shape or not t.dtype.is_floating_point):
            _fail(f"float {name} {list(shape)}", f"{t.dtype} {list(t.shape)}")
    packed = isinstance(gate_up, Mxfp4Tensor)
    others = [*routing_data[:1], *(getattr(routing_data, n) for n in _INDICES)]
    others += [*gate_up, *down] if packed else [gate_up, down]
    for t in (*others, *(t for t, _ in optional.values())):
        if t is not None and t.device != x.device:
            _fail(f"every tensor on x's {x.device}", t.device)


_INDICES = ("expert_offs", "gather_indices", "scatter_indices")


def _check_weights(x, gate_up, down, weight_layout) -> tuple[int, int]:
    """E and 2 I."""
    if gate_up.ndim != 3 or down.ndim != 3:
        _fail("weights of three dimensions", f"{list(gate_up.shape)} and {list(down.shape)}")
    if 0 in gate_up.shape or 0 in down.shape:
        _fail("weights of E, H and I >= 1", f"{list(gate_up.shape)} and {list(down.shape)}")
    if isinstance(gate_up, Mxfp4Tensor):
        check_mxfp4("experts", gate_up)
        check_mxfp4("experts", down)
        kind = "MXFP4"
    else:
        kind = weight_layout
        if gate_up.dtype != x.dtype or down.dtype != x.dtype:
            _fail(f"dense weights of x's {x.dtype}", f"{gate_up.dtype} and {down.dtype}")
    (num_experts, width, inner), down_shape = gate_up.shape, tuple(down.shape)
    if kind == "in_out":
        width, inner = inner, width
        down_shape = (down_shape[0], down_shape[2], down_shape[1])
    hidden = x.shape[1]
    if inner != hidden or width % 2 or down_shape != (num_experts, hidden, width // 2):
        _fail(
            f"{kind} weights from {hidden} to 2 I and from I to {hidden}, of as many experts",
            f"{list(gate_up.shape)} and {list(down.shape)}",
        )
    return num_experts, width


def _check_routing(x, routing_data, num_experts) -> None:
    topk_weights = routing_data.topk_weights
    wide = topk_weights.dtype in (torch.float32, torch.float64)
    if topk_weights.ndim != 2 or topk_weights.shape[0] != x.shape[0] or not wide:
        _fail(
            f"float32 topk_weights [{x.shape[0]}, K]",
            f"{topk_weights.dtype} {list(topk_weights.shape)}",
        )
    if topk_weights.shape[1] < 1:
        _fail("topk_weights [T, K] with K >= 1", list(topk_weights.shape))
    rows = topk_weights.shape[0] * topk_weights.shape[1]
    for name, length in zip(_INDICES, (num_experts + 1, rows, rows), strict=True):
        t = getattr(routing_data, name)
        if t.dtype != torch.int32 or t.ndim != 1 or t.shape[0] != length:
            _fail(f"{name} int32 [{length}]", f"{t.dtype} {list(t.shape)}")


def _intermediate(down_proj, down_scales, weight_layout):
    if down_scales is not None:
        return down_scales.shape[2] * BLOCK
    return down_proj.shape[1] if weight_layout == "in_out" else down_proj.shape[2]


def _fwd_fake(
    x, topk_weights, expert_offs, gather_indices, scatter_indices, gate_up_proj, gate_up_scales,
    gate_up_proj_bias, down_proj, down_scales, down_proj_bias, gate_up_lora_a, gate_up_lora_b,
    down_lora_a, down_lora_b, activation, gate_up_layout, weight_layout, alpha, limit, lora_scaling,
    keep_pre_activation,
):  # fmt: skip
    rows = gather_indices.shape[0] if keep_pre_activation else 0
    width = 2 * _intermediate(down_proj, down_scales, weight_layout)
    return x.new_empty(x.shape), x.new_empty(rows, width)


def _bwd_fake(
    d_y, pre_activation, x, topk_weights, expert_offs, gather_indices, scatter_indices,
    gate_up_proj, gate_up_scales, gate_up_proj_bias, down_proj, down_scales, down_proj_bias,
    gate_up_lora_a, gate_up_lora_b, down_lora_a, down_lora_b, activation, gate_up_layout,
    weight_layout, alpha, limit, lora_scaling, wanted,
):  # fmt: skip
    tensors = (
        x, topk_weights, gate_up_proj, gate_up_proj_bias, down_proj, down_proj_bias,
        gate_up_lora_a, gate_up_lora_b, down_lora_a, down_lora_b,
    )  # fmt: skip
    return tuple(
        t.new_empty(t.shape) if need else x.new_empty(0)
        for t, need in zip(tensors, wanted, strict=True)
    )


# Places among the forward's arguments of what can have a gradient, as the backward orders it.
_DIFFERENTIABLE = (0, 1, 5, 7, 8, 10, 11, 12, 13, 14)
_TENSORS = 15


def _setup_context(ctx, inputs, output):
    ctx.options, ctx.kept = inputs[_TENSORS:-1], inputs[-1]
    ctx.save_for_backward(*inputs[:_TENSORS], output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, d_y, _):
    if not ctx.kept:
        raise RuntimeError("experts_fwd: a gradient needs keep_pre_activation=True")
    *tensors, pre_activation = ctx.saved_tensors
    wanted = [ctx.needs_input_grad[i] for i in _DIFFERENTIABLE]
    grads = _experts_bwd(d_y, pre_activation, *tensors, *ctx.options, wanted)
    found = dict(zip(_DIFFERENTIABLE, grads, strict=True))
    return tuple(found[i] if need else None for i, need in enumerate(ctx.needs_input_grad))


_ARGUMENTS = (
    "Tensor x, Tensor topk_weights, Tensor expert_offs, Tensor gather_indices, "
    "Tensor scatter_indices, Tensor gate_up_proj, Tensor? gate_up_scales, "
    "Tensor? gate_up_proj_bias, Tensor down_proj, Tensor? down_scales, Tensor? down_proj_bias, "
    "Tensor? gate_up_lora_a, Tensor? gate_up_lora_b, Tensor? down_lora_a, Tensor? down_lora_b, "
    "str activation, str gate_up_layout, str weight_layout, float alpha, float limit, "
    "float lora_scaling"
)

_BACKENDS = ("reference", "cpu", "triton", "cuda")

# With MXFP4 weights gate_up_proj and down_proj are the blocks, and weight_layout is not read.
# Without keep_pre_activation, pre_activation has no rows and no gradient can be taken.
_experts_fwd = registry.register(
    f"experts_fwd({_ARGUMENTS}, bool keep_pre_activation) -> (Tensor y, Tensor pre_activation)",
    package=__package__,
    fake=_fwd_fake,
    backends=_BACKENDS,
    setup_context=_setup_context,
    backward=_backward,
)
_experts_direct = registry.direct(_experts_fwd)
_experts_bwd = registry.register(
    f"experts_bwd(Tensor d_y, Tensor pre_activation, {_ARGUMENTS}, bool[] wanted) -> "
    "(Tensor d_x, Tensor d_topk_weights, Tensor d_gate_up_proj, Tensor d_gate_up_proj_bias, "
    "Tensor d_down_proj, Tensor d_down_proj_bias, Tensor d_gate_up_lora_a, "
    "Tensor d_gate_up_lora_b, Tensor d_down_lora_a, Tensor d_down_lora_b)",
    package=__package__,
    fake=_bwd_fake,
    backends=_BACKENDS,
)
