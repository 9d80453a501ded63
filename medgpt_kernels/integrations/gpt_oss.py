"""gpt-oss attention with rotary fused in: no rotated query or key is stored in training.

B rows of S tokens, H query heads, G key and value heads, D head_dim, N packed sequences.
"""

import torch
from transformers.models.gpt_oss.modeling_gpt_oss import (
    GptOssAttention,
    GptOssDecoderLayer,
    GptOssPreTrainedModel,
    GptOssTopKRouter,
)

from medgpt_kernels import native
from medgpt_kernels.integrations import refuse
from medgpt_kernels.integrations import transformers as interface
from medgpt_kernels.integrations.int8 import Int8Linear
from medgpt_kernels.integrations.moe import FusedGptOssRouter
from medgpt_kernels.integrations.paged_cache import PagedCache
from medgpt_kernels.integrations.sequences import once
from medgpt_kernels.rotary.op import apply_rotary
from medgpt_kernels.rotary.tables import Rotary, rotary_from_config


class RotaryTables:
    """One model's tables, shared by its layers, once per device.

    Not buffers: `model.to(torch.bfloat16)` would round those, and they belong in no checkpoint.
    """

    def __init__(self, config):
        self.max_seqlen = config.max_position_embeddings
        with torch.device("cpu"):  # from_pretrained makes models on the meta device
            self.on_device = {torch.device("cpu"): rotary_from_config(config, self.max_seqlen)}

    def on(self, device: torch.device, max_seqlen: int) -> Rotary:
        """The tables on a device. Raises ValueError where they are too short for a sequence."""
        if max_seqlen > self.max_seqlen:
            raise ValueError(
                f"medgpt_kernels: expected at most max_position_embeddings {self.max_seqlen} "
                f"tokens a sequence, got {max_seqlen}"
            )
        if device not in self.on_device:
            self.on_device[device] = self.on_device[torch.device("cpu")].to(device)
        return self.on_device[device]


class FewRowsLinear(torch.nn.Linear):
    """nn.Linear that reads its weight as fast as memory gives it, for a decoding step's few rows.

    Up to 16 rows of fp32 or bf16 on the CPU without gradients take our kernel, all others torch's.
    """

    def forward(self, input):
        if not torch.compiler.is_compiling():
            done = native.direct().linear_direct(input, self.weight, self.bias)
            if done is not None:
                return done[0]
        return super().forward(input)


class FusedGptOssAttention(GptOssAttention):
    """GptOssAttention whose queries and keys are rotated inside attention.

    `patch` turns layers into this class in place. Cached keys have to be rotated, so with a KV
    cache one launch rotates the new queries and keys first. Under any attn_implementation but
    "medgpt_kernels" it is the class that it came from.
    """

    rotary_tables: RotaryTables

    def forward(
        self,
        hidden_states,
        position_embeddings,
        attention_mask,
        cache=None,
        *,
        past_key_values=None,  # cache's name before transformers 5.24
        **kwargs,
    ):
        cache = past_key_values if cache is None else cache
        if self.config._attn_implementation != interface.NAME:
            return super().forward(
                hidden_states, position_embeddings, attention_mask, cache, **kwargs
            )
        rows = hidden_states.shape[:-1]
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (p(hidden_states).unflatten(-1, (-1, self.head_dim)) for p in projections)
        positions, options = kwargs.get("position_ids"), {}
        if cache is not None:
            if positions is None:
                raise ValueError("medgpt_kernels: expected position_ids with a KV cache, got None")
            reach = cache.get_seq_length(self.layer_idx) + rows[1]
            tables = self.rotary_tables.on(q.device, reach)
            if isinstance(cache, PagedCache):
                out = self._paged(q, k, v, attention_mask, cache, positions, tables, kwargs)
                return self.o_proj(out.flatten(2)), None
            q, k = apply_rotary(q, k, tables, position_ids=positions)
            k, v = cache.update(k.transpose(1, 2), v.transpose(1, 2), self.layer_idx)
            k, v = k.transpose(1, 2), v.transpose(1, 2)
        is_causal = interface.looks_back_only(
            self, kwargs.pop("is_causal", None), self.sliding_window
        )
        dropout = self.attention_dropout if self.training else 0.0
        interface.check_options(self, dropout, self.sliding_window, k.shape[1], kwargs)
        sequences = interface.find_sequences(
            self, q, k, attention_mask, is_causal, self.sliding_window, kwargs
        )
        if cache is None:
            options = self._rotary_options(q, sequences, positions, kwargs)
        out = interface.attend(
            q,
            k,
            v,
            sequences,
            is_causal,
            self.sliding_window,
            self.sinks,
            self.scaling,
            kwargs.get("deterministic"),
            **options,
        )
        return self.o_proj(out.flatten(2)), None

    def _paged(self, q, k, v, mask, cache: PagedCache, positions, tables: Rotary, kwargs: dict):
        """Append and attend in one: decode_attention, or attention where there is no past."""
        if not interface.looks_back_only(self, kwargs.pop("is_causal", None), self.sliding_window):
            refuse("causal attention with a PagedCache", "another")
        dropout = self.attention_dropout if self.training else 0.0
        interface.check_options(self, dropout, self.sliding_window, k.shape[1], kwargs)
        if kwargs.get("cu_seq_lens_q") is not None:
            refuse("a PagedCache or cu_seq_lens_q", "both")
        return cache.attend(
            self.layer_idx,
            q,
            k,
            v,
            mask=mask,
            position_ids=positions,
            rotary=tables,
            window=self.sliding_window,
            sinks=self.sinks,
            softmax_scale=self.scaling,
        )

    def _rotary_options(self, q, sequences, positions, kwargs: dict) -> dict:
        """rotary and position_ids for `attend`.

        Only differences of positions count, so each sequence may start from 0: its tokens are
        known to follow each other, but for cu_seq_lens, where the given positions are kept.
        """
        if sequences is None:
            return {"rotary": self.rotary_tables.on(q.device, q.shape[1])}
        if sequences.holes:
            raise ValueError("medgpt_kernels: expected padding at the ends of a row, got holes")
        longest = sequences.max_seqlen_k
        tables = self.rotary_tables.on(q.device, 0 if longest is None else longest)
        cu_seqlens = kwargs.get("cu_seq_lens_q")
        if cu_seqlens is None or positions is None:
            return {"rotary": tables}

        def from_0():
            return _from_0(positions.expand(q.shape[:2]).flatten(), cu_seqlens)

        made = once(positions, cu_seqlens, ("from 0",), from_0, self)
        return {"rotary": tables, "position_ids": made}


