"""Whole curations: importers, corrupt inputs, a killed run, the report's account."""

import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from data_material import (
    CAPTIONS,
    US_WITH_TEXT,
    caption_set,
    crop,
    damage_row_group,
    dicom,
    dicom_without_pixels,
    llava_set,
    small,
    study_set,
)
from PIL import Image

from medgpt.cli import main
from medgpt.data.chunks import chunked, run_chunk
from medgpt.data.config import Curation, read_config
from medgpt.data.curate import curate, remove_work
from medgpt.data.decontaminate import Contamination
from medgpt.data.inspector import Inspector
from medgpt.data.reader import Rows
from medgpt.data.rows import write_rows
from medgpt.images import load_image

ROOT = Path(__file__).parent.parent


def config(folder: Path, sources: list, **kwargs) -> Curation:
    given = {"tokenizer": "none", "chunk_rows": 4, **kwargs}
    return Curation(output=str(folder), sources=sources, **given)


def run(folder: Path, sources: list, **kwargs) -> tuple[dict, list[dict]]:
    report = curate(config(folder, sources, **kwargs), progress=False)
    assert report["in"] == report["kept"] + sum(report["dropped"].values())
    rows = list(Rows(folder)) if report["kept"] else []
    assert len(rows) == report["kept"]
    return report, rows


def files(folder: Path) -> dict[str, bytes]:
    """All that a finished run leaves, but for its chunks."""
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}


def test_captions_become_rows(tmp_path):
    path = caption_set(tmp_path / "in", 6)
    source = {"name": "pmc", "kind": "captions", "path": str(path), "license": "CC BY 4.0"}
    report, rows = run(tmp_path / "out", [source])
    assert report["kept"] == 6
    row = rows[3]
    assert row["id"] == "pmc/captions-3"
    assert row["license"] == "CC BY 4.0"
    assert row["messages"][0]["content"][0] == {"type": "image"}
    shown = load_image(row["images"][0]["bytes"])
    assert np.array_equal(shown, crop("fundus", 3))
    assert (row["images"][0]["height"], row["images"][0]["width"]) == shown.shape[:2]


def test_captions_from_csv_and_from_parquet_with_bytes(tmp_path):
    folder = tmp_path / "in"
    caption_set(folder, 3)
    lines = [f'{n:03d}.{"png" if n % 2 else "jpg"},"{CAPTIONS[n]}, no {n}"' for n in range(3)]
    (folder / "set.csv").write_text("\n".join(["file,text", *lines]))
    held = [{"bytes": (folder / f"00{n}.jpg").read_bytes(), "path": None} for n in (0, 2)]
    table = pa.Table.from_pylist([{"image": h, "caption": c} for h, c in zip(held, CAPTIONS)])  # noqa: B905
    pq.write_table(table, folder / "set.parquet")
    named = {"image_column": "file", "caption_column": "text"}
    sources = [
        {"name": "csv", "kind": "captions", "path": str(folder / "set.csv"), **named},
        {"name": "table", "kind": "captions", "path": str(folder / "set.parquet")},
    ]
    report, rows = run(tmp_path / "out", sources, duplicates="off")
    assert {n: s["kept"] for n, s in report["sources"].items()} == {"csv": 3, "table": 2}
    assert [r["id"] for r in rows[3:]] == ["table/set-0-0", "table/set-0-1"]


def test_llava_conversations_become_rows(tmp_path):
    path = llava_set(tmp_path / "in")
    report, rows = run(tmp_path / "out", [{"name": "l", "kind": "llava", "path": str(path)}])
    assert report["kept"] == 3
    first, second, third = (row["messages"] for row in rows)
    assert [m["role"] for m in first] == ["user", "assistant"] * 2
    assert first[0]["content"] == [
        {"type": "image"},
        {"type": "text", "text": "What plane is this?"},
    ]
    assert second[0]["content"] == [{"type": "text", "text": "Is air seen?"}, {"type": "image"}]
    assert third[1]["content"] == [{"type": "text", "text": "The liver."}]


