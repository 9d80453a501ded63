"""Composed and converted checkpoints against the parts they come from."""

import copy
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import transformers
from medgpt_parts import (
    IMAGE_IDS,
    byte_tokenizer,
    clip,
    gpt_oss,
    one_thread,  # noqa: F401
    publish,
    siglip2,
)
from safetensors.torch import load_file, save_file
from test_transformers import tokens
from test_transformers_moe import dequantised, hold_logits, tensors_in

from medgpt import checkpoint, internvl, shards
from medgpt.config import MedGPTVisionConfig
from medgpt_kernels import huge_pages, pack_images
from medgpt_kernels.integrations.packed import PackedExperts
from medgpt_kernels.mxfp4.op import Mxfp4Tensor
from medgpt_kernels.testing import ToleranceError, assert_close

QUIET = {"progress": False, **IMAGE_IDS}
VISION = {"clip": clip, "clip vision": lambda: clip(whole=False), "siglip2": siglip2}


def rename_tensors(directory, change):
    for file in directory.glob("*.safetensors"):
        state = {change(name): tensor for name, tensor in load_file(file).items()}
        save_file(state, file, metadata={"format": "pt"})
    if (index := directory / "model.safetensors.index.json").is_file():
        read = json.loads(index.read_text())
        read["weight_map"] = {change(n): f for n, f in read["weight_map"].items()}
        index.write_text(json.dumps(read))


@pytest.fixture
def parts(tmp_path):
    """A published gpt-oss and a CLIP in tmp_path; (eager gpt-oss, its packed tensors, CLIP)."""
    eager, vision = gpt_oss(), clip()
    packed = publish(tmp_path / "gpt-oss", eager)
    vision.save_pretrained(tmp_path / "clip")
    return eager, packed, vision


def compose(tmp_path, vision="clip", **options):
    out = tmp_path / options.pop("out", "medgpt")
    return checkpoint.compose(tmp_path / "gpt-oss", tmp_path / vision, out, **QUIET | options)


def load(directory, dtype=torch.float32):
    return checkpoint.load(directory, dtype=dtype)[0]


def images() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(256, (56, 56, 3), generator=generator, dtype=torch.uint8) for _ in range(2)
    ]


def hold_tower(model, vision, mean=(0.5,) * 3, std=(0.5,) * 3) -> None:
    """Features of two images by the tolerance rule, against transformers' own tower."""
    tower = getattr(vision, "vision_model", vision)
    pixels = torch.stack(images()).permute(0, 3, 1, 2) / 255.0
    pixels = (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]

    def forward(tower, pixels):
        if "Siglip2" not in type(tower).__name__:
            return tower(pixels).last_hidden_state.flatten(0, 1)
        patches = pixels.unfold(2, 14, 14).unfold(3, 14, 14)  # [N, 3, 4, 4, 14, 14]
        patches = patches.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
        mask = torch.ones(len(pixels), 16, dtype=torch.long)
        grids = torch.tensor([[4, 4]] * len(pixels))
        return tower(patches, mask, grids).last_hidden_state.flatten(0, 1)

    with torch.no_grad():
        truth = forward(copy.deepcopy(tower).double(), pixels.double())
        expected = forward(tower, pixels)
        found = model.model.vision_tower(pack_images(images()), mean=mean, std=std).tokens
    assert_close(found, expected, truth, name="features")


def as_saved(model):
    """The model with its weights rounded to bf16, as they are in a file of ours."""
    return copy.deepcopy(model).bfloat16().float()


def text_logits(model) -> torch.Tensor:
    return model(tokens(2, 19), use_cache=False).logits


def hold_part(part: str, model, vision, dense) -> None:
    if part == "vision":
        hold_tower(model, vision)
    else:
        hold_logits(model, dense, text_logits)


# Composing


@pytest.mark.parametrize("kind", list(VISION))
def test_composed_model_is_its_parts(tmp_path, parts, kind):
    eager, packed, _ = parts
    vision = VISION[kind]()
    vision.save_pretrained(tmp_path / "vision")
    model = load(compose(tmp_path, "vision"))
    experts = [m for m in model.modules() if isinstance(m, PackedExperts)]
    assert len(experts) == eager.config.num_hidden_layers
    state = model.state_dict()
    for name, value in packed.items():
        own = f"model.language_{name}" if name.startswith("model.") else name
        assert torch.equal(state[own], value.to(state[own].dtype)), own
    hold_tower(model, as_saved(vision))
    hold_logits(model, dequantised(eager, packed).eval(), text_logits)
    source = tmp_path / "gpt-oss" / "tokenizer.json"
    assert (tmp_path / "medgpt" / "tokenizer.json").read_bytes() == source.read_bytes()
    config = model.config
    assert config.vision_mode == ("native" if kind == "siglip2" else "tiles")
    assert (config.image_mean[0] == 0.5) == (kind == "siglip2")
    assert config.text_config.rope_parameters["truncate"] is False


