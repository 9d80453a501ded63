"""Tables of rotary position embedding, computed in fp64 and stored in fp32.

R rotary_dim (the first R of head_dim are rotated, the first half of R with the second).
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch


class Rotary(NamedTuple):
    """cos and sin of every position and frequency, the attention factor multiplied in."""

    cos: torch.Tensor  # [max_seqlen, R/2] fp32
    sin: torch.Tensor  # [max_seqlen, R/2] fp32

    def to(self, device: torch.device | str) -> "Rotary":
        """The same tables on another device."""
        return Rotary(self.cos.to(device), self.sin.to(device))


def rotary_from_inv_freq(
    inv_freq: torch.Tensor, max_seqlen: int, attention_factor: float = 1.0
) -> Rotary:
    """Tables for given inverse frequencies.

    Args:
        inv_freq: [R/2] radians a position, any float dtype; angles are formed in fp64.
        max_seqlen: positions 0 ... max_seqlen - 1.
        attention_factor: multiplies cos and sin.

    Returns:
        Rotary on inv_freq's device.

    Raises:
        ValueError: inv_freq not a float vector, max_seqlen < 1.
    """
    if inv_freq.ndim != 1 or not inv_freq.dtype.is_floating_point or inv_freq.numel() == 0:
        raise ValueError(
            f"rotary_from_inv_freq: expected a float inv_freq [rotary_dim / 2], got "
            f"{inv_freq.dtype} {list(inv_freq.shape)}"
        )
    if max_seqlen < 1:
        raise ValueError(f"rotary_from_inv_freq: expected max_seqlen >= 1, got {max_seqlen}")
    positions = torch.arange(max_seqlen, dtype=torch.float64, device=inv_freq.device)
    angles = positions[:, None] * inv_freq.detach().double()
    return Rotary(
        (angles.cos() * attention_factor).float(), (angles.sin() * attention_factor).float()
    )


def yarn_rotary(
    head_dim: int,
    max_seqlen: int,
    *,
    rope_theta: float = 150000.0,
    factor: float = 32.0,
    original_max_position_embeddings: int = 4096,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool,
    attention_factor: float | None = None,
) -> Rotary:
    """YaRN tables (arXiv 2309.00071); the defaults are gpt-oss's, which needs truncate=False.

    Args:
        head_dim: R, the rotated dimensions.
        max_seqlen: positions 0 ... max_seqlen - 1.
        rope_theta: base of the frequencies.
        factor: context extension.
        original_max_position_embeddings: context before extension, in tokens.
        beta_fast, beta_slow: rotations within the original context between which the ramp lies.
        truncate: round the ramp's ends outwards to whole frequencies. No default: transformers'
            general one is True, gpt-oss's False, and the wrong one is silently a little worse.
        attention_factor: multiplies cos and sin; None is 0.1 ln(factor) + 1.

    Returns:
        Rotary on the CPU.

    Raises:
        ValueError: sizes or factors out of range.
    """
    inv_freq = yarn_inv_freq(
        head_dim,
        rope_theta,
        factor,
        original_max_position_embeddings,
        beta_fast,
        beta_slow,
        truncate,
    )
    if attention_factor is None:
        attention_factor = _yarn_scale(factor)
    return rotary_from_inv_freq(inv_freq, max_seqlen, attention_factor)


def yarn_inv_freq(
    dim: int,
    theta: float,
    factor: float,
    original: int,
    beta_fast: float,
    beta_slow: float,
    truncate: bool,
) -> torch.Tensor:
    """Inverse frequencies fp64 [dim/2]: fast ones as they are, slow ones divided by `factor`."""
    if dim < 2 or dim % 2 or factor <= 0 or original < 1 or theta <= 1:
        raise ValueError(
            f"yarn_rotary: expected an even head_dim >= 2, factor > 0, "
            f"original_max_position_embeddings >= 1 and rope_theta > 1, got {dim}, {factor}, "
            f"{original} and {theta}"
        )

    def frequency_of(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = frequency_of(beta_fast), frequency_of(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float64) - low) / (high - low)).clamp(0, 1)
    inv_freq = default_inv_freq(dim, theta)
    return inv_freq / factor * ramp + inv_freq * (1 - ramp)


def default_inv_freq(dim: int, theta: float) -> torch.Tensor:
    """theta ** (-2 i / dim), fp64 [dim/2]."""
    return theta ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)


def _yarn_scale(factor: float, mscale: float = 1.0) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def rotary_from_config(config: Any, max_seqlen: int, *, layer_type: str | None = None) -> Rotary:
    """Tables for a transformers model config, as its ROPE_INIT_FUNCTIONS define them.

    Args:
        config: has `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling`
            (transformers 4); rope_type default, linear, yarn, llama3 or longrope.
        max_seqlen: positions 0 ... max_seqlen - 1. Longrope takes its long factors where this
            exceeds the original context.
        layer_type: which entry, where `rope_parameters` holds one per layer type.

    Returns:
        Rotary on the CPU; rotary_dim is head_dim times partial_rotary_factor.

    Raises:
        ValueError: another rope_type, or parameters that are missing.
    """
    rope = _rope_parameters(config, layer_type)
    kind = rope.get("rope_type", "default")
    if kind not in _FROM_CONFIG:
        raise ValueError(
            f"rotary_from_config: expected rope_type {', '.join(_FROM_CONFIG)}, got {kind!r}"
        )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    dim = int(head_dim * (rope.get("partial_rotary_factor") or 1.0))
    try:
        inv_freq, attention_factor = _FROM_CONFIG[kind](config, rope, dim, max_seqlen)
    except KeyError as missing:
        raise ValueError(
            f"rotary_from_config: expected {missing} in the rope parameters of type {kind}, got "
            f"{sorted(rope)}"
        ) from None
    return rotary_from_inv_freq(inv_freq, max_seqlen, attention_factor)


def _rope_parameters(config: Any, layer_type: str | None) -> dict:
    """One flat dict of rope parameters, wherever this version of the config keeps them."""
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if layer_type is not None:
        found = found.get(layer_type, found)
    elif any(isinstance(value, Mapping) for value in found.values()):
        raise ValueError(
            f"rotary_from_config: expected layer_type to choose among {sorted(found)}, got None"
        )
    rope = dict(found)
    rope.setdefault("rope_type", rope.get("type", "default"))
    for name in ("rope_theta", "partial_rotary_factor"):
        if rope.get(name) is None and getattr(config, name, None) is not None:
            rope[name] = getattr(config, name)
    # Phi-3 keeps the original context beside the rope parameters, and that one counts.
    original = getattr(config, "original_max_position_embeddings", None)
    if original is not None:
        rope["original_max_position_embeddings"] = original
    elif hasattr(config, "max_position_embeddings"):
        rope.setdefault("original_max_position_embeddings", config.max_position_embeddings)
    return rope


def _default(config, rope, dim, max_seqlen):
    return default_inv_freq(dim, rope["rope_theta"]), 1.0


def _linear(config, rope, dim, max_seqlen):
    return default_inv_freq(dim, rope["rope_theta"]) / rope["factor"], 1.0


def _yarn(config, rope, dim, max_seqlen):
    original = rope["original_max_position_embeddings"]
    factor = rope["factor"] or config.max_position_embeddings / original
    scale = rope.get("attention_factor")
    if scale is None:
        mscale, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
        scale = _yarn_scale(factor)
        if mscale and all_dim:
            scale = _yarn_scale(factor, mscale) / _yarn_scale(factor, all_dim)
    inv_freq = yarn_inv_freq(
        dim,
        rope["rope_theta"],
        factor,
        original,
        rope.get("beta_fast") or 32.0,
        rope.get("beta_slow") or 1.0,
        rope.get("truncate", True),
    )
    return inv_freq, scale


def _llama3(config, rope, dim, max_seqlen):
    inv_freq = default_inv_freq(dim, rope["rope_theta"])
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] * inv_freq / (2 * math.pi)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return inv_freq / rope["factor"] * (1 - smooth) + inv_freq * smooth, 1.0


def _longrope(config, rope, dim, max_seqlen):
    original = rope["original_max_position_embeddings"]
    factor = rope.get("factor") or config.max_position_embeddings / original
    scale = rope.get("attention_factor")
    if scale is None:
        scale = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    per_frequency = rope["long_factor"] if max_seqlen > original else rope["short_factor"]
    stretch = torch.tensor(per_frequency, dtype=torch.float64)
    return default_inv_freq(dim, rope["rope_theta"]) / stretch, scale


_FROM_CONFIG = {
    "default": _default,
    "linear": _linear,
    "yarn": _yarn,
    "llama3": _llama3,
    "longrope": _longrope,
}
