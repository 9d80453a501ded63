"""Patch embedding of images of any size, straight to packed tokens.

N images, T patches in all, R prefix rows an image, total = T + N R tokens, P patch side, D width,
G side of the position table, C = 3 channels.
"""

import math
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from medgpt_kernels import registry

INTERPOLATIONS = ("bilinear_antialias", "bilinear_align_corners", "bicubic", "bicubic_antialias")
WEIGHT_LAYOUTS = ("conv", "linear")
CHANNELS = 3


class PackedImages(NamedTuple):
    """Images of different sizes in one flat buffer."""

    pixels: torch.Tensor  # [sum H W C], image after image: uint8 as HWC, float as CHW
    sizes: torch.Tensor  # [N, 2] int32 height, width; on the device of pixels
    sizes_host: torch.Tensor  # [N, 2] int32, the same on the host
    max_area: int  # largest H W

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "PackedImages":
        """The same images on another device; sizes_host stays."""
        return _mark_dynamic(
            self._replace(
                pixels=self.pixels.to(device, non_blocking=non_blocking),
                sizes=self.sizes.to(device, non_blocking=non_blocking),
            )
        )


class PatchData(NamedTuple):
    """Packed tokens and where each lies."""

    tokens: torch.Tensor  # [total, D]
    cu_seqlens: torch.Tensor  # [N + 1] int32, prefix rows counted
    max_seqlen: int
    grid_sizes: torch.Tensor  # [N, 2] int32 patches down, across
    patch_coords: torch.Tensor  # [total, 2] int32 y, x in patches; -1, -1 for prefix rows


def pack_images(images: Sequence[Any], *, device: torch.device | str | None = None) -> PackedImages:
    """Pack images of any sizes into one flat buffer.

    Args:
        images: uint8 arrays or tensors [H, W, 3], float arrays or tensors [3, H, W], or PIL images;
            grey ones ([H, W], [H, W, 1] or [1, H, W], PIL mode L) become three equal channels.
            All uint8, or all of one float dtype. Gradients flow to float tensors.
        device: where the buffer goes; default: where the images are.

    Returns:
        PackedImages.

    Raises:
        ValueError: an empty list, another dtype or channel count, an empty image; the text names
            the image's index and size.
    """
    if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:
        images = list(images)
    if not isinstance(images, Sequence) or len(images) == 0:
        raise ValueError(
            "pack_images: expected a sequence of at least one image, got "
            + ("an empty one" if isinstance(images, Sequence) else type(images).__name__)
        )
    tensors = [_as_three_channels(_as_tensor(image, i), i) for i, image in enumerate(images)]
    first = tensors[0]
    for i, t in enumerate(tensors):
        if t.dtype != first.dtype or t.device != first.device:
            raise ValueError(
                f"pack_images: expected images of one dtype and device ({first.dtype} on "
                f"{first.device} as image 0), image {i} is {t.dtype} on {t.device}"
            )
    if first.dtype == torch.uint8:
        sizes = [(t.shape[0], t.shape[1]) for t in tensors]
    else:
        sizes = [(t.shape[1], t.shape[2]) for t in tensors]
    pixels = torch.cat([t.reshape(-1) for t in tensors])
    sizes_host = torch.tensor(sizes, dtype=torch.int32, device="cpu")
    packed = PackedImages(
        pixels=pixels,
        sizes=sizes_host.to(pixels.device),
        sizes_host=sizes_host,
        max_area=max(h * w for h, w in sizes),
    )
    return _mark_dynamic(packed) if device is None else packed.to(device)


