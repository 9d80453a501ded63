"""From a file of reports and a cache to the tables: `medgpt eval metrics` and `annotate`."""

import argparse
import csv
import json

import numpy as np
import pytest

from medgpt.eval.report_metrics import annotate, cache, cli
from medgpt.eval.report_metrics.evaluate import MissingAnnotations, score_reports
from medgpt.eval.report_metrics.radcliq import radcliq_v1
from medgpt.eval.report_metrics.reports import make_reports
from medgpt.eval.report_metrics.values import encode_embedding

NORMAL, EFFUSION, SAID = "The lungs are clear.", "Small pleural effusion.", "Lungs clear."
ROWS = [
    {"id": "a", "reference": NORMAL, "generated": SAID, "patient": "p", "age": 30, "sex": "F"},
    {"id": "b", "reference": EFFUSION, "generated": EFFUSION, "patient": "q", "age": 70},
    {"id": "c", "reference": EFFUSION, "generated": "  \n", "patient": "q", "sex": "M"},
    {"id": "d", "reference": NORMAL, "generated": None, "patient": "r", "site": "x"},
]
BERT = {"model": "distilroberta-base", "num_layers": 5, "rescale_with_baseline": True, "idf": False}
ANAT, YES = "Anatomy::definitely present", "Observation::definitely present"


def graph(*tokens, related=True):
    """An anatomy and an observation at it."""
    first = {"tokens": tokens[0], "label": ANAT, "relations": []}
    second = {"tokens": tokens[1], "label": YES, "relations": [["located_at", "1"]] * related}
    return {"entities": {"1": first, "2": second}}


def labels(vector, **given):
    row = [given.get(name.replace(" ", "_")) for name in cli_labels()]
    return {"labels": row, "embedding": encode_embedding(vector)}


def cli_labels():
    from medgpt.eval.report_metrics.chexbert import LABELS

    return LABELS


@pytest.fixture
def folder(tmp_path):
    """A cache of all kinds for ROWS."""
    path, key = tmp_path / "cache", cache.text_key
    graphs = {
        NORMAL: graph("lungs", "clear"),
        SAID: graph("Lungs", "clear", related=False),
        EFFUSION: graph("pleural", "effusion"),
    }
    entries = [(key(text), value) for text, value in graphs.items()]
    cache.append(path, "radgraph", "radgraph", {"model": "radgraph"}, entries)
    found = {
        NORMAL: labels([1, 0], No_Finding=1),
        SAID: labels([1, 1], No_Finding=1, Edema=-1),
        EFFUSION: labels([0, 1], Pleural_Effusion=1),
    }
    entries = [(key(text), value) for text, value in found.items()]
    cache.append(path, "chexbert", "f1chexbert", {}, entries)
    values = [(NORMAL, SAID, 0.6), (EFFUSION, EFFUSION, 1.0)]
    entries = [
        (cache.pair_key(a, b), {"precision": f1 - 0.1, "recall": f1 + 0.1, "f1": f1})
        for a, b, f1 in values
    ]
    cache.append(path, "bertscore", "distilroberta-base", BERT, entries)
    entries = [(cache.pair_key(a, b), {"score": f1}) for a, b, f1 in values]
    cache.append(path, "ratescore", "long", {}, entries)
    return path


def run(capsys, *args):
    """Exit status, standard output and error of `medgpt eval ARGS`, as medgpt.cli ends it."""
    parser = argparse.ArgumentParser()
    cli.add_parsers(parser.add_subparsers(required=True))
    parsed, status, message = parser.parse_args([str(arg) for arg in args]), 0, ""
    try:
        parsed.run(parsed)
    except (ValueError, OSError) as error:
        status, message = 2, f"medgpt: {error}\n"
    except SystemExit as end:
        status = end.code
    printed, error = capsys.readouterr()
    return status, printed, error + message


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "reports.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)) + "\n")
    return path


