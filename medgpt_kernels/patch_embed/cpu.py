"""Packed patch embedding on the CPU: launchers of csrc/cpu/patch_embed.cpp."""

import torch

from medgpt_kernels import native
from medgpt_kernels.native import DTYPE_CODES, pointer
from medgpt_kernels.registry import Unsupported

native.cpu()

INTERPOLATION_CODES = {
    "bilinear_antialias": 0,
    "bilinear_align_corners": 1,
    "bicubic": 2,
    "bicubic_antialias": 3,
}


def _problem(
    pixels,
    sizes,
    weight,
    table,
    prefix_rows,
    patch_size,
    weight_layout,
    interpolation,
    mean,
    std,
):
    """The C++ description of one batch; its tensors must stay alive while it is used."""
    if weight.dtype not in DTYPE_CODES or pixels.dtype not in DTYPE_CODES:
        raise Unsupported(f"pixels {pixels.dtype} with weight {weight.dtype}")
    return native.problem(
        "PatchEmbedProblem",
        pixels=pixels.data_ptr(),
        pixel_dtype=DTYPE_CODES[pixels.dtype],
        sizes=sizes.data_ptr(),
        images=sizes.shape[0],
        patches=pixels.numel() // (3 * patch_size * patch_size),
        prefix_rows=prefix_rows,
        patch_size=patch_size,
        width=weight.shape[0],
        grid=0 if table is None else table.shape[0],
        interpolation=INTERPOLATION_CODES[interpolation],
        conv_layout=weight_layout == "conv",
        mean=mean,
        std=std,
    )


def patch_embed_fwd(
    pixels,
    sizes,
    weight,
    bias,
    position_embedding,
    prefix,
    patch_size,
    weight_layout,
    interpolation,
    mean,
    std,
):
    library = native.cpu()
    pixels, sizes, weight = pixels.contiguous(), sizes.contiguous(), weight.contiguous()
    table = None if position_embedding is None else position_embedding.float().contiguous()
    bias = None if bias is None else bias.contiguous()
    prefix = None if prefix is None else prefix.contiguous()
    rows = 0 if prefix is None else prefix.shape[0]
    problem = _problem(
        pixels, sizes, weight, table, rows,
        patch_size, weight_layout, interpolation, mean, std,
    )  # fmt: skip
    total = pixels.numel() // (3 * patch_size * patch_size) + rows * sizes.shape[0]
    tokens = torch.empty(total, weight.shape[0], dtype=weight.dtype)
    coords = torch.empty(total, 2, dtype=torch.int32)
    grid_sizes = torch.div(sizes, patch_size, rounding_mode="floor")
    cu_seqlens = torch.zeros(sizes.shape[0] + 1, dtype=torch.int32)
    torch.cumsum(grid_sizes.prod(1) + rows, 0, dtype=torch.int32, out=cu_seqlens[1:])
    library.patch_embed_fwd(
        problem=problem,
        dtype=DTYPE_CODES[weight.dtype],
        weight=pointer(weight),
        bias=pointer(bias),
        table=pointer(table),
        prefix=pointer(prefix),
        tokens=pointer(tokens),
        coords=pointer(coords),
    )
    return tokens, cu_seqlens, grid_sizes, coords


def patch_embed_bwd(
    d_tokens,
    pixels,
    sizes,
    weight,
    bias,
    position_embedding,
    prefix,
    patch_size,
    weight_layout,
    interpolation,
    mean,
    std,
    wanted,
):
    library = native.cpu()
    pixels, sizes, weight = pixels.contiguous(), sizes.contiguous(), weight.contiguous()
    d_tokens = d_tokens.contiguous()
    rows = 0 if prefix is None else prefix.shape[0]
    problem = _problem(
        pixels, sizes, weight, position_embedding, rows,
        patch_size, weight_layout, interpolation, mean, std,
    )  # fmt: skip
    tensors = (weight, bias, position_embedding, prefix, pixels)
    made = (weight.dtype, weight.dtype, torch.float32, weight.dtype, torch.float32)
    grads = [
        torch.empty(t.shape, dtype=dtype) if need else None
        for t, dtype, need in zip(tensors, made, wanted, strict=True)
    ]
    d_weight, d_bias, d_table, d_prefix, d_pixels = grads
    library.patch_embed_bwd(
        problem=problem,
        dtype=DTYPE_CODES[weight.dtype],
        d_tokens=pointer(d_tokens),
        weight=pointer(weight),
        d_weight=pointer(d_weight),
        d_bias=pointer(d_bias),
        d_table=pointer(d_table),
        d_prefix=pointer(d_prefix),
        d_pixels=pointer(d_pixels),
    )
    return tuple(
        weight.new_empty(0) if g is None else g.to(t.dtype)
        for g, t in zip(grads, tensors, strict=True)
    )
