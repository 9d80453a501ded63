"""Rows of every benchmark's schema become questions; what is no question is counted, not kept."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from medgpt.eval.plan import plan
from medgpt.eval.prompts import (
    CHOICE,
    LABEL,
    PROMPTS,
    SHORT,
    examples_for,
    messages,
    prompt_key,
    user_parts,
)
from medgpt.eval.questions import Question, Rejected, options_of, picture
from medgpt.eval.sources import read_rows
from medgpt.eval.tasks import get, load, tasks
from medgpt.eval.tasks.text import MMLU


def png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    for n in range(1, 6):
        (tmp_path / f"{n}.png").write_bytes(png(n))
    return tmp_path


def frames(count: int) -> dict:
    return {f"image_{n}": f"{n}.png" if n <= count else None for n in range(1, 8)}


VQA = {"image": "1.png", "question": "Is there a mass?", "answer": "No"}
MMMU = {
    "id": "validation_Pharmacy_7",
    "question": "Compare <image 2> with <image 1>.",
    "options": "['Type \"A\"', \"It's B\", '<image 1>']",
    "answer": "B",
    "question_type": "multiple-choice",
    **frames(2),
}
CRITERION = {
    "annotation_id": 3,
    "patient_id": "p1",
    "note": "A man of 60.",
    "trial_title": "A trial",
    "criterion_type": "exclusion",
    "criterion_text": "Age below 18",
    "expert_eligibility": "not excluded",
}
# task: row, kind, gold, letters of the options, images
ROWS = {
    "medqa": (
        {"question": "Q?", "options": {"A": "x", "B": "y"}, "answer_idx": "B", "answer": "y"},
        ("choice", "B", "AB", 0),
    ),
    "medmcqa": (
        {"id": "1", "question": "Q?", "opa": "w", "opb": "x", "opc": "y", "opd": "z", "cop": 3,
         "subject_name": "Anatomy"},
        ("choice", "D", "ABCD", 0),
    ),
    "mmlu_med": (
        {"question": "Q?", "subject": "anatomy", "choices": ["w", "x", "y", "z"], "answer": 2},
        ("choice", "C", "ABCD", 0),
    ),
    "medbullets_4": (
        {"question": "Q?", "opa": "w", "opb": "x", "opc": "y", "opd": "z", "answer_idx": "A"},
        ("choice", "A", "ABCD", 0),
    ),
    "medbullets_5": (
        {"question": "Q?", "options": {x: x for x in "ABCDE"}, "answer_idx": "E"},
        ("choice", "E", "ABCDE", 0),
    ),
    "medxpertqa_text": (
        {"id": "Text-1", "question": "Q?\nAnswer Choices: (A) a (B) b", "label": "J",
         "options": {x: x for x in "ABCDEFGHIJ"}, "medical_task": "Diagnosis",
         "body_system": "Nervous", "question_type": "Reasoning"},
        ("choice", "J", "ABCDEFGHIJ", 0),
    ),
    "medxpertqa_mm": (
        {"id": "MM-1", "question": "Q?", "label": "C", "options": {x: x for x in "ABCDE"},
         "images": ["1.png", "2.png"], "medical_task": "Diagnosis", "body_system": "Nervous",
         "question_type": "Reasoning"},
        ("choice", "C", "ABCDE", 2),
    ),
    "pubmedqa": (
        {"pubid": 1, "QUESTION": "Q?", "CONTEXTS": ["c1", "c2"], "final_decision": "maybe"},
        ("label", "maybe", "", 0),
    ),
    "medframeqa": (
        {"question": "Q?", "options": ["x", "y"], "correct_answer": "A", "system": "CNS",
         "organ": "brain", "modality": "MRI", "video_id": "v", **frames(5)},
        ("choice", "A", "AB", 5),
    ),
    "mmmu_med_dev": (MMMU, ("choice", "B", "ABC", 2)),
    "mmmu_med_val": (
        {**MMMU, "question_type": "open", "options": "[]", "answer": "12"},
        ("open", "12", "", 2),
    ),
    "mmmu_med_pro_4": (
        {k: v for k, v in MMMU.items() if k != "question_type"} | {"subject": "Pharmacy"},
        ("choice", "B", "ABC", 2),
    ),
    "mmmu_med_pro_10": (
        {**MMMU, "options": str(list("abcdefghij")), "answer": "J", "subject": "Public Health"},
        ("choice", "J", "ABCDEFGHIJ", 2),
    ),
    "slake": (
        {"img_name": "2.png", "question": "器官?", "answer": "肝脏", "q_lang": "zh",
         "answer_type": "OPEN", "modality": "CT", "qid": 5},
        ("open", "肝脏", "", 1),
    ),
    "vqa_rad": (VQA, ("closed", "No", "", 1)),
    "path_vqa": ({**VQA, "answer": "liver"}, ("open", "liver", "", 1)),
    "pmc_vqa": (
        {"Figure_path": "3.png", "Question": "Q?", "Choice A": " A:w ", "Choice B": "B: x",
         "Choice C": "C:y", "Choice D": "D:z", "Answer": "x", "Answer_label": "B"},
        ("choice", "B", "ABCD", 1),
    ),
    "omnimedvqa": (
        {"question_id": "o1", "question": "Q?", "gt_answer": "MR", "image_path": "4.png",
         "option_A": "CT", "option_B": "MR.", "option_C": "X-ray", "option_D": "",
         "modality_type": "MR"},
        ("choice", "B", "ABC", 1),
    ),
    "iu_xray_findings": (
        {"study_id": "s", "images": ["1.png", "2.png"], "findings": "Clear lungs.",
         "impression": "Normal.", "indication": "Cough", "comparison": None},
        ("report", "Clear lungs.", "", 2),
    ),
    "mimic_cxr_impression": (
        {"subject_id": "p", "findings": "Clear lungs.", "impression": "Normal.", "age": 60},
        ("report", "Normal.", "", 0),
    ),
    "trial_criteria": (CRITERION, ("choice", "B", "ABCD", 0)),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_a_row_of_the_schema(name, folder):
    row, (kind, answer, letters, images) = ROWS[name]
    data = folder / "rows.jsonl"
    data.write_text(json.dumps(row), encoding="utf-8")
    loaded = load(get(name), data)
    question = loaded.questions[0]
    assert (question.kind, question.answer) == (kind, answer)
    assert "".join(question.options) == letters
    assert len(question.images) == images == loaded.report["images"]
    assert loaded.report["rows"] == 1
    assert len(loaded.report["sha256"]) == 64
    # every image is sent
    parts = user_parts(question, get(name).prompt)
    assert sum(part["type"] == "image" for part in parts) >= images


def test_every_task_has_a_row_or_shares_a_reader_with_one():
    readers = {tasks()[name].read for name in ROWS}
    others = {name for name, task in tasks().items() if task.read not in readers}
    assert others == {n for n in tasks() if n.startswith("trial_") and "criteria" not in n}


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("medqa", {"answer_idx": "E"}, "no option's letter"),
        ("medqa", {"question": " "}, "no question text"),
        ("medmcqa", {"cop": 4}, "outside the options"),
        ("medmcqa", {"cop": -1}, "outside the options"),
        ("medframeqa", frames(1), "not 2 to 5 images"),
        ("medframeqa", {"image_2": "../secret.png"}, "outside the data's folder"),
        ("medframeqa", {"image_2": "/etc/hostname"}, "outside the data's folder"),
        ("medframeqa", {"image_2": "https://example.org/x.png"}, "outside the data's folder"),
        ("medframeqa", {"image_2": "9.png"}, "not there"),
        ("mmmu_med_dev", {"options": "__import__('os').getcwd()"}, "no list"),
        ("mmmu_med_pro_4", {"options": str(list("abcde")), "answer": "A"}, "more than 4 options"),
        ("pubmedqa", {"final_decision": "perhaps"}, "other than yes, no, maybe"),
        ("omnimedvqa", {"gt_answer": "MRI"}, "not exactly one option"),
        ("omnimedvqa", {"option_C": "mr"}, "not exactly one option"),
        ("trial_criteria", {"expert_eligibility": "included"}, "another type"),
        ("slake", {"answer": ""}, "no answer"),
        ("mimic_cxr_impression", {"impression": None}, "no impression"),
    ],
)
def test_rows_that_are_no_questions_are_counted(name, change, reason, folder):
    good = ROWS[name][0]
    identity = next((k for k in ("id", "question_id", "qid", "annotation_id", "subject_id", "pubid")
                     if k in good), None)  # fmt: skip
    bad = {**good, **change, **({identity: "other"} if identity else {})}
    data = folder / "rows.jsonl"
    data.write_text(f"{json.dumps(good)}\n{json.dumps(bad)}\n", encoding="utf-8")
    loaded = load(get(name), data)
    assert len(loaded.questions) == 1
    assert sum(loaded.report["rejected"].values()) == 1
    assert reason in next(iter(loaded.report["rejected"]))


def test_other_columns_of_the_same_data(folder):
    nested = {"id": 1, "data": {"Question": "Q?", "Context": ["c"], "Final Decision": "yes"}}
    assert get("pubmedqa").read(nested, None, 0).answer == "yes"
    labelled = {
        "pubid": 1,
        "question": "Q?",
        "context": {"contexts": ["c"]},
        "final_decision": "no",
    }
    assert get("pubmedqa").read(labelled, None, 0).text == "c\n\nQ?"
    version2 = {**ROWS["pmc_vqa"][0], "Answer": "C", "Answer_label": None}
    assert get("pmc_vqa").read(version2, folder, 0).answer == "C"
    hub = {**VQA, "image": {"bytes": png(1), "path": None}}
    assert get("vqa_rad").read(hub, None, 0).images == (png(1),)
    assert get("medqa").read({**ROWS["medqa"][0], "options": [{"key": "A", "value": "x"},
        {"key": "B", "value": "y"}]}, None, 0).options == {"A": "x", "B": "y"}  # fmt: skip
    assert get("mmlu_med").read({**ROWS["mmlu_med"][0], "subject": "astronomy"}, None, 0) is None
    assert get("mmmu_med_pro_10").read({**MMMU, "subject": "Music"}, folder, 0) is None
    assert len(MMLU) == 6


def test_medxpertqa_options_stand_once():
    question = get("medxpertqa_text").read(ROWS["medxpertqa_text"][0], None, 0)
    assert question.text == "Q?"
    text = user_parts(question, CHOICE)[0]["text"]
    assert text.startswith("Q?\nA. A\nB. B\n")
    assert text.endswith("Answer with the option's letter from the given choices directly.")


def test_images_stand_where_the_text_names_them(folder):
    question = get("mmmu_med_dev").read(MMMU, folder, 0)
    parts = user_parts(question, CHOICE)
    order = [p.get("text", p.get("image")) for p in parts]
    assert order[:4] == ["Compare ", folder / "2.png", " with ", folder / "1.png"]
    assert order[5] == folder / "1.png"  # named again by option C
    missing = question._replace(text="See <image 3>.")
    assert [p["type"] for p in user_parts(missing, CHOICE)] == ["image", "image", "text"]


def test_trials_of_three_files(tmp_path):
    (tmp_path / "qrels").mkdir()
    (tmp_path / "queries.jsonl").write_text('{"_id": "p1", "text": "A man of 60."}\n')
    (tmp_path / "corpus.jsonl").write_text('{"_id": "t1", "title": "T", "text": "Adults."}\n')
    (tmp_path / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\np1\tt1\t2\n")
    loaded = load(get("trial_trec2021"), tmp_path)
    question = loaded.questions[0]
    assert question.options[question.answer] == "eligible"
    assert question.cluster == "p1"
    assert len(loaded.report["files"]) == 3
    (tmp_path / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\np2\tt1\t2\n")
    with pytest.raises(ValueError, match="every pair's patient"):
        load(get("trial_trec2021"), tmp_path)


def test_equal_rows_have_an_equal_hash_in_any_file(tmp_path):
    rows = [{"question": "Q?", "options": {"A": "x", "B": "y"}, "answer_idx": "A"}] * 2
    for name, text in (
        ("test.json", json.dumps(rows)),
        ("test.jsonl", "".join(json.dumps(r) + "\n" for r in rows)),
    ):
        (tmp_path / name).write_text(text)
    one, two = (read_rows(tmp_path / name) for name in ("test.json", "test.jsonl"))
    assert one.loaded["sha256"] == two.loaded["sha256"]
    assert one.loaded["files"] != two.loaded["files"]
    rows[0]["answer_idx"] = "B"
    (tmp_path / "test.json").write_text(json.dumps(rows))
    assert read_rows(tmp_path / "test.json").loaded["sha256"] != two.loaded["sha256"]


def test_files_of_a_folder_by_split_and_config(tmp_path):
    for config in ("Pharmacy", "Music"):
        (tmp_path / config).mkdir()
        for split in ("dev", "validation"):
            row = {**MMMU, "id": f"{split}_{config}_1", "question": "Q?", **frames(0)}
            row = {k: v for k, v in row.items() if not k.startswith("image_")}
            path = tmp_path / config / f"{split}-00000-of-00001.jsonl"
            path.write_text(json.dumps(row))
    loaded = load(get("mmmu_med_dev"), tmp_path)
    assert [q.id for q in loaded.questions] == ["dev_Pharmacy_1"]
    assert load(get("mmmu_med_val"), tmp_path).questions[0].groups == {"subject": "Pharmacy"}
    with pytest.raises(ValueError, match="expected files of split test"):
        load(get("medqa"), tmp_path)


@pytest.mark.slow
def test_parquet_equals_jsonl(tmp_path):
    """Needs pyarrow (medgpt-kernels[train] has it)."""
    import pyarrow
    from pyarrow import parquet

    rows = [{"question": f"Q{n}?", "choices": ["x", "y"], "subject": "anatomy", "answer": n}
            for n in range(2)]  # fmt: skip
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "test-00000.parquet")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    one = read_rows(tmp_path / "test-00000.parquet")
    assert one.loaded["sha256"] == read_rows(tmp_path / "rows.jsonl").loaded["sha256"]
    assert load(get("mmlu_med"), tmp_path / "test-00000.parquet").questions[1].answer == "B"


def test_bad_files_say_what_and_quote_nothing(tmp_path):
    secret = tmp_path / "rows.jsonl"
    secret.write_text('{"question": "John Smith')
    with pytest.raises(ValueError, match=r"expected JSON in rows.jsonl line 1") as error:
        read_rows(secret)
    assert "Smith" not in str(error.value)
    secret.write_text("[1]")
    with pytest.raises(ValueError, match="expected an object"):
        read_rows(secret)
    secret.write_text("\n")
    with pytest.raises(ValueError, match="got none"):
        read_rows(secret)
    secret.write_text('{"id": "1", "question": "Q?", "options": {"A": "x", "B": "y"}, '
                      '"answer_idx": "A"}\n' * 2)  # fmt: skip
    with pytest.raises(ValueError, match="ids once each"):
        load(get("medqa"), secret)
    with pytest.raises(ValueError, match=r"expected one such as medqa, .*, got medqq"):
        get("medqq")
    with pytest.raises(Rejected):
        options_of({"A": "x", "C": "y"})


def test_slices_of_rows_that_carry_them(tmp_path):
    data = tmp_path / "rows.jsonl"
    row = ROWS["mimic_cxr_impression"][0]
    rows = [
        {**row, "id": "1", "age": 67, "sex": "F", "site": "ward"},
        {**row, "id": "2", "age": None},
    ]
    data.write_text("".join(json.dumps(r) + "\n" for r in rows))
    first, second = load(get("mimic_cxr_impression"), data).questions
    assert first.groups == {"age": "60-69", "sex": "F", "site": "ward"}
    assert first.facts == {"age": 67, "sex": "F", "site": "ward"}
    assert second.groups == {}


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "secret.png").write_bytes(png(1))
    (tmp_path / "data" / "link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(Rejected, match="not there"):
        picture("link.png", tmp_path / "data")


def many(count: int) -> list[Question]:
    return [
        Question(str(n), "label", f"Text {n}", "yes", labels=("yes", "no"), cluster=f"p{n // 2}")
        for n in range(count)
    ]


def test_examples_are_seeded_and_leak_nothing():
    pool = many(12)
    pool.append(pool[0]._replace(id="copy", cluster="another", text="text 0 "))
    for question in pool[:12]:
        drawn = examples_for(question, pool, 5, seed=3)
        assert drawn == examples_for(question, list(pool), 5, seed=3)
        assert all(e.cluster != question.cluster for e in drawn)
        assert all(e.text.strip().lower() != question.text.lower() for e in drawn)
    assert examples_for(pool[0], pool, 5, 3) != examples_for(pool[0], pool, 5, 4)
    with pytest.raises(ValueError, match="expected 9 examples or more, got 4"):
        examples_for(pool[5], pool[:5], 9, 0)
    pictured = pool[0]._replace(images=(png(1),))
    twin = pool[5]._replace(images=(png(1),))
    assert twin not in examples_for(pictured, [*pool[1:5], *pool[6:12], twin], 8, 0)


def test_messages_with_an_example():
    pool = many(4)
    turns = messages(pool[0], LABEL, [pool[3]])
    assert [t["role"] for t in turns] == ["user", "assistant", "user"]
    assert turns[1]["content"] == "yes"
    assert turns[2]["content"][0]["text"] == "Text 0\nAnswer with one of: yes, no."
    chinese = pool[0]._replace(variant="zh")
    assert "短语" in user_parts(chinese, SHORT)[0]["text"]


def test_a_question_cannot_write_the_template():
    question = Question("1", "choice", "{options} {labels}", "A", {"A": "{question}", "B": "y"})
    assert user_parts(question, CHOICE)[0]["text"].startswith("{options} {labels}\nA. {question}")


def test_keys_follow_what_is_sent(folder):
    question = get("vqa_rad").read(VQA, folder, 0)
    key = prompt_key(messages(question, SHORT))
    by_bytes = question._replace(images=(png(1),))
    assert prompt_key(messages(by_bytes, SHORT)) == key
    assert prompt_key(messages(question._replace(images=(png(2),)), SHORT)) != key
    assert prompt_key(messages(question, LABEL)) != key
    assert len({p.hash for p in PROMPTS.values()}) == len(PROMPTS)
    # a change of these is a change of every result: give the prompt a new version
    assert CHOICE.hash == CHOICE._replace(version=1).hash != CHOICE._replace(version=2).hash


def test_batches_depend_on_the_questions_alone(tmp_path):
    rows = [{"question": f"Q{n % 7} {'x' * n}", "options": {"A": "x", "B": "y"}, "answer_idx": "A"}
            for n in range(10)] + [{"question": "Q0 ", "options": {"A": "x", "B": "y"},
            "answer_idx": "B"}]  # fmt: skip
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r in rows))
    made = plan(get("medqa"), data)
    flat = [i for batch in made.batches(4) for i in batch]
    assert sorted(flat) == list(range(10))  # the eleventh asks what the first asked
    assert made.keys[10] == made.keys[0]
    assert made.batches(4) == plan(get("medqa"), data).batches(4)
    assert plan(get("medqa"), data, limit=3).loaded["asked"] == 3