def test_every_metric_scores_empty_reports_as_the_empty_report(folder):
    reports = make_reports(ROWS)
    assert (reports.missing.sum(), reports.blank.sum()) == (1, 1)
    scores, absent = score_reports(reports, folder)
    assert not absent
    found = {score.name: score for score in scores}
    assert {len(score.parts) for score in scores} == {4}
    for name, score in found.items():
        if not name.startswith(("chexbert_f1", "radcliq")):
            assert score.of(np.eye(4)[2:]) == pytest.approx([0, 0]), name
    assert found["radcliq_v1"].of(np.eye(4)[2:]) == pytest.approx([2.4501430833] * 2)
    # by hand, report a: entities 1 of 2 both ways, no relation; b: all
    assert found["radgraph_radcliq"].parts[:, 0] == pytest.approx([0.25, 1, 0, 0])
    assert found["radgraph_simple"].value == pytest.approx((1 + 1) / 4)
    assert found["radgraph_partial"].value == pytest.approx((0.5 + 1) / 4)
    assert found["sembscore"].parts[:, 0] == pytest.approx([np.sqrt(0.5), 1, 0, 0])
    assert found["bertscore"].value == pytest.approx(1.6 / 4)
    assert found["ratescore"].value == pytest.approx(1.6 / 4)
    y = radcliq_v1([0.25, 1, 0, 0], [0.6, 1, 0, 0], [np.sqrt(0.5), 1, 0, 0])
    assert found["radcliq_v1"].value == pytest.approx(y.mean())
    # positives: meant 1 each; said No Finding and Edema, Effusion, none, none
    assert found["chexbert_f1_14_micro"].value == pytest.approx(2 * 2 / (2 * 2 + 1 + 2))
    assert found["chexbert_f1_5_micro"].value == pytest.approx(2 * 1 / (2 * 1 + 1 + 1))


def test_the_command_prints_and_writes_tables_without_text(folder, file, tmp_path, capsys):
    options = ["--slices", "age", "sex", "--replicates", 50]
    out = ["--json", tmp_path / "out.json", "--per-report", tmp_path / "out.csv"]
    status, printed, _ = run(capsys, "metrics", file, "--cache", folder, *options, *out)
    assert status == 0
    document = json.loads((tmp_path / "out.json").read_text())
    assert document["counts"] == {"reports": 4, "clusters": 3, "missing": 1, "blank": 1}
    assert "1 missing and 1 blank generations scored as empty reports" in printed
    lines = {line["metric"]: line for line in document["scores"]}
    y = lines["radcliq_v1"]
    assert lines["1/radcliq_v1"]["value"] == pytest.approx(1 / y["value"])
    assert y["better"] == "lower"
    for line in document["scores"] + document["probes"]:
        assert line["metric"] in printed
        assert line["variant"] in printed
        if line["low"] is not None:
            assert line["low"] <= line["value"] <= line["high"]
    omission = next(p for p in document["probes"] if p["metric"] == "omission_rate")
    assert omission["value"] == pytest.approx(1 / 2)
    ages = {row["group"]: row["reports"] for row in document["slices"][0]["rows"]}
    assert ages == {"18-39": 1, "65-79": 1, "unknown": 2}
    with open(tmp_path / "out.csv", newline="") as table:
        rows = list(csv.DictReader(table))
    assert [row["generation"] for row in rows] == ["text", "text", "blank", "missing"]
    assert float(rows[0]["radgraph_radcliq"]) == 0.25
    everything = printed + (tmp_path / "out.json").read_text() + (tmp_path / "out.csv").read_text()
    assert "clear" not in everything.replace("unclear", "")
    assert "effusion" not in everything.replace("Pleural Effusion", "")


def test_two_runs_are_the_same(folder, file, tmp_path, capsys):
    texts = []
    for name in ("one", "two"):
        out = tmp_path / name
        run(capsys, "metrics", file, "--cache", folder, "--replicates", 20, "--json", out)
        texts.append(out.read_text())
    assert texts[0] == texts[1]


def test_an_annotation_that_is_not_there_is_an_error_not_a_score(folder, file, capsys):
    other = [*ROWS, {"id": "e", "reference": NORMAL, "generated": "Another text."}]
    reports = make_reports(other)
    with pytest.raises(MissingAnnotations, match=r"expected annotations of 4 texts, got none of 1"):
        score_reports(reports, folder, ["radgraph"])
    scores, absent = score_reports(reports, folder)
    assert set(absent) == {"radgraph", "chexbert", "bertscore", "radcliq", "ratescore"}
    assert {score.name.split("_")[0] for score in scores} == {"bleu", "rouge", "meteor", "cider"}
    file.write_text("\n".join(map(json.dumps, other)))
    status, printed, error = run(capsys, "metrics", file, "--cache", folder, "--replicates", 5)
    assert status == 0
    assert "Not computed: radgraph:" in printed
    command = ["metrics", file, "--cache", folder, "--metrics", "radgraph"]
    status, printed, error = run(capsys, *command)
    assert (status, printed) == (2, "")
    assert "medgpt eval annotate" in error
    assert "Another" not in error


