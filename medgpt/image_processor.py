"""Images of any source to one flat buffer of uint8 tiles, or of native sizes.

Dims: N tiles (or native images), H W of each. No float image is made: the patch embedding applies
mean and std.
"""

import numpy as np
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

# without torchvision transformers 5.17 hides the name at its top
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.processing_utils import ImagesKwargs

from .config import MedGPTConfig
from .images import load_image
from .tiling import native_size, resize, tile_grid, tiles


def _refuse(expected: str, got: object) -> None:
    raise ValueError(f"MedGPTImageProcessor: expected {expected}, got {got}")


class MedGPTImageProcessorKwargs(ImagesKwargs, total=False):
    vision_mode: str
    tile_size: int
    min_tiles: int
    max_tiles: int
    use_thumbnail: bool
    min_pixels: int
    max_pixels: int
    patch_size: int
    downsample_ratio: float


class MedGPTImageProcessor(BaseImageProcessor):
    """Images of any source to tiles, or to one native size each.

    Args: those of MedGPTConfig; patch_size is its vision tower's.

    Raises:
        ValueError: sizes that do not divide, unknown modes.
    """

    model_input_names = ["pixel_values", "image_sizes"]  # noqa: RUF012
    valid_kwargs = MedGPTImageProcessorKwargs

    def __init__(
        self,
        vision_mode: str = "tiles",
        tile_size: int = 336,
        min_tiles: int = 1,
        max_tiles: int = 12,
        use_thumbnail: bool = True,
        min_pixels: int = 56 * 56,
        max_pixels: int = 12 * 336 * 336,
        patch_size: int = 14,
        downsample_ratio: float = 0.5,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.vision_mode = vision_mode
        self.tile_size, self.use_thumbnail = tile_size, use_thumbnail
        self.min_tiles, self.max_tiles = min_tiles, max_tiles
        self.min_pixels, self.max_pixels = min_pixels, max_pixels
        self.patch_size, self.downsample_ratio = patch_size, downsample_ratio
        if vision_mode not in ("tiles", "native"):
            _refuse('vision_mode "tiles" or "native"', repr(vision_mode))
        if downsample_ratio not in (0.5, 1.0):
            _refuse("downsample_ratio 0.5 or 1.0", downsample_ratio)
        if tile_size % self.unit:
            _refuse(f"tile_size in units of {self.unit} pixels", tile_size)
        if not 1 <= min_tiles <= max_tiles:
            _refuse("1 <= min_tiles <= max_tiles", (min_tiles, max_tiles))
        if not 0 < min_pixels <= max_pixels or max_pixels < self.unit**2:
            _refuse(f"min_pixels <= max_pixels >= {self.unit**2}", (min_pixels, max_pixels))

    @classmethod
    def from_config(cls, config: MedGPTConfig) -> "MedGPTImageProcessor":
        names = MedGPTImageProcessorKwargs.__annotations__.keys() - ImagesKwargs.__annotations__
        named = {name: getattr(config, name) for name in names if name != "patch_size"}
        return cls(**named, patch_size=config.vision_config.patch_size)

    @property
    def unit(self) -> int:
        """Side in pixels of what becomes one token."""
        return round(self.patch_size / self.downsample_ratio)

    def sizes(self, height: int, width: int) -> list[tuple[int, int]]:
        """(height, width) of what an image of that size becomes, in order."""
        if self.vision_mode == "native":
            bounds = {"min_pixels": self.min_pixels, "max_pixels": self.max_pixels}
            return [native_size(height, width, unit=self.unit, **bounds)]
        bounds = {name: getattr(self, name) for name in ("min_tiles", "max_tiles", "tile_size")}
        columns, rows = tile_grid(height, width, **bounds)
        count = columns * rows
        return [(self.tile_size, self.tile_size)] * (count + (count > 1 and self.use_thumbnail))

    def num_tokens(self, height: int, width: int) -> int:
        """Image tokens of an image of that size, without image start and end."""
        return sum((h // self.unit) * (w // self.unit) for h, w in self.sizes(height, width))

    def cut(self, image: np.ndarray) -> list[np.ndarray]:
        """uint8 [H, W, 3] to its tiles, or to itself at its native size."""
        if self.vision_mode == "native":
            return [resize(image, *self.sizes(*image.shape[:2])[0])]
        names = ("min_tiles", "max_tiles", "tile_size", "use_thumbnail")
        return tiles(image, **{name: getattr(self, name) for name in names})

    def preprocess(
        self, images, *, window=None, frame: int = 0, return_tensors=None
    ) -> BatchFeature:
        """One image or a list, each as load_image takes it.

        Returns:
            pixel_values uint8 [sum H W 3], tile after tile; image_sizes int32 [N, 2];
            tiles_per_image int32 [images].
        """
        if not isinstance(images, (list, tuple)):
            images = [images]
        cuts = [self.cut(load_image(image, window=window, frame=frame)) for image in images]
        return packed(cuts, return_tensors)


def packed(cuts: list[list[np.ndarray]], return_tensors=None) -> BatchFeature:
    """The tiles of each image, uint8 [H, W, 3], in one buffer; as preprocess returns it."""
    flat = [tile for cut in cuts for tile in cut]
    data = {
        "pixel_values": np.concatenate([tile.reshape(-1) for tile in flat] or [np.uint8([])]),
        "image_sizes": np.array([t.shape[:2] for t in flat], np.int32).reshape(-1, 2),
        "tiles_per_image": np.array([len(cut) for cut in cuts], np.int32),
    }
    return BatchFeature(data, tensor_type=return_tensors)


AutoImageProcessor.register(
    MedGPTConfig,
    image_processor_classes={"pil": MedGPTImageProcessor, "torchvision": MedGPTImageProcessor},
    exist_ok=True,
)
