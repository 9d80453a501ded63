"""InternVL's names and configurations, in which MedGPT-oss was released, and ours.

vision_model.*                  model.vision_tower.*
mlp1.0, mlp1.1, mlp1.3          model.multi_modal_projector.{layer_norm, linear_1, linear_2}
language_model.model.*          model.language_model.*
language_model.lm_head.weight   lm_head.weight
"""

import json
from pathlib import Path

from transformers import CLIPVisionConfig, GptOssConfig, Siglip2VisionConfig

from medgpt.config import IMAGENET_MEAN, IMAGENET_STD, MedGPTConfig, MedGPTVisionConfig
from medgpt_kernels.integrations import refuse

_PREFIXES = {
    "vision_model.": "model.vision_tower.",
    "mlp1.0.": "model.multi_modal_projector.layer_norm.",
    "mlp1.1.": "model.multi_modal_projector.linear_1.",
    "mlp1.3.": "model.multi_modal_projector.linear_2.",
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
}
# What CLIP and SigLIP2 have beside the tower's features.
_UNUSED = ("text_model.", "text_projection.", "visual_projection.", "logit_scale", "logit_bias")
_UNUSED_IN_TOWER = ("head.", "embeddings.position_ids")
_TOKENS = {
    "image_token_id": "<IMG_CONTEXT>",
    "image_start_token_id": "<img>",
    "image_end_token_id": "</img>",
}


def vision_name(name: str, config: MedGPTVisionConfig) -> str | None:
    """The tower's own name of a tensor of CLIP or SigLIP2, None for what it does not use."""
    while name.startswith("vision_model."):
        name = name.removeprefix("vision_model.")
    if name.startswith((*_UNUSED, *_UNUSED_IN_TOWER)):
        return None
    if name.startswith("post_layernorm.") and not config.post_layernorm:
        return None
    return name


def from_internvl(name: str, config: MedGPTVisionConfig) -> str | None:
    """Our name of InternVL's tensor, None for what is not used; unknown names stay as they are."""
    for theirs, ours in _PREFIXES.items():
        if name.startswith(theirs):
            rest = name.removeprefix(theirs)
            if theirs == "vision_model.":
                rest = vision_name(rest, config)
            return None if rest is None else ours + rest
    return name


def to_internvl(name: str) -> str:
    """InternVL's name of one of our tensors."""
    for theirs, ours in _PREFIXES.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def vision_config(raw: dict, op: str) -> MedGPTVisionConfig:
    """Of the config.json of CLIP or SigLIP2, whole or its vision part."""
    kind = raw.get("model_type") or (raw.get("architectures") or ["nothing"])[0]
    part = raw.get("vision_config") or {}
    part = raw if kind.endswith(("_vision_model", "VisionModel")) else part
    part = {k: v for k, v in part.items() if k not in ("model_type", "architectures", "auto_map")}
    if kind in ("clip", "clip_vision_model", "CLIPVisionModel"):
        return MedGPTVisionConfig.from_clip(CLIPVisionConfig(**part))
    if kind in ("siglip2", "siglip2_vision_model", "Siglip2VisionModel"):
        return MedGPTVisionConfig.from_siglip2(Siglip2VisionConfig(**part))
    refuse("a vision tower of CLIP or SigLIP2 (NaFlex)", kind, op)