def test_radcliq_takes_its_own_bertscore_alone(folder):
    reports = make_reports(ROWS)
    values = {
        cache.pair_key(a, b): {"precision": 1, "recall": 1, "f1": 1}
        for a, b in ((NORMAL, SAID), (EFFUSION, EFFUSION))
    }
    idf = {**BERT, "idf": True}
    cache.append(folder, "bertscore", "idf", idf, values.items())
    with pytest.raises(ValueError, match="expected one of distilroberta-base, idf to be named"):
        score_reports(reports, folder, ["bertscore"])
    with pytest.raises(ValueError, match="expected a BERTScore of"):
        score_reports(reports, folder, ["radcliq"], {"bertscore": "idf"})
    names = {"bertscore": "idf", "radcliq.bertscore": "distilroberta-base"}
    scores, _ = score_reports(reports, folder, ["bertscore", "radcliq"], names)
    assert scores[0].value == pytest.approx(0.5)
    assert "idf True" in scores[0].variant
    assert "idf False" in scores[1].variant


def test_ratescore_of_cached_entities(tmp_path):
    kinds = ("ABNORMALITY", "NON-ABNORMALITY", "DISEASE", "NON-DISEASE", "ANATOMY")
    affinity = {f"{a}_{b}".lower(): 1.0 for a in kinds for b in kinds} | {"neg_weight": 0.25}
    unit = [encode_embedding(v) for v in np.eye(2)]
    two = {"entities": [["effusion", "DISEASE"], ["pleura", "ANATOMY"]], "embeddings": unit}
    one = {"entities": [["clear", "NON-DISEASE"]], "embeddings": unit[:1]}
    none = {"entities": [], "embeddings": []}
    values = zip((EFFUSION, NORMAL, SAID), (two, one, none), strict=True)
    entries = [(cache.text_key(text), value) for text, value in values]
    cache.append(tmp_path, "ratescore_entities", "long", {"affinity": affinity}, entries)
    (score,), _ = score_reports(make_reports(ROWS), tmp_path, ["ratescore"])
    # no entity in a's generation: the package's 0.5; empty generations: 0
    assert score.parts[:, 0] == pytest.approx([0.5, 1, 0, 0])


def test_probes_against_the_images_labels(folder, file, tmp_path, capsys):
    image = [{**row, "labels": {"Edema": 1}} for row in ROWS]
    file.write_text("\n".join(map(json.dumps, image)))
    command = ["metrics", file, "--cache", folder, "--replicates", 5, "--json", tmp_path / "o"]
    assert run(capsys, *command)[0] == 0
    document = json.loads((tmp_path / "o").read_text())
    found = {line["metric"]: line for line in document["probes"]}
    assert "the image's labels" in found["omission_rate"]["variant"]
    # Edema is stated in a, and Effusion of b is unsupported
    assert found["omission_rate"]["value"] == pytest.approx(3 / 4)
    assert found["hallucination_rate"]["value"] == pytest.approx(1 / 2)
    assert document["findings"]["Edema"]["stated"] == 1
    file.write_text("\n".join(map(json.dumps, [*image[:3], ROWS[3]])))
    status, _, error = run(capsys, *command, "--probes", "image")
    assert (status, "expected labels in every row, got none in 1" in error) == (2, True)


BAD_ROWS = [
    ([], "at least one"),
    ([{"reference": "a"}], "distinct ids"),
    ([{"id": "a", "reference": "x"}] * 2, "distinct ids"),
    ([{"id": "a", "reference": " "}], "report a: expected a reference"),
    ([{"id": "a", "reference": "x", "generated": ["secret"]}], "report a: expected generated"),
    ([{"id": "a", "reference": "x", "age": -1}], "report a: expected an age"),
    ([{"id": "a", "reference": "x", "age": float("nan")}], "report a: expected an age"),
    ([{"id": "a", "reference": "x", "sex": ["F"]}], "report a: expected sex"),
    ([{"id": "a", "reference": "x", "labels": {"Oedema": 1}}], "labels of CheXpert's names"),
    ([{"id": "a", "reference": "x", "labels": {"Edema": 2}}], "labels of 1, 0, -1 or null"),
]


