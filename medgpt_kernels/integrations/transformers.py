"""attn_implementation and experts_implementation "medgpt_kernels", and `patch` for gpt-oss.

    from medgpt_kernels.integrations.transformers import load_mxfp4, patch, register

    register()
    model = AutoModelForCausalLM.from_pretrained(
        name, attn_implementation="medgpt_kernels", experts_implementation="medgpt_kernels")
    patch(model)  # gpt-oss: also rotates queries and keys inside attention, and fuses the router
    model = load_mxfp4(directory)  # gpt-oss as published, its experts left packed

B rows of S tokens, H query heads, G key and value heads, D head_dim.
"""

from collections.abc import Callable

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from medgpt_kernels.attention.op import attention
from medgpt_kernels.integrations import refuse
from medgpt_kernels.integrations.moe import add_expert_lora, experts_forward
from medgpt_kernels.integrations.sequences import Sequences, from_mask, from_positions
from medgpt_kernels.rotary.tables import Rotary

__all__ = ["add_expert_lora", "load_mxfp4", "patch", "register"]

NAME = "medgpt_kernels"

# What models hand through to attention and no attention function uses.
OF_NO_CONCERN = {
    "cache_position",
    "layer_idx",
    "logits_to_keep",
    "num_items_in_batch",
    "output_hidden_states",
    "output_router_logits",
    "return_dict",
    "seq_idx",
    "token_type_ids",
    "use_cache",
}

# The parts of transformers' masks that attention's own arguments say as well.
_EXPRESSIBLE = {
    "and_masks.<locals>.and_mask",
    "bidirectional_mask_function",
    "causal_mask_function",
    "packed_sequence_mask_function.<locals>.inner_mask",
    "remap_positions_for_packed_sequence.<locals>.inner_mask",
    "sliding_window_bidirectional_overlay.<locals>.inner_mask",
    "sliding_window_overlay.<locals>.inner_mask",
}


def register() -> None:
    """Make attn_implementation and experts_implementation="medgpt_kernels" known to transformers.

    Again is harmless. Experts: gpt-oss's and those of SiLU gates (Mixtral, Qwen3-MoE and alike).

    It serves every model that goes through transformers' AttentionInterface: grouped heads, sinks,
    sliding windows, vision towers, left and right padding, dynamic KV caches and packed batches.
    No mask of S x S is ever made. Packed batches come as `cu_seq_lens_q`, `cu_seq_lens_k` (int32)
    and `max_length_q`, `max_length_k` (int), which read nothing back from a device, or as
    `position_ids` that restart, which are read once a forward. Reading them breaks a compiled
    graph: torch.compile(fullgraph=True) needs cu_seq_lens, for plain [B, S] batches too.

    A model call then raises ValueError on what is not served, rather than ignore it: dropout > 0,
    softcap, output_attentions, 4D masks, static caches, chunked and blockwise masks, positions
    with gaps, padding inside a sliding window, unknown keyword arguments.
    """
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


def load_mxfp4(directory, *, dtype: torch.dtype = torch.bfloat16, **options):
    """A published gpt-oss checkpoint with its experts left in MXFP4, patched.

    The blocks and scales go from the files to the kernels as they are: no dense copy is ever made.
    On a CPU they, and the linear layers, move to huge pages, one tensor after the other.
    gpt-oss may be the text part of a larger model of transformers. `save_pretrained` writes the
    same bytes again.

    Args:
        directory: config.json and safetensors files, with quant_method "mxfp4".
        dtype: of everything but the experts' weights.
        options: for the model's from_pretrained, such as device_map.

    Returns:
        The model, in eval mode as from_pretrained leaves it. Experts' weights are frozen, the rest
        is trainable; `add_expert_lora` adds LoRA pairs.

    Raises:
        ValueError: another quantisation, an architecture that transformers does not have, an index
            that leads out of the directory, files that are missing or cut short, tensors that are
            missing, there twice, or of another dtype or shape.
    """
    from medgpt_kernels.integrations import packed

    register()
    model = packed.load_mxfp4(directory, dtype=dtype, **options)
    patch(model)
    return model


