"""A gpt-oss layer of a decoding step as one native call.

B rows of S tokens. What a layer holds is read anew at each call: parameters may be replaced,
moved or hooked at any time, and then the modules run one by one as ever.
"""

import torch
from transformers.models.gpt_oss.modeling_gpt_oss import (
    GptOssDecoderLayer,
    GptOssMLP,
    GptOssRMSNorm,
)

from medgpt_kernels import native
from medgpt_kernels.integrations import transformers as interface
from medgpt_kernels.integrations.cache_pages import FEW
from medgpt_kernels.integrations.gpt_oss import FewRowsLinear, FusedGptOssAttention
from medgpt_kernels.integrations.int8 import Int8Linear
from medgpt_kernels.integrations.moe import FusedGptOssRouter
from medgpt_kernels.integrations.packed import PackedExperts
from medgpt_kernels.integrations.paged_cache import PagedCache

_KNOWN = interface.OF_NO_CONCERN | {
    "attention_mask",
    "cache",
    "past_key_values",
    "position_embeddings",
    "position_ids",
}
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_GATE_UP, _DOWN = (
    tuple(f"{name}_proj_{part}" for part in ("blocks", "scales", "bias"))
    for name in ("gate_up", "down")
)
_LINEAR = (FewRowsLinear, Int8Linear)
_INSIDE = (
    (("input_layernorm",), (GptOssRMSNorm,)),
    (("post_attention_layernorm",), (GptOssRMSNorm,)),
    (("self_attn",), (FusedGptOssAttention,)),
    *((("self_attn", name), _LINEAR) for name in _PROJECTIONS),
    (("mlp",), (GptOssMLP,)),
    (("mlp", "router"), (FusedGptOssRouter,)),
    (("mlp", "experts"), (PackedExperts,)),
)


class FusedGptOssLayer(GptOssDecoderLayer):
    """GptOssDecoderLayer whose decoding steps on the CPU are one call. `patch` makes them so.

    That takes a PagedCache, at most 16 new tokens without padding, MXFP4 experts without LoRA,
    projections in the activations' fp32 or bf16 or in 8 bits, and no hooks on the modules inside.
    """

    def forward(self, hidden_states, *args, **kwargs):
        done = self._decode(hidden_states, args, kwargs)
        return super().forward(hidden_states, *args, **kwargs) if done is None else done

    def _decode(self, x, args: tuple, kwargs: dict) -> torch.Tensor | None:
        cache = kwargs.get("cache")
        cache = kwargs.get("past_key_values") if cache is None else cache
        if args or not isinstance(cache, PagedCache) or torch.compiler.is_compiling():
            return None
        if not kwargs.keys() <= _KNOWN:
            return None
        if x.device.type != "cpu" or x.ndim != 3 or x.shape[0] * x.shape[1] > FEW:
            return None
        if self.training or torch.is_grad_enabled() or not self._is_plain():
            return None
        if self.self_attn.config._attn_implementation != interface.NAME:
            return None
        if not getattr(self.self_attn, "is_causal", True):
            return None
        layer_idx = self.self_attn.layer_idx
        held = cache.step(
            layer_idx,
            *x.shape[:2],
            x.dtype,
            mask=kwargs.get("attention_mask"),
            position_ids=kwargs.get("position_ids"),
            window=self.self_attn.sliding_window,
        )
        if held is None:
            return None
        layer, lengths, table = held
        done = native.direct().decoder_layer_direct(*self._arguments(x, layer, lengths, table))
        if done is None:
            return None
        layer.seen += x.shape[1]
        return done[0]

    def _is_plain(self) -> bool:
        """Whether the modules inside are those whose work the call does, with nothing hooked in."""
        for path, kinds in _INSIDE:
            module = self
            for name in path:
                module = module._modules[name]  # by far faster than the attribute
            if type(module) not in kinds or module._forward_hooks or module._forward_pre_hooks:
                return False
        return module._modules.get("lora") is None  # the last are the experts

    def _arguments(self, x, layer, lengths, table) -> tuple:
        inside = self._modules
        attention, mlp = inside["self_attn"], inside["mlp"]._modules
        parts, norm = attention._modules, inside["input_layernorm"]
        router, experts = mlp["router"], mlp["experts"]
        packed, window = experts._parameters, attention.sliding_window
        tables = attention.rotary_tables.on(x.device, layer.seen + x.shape[1])
        return (
            x,
            norm._parameters["weight"],
            inside["post_attention_layernorm"]._parameters["weight"],
            norm.variance_epsilon,
            *[_projection(parts[name]) for name in _PROJECTIONS],
            layer.k_pages,
            layer.v_pages,
            lengths,
            table,
            tables.cos,
            tables.sin,
            -1 if window is None else window - 1,
            attention._parameters["sinks"],
            attention.scaling,
            router._parameters["weight"],
            router._parameters["bias"],
            router.top_k,
            tuple([packed[name] for name in _GATE_UP]),
            tuple([packed[name] for name in _DOWN]),
            experts.alpha,
            experts.limit,
        )


def _projection(module) -> tuple:
    bias = module._parameters["bias"]
    if type(module) is Int8Linear:
        return module._buffers["values"], module._buffers["scales"], bias, module.out_features
    return module._parameters["weight"], None, bias, module.out_features