def _mark_dynamic(packed: PackedImages) -> PackedImages:
    """Tell torch.compile, where it is in use, that the count and sizes of images vary."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None and not torch.compiler.is_compiling():
        for t in (packed.pixels, packed.sizes, packed.sizes_host):
            dynamo.maybe_mark_dynamic(t, 0)
    return packed


def _as_tensor(image: Any, index: int) -> torch.Tensor:
    mode = getattr(image, "mode", None)
    if isinstance(mode, str):  # PIL
        if mode not in ("RGB", "L", "P", "1"):
            raise ValueError(
                f"pack_images: expected PIL mode RGB or L, image {index} has mode {mode} "
                f"and size {image.size[1]}x{image.size[0]}; convert it first"
            )
        image = np.array(image if mode in ("RGB", "L") else image.convert("RGB"))
    if isinstance(image, np.ndarray):
        supported = image.dtype == np.uint8 or image.dtype.kind == "f"
        if supported and not image.flags.writeable:
            image = image.copy()
        image = torch.from_numpy(np.ascontiguousarray(image)) if supported else image
    if not isinstance(image, torch.Tensor) or not (
        image.dtype == torch.uint8 or image.dtype.is_floating_point
    ):
        what = getattr(image, "dtype", type(image).__name__)
        size = tuple(getattr(image, "shape", ()))
        raise ValueError(
            f"pack_images: expected uint8 [H, W, 3] or float [3, H, W], image {index} is "
            f"{what} {list(size)}"
        )
    return image


def _as_three_channels(image: torch.Tensor, index: int) -> torch.Tensor:
    channel_dim = -1 if image.dtype == torch.uint8 else 0
    wanted = "[H, W, 3]" if channel_dim == -1 else "[3, H, W]"
    if image.ndim == 2:
        image = image.unsqueeze(channel_dim)
    if image.ndim != 3 or image.shape[channel_dim] not in (1, CHANNELS) or image.numel() == 0:
        raise ValueError(
            f"pack_images: expected {image.dtype} {wanted} with no empty side, image {index} is "
            f"{list(image.shape)}"
        )
    if image.shape[channel_dim] == 1:
        shape = [-1, -1, -1]
        shape[channel_dim] = CHANNELS
        image = image.expand(shape)
    return image


def patch_embed(
    images: PackedImages,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    patch_size: int,
    weight_layout: str,
    mean: Sequence[float],
    std: Sequence[float],
    position_embedding: torch.Tensor | None = None,
    interpolation: str = "bilinear_antialias",
    prefix: torch.Tensor | None = None,
) -> PatchData:
    """Normalise, cut into patches, project, add the interpolated position: packed tokens.

    The maths of ViT's patch embedding (arXiv 2010.11929), NaFlex's position resize (SigLIP 2,
    arXiv 2502.14786) and NaViT's packing (arXiv 2307.06304). Interpolation is computed in fp32;
    a table whose grid equals the image's is used as it is.

    Args:
        images: from `pack_images`; every side a multiple of patch_size.
        weight: [D, 3, P, P] for "conv", [D, P P 3] for "linear".
        bias: [D] or None.
        patch_size: P, in pixels.
        weight_layout: "conv" (CLIP: channel, row, column) or "linear" (SigLIP2: row, column,
            channel).
        mean, std: three floats, one a channel, in units of pixel / 255 for uint8 images and of the
            pixels themselves for float ones.
        position_embedding: [G, G, D] in weight's dtype or fp32, or None.
        interpolation: "bilinear_antialias" (SigLIP2), "bilinear_align_corners" (Qwen3-VL),
            "bicubic" (CLIP, DINO; no antialias, a = -0.75), "bicubic_antialias" (timm, a = -0.5).
        prefix: [R, D] rows put before each image's tokens as they are (CLS, registers), or None.

    Returns:
        PatchData with tokens in weight's dtype. Gradients flow to weight, bias, position_embedding,
        prefix and float pixels; they are deterministic.

    Raises:
        ValueError: shapes, dtypes, devices or names that do not fit, an image smaller than a patch
            or not a multiple of it (its index and size are named; inside torch.compile these two
            are asserted on the device instead).
    """
    device_type = images.pixels.device.type
    dtype = registry.autocast_dtype(device_type)
    if dtype is not None:
        weight, bias, prefix = (t if t is None else t.to(dtype) for t in (weight, bias, prefix))
        if position_embedding is not None and position_embedding.dtype != dtype:
            position_embedding = position_embedding.float()
    _check_arguments(
        images, weight, bias, patch_size, weight_layout, mean, std,
        position_embedding, interpolation, prefix,
    )  # fmt: skip
    tokens, cu_seqlens, grid_sizes, patch_coords = _patch_embed_fwd(
        images.pixels, images.sizes, weight, bias, position_embedding, prefix,
        patch_size, weight_layout, interpolation, list(mean), list(std),
    )  # fmt: skip
    rows = 0 if prefix is None else prefix.shape[0]
    max_seqlen = images.max_area // (patch_size * patch_size) + rows
    return PatchData(tokens, cu_seqlens, max_seqlen, grid_sizes, patch_coords)


def _check_arguments(
    images,
    weight,
    bias,
    patch_size,
    weight_layout,
    mean,
    std,
    table,
    interpolation,
    prefix,
):
    def expect(condition, expected, got):
        if not condition:
            raise ValueError(f"patch_embed: expected {expected}, got {got}")

    expect(
        weight_layout in WEIGHT_LAYOUTS,
        f"weight_layout one of {', '.join(WEIGHT_LAYOUTS)}",
        repr(weight_layout),
    )
    expect(
        interpolation in INTERPOLATIONS,
        f"interpolation one of {', '.join(INTERPOLATIONS)}",
        repr(interpolation),
    )
    expect(
        isinstance(patch_size, (int, torch.SymInt)) and patch_size >= 1,
        "a whole patch_size >= 1",
        repr(patch_size),
    )
    for name in ("sizes", "sizes_host"):
        t = getattr(images, name)
        expect(
            t.dtype == torch.int32 and t.shape == (images.sizes_host.shape[0], 2),
            f"{name} int32 [N, 2]",
            f"{t.dtype} {list(t.shape)}",
        )
    for name, values in (("mean", mean), ("std", std)):
        expect(
            isinstance(values, Sequence)
            and len(values) == CHANNELS
            and all(isinstance(x, (int, float)) and math.isfinite(x) for x in values),
            f"{name} of {CHANNELS} finite floats",
            repr(values),
        )
    expect(all(s > 0 for s in std), "std above 0", list(std))
    if torch.compiler.is_compiling():
        fits = (images.sizes % patch_size == 0).all()
        torch._assert_async(fits, "patch_embed: expected image sides in multiples of patch_size")
    else:
        sizes = images.sizes_host.numpy()
        if (sizes % patch_size).any() or (sizes < patch_size).any():
            _refuse_sizes(images.sizes_host, patch_size)
        elements = CHANNELS * int(sizes.astype(np.int64).prod(1).sum())
        expect(
            images.pixels.shape == (elements,),
            f"pixels [{elements}] for these sizes",
            list(images.pixels.shape),
        )
    expect(
        weight.dtype.is_floating_point and weight.ndim in (2, 4),
        "a float weight [D, P P 3] or [D, 3, P, P]",
        f"{weight.dtype} {list(weight.shape)}",
    )
    width = weight.shape[0]
    shape = (
        (width, CHANNELS, patch_size, patch_size)
        if weight_layout == "conv"
        else (width, patch_size * patch_size * CHANNELS)
    )
    expect(
        tuple(weight.shape) == shape,
        f"weight {list(shape)} for {weight_layout} and patch_size {patch_size}",
        list(weight.shape),
    )
    if bias is not None:
        expect(tuple(bias.shape) == (width,), f"bias [{width}]", list(bias.shape))
    if table is not None:
        expect(
            table.ndim == 3 and table.shape[0] == table.shape[1] and table.shape[2] == width,
            f"position_embedding [G, G, {width}]",
            list(table.shape),
        )
        expect(table.shape[0] >= 1, "position_embedding with G >= 1", list(table.shape))
        expect(
            table.dtype in (weight.dtype, torch.float32),
            f"position_embedding of {weight.dtype} or float32",
            table.dtype,
        )
    if prefix is not None:
        expect(
            prefix.ndim == 2 and prefix.shape[1] == width,
            f"prefix [R, {width}]",
            list(prefix.shape),
        )
    for name, t in (("bias", bias), ("prefix", prefix)):
        if t is not None:
            expect(t.dtype == weight.dtype, f"{name} of weight's {weight.dtype}", t.dtype)
    expect(
        images.pixels.dtype in (torch.uint8, torch.float32, weight.dtype),
        f"pixels of uint8, float32 or weight's {weight.dtype}",
        images.pixels.dtype,
    )
    device = images.pixels.device
    for name, t in (
        ("weight", weight), ("bias", bias), ("position_embedding", table), ("prefix", prefix),
    ):  # fmt: skip
        if t is not None:
            expect(t.device == device, f"{name} on the pixels' {device}", t.device)


def _refuse_sizes(sizes_host: torch.Tensor, patch_size: int) -> None:
    for i, (h, w) in enumerate(sizes_host.tolist()):
        if h < patch_size or w < patch_size:
            problem = f"images of at least one {patch_size}x{patch_size} patch"
        elif h % patch_size or w % patch_size:
            problem = f"sides that are multiples of patch_size {patch_size}"
        else:
            continue
        raise ValueError(f"patch_embed: expected {problem}, image {i} is {h}x{w}")


def _fwd_fake(
    pixels, sizes, weight, bias, position_embedding, prefix,
    patch_size, weight_layout, interpolation, mean, std,
):  # fmt: skip
    images = sizes.shape[0]
    rows = 0 if prefix is None else prefix.shape[0]
    total = pixels.numel() // (CHANNELS * patch_size * patch_size) + rows * images
    return (
        weight.new_empty(total, weight.shape[0]),
        sizes.new_empty(images + 1),
        sizes.new_empty(images, 2),
        sizes.new_empty(total, 2),
    )


def _bwd_fake(
    d_tokens, pixels, sizes, weight, bias, position_embedding, prefix,
    patch_size, weight_layout, interpolation, mean, std, wanted,
):  # fmt: skip
    tensors = (weight, bias, position_embedding, prefix, pixels)
    return tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format) if need else weight.new_empty(0)
        for t, need in zip(tensors, wanted, strict=True)
    )


def _setup_context(ctx, inputs, output):
    pixels, sizes, weight, bias, table, prefix, *ctx.options = inputs
    ctx.save_for_backward(pixels, sizes, weight, bias, table, prefix)
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, d_tokens, *unused):
    pixels, sizes, weight, bias, table, prefix = ctx.saved_tensors
    need = ctx.needs_input_grad
    wanted = [need[2], need[3], need[4], need[5], need[0]]
    grads = _patch_embed_bwd(
        d_tokens, pixels, sizes, weight, bias, table, prefix, *ctx.options, wanted
    )
    d_weight, d_bias, d_table, d_prefix, d_pixels = (
        g if w else None for g, w in zip(grads, wanted, strict=True)
    )
    return d_pixels, None, d_weight, d_bias, d_table, d_prefix, *[None] * len(ctx.options)


_ARGUMENTS = (
    "Tensor pixels, Tensor sizes, Tensor weight, Tensor? bias, Tensor? position_embedding, "
    "Tensor? prefix, SymInt patch_size, str weight_layout, str interpolation, float[] mean, "
    "float[] std"
)

_patch_embed_fwd = registry.register(
    f"patch_embed_fwd({_ARGUMENTS}) -> "
    "(Tensor tokens, Tensor cu_seqlens, Tensor grid_sizes, Tensor patch_coords)",
    package=__package__,
    fake=_fwd_fake,
    setup_context=_setup_context,
    backward=_backward,
)
_patch_embed_bwd = registry.register(
    f"patch_embed_bwd(Tensor d_tokens, {_ARGUMENTS}, bool[] wanted) -> "
    "(Tensor d_weight, Tensor d_bias, Tensor d_position_embedding, Tensor d_prefix, "
    "Tensor d_pixels)",
    package=__package__,
    fake=_bwd_fake,
)
