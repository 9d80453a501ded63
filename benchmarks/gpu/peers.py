"""The peers of attention on a card, as far as they import; each may fail, which is then its line.

One causal sequence q [T, H, D], k and v [T, G, D], sinks [H]. `window` counts the query's own key,
0 is none.
"""

import torch
import torch.nn.functional as F
from harness import Unavailable
from peers_attention import heads_first


def module(name: str):
    """An optional package. Raises Unavailable where it is not installed."""
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Unavailable(f"{name}: {error}") from None


def span(window: int, open_end: int | None) -> tuple:
    return (window - 1, 0) if window else (open_end, open_end if open_end is None else 0)


class TorchFlashWithSinks(torch.autograd.Function):
    """torch's own FlashAttention 2, made exact by its logsumexp, forward and backward.

    out' = out sigmoid(lse - sink), lse' = logaddexp(lse, sink); the same backward, given both,
    yields exact d_q, d_k, d_v, and d_sink = -sum p_sink (d_out . out').
    """

    @staticmethod
    def forward(ctx, q, k, v, sinks, window):
        bounds = torch.tensor([0, q.shape[0]], dtype=torch.int32, device=q.device)
        left, right = span(window, -1)
        ctx.options = {"window_size_left": left, "window_size_right": right}
        ctx.lengths = (bounds, bounds, q.shape[0], q.shape[0], 0.0, True)
        out, lse, *rng, _ = torch.ops.aten._flash_attention_forward(
            q, k, v, *ctx.lengths, False, **ctx.options
        )  # lse [H, T]
        gate = torch.sigmoid(lse - sinks[:, None])
        out = out * gate.T[..., None].to(out.dtype)
        lse = torch.logaddexp(lse, sinks[:, None].expand_as(lse))
        ctx.save_for_backward(q, k, v, out, lse, gate, *rng)
        return out

    @staticmethod
    def backward(ctx, d_out):
        q, k, v, out, lse, gate, *rng = ctx.saved_tensors
        grads = torch.ops.aten._flash_attention_backward(
            d_out, q, k, v, out, lse, *ctx.lengths, *rng, **ctx.options
        )
        delta = (d_out.float() * out.float()).sum(-1).T
        return *grads, -((1 - gate) * delta).sum(1), None


def torch_flash(q, k, v, sinks, window: int):
    return TorchFlashWithSinks.apply(q, k, v, sinks, window)


def sdpa(q, k, v, sinks, window: int):
    """Without sinks: less than the op does."""
    if window:
        raise Unavailable("no windows without a mask")
    out = F.scaled_dot_product_attention(
        heads_first(q), heads_first(k), heads_first(v), is_causal=True, enable_gqa=True
    )
    return out[0].transpose(0, 1)


class Flex:
    """FlexAttention; the sink enters by its logsumexp, as transformers does it, but in fp32."""

    def __init__(self, tokens: int, window: int, device: torch.device, compile_):
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        def seen(b, h, i, j):
            return (j <= i) & (j > i - window) if window else j <= i

        self.blocks = create_block_mask(seen, None, None, tokens, tokens, device=device)
        self.flex = flex_attention if device.type == "cpu" else compile_(flex_attention)

    def __call__(self, q, k, v, sinks):
        q, k, v = map(heads_first, (q, k, v))
        out, lse = self.flex(q, k, v, block_mask=self.blocks, enable_gqa=True, return_lse=True)
        gate = torch.sigmoid(lse - sinks[None, :, None])
        return (out * gate[..., None].to(out.dtype))[0].transpose(0, 1)


def flash_attn(q, k, v, sinks, window: int):
    """FlashAttention 2, or 3 where that is what is installed, without sinks."""
    call = module("flash_attn").flash_attn_func
    left_right = span(window, -1) if window else (-1, -1)
    return call(q[None], k[None], v[None], causal=True, window_size=left_right)[0]


def fa4(q, k, v, sinks, window: int):
    """FlashAttention 4, which has learnable sinks."""
    call = module("flash_attn.cute").flash_attn_func
    found = call(
        q[None], k[None], v[None], causal=True, learnable_sink=sinks.to(q.dtype),
        window_size=span(window, None) if window else (None, None),
    )  # fmt: skip
    return (found[0] if isinstance(found, tuple) else found)[0]


def decode_torch_flash(q, k, v, sinks):
    """q [B, 1, H, D] over k, v [B, S, G, D]: torch's flash attention renormalised by its lse."""
    batch, length, kv_heads, head_dim = k.shape
    rows = q.view(batch, kv_heads, -1, head_dim).transpose(1, 2)  # query heads of a key head
    found = torch.ops.aten._flash_attention_forward(
        rows.contiguous(), k, v, None, None, rows.shape[1], length, 0.0, False, False
    )
    gate = torch.sigmoid(found[1] - sinks.view(1, kv_heads, -1))  # lse [B, G, P]
    out = found[0].transpose(1, 2) * gate[..., None].to(q.dtype)
    return out.reshape(q.shape)


def decode_sdpa(q, k, v, sinks):
    """Without sinks: less than the op does."""
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), enable_gqa=True
    )
    return out.transpose(1, 2)


def decode_flash_attn(q, k, v, sinks, lengths):
    """flash_attn_with_kvcache, without sinks."""
    return module("flash_attn").flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths)
