"""The annotation cache: what it keeps, what it refuses, what a kill leaves."""

import fcntl
import json
import os
import stat
import subprocess
import sys

import numpy as np
import pytest

from medgpt.eval.report_metrics import cache
from medgpt.eval.report_metrics.values import decode_embedding, encode_embedding

PARAMS = {"package": "radgraph", "model": "radgraph"}
GRAPH = {
    "entities": {
        "1": {"tokens": "lungs", "label": "Anatomy::definitely present", "relations": []},
        "2": {
            "tokens": "clear",
            "label": "Observation::definitely present",
            "relations": [["located_at", "1"]],
        },
    }
}
KEY = cache.text_key("Lungs are clear.")


def add(folder, entries, kind="radgraph", params=PARAMS):
    return cache.append(folder, kind, "radgraph", params, entries)


def test_what_is_written_is_read(tmp_path):
    assert add(tmp_path / "cache", [(KEY, GRAPH)]) == 1
    other = cache.text_key("Herz normal groß.")
    assert add(tmp_path / "cache", [(KEY, GRAPH), (other, {"entities": {}})]) == 1
    found = cache.read(tmp_path / "cache", "radgraph", "radgraph")
    assert dict(found) == {KEY: GRAPH, other: {"entities": {}}}
    assert (found.params, found.torn, found.label) == (PARAMS, False, "radgraph.radgraph")
    assert cache.annotators(tmp_path / "cache", "radgraph") == ["radgraph"]
    assert cache.annotators(tmp_path / "cache", "chexbert") == []


def test_keys_are_sha256_of_the_stripped_text_and_of_ordered_pairs():
    # printf abc | sha256sum
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert cache.text_key(" abc\n") == abc
    assert cache.text_key("Abc") != abc
    assert cache.text_key("\ud800") != cache.text_key("\ud801")
    assert cache.pair_key("a", "b") != cache.pair_key("b", "a")


def test_only_the_owner_can_read_a_cache(tmp_path):
    add(tmp_path / "cache", [(KEY, GRAPH)])
    for path in (tmp_path / "cache", tmp_path / "cache" / "radgraph.radgraph.jsonl"):
        assert not stat.S_IMODE(path.stat().st_mode) & 0o077


@pytest.mark.parametrize("cut", [1, 10, 60])
def test_a_torn_line_is_left_out_and_then_written_again(tmp_path, cut):
    other = cache.text_key("other")
    add(tmp_path, [(KEY, GRAPH), (other, GRAPH)])
    path = tmp_path / "radgraph.radgraph.jsonl"
    os.truncate(path, path.stat().st_size - cut)
    found = cache.read(tmp_path, "radgraph", "radgraph")
    assert (set(found), found.torn) == ({KEY}, True)
    assert add(tmp_path, [(other, GRAPH)]) == 1
    found = cache.read(tmp_path, "radgraph", "radgraph")
    assert (set(found), found.torn) == ({KEY, other}, False)


def test_a_file_torn_within_its_header_starts_anew(tmp_path):
    path = tmp_path / "radgraph.radgraph.jsonl"
    path.write_text('{"format": "medgpt-rep')
    assert add(tmp_path, [(KEY, GRAPH)]) == 1
    assert dict(cache.read(tmp_path, "radgraph", "radgraph")) == {KEY: GRAPH}


def test_a_second_writer_waits(tmp_path):
    add(tmp_path, [(KEY, GRAPH)])
    code = (
        "import sys; from medgpt.eval.report_metrics import cache\n"
        "print('ready', flush=True)\n"
        "entry = (cache.text_key('other'), {'entities': {}})\n"
        "params = {'package': 'radgraph', 'model': 'radgraph'}\n"
        "cache.append(sys.argv[1], 'radgraph', 'radgraph', params, [entry])\n"
    )
    with open(tmp_path / "radgraph.radgraph.jsonl", "rb") as first:
        fcntl.flock(first, fcntl.LOCK_EX)
        command = [sys.executable, "-c", code, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as second:
            assert second.stdout.readline() == b"ready\n"
            with pytest.raises(subprocess.TimeoutExpired):
                second.wait(timeout=1)
            fcntl.flock(first, fcntl.LOCK_UN)
            assert second.wait(timeout=60) == 0
    assert len(cache.read(tmp_path, "radgraph", "radgraph")) == 2


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".", "a..b", "a\n", "a b", "\0"])
def test_annotators_names_stay_in_the_folder(tmp_path, name):
    with pytest.raises(ValueError, match="annotator: expected"):
        cache.append(tmp_path, "radgraph", name, {}, [])
    with pytest.raises(ValueError, match="annotation kind"):
        cache.append(tmp_path, name, "radgraph", {}, [])


