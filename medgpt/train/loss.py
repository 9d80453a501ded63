"""Cross entropy of a linear head whose logits are never whole in memory.

T tokens, H hidden, V vocabulary, C tokens of a chunk.
"""

import importlib.util
import math

import torch

from medgpt_kernels.integrations import refuse

LOGITS_BYTES = 128 * 2**20  # of one chunk's logits, once
BLOCK_VALUES = 8 * 2**20  # of a 16-bit weight made fp32 at a time


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    token_weights: torch.Tensor | None = None,
    normalizer: torch.Tensor | float | None = None,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    chunk_tokens: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """sum_t w_t (lse_t - logit_t[label_t] + z_loss lse_t^2) / normalizer, logits = hidden weight'.

    Logits exist for C tokens at a time, their gradient takes their place, and both products are
    summed in fp32 (fp64 for fp64 input). The gradients are made in the forward, where the logits
    are, so backward only scales them; a second backward of the same graph makes them again. On a
    GPU liger-kernel (0.8.5 and later) does this where it is installed.

    Args:
        hidden: [T, H] fp32, bf16, fp16 or fp64.
        weight: [V, H] of the same dtype.
        labels: int64 [T]; those of ignore_index cost nothing, in time neither.
        token_weights: [T] >= 0, no gradient; None is 1.
        normalizer: default the sum of the weights of the labels that count, or 1 where that is 0.
        z_loss: factor of lse^2, which keeps the logits from drifting.
        chunk_tokens: C; default what 128 MiB of logits hold.

    Returns:
        The loss (fp32, or fp64), and each token's own lse - logit [T] without weight or gradient,
        0 where ignored.

    Raises:
        ValueError: shapes, dtypes, labels outside the vocabulary.
    """
    _check(hidden, weight, labels, token_weights, chunk_tokens)
    accumulate = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    counted = labels != ignore_index
    scale = counted.to(accumulate)
    if token_weights is not None:
        scale = scale * token_weights.to(accumulate)
    if normalizer is None:
        total = scale.sum()
        normalizer = torch.where(total > 0, total, torch.ones_like(total))
    scale = scale / normalizer
    if _liger_serves(hidden):
        return _liger(hidden, weight, labels, scale, ignore_index, z_loss)
    if chunk_tokens is None:
        chunk_tokens = max(1, LOGITS_BYTES // (len(weight) * accumulate.itemsize))
    rows = counted.nonzero()[:, 0]
    least, most = (int(x) for x in labels[rows].aminmax()) if len(rows) else (0, 0)
    if not 0 <= least <= most < len(weight):
        refuse(f"labels below {len(weight)}", (least, most), "linear_cross_entropy")
    return _LinearCrossEntropy.apply(hidden, weight, labels, scale, rows, z_loss, chunk_tokens)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, scale, rows, z_loss, chunk_tokens):
        ctx.options = (z_loss, chunk_tokens)
        ctx.save_for_backward(hidden, weight, labels, scale, rows)
        wanted = ctx.needs_input_grad[:2]
        nll, lse, *ctx.made = _chunks(hidden, weight, labels, scale, rows, *ctx.options, wanted)
        loss = (scale * (nll + z_loss * lse.square())).sum()
        ctx.mark_non_differentiable(nll)
        return loss, nll

    @staticmethod
    def backward(ctx, d_loss, _):
        saved = ctx.saved_tensors  # raises where the graph is gone
        made, ctx.made = ctx.made, None
        if made is None:
            made = _chunks(*saved, *ctx.options, ctx.needs_input_grad[:2])[2:]
        if d_loss.is_cuda or d_loss != 1:  # no wait for a GPU
            made = [None if d is None else d.mul_(d_loss) for d in made]
        return *made, *[None] * 5


