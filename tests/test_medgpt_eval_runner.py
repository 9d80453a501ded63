"""Runs through inspect_ai with models in this process; slow, and needs medgpt-kernels[eval].

The run on real questions takes its material from MEDGPT_EVAL_MODEL (a folder or .gguf file of a
small text model) and MEDGPT_EVAL_DATA (MedMCQA rows).
"""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from medgpt.eval.plan import plan
from medgpt.eval.tasks import get

pytestmark = pytest.mark.slow

QUESTIONS = 24


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    from medgpt import checkpoint
    from medgpt.config import MedGPTConfig

    folder = tmp_path_factory.mktemp("model") / "tiny"
    checkpoint.create(MedGPTConfig.tiny(), folder, progress=False)
    return folder


def png(seed: int) -> bytes:
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def frames(tmp_path_factory) -> Path:
    """MedFrameQA's schema: 2 to 5 images a question."""
    folder = tmp_path_factory.mktemp("frames")
    for n in range(6):
        (folder / f"{n}.png").write_bytes(png(n))
    rows = []
    for n in range(QUESTIONS):
        row = {
            "question": f"Which of {n}?",
            "options": ["left", "right"],
            "correct_answer": "AB"[n % 2],
        }
        row |= {"system": "CNS", "organ": f"organ {n % 3}", "modality": "MRI"}
        row |= {f"image_{k}": f"{(n + k) % 6}.png" if k <= 2 + n % 4 else None for k in range(1, 6)}
        rows.append(json.dumps(row))
    (folder / "test.jsonl").write_text("\n".join(rows))
    return folder


def command(task, data, model, out, *more) -> list[str]:
    start = [sys.executable, "-m", "medgpt", "eval", task, "--data", str(data)]
    return [*start, "--model", model, "--out", str(out), *map(str, more)]


def run(*arguments) -> str:
    done = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def killed(batches: int, *arguments) -> None:
    """Starts a run and kills it, with signal 9, once so many batches are on disk."""
    process = subprocess.Popen(command(*arguments), stderr=subprocess.DEVNULL)
    answers = Path(arguments[3]) / "answers"
    try:
        while sum(p.read_bytes().count(b"\n") for p in answers.glob("*.jsonl")) < 1 + batches:
            assert process.poll() is None, "it ended before it was killed"
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def asked_keys(out: Path) -> list[str]:
    lines = [line for p in (out / "answers").glob("*.jsonl") for line in p.open()]
    return [key for line in lines for key in json.loads(line).get("batch", ())]


def journals(out: Path) -> list[list[str]]:
    """Lines of the answers on disk; a later batch may be there first."""
    return [sorted(p.read_text().split("\n")) for p in sorted((out / "answers").iterdir())]


def test_medgpt_in_process_killed_and_resumed(tiny, frames, tmp_path):
    model, more = f"medgpt:{tiny}", ("--max-tokens", 12, "--batch-size", 4)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run("medframeqa", frames, model, whole, *more)
    killed(2, "medframeqa", frames, model, cut, *more)
    assert 8 <= len(asked_keys(cut)) < QUESTIONS
    run("medframeqa", frames, model, cut, *more)
    for out in (whole, cut):
        assert len(asked_keys(out)) == len(set(asked_keys(out))) == QUESTIONS
    assert journals(whole) == journals(cut)
    records = [(out / "records" / "medframeqa.jsonl").read_bytes() for out in (whole, cut)]
    assert records[0] == records[1]
    result = json.loads((cut / "tasks" / "medframeqa.json").read_text())
    assert result["timing"]["known"] >= 8
    assert result["timing"]["known"] + result["timing"]["asked"] == QUESTIONS
    again = run("medframeqa", frames, model, cut, *more)
    assert "asked 0, known 24" in again
    # other decoding is another cache
    other = run("medframeqa", frames, model, cut, "--max-tokens", 13, "--batch-size", 4)
    assert "asked 24, known 0" in other
    # no question, option or completion outside `answers`
    for path in (p for p in cut.rglob("*") if p.is_file() and p.parent.name != "answers"):
        assert b"Which of" not in path.read_bytes()
    from inspect_ai.log import list_eval_logs, read_eval_log

    logs = [read_eval_log(log).model_dump_json() for log in list_eval_logs(str(cut / "inspect"))]
    assert logs
    assert not any("Which of" in log for log in logs)


def test_every_image_reaches_the_model(tiny, frames):
    """As many image tokens as tiles of all images, and other answers' keys for other images."""
    from inspect_ai.model import GenerateConfig

    from medgpt.eval.asking import messages_of
    from medgpt.eval.models import open_model

    model, _ = open_model(f"medgpt:{tiny}", dtype="float32")
    made = plan(get("medframeqa"), frames)
    seen = {}
    forward = model.api.model.generate

    def generate(**inputs):
        seen["tokens"] = (inputs["input_ids"] == 200013).sum(1).tolist()
        return forward(**inputs)

    model.api.model.generate = generate
    from medgpt.eval.providers import _plain

    chats = [[_plain(m) for m in messages_of(made.conversation(i))] for i in range(4)]
    batch = model.api.complete(chats, GenerateConfig(max_tokens=8))
    one_image = seen["tokens"][0] // 2
    assert seen["tokens"] == [one_image * (2 + i) for i in range(4)]
    single = [model.api.complete([chat], GenerateConfig(max_tokens=8))[0] for chat in chats]
    assert [b.text for b in batch] == [s.text for s in single]
    assert len({len(c) for c in map(str, chats)}) > 1


