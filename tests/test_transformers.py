"""The transformers integration against transformers' own eager attention.

Truth is eager in fp64 with every fp32 upcast raised to fp64, eager is eager in the model's dtype.
"""

import contextlib
import copy
import re
from unittest import mock

import pytest
import torch
import torch._dynamo.testing
from torch.utils._python_dispatch import TorchDispatchMode

from medgpt_kernels.testing import ToleranceError, assert_close

transformers = pytest.importorskip("transformers")

from medgpt_kernels.integrations import gpt_oss, sequences  # noqa: E402
from medgpt_kernels.integrations import transformers as integration  # noqa: E402
from medgpt_kernels.integrations.gpt_oss import FusedGptOssRouter, GptOssTopKRouter  # noqa: E402

WINDOW = 8
TEXT = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 40,
    "head_dim": 16,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 150000.0,
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 16,
}
LENGTHS = [5, 23, 1, 12]
EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}


@pytest.fixture(autouse=True)
def _strict(monkeypatch):
    monkeypatch.setenv("MEDGPT_KERNELS_STRICT", "1")
    integration.register()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # these models are too small to share out
    yield
    torch.set_num_threads(threads)


def gpt_oss_config(**changes):
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    options = {**TEXT, **experts, "sliding_window": WINDOW, "rope_parameters": YARN}
    return transformers.GptOssConfig(**{**options, "num_hidden_layers": 4, **changes})


CONFIGS = {
    "gpt_oss": gpt_oss_config,
    "llama": lambda **c: transformers.LlamaConfig(**{**TEXT, **c}),
    "qwen3": lambda **c: transformers.Qwen3Config(**{**TEXT, **c}),
    "mistral": lambda **c: transformers.MistralConfig(**{**TEXT, "sliding_window": WINDOW, **c}),
    "gemma3": lambda **c: transformers.Gemma3TextConfig(
        **{**TEXT, "sliding_window": WINDOW, "query_pre_attn_scalar": 16, **c},
        layer_types=["sliding_attention", "full_attention"],
    ),
}
FAMILIES = pytest.mark.parametrize("family", list(CONFIGS))
# gpt-oss with rotary inside the attention module as well, by patch
KINDS = pytest.mark.parametrize("family", [*CONFIGS, "gpt_oss patched"])


def language_model(family: str, dtype=torch.float32, **changes):
    config = CONFIGS[family.split()[0]](**changes)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, **EAGER)
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.normal_(parameter, std=2.0)
    return model.to(dtype).train()


def ours(model, family: str = ""):
    """A copy of a model that attends through medgpt_kernels."""
    model = copy.deepcopy(model)
    model.set_attn_implementation("medgpt_kernels")
    if "patched" in family:
        assert integration.patch(model, strict=True)
    return model


@contextlib.contextmanager
def exact():
    """fp64 wherever transformers asks for fp32: norms, softmax, rotary tables."""
    with (
        mock.patch.object(torch, "float32", torch.float64),
        mock.patch.object(torch, "float", torch.float64),
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
    ):
        yield


def truth_of(model):
    """The same model in fp64, its rotary frequencies too."""
    with exact():
        made = type(model)._from_config(copy.deepcopy(model.config), **EAGER)
    made.load_state_dict(model.state_dict())
    for mine, theirs in zip(made.parameters(), model.parameters(), strict=True):
        mine.requires_grad_(theirs.requires_grad)
    return made.double().train(model.training)


def tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(1, 64, shape, generator=torch.Generator().manual_seed(seed))


def padded(lengths, side: str):
    """Padded ids and mask, [B, S]."""
    ids, keep = torch.zeros(2, len(lengths), max(lengths), dtype=torch.long)
    for n, length in enumerate(lengths):
        at = slice(0, length) if side == "right" else slice(max(lengths) - length, None)
        ids[n, at], keep[n, at] = tokens(length, seed=n + 2), 1
    return ids, keep


def logits_and_gradients(model, forward) -> dict[str, torch.Tensor]:
    """forward(model) gives logits [T, V]; the loss weighs them at random."""
    model.zero_grad()
    logits = forward(model)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5))
    (logits * weights.to(logits.dtype)).sum().backward()
    result = {"logits": logits}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, f"{name} has no gradient"
            result[name] = parameter.grad
    return {name: t.detach().clone() for name, t in result.items()}