def _chunks(hidden, weight, labels, scale, rows, z_loss, chunk_tokens, wanted):
    """(nll [T], lse [T], d_hidden or None, d_weight or None) for a gradient of 1."""
    nll = scale.new_zeros(len(hidden))
    lse = scale.new_zeros(len(hidden))
    d_hidden = torch.zeros_like(hidden) if wanted[0] else None
    d_weight = weight.new_zeros(weight.shape, dtype=scale.dtype) if wanted[1] else None
    blocks = _blocks(weight, scale.dtype)
    buffer = scale.new_empty(min(chunk_tokens, len(rows)), len(weight))
    for at in rows.split(chunk_tokens):
        x = hidden[at].to(_product_dtype(hidden, scale))
        logits, target = buffer[: len(at)], labels[at][:, None]
        for block in blocks:
            part = weight[block].to(x.dtype)
            _product(x, part.T, logits[:, block])
        own = logits.gather(1, target)[:, 0]
        logp = torch.log_softmax(logits, 1, out=logits)  # row by row, in cache
        nll[at] = chunk_nll = -logp.gather(1, target)[:, 0]
        lse[at] = chunk_lse = own + chunk_nll
        if not any(wanted):
            continue
        # d logits = w (softmax (1 + 2 z lse) - onehot); w goes to the narrower factors
        d_logits = logp.exp_()
        if z_loss:
            d_logits *= (1 + 2 * z_loss * chunk_lse)[:, None]
        d_logits.scatter_add_(1, target, d_logits.new_tensor(-1.0).expand(len(at), 1))
        if wanted[0]:
            d_x = scale.new_zeros(len(at), hidden.shape[1])
            for block in blocks:
                _accumulate(d_x, d_logits[:, block], weight[block], x.dtype)
            d_hidden[at] = d_x.mul_(scale[at][:, None]).to(hidden.dtype)
        if wanted[1]:
            weighted = x * scale[at][:, None].to(x.dtype)
            for block in blocks:
                _accumulate(d_weight[block], d_logits[:, block].T, weighted, x.dtype)
    del buffer
    return nll, lse, d_hidden, None if d_weight is None else d_weight.to(weight.dtype)


def _product_dtype(hidden: torch.Tensor, scale: torch.Tensor) -> torch.dtype:
    """CPUs without bf16 units multiply in fp32 faster, and lose nothing."""
    return hidden.dtype if hidden.is_cuda else scale.dtype


def _blocks(weight: torch.Tensor, accumulate: torch.dtype) -> list[slice]:
    """Rows of the vocabulary made fp32 at a time; all where no copy is needed."""
    step = len(weight)
    if not weight.is_cuda and weight.dtype != accumulate:
        step = max(1, math.ceil(BLOCK_VALUES / weight.shape[1]))
    return [slice(at, min(at + step, len(weight))) for at in range(0, len(weight), step)]


def _product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a @ b)


def _accumulate(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> None:
    """out += a b with factors of dtype."""
    a, b = a.to(dtype), b.to(dtype)
    if dtype == out.dtype:
        out.addmm_(a, b)
    else:
        out += a @ b


def _liger_serves(hidden: torch.Tensor) -> bool:
    if not hidden.is_cuda or importlib.util.find_spec("liger_kernel") is None:
        return False
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    # the first release whose reduction="none" has a gradient
    return hasattr(LigerFusedLinearCrossEntropyFunction, "supports_inner_impl_dispatch")


def _liger(hidden, weight, labels, scale, ignore_index, z_loss):
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    found = liger_fused_linear_cross_entropy(
        hidden,
        weight,
        labels,
        ignore_index=ignore_index,
        lse_square_scale=z_loss,
        reduction="none",
        return_z_loss=True,
        accum_dtype=torch.float32,
    )
    nll = found.loss - found.z_loss if z_loss else found.loss
    return (scale * found.loss).sum(), nll.detach()


def _check(hidden, weight, labels, token_weights, chunk_tokens) -> None:
    op = "linear_cross_entropy"
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        shapes = (list(hidden.shape), list(weight.shape))
        refuse("hidden [T, H] and weight [V, H]", shapes, op)
    if hidden.dtype != weight.dtype or not hidden.is_floating_point():
        refuse("hidden and weight of one floating dtype", (hidden.dtype, weight.dtype), op)
    if labels.shape != hidden.shape[:1] or labels.dtype != torch.int64:
        refuse(f"int64 labels [{len(hidden)}]", f"{labels.dtype} {list(labels.shape)}", op)
    if token_weights is not None and token_weights.shape != labels.shape:
        refuse(f"token_weights [{len(hidden)}]", list(token_weights.shape), op)
    if chunk_tokens is not None and chunk_tokens < 1:
        refuse("chunk_tokens >= 1", chunk_tokens, op)
