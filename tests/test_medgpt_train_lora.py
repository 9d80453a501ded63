"""LoRA on packed MXFP4: what trains, resume, merging and what packing again costs."""

import pytest
import torch
from test_medgpt_train import Stopped, stop_at, trainer
from train_packs import SyntheticPacks, tiny

from medgpt import MedGPTForConditionalGeneration
from medgpt_kernels.integrations.packed import PackedExperts
from medgpt_kernels.mxfp4.op import Mxfp4Tensor, mxfp4_quantize

pytest.importorskip("peft", reason="pip install peft")

from medgpt.train import lora


def packed(seed: int = 0) -> MedGPTForConditionalGeneration:
    """The tiny model, its experts in MXFP4 and the quantizer that Trainer asks for."""
    from medgpt_kernels.integrations.packed import PackedConfig, PackedQuantizer

    model = tiny(seed)
    for name, module in list(model.named_modules()):
        if type(module).__name__ == "GptOssExperts":
            experts = PackedExperts(module)
            for weight in ("gate_up_proj", "down_proj"):
                stored = mxfp4_quantize(getattr(module, weight).detach().mT.contiguous())
                getattr(experts, f"{weight}_blocks").data = stored.blocks
                getattr(experts, f"{weight}_scales").data = stored.scales
                bias = getattr(module, f"{weight}_bias")
                getattr(experts, f"{weight}_bias").data = bias.detach().clone()
            model.set_submodule(name, experts)
    model.hf_quantizer, model.is_quantized = PackedQuantizer(PackedConfig()), True
    model.config.quantization_config = PackedConfig()
    return model


def logits(model) -> torch.Tensor:
    pack = SyntheticPacks(3)[1]
    pack = {n: v for n, v in pack.items() if n not in ("labels", "loss_weights")}
    with torch.no_grad():
        return model.eval()(**pack).logits


def trained(out, **options):
    model = packed()
    lora.add_adapters(model, 4)
    run = trainer(out, 3, model=model, packs=SyntheticPacks(20), **options)
    return model, run


def test_adapters_start_at_nothing_and_train_alone(tmp_path):
    plain = logits(packed())
    model, run = trained(tmp_path)
    assert torch.equal(logits(model), plain)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    run.train()
    names = set(lora.adapters(model))
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == names
    assert sum("self_attn" in n for n in names) == 2 * 4 * 2
    assert sum("experts" in n for n in names) == 2 * 4
    assert isinstance(model.model.language_model.layers[0].mlp.experts.gate_up_proj, Mxfp4Tensor)


def test_adapters_resume_bitwise(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3}
    whole, run = trained(tmp_path / "whole", **options)
    run.train()
    _, run = trained(tmp_path / "cut", **options)
    run.add_callback(stop_at(5))
    with pytest.raises(Stopped):
        run.train()
    again, run = trained(tmp_path / "cut", **options)
    run.train()
    expected = lora.adapters(whole)
    assert all(torch.equal(p, expected[n]) for n, p in lora.adapters(again).items())
    with pytest.raises(ValueError, match="adapters"):
        lora.load_adapters(again, tmp_path / "nothing")


@pytest.mark.parametrize("experts", ["dense", "packed"])
def test_merging_keeps_what_was_learned(experts, tmp_path):
    model, run = trained(tmp_path)
    plain = logits(packed())
    run.train()
    with torch.no_grad():  # as after a long run: updates that packing can see
        for name, parameter in lora.adapters(model).items():
            if name.endswith(("lora_B.default.weight", "_b")):
                parameter.mul_(40)
    learned = logits(model)
    lora.save_adapters(model, tmp_path / "adapters")
    report = lora.merge(model, experts=experts)
    assert not lora.adapters(model)
    assert len(report) == 2 * 2
    merged = logits(model)
    distance = (merged - learned).norm() / (learned - plain).norm()
    if experts == "dense":
        assert distance < 1e-4
        assert all(r["error"] == 0 for r in report)  # fp32 here
        model.save_pretrained(tmp_path / "merged")
        again = MedGPTForConditionalGeneration.from_pretrained(tmp_path / "merged")
        assert torch.equal(logits(again), merged)
    else:
        assert 1e-3 < distance < 1
        assert all(0.05 < r["error"] < 0.2 for r in report)  # MXFP4's own
        assert all(r["error_of_update"] > r["error"] for r in report)
    other = packed()
    lora.load_adapters(other, tmp_path / "adapters")
    assert torch.equal(logits(other), learned)


def test_bad_merges():
    with pytest.raises(ValueError, match="with adapters"):
        lora.merge(packed())
    model = tiny()
    lora.add_adapters(model, 2)
    with pytest.raises(ValueError, match="dense ones"):
        lora.merge(model, experts="packed")
    with pytest.raises(ValueError, match='"dense" or "packed"'):
        lora.merge(model, experts="int4")
