"""Configurations of MedGPT: gpt-oss, a packed vision tower, and how images become tokens."""

from transformers import GptOssConfig, PretrainedConfig

VISION_MODES = ("tiles", "native")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SYSTEM_PROMPT = "You are MedGPT, a biomedical vision-language model for research use only."


def _refuse(expected: str, got: object) -> None:
    raise ValueError(f"MedGPTConfig: expected {expected}, got {got}")


class MedGPTVisionConfig(PretrainedConfig):
    """A packed vision transformer. The defaults are CLIP ViT-L/14 at 336 pixels.

    Args:
        hidden_size, intermediate_size, num_hidden_layers, num_attention_heads: as in transformers.
        patch_size: side of a patch in pixels.
        image_size: pixels that the position table's grid spans, image_size // patch_size patches a
            side; images of other sizes get it interpolated.
        hidden_act, layer_norm_eps: as in transformers.
        class_token: one learned row before each image's patches (CLIP).
        patch_bias: whether the patch projection has one (SigLIP2).
        patch_layout: "conv" weights [D, 3, P, P] or "linear" ones [D, P P 3].
        pre_layernorm: a norm after the embeddings (CLIP).
        post_layernorm: a norm after the last layer, part of its features (SigLIP2).
        interpolation: of the position table, as medgpt_kernels.patch_embed names them.

    Raises:
        ValueError: sizes that do not divide, unknown names.
    """

    model_type = "medgpt_vision"
    base_config_key = "vision_config"

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    patch_size: int = 14
    image_size: int = 336
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    class_token: bool = True
    patch_bias: bool = False
    patch_layout: str = "conv"
    pre_layernorm: bool = True
    post_layernorm: bool = False
    interpolation: str = "bicubic"

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if self.hidden_size % self.num_attention_heads:
            _refuse("hidden_size in num_attention_heads parts", self.hidden_size)
        if self.image_size % self.patch_size:
            _refuse(f"image_size in patches of {self.patch_size}", self.image_size)
        if self.patch_layout not in ("conv", "linear"):
            _refuse('patch_layout "conv" or "linear"', repr(self.patch_layout))

    @classmethod
    def from_clip(cls, config) -> "MedGPTVisionConfig":
        """Of a transformers CLIPVisionConfig."""
        return cls(image_size=config.image_size, **_shared(config))

    @classmethod
    def from_siglip2(cls, config) -> "MedGPTVisionConfig":
        """Of a transformers Siglip2VisionConfig (NaFlex)."""
        side = int(config.num_patches**0.5)
        if side * side != config.num_patches:
            _refuse("a square num_patches", config.num_patches)
        return cls(
            image_size=side * config.patch_size,
            class_token=False,
            patch_bias=True,
            patch_layout="linear",
            pre_layernorm=False,
            post_layernorm=True,
            interpolation="bilinear_antialias",
            **_shared(config),
        )


def _shared(config) -> dict:
    if config.num_channels != 3:
        _refuse("three channels", config.num_channels)
    if getattr(config, "attention_dropout", 0.0):
        _refuse("attention_dropout 0", config.attention_dropout)
    names = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "patch_size",
        "hidden_act",
        "layer_norm_eps",
    )
    return {name: getattr(config, name) for name in names}


