"""First-fit-decreasing, packs as forward takes them, and the sampler's state."""

import numpy as np
import pytest
import torch
from material import REPORT_LENGTHS, image
from PIL import Image

from medgpt.config import MedGPTConfig
from medgpt.data.collator import Document, blank_image, collate, join_packs
from medgpt.data.ffd import first_fit_decreasing, plan_packs
from medgpt.data.packing import PackedDataset, PackSampler, encode
from medgpt.data.rows import write_rows
from medgpt.processor import MedGPTProcessor
from medgpt.tokenizer import harmony_tokenizer

# of the public-domain "Gray's Anatomy" (1918) and our own words
ANSWERS = (
    "The heart is a hollow muscular organ of a somewhat conical form.",
    "No acute cardiopulmonary abnormality.",
    "The lungs are the essential organs of respiration; they are two in number, placed one on "
    "either side within the thorax, and separated from each other by the heart.",
    "The retina is the nervous membrane of the eye.",
)


@pytest.fixture(scope="module")
def processor():
    return MedGPTProcessor.from_config(MedGPTConfig.tiny(), harmony_tokenizer())


def a_row(number: int, picture: str | None = None) -> dict:
    content = [{"type": "text", "text": f"Question {number}: what is shown?"}]
    content = [{"type": "image"}, *content] if picture else content
    answer = {"role": "assistant", "content": ANSWERS[number % len(ANSWERS)]}
    if number % 5 == 0:
        answer["thinking"] = "The contour is smooth. " * (1 + number % 3)
    return {
        "id": f"row-{number}",
        "images": [{"path": picture}] if picture else [],
        "messages": [{"role": "user", "content": content}, answer],
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """60 rows in two files, every sixth with a picture."""
    folder = tmp_path_factory.mktemp("rows")
    Image.fromarray(image("histology")).save(folder / "histology.png")
    Image.fromarray(image("fundus")[:, :700]).save(folder / "fundus.jpg")
    pictures = {0: "histology.png", 6: "fundus.jpg"}
    rows = [a_row(n, pictures.get(n % 12)) for n in range(60)]
    write_rows(folder / "rows-0.parquet", rows[:25])
    write_rows(folder / "rows-1.parquet", rows[25:])
    return folder


def slow_first_fit(lengths, capacity):
    packs = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        room = [p for p in packs if sum(lengths[j] for j in p) + lengths[i] <= capacity]
        if room:
            room[0].append(i)
        else:
            packs.append([i])
    return packs


@pytest.mark.parametrize("capacity", [175, 256, 1024])
def test_the_tree_finds_the_first_pack_with_room(capacity):
    found = first_fit_decreasing(REPORT_LENGTHS, capacity)
    assert found == slow_first_fit(REPORT_LENGTHS, capacity)
    with pytest.raises(ValueError, match="expected lengths from 1 to 100, got"):
        first_fit_decreasing(REPORT_LENGTHS, 100)


@pytest.mark.parametrize(("length", "copies"), [(512, 8), (4096, 64), (32768, 512)])
def test_packs_of_real_report_lengths_are_full(length, copies):
    lengths = np.tile(REPORT_LENGTHS, copies)
    documents, offs = plan_packs(lengths, length, seed=3, window_packs=16)
    assert sorted(documents) == list(range(len(lengths)))
    tokens = np.add.reduceat(lengths[documents], offs[:-1])
    assert tokens.max() <= length
    assert lengths.sum() / (length * len(tokens)) >= 0.97
    # one after the other, a pack closed at the first that does not fit, is less full
    closed, room = 1, length
    for n in lengths:
        closed, room = (closed, room - n) if n <= room else (closed + 1, length - n)
    assert len(tokens) <= closed


@pytest.mark.slow
@pytest.mark.parametrize("length", [1024, 2048, 4096, 32768])
def test_packs_of_all_real_reports_are_full(length):
    from data_material import reports

    encode = harmony_tokenizer().encode
    texts = [f"FINDINGS: {f}\nIMPRESSION: {i}" for f, i in reports()]
    lengths = np.array([len(encode(text, add_special_tokens=False)) for text in texts])
    assert len(lengths) == 3419
    assert tuple(lengths[:64]) == REPORT_LENGTHS
    if length == 32768:  # one epoch would fill eight packs; a stage has many
        lengths = np.tile(lengths, 16)
    documents, offs = plan_packs(lengths, length, seed=1)
    assert len(documents) == len(lengths)
    fill = lengths.sum() / (length * (len(offs) - 1))
    assert fill >= 0.97
    print(f"{length}: {fill:.4f}")


def test_plans_are_of_seed_and_epoch_alone():
    lengths = np.tile(REPORT_LENGTHS, 8)
    plans = {
        (seed, epoch): plan_packs(lengths, 512, seed=seed, epoch=epoch, window_packs=8)
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    again = plan_packs(lengths, 512, seed=1, epoch=1, window_packs=8)
    assert all(np.array_equal(a, b) for a, b in zip(again, plans[1, 1], strict=True))
    assert len({plan[0].tobytes() for plan in plans.values()}) == 4
    documents, offs = plan_packs([600, 0, 512, 1], 512)
    assert sorted(documents) == [2, 3]
    assert list(offs) == [0, 1, 2]


def test_a_pack_has_the_arguments_of_forward(processor, folder):
    packs = PackedDataset(folder, processor, 2048, seed=1)
    seen = []
    for index in range(len(packs)):
        pack, numbers = packs[index], packs.members(index)
        documents = [
            encode(packs.rows[int(n)], processor, folder, reasoning_effort="medium")
            for n in numbers
        ]
        seen += packs.ids(index)
        lengths = [len(d.input_ids) for d in documents]
        assert pack["cu_seq_lens_q"].tolist() == np.cumsum([0, *lengths]).tolist()
        assert pack["cu_seq_lens_q"].dtype == torch.int32
        assert pack["max_length_q"] == pack["max_length_k"] == max(lengths)
        assert pack["input_ids"].shape == pack["labels"].shape == (1, sum(lengths))
        labels, ids = pack["labels"][0], pack["input_ids"][0]
        starts = pack["cu_seq_lens_q"][:-1].long()
        assert (labels[starts] == -100).all()
        assert (pack["position_ids"][0][starts] == 0).all()
        assert (labels[labels != -100] == ids[labels != -100]).all()
        masks = np.concatenate([d.targets for d in documents])
        assert ((labels != -100).numpy() == masks).all()
        assert "loss_weights" not in pack
        tokens = int((ids == processor.image_token_id).sum())
        if tokens:
            unit = processor.image_processor.unit
            assert pack["image_sizes"].dtype == torch.int32
            assert int((pack["image_sizes"] // unit).prod(1).sum()) == tokens
            pixels = int(pack["image_sizes"].long().prod(1).sum()) * 3
            assert pack["pixel_values"].shape == (pixels,)
            assert pack["pixel_values"].dtype == torch.uint8
        else:
            assert "pixel_values" not in pack
    assert sorted(seen) == sorted(f"row-{n}" for n in range(60))


def test_loss_is_on_what_an_assistant_writes(processor, folder):
    packs = PackedDataset(folder, processor, 2048)
    document = encode(packs.rows[5], processor, folder)  # without picture, with thinking
    said = processor.tokenizer.decode(document.input_ids[document.targets])
    assert "The contour is smooth." in said
    assert ANSWERS[1] in said
    assert said.endswith("<|return|>")
    assert "Question" not in said
    unsaid = processor.tokenizer.decode(document.input_ids[~document.targets])
    assert "what is shown?" in unsaid
    assert ANSWERS[1] not in unsaid


def test_weights_are_one_over_the_root_of_the_targets(processor, folder):
    pack = PackedDataset(folder, processor, 2048, weighting="sqrt")[0]
    weights, labels = pack["loss_weights"][0], pack["labels"][0]
    assert ((weights > 0) == (labels != -100)).all()
    for start, end in zip(pack["cu_seq_lens_q"][:-1], pack["cu_seq_lens_q"][1:], strict=True):
        n = int((labels[start:end] != -100).sum())
        assert weights[start:end].sum().item() == pytest.approx(np.sqrt(n), rel=1e-5)
    with pytest.raises(ValueError, match=r'weighting None or "sqrt", got'):
        collate([Document(np.arange(2), np.ones(2, bool))], weighting="n")


def test_padding_is_a_document_of_its_own_without_loss(processor, folder):
    pack = PackedDataset(folder, processor, 2048, pad=True, weighting="sqrt")[0]
    bare = PackedDataset(folder, processor, 2048)[0]
    tokens = bare["input_ids"].shape[1]
    assert pack["input_ids"].shape == (1, 2048)
    assert pack["cu_seq_lens_q"].tolist() == [*bare["cu_seq_lens_q"].tolist(), 2048]
    assert (pack["labels"][0, tokens:] == -100).all()
    assert (pack["loss_weights"][0, tokens:] == 0).all()
    assert torch.equal(pack["input_ids"][:, :tokens], bare["input_ids"])


def test_a_blank_image_stands_in_packs_without_one(processor, folder):
    packs = PackedDataset(folder, processor, 512, blank=True)
    assert packs.skipped["too_long"] == 10  # all with a picture
    for index in range(len(packs)):
        pack = packs[index]
        assert pack["image_sizes"].tolist() == [[28, 28]]
        assert pack["input_ids"].shape[1] <= 512
        assert (pack["labels"][0, -3:] == -100).all()
    assert len(blank_image(28, processor.image_ids).pixel_values) == 3 * 28 * 28


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(v, b[k]) if isinstance(v, torch.Tensor) else v == b[k] for k, v in a.items()
    )


def test_workers_do_not_change_the_order(processor, folder):
    packs = PackedDataset(folder, processor, 1536, seed=2)
    sampler = PackSampler(packs)
    kwargs = {"batch_size": 1, "sampler": sampler, "collate_fn": join_packs}
    alone = list(torch.utils.data.DataLoader(packs, **kwargs))
    shared = list(torch.utils.data.DataLoader(packs, num_workers=2, **kwargs))
    assert len(alone) == len(packs)
    assert all(map(same, alone, shared))
    packs.set_epoch(1)
    assert not all(map(same, alone, [packs[i] for i in range(min(len(packs), len(alone)))]))


def test_a_sampler_goes_on_where_training_stood(processor, folder):
    packs = PackedDataset(folder, processor, 1024, seed=2)
    whole = list(PackSampler(packs))
    sampler = PackSampler(packs)
    ahead = iter(sampler)
    assert [next(ahead) for _ in range(5)] == whole[:5]  # a loader that reads ahead
    sampler.advance(2)
    state = sampler.state_dict()
    assert state == {"epoch": 0, "position": 2}
    resumed = PackSampler(PackedDataset(folder, processor, 1024, seed=2))
    resumed.load_state_dict(state)
    assert list(resumed) == whole[2:]
    resumed.set_epoch(1)
    assert resumed.state_dict() == {"epoch": 1, "position": 0}
    ranks = [list(PackSampler(packs, rank=r, world_size=2)) for r in range(2)]
    assert len(ranks[0]) == len(ranks[1])
    assert [p for pair in zip(*ranks, strict=True) for p in pair] == whole[: 2 * len(ranks[0])]


def test_counts_are_stored_and_belong_to_the_settings(processor, tmp_path):
    rows = [a_row(n) for n in range(8)]
    write_rows(tmp_path / "rows.parquet", rows)
    first = PackedDataset(tmp_path, processor, 512)
    (stored,) = tmp_path.glob("lengths-*.npy")
    changed = np.load(stored)
    changed[0] += 1
    np.save(stored, changed)
    packs = PackedDataset(tmp_path, processor, 512)
    assert packs.lengths[0] == first.lengths[0] + 1  # it was read, not counted
    with pytest.raises(ValueError, match=r"row row-0: expected .* tokens as counted before, got"):
        packs._document(0)
    PackedDataset(tmp_path, processor, 512, reasoning_effort="high")
    assert len(list(tmp_path.glob("lengths-*.npy"))) == 2
    write_rows(tmp_path / "rows.parquet", rows[::-1])
    assert PackedDataset(tmp_path, processor, 512).lengths[-1] == first.lengths[0]
    two = PackedDataset([tmp_path, tmp_path], processor, 512, workers=2)
    assert len(two.lengths) == 16


def test_packs_join_to_one_row(processor, folder):
    packs = PackedDataset(folder, processor, 1024, weighting="sqrt")
    rows = [packs[i] for i in range(3)]
    joined = join_packs(rows)
    numbers = [n for i in range(3) for n in packs.members(i)]
    together = collate([packs._document(int(n)) for n in numbers], weighting="sqrt")
    assert same(joined, together)
    with pytest.raises(ValueError, match="expected packs of the same arguments"):
        join_packs([rows[0], {**rows[1], "loss_weights": None} | {"more": 1}])


def test_nothing_to_train_on_is_said(processor, tmp_path):
    write_rows(tmp_path / "rows.parquet", [a_row(1)])
    with pytest.raises(ValueError, match="expected rows of at most 16 tokens, got none"):
        PackedDataset(tmp_path, processor, 16)
    with pytest.raises(ValueError, match="expected parquet files, got none at"):
        PackedDataset(tmp_path / "absent", processor, 16)
