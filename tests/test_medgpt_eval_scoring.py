"""Scores by hand, the journal after a kill, reports, contamination: all that needs no model."""

import io
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from medgpt.cli import main, parser
from medgpt.eval import contamination
from medgpt.eval.cli import spelled
from medgpt.eval.comparison import compare_runs
from medgpt.eval.journal import Completion, Journal
from medgpt.eval.published import MODELS, TABLE, published
from medgpt.eval.questions import Question
from medgpt.eval.report import collect, write_report
from medgpt.eval.scoring import score, summarize, token_scores

CHOICE = Question("q1", "choice", "Q?", "B", {"A": "x", "B": "y"}, groups={"organ": "lung"})
LABEL = Question("q2", "label", "Q?", "maybe", labels=("yes", "no", "maybe"), cluster="p")
OPEN = Question("q3", "open", "Q?", "left upper lobe")


@pytest.mark.parametrize(
    ("question", "completion", "expected", "parsed"),
    [
        (CHOICE, "Answer: B", 1.0, True),
        (CHOICE, "Answer: A", 0.0, True),
        (CHOICE, "", 0.0, False),
        (CHOICE, "yes", 0.0, False),
        (LABEL, "Maybe.", 1.0, True),
        (OPEN, "Left upper lobe.", 1.0, True),
        (OPEN, "The answer is left upper lobe", 1.0, True),
        (OPEN, "upper lobe", 0.0, True),
        (OPEN, " ", 0.0, False),
        (OPEN._replace(kind="closed", answer="Yes"), "yes, it is", 1.0, True),
        (OPEN._replace(kind="closed", answer="Yes"), "certainly", 0.0, False),
        (OPEN._replace(kind="closed", answer="CT"), "ct", 1.0, True),
        (OPEN._replace(kind="closed", answer="CT"), "CT and MRI", 0.0, True),
    ],
)
def test_scores(question, completion, expected, parsed):
    record = score(question, completion)
    assert (record["score"], record["parsed"]) == (expected, parsed)


def test_token_scores_by_hand():
    assert token_scores("the upper lobe", "left upper lobe") == pytest.approx((2 / 3, 2 / 3))
    recall, f1 = token_scores("upper lobe of the left lung", "left lobe")
    assert (recall, f1) == pytest.approx((1.0, 2 * (2 / 6) / (2 / 6 + 1)))
    assert token_scores("lobe lobe lobe", "lobe")[1] == pytest.approx(0.5)
    assert token_scores("肝", "肝脏") == pytest.approx((0.5, 2 / 3))
    assert token_scores("", "x") == (0.0, 0.0)


def test_records_hold_no_text():
    secret = OPEN._replace(text="John Smith, 60", answer="fracture of Smith")
    record = json.dumps(score(secret, "Smith has a fracture"))
    assert "Smith" not in record
    assert "fracture" not in record


def test_summary_counts_every_question():
    records = [
        score(CHOICE, "B"),
        score(CHOICE, "A or B"),
        score(CHOICE, "I'm sorry, I can't help"),
    ]
    found = summarize(records)
    assert found["metrics"]["accuracy"]["value"] == pytest.approx(1 / 3)
    assert found["unparsed"] == 2
    assert found["unparsed_reasons"] == {"ambiguous": 1, "refusal": 1}
    assert found["baselines"]["chance"] == 0.5
    labels = summarize([score(LABEL, "maybe"), score(LABEL._replace(id="q", answer="no"), "x")])
    assert labels["metrics"]["macro_f1"]["value"] == pytest.approx(0.5)
    assert labels["metrics"]["accuracy"]["value"] == 0.5
    mixed = summarize([score(OPEN, "upper lobe"), score(OPEN._replace(kind="closed"), "x")])
    assert mixed["metrics"]["open_token_recall"]["value"] == pytest.approx(2 / 3)
    assert mixed["metrics"]["closed_exact"]["n"] == 1
    json.dumps(found, allow_nan=False)