@pytest.mark.parametrize("swap", ["q_proj k_proj", "layer_norm1 layer_norm2", "layers.0 layers.1"])
@pytest.mark.parametrize("part", ["vision", "language"])
def test_notices_swapped_names(tmp_path, parts, part, swap):
    eager, packed, vision = parts
    if part == "language":
        swap = {"layer_norm1 layer_norm2": "input_layernorm post_attention_layernorm"}.get(
            swap, "k_proj v_proj" if "proj" in swap else swap
        )
    a, b = swap.split()

    def swapped(name):
        return name.replace(a, "\0").replace(b, a).replace("\0", b)

    norms = (torch.nn.LayerNorm, *{type(m) for m in eager.modules() if "Norm" in str(type(m))})
    if "norm" in swap:  # new ones are all alike
        for module in (*vision.modules(), *eager.modules()):
            if isinstance(module, norms):
                torch.nn.init.normal_(module.weight, mean=1.0)
        vision.save_pretrained(tmp_path / "clip")
        packed = publish(tmp_path / "gpt-oss 2", eager)
        (tmp_path / "gpt-oss").rename(tmp_path / "old")
        (tmp_path / "gpt-oss 2").rename(tmp_path / "gpt-oss")
    rename_tensors(tmp_path / ("clip" if part == "vision" else "gpt-oss"), swapped)
    model = load(compose(tmp_path))
    dense = dequantised(eager, packed).eval()
    with pytest.raises(ToleranceError):
        hold_part(part, model, as_saved(vision), dense)


@pytest.mark.parametrize("prefix", ["", "vision_model.", "vision_model.vision_model."])
def test_prefixes_of_the_vision_tower(tmp_path, parts, prefix):
    vision = clip(whole=False)
    vision.save_pretrained(tmp_path / "vision")
    rename_tensors(tmp_path / "vision", lambda n: prefix + n.removeprefix("vision_model."))
    hold_tower(load(compose(tmp_path, "vision")), as_saved(vision))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dense_experts_are_the_packed_ones(tmp_path, parts, dtype):
    eager, packed, _ = parts
    out = compose(tmp_path, experts="dense", dtype=dtype, max_shard_size="60KB")
    assert len(list(out.glob("*.safetensors"))) > 3
    state = tensors_in(out)
    for name, value in dequantised(eager, packed).state_dict().items():
        own = f"model.language_{name}" if name.startswith("model.") else name
        assert state[own].dtype == dtype
        assert torch.equal(state[own], value.to(dtype)), own
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    hold_logits(load(out), dequantised(eager, packed).eval(), text_logits)


def test_dense_language_model_stays_or_is_packed(tmp_path, parts):
    """Packing what was unpacked gives the same values."""
    eager, packed, _ = parts
    dense = dequantised(eager, packed).bfloat16()
    dense.save_pretrained(tmp_path / "dense")
    byte_tokenizer().save_pretrained(tmp_path / "dense")
    both = [tmp_path / "dense", tmp_path / "clip"]
    as_is = checkpoint.compose(*both, tmp_path / "a", **QUIET)
    assert not any(n.endswith("_blocks") for n in tensors_in(as_is))
    again = checkpoint.compose(*both, tmp_path / "b", experts="packed", **QUIET)
    state = tensors_in(again)
    for name, blocks in packed.items():
        if name.endswith("_blocks"):
            own = f"model.language_{name.removesuffix('_blocks')}"
            found = Mxfp4Tensor(state[f"{own}_blocks"], state[f"{own}_scales"]).dequantize()
            scales = packed[name.replace("_blocks", "_scales")]
            assert torch.equal(found, Mxfp4Tensor(blocks, scales).dequantize()), own
    hold_logits(load(again), dequantised(eager, packed).eval(), text_logits)