class MedGPTConfig(PretrainedConfig):
    """MedGPT: a vision tower, a two-layer projector and gpt-oss.

    Args:
        text_config, vision_config: GptOssConfig and MedGPTVisionConfig, or dicts of theirs.
        vision_mode: "tiles" (InternVL's tiling, the paper's) or "native" (the image's own
            aspect, within a pixel budget).
        tile_size, min_tiles, max_tiles, use_thumbnail: of "tiles"; side in pixels.
        min_pixels, max_pixels: of "native"; budget an image.
        downsample_ratio: 0.5 joins 2 x 2 patches to one token (pixel shuffle), 1.0 none.
        vision_feature_layer: whose output is taken; -1 is the last.
        projector_hidden_size: default the text's hidden_size.
        projector_act: "gelu".
        image_token_id, image_start_token_id, image_end_token_id: reserved ids of Harmony.
        image_mean, image_std: of pixel / 255.
        system_prompt: what the processor renders where a chat has no system message.

    Raises:
        ValueError: sizes that do not divide, unknown names.
    """

    model_type = "medgpt"
    sub_configs = {"text_config": GptOssConfig, "vision_config": MedGPTVisionConfig}  # noqa: RUF012

    text_config: dict | PretrainedConfig | None = None
    vision_config: dict | PretrainedConfig | None = None
    vision_mode: str = "tiles"
    tile_size: int = 336
    min_tiles: int = 1
    max_tiles: int = 12
    use_thumbnail: bool = True
    min_pixels: int = 56 * 56
    max_pixels: int = 12 * 336 * 336
    downsample_ratio: float = 0.5
    vision_feature_layer: int = -1
    projector_hidden_size: int | None = None
    projector_act: str = "gelu"
    image_token_id: int = 200013
    image_start_token_id: int = 200014
    image_end_token_id: int = 200015
    image_mean: tuple[float, ...] | list[float] = IMAGENET_MEAN
    image_std: tuple[float, ...] | list[float] = IMAGENET_STD
    tie_word_embeddings: bool = False
    system_prompt: str = SYSTEM_PROMPT

    def __post_init__(self, **kwargs):
        for name, kind in self.sub_configs.items():
            given = getattr(self, name)
            if not isinstance(given, PretrainedConfig):
                given = {k: v for k, v in (given or {}).items() if k != "model_type"}
                setattr(self, name, kind(**given))
        self.image_mean, self.image_std = list(self.image_mean), list(self.image_std)
        super().__post_init__(**kwargs)
        vision = self.vision_config
        if self.vision_mode not in VISION_MODES:
            _refuse(f"vision_mode one of {', '.join(VISION_MODES)}", repr(self.vision_mode))
        if self.downsample_ratio not in (0.5, 1.0):
            _refuse("downsample_ratio 0.5 or 1.0", self.downsample_ratio)
        if self.tile_size % self.unit_size:
            _refuse(f"tile_size in units of {self.unit_size} pixels", self.tile_size)
        if not 1 <= self.min_tiles <= self.max_tiles:
            _refuse("1 <= min_tiles <= max_tiles", (self.min_tiles, self.max_tiles))
        if not 0 < self.min_pixels <= self.max_pixels:
            _refuse("0 < min_pixels <= max_pixels", (self.min_pixels, self.max_pixels))
        if (
            not -vision.num_hidden_layers - 1
            <= self.vision_feature_layer
            <= (vision.num_hidden_layers)
        ):
            _refuse(f"a layer of {vision.num_hidden_layers}", self.vision_feature_layer)
        if self.tie_word_embeddings:
            _refuse("tie_word_embeddings False", True)

    @property
    def unit_size(self) -> int:
        """Side in pixels of what becomes one token."""
        return self.vision_config.patch_size * self.merge

    @property
    def merge(self) -> int:
        """Patches a side that become one token."""
        return round(1 / self.downsample_ratio)

    def tokens_per_tile(self, height: int, width: int) -> int:
        """Tokens of one tile or native image of height x width pixels."""
        unit = self.unit_size
        if height < unit or width < unit or height % unit or width % unit:
            _refuse(f"sides in units of {unit} pixels", f"{height}x{width}")
        return (height // unit) * (width // unit)

    @classmethod
    def tiny(cls, **kwargs) -> "MedGPTConfig":
        """All of the structure in a few million parameters, with the real vocabulary."""
        text = GptOssConfig(
            hidden_size=128,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=2,
            head_dim=32,
            num_local_experts=8,
            num_experts_per_tok=4,
            sliding_window=128,
            initializer_range=0.08,  # about 1 / sqrt(hidden_size), as 0.02 is at 2,880
            eos_token_id=200002,
            pad_token_id=199999,
        )
        vision = MedGPTVisionConfig(
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            initializer_range=0.08,
        )
        return cls(**{"text_config": text, "vision_config": vision, **kwargs})