def _from_0(position_ids: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Positions within their own sequence: [0, 1, 2, 3] with cu_seqlens [0, 2, 4] -> [0, 1, 0, 1].

    Without a host sync, and without a table as long as the whole batch.
    """
    tokens = torch.arange(len(position_ids), device=position_ids.device, dtype=cu_seqlens.dtype)
    sequence = torch.searchsorted(cu_seqlens, tokens, right=True) - 1
    return position_ids - position_ids[cu_seqlens.long()[sequence]]


def patch(
    model: torch.nn.Module, *, strict: bool = False, projections: str | None = None
) -> dict[str, str]:
    """See integrations.transformers.patch."""
    if projections not in (None, "int8"):
        refuse('projections None or "int8"', projections)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, GptOssAttention)}
    fresh = {n: m for n, m in layers.items() if type(m) is GptOssAttention}
    known = [m for m in layers.values() if isinstance(m, FusedGptOssAttention)]
    if strict and not fresh and not known:
        raise ValueError(
            f"medgpt_kernels: expected gpt-oss attention in the model, got {type(model).__name__}"
        )
    replaced = _fuse(model, fresh, known) if fresh else {}
    if projections == "int8":
        for name, module in _linears(model, layers).items():
            model.set_submodule(name, Int8Linear.quantize(module))
            replaced[name] = Int8Linear.__name__
    return replaced


def _fuse(model: torch.nn.Module, fresh: dict, known: list) -> dict[str, str]:
    """Give the modules of these attention layers, and of what is around them, their new classes."""
    from medgpt_kernels.integrations.decoder_layer import FusedGptOssLayer

    interface.register()
    tables = {id(m.config): m.rotary_tables for m in known}
    for layer in fresh.values():
        if id(layer.config) not in tables:
            tables[id(layer.config)] = RotaryTables(layer.config)
        layer.rotary_tables = tables[id(layer.config)]
    kinds = {
        GptOssAttention: FusedGptOssAttention,
        GptOssTopKRouter: FusedGptOssRouter,
        GptOssDecoderLayer: FusedGptOssLayer,
    }
    found = [(n, m, kinds[type(m)]) for n, m in model.named_modules() if type(m) in kinds]
    linears = _linears(model, fresh).items()
    found += [(n, m, FewRowsLinear) for n, m in linears if type(m) is torch.nn.Linear]
    for part in model.modules():
        if isinstance(part, GptOssPreTrainedModel):
            part.set_attn_implementation(interface.NAME)
            part.set_experts_implementation(interface.NAME)
    for _, module, kind in found:
        module.__class__ = kind
    return {name: kind.__name__ for name, _, kind in found}


def _linears(model: torch.nn.Module, layers: dict[str, GptOssAttention]) -> dict:
    """The projections of these layers and the head: what a decoding step reads besides experts."""
    found = {
        f"{name}.{part}".removeprefix("."): getattr(layer, part)
        for name, layer in layers.items()
        for part in ("q_proj", "k_proj", "v_proj", "o_proj")
    }
    found["lm_head"] = getattr(model, "lm_head", None)
    return {
        name: module
        for name, module in found.items()
        if type(module) is torch.nn.Linear or isinstance(module, FewRowsLinear)
    }
