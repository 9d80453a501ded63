"""LoRA on attention (peft) and on experts, packed or dense (ours): add, save, load, merge, export.

E experts, H hidden, I intermediate, R rank.
"""

import json
import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from medgpt_kernels.integrations import refuse
from medgpt_kernels.integrations.moe import LoraPairs, add_expert_lora
from medgpt_kernels.mxfp4.op import Mxfp4Tensor, mxfp4_quantize

ATTENTION = r".*language_model\..*\.self_attn\.[qkvo]_proj"
WEIGHTS, OPTIONS = "adapters.safetensors", "adapters.json"


def add_adapters(
    model, rank: int, *, alpha: float | None = None, experts: bool = True
) -> list[str]:
    """Freeze the model and give its language model LoRA; B starts at 0, so nothing changes yet.

    Args:
        model: MedGPTForConditionalGeneration; its experts may be packed.
        rank: R.
        alpha: additions are scaled by alpha / R; default 2 R.
        experts: on the experts too, not on attention alone.

    Returns:
        Names of what trains, all of them fp32.
    """
    from peft import LoraConfig, inject_adapter_in_model

    alpha = 2 * rank if alpha is None else alpha
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=ATTENTION), model)
    model.requires_grad_(False)
    model._hf_peft_config_loaded = True  # what Trainer asks of a quantised model
    if experts:
        add_expert_lora(model.model.language_model, rank, alpha=alpha)
    model.adapter_options = {"rank": rank, "alpha": alpha, "experts": experts}
    trained = adapters(model)
    for parameter in trained.values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    return list(trained)


def adapters(model) -> dict[str, torch.nn.Parameter]:
    """All LoRA matrices by name."""
    inside = ("lora_A", "lora_B", "lora")
    return {n: p for n, p in model.named_parameters() if set(inside) & set(n.split("."))}