def shuffled(model, order):
    """The same function with the channels of the residual stream in another order.

    Its eager results differ by rounding alone, so it shows how far rounding can go.
    """
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        for dim, size in enumerate(parameter.shape):
            if size == TEXT["hidden_size"]:
                parameter.data = parameter.data.index_select(dim, order)
    return model


def eager_draws(model, forward, count: int = 4) -> list[dict[str, torch.Tensor]]:
    """Eager's logits and gradients, in several orders of summation."""
    draws = [logits_and_gradients(model, forward)]
    for seed in range(1, count):
        size = TEXT["hidden_size"]
        order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
        results = logits_and_gradients(shuffled(model, order), forward)
        for name in results.keys() - {"logits"}:
            for dim, length in enumerate(results[name].shape):
                if length == size:
                    results[name] = results[name].index_select(dim, order.argsort())
        draws.append(results)
    return draws


def over_layers(results: dict, truth: dict) -> dict[str, torch.Tensor]:
    """One vector per kind of parameter, each layer's part scaled by a power of two to about 1.

    A bias of four elements is a poor sample of an error; those of all layers are a better one.
    """
    kinds: dict[str, list] = {}
    for name, t in results.items():
        size = truth[name].double().square().mean().sqrt().clamp(min=1e-30)
        scaled = t.double() * torch.exp2(-size.log2().round())
        kinds.setdefault(re.sub(r"layers\.\d+", "layers", name), []).append(scaled.flatten())
    dtype = results["logits"].dtype
    return {kind: torch.cat(parts).to(dtype) for kind, parts in kinds.items()}


def hold(model, mine, forward, ours_forward=None, draws: int = 4) -> None:
    """Logits and every gradient of `mine` against eager in two precisions."""
    truth = truth_of(model)
    with exact():
        expected = logits_and_gradients(truth, forward)
    actual = logits_and_gradients(mine, ours_forward or forward)
    assert actual.keys() == expected.keys()
    eager = [over_layers(draw, expected) for draw in eager_draws(model, forward, draws)]
    actual, expected = over_layers(actual, expected), over_layers(expected, expected)
    for kind, t in expected.items():
        errors = [(draw[kind].double() - t).abs().max() for draw in eager]
        worst = eager[int(torch.stack(errors).argmax())][kind]
        extra = 2.0 if kind.endswith("sinks") else 0.0
        assert_close(actual[kind], worst, t, extra_ulp=extra, name=kind)


def hold_pooled(model, mine, forwards) -> None:
    """The same over several inputs, their errors pooled.

    In bf16 the order of summation changes little, but eight biases of a router, their gradients
    each a sum that cancels, are as good as one draw of chance an input.
    """
    truth, found = truth_of(model), []
    for forward in forwards:
        with exact():
            expected = logits_and_gradients(truth, forward)
        results = (logits_and_gradients(mine, forward), logits_and_gradients(model, forward))
        found.append([over_layers(r, expected) for r in (*results, expected)])
    for kind in found[0][0]:
        pooled = (torch.cat([three[n][kind] for three in found]) for n in range(3))
        assert_close(*pooled, extra_ulp=2.0 if kind.endswith("sinks") else 0.0, name=kind)


def plain(ids, **kwargs):
    """forward(model) -> logits [B * S, V] without a cache."""
    return lambda model: model(ids, use_cache=False, **kwargs).logits.flatten(0, 1)


def one_by_one(parts):
    """forward(model) -> logits of every sequence by itself."""
    return lambda model: torch.cat([model(p[None], use_cache=False).logits[0] for p in parts])


def packed(parts, how: str):
    """forward(model) -> the same logits from one packed row."""
    ids = torch.cat(parts)[None]
    positions = torch.cat([torch.arange(len(p)) for p in parts])[None]
    lengths = torch.tensor([0, *map(len, parts)], dtype=torch.int32)
    cu_seqlens = lengths.cumsum(0, dtype=torch.int32)
    longest = max(map(len, parts))
    kwargs = {"position_ids": positions}
    if how != "position_ids":
        kwargs = {
            "cu_seq_lens_q": cu_seqlens,
            "cu_seq_lens_k": cu_seqlens,
            "max_length_q": longest,
            "max_length_k": longest,
        }
    if how == "cu_seq_lens and position_ids":
        kwargs["position_ids"] = positions
    return plain(ids, **kwargs)


