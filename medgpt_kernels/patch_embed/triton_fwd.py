"""Packed patch embedding in Triton: the forward pass, and what both passes share.

N images, T patches in all, R prefix rows an image, total = T + N R tokens, P patch side,
K = 3 P P, D width, G side of the position table. K runs in pixel order: (y, x, c) for uint8
pixels, which lie HWC, and (c, y, x) for float ones, which lie CHW.
"""

import torch
import triton
import triton.language as tl

from medgpt_kernels import tiles
from medgpt_kernels.registry import Unsupported

BILINEAR_ANTIALIAS = tl.constexpr(0)
BILINEAR_ALIGN_CORNERS = tl.constexpr(1)
BICUBIC = tl.constexpr(2)
BICUBIC_ANTIALIAS = tl.constexpr(3)
MODES = {
    "bilinear_antialias": 0,
    "bilinear_align_corners": 1,
    "bicubic": 2,
    "bicubic_antialias": 3,
}
INT32_ELEMENTS = 2**31
PRECISION = {"INPUT_PRECISION": "ieee"}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def _axis(out, cells, MODE: tl.constexpr):
    """One axis of the resize from `cells` table cells to `out` outputs, in exact rationals.

    Output i and cell j lie (p j - q i + r) / unit apart, and touch where |p j - q i + r| < radius.
    """
    if MODE == BILINEAR_ALIGN_CORNERS:
        p = tl.maximum(out - 1, 1)
        q = cells - 1
        r = out - out
        unit = p
    else:
        p = 2 * out
        q = 2 * cells
        r = out - cells
        unit = p if MODE == BICUBIC else tl.maximum(p, q)
    SUPPORT: tl.constexpr = 2 if MODE >= BICUBIC else 1
    radius = tl.where(out == cells, 1, SUPPORT * unit)  # equal grids: the table as it is
    return p, q, r, unit, radius


@triton.jit
def _influence(distance, unit, MODE: tl.constexpr):
    """The weight, before normalisation, of a cell at distance / unit, fp64."""
    x = tl.abs(distance).to(tl.float64) / unit.to(tl.float64)
    if MODE >= BICUBIC:
        A: tl.constexpr = -0.75 if MODE == BICUBIC else -0.5
        near = ((A + 2) * x - (A + 3)) * x * x + 1
        far = ((x - 5) * x + 8) * x * A - 4 * A
        return tl.where(x < 1, near, tl.where(x < 2, far, 0.0))
    return tl.maximum(1 - x, 0.0)


@triton.jit
def _taps(i, j, out, cells, MODE: tl.constexpr):
    """Weights [I, J] of cells j for outputs i of one axis, fp32 from fp64."""
    p, q, r, unit, _ = _axis(out, cells, MODE)
    at = q * i[:, None] - r
    weight = _influence(p * j[None, :] - at, unit, MODE)
    if MODE == BICUBIC:  # taps beyond the border fall on the border cell
        for beyond in tl.static_range(1, 3):
            before = _influence(-p * beyond - at, unit, MODE)
            after = _influence(p * (cells - 1 + beyond) - at, unit, MODE)
            weight += tl.where(j == 0, 1.0, 0.0)[None, :] * before
            weight += tl.where(j == cells - 1, 1.0, 0.0)[None, :] * after
    weight = tl.where((j < cells)[None, :], weight, 0.0)
    if MODE == BILINEAR_ANTIALIAS or MODE == BICUBIC_ANTIALIAS:  # noqa: SIM109
        weight /= tl.sum(weight, 1)[:, None]
    return weight.to(tl.float32)


@triton.jit
def _cell_span(i, out, cells, MODE: tl.constexpr):
    """The first cell that output i reads, and how many follow at most."""
    p, q, r, _, radius = _axis(out, cells, MODE)
    first = tl.maximum(q * i - r - radius + 4 * p, 0) // p - 3
    return tl.maximum(first, 0), (2 * radius - 1) // p + 1