def test_the_cache_knows_another_checkpoint(tiny, tmp_path):
    from medgpt.eval.providers import fingerprint

    before = fingerprint(tiny)
    assert before == fingerprint(tiny)
    weights = next(tiny.glob("*.safetensors"))
    kept = weights.read_bytes()
    try:
        # a byte in a sampled piece: the head and the tail are among them
        weights.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
        assert fingerprint(tiny) != before
    finally:
        weights.write_bytes(kept)


def test_a_text_model_refuses_images(frames, tmp_path):
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from medgpt.eval import models, runner
    from medgpt.tokenizer import harmony_tokenizer

    folder = tmp_path / "llama"
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=201088, num_attention_heads=2, num_key_value_heads=1, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    harmony_tokenizer().save_pretrained(folder)
    assert isinstance(AutoTokenizer.from_pretrained(folder), PreTrainedTokenizerFast)
    model, identity = models.open_model(f"transformers:{folder}")
    made = plan(get("medframeqa"), frames, limit=4)
    with pytest.raises(RuntimeError, match=r"expected text only, got images.*the same command"):
        runner.run_task(made, model, identity, tmp_path / "out")
    made = plan(get("medframeqa"), frames, limit=4, drop_images=True)
    result = runner.run_task(made, model, identity, tmp_path / "out")
    assert result["loaded"]["images_dropped"]
    assert result["n"] == 4


def test_a_peer_of_inspect(frames, tmp_path):
    """Any model that inspect_ai knows; this one always says A and counts what it is sent."""
    from inspect_ai.log import list_eval_logs, read_eval_log
    from inspect_ai.model import ModelAPI, ModelOutput, modelapi

    from medgpt.eval import models, runner

    sent = []

    @modelapi(name="always_a")
    class AlwaysA(ModelAPI):
        async def generate(self, input, tools, tool_choice, config):
            parts = input[0].content
            sent.append([p.image for p in parts if p.type == "image"])
            return ModelOutput.from_content("always_a", "**A**")

    model, identity = models.open_model("always_a/model")
    made = plan(get("medframeqa"), frames)
    result = runner.run_task(made, model, identity, tmp_path / "out", log_samples=True)
    assert result["metrics"]["accuracy"]["value"] == 0.5
    assert result["baselines"]["position_bias"] == 0.5
    assert sorted(map(len, sent)) == sorted(len(q.images) for q in made.questions)
    assert all(uri.startswith("data:image/png;base64,") for images in sent for uri in images)
    log = read_eval_log(list_eval_logs(str(tmp_path / "out" / "inspect"))[0])
    assert len(log.samples) == QUESTIONS
    scores = {m.name: m.value for m in log.results.scores[0].metrics.values()}
    assert scores["accuracy"] == 0.5
    assert runner.run_task(made, model, identity, tmp_path / "out")["timing"]["asked"] == 0
    assert len(sent) == QUESTIONS


@pytest.mark.skipif(
    not {"MEDGPT_EVAL_MODEL", "MEDGPT_EVAL_DATA"} <= set(os.environ),
    reason="set MEDGPT_EVAL_MODEL and MEDGPT_EVAL_DATA",
)
def test_real_questions_twice_once_killed(tmp_path):
    """The same bytes from a run that never stopped and from one killed and gone on with."""
    data, model = os.environ["MEDGPT_EVAL_DATA"], f"transformers:{os.environ['MEDGPT_EVAL_MODEL']}"
    whole, cut, limit = tmp_path / "whole", tmp_path / "cut", ("--limit", 200)
    print(run("medmcqa", data, model, whole, *limit))
    killed(5, "medmcqa", data, model, cut, *limit)
    before = asked_keys(cut)
    assert 5 * 16 <= len(before) < 200
    print(run("medmcqa", data, model, cut, *limit))
    assert asked_keys(cut)[: len(before)] == before
    assert len(asked_keys(cut)) == len(set(asked_keys(cut))) == 200
    assert journals(whole) == journals(cut)
    names = [str(p.relative_to(whole)) for p in (whole / "records").iterdir()]
    assert names == ["records/medmcqa.jsonl"]
    assert (whole / names[0]).read_bytes() == (cut / names[0]).read_bytes()
    results = [json.loads((out / "tasks" / "medmcqa.json").read_text()) for out in (whole, cut)]
    timing = [result.pop("timing") for result in results]
    assert results[0] == results[1]
    assert results[0]["n"] == timing[0]["asked"] == 200
    assert timing[1]["known"] == len(before)
    assert timing[1]["asked"] == 200 - len(before)