IDENTITY = {"model": "m", "decoding": {"max_tokens": 8}}


def test_a_journal_keeps_whole_batches(tmp_path):
    journal = Journal(tmp_path, IDENTITY)
    with journal.open():
        journal.add({"a": Completion("one"), "b": Completion("zwei\n\u2028", "max_tokens", 3, 4)})
        journal.add({"c": Completion("three")})
    whole = journal.path.read_bytes()
    assert journal.path.stat().st_mode & 0o077 == 0
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    for cut in range(last, len(whole)):  # every place a kill can tear the last line at
        journal.path.write_bytes(whole[:cut])
        again = Journal(tmp_path, IDENTITY)
        with again.open():
            assert set(again.found) == {"a", "b"}
            assert again["b"] == ("zwei\n\u2028", "max_tokens", 3, 4)
            again.add({"c": Completion("three")})
        assert journal.path.read_bytes() == whole


def test_a_journal_is_of_one_model_and_decoding(tmp_path):
    first = Journal(tmp_path, IDENTITY)
    assert Journal(tmp_path, {**IDENTITY, "decoding": {"max_tokens": 9}}).path != first.path
    with (
        first.open(),
        pytest.raises(ValueError, match="in use"),
        Journal(tmp_path, IDENTITY).open(),
    ):
        pass
    first.path.write_text('{"identity": {"model": "other"}}\n')
    with pytest.raises(ValueError, match="its own identity"), first.open():
        pass
    first.path.write_text(json.dumps({"identity": IDENTITY}) + '\nnonsense\n{"batch": {}}\n')
    with pytest.raises(ValueError, match="line 2"), Journal(tmp_path, IDENTITY).open():
        pass