# Forward and backward


@KINDS
def test_logits_and_gradients(family):
    model = language_model(family)
    hold(model, ours(model, family), plain(tokens(2, 37)))


@pytest.mark.parametrize("how", ["cu_seq_lens", "cu_seq_lens and position_ids", "position_ids"])
@KINDS
def test_packed_equals_one_by_one(family, how):
    model = language_model(family)
    parts = [tokens(n, seed=n) for n in LENGTHS]
    hold(model, ours(model, family), one_by_one(parts), packed(parts, how))


@pytest.mark.parametrize("side", ["left", "right"])
@KINDS
def test_padding(family, side):
    model = language_model(family)
    ids, keep = padded(LENGTHS, side)
    positions = (keep.cumsum(-1) - 1).clamp(min=0)

    def forward(m):
        out = m(ids, attention_mask=keep, position_ids=positions, use_cache=False).logits
        return out[keep.bool()]

    hold(model, ours(model, family), forward)


@KINDS
def test_bf16(family):
    # every token goes to all experts: a token that changes its expert is no rounding error
    all_experts = {"num_experts_per_tok": 4} if "gpt_oss" in family else {}
    model = language_model(family, torch.bfloat16, **all_experts)
    hold_pooled(model, ours(model, family), [plain(tokens(2, 37, seed=n)) for n in range(6)])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("how", ["cu_seq_lens", "position_ids"])
@KINDS
def test_gradient_checkpointing(family, how, reentrant):
    model = language_model(family)
    parts = [tokens(n, seed=n) for n in LENGTHS]
    mine, forward = ours(model, family), packed(parts, how)
    without = logits_and_gradients(mine, forward)
    mine.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with_checkpoints = logits_and_gradients(mine, forward)
    for name, t in without.items():
        assert torch.equal(with_checkpoints[name], t), name