@pytest.mark.parametrize(("rows", "message"), BAD_ROWS)
def test_bad_rows_are_refused_by_id(rows, message):
    with pytest.raises(ValueError, match=message) as error:
        make_reports(rows)
    assert "secret" not in str(error.value)


def test_a_broken_file_is_one_line_of_error_without_its_text(file, capsys):
    file.write_text('{"id": "a", "reference": "John Doe"\n')
    status, _, error = run(capsys, "metrics", file)
    assert (status, error.count("\n")) == (2, 1)
    assert "John" not in error


# annotate


def test_what_is_to_annotate():
    reports = make_reports(ROWS)
    assert annotate.to_annotate(reports, "radgraph") == [NORMAL, SAID, EFFUSION]
    assert annotate.to_annotate(reports, "radgraph", {cache.text_key(SAID)}) == [NORMAL, EFFUSION]
    pairs = [(NORMAL, SAID), (EFFUSION, EFFUSION)]
    assert annotate.to_annotate(reports, "bertscore") == pairs


def test_packages_outputs_become_cached_values():
    # an output as the radgraph package's README shows it
    entity = {"tokens": "tube", "label": YES, "start_ix": 6, "end_ix": 6}
    chest = {"tokens": "chest", "label": ANAT, "start_ix": 5, "end_ix": 5, "relations": []}
    output = {
        "text": "chest tube .",
        "entities": {"2": chest, "3": {**entity, "relations": [["located_at", "2"]]}},
        "data_source": None,
    }
    value = annotate.radgraph_value(output)
    assert "text" not in value
    assert value["entities"]["3"] == {
        "tokens": "tube",
        "label": YES,
        "relations": [["located_at", "2"]],
    }
    value = annotate.chexbert_value([0, 1, 2, 3] + [0] * 10, np.ones(4))
    assert value["labels"] == [None, 1, 0, -1] + [None] * 10


def test_a_run_of_reports_from_its_folder_to_its_page(folder, tmp_path, capsys):
    """What `medgpt eval` leaves, scored with a cache, in Markdown and HTML beside the paper."""
    from medgpt.eval.report import write_report

    out = tmp_path / "run"
    for name in ("reports", "tasks"):
        (out / name).mkdir(parents=True)
    task = "mimic_cxr_findings"
    (out / "reports" / f"{task}.jsonl").write_text("\n".join(map(json.dumps, ROWS)) + "\n")
    result = {"task": task, "title": "MIMIC-CXR, findings", "note": "", "n": 4, "cut": 0}
    result |= {"published": "MIMIC-CXR findings", "model": {"model": "m"}, "metrics": {}}
    result |= {"unparsed": 0, "unparsed_reasons": {}}
    result["prompt"] = {"name": "findings", "version": 1, "hash": "0", "shots": 0}
    result["loaded"] = {"expected": None, "images_dropped": False, "sha256": "0" * 64}
    (out / "tasks" / f"{task}.json").write_text(json.dumps(result))
    assert run(capsys, "metrics", out)[0] == 0
    page = write_report([out], tmp_path / "page")[1].read_text()
    assert "without radgraph, chexbert, bertscore, radcliq, ratescore" in page
    status, printed, _ = run(capsys, "metrics", out, "--cache", folder, "--slices", "sex")
    assert status == 0
    assert f"## {task}" in printed
    document = json.loads((out / "metrics" / f"{task}.json").read_text())
    found = {line["metric"]: line["value"] for line in document["scores"]}
    _, markdown, html = write_report([out], tmp_path / "page")
    lines = [line.split(" | ") for line in markdown.read_text().splitlines()]
    cells = {line[0].strip("| "): line for line in lines if len(line) > 2}
    for metric in ("ratescore", "1/radcliq_v1"):
        assert cells[metric][2].startswith(f"{found[metric]:.3g}")
    # the paper's, labelled, each in the row of its metric and no other's
    assert "MedGPT-oss (published)" in markdown.read_text()
    assert cells["ratescore"][-1].strip("| ") == "0.522"
    assert cells["1/radcliq_v1"][-1].strip("| ") == "0.803"
    assert cells["RadGraph-F1, variant unstated"][-1].strip("| ") == "0.189"
    assert cells["radgraph_radcliq"][-1].strip("| ") == "-"
    assert "<svg" in html.read_text()
    assert "ratescore, MedGPT-oss, published" in html.read_text()
    for path in (markdown, html):
        assert not any(text in path.read_text() for text in (NORMAL, EFFUSION))


