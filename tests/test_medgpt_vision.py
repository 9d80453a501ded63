"""The packed vision tower against transformers' own CLIP and SigLIP2 NaFlex, image by image."""

import copy

import numpy as np
import pytest
import torch
from material import SMALL_SIZES, mixed_batch
from test_transformers import over_layers
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    InternVLModel,
    Siglip2VisionConfig,
    Siglip2VisionModel,
)

import medgpt_kernels as mk
from medgpt.config import IMAGENET_MEAN, IMAGENET_STD, MedGPTVisionConfig
from medgpt.vision import MedGPTVisionModel, merge_rows
from medgpt_kernels.testing import ToleranceError, assert_close

SIZES = {"num_hidden_layers": 3, "intermediate_size": 80, "initializer_range": 0.2}
CLIP = {"hidden_size": 64, "num_attention_heads": 2, "patch_size": 14, "image_size": 84}
# heads of 72, as SigLIP2 So400m has
SIGLIP2 = {"hidden_size": 144, "num_attention_heads": 2, "patch_size": 16, "num_patches": 25}
NAMES = pytest.mark.parametrize("name", ["clip", "siglip2"])


@pytest.fixture(autouse=True)
def _strict(monkeypatch):
    monkeypatch.setenv("MEDGPT_KERNELS_STRICT", "1")


def their_tower(name: str):
    torch.manual_seed(0)
    if name == "clip":
        config = CLIPVisionConfig(**SIZES, **CLIP)
        return CLIPVisionModel._from_config(config, attn_implementation="eager").eval()
    config = Siglip2VisionConfig(**SIZES, **SIGLIP2)
    return Siglip2VisionModel._from_config(config, attn_implementation="eager").eval()


def names_of(state: dict) -> dict:
    """transformers 5.17 has a prefix; pooling heads and position ids are not the tower's."""
    state = {name.removeprefix("vision_model."): t for name, t in state.items()}
    return {n: t for n, t in state.items() if not n.startswith("head.") and "position_ids" not in n}


def our_tower(theirs) -> MedGPTVisionModel:
    of = MedGPTVisionConfig.from_clip
    if isinstance(theirs, Siglip2VisionModel):
        of = MedGPTVisionConfig.from_siglip2
    mine = MedGPTVisionModel(of(theirs.config))
    state = names_of(theirs.state_dict())
    if isinstance(theirs, CLIPVisionModel):  # CLIP's is for its pooled output only
        state = {n: t for n, t in state.items() if not n.startswith("post_layernorm")}
    mine.load_state_dict(state, strict=True)
    return mine.to(theirs.dtype).eval()


def normalised(image: np.ndarray, dtype) -> torch.Tensor:
    """[H, W, 3]"""
    mean, std = (torch.tensor(x, dtype=dtype) for x in (IMAGENET_MEAN, IMAGENET_STD))
    return (torch.from_numpy(image.copy()).to(dtype) / 255 - mean) / std


