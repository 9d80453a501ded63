"""Panels, letters, captions, duplicates and benchmarks: each finds its own and nothing else."""

import io
import tracemalloc

import numpy as np
import pytest
from data_material import CAPTIONS, US_WITH_TEXT, crop, dicom, small
from material import NAMES, image
from PIL import Image, ImageDraw, ImageFont

from medgpt.data.captions import caption_fault
from medgpt.data.decontaminate import COMMON, Contamination
from medgpt.data.dedup import Duplicates
from medgpt.data.features import Features, features, hamming, image_hash, minhash, words
from medgpt.data.glyphs import letters, text_lines
from medgpt.data.panels import is_screenshot, names_panels, panel_count
from medgpt.images import load_image

WITH_TEXT = (US_WITH_TEXT, "OBXXXX1A.dcm", "gdcm-US-ALOKA-16.dcm", "JPGLosslessP14SV1_1s_1f_8b.dcm")


def drawn(picture: np.ndarray, text: str, place, size: int = 18, fill="white") -> np.ndarray:
    page = Image.fromarray(picture)
    ImageDraw.Draw(page).text(place, text, fill=fill, font=ImageFont.load_default(size))
    return np.asarray(page)


def as_jpeg(picture: np.ndarray) -> np.ndarray:
    out = io.BytesIO()
    Image.fromarray(picture).save(out, "JPEG", quality=80)
    return np.asarray(Image.open(out))


