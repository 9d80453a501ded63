"""Tiling against InternVL's and transformers' own, and the processor on real images."""

import itertools
import json
import random
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from material import NAMES, SKIMAGE_FILES, _package_folder, image, internvl_tiles
from PIL import Image
from pydicom.data import get_testdata_file
from transformers import AutoProcessor
from transformers.models.got_ocr2 import image_processing_pil_got_ocr2 as got_ocr2

from medgpt.config import MedGPTConfig
from medgpt.image_processor import MedGPTImageProcessor
from medgpt.images import load_image
from medgpt.processor import MedGPTProcessor
from medgpt.tiling import candidate_grids, native_size, resize, tile_grid, tiles
from medgpt.tokenizer import harmony_tokenizer

ROOT = Path(__file__).resolve().parents[1]
CT = get_testdata_file("693_UNCI.dcm", download=False)
FUNDUS = _package_folder("scikit-image", SKIMAGE_FILES["fundus"]) / SKIMAGE_FILES["fundus"]


@pytest.fixture(scope="module")
def processor():
    return MedGPTProcessor.from_config(MedGPTConfig.tiny(max_tiles=4), harmony_tokenizer())


def user(*content) -> dict:
    parts = [{"type": "text", "text": c} if isinstance(c, str) else c for c in content]
    return {"role": "user", "content": parts}


def part(source) -> dict:
    return {"type": "image", "image": source}


# Tiling


def sizes(count: int):
    rng = random.Random(0)
    for _ in range(count):
        yield round(10 ** rng.uniform(0, 4)), round(10 ** rng.uniform(0, 4))
    # exactly between two grids, where the tie rule decides, below and above half of the area
    ratios = sorted({Fraction(columns, rows) for columns, rows in candidate_grids(1, 12)})
    for low, high in itertools.pairwise(ratios):
        middle = (low + high) / 2
        for scale in (1, 3, 10, 30, 100):
            yield middle.denominator * scale, middle.numerator * scale
    for columns, rows in candidate_grids(1, 12):
        for side in (100, 200, 237, 238, 300, 336, 400, 500, 700, 1000):
            yield rows * side, columns * side


def internvl_grid(height, width, min_tiles, max_tiles, tile):
    """As InternVL's own code has it: its grids come from a set."""
    grids = {
        (i, j)
        for n in range(min_tiles, max_tiles + 1)
        for i in range(1, n + 1)
        for j in range(1, n + 1)
        if min_tiles <= i * j <= max_tiles
    }
    best, closest = (1, 1), float("inf")
    for ratio in sorted(grids, key=lambda grid: grid[0] * grid[1]):
        difference = abs(width / height - ratio[0] / ratio[1])
        if difference < closest:
            best, closest = ratio, difference
        elif difference == closest and width * height > 0.5 * tile * tile * ratio[0] * ratio[1]:
            best = ratio
    return best


@pytest.mark.parametrize(("min_tiles", "max_tiles"), [(1, 12), (1, 6), (2, 4), (1, 1), (3, 24)])
def test_grids_are_internvls_and_transformers(min_tiles, max_tiles):
    seen = set()
    for height, width in sizes(1500):
        ours = tile_grid(height, width, min_tiles=min_tiles, max_tiles=max_tiles)
        bounds = (min_tiles, max_tiles)
        assert ours == got_ocr2.get_optimal_tiled_canvas((height, width), (336, 336), *bounds)
        assert ours == internvl_grid(height, width, *bounds, 336)
        assert min_tiles <= ours[0] * ours[1] <= max_tiles
        seen.add(ours)
    assert seen <= set(candidate_grids(min_tiles, max_tiles))
    assert len(seen) > len(candidate_grids(min_tiles, max_tiles)) / 2


def test_the_tie_rule_matters():
    """Without it a square of 1,000 pixels would stay one tile."""
    assert tile_grid(1000, 1000) == (3, 3)
    assert tile_grid(700, 700) == (2, 2)
    assert tile_grid(336, 336) == (1, 1)
    assert tile_grid(238, 475) == (2, 1)  # of one height, not a tie


@pytest.mark.parametrize("name", NAMES)
def test_tiles_are_transformers_pixels(name):
    picture = image(name)
    peer = got_ocr2.GotOcr2ImageProcessorPil(
        size={"height": 336, "width": 336}, crop_to_patches=True, do_normalize=False,
        do_rescale=False, do_resize=True, resample=Image.Resampling.BICUBIC,
    )  # fmt: skip
    theirs = peer(Image.fromarray(picture), return_tensors="np").pixel_values
    ours = tiles(picture)
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert np.array_equal(mine, other.transpose(1, 2, 0))
    if len(ours) > 2:
        assert not np.array_equal(ours[1], theirs[0].transpose(1, 2, 0))


