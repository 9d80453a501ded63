"""It looks: after a minute the tiny model answers questions about 40 real images, not without them.

Frames and crops of different regions count as images; every file lies in pydicom, pydicom-data or
scikit-image.
"""

import time

import numpy as np
import pytest
import torch
from material import image
from pydicom.data import get_testdata_file

from medgpt import MedGPTConfig, MedGPTForConditionalGeneration, MedGPTProcessor
from medgpt.images import load_image
from medgpt.tokenizer import harmony_tokenizer

STEPS, BATCH = 100, 21  # a minute on two cores
CORNERS = ((0, 0), (0, 1), (1, 0), (1, 1))
# file, frames, modality, part of the body or None
FILES = (
    ("693_UNCI.dcm", [0], "CT", "head"),
    ("J2K_pixelrep_mismatch.dcm", [0], "CT", "head"),
    ("bad_sequence.dcm", [0], "CT", "neck"),
    ("explicit_VR-UN.dcm", [0], "CT", "abdomen"),
    ("CT_small.dcm", [0], "CT", None),
    ("eCT_Supplemental.dcm", [0, 1], "CT", None),
    ("MR2_UNCI.dcm", [0], "MR", "shoulder"),
    ("MR-SIEMENS-DICOM-WithOverlays.dcm", [0], "MR", "abdomen"),
    ("MR_small.dcm", [0], "MR", None),
    ("emri_small.dcm", [0, 2, 4, 6], "MR", "head"),
    ("emri_small.dcm", [8, 9], "MR", None),
    ("JPGLosslessP14SV1_1s_1f_8b.dcm", [0], "ultrasound", None),
    ("OBXXXX1A.dcm", [0], "ultrasound", None),
    ("US1_UNCI.dcm", [0], "ultrasound", None),
    ("gdcm-US-ALOKA-16.dcm", [0], "ultrasound", None),
    ("examples_rgb_color.dcm", [0], "ultrasound", None),
    ("color-pl.dcm", [0], "ultrasound", "heart"),
    ("color3d_jpeg_baseline.dcm", [0, 40, 80], "ultrasound", "heart"),
    ("examples_ybr_color.dcm", [0], "ultrasound", None),
    ("RG1_UNCI.dcm", [0], "radiograph", "chest"),
    ("RG3_UNCI.dcm", [0], "radiograph", "ankle"),
    ("JPEG-LL.dcm", [0], "bone scan", "whole body"),
)
QUESTIONS = {"modality": "Which modality is this?", "part": "Which part of the body is this?"}


def corners(picture: np.ndarray) -> list[np.ndarray]:
    h, w = (side // 2 for side in picture.shape[:2])
    return [picture[y * h : (y + 1) * h, x * w : (x + 1) * w] for y, x in CORNERS]


def material() -> list[tuple[np.ndarray, dict[str, str]]]:
    """40 images and the answers to their questions."""
    found = []
    for file, frames, modality, part in FILES:
        path = get_testdata_file(file, download=False)
        assert path is not None, f"{file} is in neither pydicom nor pydicom-data"
        answers = {"modality": modality} | ({} if part is None else {"part": part})
        found += [(load_image(path, frame=frame), answers) for frame in frames]
    eye = {"modality": "fundus photograph", "part": "eye"}
    for picture in (image("fundus"), *corners(image("fundus")), image("microaneurysms")):
        found.append((picture, eye))
    for picture in (image("histology"), *corners(image("histology"))):
        found.append((picture, {"modality": "histology"}))
    return found


def rows_of(processor, pictures, questions) -> list[dict]:
    """One chat a question: ids, which of them the assistant writes, and the image."""
    rows = []
    for at, kind, answer in questions:
        chat = [
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": pictures[at]},
                    {"type": "text", "text": QUESTIONS[kind]},
                ],
            },
            {"role": "assistant", "content": answer},
        ]
        rows.append(
            processor.apply_chat_template(
                chat,
                add_generation_prompt=False,
                return_assistant_tokens_mask=True,
                return_tensors="pt",
            )
        )
    return rows


def packed(rows: list[dict]) -> dict:
    """One packed row of several chats, and the labels of the tokens that predict an answer."""
    lengths = torch.tensor([row["input_ids"].shape[1] for row in rows])
    bounds = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)]).to(torch.int32)
    ids = torch.cat([row["input_ids"][0] for row in rows])
    targets = torch.cat([row["assistant_masks"][0] for row in rows]).bool().nonzero().flatten()
    longest = int(lengths.max())
    inputs = {
        "input_ids": ids[None],
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
        "pixel_values": torch.cat([row["pixel_values"] for row in rows]),
        "image_sizes": torch.cat([row["image_sizes"] for row in rows]),
        "logits_to_keep": targets - 1,
        "use_cache": False,
    }
    return {"inputs": inputs, "labels": ids[targets]}


def train(model, rows: list[dict]) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), fused=True)
    g, queue = torch.Generator().manual_seed(0), []
    model.train()
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 10, 2.5 * (1 - step / STEPS))
        if len(queue) < BATCH:
            queue = torch.randperm(len(rows), generator=g).tolist()
        chosen, queue = queue[:BATCH], queue[BATCH:]
        batch = packed([rows[n] for n in chosen])
        optimizer.zero_grad()
        logits = model(**batch["inputs"]).logits[0]
        torch.nn.functional.cross_entropy(logits, batch["labels"]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def accuracy(model, rows) -> float:
    """Of whole answers, each token given those before it: greedy decoding of right answers."""
    model.eval()
    right = 0
    with torch.no_grad():
        for row in rows:
            batch = packed([row])
            guess = model(**batch["inputs"]).logits[0].argmax(-1)
            right += bool((guess == batch["labels"]).all())
    return right / len(rows)


@pytest.mark.slow
def test_a_minute_of_training_makes_it_look():
    torch.manual_seed(0)
    config = MedGPTConfig.tiny(vision_mode="native", max_pixels=112 * 112, min_pixels=56 * 56)
    model = MedGPTForConditionalGeneration(config)
    processor = MedGPTProcessor.from_config(config, harmony_tokenizer())
    found = material()
    assert len(found) == 40
    pictures = [picture for picture, _ in found]
    questions = [
        (n, kind, answer)
        for n, (_, answers) in enumerate(found)
        for kind, answer in answers.items()
    ]
    for kind in QUESTIONS:  # no answer is a good guess
        given = [answer for _, k, answer in questions if k == kind]
        assert max(map(given.count, given)) <= 0.3 * len(given)
    rows = rows_of(processor, pictures, questions)
    started = time.perf_counter()
    train(model, rows)
    seconds = time.perf_counter() - started
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(1)).tolist()
    shuffled = rows_of(processor, [pictures[n] for n in order], questions)
    looks, blind = accuracy(model, rows), accuracy(model, shuffled)
    print(f"{seconds:.0f} s, {len(questions)} questions: {looks:.3f}, images shuffled {blind:.3f}")
    assert looks > 0.95
    assert blind < 0.4
