"""Memory of one device in a stage, before anyone rents it.

Peak = what stays (weights, gradients, optimizer) + the larger of two moments: the loss, and the
backward of one layer with its recomputed values. The counts of values are those that the layers of
medgpt_kernels and transformers keep.

T tokens of a pack, N tiles, W processes.
"""

import torch

from medgpt.config import MedGPTConfig
from medgpt.train.loss import BLOCK_VALUES, LOGITS_BYTES
from medgpt.train.stages import HEAD, Stage, part_of

GIGA = 2**30


def count_parameters(config: MedGPTConfig) -> dict[str, torch.Size]:
    """Shape of each parameter, by name; nothing is allocated."""
    from medgpt.model import MedGPTForConditionalGeneration

    with torch.device("meta"):
        model = MedGPTForConditionalGeneration(config)
    return {name: p.shape for name, p in model.named_parameters()}


def estimate(
    config: MedGPTConfig,
    stage: Stage,
    *,
    processes: int = 1,
    zero3: bool = False,
    dtype: torch.dtype = torch.float32,
    tiles: int | None = None,
    lora_rank: int = 0,
    device: str = "cpu",
) -> dict[str, int]:
    """Bytes of one device at its peak, by what takes them; "peak" is their sum.

    Args:
        processes: W.
        zero3: weights, gradients and optimizer cut in W parts; else each process holds all.
        dtype: of weights. 16-bit ones have an fp32 copy in the optimizer under ZeRO.
        tiles: N of a pack; default what half of its tokens are.
        lora_rank: 0, or LoRA on attention and experts packed in MXFP4, all else frozen.
        device: "cpu" or "cuda", whose loss works without fp32 copies of 16-bit weights.
    """
    shapes = count_parameters(config)
    size, text = dtype.itemsize, config.text_config
    per_tile = config.tokens_per_tile(config.tile_size, config.tile_size)
    tiles = stage.length // 2 // per_tile if tiles is None else tiles
    share = processes if zero3 else 1
    numel = {name: shape.numel() for name, shape in shapes.items()}
    trained = {n: c for n, c in numel.items() if not lora_rank and part_of(n) in _parts(stage)}
    held = sum(_weight_bytes(name, count, size, lora_rank) for name, count in numel.items())
    learned = lora_values(config, lora_rank) if lora_rank else sum(trained.values())
    grad_size, state_size = (4, 8) if lora_rank else (size, 12 if size == 2 and zero3 else 2 * size)
    adapters = 4 * learned if lora_rank else 0
    found = {
        "weights": (held + adapters) // share,
        "optimizer": learned * state_size // share,
        "tables": text.max_position_embeddings * text.head_dim * 4,
    }
    if zero3:  # the largest block gathered, and the next one
        found["gathered"] = 2 * max(_blocks(numel).values()) * size
    kept, layer = _activations(config, stage, tiles, size, bool(lora_rank))
    gradients = learned * grad_size // share
    largest = max([*(trained.values() if trained else ()), 1])
    loss = _loss_bytes(config, stage, size, device, trained.get(f"{HEAD}.weight", 0))
    moments = {
        "loss": kept + loss,
        "layer": kept + layer + gradients,
        # AdamW's own one goes over the weights once; DeepSpeed's makes two values of each
        "step": gradients + (2 * largest * max(size, 4) // share if zero3 else 0),
    }
    moment = max(moments, key=moments.get)
    parts = {
        "loss": {"activations": kept, "loss": loss},
        "layer": {"activations": kept + layer, "gradients": gradients},
        "step": {"gradients": gradients, "update": moments["step"] - gradients},
    }
    found |= parts[moment]
    return {**found, "peak": sum(found.values())}


def _parts(stage: Stage) -> set[str]:
    return set(stage.learning_rates)


def _weight_bytes(name: str, count: int, size: int, lora_rank: int) -> int:
    """MXFP4 takes 17 bytes for 32 values."""
    packed = lora_rank and name.endswith(("experts.gate_up_proj", "experts.down_proj"))
    return count * 17 // 32 if packed else count * size


def lora_values(config: MedGPTConfig, rank: int) -> int:
    """Values of the adapters of lora.add_adapters."""
    text = config.text_config
    hidden, inner, heads = text.hidden_size, text.intermediate_size, text.head_dim
    q, k = heads * text.num_attention_heads, heads * text.num_key_value_heads
    attention = 2 * (hidden + q) + 2 * (hidden + k)
    experts = text.num_local_experts * (hidden + 2 * inner + inner + hidden)
    return rank * text.num_hidden_layers * (attention + experts)


def _blocks(numel: dict[str, int]) -> dict[str, int]:
    """Values of what ZeRO-3 gathers at once: MoE blocks, and single modules elsewhere."""
    found = {}
    for name, count in numel.items():
        block = name.partition(".mlp.")[0] if ".mlp.experts" in name else name.rpartition(".")[0]
        found[block] = found.get(block, 0) + count
    return found


def _activations(config: MedGPTConfig, stage: Stage, tiles: int, size: int, lora: bool):
    """(bytes from forward to backward, bytes of one layer's values and their gradients)."""
    text, vision, tokens = config.text_config, config.vision_config, stage.length
    hidden, inner, topk = text.hidden_size, text.intermediate_size, text.num_experts_per_tok
    q = text.head_dim * text.num_attention_heads
    k = text.head_dim * text.num_key_value_heads
    patches = tiles * ((config.tile_size // vision.patch_size) ** 2 + vision.class_token)
    a_layer = 4 * hidden + 2 * q + 2 * k + 2 * topk * inner  # norms, q k v out, gate and up
    backward = 2 * hidden + 2 * q + 2 * k + topk * (3 * inner + 2 * hidden)
    a_vision = 6 * vision.hidden_size + 2 * vision.intermediate_size
    if stage.gradient_checkpointing:
        kept = tokens * text.num_hidden_layers * hidden
        kept += patches * vision.num_hidden_layers * vision.hidden_size
    else:
        kept = tokens * text.num_hidden_layers * a_layer
        kept += patches * vision.num_hidden_layers * a_vision
    kept += tokens * 3 * hidden  # embeddings, the last layer, its norm
    layer = tokens * (a_layer + backward)
    return kept * size, max(layer, 2 * patches * a_vision) * size


def _loss_bytes(config, stage: Stage, size: int, device: str, head_values: int) -> int:
    """One chunk of logits, the gradient of the hidden states, that of a trained head in fp32."""
    text = config.text_config
    rows = max(1, LOGITS_BYTES // (4 * text.vocab_size))
    chunk = min(rows, stage.length) * text.vocab_size * 4
    upcast = 4 * BLOCK_VALUES if size == 2 and device == "cpu" else 0
    head = head_values * (4 if size >= 4 else 4 + size)
    return chunk + upcast + head + stage.length * text.hidden_size * size


def table(found: dict[str, int], budget: float | None = None) -> str:
    """Lines of GiB for a terminal; with the card's GiB, whether it fits."""
    lines = [f"{name:<12}{value / GIGA:>10.2f} GiB" for name, value in found.items()]
    if budget is not None:
        fits = found["peak"] <= 0.92 * budget * GIGA  # the allocator's and NCCL's own
        lines.append(f"{'card':<12}{budget:>10.2f} GiB: {'fits' if fits else 'does not fit'}")
    return "\n".join(lines)