def patch(
    model: torch.nn.Module, *, strict: bool = False, projections: str | None = None
) -> dict[str, str]:
    """Put fused rotary, attention, routing and experts into the gpt-oss layers, in place.

    The model may be gpt-oss or hold it as its text part. Parameters and state-dict names stay. On
    the CPU, the projections around attention and the head get a kernel for few rows, fp32 or bf16,
    and a layer's decoding step with a PagedCache and MXFP4 experts is one native call.

    Args:
        model: any module.
        strict: raise where there is no gpt-oss attention in it.
        projections: None, or "int8": the projections around attention and the head are rounded to
            8 bits in blocks of 32 (`integrations.int8.Int8Linear`, as in llama.cpp's Q8_0). For
            inference: half the bytes of bf16, frozen, and saved under other names.

    Returns:
        Name of each module replaced by this call, and the class that took its place; a second call
        replaces nothing.

    Raises:
        ValueError: under strict; another name of projections.
    """
    from medgpt_kernels.integrations import gpt_oss

    return gpt_oss.patch(model, strict=strict, projections=projections)


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable | None = None,
    attention_mask: torch.Tensor | None = None,
    use_vmap: bool = False,
    local_size: int | None = None,
    config=None,
    **kwargs,
) -> torch.Tensor | None:
    """transformers' mask interface: None, or which keys are not padding, where some are.

    bool [B, kv_length], or for bidirectional attention [B, 1, 1, kv_length], as pooling heads that
    call torch's own attention expect a mask which broadcasts over heads and queries.
    """
    unknown = _unknown_parts(mask_function)
    chunk = getattr(config, "attention_chunk_size", None)
    if use_vmap or unknown or (chunk is not None and chunk == local_size):
        refuse("a causal, bidirectional or sliding-window mask", unknown or "another")
    causal = "allow_is_bidirectional_skip" not in kwargs  # what bidirectional masks come with
    grown = isinstance(q_offset, int) and q_offset + q_length == kv_offset + kv_length
    if causal and not grown:
        refuse("a dynamic KV cache, which ends with the last query", "a static one")
    if attention_mask is None:
        return None
    if attention_mask.shape[1] - kv_length < 0:
        refuse(f"an attention_mask of {kv_length} keys", list(attention_mask.shape))
    padding = attention_mask[:, attention_mask.shape[1] - kv_length :]
    if padding.all():
        return None
    return padding if causal else padding[:, None, None]


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: q [B, H, S, D], k and v [B, G, S_k, D] to [B, S, H, D]."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    is_causal = looks_back_only(module, is_causal, sliding_window)
    check_options(module, dropout, sliding_window, k.shape[1], kwargs)
    sequences = find_sequences(module, q, k, attention_mask, is_causal, sliding_window, kwargs)
    out = attend(
        q, k, v, sequences, is_causal, sliding_window, s_aux, scaling, kwargs.get("deterministic")
    )
    return out, None


def looks_back_only(module: torch.nn.Module, is_causal: bool | None, sliding_window) -> bool:
    """Whether attention is causal: as this call says, else as the module does."""
    own = getattr(module, "is_causal", is_causal)
    if own is None:
        refuse("is_causal, given or on the module", f"none on {type(module).__name__}")
    if is_causal is None:
        # A decoder turned into an encoder says so in its config only, as its mask does.
        is_causal = own and getattr(module.config, "is_causal", True)
    if own and not is_causal and sliding_window is not None:
        # transformers' own masks and flash attention disagree on this window by one key
        refuse("no sliding_window in a decoder turned into an encoder", sliding_window)
    return is_causal


