"""Runs tasks on a model through inspect_ai; what was answered before is not asked again."""

import base64
import contextlib
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from medgpt.eval import scoring
from medgpt.eval.journal import Completion, Journal
from medgpt.eval.plan import Plan, described
from medgpt.eval.questions import Picture

LOCAL = ("medgpt", "transformers")
MINUTE = 60.0  # seconds
MAGIC = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg"}


class Decoding(NamedTuple):
    """How answers are generated; part of the cache's key.

    Attributes:
        max_tokens: None: the prompt's own for transformers/, 4,096 for models that may reason.
    """

    max_tokens: int | None = None
    temperature: float = 0.0
    reasoning_effort: str | None = None
    seed: int = 0


class Asker:
    """Completions of a plan, a batch at a time, from the journal or from the model."""

    def __init__(self, made: Plan, model, journal: Journal, size: int, config):
        self.made, self.model, self.journal, self.config = made, model, journal, config
        batches = made.batches(size)
        self.batch_of = {made.keys[i]: batch for batch in batches for i in batch}
        self.asked = 0
        known = sum(key in journal for key in self.batch_of)
        self.progress = Progress(made.task.name, len(self.batch_of), known)
        self.locks: dict[int, object] = {}

    async def answer(self, key: str) -> Completion:
        import anyio

        if key not in self.journal:
            batch = self.batch_of[key]
            # one batch at a time in this process, one request a question elsewhere
            local = hasattr(self.model.api, "expect")
            lock = self.locks.setdefault(0 if local else id(batch), anyio.Lock())
            async with lock:
                if key not in self.journal:
                    await self._ask([i for i in batch if self.made.keys[i] not in self.journal])
        return self.journal[key]

    async def _ask(self, indices: list[int]) -> None:
        import anyio

        found: dict[str, Completion] = {}

        async def one(index: int) -> None:
            output = await self.model.generate(
                _messages(self.made.conversation(index)), config=self.config
            )
            usage = output.usage
            found[self.made.keys[index]] = Completion(
                output.completion,
                output.stop_reason,
                usage.input_tokens if usage else 0,
                usage.output_tokens if usage else 0,
            )

        if hasattr(self.model.api, "expect"):
            self.model.api.expect = len(indices)
        async with anyio.create_task_group() as group:
            for index in indices:
                group.start_soon(one, index)
        self.asked += len(found)
        self.journal.add({self.made.keys[i]: found[self.made.keys[i]] for i in indices})
        self.progress.add(len(found))


