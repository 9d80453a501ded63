"""The peers of patch_embed: transformers' own modules, and the best eager PyTorch we know.

N images, T patches in all, P patch side, D width, G side of the position table.
Every peer starts from uint8 images and works out nothing before the clock runs; what `Setup` holds
are parameters and images.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def patchify(image: torch.Tensor, patch_size: int) -> torch.Tensor:
    """[H, W, C] -> [H/P W/P, P P C], rows as SigLIP2 orders them."""
    h, w, c = image.shape
    grid = image.view(h // patch_size, patch_size, w // patch_size, patch_size, c)
    return grid.transpose(1, 2).reshape(-1, patch_size * patch_size * c)


def fold_normalisation(weight, bias, mean, std):
    """Linear [D, P P C] that takes raw bytes in place of (byte / 255 - mean) / std."""
    repeats = weight.shape[1] // len(mean)
    mean, std = (torch.tensor(v, dtype=weight.dtype, device=weight.device) for v in (mean, std))
    shift = -(weight @ (mean / std).repeat(repeats))
    return weight / (255 * std).repeat(repeats), shift if bias is None else bias + shift


def axis_matrix(out: int, cells: int, like: torch.Tensor) -> torch.Tensor:
    """[out, cells] weights of an antialiased bilinear resize, from torch itself."""
    eye = torch.eye(cells, device=like.device)[None, None]
    size = (out, cells)
    return F.interpolate(eye, size=size, mode="bilinear", antialias=True)[0, 0].to(like.dtype)


def interpolated_positions(table: torch.Tensor, grids: Sequence[tuple[int, int]]) -> torch.Tensor:
    """table [G G, D] -> [T, D], two small products an image."""
    cells, width = int(table.shape[0] ** 0.5), table.shape[1]
    rows = table.view(cells, cells * width)
    found = []
    for h, w in grids:
        down = (axis_matrix(h, cells, table) @ rows).view(h, cells, width)
        found.append((axis_matrix(w, cells, table) @ down).reshape(-1, width))
    return torch.cat(found)


def packed_mm(images, weight, bias, table, patch_size, mean, std) -> torch.Tensor:
    """Normalisation folded into the weight, one product over all patches, positions by matrices."""
    weight, bias = fold_normalisation(weight, bias, mean, std)
    patches = torch.cat([patchify(image, patch_size) for image in images]).to(weight.dtype)
    grids = [(i.shape[0] // patch_size, i.shape[1] // patch_size) for i in images]
    return F.linear(patches, weight, bias) + interpolated_positions(table, grids)


class Siglip2:
    """transformers' NaFlex processor and embeddings; its batch is padded to the longest image."""

    def __init__(self, images, weight, bias, table, patch_size, mean, std):
        from transformers.models.siglip2.configuration_siglip2 import Siglip2VisionConfig
        from transformers.models.siglip2.image_processing_pil_siglip2 import (
            Siglip2ImageProcessorPil,
        )
        from transformers.models.siglip2.modeling_siglip2 import Siglip2VisionEmbeddings

        self.arrays = [image.cpu().numpy() for image in images]
        self.device = weight.device
        self.longest = max(i.shape[0] * i.shape[1] for i in images) // patch_size**2
        self.processor = Siglip2ImageProcessorPil(
            do_resize=False,
            max_num_patches=self.longest,
            patch_size=patch_size,
            image_mean=list(mean),
            image_std=list(std),
        )
        config = Siglip2VisionConfig(
            hidden_size=weight.shape[0],
            num_attention_heads=1,
            patch_size=patch_size,
            num_patches=table.shape[0],
        )
        self.module = Siglip2VisionEmbeddings(config)
        self.module.patch_embedding.weight = weight
        self.module.patch_embedding.bias = bias
        self.module.position_embedding.weight = table
        self.ready = self.preprocess()

    def preprocess(self):
        batch = self.processor(
            images=self.arrays, return_tensors="pt", input_data_format="channels_last"
        )
        return batch.to(self.device)

    def embed(self, batch) -> torch.Tensor:
        return self.module(batch["pixel_values"], batch["spatial_shapes"])

    def whole(self) -> torch.Tensor:
        return self.embed(self.preprocess())

    def embed_only(self) -> torch.Tensor:
        return self.embed(self.ready)

    def pack(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens[self.ready["pixel_attention_mask"].bool()]

    def pad(self, packed: torch.Tensor) -> torch.Tensor:
        """A gradient of packed tokens [T, D] as this padded module takes it."""
        mask = self.ready["pixel_attention_mask"].bool()
        padded = packed.new_zeros(*mask.shape, packed.shape[1])
        padded[mask] = packed
        return padded


class Clip:
    """transformers' CLIP embeddings after normalising, and one product over unfolded patches."""

    def __init__(self, tiles, weight, cls, table, patch_size, mean, std):
        from transformers.models.clip.configuration_clip import CLIPVisionConfig
        from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings

        config = CLIPVisionConfig(
            hidden_size=weight.shape[0],
            num_attention_heads=1,
            image_size=tiles.shape[1],
            patch_size=patch_size,
        )
        self.module = CLIPVisionEmbeddings(config).to(weight.device)
        self.module.patch_embedding.weight = weight
        self.module.class_embedding = cls
        self.module.position_embedding.weight = table
        self.tiles, self.patch_size, self.mean, self.std = tiles, patch_size, mean, std

    def _normalised(self) -> torch.Tensor:
        mean, std = (torch.tensor(v, device=self.tiles.device) for v in (self.mean, self.std))
        return ((self.tiles.float() / 255 - mean) / std).permute(0, 3, 1, 2)

    def conv(self) -> torch.Tensor:
        return self.module(self._normalised().contiguous())

    def conv_channels_last(self) -> torch.Tensor:
        return self.module(self._normalised())

    def unfold_fold(self) -> torch.Tensor:
        """Bytes unfolded, normalisation folded into the weight, one product."""
        conv = self.module.patch_embedding.weight
        linear = conv.permute(0, 2, 3, 1).flatten(1)
        weight, bias = fold_normalisation(linear, None, self.mean, self.std)
        n, h, w, _ = self.tiles.shape
        patches = patchify(self.tiles.reshape(n * h, w, 3), self.patch_size)
        tokens = F.linear(patches.view(n, -1, patches.shape[1]).to(conv.dtype), weight, bias)
        cls = self.module.class_embedding.expand(n, 1, -1)
        return torch.cat([cls, tokens], 1) + self.module.position_embedding.weight