def test_projector_is_new_and_seeded(tmp_path, parts):
    wide = {"downsample_ratio": 1.0, "projector_hidden_size": 256, "dtype": torch.float32}
    found = [
        tensors_in(compose(tmp_path, out=out, seed=seed, **wide))
        for out, seed in (("a", 5), ("b", 5), ("c", 6))
    ]
    prefix = "model.multi_modal_projector."
    a, b, c = ({n: t for n, t in f.items() if n.startswith(prefix)} for f in found)
    assert {n.removeprefix(prefix): list(t.shape) for n, t in a.items()} == {
        "layer_norm.weight": [64],
        "layer_norm.bias": [64],
        "linear_1.weight": [256, 64],
        "linear_1.bias": [256],
        "linear_2.weight": [64, 256],
        "linear_2.bias": [64],
    }
    for name, value in a.items():
        assert torch.equal(value, b[name])
        if name.endswith("bias"):
            assert not value.any()
        elif "norm" in name:
            assert (value == 1).all()
        else:
            assert not torch.equal(value, c[name])
            assert value.std().item() == pytest.approx(0.02, rel=0.05)
            assert value.mean().abs().item() < 0.001
    assert tensors_in(compose(tmp_path, out="x"))[f"{prefix}linear_1.weight"].shape == (64, 256)


def test_loaded_and_saved_again_is_the_same(tmp_path, parts):
    out = compose(tmp_path)
    model = load(out, torch.bfloat16)
    model.save_pretrained(tmp_path / "again")
    first, again = tensors_in(out), tensors_in(tmp_path / "again")
    assert first.keys() == again.keys()
    assert all(torch.equal(first[n].view(torch.uint8), again[n].view(torch.uint8)) for n in first)
    configs = [json.loads((d / "config.json").read_text()) for d in (out, tmp_path / "again")]
    assert configs[0] == configs[1]
    assert configs[0]["quantization_config"]["quant_method"] == "mxfp4"
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [258, 264, 257]  # return, call, endoftext
    assert generation["pad_token_id"] == 257
    named = {"peft_type": "LORA", "base_model_name_or_path": "another/model"}
    (out / "adapter_config.json").write_text(json.dumps(named))
    with pytest.raises(
        ValueError, match=r"expected a whole checkpoint .*, got adapter_config.json"
    ):
        load(out)


def test_packed_weights_lie_in_huge_pages(tmp_path, parts, monkeypatch):
    out = compose(tmp_path)
    expected = text_logits(load(out))
    monkeypatch.setattr(huge_pages, "LEAST", 1)
    model = load(out)
    held = [m for m in model.modules() if isinstance(m, PackedExperts)]
    assert held
    for tensor in (x for m in held for x in (*m.gate_up_proj, *m.down_proj)):
        assert tensor.data_ptr() % huge_pages.PAGE == 0
    assert torch.equal(text_logits(model), expected)


def test_published_config_survives(tmp_path, parts):
    """gpt-oss's own config.json has rope_scaling and rope_theta, not rope_parameters."""
    file = tmp_path / "gpt-oss" / "config.json"
    config = json.loads(file.read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    config["router_aux_loss_coef"] = 0.9
    file.write_text(json.dumps(config))
    text = load(compose(tmp_path)).config.text_config
    assert text.rope_parameters["truncate"] is False
    assert text.rope_parameters["rope_theta"] == 150000.0
    assert text.rope_parameters["factor"] == 32.0
    assert text.router_aux_loss_coef == 0.9


def test_shards_hold_all_in_whole_files(tmp_path):
    generator = torch.Generator().manual_seed(0)
    made = {
        f"layers.{n}.w": torch.randn(n + 1, 7, generator=generator).to(dtype)
        for n, dtype in enumerate([torch.float32, torch.bfloat16, torch.float16] * 4)
    }
    made |= {"odd": torch.arange(3, dtype=torch.uint8), "scalar": torch.tensor(2.5)}
    made |= {"empty": torch.zeros(0, 4), "long": torch.arange(2)}
    planned = {
        n: shards.Planned(t.dtype, tuple(t.shape), lambda t=t: t.split(2) if t.ndim else [t])
        for n, t in made.items()
    }
    shards.write_shards(tmp_path, planned, 200, False)
    files = sorted(tmp_path.glob("*.safetensors"))
    sizes = [f.stat().st_size for f in files]
    assert len(files) > 2
    found = tensors_in(tmp_path)
    assert found.keys() == made.keys()
    for name, value in made.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in made.values())
    assert all((tmp_path / f).is_file() for f in index["weight_map"].values())
    assert max(sizes) < 200 + 2000
    layers = [f for n, f in index["weight_map"].items() if n.startswith("layers")]
    assert len(layers) == 12
    order = [index["weight_map"][f"layers.{n}.w"] for n in range(12)]
    assert order == sorted(order)  # layer 10 behind layer 9