def test_studies_become_single_multi_and_longitudinal_rows(tmp_path):
    root = study_set(tmp_path / "in")
    source = {"name": "cxr", "kind": "studies", "path": str(root), "hash_ids": False}
    source["metadata"] = str(root / "metadata.csv")
    _, rows = run(tmp_path / "out", [source])
    assert [row["id"] for row in rows] == [
        "cxr/files/p11/s1/single-0",
        "cxr/files/p11/s2/single-0",
        "cxr/files/p11/s2/multi",
        "cxr/files/p11/s2/longitudinal",
        "cxr/files/p12/s3/single-0",
    ]
    last = rows[3]
    assert [len(row["images"]) for row in rows] == [1, 1, 2, 3, 1]
    prior, current = rows[0]["images"][0], rows[2]["images"]
    assert [i["bytes"] for i in last["images"]] == [i["bytes"] for i in (prior, *current)]
    words = "".join(p.get("text", "<>") for p in last["messages"][0]["content"])
    assert words.index("Prior study:") < words.index("normal size.") < words.index("Current study")
    assert "new since the prior" not in words
    answer = last["messages"][1]["content"][0]["text"]
    assert answer.startswith("Findings: The lungs are clear.")
    assert answer.endswith("Impression: No acute disease.")
    assert "p11" not in run(tmp_path / "hashed", [{**source, "hash_ids": True}])[1][0]["id"]


def test_studies_of_dicom_take_view_and_identifiers_from_the_header(tmp_path):
    import pydicom

    folder = tmp_path / "in" / "p" / "s"
    folder.mkdir(parents=True)
    data = pydicom.dcmread(dicom("RG1_J2KR.dcm"))
    data.PatientName = "Quimby^Ada"
    data.save_as(folder / "a.dcm")
    (folder / "b.dcm").write_bytes(dicom_without_pixels())
    (folder / "report.txt").write_text("FINDINGS: Quimby has clear lungs.\nIMPRESSION: Normal.")
    report, rows = run(
        tmp_path / "out", [{"name": "c", "kind": "studies", "path": str(tmp_path / "in")}]
    )
    assert report["kept"] == 1
    assert report["dropped"] == {"dicom_without_pixels": 1}
    assert rows[0]["meta"]["views"] == ["PA"]
    assert "[known] has clear lungs" in rows[0]["messages"][1]["content"][0]["text"]
    assert b"Quimby" not in b"".join(files(tmp_path / "out").values())
    assert b"Quimby" not in rows[0]["images"][0]["bytes"]
    shown = load_image(rows[0]["images"][0]["bytes"])
    assert np.array_equal(shown, load_image(dicom("RG1_J2KR.dcm")))


