"""The packed vision tower: patches of all images in one row of tokens, no padding, no loops.

It loads CLIP's and SigLIP2 NaFlex's weights under their own names.

N images, T patches, R class rows an image (0 or 1), total = T + N R tokens, D width, G side of the
position table, M patches a side that become one token.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from medgpt.config import MedGPTVisionConfig
from medgpt_kernels import PackedImages, attention, patch_embed
from medgpt_kernels.registry import chosen_backend


class VisionFeatures(NamedTuple):
    """Packed features and where each image's lie."""

    tokens: torch.Tensor  # [total, D]
    cu_seqlens: torch.Tensor  # [N + 1] int32, class rows counted
    grid_sizes: torch.Tensor  # [N, 2] int32 patches down, across


class VisionEmbeddings(nn.Module):
    def __init__(self, config: MedGPTVisionConfig):
        super().__init__()
        self.config = config
        width, patch = config.hidden_size, config.patch_size
        side = config.image_size // patch
        if config.class_token:
            self.class_embedding = nn.Parameter(torch.randn(width) * config.initializer_range)
        if config.patch_layout == "conv":
            self.patch_embedding = nn.Conv2d(3, width, patch, patch, bias=config.patch_bias)
        else:
            self.patch_embedding = nn.Linear(3 * patch * patch, width, bias=config.patch_bias)
        self.position_embedding = nn.Embedding(side * side + config.class_token, width)

    def forward(self, images: PackedImages, mean, std):
        """PatchData of the images; mean and std as patch_embed takes them."""
        table, prefix = self.position_embedding.weight, None
        if self.config.class_token:
            prefix, table = (self.class_embedding + table[0])[None], table[1:]
        side = self.config.image_size // self.config.patch_size
        return patch_embed(
            images,
            self.patch_embedding.weight,
            self.patch_embedding.bias,
            patch_size=self.config.patch_size,
            weight_layout=self.config.patch_layout,
            mean=mean,
            std=std,
            position_embedding=table.view(side, side, -1),
            interpolation=self.config.interpolation,
            prefix=prefix,
        )


class VisionAttention(nn.Module):
    """Bidirectional attention within each image of a packed row."""

    def __init__(self, config: MedGPTVisionConfig):
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(width, width) for _ in range(4)
        )

    def forward(self, x: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int) -> torch.Tensor:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (p(x).unflatten(-1, (self.num_heads, -1)) for p in projections)
        varlen = _flash_attention(q)
        if varlen is not None:
            out = varlen(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
        else:
            out = attention(
                q,
                k,
                v,
                cu_seqlens_q=cu_seqlens,
                cu_seqlens_k=cu_seqlens,
                max_seqlen_q=max_seqlen,
                max_seqlen_k=max_seqlen,
                causal=False,
            )
        return self.out_proj(out.flatten(1))


def _flash_attention(q: torch.Tensor):
    """flash-attn's packed attention where it is installed and serves q, else None."""
    if not q.is_cuda or q.dtype not in (torch.float16, torch.bfloat16) or chosen_backend():
        return None
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    return flash_attn_varlen_func


class VisionMLP(nn.Module):
    def __init__(self, config: MedGPTVisionConfig):
        super().__init__()
        self.activation = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class VisionLayer(GradientCheckpointingLayer):
    def __init__(self, config: MedGPTVisionConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = VisionAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = VisionMLP(config)

    def forward(self, x: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int) -> torch.Tensor:
        x = x + self.self_attn(self.layer_norm1(x), cu_seqlens, max_seqlen)
        return x + self.mlp(self.layer_norm2(x))


class VisionEncoder(nn.Module):
    def __init__(self, config: MedGPTVisionConfig):
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_hidden_layers))


class MedGPTVisionModel(nn.Module):
    """A vision transformer on packed images of any sizes, in units of a patch.

    For every image it is transformers' CLIPVisionModel (with interpolated positions) or
    Siglip2VisionModel, whichever the config describes, without the pooling head.
    """

    def __init__(self, config: MedGPTVisionConfig):
        super().__init__()
        self.config = config
        self.embeddings = VisionEmbeddings(config)
        if config.pre_layernorm:
            self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.encoder = VisionEncoder(config)
        if config.post_layernorm:
            self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, images: PackedImages, *, mean, std, feature_layer: int = -1):
        """Features of packed images.

        Args:
            images: of medgpt_kernels.pack_images.
            mean, std: three floats each, in units of pixel / 255 for uint8 images.
            feature_layer: as an index into transformers' hidden_states (0 the embeddings); later
                layers do not run. With -1 and a config with post_layernorm, that norm is applied.

        Returns:
            VisionFeatures.

        Raises:
            ValueError: sides that are no multiples of the patch size.
        """
        data = self.embeddings(images, mean, std)
        x = self.pre_layrnorm(data.tokens) if self.config.pre_layernorm else data.tokens
        count = len(self.encoder.layers)
        for layer in self.encoder.layers[: feature_layer % (count + 1)]:
            x = layer(x, data.cu_seqlens, data.max_seqlen)
        if self.config.post_layernorm and feature_layer in (-1, count):
            x = self.post_layernorm(x)
        return VisionFeatures(x, data.cu_seqlens, data.grid_sizes)


@torch.compiler.disable(reason="counts on the host")
def merge_rows(sizes: torch.Tensor, patch_size: int, merge: int, prefix_rows: int) -> torch.Tensor:
    """Rows of the packed tokens that make up each merged token (InternVL's pixel shuffle, v2).

    Args:
        sizes: [N, 2] int32 height, width in pixels, on the host.
        patch_size: in pixels.
        merge: M.
        prefix_rows: R, left out.

    Returns:
        int64 [tokens, M M] on the host: patch (y, x) of each M x M square, row by row.

    Raises:
        ValueError: a grid that is no multiple of M.
    """
    grids = sizes.numpy().astype(np.int64) // patch_size
    if (grids % merge).any():
        odd = grids[(grids % merge).any(1)][0]
        raise ValueError(
            f"MedGPT: expected grids of patches in multiples of {merge}, got {odd[0]}x{odd[1]}"
        )
    areas = grids.prod(1)
    starts = np.cumsum(areas + prefix_rows) - areas  # of each image's first patch
    tokens = areas // merge**2
    image = np.repeat(np.arange(len(grids)), tokens)
    at = np.arange(tokens.sum()) - np.repeat(np.cumsum(tokens) - tokens, tokens)
    width = grids[image, 1]
    y, x = merge * (at // (width // merge)), merge * (at % (width // merge))
    first = starts[image] + y * width + x
    inside = np.arange(merge)
    square = inside[:, None] * width[:, None, None] + inside
    return torch.from_numpy(first[:, None] + square.reshape(len(at), -1))