def theirs_of(model, image: np.ndarray, layer: int = -1) -> torch.Tensor:
    """Features [tokens, D] of one image."""
    pixels = normalised(image, model.dtype)
    patch = model.config.patch_size
    if isinstance(model, CLIPVisionModel):
        inputs = {"pixel_values": pixels.permute(2, 0, 1)[None], "interpolate_pos_encoding": True}
    else:
        h, w = (side // patch for side in pixels.shape[:2])
        patches = pixels.view(h, patch, w, patch, 3).transpose(1, 2).reshape(1, h * w, -1)
        inputs = {
            "pixel_values": patches,
            "pixel_attention_mask": torch.ones(1, h * w, dtype=torch.long),
            "spatial_shapes": torch.tensor([[h, w]]),
        }
    out = model(**inputs, output_hidden_states=True)
    return (out.last_hidden_state if layer == -1 else out.hidden_states[layer])[0]


def ours_of(model, images, layer: int = -1) -> list[torch.Tensor]:
    packed = mk.pack_images(images)
    out = model(packed, mean=IMAGENET_MEAN, std=IMAGENET_STD, feature_layer=layer)
    return list(out.tokens.split(out.cu_seqlens.diff().tolist()))


def batch(name: str):
    return mixed_batch(6, CLIP["patch_size"] if name == "clip" else 16, SMALL_SIZES)


def hold(name, mine, theirs, layer=-1):
    truth = copy.deepcopy(theirs).double()
    with torch.no_grad():
        found = ours_of(mine, batch(name), layer)
        for n, image in enumerate(batch(name)):
            eager, exact = theirs_of(theirs, image, layer), theirs_of(truth, image, layer)
            assert_close(found[n], eager, exact, name=f"image {n}")


@NAMES
def test_every_image_of_a_mixed_batch(name):
    theirs = their_tower(name)
    hold(name, our_tower(theirs), theirs)


@NAMES
@pytest.mark.parametrize("layer", [0, 1, -2])
def test_other_layers(name, layer):
    theirs = their_tower(name)
    hold(name, our_tower(theirs), theirs, layer)


def test_the_table_as_it_is_where_the_grid_is_the_tables():
    theirs = their_tower("clip")
    image = mixed_batch(1, 14, ((84, 84),))[0]
    with torch.no_grad():
        found = ours_of(our_tower(theirs), [image, image])
        pixels = normalised(image, torch.float32).permute(2, 0, 1)[None]
        eager = theirs(pixel_values=pixels).last_hidden_state[0]
        exact = copy.deepcopy(theirs).double()(pixel_values=pixels.double()).last_hidden_state[0]
    for one in found:
        assert_close(one, eager, exact)


def gradients(model, outs, weights) -> dict[str, torch.Tensor]:
    model.zero_grad()
    sum((o * w.to(o.dtype)).sum() for o, w in zip(outs, weights, strict=True)).backward()
    found = names_of({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    return {"logits": torch.cat(outs), **found}


@NAMES
def test_gradients_of_a_mixed_batch(name):
    theirs = their_tower(name)
    mine, truth = our_tower(theirs), theirs.double()
    draws = []  # several losses: one gradient of a bias is a poor sample of an error
    for seed in range(4):
        images = batch(name)[seed % 3 :]
        torch.manual_seed(seed)
        weights = [torch.randn_like(t) for t in ours_of(mine, images)]
        runs = [gradients(mine, ours_of(mine, images), weights)]
        with mk.backend(
            "reference"
        ):  # theirs sums norms' gradients image by image, with less error
            runs.append(gradients(mine, ours_of(mine, images), weights))
        runs.append(gradients(truth, [theirs_of(truth, image) for image in images], weights))
        assert runs[0].keys() == runs[2].keys()
        draws.append([over_layers(run, runs[2]) for run in runs])
    for key in draws[0][0]:
        if not key.endswith("k_proj.bias"):  # adds one number to all scores: its gradient is 0
            actual, eager, exact = (torch.cat([draw[n][key] for draw in draws]) for n in range(3))
            assert_close(actual, eager, exact, name=key)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("clip", "one sequence"),
        ("clip", "interpolation"),
        ("siglip2", "interpolation"),
        ("clip", "pre_layernorm"),
        ("siglip2", "post_layernorm"),
        ("clip", "hidden_act"),
    ],
)
def test_notices(name, wrong):
    theirs = their_tower(name)
    mine = our_tower(theirs)
    if wrong == "one sequence":
        for layer in mine.encoder.layers:
            layer.self_attn.register_forward_pre_hook(
                lambda module, args: (args[0], args[1][[0, -1]], int(args[1][-1]))
            )
    elif wrong == "interpolation":
        mine.embeddings.config.interpolation = "bilinear_align_corners"
    elif wrong == "hidden_act":
        for layer in mine.encoder.layers:
            layer.mlp.activation = torch.nn.GELU()
    else:
        setattr(mine.config, wrong, False)
    with pytest.raises(ToleranceError):
        hold(name, mine, theirs)


def test_pixel_shuffle_is_internvls():
    sizes = torch.tensor([[56, 84], [28, 28], [112, 56]], dtype=torch.int32)
    grids = (sizes // 14).tolist()
    for merge, rows in ((2, 1), (2, 0), (1, 1)):
        total = sum(h * w + rows for h, w in grids)
        tokens = torch.randn(total, 6)
        found = tokens[merge_rows(sizes, 14, merge, rows)].flatten(1)
        expected, start = [], 0
        for h, w in grids:
            one = tokens[start + rows : start + rows + h * w].view(1, h, w, 6)
            if merge == 2:
                one = InternVLModel.pixel_shuffle(None, one, 0.5)
            expected.append(one.flatten(0, 2))
            start += rows + h * w
        assert torch.equal(found, torch.cat(expected))


def test_pixel_shuffle_refuses_odd_grids():
    with pytest.raises(ValueError, match="multiples of 2, got 2x3"):
        merge_rows(torch.tensor([[28, 42]], dtype=torch.int32), 14, 2, 1)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"num_attention_heads": 3}, "hidden_size"),
        ({"image_size": 100}, "image_size"),
        ({"patch_layout": "rows"}, "patch_layout"),
    ],
)
def test_config_refuses(change, match):
    with pytest.raises(ValueError, match=match):
        MedGPTVisionConfig(**change)
