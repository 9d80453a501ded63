"""What a run asks: conversations and their keys, in batches that depend on the questions alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from medgpt.eval import prompts
from medgpt.eval.prompts import Prompt
from medgpt.eval.questions import Question
from medgpt.eval.tasks import Task, load


class Plan(NamedTuple):
    """A task ready to be asked.

    Attributes:
        questions: N of them.
        examples: of each, [N][shots].
        keys: of each conversation; equal conversations are asked once.
        loaded: what was loaded, and the sha256 over all keys.
    """

    task: Task
    prompt: Prompt
    questions: list[Question]
    examples: list[list[Question]]
    keys: list[str]
    loaded: dict

    def conversation(self, index: int) -> list[dict]:
        return prompts.messages(self.questions[index], self.prompt, self.examples[index])

    def batches(self, size: int) -> list[list[int]]:
        """Indices of one question a key, the longest conversations first."""
        first: dict[str, int] = {}
        for index, key in enumerate(self.keys):
            first.setdefault(key, index)
        order = sorted(first.values(), key=lambda i: (-self._length(i), self.keys[i]))
        return [order[at : at + size] for at in range(0, len(order), size)]

    def _length(self, index: int) -> int:
        asked = (self.questions[index], *self.examples[index])
        text = sum(len(q.text) + sum(map(len, q.options.values())) for q in asked)
        return text + sum(10_000 * len(q.images) for q in asked)


def plan(
    task: Task,
    data: str | Path,
    *,
    limit: int | None = None,
    shots: int | None = None,
    shots_data: str | Path | None = None,
    seed: int = 0,
    images: str | Path | None = None,
    drop_images: bool = False,
) -> Plan:
    """Loads a task and draws its examples.

    Args:
        limit: the first so many questions.
        shots: examples before each; default the task's own.
        shots_data: where they come from; default the task's other questions, none of which shares
            a cluster or a text with the question.
        seed: of the examples.
    """
    questions, report = load(task, data, images=images, drop_images=drop_images)
    shots = task.shots if shots is None else shots
    pool: Sequence[Question] = questions
    if shots and shots_data is not None:
        pool, found = load(task, shots_data, images=images, drop_images=drop_images)
        report = {**report, "examples": found}
    asked = questions[:limit]
    examples = [prompts.examples_for(q, pool, shots, seed) for q in asked]
    made = Plan(task, task.prompt, asked, examples, [], report)
    keys = [prompts.prompt_key(made.conversation(i)) for i in range(len(asked))]
    report = {**report, "asked": len(asked), "prompts_sha256": prompts.digest(keys)}
    return made._replace(keys=keys, loaded=report)


def described(made: Plan, shots_seed: int) -> Mapping:
    """The prompt and examples of a plan, for the results."""
    return {
        "name": made.prompt.name,
        "version": made.prompt.version,
        "hash": made.prompt.hash,
        "shots": len(made.examples[0]) if made.examples else 0,
        "shots_seed": shots_seed,
    }
