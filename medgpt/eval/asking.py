"""Completions of a plan's questions, a batch at a time: from the journal, else from the model."""

import base64
import sys
import time
from collections.abc import Sequence

from medgpt.eval.journal import Completion, Journal
from medgpt.eval.plan import Plan
from medgpt.eval.questions import Picture

MINUTE = 60.0  # seconds
MAGIC = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg"}


class Asker:
    """Answers by key; who asks for one gets its whole batch asked, once."""

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
                messages_of(self.made.conversation(index)), config=self.config
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


def messages_of(conversation: Sequence[dict]) -> list:
    """inspect_ai's messages of a plan's conversation, images as data URIs."""
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