@pytest.mark.parametrize("size", [123, "123", "5KB", "4GB", "4 gb", "2T"])
def test_sizes(size):
    wanted = {123: 123, "123": 123, "5KB": 5000, "2T": 2 * 10**12}
    assert shards.size_of(size) == wanted.get(size, 4 * 10**9)


@pytest.mark.parametrize("size", ["", "GB", "-1", "1.5GB", 0, "4GiB"])
def test_sizes_that_are_none(size):
    with pytest.raises(ValueError, match="max_shard_size: expected a size as 4GB"):
        shards.size_of(size)


# Memory: a layer of gpt-oss-20b's width at a time

MEMORY = """
import sys
import torch
from medgpt import checkpoint
out, experts = sys.argv[3:5]
torch.set_num_threads(1)
ids = {"image_token_id": 9, "image_start_token_id": 8, "image_end_token_id": 7}
checkpoint.compose(sys.argv[1], sys.argv[2], out, experts=experts, progress=False, **ids)
for line in open("/proc/self/status"):
    if line.startswith("VmHWM"):
        print(int(line.split()[1]) * 1024)  # kB
"""


def sparse_gpt_oss(directory, layers: int, experts: int, vocabulary: int) -> None:
    """gpt-oss-20b's tensors in its names and shapes, a shard a layer; bytes are all zero."""
    text = transformers.GptOssConfig(num_hidden_layers=layers, vocab_size=vocabulary)
    config = text.to_dict() | {
        "num_local_experts": experts,
        "architectures": ["GptOssForCausalLM"],
        "quantization_config": checkpoint.MXFP4,
    }
    with torch.device("meta"):
        model = transformers.GptOssForCausalLM(transformers.GptOssConfig(**config))
    shapes = {}
    for name, tensor in model.state_dict().items():
        shape = list(tensor.shape)
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            packed = [shape[0], shape[2], shape[1] // 32]
            shapes |= {f"{name}_blocks": ("U8", [*packed, 16]), f"{name}_scales": ("U8", packed)}
        else:
            shapes[name] = ("BF16", shape)
    directory.mkdir(exist_ok=True)
    placed = {}
    for n in range(-1, layers):
        file = f"model-{n + 2:05}-of-{layers + 1:05}.safetensors"
        names = [s for s in shapes if (s.split(".")[2] == str(n) if "layers" in s else n == -1)]
        header, end = {}, 0
        for name in names:
            dtype, shape = shapes[name]
            size = torch.Size(shape).numel() * (2 if dtype == "BF16" else 1)
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
            end += size
        text = json.dumps(header).encode()
        with (directory / file).open("wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            out.truncate(8 + len(text) + end)
        placed |= dict.fromkeys(names, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    (directory / "config.json").write_text(json.dumps(config))


def peak_of(*arguments) -> int:
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, *map(str, arguments)], capture_output=True, text=True,
        check=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return int(done.stdout.split()[-1])


def memory_of(tmp_path, kind: str, layers: int, experts: int, vocabulary: int) -> int:
    source = tmp_path / f"gpt-oss {layers} {experts}"
    sparse_gpt_oss(source, layers, experts, vocabulary)
    byte_tokenizer().save_pretrained(source)
    peak = peak_of(source, tmp_path / "clip", tmp_path / "out", kind)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["text_config"]["num_hidden_layers"] == layers
    shutil.rmtree(tmp_path / "out")
    return peak


def test_memory_does_not_grow_with_depth(tmp_path):
    """Layers of gpt-oss-20b's width, with a quarter of its experts: 0.13 GB each."""
    clip().save_pretrained(tmp_path / "clip")
    one, four = (memory_of(tmp_path, "packed", n, 8, 1000) for n in (1, 4))
    assert four < one + 60e6
    assert four < 2e9


@pytest.mark.slow
def test_memory_of_the_20b_shape(tmp_path, capsys):
    """All of it packed (14 GB written), and layers of 1.6 GB each unpacked."""
    clip().save_pretrained(tmp_path / "clip")
    whole = memory_of(tmp_path, "packed", 24, 32, 201_088)
    one, three = (memory_of(tmp_path, "dense", n, 32, 1000) for n in (1, 3))
    with capsys.disabled():
        print(f"VmHWM: 24 layers {whole / 1e9:.2f} GB; dense {one / 1e9:.2f}, {three / 1e9:.2f} GB")
    assert whole < 4e9
    assert three < one + 100e6


# InternVL's names


@pytest.fixture
def released(tmp_path):
    """A directory as InternVL writes it, made of real modules; (gpt-oss, CLIP, mlp1)."""
    text, vision = gpt_oss().eval(), clip(whole=False)
    torch.manual_seed(2)
    mlp1 = torch.nn.Sequential(
        torch.nn.LayerNorm(256), torch.nn.Linear(256, 64), torch.nn.GELU(), torch.nn.Linear(64, 64)
    )
    torch.nn.init.normal_(mlp1[0].weight)
    modules = {"vision_model": vision, "mlp1": mlp1, "language_model": text}
    state = {f"{part}.{n}": t for part, m in modules.items() for n, t in m.state_dict().items()}
    directory = tmp_path / "internvl"
    directory.mkdir()
    save_file({n: t.contiguous() for n, t in state.items()}, directory / "model.safetensors")
    byte_tokenizer("<img>", "</img>", "<IMG_CONTEXT>").save_pretrained(directory)
    config = {
        "model_type": "internvl_chat",
        "architectures": ["InternVLChatModel"],
        "auto_map": {"AutoModel": "modeling_internvl_chat.InternVLChatModel"},
        "llm_config": text.config.to_dict() | {"architectures": ["GptOssForCausalLM"]},
        "vision_config": vision.config.to_dict() | {"architectures": ["CLIPVisionModel"]},
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": 56,
        "max_dynamic_patch": 9,
        "use_thumbnail": True,
        "select_layer": -1,
        "ps_version": "v2",
        "tie_word_embeddings": True,
    }
    (directory / "config.json").write_text(json.dumps(config))
    return text, vision, mlp1


def convert(tmp_path, out="medgpt", **options):
    options = {"progress": False, "dtype": torch.float32} | options
    return checkpoint.convert_internvl(tmp_path / "internvl", tmp_path / out, **options)


def internvl_features(vision, mlp1, pixels, version="v2") -> torch.Tensor:
    """InternVL's extract_feature: each token is a square of 2 x 2 patches, rows then columns."""
    grid = vision(pixels).last_hidden_state[:, 1:].unflatten(1, (2, 2, 2, 2))  # [N, y, 2, x, 2, D]
    order = (0, 1, 3, 2, 4, 5) if version == "v2" else (0, 3, 1, 2, 4, 5)
    return mlp1(grid.permute(order).flatten(3)).flatten(0, 2)


def test_internvl_converted(tmp_path, released):
    text, vision, mlp1 = released
    model = load(convert(tmp_path))
    config = model.config
    assert (config.min_tiles, config.max_tiles, config.tile_size) == (1, 9, 56)
    assert config.use_thumbnail
    assert config.tie_word_embeddings is False
    ids = (config.image_start_token_id, config.image_end_token_id, config.image_token_id)
    assert ids == (303, 304, 305)
    hold_logits(model, text, text_logits)
    hold_tower(model, vision)
    mean, std = (torch.tensor(v)[:, None, None] for v in (config.image_mean, config.image_std))
    pixels = (torch.stack(images()).permute(0, 3, 1, 2) / 255.0 - mean) / std
    packed = pack_images(images())
    with torch.no_grad():
        found = model.get_image_features(packed.pixels, packed.sizes)
        expected = internvl_features(vision, mlp1, pixels)
        double = [copy.deepcopy(m).double() for m in (vision, mlp1)]
        truth = internvl_features(*double, pixels.double())
        assert_close(found, expected, truth)
        transposed = internvl_features(vision, mlp1, pixels, "v1")
        with pytest.raises(ToleranceError):  # what is refused would have been another model
            assert_close(found, transposed, internvl_features(*double, pixels.double(), "v1"))


def test_internvl_and_back(tmp_path, released):
    """Names, bytes and the meaning of the config survive; experts packed on the way."""
    out = convert(tmp_path, experts="packed", dtype=torch.bfloat16, max_shard_size="60KB")
    back = checkpoint.export_internvl(out, tmp_path / "back", progress=False)
    again = checkpoint.convert_internvl(back, tmp_path / "again", progress=False)
    first, second = tensors_in(out), tensors_in(again)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[n], second[n]) for n in first)
    theirs = set(load_file(tmp_path / "internvl/model.safetensors"))
    named = {n.replace("_blocks", "") for n in tensors_in(back) if not n.endswith("_scales")}
    used = {
        n.replace("vision_model.vision_model.", "vision_model.")
        for n in theirs
        if "post_layernorm" not in n
    }
    assert named == used
    configs = [json.loads((d / "config.json").read_text()) for d in (out, again)]
    assert configs[0] == configs[1]