def test_killed_in_the_middle_of_writing(tmp_path):
    """kill -9 while it writes: what was said to be on disk is."""
    code = (
        "import sys; from medgpt.eval.journal import *\n"
        f"j = Journal({str(tmp_path)!r}, {IDENTITY!r})\n"
        "with j.open():\n"
        "    for n in range(10**6):\n"
        "        j.add({str(n): Completion('x' * 5000)}); print(n, flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    said = [int(process.stdout.readline()) for _ in range(20)]
    process.kill()
    said += [int(line) for line in process.stdout.read().split()]
    process.wait()
    again = Journal(tmp_path, IDENTITY)
    with again.open():
        assert {str(n) for n in said} <= set(again.found)
        assert len(again.found) <= len(said) + 1


def a_run(folder, correct, task="medqa", row="MMLU-Med", name="transformers:m|<b>"):
    """A run as the runner writes it, from given answers."""
    letters = ["B" if c else "A" for c in correct]
    records = [
        score(CHOICE._replace(id=str(n), cluster=f"c{n // 2}"), letter)
        for n, letter in enumerate(letters)
    ]
    (folder / "records").mkdir(parents=True)
    (folder / "tasks").mkdir()
    lines = "".join(json.dumps(r) + "\n" for r in records)
    (folder / "records" / f"{task}.jsonl").write_text(lines)
    result = {
        "task": task,
        "title": "A <task>",
        "published": row,
        "note": "",
        "model": {"model": name},
        "prompt": {"name": "choice", "version": 1, "hash": "ab", "shots": 0},
        "loaded": {"sha256": "0" * 64, "expected": 99, "images_dropped": False},
        "cut": 0,
        **summarize(records),
    }
    (folder / "tasks" / f"{task}.json").write_text(json.dumps(result))
    return folder


@pytest.fixture
def runs(tmp_path):
    rng = np.random.default_rng(0)
    good = rng.random(120) < 0.8
    return a_run(tmp_path / "A", good), a_run(tmp_path / "B", good & (rng.random(120) < 0.6))


class Balance(HTMLParser):
    """Finds tags that are not closed in their order."""

    def __init__(self):
        super().__init__()
        self.open, self.bad = [], []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "br"):
            self.open.append(tag)
        self.bad += [value for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.bad.append(tag)


def test_a_report_of_two_runs(runs, tmp_path):
    paths = write_report(runs, tmp_path / "out")
    machine, markdown, html = (path.read_text() for path in paths)
    found = json.loads(machine)
    row = found["tasks"][0]
    assert row["published"] == {"MedGPT-oss": 0.7259}
    assert "72.6" in markdown
    assert "MedGPT-oss (published)" in markdown
    own = row["runs"]["A (transformers:m|<b>)"]["metrics"]["accuracy"]
    assert f"{100 * own['value']:.1f} [{100 * own['low']:.1f}, {100 * own['high']:.1f}]" in markdown
    widths = {len(re.findall(r"(?<!\\)\|", line)) for line in markdown.split("\n\n")[2].split("\n")}
    assert len(widths - {0}) == 1
    checker = Balance()
    checker.feed(html)
    assert (checker.open, checker.bad) == ([], [])
    assert "<b>" not in html
    svg = html[html.index("<svg") : html.index("</svg>")]
    line = next(x for x in svg.split("<line ") if 'stroke="#1f5fa8"' in x)
    x1, x2 = (float(re.search(rf'{name}="([\d.]+)"', line)[1]) for name in ("x1", "x2"))
    assert (x1, x2) == pytest.approx((330 + 520 * own["low"], 330 + 520 * own["high"]), abs=0.06)
    assert "MedGPT-oss, published" in svg


def test_figures_of_the_paper():
    assert all(len(row) in (1, len(MODELS)) for row in TABLE.values())
    assert published("SLAKE (in distribution)")["Lingshu"] == pytest.approx(0.7224)
    assert published("no such row") == {}
    from medgpt.eval.tasks import tasks

    used = {t.published for t in tasks().values()} - {"", "MIMIC-CXR findings"}
    assert used == set(TABLE)


def test_two_runs_compared(runs, capsys):
    found = compare_runs(*runs)
    row = found["tasks"][0]
    assert row["difference"]["value"] > 0.1
    assert row["p"] < 0.01
    assert row["p_holm"] == row["p"]
    assert row["p_mcnemar"] is None  # clusters of two
    assert compare_runs(runs[0], runs[0])["tasks"][0]["p"] == 1.0
    assert main(["eval", "compare", *map(str, runs)]) == 0
    assert "A - B" in capsys.readouterr().out
    other = runs[1] / "tasks" / "medqa.json"
    other.write_text(other.read_text().replace("0" * 64, "1" * 64))
    with pytest.raises(ValueError, match="the same rows of medqa"):
        compare_runs(*runs)


def test_an_empty_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="without results"):
        collect([tmp_path])


STEM = (
    "A 60-year-old gardener has had a dry cough for three months and his hands turn white in the "
    "cold; which test comes next?"
)


def exam() -> list[Question]:
    options = {"A": "spirometry with a bronchodilator", "B": "serology for antibodies"}
    asked = [
        Question("long", "choice", STEM, "A", options),
        Question("short", "choice", "Which bone is here?", "A", {"A": "the left first metacarpal",
                                                                  "B": "none of them"}),
        Question("brief", "choice", "Which?", "A", {"A": "x", "B": "y"}),
    ]  # fmt: skip
    phrase = (
        "which of the following is the most likely diagnosis in this patient at this time today"
    )
    return asked + [
        Question(f"phrase{n}", "choice", f"{phrase} number{n}", "A", {"A": f"x{n}", "B": f"y{n}"})
        for n in range(12)
    ]


def train(path, *texts, images=()):
    rows = [{"id": str(n), "images": list(images), "messages": [{"role": "user", "content": [
        {"type": "text", "text": text}]}]} for n, text in enumerate(texts)]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        (f"Question: {STEM.upper()} Think first.", ["long"]),
        ("... gardener has had a DRY cough, for three months and his hands turn ...", ["long"]),
        ("a gardener with a dry cough for three months; his hands turn white", []),
        ("Which bone is here? The left first metacarpal.", ["short"]),
        (
            "which of the following is the most likely diagnosis in this patient at this time",
            [],
        ),
        ("Which? x y", []),
    ],
)
def test_contamination_of_texts(text, ids, tmp_path):
    found = contamination.check(exam(), train(tmp_path / "t.jsonl", "Nothing of it.", text))
    assert found["ids"] == ids
    assert found["train"]["rows"] == 2
    assert found["too_short_to_check"] == 1
    assert "gardener" not in json.dumps(found)