def vision_models():
    sizes = {"hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 3, "initializer_range": 0.2}
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    clip = transformers.CLIPVisionConfig(**sizes, image_size=32, patch_size=8)
    siglip2 = transformers.Siglip2VisionConfig(**sizes, num_patches=16, patch_size=2)
    patches = torch.randn(3, 16, 12, generator=torch.Generator().manual_seed(3))
    grids = torch.tensor([[4, 4], [2, 5], [1, 3]])
    keep = (torch.arange(16) < grids.prod(-1, keepdim=True)).long()
    return {
        "clip": (transformers.CLIPVisionModel, clip, {"pixel_values": pixels}, None),
        "siglip2": (
            transformers.Siglip2VisionModel,
            siglip2,
            {"pixel_values": patches, "spatial_shapes": grids, "pixel_attention_mask": keep},
            keep.bool(),
        ),
    }


@pytest.mark.parametrize("name", ["clip", "siglip2"])
def test_vision_towers_are_bidirectional(name):
    make, config, inputs, keep = vision_models()[name]
    torch.manual_seed(0)
    model = make._from_config(config, attn_implementation="eager").train()

    def forward(m):
        dtype = next(m.parameters()).dtype
        pixels = inputs["pixel_values"].to(dtype)
        out = m(**{**inputs, "pixel_values": pixels})
        states = out.last_hidden_state
        states = states.flatten(0, 1) if keep is None else states[keep]
        return torch.cat([states, out.pooler_output])

    for name, parameter in model.named_parameters():
        # without rotary and sinks the same number added to all scores changes nothing: the
        # gradient is 0 and only its rounding would be compared
        parameter.requires_grad_(not name.endswith("k_proj.bias"))
    hold(model, ours(model), forward, draws=1)


# Generation


@pytest.mark.parametrize("side", [None, "left"])
@KINDS
def test_generate_gives_the_same_tokens(family, side):
    model = language_model(family).eval()
    ids, keep = padded([11, 3, 7], "left") if side else (tokens(2, 5), None)
    options = {"max_new_tokens": 64 + WINDOW, "do_sample": False, "eos_token_id": None}
    expected = model.generate(ids, attention_mask=keep, **options)
    mine = ours(model, family)
    assert torch.equal(mine.generate(ids, attention_mask=keep, **options), expected)
    with torch.inference_mode():
        assert torch.equal(mine.generate(ids, attention_mask=keep, **options), expected)


@KINDS
def test_prefill_in_chunks(family):
    model = language_model(family).eval()
    mine, ids = ours(model, family), tokens(2, 40)
    with torch.no_grad():
        whole = mine(ids).logits
        cache, parts = None, []
        for part in ids.split([13, 20, 6, 1], dim=1):
            out = mine(part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole)


# Properties


class _Largest(TorchDispatchMode):
    """The most elements of any tensor that an operator returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor):
                self.elements = max(self.elements, t.numel())
        return out


@pytest.mark.parametrize("side", [None, "right"])
@FAMILIES
def test_nothing_quadratic(family, side):
    model = language_model(family)
    length = 1024
    ids, keep = padded([length, 1000], side) if side else (tokens(1, length), None)

    def largest(m):
        with _Largest() as seen:
            m(ids, attention_mask=keep, use_cache=False).logits.sum().backward()
        return seen.elements

    assert largest(model) >= length**2
    assert largest(ours(model, family)) < length**2 / 2


def test_no_mask_reaches_attention():
    seen = []

    def spy(module, q, k, v, attention_mask, **kwargs):
        seen.append(attention_mask)
        return integration.attention_forward(module, q, k, v, attention_mask, **kwargs)

    model = ours(language_model("gpt_oss"))
    with mock.patch.dict(transformers.AttentionInterface._global_mapping, medgpt_kernels=spy):
        model(tokens(2, 9))
        assert seen == [None] * 4
        model(tokens(2, 9), attention_mask=torch.ones(2, 9, dtype=torch.long))
        assert seen == [None] * 8
        ids, keep = padded([9, 4], "right")
        model(ids, attention_mask=keep)
    assert all(torch.equal(mask, keep.bool()) for mask in seen[8:])


def test_positions_are_read_once_a_forward():
    model = ours(language_model("gpt_oss", num_hidden_layers=8))
    parts = [tokens(n, seed=n) for n in LENGTHS]
    with mock.patch.object(sequences, "_starts", wraps=sequences._starts) as starts:
        packed(parts, "position_ids")(model)
        assert starts.call_count == 1
        ids, keep = padded(LENGTHS, "left")
        model(ids, attention_mask=keep, use_cache=False)
        assert starts.call_count == 3  # one mask for window layers, one for full layers


def test_positions_written_in_place_are_read_again():
    model = ours(language_model("gpt_oss"))
    ids, positions = tokens(1, 12), torch.arange(12)[None]
    before = model(ids, position_ids=positions, use_cache=False).logits
    positions[:, 6:] = torch.arange(6)
    after = model(ids, position_ids=positions, use_cache=False).logits
    alone = model(ids[:, 6:], use_cache=False).logits
    assert not torch.allclose(before[:, 6:], alone)
    torch.testing.assert_close(after[:, 6:], alone)


def test_positions_written_unseen_are_read_again():
    """Through NumPy, `.data` or a deep copy, of which torch counts no write."""
    model = ours(language_model("llama"))
    ids, counting = tokens(1, 12), torch.arange(12)[None]
    restarting = torch.arange(6).repeat(2)[None]
    expected = model(ids, position_ids=restarting.clone(), use_cache=False).logits

    def after(write):
        positions = torch.from_numpy(counting.clone().numpy())
        model(ids, position_ids=positions, use_cache=False)
        positions = write(positions)
        return model(ids, position_ids=positions, use_cache=False).logits

    def by_numpy(positions):
        positions.numpy()[:] = restarting.numpy()
        return positions

    def by_data(positions):
        positions.data.copy_(restarting)
        return positions

    def in_a_copy(positions):
        return copy.deepcopy(positions).copy_(restarting)

    for write in (by_numpy, by_data, in_a_copy):
        torch.testing.assert_close(after(write), expected)


def test_a_callers_tensor_stays_as_it_was():
    model, positions = ours(language_model("llama")), torch.arange(12)[None]
    model(tokens(1, 12), position_ids=positions, use_cache=False)
    assert not positions.__dict__


@pytest.mark.parametrize("side", [None, "right"])
def test_packed_rows_of_an_encoder(side):
    """Restarting positions part documents whether or not another row has padding."""
    model = ours(language_model("llama"))
    model.config.is_causal = False
    ids, positions = tokens(2, 10), torch.arange(5).repeat(2)[None].expand(2, -1)
    keep = torch.ones(2, 10, dtype=torch.long)
    if side is not None:
        keep[1, 7:] = 0
    found = model(ids, attention_mask=keep, position_ids=positions, use_cache=False).logits[0]
    for part in (slice(0, 5), slice(5, 10)):
        alone = model(ids[:1, part], use_cache=False).logits[0]
        torch.testing.assert_close(found[part], alone)


@pytest.mark.parametrize("family", ["gpt_oss", "gpt_oss patched"])
def test_rows_that_are_packed_and_padded(family):
    model = ours(language_model(family), family)
    a, b, c = (tokens(n, seed=n) for n in (6, 9, 11))
    pad = torch.zeros(4, dtype=torch.long)
    ids = torch.stack([torch.cat([a, b]), torch.cat([pad, c])])
    keep = (ids != 0).long()
    positions = torch.stack(
        [torch.cat([torch.arange(6), torch.arange(9)]), torch.cat([pad, torch.arange(11)])]
    )
    out = model(ids, attention_mask=keep, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(out[keep.bool()], one_by_one([a, b, c])(model))


def test_more_than_one_packed_row():
    model = ours(language_model("gpt_oss"))
    parts = [tokens(n, seed=n) for n in (4, 9, 7, 6)]
    ids = torch.cat(parts).view(2, 13)
    positions = torch.cat([torch.arange(len(p)) for p in parts]).view(2, 13)
    out = model(ids, position_ids=positions, use_cache=False).logits.flatten(0, 1)
    torch.testing.assert_close(out, one_by_one(parts)(model))


@pytest.mark.parametrize("family", ["llama", "gpt_oss", "gpt_oss patched"])
def test_a_decoder_turned_encoder_is_bidirectional(family):
    full = {"layer_types": ["full_attention"] * 4} if "gpt_oss" in family else {}
    model = language_model(family, **full)
    model.config.is_causal = False
    hold(model, ours(model, family), plain(tokens(2, 21)))


@pytest.mark.parametrize("family", ["gpt_oss", "gpt_oss patched"])
def test_is_causal_of_one_call(family):
    model = ours(language_model(family, layer_types=["full_attention"] * 4), family)
    ids = tokens(1, 6)
    causal, both_ways = (model(ids, is_causal=c, use_cache=False).logits for c in (True, False))
    assert torch.equal(causal, model(ids, use_cache=False).logits)
    assert not torch.allclose(causal, both_ways)


@pytest.mark.parametrize("side", [None, "right"])
def test_bidirectional_windows(side):
    sizes = {k: TEXT[k] for k in ("vocab_size", "intermediate_size", "pad_token_id")}
    special = {"cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.ModernBertConfig(
        **sizes,
        **special,
        hidden_size=48,
        num_attention_heads=3,
        num_hidden_layers=4,
        local_attention=2 * WINDOW,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    model = transformers.ModernBertModel._from_config(config, attn_implementation="eager").train()
    ids, keep = padded([30, 12], side) if side else (tokens(2, 30), None)

    def forward(m):
        states = m(ids, attention_mask=keep).last_hidden_state
        return states.flatten(0, 1) if keep is None else states[keep.bool()]

    hold(model, ours(model), forward, draws=1)


def test_implementation_by_config_and_by_from_pretrained(tmp_path):
    model = language_model("gpt_oss")
    model.save_pretrained(tmp_path)
    loaded = transformers.GptOssForCausalLM.from_pretrained(
        tmp_path, attn_implementation="medgpt_kernels"
    )
    made = transformers.GptOssForCausalLM._from_config(
        gpt_oss_config(), attn_implementation="medgpt_kernels"
    )
    assert loaded.config._attn_implementation == made.config._attn_implementation
    ids = tokens(1, 20)
    torch.testing.assert_close(loaded(ids).logits, ours(model)(ids).logits)


@KINDS
def test_full_graph_compile_with_cu_seq_lens(family):
    model = ours(language_model(family), family)
    if "gpt_oss" in family:  # transformers' eager experts loop over what was routed
        model.set_experts_implementation("batched_mm")
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for lengths in (LENGTHS, [9, 2, 31], [3, 3, 8, 1, 14], [40, 11], [2, 7, 19, 4, 5, 6]):
        parts = [tokens(n, seed=n) for n in lengths]
        forward = packed(parts, "cu_seq_lens")
        assert torch.equal(forward(compiled), forward(model))
    assert counter.frame_count <= 2


# patch


def test_patch_reports_and_changes_no_state():
    model = language_model("gpt_oss")
    before = copy.deepcopy(model.state_dict())
    report = integration.patch(model)
    assert report == {
        f"model.layers.{n}.{part}": name
        for n in range(4)
        for part, name in (
            ("self_attn", "FusedGptOssAttention"),
            ("mlp.router", "FusedGptOssRouter"),
            *((f"self_attn.{p}_proj", "FewRowsLinear") for p in "qkvo"),
        )
    } | {"lm_head": "FewRowsLinear"} | {f"model.layers.{n}": "FusedGptOssLayer" for n in range(4)}
    assert integration.patch(model) == {}
    assert integration.patch(model, strict=True) == {}
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    layers = [layer.self_attn for layer in model.model.layers]
    assert len({id(layer.rotary_tables) for layer in layers}) == 1
    assert all(isinstance(layer, gpt_oss.GptOssAttention) for layer in layers)
    model.to(torch.bfloat16)
    assert layers[0].rotary_tables.on(torch.device("cpu"), 1).cos.dtype == torch.float32
    assert model.config._attn_implementation == "medgpt_kernels"


def test_patch_leaves_other_models_alone():
    model = language_model("llama")
    assert integration.patch(model) == {}
    assert model.config._attn_implementation == "eager"
    with pytest.raises(ValueError, match="expected gpt-oss attention"):
        integration.patch(model, strict=True)


def test_patched_model_under_another_implementation():
    model = language_model("gpt_oss")
    mine = ours(model, "patched")
    mine.set_attn_implementation("eager")
    mine.set_experts_implementation("eager")  # behind the fused router
    torch.testing.assert_close(mine(tokens(2, 20)).logits, model(tokens(2, 20)).logits)
    for module in mine.modules():
        if isinstance(module, FusedGptOssRouter):
            module.__class__ = GptOssTopKRouter
    assert torch.equal(mine(tokens(2, 20)).logits, model(tokens(2, 20)).logits)


def test_patched_model_can_be_copied():
    mine = ours(language_model("gpt_oss"), "patched")
    assert torch.equal(copy.deepcopy(mine)(tokens(2, 20)).logits, mine(tokens(2, 20)).logits)


def test_patch_finds_gpt_oss_inside_a_vision_language_model():
    sizes = {"hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 1}
    vision = transformers.CLIPVisionConfig(
        **sizes, num_attention_heads=3, image_size=32, patch_size=8
    )
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=gpt_oss_config(), image_token_index=63
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration._from_config(
        config, attn_implementation="eager"
    ).eval()
    ids = tokens(1, 30).clamp(max=62)
    ids[:, 3:19] = 63
    pixels = torch.randn(1, 3, 32, 32)
    expected = model(input_ids=ids, pixel_values=pixels, use_cache=False).logits
    report = integration.patch(model)
    assert len(report) == 29  # layers, attention, routers, four projections each, and the head
    assert config.get_text_config()._attn_implementation == "medgpt_kernels"
    torch.testing.assert_close(
        model(input_ids=ids, pixel_values=pixels, use_cache=False).logits, expected
    )


# Negative controls: what the checks above must notice


def test_notices_padding_lost_without_a_mask_function():
    model = language_model("gpt_oss")
    ids, keep = padded(LENGTHS, "left")

    def forward(m):
        return m(ids, attention_mask=keep, use_cache=False).logits[keep.bool()]

    hold(model, ours(model), forward)
    masks = transformers.AttentionMaskInterface._global_mapping
    without = {name: f for name, f in masks.items() if name != "medgpt_kernels"}
    with (
        mock.patch.dict(masks, without, clear=True),
        pytest.raises(ToleranceError),
    ):
        hold(model, ours(model), forward)


@pytest.mark.parametrize("family", ["gpt_oss", "gpt_oss patched", "mistral", "gemma3"])
@pytest.mark.parametrize("wrong", [WINDOW - 1, WINDOW + 1, None])
def test_notices_a_wrong_window(family, wrong):
    model = language_model(family)
    attend = integration.attend

    def off(q, k, v, found, causal, sliding_window, *rest, **options):
        sliding_window = wrong if sliding_window else sliding_window
        return attend(q, k, v, found, causal, sliding_window, *rest, **options)

    with mock.patch.object(integration, "attend", off), pytest.raises(ToleranceError):
        hold(model, ours(model, family), plain(tokens(2, 37)))


@pytest.mark.parametrize("family", ["gpt_oss", "gpt_oss patched"])
@pytest.mark.parametrize("lost", ["sinks", "gradient of sinks"])
def test_notices_lost_sinks(family, lost):
    model = language_model(family)
    attend = integration.attend

    def without(q, k, v, found, causal, window, sinks, *rest, **options):
        sinks = None if lost == "sinks" else sinks.detach()
        return attend(q, k, v, found, causal, window, sinks, *rest, **options)

    with (
        mock.patch.object(integration, "attend", without),
        pytest.raises(AssertionError, match="sinks has no gradient"),
    ):
        hold(model, ours(model, family), plain(tokens(2, 37)))
    if lost == "sinks":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.endswith("sinks"))
        with mock.patch.object(integration, "attend", without), pytest.raises(ToleranceError):
            hold(model, ours(model, family), plain(tokens(2, 37)))


@pytest.mark.parametrize("change", [{"truncate": True}, {"attention_factor": 1.0}])
def test_notices_wrong_rotary_tables(change):
    # a longer original context, so that the ramp's ends lie between two frequencies
    rope = {**YARN, "original_max_position_embeddings": 4096}
    model = language_model("gpt_oss", rope_parameters=rope)
    mine = ours(model, "patched")
    wrong = gpt_oss.RotaryTables(gpt_oss_config(rope_parameters={**rope, **change}))
    for layer in mine.model.layers:
        layer.self_attn.rotary_tables = wrong
    with pytest.raises(ToleranceError):
        hold(model, mine, plain(tokens(2, 37)))


def test_notices_documents_that_leak():
    model = language_model("gpt_oss")
    parts = [tokens(n, seed=n) for n in LENGTHS]
    with (
        mock.patch.object(integration, "from_positions", return_value=None),
        pytest.raises(ToleranceError),
    ):
        hold(model, ours(model), one_by_one(parts), packed(parts, "position_ids"))


def test_notices_a_causal_vision_tower():
    make, config, inputs, _ = vision_models()["clip"]
    model = make._from_config(config, attn_implementation="eager")
    mine = ours(model)
    for layer in mine.modules():
        if hasattr(layer, "is_causal"):
            layer.is_causal = True
    with pytest.raises(AssertionError):
        torch.testing.assert_close(
            mine(**inputs).last_hidden_state, model(**inputs).last_hidden_state
        )


# What is refused


def test_softcap_is_refused():
    config = transformers.Gemma2Config(**TEXT, sliding_window=WINDOW, query_pre_attn_scalar=16)
    model = transformers.Gemma2ForCausalLM._from_config(
        config, attn_implementation="medgpt_kernels"
    )
    with pytest.raises(ValueError, match="softcap"):
        model(tokens(1, 9))


@pytest.mark.parametrize("family", ["gpt_oss", "gpt_oss patched"])
def test_dropout_is_refused_in_training_only(family):
    model = ours(language_model(family, attention_dropout=0.1), family)
    with pytest.raises(ValueError, match="dropout"):
        model(tokens(1, 9))
    model.eval()(tokens(1, 9))


@pytest.mark.parametrize("family", ["gpt_oss", "gpt_oss patched"])
@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"output_attentions": True}, "output_attentions"),
        ({"head_mask": torch.ones(8)}, "head_mask"),
        ({"position_bias": torch.ones(1)}, "position_bias"),
        ({"attention_mask": torch.ones(2, 1, 12, 12, dtype=torch.bool)}, "padding mask"),
        ({"position_ids": torch.tensor([[0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13]])}, "gap"),
        (
            {
                "attention_mask": torch.tensor([[1] * 4 + [0] + [1] * 7] * 2),
                "position_ids": torch.tensor([[0, 1, 2, 3, 3, *range(4, 11)]]),
            },
            "padding",
        ),
        (
            {
                "attention_mask": torch.tensor([[0] + [1] * 11] * 2),
                "cu_seq_lens_q": torch.tensor([0, 24], dtype=torch.int32),
            },
            "cu_seq_lens_q",
        ),
        ({"max_length_q": 12}, "cu_seq_lens_q with max_length_q"),
        ({"cu_seq_lens_k": torch.tensor([0, 24], dtype=torch.int32)}, "cu_seq_lens_q with cu_seq"),
    ],
)
def test_what_cannot_be_served_is_refused(family, kwargs, match):
    model = ours(language_model(family), family)
    with pytest.raises(ValueError, match=match):
        model(tokens(2, 12), use_cache=False, **kwargs)


@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("family", ["gpt_oss", "gpt_oss patched", "llama"])
def test_static_cache_is_refused(family, with_mask):
    model = ours(language_model(family), family).eval()
    keep = torch.ones(1, 9, dtype=torch.long) if with_mask else None
    with pytest.raises(ValueError, match="static"):
        model.generate(
            tokens(1, 9), attention_mask=keep, max_new_tokens=4, cache_implementation="static"
        )


@pytest.mark.parametrize("family", ["gpt_oss", "gpt_oss patched"])
def test_window_of_a_decoder_turned_encoder_is_refused(family):
    model = ours(language_model(family), family)
    with pytest.raises(ValueError, match="turned into an encoder"):
        model(tokens(1, 9), is_causal=False)


def test_restart_behind_a_cache_is_refused():
    model = ours(language_model("llama")).eval()
    cache = model(tokens(1, 9), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="restart"):
        model(tokens(1, 4), past_key_values=cache, position_ids=torch.tensor([[9, 10, 0, 1]]))


def test_custom_masks_are_refused():
    from transformers.masking_utils import create_causal_mask, create_chunked_causal_mask

    config = ours(language_model("llama")).config
    x = torch.zeros(1, 20, 48)
    arguments = {
        "config": config,
        "inputs_embeds": x,
        "attention_mask": None,
        "past_key_values": None,
    }
    assert create_causal_mask(**arguments) is None
    with pytest.raises(ValueError, match="mask"):
        create_causal_mask(**arguments, or_mask_function=lambda b, h, q, k: q == k)
    with pytest.raises(ValueError, match="mask"):
        create_causal_mask(**arguments, block_sequence_ids=torch.zeros(1, 20, dtype=torch.long))
    config.attention_chunk_size = 4
    with pytest.raises(ValueError, match="mask"):
        create_chunked_causal_mask(**arguments)


def test_window_that_the_model_keeps_from_attention_is_refused():
    config = transformers.Qwen2MoeConfig(
        **{k: v for k, v in TEXT.items() if k != "head_dim"},
        num_experts=2,
        num_experts_per_tok=1,
        use_sliding_window=True,
        sliding_window=WINDOW,
        max_window_layers=2,
    )
    model = transformers.Qwen2MoeForCausalLM._from_config(
        config, attn_implementation="medgpt_kernels"
    )
    model(tokens(1, WINDOW))
    with pytest.raises(ValueError, match="sliding_window"):
        model(tokens(1, WINDOW + 1))


def test_tables_too_short_are_refused():
    model = ours(language_model("gpt_oss", max_position_embeddings=32), "patched")
    model(tokens(1, 32))
    for use_cache in (False, True):
        with pytest.raises(ValueError, match="max_position_embeddings"):
            model(tokens(1, 33), use_cache=use_cache)
