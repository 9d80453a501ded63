"""Damaged rows in training: left out with a reason, nothing else lost; epochs as one sequence."""

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from data_material import crop, damage_row_group, dicom_without_pixels
from PIL import Image
from train_packs import checkpoint_of, small

from medgpt.cli import main
from medgpt.data.packing import PackedDataset
from medgpt.data.reader import Rows
from medgpt.data.rows import RowError, RowWriter
from medgpt.processor import MedGPTProcessor
from medgpt.tokenizer import harmony_tokenizer
from medgpt.train.packs import Packs

pytest.importorskip("accelerate", reason="pip install accelerate")

GOOD = 70  # more than a row group's 64


def a_row(name: str, content: bytes | None = None, answer: str = "A retina.", parts=None, **image):
    parts = [{"type": "image"}] if parts is None and content else parts or []
    return {
        "id": name,
        "source": "damaged",
        "license": "",
        "images": [{"bytes": content, **image}] if content else [],
        "messages": [
            {"role": "user", "content": [*parts, {"type": "text", "text": f"{name}: what?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ],
        "meta": {},
    }


def jpeg() -> bytes:
    out = io.BytesIO()
    Image.fromarray(crop("fundus", 3)).resize((112, 112)).save(out, "JPEG")
    return out.getvalue()


def damaged() -> dict[str, tuple[dict, str]]:
    """{id: (row, why it is left out)}, known before a picture is decoded."""
    huge = io.BytesIO()
    Image.new("1", (20000, 10000)).save(huge, "PNG")
    return {
        "headless": (a_row("headless", jpeg()[:40]), "unreadable_image"),
        "two": (a_row("two", jpeg(), parts=[{"type": "image"}] * 2), "image_count"),
        "mute": (a_row("mute", answer=" "), "empty_text"),
        "huge": (a_row("huge", huge.getvalue()), "image_too_large"),
        "none": (a_row("none", dicom_without_pixels()), "dicom_without_pixels"),
    }


def write(path, rows) -> None:
    """Unchecked, as another program might."""
    with RowWriter(path) as writer:
        for row in rows:
            writer.write(row)


@pytest.fixture(scope="module")
def processor():
    return MedGPTProcessor.from_config(small(), harmony_tokenizer())


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return checkpoint_of(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Good rows alone, and the same in the midst of every kind of damage."""
    folder = tmp_path_factory.mktemp("rows")
    rows = [a_row(f"good-{n}", jpeg() if n % 3 else None) for n in range(GOOD)]
    bad = [row for row, _ in damaged().values()]
    for name in ("good", "mixed"):
        (folder / name).mkdir()
    write(folder / "good" / "a.parquet", rows)
    write(folder / "mixed" / "a.parquet", [*bad[:3], *rows[:40]])
    # a group of 64 whose bytes are turned around, before one that is whole
    lost = [a_row(f"lost-{n}") for n in range(64)]
    write(folder / "mixed" / "b.parquet", [*lost, *rows[40:], *bad[3:]])
    damage_row_group(folder / "mixed" / "b.parquet", 0)
    whole = (folder / "good" / "a.parquet").read_bytes()
    (folder / "mixed" / "c.parquet").write_bytes(whole[:-40])
    pq.write_table(pa.table({"text": ["x", "y"]}), folder / "mixed" / "d.parquet")
    return folder


EXPECTED = {reason: 1 for _, reason in damaged().values()}
EXPECTED |= {"unreadable_parquet": 64 + 1, "bad_row": 2}  # a file without a footer counts as one


def test_damaged_rows_are_counted_and_no_good_one_is_lost(processor, folders):
    for again in range(2):  # counted, and read from the stored counts
        packs = PackedDataset(folders / "mixed", processor, 1024, seed=1)
        assert {k: n for k, n in packs.skipped.items() if n} == EXPECTED, again
    found = [name for i in range(len(packs)) for name in packs.ids(i)]
    assert sorted(found) == sorted(f"good-{n}" for n in range(GOOD))
    good = PackedDataset(folders / "good", processor, 1024, seed=1)
    assert [packs.ids(i) for i in range(len(packs))] == [good.ids(i) for i in range(len(good))]
    with pytest.raises(ValueError, match="expected a parquet file, got another"):
        Rows(folders / "mixed")
    with pytest.raises(RowError, match="unreadable_parquet"):
        Rows(folders / "mixed" / "b.parquet")[3]
    with pytest.raises(ValueError, match=r"effort among"):
        PackedDataset(folders / "good", processor, 1024, reasoning_effort="most")


def test_an_image_that_is_there_by_now_is_counted_again(processor, tmp_path):
    row = a_row("later", jpeg())
    row["images"] = [{"path": "later.jpg"}]
    write(tmp_path / "rows.parquet", [a_row("now"), row])
    packs = PackedDataset(tmp_path, processor, 1024)
    assert packs.skipped["missing_image"] == 1
    (tmp_path / "later.jpg").write_bytes(jpeg())
    packs = PackedDataset(tmp_path, processor, 1024)
    assert sum(packs.skipped.values()) == 0
    assert sorted(packs.ids(0)) == ["later", "now"]


def train(tmp_path, model, rows, **stage) -> dict:
    """Weights after `medgpt train --stage 2`, and the folder of the stage."""
    from safetensors.torch import load_file

    file = tmp_path / "run.yaml"
    stage = {"mix": {str(rows): 1}, "length": 1024, "packs_per_step": 1, **stage}
    entries = {"model": str(model), "output": str(tmp_path / "out"), "dtype": "float32"}
    entries |= {"device": "cpu", "workers": 0, "tensorboard": False, "logging_steps": 1}
    entries["peak_tflops"] = 0.1  # not measured
    file.write_text(json.dumps({**entries, "stage2": stage}))
    assert main(["train", str(file), "--stage", "2"]) == 0
    return load_file(tmp_path / "out" / "stage2" / "model" / "model.safetensors")


@pytest.mark.slow
def test_training_on_damaged_rows_is_training_on_the_good_ones(model, folders, tmp_path, capsys):
    found = {}
    for name in ("good", "mixed"):
        (tmp_path / name).mkdir()
        found[name] = train(tmp_path / name, model, folders / name, max_steps=2)
    told = capsys.readouterr().err.partition("stage 2: 70 documents in")[2]
    assert "left out: none" in told.partition("\n")[0]
    told = told.partition("stage 2: 70 documents in")[2].partition("\n")[0]
    assert all(f"{n} {reason}" in told for reason, n in EXPECTED.items())
    assert all(torch.equal(found["mixed"][n], w) for n, w in found["good"].items())
    said = json.loads((tmp_path / "mixed" / "out" / "stage2" / "data.json").read_text())
    assert said["left_out"] == EXPECTED
    assert said["documents"] == GOOD


def test_an_image_that_breaks_when_decoded_leaves_its_pack(model, folders, tmp_path):
    size = {"height": 112, "width": 112}  # as curation stores it: the header is not looked at
    cut = jpeg()[:-300]
    rows = [a_row(f"good-{n}", jpeg(), **size) for n in range(6)]
    write(tmp_path / "rows.parquet", [*rows, a_row("cut", cut, **size), a_row("bad", b"?", **size)])
    train(tmp_path, model, tmp_path / "rows.parquet", epochs=2)
    folder = tmp_path / "out" / "stage2"
    told = [json.loads(line) for line in (folder / "left_out.jsonl").open()]
    assert sorted((t["row"], t["reason"]) for t in told) == sorted(
        [("cut", "unreadable_image"), ("bad", "unreadable_image")] * 2
    )
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    assert sum(entry.get("left_out/unreadable_image", 0) for entry in log) == 4
    assert json.loads((folder / "data.json").read_text())["left_out"] == {}


def test_a_pack_of_nothing_but_damage_is_one_token(processor, tmp_path):
    write(tmp_path / "rows.parquet", [a_row("bad", b"?", height=112, width=112)])
    pack, sources, left_out = PackedDataset(tmp_path, processor, 1024).read(0)
    assert pack["input_ids"].shape == (1, 1)
    assert (pack["labels"] == -100).all()
    assert (sources, left_out) == ([], [("bad", "unreadable_image")])


def test_epochs_are_one_sequence(processor, tmp_path):
    rows = [a_row(f"r-{n}", answer="A retina. " * (1 + 7 * n % 40)) for n in range(40)]
    write(tmp_path / "rows.parquet", rows)
    dataset = PackedDataset(tmp_path, processor, 512)
    expected = []
    for epoch in range(3):
        dataset.set_epoch(epoch)
        expected += [dataset.ids(i) for i in range(len(dataset))]
    packs = Packs(dataset, 3)
    assert len(packs) == len(expected)
    assert [packs.ids(i) for i in range(len(packs))] == expected
    assert packs[len(packs) - 1]["pack"] == len(packs) - 1
    third = len(expected) // 3
    assert expected[:third] != expected[third : 2 * third]
