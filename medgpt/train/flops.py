"""Floating-point operations of a training step, from the configuration and what a batch holds.

Products only, a multiply-add is 2; recomputation under gradient checkpointing is not counted, so
that MFU is that of the model (PaLM, arXiv 2204.02311, appendix B).
"""

from collections.abc import Iterable, Mapping

from medgpt.config import MedGPTConfig
from medgpt.train.stages import HEAD, LANGUAGE, PROJECTOR, VISION


def forward_flops(
    config: MedGPTConfig,
    lengths: Iterable[int],
    image_sizes: Iterable[tuple[int, int]] = (),
    loss_tokens: int | None = None,
) -> dict[str, float]:
    """Of one forward, for each part of the model.

    Args:
        lengths: tokens of each document, which attend to themselves alone.
        image_sizes: height, width of each tile.
        loss_tokens: rows that the head sees; default all tokens.
    """
    text, vision = config.text_config, config.vision_config
    lengths, sizes = list(lengths), [tuple(s) for s in image_sizes]
    tokens, hidden, inner = sum(lengths), text.hidden_size, text.intermediate_size
    heads = text.num_attention_heads * text.head_dim
    keys = text.num_key_value_heads * text.head_dim
    experts = 3 * hidden * inner * text.num_experts_per_tok + hidden * text.num_local_experts
    linear = 2 * tokens * (2 * hidden * heads + 2 * hidden * keys + experts)
    layers = linear * text.num_hidden_layers
    for kind in text.layer_types:
        window = text.sliding_window if kind == "sliding_attention" else None
        layers += 4 * heads * sum(_pairs(n, window) for n in lengths)
    patches = [(h // vision.patch_size) * (w // vision.patch_size) for h, w in sizes]
    width, seen = vision.hidden_size, [n + vision.class_token for n in patches]
    a_layer = 2 * sum(seen) * (4 * width * width + 2 * width * vision.intermediate_size)
    a_layer += 4 * width * sum(n * n for n in seen)
    tower = 2 * sum(patches) * 3 * vision.patch_size**2 * width
    tower += a_layer * (config.vision_feature_layer % (vision.num_hidden_layers + 1))
    image_tokens = sum(patches) // config.merge**2
    middle = config.projector_hidden_size or hidden
    return {
        VISION: float(tower),
        PROJECTOR: 2.0 * image_tokens * middle * (width * config.merge**2 + hidden),
        LANGUAGE: float(layers),
        HEAD: 2.0 * (tokens if loss_tokens is None else loss_tokens) * hidden * text.vocab_size,
    }


def step_flops(forward: Mapping[str, float], trained: Iterable[str]) -> float:
    """Of forward and backward: 3 x the forward where weights train, 2 x where they pass gradients.

    The vision tower is first in line: where it is frozen nothing goes back through it.
    """
    trained, total, needed = set(trained), 0.0, False
    for part in (VISION, PROJECTOR, LANGUAGE, HEAD):  # the order of the forward
        needed |= part in trained
        total += forward[part] * (1 + needed + (part in trained))
    return total


def _pairs(length: int, window: int | None) -> int:
    """Queries times the keys they see: causal, the query's own among a window's."""
    if window is None or window >= length:
        return length * (length + 1) // 2
    return window * (window + 1) // 2 + (length - window) * window
