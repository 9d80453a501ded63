"""Runs tasks on a model through inspect_ai; what was answered before is not asked again."""

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from medgpt.eval import scoring
from medgpt.eval.asking import Asker, messages_of
from medgpt.eval.files import write_json, write_lines
from medgpt.eval.journal import Completion, Journal
from medgpt.eval.plan import Plan, described


class Decoding(NamedTuple):
    """How answers are generated; part of the cache's key.

    Attributes:
        max_tokens: None: the prompt's own for transformers/, 4,096 for models that may reason.
    """

    max_tokens: int | None = None
    temperature: float = 0.0
    reasoning_effort: str | None = None
    seed: int = 0


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
    write_lines(out / "records" / f"{made.task.name}.jsonl", ordered)
    measured = None
    if any(q.kind == "report" for q in made.questions):
        from medgpt.eval.report_metrics.cli import Options, measure

        path = out / "reports" / f"{made.task.name}.jsonl"
        write_lines(path, _reports(made, answers))
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
                state.messages = messages_of(made.conversation(at[state.sample_id]))
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
