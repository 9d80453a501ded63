"""Packed patch embedding in eager PyTorch: the specification.

N images, T patches in all, R prefix rows an image, P patch side, D width, G table side, C = 3.
"""

import torch
import torch.nn.functional as F


def cubic(x: torch.Tensor, a: float) -> torch.Tensor:
    """Keys' cubic convolution kernel."""
    x = x.abs()
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((x - 5) * x + 8) * x * a - 4 * a
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


def axis_matrix(out: int, cells: int, mode: str, device: torch.device | None = None):
    """Weights fp64 [out, cells] that resize one axis of the position table.

    Positions are exact rationals: output i lies at ((2i + 1) cells - out) / (2 out) in cells.
    """
    if out == cells:
        return torch.eye(cells, dtype=torch.float64, device=device)
    i = torch.arange(out, device=device)[:, None]
    j = torch.arange(cells, device=device)[None, :]
    if mode == "bilinear_align_corners":
        at = (i * (cells - 1)).double() / max(out - 1, 1)
        return (1 - (at - j).abs()).clamp(min=0)
    if mode == "bicubic":  # no antialias: taps beyond the border fall on the border cell
        numerator = (2 * i + 1) * cells - out
        low = torch.div(numerator, 2 * out, rounding_mode="floor")
        fraction = (numerator - low * 2 * out).double() / (2 * out)
        weights = torch.zeros(out, cells, dtype=torch.float64, device=device)
        for tap in (-1, 0, 1, 2):
            cell = (low + tap).clamp(0, cells - 1)
            weights.scatter_add_(1, cell, cubic(fraction - tap, -0.75))
        return weights
    distance = ((2 * j + 1) * out - (2 * i + 1) * cells).double() / (2 * max(out, cells))
    if mode == "bilinear_antialias":
        weights = (1 - distance.abs()).clamp(min=0)
    else:
        weights = cubic(distance, -0.5)
    return weights / weights.sum(1, keepdim=True)


def resize_table(table: torch.Tensor, height: int, width: int, mode: str) -> torch.Tensor:
    """table [G, G, D] -> [height, width, D], computed in fp32 (fp64 for fp64)."""
    resized = table if table.dtype == torch.float64 else table.float()
    for axis, length in enumerate((height, width)):
        if length != table.shape[axis]:  # an equal axis is used as it is, infinities and all
            weights = axis_matrix(length, table.shape[axis], mode, table.device).to(resized.dtype)
            resized = torch.tensordot(weights, resized, dims=([1], [axis])).movedim(0, axis)
    return resized