@triton.jit
def _find_image(patch, CuSeqlens, num_images, search_steps, prefix_rows):
    """The image of each patch: the last whose first patch, cu_seqlens[n] - n R, is not past it."""
    low = patch * 0
    high = low + num_images
    for _ in range(search_steps):
        middle = (low + high) // 2
        past = tl.load(CuSeqlens + middle) - middle * prefix_rows > patch
        high = tl.where(past, middle, high)
        low = tl.where(past, low, middle)
    return low


@triton.jit
def _place(
    patch, image, CuSeqlens, GridSizes, prefix_rows,
    P: tl.constexpr, BYTES: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Of patches: y, x, grid height and width; origin, row and channel stride in the pixels."""
    first = tl.load(CuSeqlens + image) - image * prefix_rows
    height = tl.load(GridSizes + 2 * image)
    width = tl.load(GridSizes + 2 * image + 1)
    local = patch - first
    y = local // width
    x = local - y * width
    row = width.to(INDEX) * P
    channel = row * height * P
    if BYTES:
        row *= 3
        x_stride: tl.constexpr = 3 * P
    else:
        x_stride: tl.constexpr = P
    origin = first.to(INDEX) * (3 * P * P) + y * row * P + x * x_stride
    return y, x, height, width, origin, row, channel


@triton.jit
def _split_depth(k, P: tl.constexpr, BYTES: tl.constexpr):
    """k in pixel order -> channel, y, x inside the patch."""
    if BYTES:
        return k % 3, k // (3 * P), k // 3 % P
    return k // (P * P), k // P % P, k % P


@triton.jit
def _pixel_offsets(k, origin, row, channel, P: tl.constexpr, BYTES: tl.constexpr):
    """Offsets [T, K] of patch elements in the flat pixel buffer."""
    if BYTES:
        y = k // (3 * P)
        within = k % (3 * P)
        return origin[:, None] + row[:, None] * y[None, :] + within[None, :]
    c, y, x = _split_depth(k, P, BYTES)
    return origin[:, None] + channel[:, None] * c[None, :] + row[:, None] * y[None, :] + x[None, :]


@triton.jit
def _by_channel(k, value_0, value_1, value_2, P: tl.constexpr, BYTES: tl.constexpr):
    c, _, _ = _split_depth(k, P, BYTES)
    return tl.where(c == 0, value_0, tl.where(c == 1, value_1, value_2))


@triton.jit
def _load_patches(
    Pixels, k, origin, row, channel, inside,
    offset_0, offset_1, offset_2, scale_0, scale_1, scale_2,
    P: tl.constexpr, BYTES: tl.constexpr,
):  # fmt: skip
    """Normalised fp32 patches [T, K]: (pixel - offset) * scale by channel."""
    where = _pixel_offsets(k, origin, row, channel, P, BYTES)
    pixel = tl.load(Pixels + where, mask=inside[:, None] & (k < 3 * P * P)[None, :], other=0)
    offset = _by_channel(k, offset_0, offset_1, offset_2, P, BYTES)
    scale = _by_channel(k, scale_0, scale_1, scale_2, P, BYTES)
    return (pixel.to(tl.float32) - offset[None, :]) * scale[None, :]


@triton.jit
def _weight_columns(
    k, stride_c, stride_y, stride_x, P: tl.constexpr, BYTES: tl.constexpr, DENSE: tl.constexpr
):
    """Offsets [K] within a weight row; DENSE: the weight itself runs in pixel order."""
    if DENSE:
        return k
    c, y, x = _split_depth(k, P, BYTES)
    return c * stride_c + y * stride_y + x * stride_x


@triton.jit
def _add_position(
    acc, PositionEmbedding, Taps, row_y, row_x, y, x, height, width, d, inside,
    table_side, table_width, MODE: tl.constexpr,
):  # fmt: skip
    """acc [T, D] + the interpolated position rows of patches, fp32."""
    first_y, count_y = _cell_span(y, height, table_side, MODE)
    first_x, count_x = _cell_span(x, width, table_side, MODE)
    for i in range(tl.max(count_y, 0)):
        gy = first_y + i
        weight_y = tl.load(Taps + row_y + gy, mask=inside & (gy < table_side), other=0)
        blended = tl.zeros(acc.shape, tl.float32)  # along x
        for j in range(tl.max(count_x, 0)):
            gx = first_x + j
            weight_x = tl.load(Taps + row_x + gx, mask=inside & (gx < table_side), other=0)
            value = tl.load(
                PositionEmbedding + (gy * table_side + gx)[:, None] * table_width + d[None, :],
                mask=(weight_x * weight_y != 0)[:, None] & (d < table_width)[None, :],
                other=0,
            )
            blended += weight_x[:, None] * value.to(tl.float32)
        acc += weight_y[:, None] * blended
    return acc


@triton.jit(do_not_specialize=["num_images", "prefix_rows"])
def _patch_embed_layout_kernel(
    Sizes, CuSeqlens, GridSizes, num_images, prefix_rows, P: tl.constexpr, BLOCK_N: tl.constexpr
):
    tl.store(CuSeqlens, 0)
    start = num_images * 0
    for n0 in range(0, num_images, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        inside = n < num_images
        height = tl.load(Sizes + 2 * n, mask=inside, other=0) // P
        width = tl.load(Sizes + 2 * n + 1, mask=inside, other=0) // P
        tl.store(GridSizes + 2 * n, height, mask=inside)
        tl.store(GridSizes + 2 * n + 1, width, mask=inside)
        length = tl.where(inside, height * width + prefix_rows, 0)
        tl.store(CuSeqlens + 1 + n, start + tl.cumsum(length, 0), mask=inside)
        start += tl.sum(length, 0)


@triton.jit(do_not_specialize=["prefix_rows", "table_side"])
def _patch_embed_taps_kernel(
    Taps,
    CuSeqlens,
    GridSizes,
    prefix_rows,
    table_side,
    MODE: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    image = tl.program_id(0)
    row = (tl.load(CuSeqlens + image) - image * (prefix_rows - 1)).to(tl.int64)
    j = tl.arange(0, BLOCK_G)
    for axis in range(2):
        out = tl.load(GridSizes + 2 * image + axis)
        for i0 in range(0, out, BLOCK_I):
            i = i0 + tl.arange(0, BLOCK_I)
            tl.store(
                Taps + (row + i)[:, None] * table_side + j[None, :],
                _taps(tl.minimum(i, out - 1), j, out, table_side, MODE),
                mask=(i < out)[:, None] & (j < table_side)[None, :],
            )
        row += out


@triton.jit(do_not_specialize=["prefix_rows"])
def _patch_embed_prefix_kernel(
    Tokens, PatchCoords, Prefix, CuSeqlens, prefix_rows, width, BLOCK_D: tl.constexpr
):
    image = tl.program_id(0) // prefix_rows
    r = tl.program_id(0) % prefix_rows
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    row = (tl.load(CuSeqlens + image) + r).to(tl.int64)
    value = tl.load(Prefix + r * width + d, mask=d < width)
    tl.store(Tokens + row * width + d, value, mask=d < width)
    if tl.program_id(1) == 0:
        tl.store(PatchCoords + 2 * row, -1)
        tl.store(PatchCoords + 2 * row + 1, -1)


@triton.jit(
    do_not_specialize=["num_patches", "num_images", "search_steps", "table_side", "prefix_rows"]
)
def _patch_embed_fwd_kernel(
    Tokens,
    PatchCoords,
    Pixels,
    Weight,
    Bias,
    PositionEmbedding,
    Taps,
    CuSeqlens,
    GridSizes,
    offset_0,
    offset_1,
    offset_2,
    scale_0,
    scale_1,
    scale_2,
    stride_weight_d,
    stride_weight_c,
    stride_weight_y,
    stride_weight_x,
    num_patches,
    num_images,
    search_steps,
    table_side,
    prefix_rows,
    width,
    P: tl.constexpr,
    BYTES: tl.constexpr,
    DENSE: tl.constexpr,
    MODE: tl.constexpr,
    INDEX: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    K: tl.constexpr = 3 * P * P
    tiles_d = tl.cdiv(width, BLOCK_D)
    tile_t = tl.program_id(0) // tiles_d  # columns run fastest: their pixels are in the cache
    tile_d = tl.program_id(0) % tiles_d
    t = tile_t * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tile_d * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = t < num_patches
    t = tl.minimum(t, num_patches - 1)
    image = _find_image(t, CuSeqlens, num_images, search_steps, prefix_rows)
    y, x, grid_h, grid_w, origin, row, channel = _place(
        t, image, CuSeqlens, GridSizes, prefix_rows, P, BYTES, INDEX
    )
    weight_rows = Weight + d.to(INDEX) * stride_weight_d  # [D]

    acc = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        patches = _load_patches(
            Pixels, k, origin, row, channel, inside,
            offset_0, offset_1, offset_2, scale_0, scale_1, scale_2, P, BYTES,
        )  # fmt: skip
        column = _weight_columns(
            k, stride_weight_c, stride_weight_y, stride_weight_x, P, BYTES, DENSE
        )
        weight = tl.load(
            weight_rows[None, :] + column[:, None],
            mask=(k < K)[:, None] & (d < width)[None, :],
            other=0,
        )  # [K, D]
        acc = tl.dot(patches.to(weight.dtype), weight, acc, input_precision=INPUT_PRECISION)

    if Bias is not None:
        acc += tl.load(Bias + d, mask=d < width, other=0).to(tl.float32)[None, :]
    if PositionEmbedding is not None:
        row_y = (t - y * grid_w - x + image + y).to(INDEX) * table_side
        row_x = row_y + (grid_h - y + x) * table_side
        acc = _add_position(
            acc, PositionEmbedding, Taps, row_y, row_x, y, x, grid_h, grid_w, d, inside,
            table_side, width, MODE,
        )  # fmt: skip
    out_row = (t + (image + 1) * prefix_rows).to(INDEX)
    tl.store(
        Tokens + out_row[:, None] * width + d[None, :],
        acc.to(Tokens.dtype.element_ty),
        mask=inside[:, None] & (d < width)[None, :],
    )
    if tile_d == 0:
        tl.store(PatchCoords + 2 * out_row, y, mask=inside)
        tl.store(PatchCoords + 2 * out_row + 1, x, mask=inside)


INTERPRETED = not isinstance(_patch_embed_fwd_kernel, triton.JITFunction)


def check_supported(pixels: torch.Tensor, weight: torch.Tensor) -> None:
    """Raise Unsupported, before any work, for what these kernels cannot do."""
    if pixels.device.type == "cpu" and not INTERPRETED:
        raise Unsupported("Triton runs on CPU tensors only under TRITON_INTERPRET=1")
    if weight.dtype not in DTYPES or pixels.dtype not in (*DTYPES, torch.uint8):
        raise Unsupported(f"pixels {pixels.dtype} with weight {weight.dtype} in Triton")


def normalisation(pixels: torch.Tensor, mean: list[float], std: list[float]) -> dict[str, float]:
    """The kernels' arguments for (pixel - offset) * scale, uint8 being in units of 1 / 255."""
    unit = 255.0 if pixels.dtype == torch.uint8 else 1.0
    offsets = {f"offset_{c}": unit * m for c, m in enumerate(mean)}
    return offsets | {f"scale_{c}": 1 / (unit * s) for c, s in enumerate(std)}


def weight_strides(weight: torch.Tensor, patch_size: int, weight_layout: str) -> dict[str, int]:
    """Strides of a weight of either layout along width, channel, y and x."""
    if weight_layout == "conv":
        strides = weight.stride()
    else:
        along = weight.stride(1)
        strides = (weight.stride(0), along, 3 * patch_size * along, 3 * along)
    return dict(zip(("d", "c", "y", "x"), strides, strict=True))


def runs_in_pixel_order(strides: dict[str, int], patch_size: int, is_bytes: bool) -> bool:
    order = (1, 3 * patch_size, 3) if is_bytes else (patch_size * patch_size, patch_size, 1)
    return (strides["c"], strides["y"], strides["x"]) == order


def index_dtype(*tensors: torch.Tensor | None):
    """The dtype that offsets into these tensors need: half the registers where 32 bits do."""
    last = max(
        sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
        for t in tensors
        if t is not None
    )
    return tl.int64 if last >= INT32_ELEMENTS else tl.int32


def dense(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()


def make_layout(sizes: torch.Tensor, patch_size: int, prefix_rows: int):
    """cu_seqlens [N + 1] and grid_sizes [N, 2], int32, without a word to the host."""
    images = sizes.shape[0]
    cu_seqlens = torch.empty(images + 1, dtype=torch.int32, device=sizes.device)
    grid_sizes = torch.empty(images, 2, dtype=torch.int32, device=sizes.device)
    _patch_embed_layout_kernel[(1,)](
        Sizes=sizes.contiguous(),
        CuSeqlens=cu_seqlens,
        GridSizes=grid_sizes,
        num_images=images,
        prefix_rows=prefix_rows,
        P=patch_size,
        BLOCK_N=256,
        num_warps=4,
    )
    return cu_seqlens, grid_sizes


def make_taps(cu_seqlens, grid_sizes, patches: int, prefix_rows: int, table_side: int, mode: str):
    """Interpolation weights [T + N, G] of every image's two axes, fp32.

    Image n's rows start at its first patch + n: one for each y, then one for each x (h + w is at
    most h w + 1, so T + N rows hold them all; the rest stay unused).
    """
    images = grid_sizes.shape[0]
    taps = torch.empty(patches + images, table_side, dtype=torch.float32, device=grid_sizes.device)
    _patch_embed_taps_kernel[(images,)](
        Taps=taps,
        CuSeqlens=cu_seqlens,
        GridSizes=grid_sizes,
        prefix_rows=prefix_rows,
        table_side=table_side,
        MODE=MODES[mode],
        BLOCK_I=16,
        BLOCK_G=triton.next_power_of_2(table_side),
        num_warps=4,
    )
    return taps


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
    check_supported(pixels, weight)
    images, width = sizes.shape[0], weight.shape[0]
    patches = pixels.numel() // (3 * patch_size * patch_size)
    rows = 0 if prefix is None else prefix.shape[0]
    is_bytes = pixels.dtype == torch.uint8
    strides = weight_strides(weight, patch_size, weight_layout)
    config = tiles.choose("patch_embed_fwd", weight, str(tiles.bits(weight)))
    tokens = weight.new_empty(patches + rows * images, width)
    coords = torch.empty(len(tokens), 2, dtype=torch.int32, device=pixels.device)
    with torch.cuda.device_of(pixels):
        cu_seqlens, grid_sizes = make_layout(sizes, patch_size, rows)
        if rows:
            _patch_embed_prefix_kernel[(images * rows, triton.cdiv(width, 1024))](
                Tokens=tokens,
                PatchCoords=coords,
                Prefix=prefix.contiguous(),
                CuSeqlens=cu_seqlens,
                prefix_rows=rows,
                width=width,
                BLOCK_D=1024,
                num_warps=4,
            )
        taps, side = None, 0
        if position_embedding is not None:
            side = position_embedding.shape[0]
            taps = make_taps(cu_seqlens, grid_sizes, patches, rows, side, interpolation)
        programs = triton.cdiv(patches, config["BLOCK_T"]) * triton.cdiv(width, config["BLOCK_D"])
        _patch_embed_fwd_kernel[(programs,)](
            Tokens=tokens,
            PatchCoords=coords,
            Pixels=pixels.contiguous(),
            Weight=weight,
            Bias=dense(bias),
            PositionEmbedding=dense(position_embedding),
            Taps=taps,
            CuSeqlens=cu_seqlens,
            GridSizes=grid_sizes,
            **normalisation(pixels, mean, std),
            **{f"stride_weight_{name}": stride for name, stride in strides.items()},
            num_patches=patches,
            num_images=images,
            search_steps=max(images - 1, 0).bit_length(),
            table_side=side,
            prefix_rows=rows,
            width=width,
            P=patch_size,
            BYTES=is_bytes,
            DENSE=runs_in_pixel_order(strides, patch_size, is_bytes),
            MODE=MODES[interpolation],
            INDEX=index_dtype(pixels, weight, tokens, taps, position_embedding),
            **PRECISION,
            **config,
        )
    return tokens, cu_seqlens, grid_sizes, coords