def montage(names, gap: int, tone: int, columns: int, side: int = 240) -> np.ndarray:
    rows = -(-len(names) // columns)
    shape = rows * (side + gap) - gap, columns * (side + gap) - gap, 3
    page = np.full(shape, tone, np.uint8)
    for place, name in enumerate(names):
        y, x = (n * (side + gap) for n in divmod(place, columns))
        page[y : y + side, x : x + side] = Image.fromarray(image(name)).resize((side, side))
    return page


@pytest.mark.parametrize("name", NAMES)
def test_clean_medical_images_have_no_letters_and_one_panel(name):
    assert letters(image(name)) == 0
    assert panel_count(image(name)) == 1
    assert not is_screenshot(image(name))


@pytest.mark.parametrize("name", WITH_TEXT)
def test_letters_of_a_scanner_are_found(name):
    assert letters(load_image(dicom(name))) >= 20


@pytest.mark.parametrize("jpeg", [False, True])
@pytest.mark.parametrize("size", [12, 18, 32])
def test_a_name_drawn_into_a_radiograph_is_found(size, jpeg):
    picture = small("mr_shoulder", 640)
    clear = picture[: picture.shape[0] // 2]
    named = drawn(picture, "QUIMBY ADA 1931", (10, 10), size)
    named = as_jpeg(named) if jpeg else named
    (line,) = text_lines(named)
    assert line.top < clear.shape[0]
    assert line.letters >= 8
    assert letters(drawn(picture, "R", (10, 10), size)) == 0  # a side's mark names nobody


@pytest.mark.parametrize("jpeg", [False, True])
@pytest.mark.parametrize(("gap", "tone"), [(4, 255), (12, 255), (6, 0)])
def test_figures_of_several_panels_are_found(gap, tone, jpeg):
    shown = as_jpeg if jpeg else np.asarray
    assert panel_count(shown(montage(["chest", "histology"], gap, tone, 2))) == 2
    assert panel_count(shown(montage(["ct_spine", "chest"], gap, tone, 1))) == 2
    assert (
        panel_count(shown(montage(["chest", "ct_spine", "histology", "ankle"], gap, tone, 2))) > 1
    )
    alone = np.full((280, 280, 3), tone, np.uint8)
    alone[20:260, 20:260] = montage(["histology"], 0, 0, 1)
    assert panel_count(shown(alone)) == 1  # a frame is no gutter


def test_captions_that_name_panels():
    assert names_panels("(A) Axial CT. (B) Coronal MRI.")
    assert names_panels("a) before and b) after treatment")
    assert names_panels("Left panel: baseline")
    assert not names_panels("Vitamin B deficiency, type A")
    assert not names_panels("Hepatitis (a viral disease) of the liver")
    assert not names_panels(CAPTIONS[0])


def test_a_screenshot_is_letters_on_flat_ground():
    screen = np.full((480, 640, 3), 224, np.uint8)
    screen[60:300, 20:260] = small("ct_spine", 240)[:240, :240]
    for n in range(12):
        screen = drawn(screen, f"Menu item {n}: settings", (300, 20 + 36 * n), 16, "black")
    assert is_screenshot(screen)
    assert not is_screenshot(load_image(dicom(US_WITH_TEXT)))  # letters, but no interface
    assert not is_screenshot(np.full((480, 640, 3), 224, np.uint8))


def test_captions_without_clinical_content():
    for caption in (*CAPTIONS, "H&E stain, 40x", "Stable cardiomegaly without effusion."):
        assert caption_fault(caption) is None
    assert caption_fault("Figure 1.") == "empty_caption"
    assert caption_fault("Representative image of the data.") == "not_clinical"
    assert caption_fault("Flow chart of patients with pneumonia") == "no_patient"
    assert caption_fault("Rates: 12.3 4.5 0.03 7.8 9.1 for the liver, lung") == "numbers"


def a_row(text: str, images=(), question: str = "What is seen?") -> tuple[dict, list]:
    said = [{"role": "user", "content": [{"type": "text", "text": question}]}]
    said.append({"role": "assistant", "content": [{"type": "text", "text": text}]})
    return {"id": "r", "images": [], "messages": said, "meta": {}}, list(images)


LONG = (
    "The lungs are clear. The heart is of normal size. There is no pleural effusion and no "
    "pneumothorax. The bones of the thorax are intact and the diaphragm is smooth on both sides."
)


def test_duplicates_are_of_text_and_images_together():
    fundus, histology = crop("fundus", 1), crop("histology", 1)
    near = as_jpeg(fundus)
    assert not np.array_equal(near, fundus)
    found = Duplicates()
    faults = [
        found.fault(features(*a_row(*args)))
        for args in (
            (LONG, [fundus]),
            (LONG, [fundus]),
            (LONG.upper() + "  ", [fundus]),  # the same words
            (LONG, [histology]),  # the same words of another patient
            (LONG, [near]),
            (LONG.replace("smooth", "even"), [near]),
            ("Another text on a retina that shows no lesion at all.", [fundus]),
            (LONG, []),
            (LONG, [fundus, fundus]),
        )
    ]
    same, close = "duplicate", "near_duplicate"
    assert faults == [None, same, same, None, close, close, None, None, None]


def test_duplicates_by_image_alone():
    found = Duplicates(mode="image")
    faults = [
        found.fault(features(*a_row(text, images)))
        for text, images in (
            ("One caption of a retina.", [crop("fundus", 1)]),
            ("Quite another one.", [as_jpeg(crop("fundus", 1))]),
            ("One caption of a retina.", [crop("fundus", 2)]),
            ("And a third of it.", [crop("fundus", 1)]),
            (LONG, []),
            (LONG, []),
        )
    ]
    assert faults == [None, "near_duplicate", None, "duplicate", None, "duplicate"]


def synthetic(rng: np.random.Generator, images: int) -> Features:
    minhash = rng.integers(0, 2**32, 128, dtype=np.uint32).tobytes()
    return Features(rng.bytes(16), rng.bytes(16), minhash, rng.bytes(32 * images))


def test_a_needle_among_many_is_found_in_little_memory(tmp_path):
    rng, found = np.random.default_rng(0), Duplicates(path=tmp_path / "index")
    rows = [synthetic(rng, n % 2) for n in range(4000)]
    tracemalloc.start()
    assert all(found.fault(row) is None for row in rows)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200 * len(rows)  # of Python's; one row's features are 600 bytes
    assert (tmp_path / "index").stat().st_size < 3000 * len(rows)
    for number in (1234, 1235):
        near = rows[number]._replace(text=rng.bytes(16), images=rng.bytes(16))
        assert found.fault(near) == "near_duplicate"
        far = near._replace(text=rng.bytes(16), minhash=rng.bytes(512))
        assert found.fault(far) is None
    bits = np.unpackbits(np.frombuffer(rows[11].hashes, np.uint8))
    for count, expected in ((16, "near_duplicate"), (17, None)):
        turned = bits.copy()
        turned[rng.permutation(256)[:count]] ^= 1
        near = rows[11]._replace(images=rng.bytes(16), hashes=np.packbits(turned).tobytes())
        assert found.fault(near) == expected
    found.close()


def test_minhash_is_near_the_jaccard_similarity():
    a, b = words(LONG), words(LONG.replace("diaphragm", "dome").replace("heart", "aorta"))

    def shingles(tokens):
        return {tuple(tokens[i : i + 3]) for i in range(len(tokens) - 2)}

    true = len(shingles(a) & shingles(b)) / len(shingles(a) | shingles(b))
    estimate = (minhash(a) == minhash(b)).mean()
    assert abs(estimate - true) < 3 * np.sqrt(true * (1 - true) / 128)  # three deviations
    assert (minhash(a) == minhash(words(CAPTIONS[0]))).mean() < 0.1


def test_image_hashes_hold_through_sizes_and_formats():
    hashes = np.stack([image_hash(image(name)) for name in NAMES])
    for number, name in enumerate(NAMES):
        again = image_hash(as_jpeg(small(name, 400)))
        distances = hamming(hashes, again)
        assert distances.argmin() == number
        assert (np.delete(distances, number) > 40).all()


STEM = "A 54-year-old farmer has had a dry cough for nine months and now feels short of breath"


def test_benchmarks_are_found_by_thirteen_words_or_eight():
    bench = Contamination()
    bench.add("exam", "long", STEM, ["Asthma", "Farmer's lung"])
    bench.add("exam", "short", "Which bone is broken?", ["The left scaphoid bone", "The radius"])
    bench.add("exam", "tiny", "Is it?", ["yes", "no"])
    bench.close()

    def hits(text: str) -> list:
        return [item for _, item in bench.hits(a_row(text)[0], np.empty((0, 32), np.uint8))]

    tokens = words(STEM)
    assert len(tokens) >= 14
    assert hits(" ".join(tokens[1:14])) == ["long"]
    assert hits(" ".join(tokens[1:13])) == []  # twelve words
    assert hits("Tell me: which bone is BROKEN? The left scaphoid, I think") == []
    assert hits("which bone is broken, the left scaphoid bone or") == ["short"]
    assert hits("Is it? yes no") == []


def test_phrases_of_many_items_are_no_evidence():
    phrase = (
        "Which of the following is the most appropriate next step in the management of this patient"
    )
    for count, expected in ((COMMON, COMMON), (COMMON + 1, 0)):
        bench = Contamination()
        for n in range(count):
            bench.add("exam", str(n), phrase, [f"Option {n}"])
        bench.close()
        assert len(bench.hits(a_row(phrase)[0], np.empty((0, 32), np.uint8))) == expected