def extract_patches(image: torch.Tensor, patch_size: int, weight_layout: str) -> torch.Tensor:
    """image [C, H, W] -> [H/P * W/P, C P P], columns in the weight's order."""
    c, h, w = image.shape
    grid = image.reshape(c, h // patch_size, patch_size, w // patch_size, patch_size)
    order = (1, 3, 0, 2, 4) if weight_layout == "conv" else (1, 3, 2, 4, 0)
    return grid.permute(order).reshape(-1, c * patch_size * patch_size)


def restore_patches(patches: torch.Tensor, h: int, w: int, patch_size: int, weight_layout: str):
    """The inverse of extract_patches: [h w, C P P] -> [C, h P, w P]."""
    if weight_layout == "conv":
        grid = patches.view(h, w, -1, patch_size, patch_size).permute(2, 0, 3, 1, 4)
    else:
        grid = patches.view(h, w, patch_size, patch_size, -1).permute(4, 0, 2, 1, 3)
    return grid.reshape(-1, h * patch_size, w * patch_size)


def normalise(pixels: torch.Tensor, mean, std, dtype: torch.dtype) -> torch.Tensor:
    """Image [C, H, W] of uint8 or float -> (x - mean) / std in `dtype`, computed in fp32."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = pixels.to(wide) / 255 if pixels.dtype == torch.uint8 else pixels.to(wide)
    mean = torch.tensor(mean, dtype=wide, device=pixels.device)[:, None, None]
    std = torch.tensor(std, dtype=wide, device=pixels.device)[:, None, None]
    return ((x - mean) / std).to(dtype)


def unpack(pixels: torch.Tensor, sizes: list[list[int]]):
    """The images [C, H, W] of a flat buffer: uint8 lies HWC, float CHW."""
    start = 0
    for h, w in sizes:
        flat = pixels[start : start + 3 * h * w]
        start += 3 * h * w
        if pixels.dtype == torch.uint8:
            yield flat.view(h, w, 3).permute(2, 0, 1)
        else:
            yield flat.view(3, h, w)


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
    grids = [[h // patch_size, w // patch_size] for h, w in sizes.tolist()]
    rows = 0 if prefix is None else prefix.shape[0]
    tokens, coords = [], []
    for image, (h, w) in zip(unpack(pixels, sizes.tolist()), grids, strict=True):
        x = normalise(image, mean, std, weight.dtype)
        out = F.linear(extract_patches(x, patch_size, weight_layout), weight.flatten(1), bias)
        if position_embedding is not None:
            position = resize_table(position_embedding, h, w, interpolation)
            out = out + position.reshape(h * w, -1).to(out.dtype)
        at = torch.cartesian_prod(torch.arange(h), torch.arange(w)).view(-1, 2)
        if rows:
            out = torch.cat([prefix, out])
            at = torch.cat([torch.full((rows, 2), -1), at])
        tokens.append(out)
        coords.append(at)
    lengths = torch.tensor([h * w + rows for h, w in grids])
    cu_seqlens = F.pad(lengths.cumsum(0), (1, 0))
    integers = (cu_seqlens, torch.tensor(grids), torch.cat(coords))
    return torch.cat(tokens), *(t.to(torch.int32).to(pixels.device) for t in integers)


def _zeros(like: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    return None if like is None else torch.zeros(like.shape, dtype=dtype, device=like.device)


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
    rows = 0 if prefix is None else prefix.shape[0]
    flat = weight.flatten(1)
    wide = torch.promote_types(weight.dtype, torch.float32)
    d_weight, d_bias = _zeros(flat, wide), flat.new_zeros(len(flat), dtype=wide)
    d_table = _zeros(position_embedding, wide)
    d_prefix = _zeros(prefix, wide)
    d_pixels, start = [], 0
    for image in unpack(pixels, sizes.tolist()):
        h, w = image.shape[1] // patch_size, image.shape[2] // patch_size
        if rows:
            d_prefix += d_tokens[start : start + rows]
        d_out = d_tokens[start + rows : start + rows + h * w]
        start += rows + h * w
        x = extract_patches(normalise(image, mean, std, weight.dtype), patch_size, weight_layout)
        d_weight += d_out.T @ x
        d_bias += d_out.to(wide).sum(0)
        if d_table is not None:
            by = [
                axis_matrix(n, d_table.shape[0], interpolation, weight.device).to(wide)
                for n in (h, w)
            ]
            d_table += torch.einsum("yg,xh,yxd->ghd", *by, d_out.to(wide).view(h, w, -1))
        if wanted[4]:
            d_x = restore_patches(d_out @ flat, h, w, patch_size, weight_layout)
            scale = torch.tensor(std, dtype=wide, device=weight.device)[:, None, None]
            d_pixels.append((d_x.to(wide) / scale).reshape(-1))
    d_pixels = torch.cat(d_pixels) if wanted[4] else None
    grads = (d_weight.view_as(weight), d_bias, d_table, d_prefix, d_pixels)
    tensors = (weight, bias, position_embedding, prefix, pixels)
    return tuple(
        g.to(t.dtype) if need else weight.new_empty(0)
        for g, t, need in zip(grads, tensors, wanted, strict=True)
    )
