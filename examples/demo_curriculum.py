"""All three stages on real material with the tiny model, in minutes on two cores: make demo

    python examples/demo_curriculum.py OUT [--rows 140] [--epochs 4]

Pictures are crops of radiographs, CT, MR, fundus and histology from pydicom-data and scikit-image,
with captions and questions about what they are. Texts are chest X-ray reports of the Indiana
University collection, as torchxrayvision packs them (CC BY-NC-ND 4.0; pip install --no-deps
torchxrayvision); without it stages 2 and 3 do without reports. It shows that the machinery learns;
the model, of random weights, becomes no doctor.

Prints the held-out loss of each kind before and after each stage and how many held-out pictures
are named rightly, and writes curves.svg.
"""

import argparse
import importlib.metadata
import importlib.util
import io
import itertools
import json
import random
import shutil
import tarfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

KINDS = ("captions", "reports", "questions")
LENGTH = 2048
PICTURES = {  # file: distribution, what it is
    "RG1_J2KR.dcm": ("pydicom-data", "chest radiograph"),
    "RG3_J2KR.dcm": ("pydicom-data", "ankle radiograph"),
    "693_UNCI.dcm": ("pydicom-data", "CT of the head"),
    "MR2_UNCI.dcm": ("pydicom-data", "MR of the shoulder"),
    "JPEG-LL.dcm": ("pydicom-data", "bone scan"),
    "retina.jpg": ("scikit-image", "fundus photograph"),
    "ihc.png": ("scikit-image", "histology slide"),
}
ASK = "What does this image show?"
MIXES = {1: ("captions",), 2: ("captions", "reports"), 3: ("questions", "reports")}
HELD_OUT = 14  # of each kind


def packaged(distribution: str, name: str) -> Path | None:
    try:
        files = importlib.metadata.files(distribution) or ()
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((Path(f.locate()) for f in files if f.name == name), None)


def crops(draw: random.Random, count: int):
    """(what it is, PNG bytes, height, width) of `count` crops, the kinds in turn."""
    from PIL import Image

    from medgpt.images import load_image

    whole = {}
    for name, (distribution, what) in PICTURES.items():
        if (path := packaged(distribution, name)) is not None:
            picture = Image.fromarray(load_image(path))
            picture.thumbnail((640, 640))
            whole[what] = picture
    for i in range(count):
        what = list(whole)[i % len(whole)]
        picture = whole[what]
        side = int(min(picture.size) * draw.uniform(0.7, 1.0))
        left, top = (draw.randint(0, extent - side) for extent in picture.size)
        cut = picture.crop((left, top, left + side, top + side)).resize((112, 112))
        file = io.BytesIO()
        cut.save(file, "PNG")
        yield what, file.getvalue(), 112, 112


def reports(count: int) -> list[tuple[str, str]]:
    """(findings, impression) of real reports; none where the package is not there."""
    path = packaged("torchxrayvision", "NLMCXR_reports.tgz")
    found = []
    if path is None:
        return found
    with tarfile.open(path) as tar:
        for member in tar:
            if len(found) == count:
                break
            if member.isfile() and member.name.endswith(".xml"):
                tree = ElementTree.parse(tar.extractfile(member))
                text = {t.get("Label"): (t.text or "").strip() for t in tree.iter("AbstractText")}
                if text.get("FINDINGS") and text.get("IMPRESSION"):
                    found.append((text["FINDINGS"], text["IMPRESSION"]))
    return found


def turn(role: str, *parts) -> dict:
    content = [{"type": "image"} if p is None else {"type": "text", "text": p} for p in parts]
    return {"role": role, "content": content}


def rows_of(kind: str, count: int, seed: int):
    """Rows of a kind, {id, source, license, images, messages, meta}."""
    draw = random.Random(f"{kind} {seed}")
    base = {"source": kind, "license": "see the package"}
    if kind == "reports":
        texts = reports(2 * count)
        texts = texts[:count] if seed == 0 else texts[count:]
        for i, (findings, impression) in enumerate(texts):
            ask = turn("user", f"Findings: {findings} What is the impression?")
            answer = turn("assistant", impression)
            yield base | {"id": f"report-{seed}-{i}", "images": [], "messages": [ask, answer]}
        return
    for i, (what, png, height, width) in enumerate(crops(draw, count)):
        images = [{"bytes": png, "height": height, "width": width}]
        ask = "Describe the image." if kind == "captions" else ASK
        says = f"The image is a {what}." if kind == "captions" else f"{what}"
        messages = [turn("user", None, ask), turn("assistant", says)]
        yield base | {"id": f"{kind}-{seed}-{i}", "images": images, "messages": messages}


