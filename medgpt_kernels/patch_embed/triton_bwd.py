"""Packed patch embedding in Triton: the backward pass, gathers and split sums, no atomics.

N images, T patches in all, R prefix rows an image, P patch side, K = 3 P P in pixel order, D width,
G side of the position table, S partial sums: their number depends on shapes only, and they are
added in order, so gradients are bitwise repeatable.
"""

import torch
import triton
import triton.language as tl

from medgpt_kernels import tiles
from medgpt_kernels.patch_embed.triton_fwd import (
    MODES,
    PRECISION,
    _axis,
    _by_channel,
    _find_image,
    _load_patches,
    _pixel_offsets,
    _place,
    _weight_columns,
    check_supported,
    index_dtype,
    make_layout,
    make_taps,
    normalisation,
    runs_in_pixel_order,
    weight_strides,
)
from medgpt_kernels.registry import Unsupported

REDUCE_BLOCK = 1024
PROGRAMS = 512  # about how many a launch is split into


@triton.jit
def _output_span(j, out, cells, MODE: tl.constexpr):
    """The outputs [first, end) of one axis that read cell j, the dual of _cell_span."""
    p, q, r, _, radius = _axis(out, cells, MODE)
    before = p * j + r - radius
    first = tl.where(before < 0, 0, before // tl.maximum(q, 1) + 1)
    end = (tl.maximum(p * j + r + radius, 0) + q - 1) // tl.maximum(q, 1)
    return first, tl.where(q == 0, out, tl.minimum(end, out))


@triton.jit(do_not_specialize=["num_patches", "num_images", "search_steps", "prefix_rows"])
def _patch_embed_images_kernel(
    Images, CuSeqlens, num_patches, num_images, search_steps, prefix_rows, BLOCK_T: tl.constexpr
):
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = t < num_patches
    t = tl.minimum(t, num_patches - 1)
    image = _find_image(t, CuSeqlens, num_images, search_steps, prefix_rows)
    tl.store(Images + t, image, mask=inside)


@triton.jit(do_not_specialize=["num_patches", "split_patches", "prefix_rows"])
def _patch_embed_bwd_weight_kernel(
    Partial,
    DTokens,
    Pixels,
    Images,
    CuSeqlens,
    GridSizes,
    offset_0,
    offset_1,
    offset_2,
    scale_0,
    scale_1,
    scale_2,
    stride_d_tokens_t,
    stride_d_tokens_d,
    stride_weight_d,
    stride_weight_c,
    stride_weight_y,
    stride_weight_x,
    num_patches,
    split_patches,
    prefix_rows,
    width,
    P: tl.constexpr,
    BYTES: tl.constexpr,
    DENSE: tl.constexpr,
    DTYPE: tl.constexpr,
    INDEX: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    K: tl.constexpr = 3 * P * P
    TILES_K: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    tiles_d = tl.cdiv(width, BLOCK_D)
    k = tl.program_id(0) % TILES_K * BLOCK_K + tl.arange(0, BLOCK_K)
    d = tl.program_id(0) // TILES_K % tiles_d * BLOCK_D + tl.arange(0, BLOCK_D)
    split = tl.program_id(0) // TILES_K // tiles_d
    columns = DTokens + d.to(INDEX) * stride_d_tokens_d  # [D]

    acc = tl.zeros([BLOCK_D, BLOCK_K], tl.float32)
    begin = split * split_patches
    end = tl.minimum(begin + split_patches, num_patches)
    for t0 in range(begin, end, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        inside = t < end
        image = tl.load(Images + t, mask=inside, other=0)
        _, _, _, _, origin, row, channel = _place(
            tl.minimum(t, num_patches - 1),
            image,
            CuSeqlens,
            GridSizes,
            prefix_rows,
            P,
            BYTES,
            INDEX,
        )
        patches = _load_patches(
            Pixels, k, origin, row, channel, inside,
            offset_0, offset_1, offset_2, scale_0, scale_1, scale_2, P, BYTES,
        )  # fmt: skip
        token = (t + (image + 1) * prefix_rows).to(INDEX)
        d_tokens = tl.load(
            columns[None, :] + token[:, None] * stride_d_tokens_t,
            mask=inside[:, None] & (d < width)[None, :],
            other=0,
        )  # [T, D]
        acc = tl.dot(
            tl.trans(d_tokens).to(DTYPE), patches.to(DTYPE), acc, input_precision=INPUT_PRECISION
        )
    column = _weight_columns(k, stride_weight_c, stride_weight_y, stride_weight_x, P, BYTES, DENSE)
    row_out = split.to(INDEX) * width + d
    tl.store(
        Partial + row_out[:, None] * stride_weight_d + column[None, :],
        acc,
        mask=(d < width)[:, None] & (k < K)[None, :],
    )


@triton.jit(do_not_specialize=["num_patches", "split_patches", "prefix_rows"])
def _patch_embed_bwd_bias_kernel(
    Partial,
    DTokens,
    Images,
    stride_d_tokens_t,
    stride_d_tokens_d,
    num_patches,
    split_patches,
    prefix_rows,
    width,
    INDEX: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    split = tl.program_id(0)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    begin = split * split_patches
    end = tl.minimum(begin + split_patches, num_patches)
    for t0 in range(begin, end, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        image = tl.load(Images + t, mask=t < end, other=0)
        token = (t + (image + 1) * prefix_rows).to(INDEX)
        acc += tl.load(
            DTokens + token[:, None] * stride_d_tokens_t + d[None, :] * stride_d_tokens_d,
            mask=(t < end)[:, None] & (d < width)[None, :],
            other=0,
        ).to(tl.float32)
    tl.store(Partial + split.to(INDEX) * width + d, tl.sum(acc, 0), mask=d < width)


@triton.jit(do_not_specialize=["num_images"])
def _patch_embed_bwd_prefix_kernel(
    DPrefix,
    DTokens,
    CuSeqlens,
    stride_d_tokens_t,
    stride_d_tokens_d,
    num_images,
    width,
    INDEX: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    r = tl.program_id(0)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for n0 in range(0, num_images, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        token = tl.load(CuSeqlens + n, mask=n < num_images, other=0).to(INDEX) + r
        acc += tl.load(
            DTokens + token[:, None] * stride_d_tokens_t + d[None, :] * stride_d_tokens_d,
            mask=(n < num_images)[:, None] & (d < width)[None, :],
            other=0,
        ).to(tl.float32)
    out = tl.sum(acc, 0).to(DPrefix.dtype.element_ty)
    tl.store(DPrefix + r.to(INDEX) * width + d, out, mask=d < width)


@triton.jit(do_not_specialize=["num_images", "split_images", "prefix_rows", "table_side"])
def _patch_embed_bwd_position_kernel(
    Partial,
    DTokens,
    Taps,
    CuSeqlens,
    GridSizes,
    stride_d_tokens_t,
    stride_d_tokens_d,
    num_images,
    split_images,
    prefix_rows,
    table_side,
    width,
    MODE: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tiles_g = tl.cdiv(table_side, BLOCK_G)
    gx0 = tl.program_id(0) % tiles_g * BLOCK_G
    gy = tl.program_id(0) // tiles_g
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    split = tl.program_id(2)
    gx = gx0 + tl.arange(0, BLOCK_G)
    columns = DTokens + d.to(INDEX) * stride_d_tokens_d  # [D]

    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    begin = split * split_images
    for image in range(begin, tl.minimum(begin + split_images, num_images)):
        start = tl.load(CuSeqlens + image)
        height = tl.load(GridSizes + 2 * image)
        grid_w = tl.load(GridSizes + 2 * image + 1)
        row_y = (start - image * (prefix_rows - 1)).to(INDEX)  # of Taps
        row_x = row_y + height
        token = start.to(INDEX) + prefix_rows
        first_y, end_y = _output_span(gy, height, table_side, MODE)
        first_x, _ = _output_span(gx0, grid_w, table_side, MODE)
        _, end_x = _output_span(tl.minimum(gx0 + BLOCK_G, table_side) - 1, grid_w, table_side, MODE)
        for x0 in range(first_x, end_x, BLOCK_X):
            x = x0 + tl.arange(0, BLOCK_X)
            blended = tl.zeros([BLOCK_X, BLOCK_D], tl.float32)
            for y in range(first_y, end_y):
                weight_y = tl.load(Taps + (row_y + y) * table_side + gy)
                d_tokens = tl.load(
                    columns[None, :] + (token + y * grid_w + x)[:, None] * stride_d_tokens_t,
                    mask=(x < end_x)[:, None] & (d < width)[None, :],
                    other=0,
                )
                blended += weight_y * d_tokens.to(tl.float32)
            weight_x = tl.load(
                Taps + (row_x + x)[None, :] * table_side + gx[:, None],
                mask=(x < end_x)[None, :] & (gx < table_side)[:, None],
                other=0,
            )  # [G, X]
            acc = tl.dot(weight_x, blended, acc, input_precision="ieee")
    cell = (split * table_side + gy).to(INDEX) * table_side + gx
    tl.store(
        Partial + cell[:, None] * width + d[None, :],
        acc,
        mask=(gx < table_side)[:, None] & (d < width)[None, :],
    )


@triton.jit(do_not_specialize=["num_patches", "num_images", "search_steps", "prefix_rows"])
def _patch_embed_bwd_pixels_kernel(
    DPixels,
    DTokens,
    Weight,
    CuSeqlens,
    GridSizes,
    scale_0,
    scale_1,
    scale_2,
    stride_d_tokens_t,
    stride_d_tokens_d,
    stride_weight_d,
    stride_weight_c,
    stride_weight_y,
    stride_weight_x,
    num_patches,
    num_images,
    search_steps,
    prefix_rows,
    width,
    P: tl.constexpr,
    DENSE: tl.constexpr,
    INDEX: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    K: tl.constexpr = 3 * P * P
    TILES_K: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    tile_t = tl.program_id(0) // TILES_K
    t = tile_t * BLOCK_T + tl.arange(0, BLOCK_T)
    k = tl.program_id(0) % TILES_K * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = t < num_patches
    t = tl.minimum(t, num_patches - 1)
    image = _find_image(t, CuSeqlens, num_images, search_steps, prefix_rows)
    _, _, _, _, origin, row, channel = _place(
        t, image, CuSeqlens, GridSizes, prefix_rows, P, False, INDEX
    )
    token = (t + (image + 1) * prefix_rows).to(INDEX)
    column = _weight_columns(k, stride_weight_c, stride_weight_y, stride_weight_x, P, False, DENSE)

    acc = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
    for d0 in range(0, width, BLOCK_D):
        d = (d0 + tl.arange(0, BLOCK_D)).to(INDEX)
        weight = tl.load(
            Weight + d[:, None] * stride_weight_d + column[None, :],
            mask=(d < width)[:, None] & (k < K)[None, :],
            other=0,
        )  # [D, K]
        d_tokens = tl.load(
            DTokens + token[:, None] * stride_d_tokens_t + d[None, :] * stride_d_tokens_d,
            mask=inside[:, None] & (d < width)[None, :],
            other=0,
        )  # [T, D]
        acc = tl.dot(d_tokens.to(weight.dtype), weight, acc, input_precision=INPUT_PRECISION)
    acc *= _by_channel(k, scale_0, scale_1, scale_2, P, False)[None, :]
    tl.store(
        DPixels + _pixel_offsets(k, origin, row, channel, P, False),
        acc.to(DPixels.dtype.element_ty),
        mask=inside[:, None] & (k < K)[None, :],
    )


@triton.jit(do_not_specialize=["num_splits"])
def _patch_embed_reduce_kernel(Out, Partial, num_splits, numel, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    lost = tl.zeros([BLOCK], tl.float32)
    for split in range(num_splits):  # compensated: the order is fixed, the error one rounding
        value = tl.load(Partial + tl.cast(split, tl.int64) * numel + at, mask=at < numel, other=0)
        value -= lost
        new = total + value
        lost = (new - total) - value
        total = new
    tl.store(Out + at, total.to(Out.dtype.element_ty), mask=at < numel)


def _sum_partials(partial: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """partial [S, ...] fp32 -> out [...] in its own dtype."""
    _patch_embed_reduce_kernel[(triton.cdiv(out.numel(), REDUCE_BLOCK),)](
        Out=out,
        Partial=partial,
        num_splits=partial.shape[0],
        numel=out.numel(),
        BLOCK=REDUCE_BLOCK,
        num_warps=4,
    )
    return out


def _split(items: int, block: int, programs: int) -> tuple[int, int]:
    """How many partial sums, and how many items each, a multiple of block; from shapes only."""
    splits = min(triton.cdiv(items, 4 * block), triton.cdiv(PROGRAMS, programs))
    each = triton.cdiv(triton.cdiv(items, max(splits, 1)), block) * block
    return max(triton.cdiv(items, max(each, 1)), 1), each


def _d_weight(d_tokens, pixels, weight, layout, images, rows, patch_size, weight_layout, mean, std):
    cu_seqlens, grid_sizes = layout
    width, depth = weight.shape[0], weight[0].numel()
    config = tiles.choose("patch_embed_bwd_weight", weight, str(tiles.bits(weight)))
    programs = triton.cdiv(width, config["BLOCK_D"]) * triton.cdiv(depth, config["BLOCK_K"])
    splits, each = _split(images.numel(), config["BLOCK_T"], programs)
    partial = torch.empty(splits, *weight.shape, dtype=torch.float32, device=weight.device)
    strides = weight_strides(partial[0], patch_size, weight_layout)
    is_bytes = pixels.dtype == torch.uint8
    _patch_embed_bwd_weight_kernel[(splits * programs,)](
        Partial=partial,
        DTokens=d_tokens,
        Pixels=pixels.contiguous(),
        Images=images,
        CuSeqlens=cu_seqlens,
        GridSizes=grid_sizes,
        **normalisation(pixels, mean, std),
        stride_d_tokens_t=d_tokens.stride(0),
        stride_d_tokens_d=d_tokens.stride(1),
        **{f"stride_weight_{name}": stride for name, stride in strides.items()},
        num_patches=images.numel(),
        split_patches=each,
        prefix_rows=rows,
        width=width,
        P=patch_size,
        BYTES=is_bytes,
        DENSE=runs_in_pixel_order(strides, patch_size, is_bytes),
        DTYPE=TL_DTYPES[weight.dtype],
        INDEX=index_dtype(d_tokens, pixels, partial),
        **PRECISION,
        **config,
    )
    return _sum_partials(
        partial, torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    )


def _d_bias(d_tokens, bias, images, rows):
    width = bias.shape[0]
    config = tiles.choose("patch_embed_bwd_bias", bias)
    programs = triton.cdiv(width, config["BLOCK_D"])
    splits, each = _split(images.numel(), config["BLOCK_T"], programs)
    partial = torch.empty(splits, width, dtype=torch.float32, device=bias.device)
    _patch_embed_bwd_bias_kernel[(splits, programs)](
        Partial=partial,
        DTokens=d_tokens,
        Images=images,
        stride_d_tokens_t=d_tokens.stride(0),
        stride_d_tokens_d=d_tokens.stride(1),
        num_patches=images.numel(),
        split_patches=each,
        prefix_rows=rows,
        width=width,
        INDEX=index_dtype(d_tokens),
        **config,
    )
    return _sum_partials(partial, torch.empty(width, dtype=bias.dtype, device=bias.device))


def _d_position(d_tokens, table, layout, patches, rows, interpolation):
    cu_seqlens, grid_sizes = layout
    side, _, width = table.shape
    images = grid_sizes.shape[0]
    taps = make_taps(cu_seqlens, grid_sizes, patches, rows, side, interpolation)
    block_g = min(max(triton.next_power_of_2(side), 16), 32)
    cells = side * triton.cdiv(side, block_g)
    config = tiles.choose("patch_embed_bwd_position", table)
    tiles_d = triton.cdiv(width, config["BLOCK_D"])
    each = triton.cdiv(images, min(images, triton.cdiv(PROGRAMS, cells * tiles_d)))
    splits = triton.cdiv(images, each)
    partial = torch.empty(splits, *table.shape, dtype=torch.float32, device=table.device)
    _patch_embed_bwd_position_kernel[(cells, tiles_d, splits)](
        Partial=partial,
        DTokens=d_tokens,
        Taps=taps,
        CuSeqlens=cu_seqlens,
        GridSizes=grid_sizes,
        stride_d_tokens_t=d_tokens.stride(0),
        stride_d_tokens_d=d_tokens.stride(1),
        num_images=images,
        split_images=each,
        prefix_rows=rows,
        table_side=side,
        width=width,
        MODE=MODES[interpolation],
        INDEX=index_dtype(d_tokens, taps, partial),
        BLOCK_G=block_g,
        **config,
    )
    return _sum_partials(partial, torch.empty(table.shape, dtype=table.dtype, device=table.device))


def _d_prefix(d_tokens, prefix, cu_seqlens):
    rows, width = prefix.shape
    out = torch.empty(prefix.shape, dtype=prefix.dtype, device=prefix.device)
    if out.numel() == 0:
        return out
    config = tiles.choose("patch_embed_bwd_prefix", prefix)
    _patch_embed_bwd_prefix_kernel[(rows, triton.cdiv(width, config["BLOCK_D"]))](
        DPrefix=out,
        DTokens=d_tokens,
        CuSeqlens=cu_seqlens,
        stride_d_tokens_t=d_tokens.stride(0),
        stride_d_tokens_d=d_tokens.stride(1),
        num_images=cu_seqlens.shape[0] - 1,
        width=width,
        INDEX=index_dtype(d_tokens),
        **config,
    )
    return out


def _d_pixels(
    d_tokens, pixels, weight, layout, patches, rows, patch_size, weight_layout, mean, std
):
    cu_seqlens, grid_sizes = layout
    images, width = grid_sizes.shape[0], weight.shape[0]
    strides = weight_strides(weight, patch_size, weight_layout)
    config = tiles.choose("patch_embed_bwd_pixels", weight, str(tiles.bits(weight)))
    programs = triton.cdiv(patches, config["BLOCK_T"]) * triton.cdiv(
        3 * patch_size * patch_size, config["BLOCK_K"]
    )
    scales = {k: v for k, v in normalisation(pixels, mean, std).items() if "scale" in k}
    out = torch.empty(pixels.shape, dtype=pixels.dtype, device=pixels.device)
    _patch_embed_bwd_pixels_kernel[(programs,)](
        DPixels=out,
        DTokens=d_tokens,
        Weight=weight,
        CuSeqlens=cu_seqlens,
        GridSizes=grid_sizes,
        **scales,
        stride_d_tokens_t=d_tokens.stride(0),
        stride_d_tokens_d=d_tokens.stride(1),
        **{f"stride_weight_{name}": stride for name, stride in strides.items()},
        num_patches=patches,
        num_images=images,
        search_steps=max(images - 1, 0).bit_length(),
        prefix_rows=rows,
        width=width,
        P=patch_size,
        DENSE=runs_in_pixel_order(strides, patch_size, False),
        INDEX=index_dtype(d_tokens, pixels, weight),
        **PRECISION,
        **config,
    )
    return out


TL_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


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
    check_supported(pixels, weight)
    if wanted[4] and pixels.dtype == torch.uint8:
        raise Unsupported("the gradient of uint8 pixels")
    images = sizes.shape[0]
    patches = pixels.numel() // (3 * patch_size * patch_size)
    rows = 0 if prefix is None else prefix.shape[0]
    grads = [weight.new_empty(0) for _ in wanted]
    with torch.cuda.device_of(pixels):
        layout = make_layout(sizes, patch_size, rows)
        if wanted[0] or wanted[1]:
            image_of = torch.empty(patches, dtype=torch.int32, device=pixels.device)
            _patch_embed_images_kernel[(triton.cdiv(patches, 256),)](
                Images=image_of,
                CuSeqlens=layout[0],
                num_patches=patches,
                num_images=images,
                search_steps=max(images - 1, 0).bit_length(),
                prefix_rows=rows,
                BLOCK_T=256,
                num_warps=4,
            )
        if wanted[0]:
            grads[0] = _d_weight(
                d_tokens, pixels, weight, layout, image_of, rows,
                patch_size, weight_layout, mean, std,
            )  # fmt: skip
        if wanted[1]:
            grads[1] = _d_bias(d_tokens, bias, image_of, rows)
        if wanted[2]:
            grads[2] = _d_position(
                d_tokens, position_embedding, layout, patches, rows, interpolation
            )
        if wanted[3]:
            grads[3] = _d_prefix(d_tokens, prefix, layout[0])
        if wanted[4]:
            grads[4] = _d_pixels(
                d_tokens, pixels.contiguous(), weight, layout, patches, rows,
                patch_size, weight_layout, mean, std,
            )  # fmt: skip
    return tuple(grads)
