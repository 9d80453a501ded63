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
from medgpt_kernels.integrations.gpt_oss import FewRowsLinear, FusedGptOssAttention
from medgpt_kernels.integrations.int8 import Int8Linear
from medgpt_kernels.integrations.moe import FusedGptOssRouter
from medgpt_kernels.integrations.packed import PackedExperts
from medgpt_kernels.integrations.paged_cache import PagedCache

FEW = 16  # new tokens of all rows together
_KNOWN = interface.OF_NO_CONCERN | {
    "attention_mask",
    "cache",
    "past_key_values",
    "position_embeddings",
    "position_ids",
}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


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
        attention, mlp = self.self_attn, self.mlp
        kinds = (
            (attention, FusedGptOssAttention),
            (mlp, GptOssMLP),
            (self.input_layernorm, GptOssRMSNorm),
            (self.post_attention_layernorm, GptOssRMSNorm),
            (mlp.router, FusedGptOssRouter),
            (mlp.experts, PackedExperts),
        )
        projections = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        if any(type(module) is not kind for module, kind in kinds):
            return False
        if any(type(module) not in (FewRowsLinear, Int8Linear) for module in projections):
            return False
        if getattr(mlp.experts, "lora", None) is not None:
            return False
        modules = (*(module for module, _ in kinds), *projections)
        return not any(getattr(module, name) for module in modules for name in _HOOKS)

    def _arguments(self, x, layer, lengths, table) -> tuple:
        attention, mlp = self.self_attn, self.mlp
        experts, window = mlp.experts, attention.sliding_window
        tables = attention.rotary_tables.on(x.device, layer.seen + x.shape[1])
        return (
            x,
            self.input_layernorm.weight,
            self.post_attention_layernorm.weight,
            self.input_layernorm.variance_epsilon,
            _projection(attention.q_proj),
            _projection(attention.k_proj),
            _projection(attention.v_proj),
            _projection(attention.o_proj),
            layer.k_pages,
            layer.v_pages,
            lengths,
            table,
            tables.cos,
            tables.sin,
            -1 if window is None else window - 1,
            attention.sinks,
            attention.scaling,
            mlp.router.weight,
            mlp.router.bias,
            mlp.router.top_k,
            (experts.gate_up_proj_blocks, experts.gate_up_proj_scales, experts.gate_up_proj_bias),
            (experts.down_proj_blocks, experts.down_proj_scales, experts.down_proj_bias),
            experts.alpha,
            experts.limit,
        )


def _projection(module) -> tuple:
    if isinstance(module, Int8Linear):
        return module.values, module.scales, module.bias
    return module.weight, None, module.bias