def save_adapters(model, directory: str | os.PathLike, state_dict: dict | None = None) -> None:
    """adapters.safetensors and adapters.json; state_dict where weights are gathered already."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    found = adapters(model)
    if state_dict:
        found = {name: state_dict[name] for name in found}
    save_file({n: p.detach().cpu().contiguous() for n, p in found.items()}, directory / WEIGHTS)
    (directory / OPTIONS).write_text(json.dumps(model.adapter_options) + "\n")


def load_adapters(model, directory: str | os.PathLike) -> None:
    """Into a model with adapters of the same shapes, or one without any.

    Raises:
        ValueError: no adapters there, others than the model has.
    """
    directory = Path(directory)
    if not (directory / WEIGHTS).is_file() or not (directory / OPTIONS).is_file():
        refuse(f"{WEIGHTS} and {OPTIONS}", f"neither or one in {directory}", "lora")
    options = json.loads((directory / OPTIONS).read_text())
    if not adapters(model):
        add_adapters(model, options["rank"], alpha=options["alpha"], experts=options["experts"])
    stored, own = load_file(directory / WEIGHTS), adapters(model)
    if {n: t.shape for n, t in stored.items()} != {n: p.shape for n, p in own.items()}:
        refuse(f"adapters of {model.adapter_options}", options, "lora")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(stored[name])


def merge(model, *, experts: str = "dense") -> list[dict]:
    """Put the adapters into the weights, in place, and take them off.

    Args:
        experts: "dense": packed experts become transformers' dense ones in the model's dtype, so
            that nothing is lost but that rounding. "packed": they are quantised to MXFP4 again,
            which rounds most small updates away; see what is returned.

    Returns:
        Of each expert weight {"layer", "weight", "error", "error_of_update"}: RMS of what rounding
        changes over that of the merged weight, and over that of the update alone. From 1 on,
        rounding outweighs what was learned.

    Raises:
        ValueError: no adapters, an unknown format, dense experts to be packed.
    """
    if experts not in ("dense", "packed"):
        refuse('experts "dense" or "packed"', repr(experts), "lora")
    if not adapters(model):
        refuse("a model with adapters", "none", "lora")
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            model.set_submodule(name, module.base_layer)
    report = []
    layers = [(n, m) for n, m in model.named_modules() if _is_experts(m)]
    for name, module in layers:
        report += _merge_experts(model, name, module, experts)
    model._hf_peft_config_loaded = False
    for attribute in ("peft_config", "adapter_options"):
        if hasattr(model, attribute):
            delattr(model, attribute)
    if experts == "dense" and getattr(model, "hf_quantizer", None) is not None:
        model.hf_quantizer, model.is_quantized = None, False
        del model.config.quantization_config
    return report


def _is_experts(module) -> bool:
    return hasattr(module, "gate_up_proj") and hasattr(module, "down_proj")


def _merge_experts(model, name: str, module, experts: str) -> list[dict]:
    pairs, report, merged = getattr(module, "lora", None), [], {}
    packed = isinstance(module.gate_up_proj, Mxfp4Tensor)
    if experts == "packed" and not packed:
        refuse("packed experts, or experts='dense'", "dense ones", "lora")
    for weight in ("gate_up", "down"):
        own = getattr(module, f"{weight}_proj")
        # [E, out, in]; transformers' dense ones are [E, in, out]
        dense = own.dequantize(torch.float32) if packed else own.detach().float().mT
        update = torch.zeros(())
        if isinstance(pairs, LoraPairs):
            a, b = (getattr(pairs, f"{weight}_{x}").detach().float() for x in "ab")
            update = pairs.scaling * (b @ a)
        merged[weight] = dense + update
        dtype = model.dtype
        stored = mxfp4_quantize(merged[weight]) if experts == "packed" else None
        read = stored.dequantize(torch.float32) if stored else merged[weight].to(dtype).float()
        report.append({"layer": name, "weight": weight} | _errors(read, merged[weight], update))
        merged[weight] = stored if stored else merged[weight].to(dtype).mT.contiguous()
    if isinstance(pairs, LoraPairs):
        del module.lora
    if experts == "packed":
        for weight, stored in merged.items():
            getattr(module, f"{weight}_proj_blocks").data = stored.blocks
            getattr(module, f"{weight}_proj_scales").data = stored.scales
    elif packed:
        model.set_submodule(name, _dense_experts(model, module, merged))
    else:
        for weight, value in merged.items():
            getattr(module, f"{weight}_proj").data = value
    return report


def _errors(read, merged, update) -> dict[str, float]:
    error = (read - merged).square().mean().sqrt()
    moved = update.square().mean().sqrt()
    return {
        "error": float(error / merged.square().mean().sqrt()),
        "error_of_update": float(error / moved) if moved > 0 else float("inf"),
    }


def _dense_experts(model, packed, merged: dict):
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    with torch.device("meta"):
        dense = GptOssExperts(model.config.text_config)
    for weight, value in merged.items():
        parameter = torch.nn.Parameter(value)
        setattr(dense, f"{weight}_proj", parameter)
        setattr(dense, f"{weight}_proj_bias", getattr(packed, f"{weight}_proj_bias"))
    return dense


def export(
    directory: str | os.PathLike,
    adapters_dir: str | os.PathLike,
    out_dir: str | os.PathLike,
    *,
    experts: str = "dense",
    dtype: torch.dtype = torch.bfloat16,
) -> list[dict]:
    """A checkpoint of `directory` with the adapters merged in; merge's report, also written there.

    The whole model is held in memory: 42 GB for gpt-oss-20b with dense experts, 14 GB packed.

    Raises:
        ValueError: an out_dir that holds something; see merge and load_adapters.
    """
    from medgpt.checkpoint import load

    out = Path(out_dir)
    if out.exists() and any(out.iterdir()):
        refuse("an out_dir that is empty or not there", out_dir, "lora")
    model, processor = load(directory, dtype=dtype)
    load_adapters(model, adapters_dir)
    report = merge(model, experts=experts)
    model.save_pretrained(out)
    processor.save_pretrained(out)
    (out / "merge.json").write_text(json.dumps(report, indent=1) + "\n")
    return report