def corrupt_set(folder: Path) -> list[dict]:
    """Sources with one input each of every kind of damage among good ones."""
    folder.mkdir()
    good = io.BytesIO()
    Image.fromarray(small("fundus")).save(good, "JPEG")
    (folder / "cut.jpg").write_bytes(good.getvalue()[: len(good.getvalue()) // 2])
    Image.new("L", (20000, 10000)).save(folder / "huge.png", compress_level=1)
    (folder / "none.dcm").write_bytes(dicom_without_pixels())
    (folder / "noise.png").write_bytes(b"no picture at all")
    Image.fromarray(small("fundus", 20)).save(folder / "stamp.png")
    caption = CAPTIONS[0]
    extra = [
        ("cut.jpg", caption),
        ("huge.png", caption),
        ("none.dcm", caption),
        ("noise.png", caption),
        ("stamp.png", caption),
        ("absent.png", caption),
        ("../llava.json", caption),
        ("000.jpg", "  "),
        (None, caption),
    ]
    captions = caption_set(folder, 5, extra)
    with open(captions, "a") as lines:
        lines.write('{"image": "000.jpg", "capt\n')
    turns = [{"from": "human", "value": "<image><image> Is it?"}, {"from": "gpt", "value": "Yes."}]
    one = [{"from": "human", "value": "<image> What?"}, {"from": "gpt", "value": "A retina."}]
    records = [
        {"id": "two", "image": "001.png", "conversations": turns},
        {"id": "good", "image": "001.png", "conversations": one},
        {
            "id": "mute",
            "image": "001.png",
            "conversations": [*one[:1], {"from": "gpt", "value": ""}],
        },
        {"id": "odd", "image": "001.png", "conversations": [{"from": "robot", "value": "x"}]},
        {"id": "unasked", "conversations": one[:1]},
    ]
    (folder / "llava.json").write_text(json.dumps(records))
    plain = [
        {
            "id": f"r{n}",
            "messages": [
                {"role": "user", "content": f"What is {n} plus one?"},
                {"role": "assistant", "content": f"It is the number after {n}."},
            ],
        }
        for n in range(150)
    ]
    write_rows(folder / "rows.parquet", plain)
    damage_row_group(folder / "rows.parquet", 1)
    (folder / "more").mkdir()
    (folder / "more" / "cut.parquet").write_bytes((folder / "rows.parquet").read_bytes()[:-40])
    write_rows(folder / "more" / "good.parquet", [{**plain[0], "id": "good"}])
    return [
        {"name": "captions", "kind": "captions", "path": str(captions)},
        {"name": "llava", "kind": "llava", "path": str(folder / "llava.json")},
        {"name": "rows", "kind": "rows", "path": str(folder / "rows.parquet")},
        {"name": "more", "kind": "rows", "path": str(folder / "more")},
    ]


def test_corrupt_inputs_are_counted_and_nothing_else_is_lost(tmp_path):
    sources = corrupt_set(tmp_path / "in")
    report, rows = run(tmp_path / "out", sources, duplicates="off")
    assert report["sources"]["captions"] == {
        "in": 15,
        "kept": 5,
        "dropped": {
            "dicom_without_pixels": 1,
            "empty_text": 1,
            "image_count": 1,
            "image_too_large": 1,
            "image_too_small": 1,
            "missing_image": 1,
            "path_outside": 1,
            "unreadable_image": 2,
            "unreadable_record": 1,
        },
    }
    assert report["sources"]["llava"] == {
        "in": 5,
        "kept": 1,
        "dropped": {"bad_message": 1, "empty_text": 1, "image_count": 1, "no_answer": 1},
    }
    # the broken row group is the second of 64, 64 and 22 rows
    assert report["sources"]["rows"] == {
        "in": 150,
        "kept": 86,
        "dropped": {"unreadable_parquet": 64},
    }
    kept = [row["id"] for row in rows if row["source"] == "rows"]
    assert kept == [f"rows/r{n}" for n in range(150) if not 64 <= n < 128]
    assert report["sources"]["more"]["kept"] == 1
    assert report["sources"]["more"]["dropped"] == {"unreadable_parquet": 1}
    log = [json.loads(line) for line in (tmp_path / "out" / "dropped.jsonl").open()]
    assert sum(entry["count"] for entry in log) == sum(report["dropped"].values())


def write_config(folder: Path, sources: list, output: str, **kwargs) -> Path:
    given = {"output": output, "sources": sources, "tokenizer": "none", "chunk_rows": 3, **kwargs}
    path = folder / f"{output}.yaml"
    path.write_text(yaml.safe_dump(given))
    return path


def start(path: Path, workers: int) -> subprocess.Popen:
    flags = ["--workers", str(workers), "--no-progress"]
    main = "import sys; from medgpt.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", main, "curate", str(path), *flags]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def alive(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_run_killed_with_kill_9_and_resumed_is_byte_identical(tmp_path):
    path = caption_set(tmp_path / "in", 60)
    sources = [{"name": "pmc", "kind": "captions", "path": str(path)}]
    whole = start(write_config(tmp_path, sources, "whole"), 1)
    assert whole.wait(120) == 0, whole.stderr.read()
    expected = files(tmp_path / "whole")
    again, work = write_config(tmp_path, sources, "killed"), tmp_path / "killed" / "work"
    for least in (1, 6):  # killed twice, at another number of chunks
        process = start(again, 2)
        deadline = time.monotonic() + 60
        while len(list(work.glob("*.json"))) < least and time.monotonic() < deadline:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.005)
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(workers) >= 2
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        deadline = time.monotonic() + 30
        while any(map(alive, workers)) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not any(map(alive, workers))  # none works on without its leader
        done = len(list(work.glob("*.json")))
        assert least <= done < 20
        assert not (tmp_path / "killed" / "report.json").exists()
    times = {p.name: p.stat().st_mtime_ns for p in work.glob("*.json")}
    last = start(again, 2)
    assert last.wait(120) == 0, last.stderr.read()
    assert len(list(work.glob("*.json"))) == 20
    assert all((work / name).stat().st_mtime_ns == t for name, t in times.items())  # not redone
    found = files(tmp_path / "killed")
    assert found.keys() == expected.keys()
    assert all(found[name] == expected[name] for name in expected if name != "config.sha256")
    assert pq.read_table(tmp_path / "killed" / "rows-00000.parquet").num_rows == 60


def test_a_run_killed_while_it_merges_is_byte_identical(tmp_path):
    words = [
        "lung",
        "heart",
        "liver",
        "spleen",
        "kidney",
        "colon",
        "femur",
        "tibia",
        "retina",
        "aorta",
    ]
    rows = [
        {
            "id": str(n),
            "messages": [
                {"role": "user", "content": f"What lies next to the {words[n % 10]} in case {n}?"},
                {"role": "assistant", "content": f"The {words[n // 10 % 10]}, of {n * 17} grams."},
            ],
        }
        for n in range(1200)
    ]
    write_rows(tmp_path / "in.parquet", rows)
    sources = [{"name": "r", "kind": "rows", "path": str(tmp_path / "in.parquet")}]
    run(tmp_path / "whole", sources, chunk_rows=64, shard_rows=200)
    again = write_config(tmp_path, sources, "killed", chunk_rows=64, shard_rows=200)
    process = start(again, 1)
    shard = tmp_path / "killed" / "rows-00001.parquet.tmp"
    while not shard.exists():  # the first shard is written, the last is not
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed" / "report.json").exists()
    assert shard.exists()
    curate(read_config(again), workers=2, progress=False)
    assert not shard.exists()
    expected, found = files(tmp_path / "whole"), files(tmp_path / "killed")
    assert expected == found
    assert len([name for name in found if name.startswith("rows-")]) == 6


def test_a_worker_that_dies_loses_nothing(tmp_path):
    path = caption_set(tmp_path / "in", 60)
    sources = [{"name": "pmc", "kind": "captions", "path": str(path)}]
    run(tmp_path / "whole", sources)
    work, dead = tmp_path / "out" / "work", []

    def kill_one() -> None:  # as a kernel does that is out of memory
        deadline = time.monotonic() + 60
        while not list(work.glob("*.json")) and time.monotonic() < deadline:
            time.sleep(0.002)
        dead.append(multiprocessing.active_children()[0].pid)
        os.kill(dead[0], signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    report = curate(config(tmp_path / "out", sources), workers=2, progress=False)
    killer.join()
    assert dead
    assert report["kept"] == 60
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_row_that_crashes_is_counted(tmp_path):
    path = caption_set(tmp_path / "in", 3)
    settings = config(tmp_path, [{"name": "pmc", "kind": "captions", "path": str(path)}])
    (chunk,) = chunked(settings)
    inspector = Inspector(settings, Contamination())
    assert run_chunk(0, chunk, tmp_path, inspector, skip={1}) == {"seen": 3, "kept": 2}
    told = json.loads((tmp_path / "00000000.json").read_text())
    assert told["dropped"] == [["pmc", "pmc/captions-1", "crash", 1]]


def test_the_output_does_not_depend_on_workers_or_chunks(tmp_path):
    sources = corrupt_set(tmp_path / "in")
    one = config(tmp_path / "one", sources, shard_rows=40)
    three = config(tmp_path / "three", sources, shard_rows=40)
    assert curate(one, progress=False) == curate(three, workers=3, progress=False)
    assert files(tmp_path / "one") == files(tmp_path / "three")
    assert len(list((tmp_path / "one").glob("rows-*.parquet"))) == 3
    other = curate(config(tmp_path / "big", sources, chunk_rows=99), progress=False)
    assert other["dropped"] == curate(one, progress=False)["dropped"]


def test_another_configuration_does_not_mix_with_a_begun_output(tmp_path):
    path = caption_set(tmp_path / "in", 3)
    source = {"name": "pmc", "kind": "captions", "path": str(path)}
    run(tmp_path / "out", [source])
    with pytest.raises(ValueError, match="expected the configuration and inputs that"):
        curate(config(tmp_path / "out", [source], min_side=30), progress=False)
    remove_work(tmp_path / "out")
    before = files(tmp_path / "out")
    run(tmp_path / "out", [source])  # a finished run is not run again
    assert files(tmp_path / "out") == before


def test_texts_of_patients_are_shown_only_when_asked_for(tmp_path):
    secret = "Nothing of note whatsoever zyzzyva"
    path = caption_set(tmp_path / "in", 2, [("000.jpg", secret)])
    source = {"name": "pmc", "kind": "captions", "path": str(path)}
    report, _ = run(tmp_path / "out", [source])
    assert report["dropped"] == {"not_clinical": 1}
    left = [p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert not any(b"zyzzyva" in content for content in left)
    run(tmp_path / "shown", [source], examples=1)
    assert "zyzzyva" in (tmp_path / "shown" / "report.html").read_text()


def test_pictures_with_letters_are_flagged_or_dropped(tmp_path):
    (tmp_path / "in").mkdir()
    answers = [{"from": "human", "value": "<image> What?"}, {"from": "gpt", "value": "A node."}]
    records = [
        {"id": name, "image": name, "conversations": answers}
        for name in (US_WITH_TEXT, "RG1_J2KR.dcm", "RG3_J2KR.dcm")
    ]
    for record in records:
        (tmp_path / "in" / record["id"]).write_bytes(dicom(record["id"]).read_bytes())
    (tmp_path / "in" / "set.json").write_text(json.dumps(records))
    source = {"name": "l", "kind": "llava", "path": str(tmp_path / "in" / "set.json")}
    report, rows = run(tmp_path / "out", [source])
    assert [row["meta"].get("flags") for row in rows] == [["burned_in_text"], None, None]
    assert report["flags"] == {"burned_in_text": 1}
    report, rows = run(tmp_path / "drop", [{**source, "burned_in": "drop"}])
    assert report["dropped"] == {"burned_in_text": 1}
    assert [row["id"] for row in rows] == ["l/RG1_J2KR.dcm", "l/RG3_J2KR.dcm"]


def test_rows_of_benchmarks_are_left_out_and_named(tmp_path):
    stem = (
        "A 54-year-old farmer has had a dry cough and slowly worsening shortness of breath "
        "for nine months. Which of these is most likely?"
    )
    items = [
        {"id": "q1", "question": stem, "options": {"A": "Farmer's lung", "B": "Asthma"}},
        {"id": "q2", "question": "Is it?", "options": ["yes", "no"], "images": ["eval.png"]},
    ]
    (tmp_path / "bench").mkdir()
    Image.fromarray(crop("histology", 2).repeat(2, 0).repeat(2, 1)).save(
        tmp_path / "bench/eval.png"
    )
    lines = "".join(json.dumps(item) + "\n" for item in items)
    (tmp_path / "bench" / "test.jsonl").write_text(lines)
    path = caption_set(tmp_path / "in", 4, [("001.png", f"CT of a lung. {stem} Fibrosis of it.")])
    sources = [{"name": "pmc", "kind": "captions", "path": str(path)}]
    benchmarks = [{"name": "exam", "path": str(tmp_path / "bench" / "test.jsonl")}]
    report, rows = run(tmp_path / "out", sources, benchmarks=benchmarks, duplicates="off")
    assert report["dropped"] == {"contaminated": 2}
    assert [row["id"][-1] for row in rows] == ["0", "1", "3"]
    found = json.loads((tmp_path / "out" / "contaminated.json").read_text())
    assert found == {"exam": {"q1": ["pmc/captions-4"], "q2": ["pmc/captions-2"]}}
    assert run(tmp_path / "free", sources, duplicates="off")[0]["kept"] == 5


def test_tokens_of_the_report_are_those_that_are_packed(tmp_path):
    from medgpt.config import MedGPTConfig
    from medgpt.data.packing import PackedDataset
    from medgpt.processor import MedGPTProcessor
    from medgpt.tokenizer import harmony_tokenizer

    sources = [
        {"name": "pmc", "kind": "captions", "path": str(caption_set(tmp_path / "in", 3))},
        {"name": "l", "kind": "llava", "path": str(llava_set(tmp_path / "in"))},
    ]
    report, rows = run(tmp_path / "out", sources, tokenizer="harmony")
    processor = MedGPTProcessor.from_config(MedGPTConfig.tiny(), harmony_tokenizer())
    packs = PackedDataset(tmp_path / "out", processor, 8192)
    assert packs.lengths.sum() == report["tokens"]
    assert sum(report["token_histogram"].values()) == len(rows) == 6
    tokens = sum(packs[i]["input_ids"].shape[1] for i in range(len(packs)))
    assert tokens == report["tokens"]


def test_the_documentation_is_true(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "medgpt_data.md").read_text()
    blocks = [b.split("```")[0].partition("\n") for b in text.split("```")[1::2]]
    exec(next(code for kind, _, code in blocks if kind == "python"), {})
    (tmp_path / "a.yaml").write_text(next(code for kind, _, code in blocks if kind == "yaml"))
    assert [source.kind for source in read_config("a.yaml").sources] == [
        "captions",
        "llava",
        "studies",
        "rows",
    ]


def test_the_command_says_what_is_wrong(tmp_path, capsys):
    bad = write_config(tmp_path, [{"name": "x", "kind": "zip", "path": "x"}], "out")
    assert main(["curate", str(bad)]) == 2
    assert (
        "expected kind one of captions, llava, studies, rows, got 'zip'" in capsys.readouterr().err
    )
    path = caption_set(tmp_path / "in", 2)
    toml = tmp_path / "good.toml"
    toml.write_text(
        f'output = "good"\ntokenizer = "none"\n[[sources]]\nname = "a"\nkind = "captions"\n'
        f'path = "{path}"\n'
    )
    if sys.version_info >= (3, 11):
        assert main(["curate", str(toml), "--no-progress", "--remove-work"]) == 0
        assert "2 rows in, 2 kept" in capsys.readouterr().out
        assert not (tmp_path / "good" / "work").exists()
    good = [{"name": "a", "kind": "rows", "path": "x"}]
    for change, expected in (
        ({"sources": good, "sorces": []}, "entries among"),
        ({"sources": good, "near_text": 1.5}, "near_text from 0"),
        ({"sources": []}, "sources with names of their own"),
    ):
        path = tmp_path / "bad.yaml"
        path.write_text(yaml.safe_dump({"output": "o", **change}))
        with pytest.raises(ValueError, match=expected):
            read_config(path)