NOT_SERVED = {
    "v1": ({"ps_version": "v1"}, "pixel shuffle of ps_version v2, got v1"),
    "v1 by default": ({"ps_version": None}, "ps_version v2, got None"),
    "square": ({"pad2square": True}, "no pad2square"),
    "lora": ({"use_llm_lora": 16}, "no use_llm_lora, got 16"),
    "qwen": (
        {"llm_config": {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}},
        "gpt_oss as llm_config, got .'Qwen2",
    ),
    "intern vit": (
        {"vision_config": {"model_type": "intern_vit_6b"}},
        "CLIP or SigLIP2 .NaFlex., got intern_vit_6b",
    ),
    "no parts": ({"llm_config": None}, "llm_config and vision_config"),
}


@pytest.mark.parametrize("what", NOT_SERVED)
def test_internvl_that_is_not_served(tmp_path, released, what):
    change, match = NOT_SERVED[what]
    file = tmp_path / "internvl/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match="convert_internvl: expected .*" + match):
        convert(tmp_path)
    assert not (tmp_path / "medgpt").exists()


def test_names_both_ways():
    vision = MedGPTVisionConfig()
    for theirs, ours in {
        "vision_model.encoder.layers.3.bias": "model.vision_tower.encoder.layers.3.bias",
        "mlp1.0.weight": "model.multi_modal_projector.layer_norm.weight",
        "mlp1.1.bias": "model.multi_modal_projector.linear_1.bias",
        "mlp1.3.weight": "model.multi_modal_projector.linear_2.weight",
        "language_model.model.norm.weight": "model.language_model.norm.weight",
        "language_model.lm_head.weight": "lm_head.weight",
    }.items():
        assert internvl.from_internvl(theirs, vision) == ours
        assert internvl.to_internvl(ours) == theirs
    assert internvl.from_internvl("vision_model.vision_model.post_layernorm.bias", vision) is None
    assert internvl.from_internvl("mlp1.2.weight", vision) == "mlp1.2.weight"