def check_options(module, dropout, sliding_window, len_k: int, kwargs: dict) -> None:
    """Refuse what attention would otherwise leave undone."""
    if dropout > 0:
        refuse("dropout 0", dropout)
    for name in ("softcap", "output_attentions", "head_mask"):
        if (given := kwargs.get(name)) is not None and given is not False:
            refuse(f"no {name}", given if isinstance(given, (int, float)) else "one")
    used = {"position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}
    for name, given in kwargs.items():
        known = name in used or name in OF_NO_CONCERN or name == "deterministic"
        if not known and given is not None and given is not False:
            refuse("no other arguments for attention", name)
    if sliding_window is not None and sliding_window < 1:
        refuse("a sliding_window of at least 1", sliding_window)
    if sliding_window is None and len_k > _window_of(module):
        refuse(
            f"the sliding_window of {_window_of(module)} that the config gives this layer",
            f"none from {type(module).__name__}",
        )


def _window_of(module) -> float:
    """The window that transformers' mask gives this layer: a few models never tell attention."""
    config = getattr(module, "config", None)
    types, at = getattr(config, "layer_types", None), getattr(module, "layer_idx", None)
    windowed = types is None or (at is not None and types[at] == "sliding_attention")
    width = getattr(config, "sliding_window", None) if windowed else None
    return float("inf") if width is None or not getattr(module, "is_causal", True) else width


def find_sequences(module, q, k, mask, is_causal, sliding_window, kwargs: dict) -> Sequences | None:
    """The packed sequences of a call, or None where each row of the batch is one."""
    batch, len_q, len_k = q.shape[0], q.shape[1], k.shape[1]
    cu_q, positions = kwargs.get("cu_seq_lens_q"), kwargs.get("position_ids")
    for name in ("cu_seq_lens_k", "max_length_q", "max_length_k"):
        if cu_q is None and kwargs.get(name) is not None:
            refuse(f"cu_seq_lens_q with {name}", "none")
    if mask is not None:
        shapes = ((batch, len_k), (batch, 1, 1, len_k))
        if mask.is_floating_point() or mask.shape not in shapes:
            refuse(f"no mask or a padding mask {[batch, len_k]}", f"{mask.dtype} {mask.shape}")
    if not is_causal and sliding_window is not None and len_q != len_k:
        refuse("queries and keys of the same tokens in a bidirectional window", (len_q, len_k))
    if cu_q is not None:
        if mask is not None:
            refuse("either padding or cu_seq_lens_q", "both")
        cu_k = kwargs.get("cu_seq_lens_k")
        lengths = [kwargs.get(name) for name in ("max_length_q", "max_length_k")]
        max_q, max_k = (n if n is None or isinstance(n, int) else int(n) for n in lengths)
        cu_q = cu_q.to(torch.int32)
        return Sequences(cu_q, cu_q if cu_k is None else cu_k.to(torch.int32), max_q, max_k)
    if mask is not None:
        cross = not is_causal and sliding_window is None
        found = from_mask(mask, positions, len_q, cross, module)
        if found.holes and sliding_window is not None:
            refuse("padding at the ends of a row with a sliding window", "padding between tokens")
        return found
    return None if positions is None else from_positions(positions, batch, len_q, len_k, module)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sequences: Sequences | None,
    is_causal: bool,
    sliding_window: int | None,
    sinks: torch.Tensor | None,
    scaling: float | None,
    deterministic: bool | None,
    rotary: Rotary | None = None,
    position_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """attention over [B, S, H, D], packed where there are sequences; padded queries give 0."""
    # transformers counts the query's own key; both sides are as wide where attention looks ahead.
    side = -1 if sliding_window is None else sliding_window - 1
    options = {
        "causal": is_causal,
        "window_size": (side, 0 if is_causal else side),
        "sinks": sinks,
        "softmax_scale": scaling,
        "deterministic": bool(deterministic),
        "rotary": rotary,
        "position_ids": position_ids,
    }
    if sequences is None:
        return attention(q, k, v, **options)
    out = attention(
        _take(q, sequences.rows_q),
        _take(k, sequences.rows_k),
        _take(v, sequences.rows_k),
        cu_seqlens_q=sequences.cu_seqlens_q,
        cu_seqlens_k=sequences.cu_seqlens_k,
        max_seqlen_q=sequences.max_seqlen_q,
        max_seqlen_k=sequences.max_seqlen_k,
        **options,
    )
    if sequences.rows_q is not None:
        padded = out.new_zeros(q.shape[0] * q.shape[1], *out.shape[1:])
        out = padded.index_copy(0, sequences.rows_q, out)
    return out.unflatten(0, q.shape[:2])


def _take(x: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    """The tokens that take part, [B, S, H, D] -> [T, H, D]."""
    x = x.flatten(0, 1)
    return x if rows is None else x.index_select(0, rows)


def _unknown_parts(mask_function: Callable | None) -> list[str]:
    """Names of the functions in a mask function that attention cannot stand in for."""
    if mask_function is None:
        return []
    if torch.compiler.is_compiling():  # closures cannot be traced; an or_mask is the outermost
        known = ("and_mask", "bidirectional_mask_function", "causal_mask_function")
        return [] if mask_function.__name__ in known else [mask_function.__name__]
    unknown = [] if mask_function.__qualname__ in _EXPRESSIBLE else [mask_function.__qualname__]
    for cell in mask_function.__closure__ or ():
        inside = cell.cell_contents
        for part in inside if isinstance(inside, (tuple, list)) else (inside,):
            if callable(part) and not isinstance(part, torch.Tensor):
                unknown += _unknown_parts(part)
    return unknown
