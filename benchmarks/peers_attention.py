"""The peers of attention: torch's own CPU kernels with exact sinks, and compiled FlexAttention.

T tokens, H query heads, G key heads, D head_dim; one causal sequence q [T, H, D], k and v
[T, G, D]. `window` counts the query's own key.
"""

import torch
import torch.nn.functional as F

FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class FlashWithSinks(torch.autograd.Function):
    """torch's CPU flash attention, made exact by its logsumexp; q [B, H, T, D], k, v [B, H, S, D].

    out' = out * sigmoid(lse - sink) and lse' = logaddexp(lse, sink); torch's own backward, given
    both, then yields the exact d_q, d_k and d_v, and d_sink = -sum p_sink * (d_out . out').
    """

    @staticmethod
    def forward(ctx, q, k, v, sinks, mask):
        causal = mask is None
        out, lse = FLASH(q, k, v, 0.0, causal, attn_mask=mask)
        heads_last = lse.shape[1] != q.shape[1]
        lse = lse.transpose(1, 2) if heads_last else lse
        sink = sinks.float().view(1, -1, 1)
        gate = torch.sigmoid(lse - sink)
        out = out * gate.unsqueeze(-1).to(out.dtype)
        lse = torch.logaddexp(lse, sink.expand_as(lse))
        ctx.save_for_backward(q, k, v, out, lse, gate, mask)
        ctx.heads_last = heads_last
        return out

    @staticmethod
    def backward(ctx, d_out):
        q, k, v, out, lse, gate, mask = ctx.saved_tensors
        stored = lse.transpose(1, 2).contiguous() if ctx.heads_last else lse
        d_q, d_k, d_v = FLASH_BACKWARD(
            d_out, q, k, v, out, stored, 0.0, mask is None, attn_mask=mask
        )
        delta = (d_out.float() * out.float()).sum(-1)
        return d_q, d_k, d_v, -((1 - gate) * delta).sum((0, 2)), None


def heads_first(x: torch.Tensor, repeat: int = 1) -> torch.Tensor:
    return x.repeat_interleave(repeat, 1).transpose(0, 1)[None]


def sdpa(q, k, v, sinks) -> torch.Tensor:
    """Without sinks and without a window: less than the op does."""
    out = F.scaled_dot_product_attention(
        heads_first(q), heads_first(k), heads_first(v), is_causal=True, enable_gqa=True
    )
    return out[0].transpose(0, 1)


def lse(q, k, v, sinks) -> torch.Tensor:
    """Full causal attention."""
    repeat = q.shape[1] // k.shape[1]
    out = FlashWithSinks.apply(
        heads_first(q), heads_first(k, repeat), heads_first(v, repeat), sinks, None
    )
    return out[0].transpose(0, 1)


def lse_documents(q, k, v, sinks, lengths) -> torch.Tensor:
    """Packed documents one by one."""
    parts = zip(*(t.split(lengths) for t in (q, k, v)), strict=True)
    return torch.cat([lse(*part, sinks) for part in parts])


def band_mask(blocks: int, window: int, dtype: torch.dtype) -> torch.Tensor:
    """[blocks, 1, window, 2 window]: each query block against the block before it and its own."""
    query, key = torch.arange(window)[:, None] + window, torch.arange(2 * window)[None]
    keep = (key <= query) & (key > query - window)
    mask = torch.zeros(keep.shape, dtype=dtype).masked_fill(~keep, float("-inf"))
    mask = mask.expand(blocks, 1, -1, -1).clone()
    mask[0, :, :, :window] = float("-inf")
    return mask


def lse_chunk(q, k, v, sinks, mask) -> torch.Tensor:
    """A window in blocks of `window` queries against twice as many keys; mask from band_mask."""
    blocks, window = mask.shape[0], mask.shape[2]
    repeat = q.shape[1] // k.shape[1]

    def two_blocks(x):
        x = x.view(blocks, window, *x.shape[1:])
        before = torch.cat([x[:1], x[:-1]])
        return torch.cat([before, x], 1).repeat_interleave(repeat, 2).transpose(1, 2)

    rows = q.view(blocks, window, *q.shape[1:]).transpose(1, 2)
    out = FlashWithSinks.apply(rows, two_blocks(k), two_blocks(v), sinks, mask)
    return out.transpose(1, 2).reshape(q.shape)


def compiled_flex(tokens: int, window: int):
    """FlexAttention, block-sparse; the sink is one more key whose score is replaced by the logit.

    It gives no logsumexp on the CPU and has no backward there.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def seen(b, h, i, j):
        return ((j <= i) & (j > i - window)) | (j == tokens)

    blocks = create_block_mask(seen, None, None, tokens, tokens + 1, device="cpu")

    @torch.compile(dynamic=False)
    def flex(q, k, v, sinks):
        def score(x, b, h, i, j):
            return torch.where(j == tokens, sinks[h], x)

        return flex_attention(q, k, v, score_mod=score, block_mask=blocks, enable_gqa=True)

    def call(q, k, v, sinks):
        k, v = (F.pad(t, (0, 0, 0, 0, 0, 1)) for t in (k, v))
        return flex(heads_first(q), heads_first(k), heads_first(v), sinks)[0].transpose(0, 1)

    return call


def decode_sdpa(q, k, v, sinks) -> torch.Tensor:
    """One new token q [1, 1, H, D] over k and v [1, G, S, D], without sinks."""
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, enable_gqa=True)
    return out.transpose(1, 2)


def decode_lse(q, k, v, sinks) -> torch.Tensor:
    """The same with sinks: the query heads of one key head are rows, so no key is repeated."""
    kv_heads, head_dim = k.shape[1], k.shape[3]
    out, lse = FLASH(q.view(1, kv_heads, -1, head_dim), k, v, 0.0, False)
    lse = lse if lse.shape[1] == kv_heads else lse.transpose(1, 2)
    gate = torch.sigmoid(lse - sinks.view(1, kv_heads, -1))
    return (out * gate.unsqueeze(-1).to(out.dtype)).view(q.shape)