class Progress:
    """A bar where somebody sees it; elsewhere, as in a job's log, a line a minute."""

    def __init__(self, name: str, total: int, known: int):
        from tqdm import tqdm

        self.name, self.total, self.done = name, total, known
        self.told = time.monotonic()
        self.bar = tqdm(desc=name, total=total, initial=known, unit="q", disable=None)

    def add(self, count: int) -> None:
        self.done += count
        self.bar.update(count)
        if self.bar.disable and time.monotonic() - self.told >= MINUTE:
            self.told = time.monotonic()
            print(f"{self.name}: {self.done} of {self.total}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def quiet_bars():
    """transformers' bars of weights only where somebody sees them."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _messages(conversation: Sequence[dict]) -> list:
    from inspect_ai.model import (
        ChatMessageAssistant,
        ChatMessageUser,
        ContentImage,
        ContentText,
    )

    kinds = {"user": ChatMessageUser, "assistant": ChatMessageAssistant}
    messages = []
    for turn in conversation:
        content = turn["content"]
        if not isinstance(content, str):
            content = [
                ContentText(text=part["text"])
                if part["type"] == "text"
                else ContentImage(image=data_uri(part["image"]))
                for part in content
            ]
        messages.append(kinds[turn["role"]](content=content))
    return messages


def data_uri(image: Picture) -> str:
    """PNG and JPEG as they are; whatever else load_image reads, such as DICOM, as PNG."""
    data = image if isinstance(image, bytes) else image.read_bytes()
    kind = next((kind for magic, kind in MAGIC.items() if data.startswith(magic)), None)
    if kind is None:
        import io

        from PIL import Image

        from medgpt.images import load_image

        source = Image.open(io.BytesIO(data)) if isinstance(image, bytes) else image
        buffer = io.BytesIO()
        Image.fromarray(load_image(source)).save(buffer, format="PNG")
        data, kind = buffer.getvalue(), "png"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def open_model(name: str, **model_args):
    """(inspect model, identity) of "medgpt:DIR", "transformers:DIR" or any inspect model's name.

    The identity of a local model holds its fingerprint: another checkpoint in the same place
    shares no cached answer with it.
    """
    from inspect_ai.model import get_model

    provider, sign, rest = name.partition(":")
    if sign and provider in LOCAL:
        from medgpt.eval import providers

        path = Path(rest).expanduser().resolve()
        if not path.exists():
            raise ValueError(f"--model: expected a checkpoint, got {rest}, not there")
        identity = {"model": f"{provider}:{path.name}", "sha256": providers.fingerprint(path)}
        identity["args"] = dict(model_args)
        model = get_model(f"{provider}/{path}", memoize=False, **model_args)
        with quiet_bars():
            model.api.ready()
        return model, identity
    model = get_model(name, **model_args)
    return model, {"model": name, "base_url": model.api.base_url, "args": dict(model_args)}


def run_task(
    made: Plan,
    model,
    identity: Mapping,
    out: str | Path,
    *,
    decoding: Decoding | None = None,
    batch_size: int = 16,
    connections: int = 16,
    cache: str | Path | None = None,
    log_samples: bool = False,
    seed: int = 0,
) -> dict:
    """Asks what the journal does not know, scores everything, writes OUT/tasks/NAME.json.

    Args:
        model, identity: of open_model.
        out: folder of the run. Its `answers` (unless cache is given) and `reports` hold completions
            and are its owner's alone; all else holds ids, letters and numbers.
        batch_size: of models in this process. Part of the identity there: rounding depends on it.
        connections: requests at a time elsewhere.
        cache: folder of completions shared by runs.
        seed: of the examples and intervals.
        log_samples: put prompts and completions into inspect's log, for its viewer.

    Returns:
        The result that was written.
    """
    from inspect_ai import eval as inspect_eval
    from inspect_ai.model import GenerateConfig

    out, decoding = Path(out), decoding or Decoding()
    local = hasattr(model.api, "expect")
    tokens = decoding.max_tokens
    if tokens is None:
        text_only = identity["model"].startswith("transformers:")
        tokens = made.prompt.max_tokens if text_only else 4096
    decoding = decoding._replace(max_tokens=tokens)
    if local:
        identity = {**identity, "batch_size": batch_size}
    config = GenerateConfig(
        max_connections=batch_size if local else connections, **decoding._asdict()
    )
    journal = Journal(cache or out / "answers", {**identity, "decoding": decoding._asdict()})
    started = time.perf_counter()
    with journal.open():
        known = sum(key in journal for key in set(made.keys))
        asker = Asker(made, model, journal, batch_size if local else 1, config)
        records: dict[str, dict] = {}
        logs = inspect_eval(
            _inspect_task(made, asker, records, log_samples),
            model=model,
            log_dir=str(out / "inspect"),
            log_samples=log_samples,
            log_realtime=False,
            log_images=log_samples,
            log_model_api=False,
            display="none",
            max_samples=4 * batch_size if local else connections,
            score_display=False,
            ctl_server=False,
        )
        if logs[0].status != "success":
            why = logs[0].error.message if logs[0].error else logs[0].status
            raise RuntimeError(
                f"{made.task.name}: expected {len(made.keys)} answers, got {asker.asked} and then "
                f"{why}; the same command goes on from there"
            )
        asker.progress.bar.close()
        answers = [journal[key] for key in made.keys]
    ordered = [records[question.id] for question in made.questions]
    wall = time.perf_counter() - started
    result = {
        "task": made.task.name,
        "title": made.task.title,
        "published": made.task.published,
        "note": made.task.note,
        "model": identity,
        "decoding": decoding._asdict(),
        "prompt": described(made, seed),
        "loaded": made.loaded,
        "cut": sum(a.stop == "max_tokens" for a in answers),
        "tokens": {
            "input": sum(a.input_tokens for a in answers),
            "output": sum(a.output_tokens for a in answers),
        },
        **scoring.summarize(ordered, seed=seed),
        "timing": {
            "known": known,
            "asked": asker.asked,
            "seconds": round(wall, 3),
            "questions_per_second": round(asker.asked / wall, 3),
        },
        "versions": versions(),
    }
    _write_lines(out / "records" / f"{made.task.name}.jsonl", ordered)
    measured = None
    if any(q.kind == "report" for q in made.questions):
        from medgpt.eval.report_metrics.cli import Options, measure

        path = out / "reports" / f"{made.task.name}.jsonl"
        _write_lines(path, _reports(made, answers))
        # what text alone gives; `medgpt eval metrics RUN --cache CACHE` gives the rest
        measured = measure(path, Options(seed=seed))[0]
        write_json(out / "metrics" / f"{made.task.name}.json", measured)
    write_json(out / "tasks" / f"{made.task.name}.json", result)
    return result if measured is None else {**result, "measured": measured}


def _reports(made: Plan, answers: Sequence[Completion]) -> list[dict]:
    """What `medgpt eval metrics` reads: texts, and whose they are."""
    from medgpt.eval.answers import final_text

    return [
        {
            "id": q.id,
            "patient": q.cluster or None,
            **q.facts,
            "reference": q.answer,
            "generated": final_text(answer.text)[0],
        }
        for q, answer in zip(made.questions, answers, strict=True)
    ]


def _inspect_task(made: Plan, asker: Asker, records: dict, log_samples: bool):
    """made as an inspect_ai Task; its log names samples by id, with their texts if asked to."""
    from inspect_ai import Task
    from inspect_ai.dataset import MemoryDataset, Sample
    from inspect_ai.model import ModelOutput
    from inspect_ai.scorer import Score, accuracy, scorer, stderr
    from inspect_ai.solver import solver

    at = {question.id: index for index, question in enumerate(made.questions)}

    @solver(name="answered")
    def answered():
        async def solve(state, generate):
            completion = await asker.answer(made.keys[at[state.sample_id]])
            state.output = ModelOutput.from_content(str(state.model), completion.text)
            if log_samples:
                state.messages = _messages(made.conversation(at[state.sample_id]))
            return state

        return solve

    @scorer(metrics=[accuracy(), stderr(cluster="cluster")], name="exact")
    def exact():
        async def score(state, target):
            question = made.questions[at[state.sample_id]]
            record = scoring.score(question, state.output.completion)
            records[question.id] = record
            return Score(
                value=record["score"] or 0.0,
                answer=record.get("said"),
                explanation=record["reason"],
            )

        return score

    samples = [
        Sample(input=key, id=q.id, target="", metadata={"cluster": q.cluster or q.id})
        for q, key in zip(made.questions, made.keys, strict=True)
    ]
    return Task(
        dataset=MemoryDataset(samples, name=made.task.name),
        solver=answered(),
        scorer=exact(),
        name=made.task.name,
        version=made.prompt.version,
        metadata={"prompt": made.prompt.hash},
    )


def versions() -> dict:
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": sys.version.split()[0]}
    for name in ("medgpt-kernels", "inspect_ai", "transformers", "torch", "numpy", "scipy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def write_json(path: Path, value) -> None:
    """Whole or not at all."""
    _replace(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def _write_lines(path: Path, rows: Sequence[Mapping]) -> None:
    _replace(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    new = path.with_name(path.name + ".new")
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
        stream.write(text)
    os.replace(new, path)
