"""Prompts: versioned, hashed, and rendered to messages, with examples that leak nothing.

A change of any template changes its version and so the hash in every result.
"""

import hashlib
import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from medgpt.eval.answers import normal
from medgpt.eval.questions import Picture, Question, picture_hash

_SLOT = re.compile(r"\{(question|options|labels)\}")
_PLACE = re.compile(r"<image (\d+)>")


class Prompt(NamedTuple):
    """A template: {question}, {options} (one a line) and {labels} stand in the question's text.

    Attributes:
        name, version: what results call it.
        template: by variant of the question; "" is the default one.
        answer: what an example's answer turn says: {letter} or {answer}.
        max_tokens: of an answer without reasoning.
    """

    name: str
    version: int
    template: Mapping[str, str]
    answer: str = "{answer}"
    max_tokens: int = 64

    @property
    def hash(self) -> str:
        """First 16 digits of sha256 over all of it."""
        return digest(self._asdict())[:16]


CHOICE = Prompt(
    "choice",
    1,
    {"": "{question}\n{options}\nAnswer with the option's letter from the given choices directly."},
)
LABEL = Prompt("label", 1, {"": "{question}\nAnswer with one of: {labels}."})
SHORT = Prompt(
    "short",
    1,
    {
        "": "{question}\nAnswer the question using a single word or phrase.",
        "zh": "{question}\n请用一个词或短语回答问题。",
    },
)
FINDINGS = Prompt(
    "findings",
    1,
    {"": "{question}\nWrite the findings section of the radiology report of these images."},
    max_tokens=512,
)
IMPRESSION = Prompt(
    "impression",
    1,
    {"": "{question}\nWrite the impression section of this radiology report."},
    max_tokens=256,
)
PROMPTS = {p.name: p for p in (CHOICE, LABEL, SHORT, FINDINGS, IMPRESSION)}


def digest(value) -> str:
    """sha256 of a value's canonical JSON."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def user_parts(question: Question, prompt: Prompt) -> list[dict]:
    """Text and image parts of a question, all of its images, each where its text names it."""
    template = prompt.template.get(question.variant, prompt.template[""])
    options = "\n".join(f"{letter}. {text}" for letter, text in question.options.items())
    values = {
        "question": question.text,
        "options": options,
        "labels": ", ".join(question.labels),
    }
    text = _SLOT.sub(lambda slot: values[slot[1]], template)
    named = [int(n) for n in _PLACE.findall(text)]
    if any(n < 1 or n > len(question.images) for n in named):
        text, named = _PLACE.sub("", text), []
    first = [n for n in range(1, len(question.images) + 1) if n not in named]
    parts = [_image(question.images[n - 1]) for n in first]
    for index, piece in enumerate(_PLACE.split(text)):
        if index % 2:
            parts.append(_image(question.images[int(piece) - 1]))
        elif piece.strip():
            parts.append({"type": "text", "text": piece.strip() if not named else piece})
    return parts


def _image(source: Picture) -> dict:
    return {"type": "image", "image": source}


def messages(question: Question, prompt: Prompt, examples: Sequence[Question] = ()) -> list[dict]:
    """A conversation that ends with the question; each example is a turn with its answer."""
    turns = []
    for example in examples:
        turns.append({"role": "user", "content": user_parts(example, prompt)})
        turns.append({"role": "assistant", "content": prompt.answer.format(answer=example.answer)})
    return [*turns, {"role": "user", "content": user_parts(question, prompt)}]


def prompt_key(conversation: Sequence[dict]) -> str:
    """sha256 of a conversation; images count as the sha256 of their encoded bytes."""

    def part(p: dict) -> dict:
        return {**p, "image": picture_hash(p["image"])} if p["type"] == "image" else p

    return digest(
        [
            {"role": m["role"], "content": m["content"]}
            if isinstance(m["content"], str)
            else {"role": m["role"], "content": [part(p) for p in m["content"]]}
            for m in conversation
        ]
    )


def examples_for(
    question: Question, pool: Sequence[Question], shots: int, seed: int
) -> list[Question]:
    """Examples drawn from a pool that have nothing in common with the question.

    Left out: the question itself, its cluster (patient, image, case), and equal question texts;
    all questions of equal options stay, as labels do. The draw depends on the seed and the
    question's id only, so it is the same whatever is asked before.

    Raises:
        ValueError: fewer than `shots` examples are left.
    """
    if not shots:
        return []
    text, drawn = normal(question.text), []
    seen = {picture_hash(image) for image in question.images}
    for at in _shuffled(len(pool), random.Random(digest([seed, question.id]))):
        other = pool[at]
        if (
            other.id != question.id
            and (not question.cluster or other.cluster != question.cluster)
            and normal(other.text) != text
            and other.kind == question.kind
            and not (seen and seen & {picture_hash(image) for image in other.images})
        ):
            drawn.append(other)
            if len(drawn) == shots:
                return drawn
    raise ValueError(f"examples_for: expected {shots} examples or more, got {len(drawn)}")


def _shuffled(count: int, rng: random.Random) -> Iterator[int]:
    """0 ... count - 1 in random order, at the cost of those that are taken."""
    moved: dict[int, int] = {}
    for end in range(count - 1, -1, -1):
        at = rng.randrange(end + 1)
        yield moved.get(at, at)
        moved[at] = moved.get(end, end)