def test_links_and_other_files_are_refused(tmp_path):
    target = tmp_path / "elsewhere"
    target.write_text("kept")
    (tmp_path / "radgraph.radgraph.jsonl").symlink_to(target)
    os.mkfifo(tmp_path / "chexbert.radgraph.jsonl")
    for kind in ("radgraph", "chexbert"):
        with pytest.raises(ValueError, match="expected a regular file"):
            cache.append(tmp_path, kind, "radgraph", {}, [])
        with pytest.raises(ValueError, match="expected a regular file"):
            cache.read(tmp_path, kind, "radgraph")
    assert target.read_text() == "kept"
    with pytest.raises(FileNotFoundError):
        cache.read(tmp_path, "bertscore", "radgraph")


def test_other_params_and_other_values_are_refused(tmp_path):
    add(tmp_path, [(KEY, GRAPH)])
    with pytest.raises(ValueError, match="name another annotator"):
        add(tmp_path, [], params={**PARAMS, "model": "radgraph-xl"})
    with pytest.raises(ValueError, match="expected one value a key"):
        add(tmp_path, [(KEY, {"entities": {}})])
    assert dict(cache.read(tmp_path, "radgraph", "radgraph")) == {KEY: GRAPH}


def test_other_formats_are_refused_without_their_text(tmp_path):
    path = tmp_path / "radgraph.radgraph.jsonl"
    header = {"format": cache.FORMAT, "version": 1, "kind": "radgraph", "annotator": "radgraph"}
    good = json.dumps({**header, "params": {}})
    lines = [
        "Patient John Doe",
        json.dumps({**header, "params": {}, "version": 2}),
        json.dumps(header),
        "[]",
        f"{good}\nPatient John Doe\n",
        f'{good}\n{{"key": "John Doe", "value": {{"entities": {{}}}}}}\n',
        f'{good}\n{{"key": "{KEY}", "value": {{"entities": {{"1": "John Doe"}}}}}}\n',
    ]
    for text in lines:
        path.write_text(text + "\n")
        with pytest.raises(ValueError, match=r"jsonl:\d: ") as error:
            cache.read(tmp_path, "radgraph", "radgraph")
        assert "John" not in str(error.value)


EMBEDDING = encode_embedding(np.arange(4))
BAD = {
    "radgraph": [
        None,
        {"entities": {}, "text": "kept out"},
        {"entities": {"1": {"tokens": "a", "label": "b", "relations": [["r", "9"]]}}},
        {"entities": {"1": {"tokens": "a", "label": "b"}}},
        {"entities": {"1": {"tokens": 1, "label": "b", "relations": []}}},
    ],
    "chexbert": [
        {"labels": [1] * 13, "embedding": EMBEDDING},
        {"labels": [2] * 14, "embedding": EMBEDDING},
        {"labels": [True] * 14, "embedding": EMBEDDING},
        {"labels": [1] * 14, "embedding": "***"},
        {"labels": [1] * 14, "embedding": encode_embedding([np.nan])},
    ],
    "bertscore": [{"f1": 1.0}, {"precision": 1.0, "recall": 1.0, "f1": float("inf")}],
    "ratescore": [{"score": "1"}, {"score": True}, 1.0],
    "ratescore_entities": [
        {"entities": [["lung", "ANATOMY"]], "embeddings": []},
        {"entities": [["lung", "ORGAN"]], "embeddings": [EMBEDDING]},
    ],
}


@pytest.mark.parametrize(("kind", "value"), [(k, v) for k, vs in BAD.items() for v in vs])
def test_bad_values_are_refused(tmp_path, kind, value):
    with pytest.raises(ValueError, match="expected"):
        cache.append(tmp_path, kind, "radgraph", {}, [(KEY, value)])
    assert not len(cache.read(tmp_path, kind, "radgraph"))


def test_embeddings_keep_every_bit():
    vector = np.random.default_rng(0).normal(size=768).astype(np.float32)
    assert (decode_embedding(encode_embedding(vector)) == vector).all()
