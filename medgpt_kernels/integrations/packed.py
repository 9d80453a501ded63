"""Packed gpt-oss checkpoints in transformers: MXFP4 experts stay MXFP4 from file to kernel.

E experts, H hidden, I intermediate.
"""

import functools
import os
from pathlib import Path

import torch
import transformers
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from medgpt_kernels import huge_pages
from medgpt_kernels.integrations import refuse
from medgpt_kernels.integrations.headers import read_headers
from medgpt_kernels.integrations.moe import experts_forward
from medgpt_kernels.mxfp4.op import BLOCK, Mxfp4Tensor

METHOD = "medgpt_kernels_mxfp4"
_fail = functools.partial(refuse, op="load_mxfp4")


class PackedExperts(torch.nn.Module):
    """gpt-oss's experts with the names, shapes and bytes of the published checkpoint.

    blocks and scales are frozen; biases train. `gate_up_proj` and `down_proj` are Mxfp4Tensors.
    """

    is_concatenated, is_transposed, has_bias, has_gate = False, False, True, True
    _apply_gate = GptOssExperts._apply_gate

    def __init__(self, dense: GptOssExperts):
        super().__init__()
        self.num_experts, self.alpha, self.limit = dense.num_experts, dense.alpha, dense.limit
        _, inner, hidden = dense.down_proj.shape
        dtype = dense.down_proj.dtype
        for name, rows, columns in (
            ("gate_up_proj", 2 * inner, hidden),
            ("down_proj", hidden, inner),
        ):
            if columns % BLOCK:
                raise ValueError(f"medgpt_kernels: expected sizes in {BLOCK}s, got {columns}")
            shape = self.num_experts, rows, columns // BLOCK
            parts = {
                "blocks": huge_pages.empty(*shape, 16, dtype=torch.uint8).zero_(),
                "scales": huge_pages.empty(*shape, dtype=torch.uint8).zero_(),
                "bias": torch.zeros(self.num_experts, rows, dtype=dtype),
            }
            for part, value in parts.items():
                parameter = torch.nn.Parameter(value, requires_grad=part == "bias")
                self.register_parameter(f"{name}_{part}", parameter)

    @property
    def gate_up_proj(self) -> Mxfp4Tensor:
        return Mxfp4Tensor(self.gate_up_proj_blocks, self.gate_up_proj_scales)

    @property
    def down_proj(self) -> Mxfp4Tensor:
        return Mxfp4Tensor(self.down_proj_blocks, self.down_proj_scales)

    def forward(self, hidden_states, router_indices=None, routing_weights=None):
        return experts_forward(self, hidden_states, router_indices, routing_weights)


class PackedConfig(QuantizationConfigMixin):
    """Carries the checkpoint's own quantization_config, which is what is saved again."""

    def __init__(self, published: dict | None = None, **kwargs):
        self.quant_method = METHOD
        self.published = dict(published or {"quant_method": "mxfp4"})

    def to_dict(self) -> dict:
        return dict(self.published)


class PackedQuantizer(HfQuantizer):
    """Puts PackedExperts where gpt-oss has its experts, before the weights are read."""

    requires_calibration = False

    def _process_model_before_weight_loading(self, model, **kwargs):
        pack_experts(model)
        return model

    def is_serializable(self, *args, **kwargs) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def pack_experts(model: torch.nn.Module) -> None:
    """Empty PackedExperts where gpt-oss has its dense ones, on the same device."""
    for name, module in list(model.named_modules()):
        if isinstance(module, GptOssExperts):
            with torch.device(module.down_proj.device):
                model.set_submodule(name, PackedExperts(module))


def register_packed() -> None:
    """Make the quantizer known to transformers; again is harmless."""
    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(PackedConfig)
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(METHOD)(PackedQuantizer)


def load_mxfp4(directory: str | os.PathLike, *, dtype: torch.dtype = torch.bfloat16, **options):
    """See integrations.transformers.load_mxfp4."""
    register_packed()
    directory = Path(directory)
    if not (directory / "config.json").is_file():
        _fail("a directory with config.json", directory)
    config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
    text = config.get_text_config()
    published = getattr(config, "quantization_config", None)
    if published is None:
        published = getattr(text, "quantization_config", None)
    if not isinstance(published, dict) or published.get("quant_method") != "mxfp4":
        _fail("a checkpoint of quant_method mxfp4", f"{published} in {directory}")
    if text.model_type != "gpt_oss":
        _fail("gpt_oss as the model or its text part", text.model_type)
    model_class = _architecture((config.architectures or ["GptOssForCausalLM"])[0], config)
    _check_tensors(directory, text)
    config.quantization_config = PackedConfig(published).__dict__
    model, report = model_class.from_pretrained(
        directory,
        config=config,
        dtype=dtype,
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
        **options,
    )
    absent = sorted(report["missing_keys"]) + sorted(report["mismatched_keys"])
    if absent:  # transformers would leave them at random
        _fail(
            f"every weight of {model_class.__name__} in {directory}",
            f"{len(absent)} without, as {absent[0]}",
        )
    for parameter in model.parameters():  # transformers 5.17 keeps the files' dtype under new names
        if parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        if isinstance(module, (PackedExperts, torch.nn.Linear)):
            huge_pages.move(module)
    return model


def _architecture(name: str, config):
    """transformers' class of this name, or the one registered with its Auto classes."""
    autos = (transformers.AutoModelForImageTextToText, transformers.AutoModelForCausalLM)
    registered = [auto._model_mapping.get(type(config), None) for auto in autos]
    for found in (getattr(transformers, name, None), *registered):
        if getattr(found, "__name__", None) == name and isinstance(
            config, getattr(found, "config_class", None) or ()
        ):
            return found
    _fail(f"an architecture of transformers with {type(config).__name__}", name)


def _check_tensors(directory: Path, text) -> None:
    """What the files' headers say: each tensor once, experts' bytes as uint8 in their shapes."""
    experts, hidden, inner = text.num_local_experts, text.hidden_size, text.intermediate_size
    shapes = {}
    for name, rows, columns in (("gate_up", 2 * inner, hidden), ("down", hidden, inner)):
        scales = (experts, rows, columns // BLOCK)
        shapes |= {f"{name}_proj_scales": scales, f"{name}_proj_blocks": (*scales, BLOCK // 2)}
    for name, (_, dtype, shape) in read_headers(directory, "load_mxfp4").items():
        wanted = shapes.get(name.rpartition(".")[2])
        if wanted is not None and (dtype, shape) != ("U8", wanted):
            _fail(f"{name} as U8 {list(wanted)}", f"{dtype} {list(shape)}")