def test_contamination_of_images(tmp_path):
    pytest.importorskip("imagehash", reason="medgpt-kernels[eval] has it")
    from PIL import Image
    from skimage import data

    eye = Image.fromarray(data.retina()[::4, ::4])
    tissue = Image.fromarray(data.immunohistochemistry()[::2, ::2])
    buffer = io.BytesIO()
    eye.save(buffer, format="PNG")
    asked = [Question("eye", "open", "Q?", "x", images=(buffer.getvalue(),))]
    eye.resize((200, 200)).save(tmp_path / "eye.jpg", quality=70)
    tissue.save(tmp_path / "tissue.jpg")
    Image.new("L", (64, 64)).save(tmp_path / "black.png")
    path = train(tmp_path / "t.jsonl", "x", images=["tissue.jpg", "black.png", "../out.png"])
    assert contamination.check(asked, path)["ids"] == []
    path = train(tmp_path / "t.jsonl", "x", images=["tissue.jpg", "eye.jpg", "missing.png"])
    found = contamination.check(asked, path)
    assert (found["ids"], found["by_image"], found["by_text"]) == (["eye"], 1, 0)
    assert found["train"]["images_unread"] == 1


def test_clean_and_dirty_accuracy(runs):
    records = runs[0] / "records" / "medqa.jsonl"
    rows = [json.loads(line) for line in records.read_text().splitlines()]
    right = {row["id"] for row in rows if row["score"]}
    dirty = set(sorted(right)[:20])
    found = contamination.clean_and_dirty(records, dirty)
    assert found["dirty"]["value"] == 1.0
    assert found["clean"]["n"] == 100
    assert found["clean"]["value"] == pytest.approx((len(right) - 20) / 100)
    assert found["clean"]["value"] < found["all"]["value"]


def test_the_command_without_a_model(tmp_path, capsys):
    assert main(["eval", "tasks", "--json"]) == 0
    assert {row["task"] for row in json.loads(capsys.readouterr().out)} >= {"medqa", "medframeqa"}
    model = ["--model", "x", "--out", "y"]
    for arguments, message in (
        (["nosuch", *model], "expected one of"),
        (["medqa", *model], "expected a path or hub for medqa"),
        (["medqa", "medmcqa", "--data", "x", *model], "expected TASK=PATH"),
        (["medqa", "--data", str(tmp_path / "no"), *model], "got no, not there"),
        (["report", str(tmp_path), "--out", "y"], "without results"),
    ):
        assert main(["eval", *arguments]) == 2
        assert message in capsys.readouterr().err
    data = tmp_path / "rows.jsonl"
    row = {"question": STEM, "options": {"A": "x", "B": "y"}, "answer_idx": "A"}
    data.write_text(json.dumps(row))
    path = train(tmp_path / "t.jsonl", STEM)
    command = ["eval", "contamination", "medqa", "--data", str(data), "--train", str(path)]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["medqa"]["contaminated"] == 1


def test_help_waits_for_nothing():
    heavy = ("torch", "scipy", "numpy", "inspect_ai")
    code = f"import sys, medgpt.cli; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_the_commands_of_the_docs_parse():
    text = (Path(__file__).parents[1] / "docs" / "medgpt_eval.md").read_text()
    block = text[text.index("```bash") : text.index("```\n\n**Models")]
    lines = [line.split("#")[0].split() for line in block.split("\n") if line.startswith("medgpt ")]
    assert len(lines) == 6
    for line in lines:
        assert callable(parser().parse_args(spelled(line[1:])).run)
