"""What a MedGPT checkpoint is, from its config and the headers of its files."""

import math
import os
from pathlib import Path

from medgpt.checkpoint import is_packed, read_config
from medgpt_kernels.integrations.headers import read_headers


def describe(directory: str | os.PathLike) -> dict:
    """Sizes and kinds by name; parameters count both halves of a packed byte."""
    config, directory = read_config(directory, "info"), Path(directory)
    text, vision = config.text_config, config.vision_config
    headers = read_headers(directory, "info")
    sizes = {n: math.prod(stored.shape) for n, stored in headers.items()}
    packed = sum(2 * size for n, size in sizes.items() if n.endswith("_blocks"))
    plain = sum(size for n, size in sizes.items() if not n.endswith(("_blocks", "_scales")))
    tile, most = None, config.max_pixels // config.unit_size**2
    if config.vision_mode == "tiles":
        tile = config.tokens_per_tile(config.tile_size, config.tile_size)
        most = tile * (config.max_tiles + (config.max_tiles > 1 and config.use_thumbnail))
    kind = "packed MXFP4" if is_packed(config) else "dense"
    return {
        "directory": str(directory),
        "parameters": plain + packed,
        "bytes": sum(file.stat().st_size for file in {s.file for s in headers.values()}),
        "text": f"{text.num_hidden_layers} layers of {text.hidden_size}",
        "experts": f"{text.num_local_experts}, top-{text.num_experts_per_tok}, {kind}",
        "context": text.max_position_embeddings,
        "vocabulary": text.vocab_size,
        "vision": f"{vision.num_hidden_layers} layers of {vision.hidden_size}",
        "vision_mode": config.vision_mode,
        "tokens_per_tile": tile,
        "tokens_per_image_at_most": most,
    }