# Bad input


def spoil(directory, how: str) -> None:
    files = sorted(directory.glob("*.safetensors"))
    config = json.loads((directory / "config.json").read_text())
    state = load_file(files[0])
    name = next(
        n for n in sorted(state) if re.search(r"layers.0.*weight$", n) and "text_model" not in n
    )
    index = directory / "model.safetensors.index.json"
    if how == "pickle":
        files[0].rename(files[0].with_name("pytorch_model.bin"))
        for file in (*files[1:], index):
            file.unlink(missing_ok=True)
    elif how == "truncated":
        files[0].write_bytes(files[0].read_bytes()[: files[0].stat().st_size // 2])
    elif how == "outside":
        text = json.dumps({"weight_map": {name: "../model.safetensors"}})
        index.write_text(text)
        (directory / "model.safetensors").unlink(missing_ok=True)
    elif how == "no config":
        (directory / "config.json").unlink()
    elif how == "no json":
        (directory / "config.json").write_text("{")
    elif how == "another model":
        (directory / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    else:
        if how == "missing":
            del state[name]
        elif how == "unexpected":
            key = "vision_model.encoder.other" if "vision" in name else "model.other"
            state[key] = torch.zeros(1)
        elif how == "shape":
            state[name] = state[name][:-1].contiguous()
        elif how == "dtype":
            state[name] = torch.zeros(state[name].shape, dtype=torch.uint8)
        elif how == "bool":
            state[name] = torch.zeros(state[name].shape, dtype=torch.bool)
        save_file(state, files[0], metadata={"format": "pt"})


SPOILED = {
    "pickle": "safetensors, which cannot run code when they are read, got pytorch_model.bin",
    "truncated": "a whole safetensors file",
    "outside": "beside the index, got '../model.safetensors'",
    "no config": "a directory with config.json",
    "no json": "JSON in .*config.json",
    "another model": "got llama",
    "missing": "the tensors of MedGPT, got 1 missing, as model.*weight",
    "unexpected": "the tensors of MedGPT, got 1 unexpected, as model.*other",
    "shape": r"model.*layers.0.*weight \[\d.*, got \[",
    "dtype": r"model.*weight .* of torch.b?float.*, got .* of torch.uint8",
    "bool": r"weight in .'F64', .*, got BOOL",
}


@pytest.mark.parametrize("part", ["gpt-oss", "clip", "medgpt"])
@pytest.mark.parametrize("how", SPOILED)
def test_spoiled_parts_are_refused(tmp_path, parts, part, how):
    if part == "medgpt":
        compose(tmp_path)
    spoil(tmp_path / part, how)
    match = SPOILED[how]
    op = "load" if part == "medgpt" else "compose"
    with pytest.raises(ValueError, match=f"{op}: expected .*{match}"):
        load(tmp_path / "medgpt") if part == "medgpt" else compose(tmp_path)
    assert part == "medgpt" or sorted(p.name for p in tmp_path.iterdir()) == ["clip", "gpt-oss"]


@pytest.mark.parametrize("missing", ["gate_up_proj_scales", "gate_up_proj_blocks"])
def test_half_of_an_mxfp4_tensor_is_refused(tmp_path, parts, missing):
    for file in (tmp_path / "gpt-oss").glob("*.safetensors"):
        state = load_file(file)
        save_file({n: t for n, t in state.items() if not n.endswith(missing)}, file)
    with pytest.raises(ValueError, match=r"compose: expected .*(missing|none)"):
        compose(tmp_path, experts="dense")


def test_other_options_are_refused(tmp_path, parts):
    with pytest.raises(ValueError, match='experts "packed" or "dense", got \'int4\''):
        compose(tmp_path, experts="int4")
    with pytest.raises(ValueError, match="vision_mode"):
        compose(tmp_path, vision_mode="video")
    with pytest.raises(ValueError, match="max_shard_size"):
        compose(tmp_path, max_shard_size="much")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clip", "gpt-oss"]


@pytest.mark.parametrize("name", ["openai/gpt-oss-20b", "./nowhere", "nowhere"])
def test_names_on_the_hub_are_refused(name):
    with pytest.raises(ValueError, match=f"a local directory, got '{name}'") as refused:
        checkpoint.load(name)
    command = "hf download openai/gpt-oss-20b --local-dir gpt-oss-20b"
    assert (command in str(refused.value)) == (name == "openai/gpt-oss-20b")


def test_out_dir_keeps_what_it_holds(tmp_path, parts):
    out = tmp_path / "medgpt"
    out.mkdir()
    compose(tmp_path)  # empty: taken
    before = tensors_in(out)
    with pytest.raises(ValueError, match="an out_dir that is empty or not there"):
        compose(tmp_path, seed=1)
    spoil(tmp_path / "clip", "missing")
    with pytest.raises(ValueError, match="1 missing"):
        compose(tmp_path, seed=1, overwrite=True)
    after = tensors_in(out)
    assert all(torch.equal(before[n], after[n]) for n in before)
    parts[2].save_pretrained(tmp_path / "clip")
    compose(tmp_path, seed=1, overwrite=True)
    name = "model.multi_modal_projector.linear_1.weight"
    assert not torch.equal(before[name], tensors_in(out)[name])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clip", "gpt-oss", "medgpt"]
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("unsaved")
    for other in ("thesis", "gpt-oss", ".", "clip/config.json"):
        with pytest.raises(ValueError, match=r"MedGPT checkpoint to overwrite|none of the sources"):
            compose(tmp_path, out=other, overwrite=True)
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "unsaved"


def test_killed_run_leaves_nothing_that_loads(tmp_path):
    clip().save_pretrained(tmp_path / "clip")
    sparse_gpt_oss(tmp_path / "gpt-oss", 4, 8, 1000)
    byte_tokenizer().save_pretrained(tmp_path / "gpt-oss")
    command = [sys.executable, "-c", MEMORY, "gpt-oss", "clip", "out", "packed"]
    run = subprocess.Popen(command, cwd=tmp_path)
    deadline = time.monotonic() + 60
    while not (found := list(tmp_path.glob(".out.partial-*/*.safetensors"))):
        assert run.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"a directory with config\.json"):
        checkpoint.load(found[0].parent)