def write(out: Path, count: int) -> dict[str, dict[str, str]]:
    """Parquet files of each kind, to train on and held out."""
    from medgpt.data.rows import write_rows

    paths = {}
    for seed, part in enumerate(("train", "held_out")):
        for kind in KINDS:
            size = count if part == "train" else HELD_OUT
            rows = list(rows_of(kind, size, seed))
            if rows:
                path = out / "rows" / f"{kind}_{part}.parquet"
                path.parent.mkdir(parents=True, exist_ok=True)
                write_rows(path, rows)
                paths.setdefault(part, {})[kind] = str(path)
    return paths


def evaluate(model_dir, held_out: dict[str, str]) -> dict[str, float]:
    """Mean loss of a target token by kind, and the share of pictures whose name is likeliest."""
    import torch

    from medgpt import checkpoint
    from medgpt.data.packing import PackedDataset

    model, processor = checkpoint.load(model_dir, dtype=torch.float32)
    found = {}
    with torch.no_grad():
        for kind, path in held_out.items():
            total = tokens = 0.0
            for pack in PackedDataset(path, processor, LENGTH):
                losses = model(**pack, return_logits=False).token_losses
                total += losses.sum().item()
                tokens += (pack["labels"] != -100).sum().item()
            found[kind] = total / tokens
        found["named"] = named_rightly(model, processor, held_out["questions"])
    return found


def named_rightly(model, processor, path: str) -> float:
    """Share of held-out pictures for which the right one of all names has the least loss."""
    import torch

    from medgpt.data.collator import collate
    from medgpt.data.packing import encode
    from medgpt.data.reader import Rows

    rows, names = Rows(path), [what for _, what in PICTURES.values()]
    right = 0
    for number in range(len(rows)):
        row = rows[number]
        truth = row["messages"][-1]["content"][0]["text"]
        asked = [{**row, "messages": [*row["messages"][:-1], turn("assistant", n)]} for n in names]
        pack = collate([encode(r, processor, rows.folder(number)) for r in asked])
        losses = model(**pack, return_logits=False).token_losses[0]
        ends = itertools.pairwise(pack["cu_seq_lens_q"].tolist())
        means = [losses[a:b].sum() / (pack["labels"][0, a:b] != -100).sum() for a, b in ends]
        right += names[int(torch.stack(means).argmin())] == truth
    return right / len(rows)


def log_of(stage_dir: Path) -> list[dict]:
    return json.loads((stage_dir / "trainer_state.json").read_text())["log_history"]


def run_on(out: Path, train: dict[str, str], epochs: int):
    """A tiny model and the three stages over it, as a run's file would say it."""
    import torch

    from medgpt import MedGPTConfig, checkpoint
    from medgpt.train.run import run_of
    from medgpt.train.stages import STAGES

    tiny = MedGPTConfig.tiny(tile_size=112, max_tiles=1)
    made = checkpoint.create(
        tiny, out / "model", dtype=torch.float32, overwrite=True, progress=False
    )
    entries = {"model": str(made), "output": str(out), "dtype": "float32", "device": "cpu"}
    entries |= {"workers": 0, "logging_steps": 1, "save_steps": 10_000}
    entries["tensorboard"] = importlib.util.find_spec("tensorboard") is not None
    for number, kinds in MIXES.items():
        entries[f"stage{number}"] = {
            "mix": {train[kind]: 1 for kind in kinds if kind in train},
            "learning_rates": dict.fromkeys(STAGES[number].learning_rates, 1e-3),
            "length": LENGTH,
            "packs_per_step": 1,
            "epochs": 2 if number == 1 else epochs,
            "betas": (0.9, 0.98),
        }
    return run_of(entries)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", type=int, default=140, help="of each kind")
    parser.add_argument("--epochs", type=int, default=4, help="of stages 2 and 3")
    options = parser.parse_args()

    from transformers.utils import logging

    from medgpt.train.curves import draw_curves
    from medgpt.train.run import train_stage

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    start, out = time.perf_counter(), options.out
    for number in MIXES:
        shutil.rmtree(out / f"stage{number}", ignore_errors=True)  # of an earlier demo
    paths = write(out, options.rows)
    train, held_out = paths["train"], paths["held_out"]
    if "reports" not in train:
        print("no reports: pip install --no-deps torchxrayvision")
    run = run_on(out, train, options.epochs)
    print(f"{'held out':<12}" + "".join(f"{k:>12}" for k in (*held_out, "named")))
    made, logs = run.model, {}
    for number in (0, *MIXES):
        if number:
            made = train_stage(run, number, made)
            logs[f"stage {number}: {', '.join(MIXES[number])}"] = log_of(out / f"stage{number}")
        found = evaluate(made, held_out)
        label = f"stage {number}" if number else "before"
        print(f"{label:<12}" + "".join(f"{v:>12.3f}" for v in found.values()), flush=True)
    print(draw_curves(out / "curves.svg", logs))
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
