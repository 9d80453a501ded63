"""Experts, router and packed checkpoints inside transformers models, against eager."""

import copy
import json

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from test_transformers import EAGER, TEXT, hold, language_model, plain, tokens

from medgpt_kernels import mxfp4_quantize
from medgpt_kernels.experts import reference as experts_reference
from medgpt_kernels.integrations import moe
from medgpt_kernels.integrations import transformers as integration
from medgpt_kernels.integrations.moe import FusedGptOssRouter
from medgpt_kernels.testing import ToleranceError

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


def test_patched_gpt_oss_with_auxiliary_loss():
    """Router logits are recorded through the patched class, and their loss reaches the router."""
    model = language_model("gpt_oss")
    mine = copy.deepcopy(model)
    replaced = integration.patch(mine, strict=True)
    assert sorted(set(replaced.values())) == ["FusedGptOssAttention", "FusedGptOssRouter"]
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


def write_checkpoint(directory, model):
    """A tiny gpt-oss in exactly the names and layouts of the published checkpoint."""
    state, packed = model.state_dict(), {}
    for name, value in state.items():
        value = value.to(torch.bfloat16)
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
    truth = dequantised(eager, packed)
    found, expected = (m.eval()(tokens(2, 19)).logits for m in (model, truth))
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=2e-4)

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


def test_other_quantisations_are_refused(tmp_path):
    language_model("gpt_oss", **PACKABLE).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="quant_method mxfp4, got None"):
        integration.load_mxfp4(tmp_path)


def test_lora_on_packed_experts_trains_as_on_dense_ones(tmp_path):
    """Same seeds, same data: the curve on packed weights is that on dequantised dense ones."""
    eager = language_model("gpt_oss", **PACKABLE)
    packed_state = write_checkpoint(tmp_path / "published", eager)
    packed = integration.load_mxfp4(tmp_path / "published", dtype=torch.float32).train()
    dense = with_our_experts(dequantised(eager, packed_state))
    integration.patch(dense)
    curves = []
    for model in (packed, dense):
        torch.manual_seed(0)
        model.requires_grad_(False)
        parameters = integration.add_expert_lora(model, 4, alpha=8)
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        curve = []
        for step in range(30):
            ids = tokens(2, 33, seed=step % 3)
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        curves.append(torch.tensor(curve))
        assert curve[-1] < 0.97 * curve[0]
    torch.testing.assert_close(*curves, rtol=2e-3, atol=0)