def test_one_report_alone_has_every_metric_but_cider():
    scores, _ = score_reports(make_reports(ROWS[:1]))
    assert [s.name for s in scores][-2:] == ["rouge_l", "meteor_exact_stem"]


@pytest.mark.parametrize("kind", annotate.SOURCES)
def test_what_is_not_here_is_said_with_how_to_get_it(kind, file, tmp_path, capsys):
    why = annotate.lacks(kind)
    if why is None:
        pytest.skip(f"{kind}: package and weights are here")
    status, printed, error = run(
        capsys, "annotate", file, "--cache", tmp_path / "new", "--kinds", kind
    )
    assert (status, printed) == (1, "")
    assert error.strip() == why
    assert "pip install" in why or "--download" in why
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_bertscore_by_a_local_model(file, tmp_path, capsys):
    pytest.importorskip("bert_score", reason="pip install bert-score")
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "The", "lungs", "Lungs", "are", "clear", "."]
    tokenizer = Tokenizer(models.WordLevel({w: at for at, w in enumerate(words)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = {
        "model_max_length": 64,
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
    }
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, sep_token="[SEP]", **special)
    fast.save_pretrained(tmp_path / "tiny")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(words), num_hidden_layers=2, **sizes)
    BertModel(config).save_pretrained(tmp_path / "tiny")
    command = ["annotate", file, "--cache", tmp_path / "new", "--kinds", "bertscore"]
    command += ["--model", tmp_path / "tiny"]
    for counts in ("0 were there, 2 added", "2 were there, 0 added"):
        status, printed, _ = run(capsys, *command)
        assert status == 0
        assert printed.endswith(f"bertscore.tiny: {counts}, 0 failed\n")
    found = cache.read(tmp_path / "new", "bertscore", "tiny")
    assert found[cache.pair_key(EFFUSION, EFFUSION)]["f1"] == pytest.approx(1)
    assert found[cache.pair_key(NORMAL, SAID)]["f1"] < 0.99
    assert found.params["num_layers"] == 2


@pytest.mark.parametrize("before", [None, "1"])
@pytest.mark.parametrize("allowed", [True, False])
def test_the_hub_is_online_only_where_it_was_asked_for(monkeypatch, before, allowed):
    import os

    from huggingface_hub import constants

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    if before:
        monkeypatch.setenv("HF_HUB_OFFLINE", before)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", before is not None)
    with annotate.network(allowed):
        assert constants.is_offline_mode() is not allowed
        assert os.environ["HF_HUB_OFFLINE"] == "01"[not allowed]
    assert constants.is_offline_mode() is (before is not None)
    assert os.environ.get("HF_HUB_OFFLINE") == before


@pytest.mark.slow
def test_a_thousand_real_reports(tmp_path, capsys):
    from material import reports

    texts = reports(1000)
    rows = [
        {"id": str(at), "reference": text, "generated": None if at % 50 == 0 else texts[at - 1]}
        for at, text in enumerate(texts)
    ]
    path = tmp_path / "reports.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    status, printed, _ = run(capsys, "metrics", path, "--json", tmp_path / "out")
    assert status == 0
    assert "20 missing and 0 blank" in printed
    found = {line["metric"]: line for line in json.loads((tmp_path / "out").read_text())["scores"]}
    assert len(found) == 7
    assert all(0 < line["low"] < line["value"] < line["high"] for line in found.values())
    assert all(line["reports"] == 1000 for line in found.values())


def test_the_example_of_the_docs_and_its_names(folder, capsys):
    from pathlib import Path

    page = (Path(__file__).parent.parent / "docs" / "report_metrics.md").read_text()
    exec(page.split("```python\n")[1].split("```")[0], {})
    assert capsys.readouterr().out.startswith("bleu_1 ")
    scores, _ = score_reports(make_reports(ROWS), folder)
    for score in scores:
        family = "chexbert_f1" if score.name.startswith("chexbert_f1") else score.name
        assert f"`{family}" in page or family in ("bleu_2", "bleu_3"), score.name