def config_from_internvl(directory: Path, op: str) -> MedGPTConfig:
    """Of an InternVL directory: its config.json, and its tokenizer's ids of the image tokens.

    Raises:
        ValueError: another language model or vision tower, and what would change the answers
            without a word: pixel shuffle v1, padding to a square, LoRA that is not merged.
    """
    raw = json.loads((directory / "config.json").read_text())
    text, vision = raw.get("llm_config"), raw.get("vision_config")
    if not isinstance(text, dict) or not isinstance(vision, dict):
        refuse("InternVL's llm_config and vision_config", sorted(raw), op)
    if text.get("model_type", "gpt_oss") != "gpt_oss" or text.get("architectures") not in (
        None,
        ["GptOssForCausalLM"],
    ):
        refuse("gpt_oss as llm_config", text.get("architectures") or text["model_type"], op)
    if raw.get("ps_version", "v1") != "v2":
        # v1 leaves the merged patches transposed: same shapes, other meaning
        refuse("pixel shuffle of ps_version v2", raw.get("ps_version", "v1, the default"), op)
    for name in ("pad2square", "use_backbone_lora", "use_llm_lora"):
        if raw.get(name):
            refuse(f"no {name}", raw[name], op)
    tower = vision_config(vision, op)
    dynamic = raw.get("dynamic_image_size", False)
    dropped = ("model_type", "architectures", "auto_map", "_name_or_path")
    config = MedGPTConfig(
        text_config=GptOssConfig(**{k: v for k, v in text.items() if k not in dropped}),
        vision_config=tower,
        vision_mode="tiles",
        tile_size=raw.get("force_image_size") or tower.image_size,
        min_tiles=raw.get("min_dynamic_patch", 1) if dynamic else 1,
        max_tiles=raw.get("max_dynamic_patch", 6) if dynamic else 1,
        use_thumbnail=raw.get("use_thumbnail", False),
        downsample_ratio=raw.get("downsample_ratio", 0.5),
        vision_feature_layer=raw.get("select_layer", -1),
        **_image_tokens(directory, raw, op),
    )
    published = raw.get("quantization_config") or text.get("quantization_config")
    if published is not None:
        config.quantization_config = published
    return config


def _image_tokens(directory: Path, raw: dict, op: str) -> dict[str, int]:
    """The ids that InternVL's tokenizer gave to its image tokens, else those of export_internvl."""
    ids = {}
    if (directory / "tokenizer.json").is_file():
        added = json.loads((directory / "tokenizer.json").read_text()).get("added_tokens", [])
        ids = {token["content"]: token["id"] for token in added}
    if (directory / "added_tokens.json").is_file():
        ids |= json.loads((directory / "added_tokens.json").read_text())
    found = {field: ids[token] for field, token in _TOKENS.items() if token in ids}
    if found and len(found) < len(_TOKENS):
        refuse(f"tokens {', '.join(_TOKENS.values())}", f"only {len(found)} in {directory}", op)
    return found or {field: raw[field] for field in _TOKENS if field in raw}


def config_to_internvl(config: MedGPTConfig) -> dict:
    """InternVL's config.json, with transformers' CLIP as the vision tower.

    Raises:
        ValueError: what InternVL has not: native resolution, other towers than CLIP's, other means.
    """
    vision = config.vision_config
    if config.vision_mode != "tiles" or not vision.class_token:
        refuse("tiles and CLIP's tower", config.vision_mode, "export_internvl")
    if (tuple(config.image_mean), tuple(config.image_std)) != (IMAGENET_MEAN, IMAGENET_STD):
        refuse("ImageNet's mean and std", config.image_mean, "export_internvl")
    shared = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    shared += ("patch_size", "image_size", "hidden_act", "layer_norm_eps")
    tower = CLIPVisionConfig(**{name: getattr(vision, name) for name in shared}).to_dict()
    text = config.text_config.to_dict()
    quantized = getattr(config, "quantization_config", None)
    return {
        "model_type": "internvl_chat",
        "architectures": ["InternVLChatModel"],
        "llm_config": text | {"architectures": ["GptOssForCausalLM"]},
        "vision_config": tower | {"architectures": ["CLIPVisionModel"]},
        "force_image_size": config.tile_size,
        "dynamic_image_size": config.max_tiles > 1,
        "min_dynamic_patch": config.min_tiles,
        "max_dynamic_patch": config.max_tiles,
        "use_thumbnail": config.use_thumbnail,
        "downsample_ratio": config.downsample_ratio,
        "select_layer": config.vision_feature_layer,
        "ps_version": "v2",
        "pad2square": False,
        "tie_word_embeddings": False,
        **{field: getattr(config, field) for field in _TOKENS},
    } | ({} if quantized is None else {"quantization_config": quantized})