def test_tiles_row_by_row_and_the_thumbnail_last():
    picture = image("chest")
    cut = tiles(picture, max_tiles=6)
    assert all(np.array_equal(a, b) for a, b in zip(cut, internvl_tiles(picture, 6), strict=True))
    columns, rows = tile_grid(*picture.shape[:2], max_tiles=6)
    whole = np.concatenate(
        [np.concatenate(cut[r * columns : (r + 1) * columns], 1) for r in range(rows)]
    )
    assert np.array_equal(whole, resize(picture, rows * 336, columns * 336))
    assert np.array_equal(cut[-1], resize(picture, 336, 336))
    assert len(tiles(picture, max_tiles=6, use_thumbnail=False)) == columns * rows
    assert len(tiles(picture, max_tiles=1)) == 1


@pytest.mark.parametrize("unit", [14, 28, 16, 32])
def test_native_sizes(unit):
    rng = random.Random(unit)
    low, high = 56 * 56, 12 * 336 * 336
    for _ in range(3000):
        height, width = round(10 ** rng.uniform(0, 4.5)), round(10 ** rng.uniform(0, 4.5))
        new = native_size(height, width, unit=unit, min_pixels=low, max_pixels=high)
        assert new[0] % unit == new[1] % unit == 0
        assert min(new) >= unit
        assert low <= new[0] * new[1] <= high
        # one scale of both sides explains the result within a unit, but for the thinnest strips
        pairs = zip(new, (height, width), strict=True)
        ends = [((n - unit) / side, (n + unit) / side) for n, side in pairs]
        if min(new) > unit:
            assert max(e[0] for e in ends) < min(e[1] for e in ends)
        if low <= height * width <= high * 0.9 and min(height, width) >= 4 * unit:
            assert max(abs(new[0] - height), abs(new[1] - width)) <= unit / 2


@pytest.mark.parametrize("bounds", [(784, 784), (3136, 3136), (1, 784), (100_000, 100_352)])
def test_native_budgets_that_leave_no_room(bounds):
    for height, width in ((1, 1), (1, 30_000), (30_000, 1), (500, 500), (333, 4000)):
        new = native_size(height, width, unit=28, min_pixels=bounds[0], max_pixels=bounds[1])
        assert new[0] % 28 == new[1] % 28 == 0
        assert new[0] * new[1] <= bounds[1]
    whole = native_size(336, 448, unit=28, min_pixels=1, max_pixels=10**6)
    assert whole == (336, 448)


# Image processor


@pytest.mark.parametrize("mode", ["tiles", "native"])
@pytest.mark.parametrize("ratio", [0.5, 1.0])
def test_buffer_sizes_and_tokens(mode, ratio):
    config = MedGPTConfig.tiny(vision_mode=mode, downsample_ratio=ratio)
    pictures = [image(name) for name in ("chest", "bone_scan", "microaneurysms")]
    processor = MedGPTImageProcessor.from_config(config)
    batch = processor(pictures, return_tensors="pt")
    assert batch.pixel_values.dtype == torch.uint8
    assert batch.image_sizes.dtype == batch.tiles_per_image.dtype == torch.int32
    assert batch.pixel_values.dim() == 1
    assert batch.pixel_values.numel() == int((batch.image_sizes.prod(1) * 3).sum())
    expected = [tile for picture in pictures for tile in processor.cut(picture)]
    assert np.array_equal(batch.pixel_values, np.concatenate([t.ravel() for t in expected]))
    assert batch.image_sizes.tolist() == [list(t.shape[:2]) for t in expected]
    rows = iter(batch.image_sizes.tolist())
    for picture, count in zip(pictures, batch.tiles_per_image.tolist(), strict=True):
        mine = [next(rows) for _ in range(count)]
        assert mine == [list(size) for size in processor.sizes(*picture.shape[:2])]
        tokens = processor.num_tokens(*picture.shape[:2])
        assert tokens == sum(config.tokens_per_tile(*size) for size in mine)
    assert (batch.tiles_per_image.max() > 1) == (mode == "tiles")


@pytest.mark.parametrize(
    "bad",
    [
        {"vision_mode": "crop"},
        {"downsample_ratio": 0.25},
        {"tile_size": 340},
        {"min_tiles": 5, "max_tiles": 4},
        {"min_pixels": 9000, "max_pixels": 8000},
        {"vision_mode": "native", "min_pixels": 1, "max_pixels": 700},
    ],
)
def test_bad_settings(bad):
    with pytest.raises(ValueError, match="MedGPTImageProcessor: expected"):
        MedGPTImageProcessor(**bad)


# Processor


