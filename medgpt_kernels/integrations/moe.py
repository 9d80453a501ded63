"""`experts_implementation="medgpt_kernels"` for transformers models, and gpt-oss's router.

T tokens, K experts a token, E experts, H hidden, I intermediate.
"""

import torch
from transformers.activations import SiLUActivation
from transformers.integrations import moe
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts, GptOssTopKRouter

from medgpt_kernels.experts.op import ExpertLora, experts
from medgpt_kernels.integrations import refuse
from medgpt_kernels.routing.op import RoutingData, routing, routing_from_topk


def experts_forward(
    self: torch.nn.Module,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """transformers' experts interface: x [T, H], ids and weights [T, K] to y [T, H].

    Raises:
        ValueError: experts with another gate than SiLU's or gpt-oss's, without one, with a norm
            after them, or under expert parallelism.
    """
    x = hidden_states.reshape(-1, hidden_states.shape[-1])
    options = gate_of(self)
    data = _as_routed(top_k_index, top_k_weights)
    if data is None:
        data = routing_from_topk(
            top_k_index.reshape(x.shape[0], -1),
            top_k_weights.reshape(x.shape[0], -1),
            self.num_experts,
        )
    y = experts(
        x,
        data,
        self.gate_up_proj,
        getattr(self, "gate_up_proj_bias", None),
        self.down_proj,
        getattr(self, "down_proj_bias", None),
        lora=lora_of(self),
        **options,
    )
    return y.view(hidden_states.shape)


def gate_of(module: torch.nn.Module) -> dict:
    """The options of `experts` that say what a transformers module computes."""
    if not getattr(module, "has_gate", True):
        refuse("experts with a gate", type(module).__name__)
    if getattr(module, "has_post_expert_norm", False):
        refuse("experts without a norm after them", type(module).__name__)
    if getattr(module, "_is_expert_parallel", False):
        refuse("all experts on one device", "expert parallelism")
    options = {
        "gate_up_layout": "concatenated" if module.is_concatenated else "interleaved",
        "weight_layout": "in_out" if module.is_transposed else "out_in",
    }
    gate = type(module)._apply_gate
    if gate is GptOssExperts._apply_gate and not module.is_concatenated:
        return options | {"activation": "swiglu_oai", "alpha": module.alpha, "limit": module.limit}
    silu = isinstance(getattr(module, "act_fn", None), (torch.nn.SiLU, SiLUActivation))
    if gate is moe._default_apply_gate and module.is_concatenated and silu:
        return options | {"activation": "swiglu"}
    refuse("silu(gate) up or gpt-oss's clamped gate", f"that of {type(module).__name__}")


class LoraPairs(torch.nn.Module):
    """The trainable matrices of ExpertLora beside one layer's experts."""

    def __init__(self, num_experts: int, hidden: int, width: int, rank: int, alpha: float, like):
        super().__init__()

        def pair(name: str, inputs: int, outputs: int) -> None:
            a = torch.empty(num_experts, rank, inputs, **like)
            torch.nn.init.uniform_(a, -(inputs**-0.5), inputs**-0.5)
            b = torch.zeros(num_experts, outputs, rank, **like)
            self.register_parameter(f"{name}_a", torch.nn.Parameter(a))
            self.register_parameter(f"{name}_b", torch.nn.Parameter(b))

        pair("gate_up", hidden, width)
        pair("down", width // 2, hidden)
        self.scaling = alpha / rank

    def pairs(self) -> ExpertLora:
        return ExpertLora(
            self.gate_up_a, self.gate_up_b, self.down_a, self.down_b, scaling=self.scaling
        )


def lora_of(module: torch.nn.Module) -> ExpertLora | None:
    found = getattr(module, "lora", None)
    return found.pairs() if isinstance(found, LoraPairs) else None


def add_expert_lora(
    model: torch.nn.Module, rank: int, *, alpha: float | None = None, dtype=torch.float32
) -> list[torch.nn.Parameter]:
    """Give every layer's experts a trainable LoRA pair for both projections; B starts at 0.

    Args:
        model: served by experts_implementation="medgpt_kernels" or loaded by `load_mxfp4`.
        rank: R of both pairs.
        alpha: the addition is scaled by alpha / R; None is R.
        dtype: of the matrices; they are cast to the activations' where they are used.

    Returns:
        The new parameters. Nothing else of the model changes, frozen or not.

    Raises:
        ValueError: no experts in the model, dense ones that another implementation serves (it
            would leave LoRA out), rank < 1, or LoRA there already.
    """
    layers = [m for m in model.modules() if hasattr(m, "gate_up_proj") and hasattr(m, "down_proj")]
    layers = [m for m in layers if hasattr(m, "num_experts")]
    if (
        not layers
        or rank < 1
        or any(isinstance(getattr(m, "lora", None), LoraPairs) for m in layers)
    ):
        refuse("experts without LoRA and a rank >= 1", f"{len(layers)} layers and rank {rank}")
    for layer in layers:
        gate_of(layer)
        theirs = getattr(getattr(layer, "config", None), "_experts_implementation", None)
        if torch.is_tensor(layer.gate_up_proj) and theirs != "medgpt_kernels":
            refuse('experts_implementation="medgpt_kernels", which adds LoRA', theirs)
    for layer in layers:
        in_out = layer.is_transposed and torch.is_tensor(layer.gate_up_proj)
        shape = layer.gate_up_proj.shape
        hidden, width = shape[1:] if in_out else reversed(shape[1:])
        like = {"dtype": dtype, "device": layer.gate_up_proj.device}
        layer.lora = LoraPairs(
            layer.num_experts, hidden, width, rank, rank if alpha is None else alpha, like
        )
    return [p for layer in layers for p in layer.lora.parameters()]


class FusedGptOssRouter(GptOssTopKRouter):
    """gpt-oss's router as one operator, with fp32 logits; it stays a GptOssTopKRouter."""

    def forward(self, hidden_states):
        x = hidden_states.reshape(-1, self.hidden_dim)
        data = routing(x, self.weight, self.bias, self.top_k)
        topk_ids = data.topk_ids.long()  # eager experts index by them
        if not torch.compiler.is_compiling() and not topk_ids.is_inference():
            versions = (topk_ids._version, data.topk_weights._version)
            topk_ids.routing_data = data, versions
        return data.logits, data.topk_weights, topk_ids


def _as_routed(topk_ids: torch.Tensor, topk_weights: torch.Tensor) -> RoutingData | None:
    """What FusedGptOssRouter made of these very tensors, sorted already; None if of others."""
    if torch.compiler.is_compiling():
        return None
    data, versions = getattr(topk_ids, "routing_data", (None, None))
    if data is None or data.topk_weights is not topk_weights:
        return None
    return data if versions == (topk_ids._version, topk_weights._version) else None