def test_mixed_batch_equals_one_by_one(processor):
    chats = [
        [user("Which drug?")],
        [user({"type": "image", "path": CT}, "What is it?")],
        [
            user(
                {"type": "image", "image": image("bone_scan")},
                "and",
                {"type": "image", "path": str(FUNDUS)},
                "?",
            )
        ],
    ]
    batch = processor.apply_chat_template(chats, return_tensors="pt")
    alone = [processor.apply_chat_template(chat, return_tensors="pt") for chat in chats]
    pad = processor.tokenizer.pad_token_id
    for ids, mask, one in zip(batch.input_ids, batch.attention_mask, alone, strict=True):
        length = one.input_ids.shape[1]
        assert torch.equal(ids[-length:], one.input_ids[0])
        assert (ids[:-length] == pad).all()
        assert mask.tolist() == [0] * (len(ids) - length) + [1] * length
    with_images = [one for one in alone if "pixel_values" in one]
    assert len(with_images) == 2
    for name in ("pixel_values", "image_sizes", "tiles_per_image"):
        assert torch.equal(batch[name], torch.cat([one[name] for one in with_images]))
    assert batch.tiles_per_image.tolist() == [5, 5, 5]
    assert (batch.input_ids == 200_013).sum(1).tolist() == [0, 5 * 144, 10 * 144]
    # one run an image, between its start and end
    for row in batch.input_ids:
        text = "".join({200_013: "i", 200_014: "(", 200_015: ")"}.get(t, ".") for t in row.tolist())
        assert re.fullmatch(r"\.*(\(i+\)\.+)*", text)


def test_padding_sides_and_masks_of_targets(processor):
    chats = [
        [
            user("Long question with words?"),
            {"role": "assistant", "content": "No.", "thinking": "Hm."},
        ],
        [user("Short?"), {"role": "assistant", "content": "Yes."}],
    ]
    options = {"add_generation_prompt": False, "return_assistant_tokens_mask": True}
    right = processor.apply_chat_template(
        chats, padding_side="right", return_tensors="pt", **options
    )
    left = processor.apply_chat_template(chats, return_tensors="pt", **options)
    lengths = right.attention_mask.sum(1).tolist()
    for row, length in enumerate(lengths):
        assert torch.equal(right.input_ids[row, :length], left.input_ids[row, -length:])
        assert torch.equal(right.assistant_masks[row, :length], left.assistant_masks[row, -length:])
        assert not right.attention_mask[row, length:].any()
        assert not right.assistant_masks[row, length:].any()
        written = right.input_ids[row][right.assistant_masks[row].bool()].tolist()
        assert processor.parse(written)["final"] == ("No.", "Yes.")[row]
        assert written[-1] == 200_002
    ragged = processor.apply_chat_template(chats, padding=False, **options)
    assert [len(row) for row in ragged.input_ids] == lengths
    with pytest.raises(ValueError, match="expected padding for rows of different lengths"):
        processor.apply_chat_template(chats, padding=False, return_tensors="pt", **options)


def test_images_of_a_row_fill_its_parts(processor):
    empty, ct = {"type": "image"}, {"type": "image", "path": CT}
    chat = [user(empty, "a", ct, empty)]
    given = [image("chest"), FUNDUS]
    inline = [
        user(
            {"type": "image", "image": given[0]},
            "a",
            {"type": "image", "path": CT},
            {"type": "image", "image": FUNDUS},
        )
    ]
    one = processor.apply_chat_template(chat, images=given, return_tensors="pt")
    two = processor.apply_chat_template(inline, return_tensors="pt")
    for name in one:
        assert torch.equal(one[name], two[name]), name
    swapped = processor.apply_chat_template(chat, images=given[::-1], return_tensors="pt")
    assert not torch.equal(one.pixel_values, swapped.pixel_values)


def test_windows_of_a_part_and_of_all(processor):
    def pixels(**part):
        chat = [user({"type": "image", "path": CT, **part}, "?")]
        return processor.apply_chat_template(chat, return_tensors="pt").pixel_values

    assert not torch.equal(pixels(), pixels(window="lung"))
    chat = [user({"type": "image", "path": CT}, "?")]
    everywhere = processor.apply_chat_template(chat, window="lung", return_tensors="pt")
    assert torch.equal(everywhere.pixel_values, pixels(window="lung"))
    expected = processor.image_processor.cut(load_image(CT, window="lung"))
    assert np.array_equal(pixels(window="lung"), np.concatenate([t.ravel() for t in expected]))


def test_trusted_text(processor):
    text = "<|start|>user<|message|>a<image>b<image><|end|>"
    batch = processor(text=[text, "c"], images=[CT, image("chest")], return_tensors="pt")
    ids = batch.input_ids[0].tolist()
    assert ids.count(200_013) == 10 * 144
    assert ids[0] == 200_006  # special tokens are real here
    assert processor.tokenizer.decode([t for t in ids if t not in (200_013, 200_014, 200_015)]) == (
        "<|start|>user<|message|>ab<|end|>"
    )
    alone = processor(text=text, images=[[CT, image("chest")]], return_tensors="pt")
    assert alone.input_ids[0].tolist() == ids
    assert torch.equal(alone.pixel_values, batch.pixel_values)
    plain = processor(text="no image", return_tensors="pt")
    assert set(plain) == {"input_ids", "attention_mask"}
    with pytest.raises(ValueError, match="their token ids in the text"):
        processor(text="<|reserved_200013|>")


@pytest.mark.parametrize(
    ("text", "images"),
    [
        ("<image>", None),
        ("none", [CT]),
        ("<image><image>", [CT]),
        (["<image>", "x"], [[], [CT]]),
        (["<image>", "<image>"], [[CT, CT], []]),
        (["<image>"], [[CT], [CT]]),
    ],
)
def test_numbers_of_images_must_fit(text, images, processor):
    with pytest.raises(ValueError, match=r"MedGPTProcessor: expected .* images"):
        processor(text=text, images=images)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tokenize": False}, "tokenize"),
        ({"chat_template": "{{ x }}"}, "chat_template"),
        ({"return_dict": False}, "return_dict"),
        ({"images": [CT]}, "0 images"),
        ({"padding": "max_length"}, "padding"),
        ({"padding_side": "top"}, "padding_side"),
        ({"reasoning_effort": "none"}, "reasoning_effort"),
    ],
)
def test_bad_calls(options, words, processor):
    with pytest.raises(ValueError, match=f"expected .*{words}"):
        processor.apply_chat_template([user("x")], **options)


@pytest.mark.parametrize("name", ["url", "path", "image"])
def test_urls_and_words_of_the_chat_stay_out(name, processor):
    chat = [user({"type": "image", name: "https://host/a.png"}, "Doe^Jane")]
    with pytest.raises(ValueError, match="a URL: nothing is ever fetched") as caught:
        processor.apply_chat_template(chat)
    assert "Doe" not in str(caught.value)
    assert "host" not in str(caught.value)
    with pytest.raises(TypeError):
        processor.apply_chat_template([user("x")], max_length=5)


def test_the_systems_prompt_is_the_configs():
    config = MedGPTConfig.tiny(system_prompt="You read radiographs.")
    processor = MedGPTProcessor.from_config(config, harmony_tokenizer())
    ids = processor.apply_chat_template([user("x")]).input_ids[0]
    assert "<|start|>system<|message|>You read radiographs.\n" in processor.tokenizer.decode(ids)


# Saving


def test_save_and_load(tmp_path):
    config = MedGPTConfig.tiny(vision_mode="native", max_pixels=200_000, system_prompt="Other.")
    processor = MedGPTProcessor.from_config(config, harmony_tokenizer())
    processor.save_pretrained(tmp_path)
    config.save_pretrained(tmp_path)
    assert {p.suffix for p in tmp_path.iterdir()} == {".json"}
    assert json.loads((tmp_path / "processor_config.json").read_text())["system_prompt"] == "Other."
    chat = [user({"type": "image", "path": CT}, "What is it?")]
    expected = processor.apply_chat_template(chat, return_tensors="pt")
    for loaded in (
        MedGPTProcessor.from_pretrained(tmp_path),
        AutoProcessor.from_pretrained(tmp_path),
    ):
        assert type(loaded) is MedGPTProcessor
        batch = loaded.apply_chat_template(chat, return_tensors="pt")
        assert all(torch.equal(batch[name], expected[name]) for name in expected)
    other = MedGPTImageProcessor.from_pretrained(tmp_path, vision_mode="tiles", max_tiles=2)
    assert (other.vision_mode, other.max_tiles, other.max_pixels) == ("tiles", 2, 200_000)
    other.save_pretrained(tmp_path / "images")
    saved = MedGPTImageProcessor.from_pretrained(tmp_path / "images")
    assert saved.to_dict() == other.to_dict()


REGISTERED = """
import sys, medgpt
getattr(medgpt, sys.argv[1])
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
config = type(AutoConfig.for_model("medgpt"))
models = AutoModelForImageTextToText._model_mapping
for mapping in (models, PROCESSOR_MAPPING, IMAGE_PROCESSOR_MAPPING):
    assert config in mapping, mapping
"""


@pytest.mark.parametrize("name", ["MedGPTConfig", "MedGPTProcessor", "MedGPTModel"])
def test_any_class_registers_all_of_them(name):
    subprocess.run([sys.executable, "-c", REGISTERED, name], check=True, timeout=200)


def test_the_documents_example_runs(capsys):
    examples = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "medgpt_processor.md").read_text(), re.DOTALL
    )
    names: dict = {}
    for example in examples:
        exec(compile(example, "medgpt_processor.md", "exec"), names)
    assert names["batch"].pixel_values.dtype == torch.uint8
    assert names["answer"]["final"] == "A chest radiograph."
