"""Models in this process as inspect_ai providers: medgpt/DIR and transformers/DIR (or a .gguf).

    inspect_ai.model.get_model("medgpt//models/medgpt-oss")

Requests are answered in batches, left-padded and greedy. The runner says how many belong together
(`expect`); without it, requests that come within a moment of each other do.
"""

import base64
import hashlib
import io
from pathlib import Path

import anyio
from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessageAssistant,
    GenerateConfig,
    ModelAPI,
    ModelOutput,
    ModelUsage,
    modelapi,
)

from medgpt.eval.journal import Completion

WEIGHTS = (".safetensors", ".gguf", ".bin")
WINDOW = 0.05  # seconds


class _Request:
    def __init__(self, messages: list[dict]):
        self.messages = messages
        self.done = anyio.Event()
        self.answer: Completion | None = None
        self.error: Exception | None = None


class Local(ModelAPI):
    """Collects requests into batches for `complete`."""

    def __init__(self, model_name, base_url=None, api_key=None, config=None, **model_args):
        super().__init__(model_name, base_url, api_key, [], config or GenerateConfig())
        self.expect: int | None = None
        self.waiting: list[_Request] = []
        self.busy = anyio.Lock()
        self.model, self.model_args = None, model_args

    def ready(self) -> None:
        """Loads the model, once: inspect_ai makes instances of a model just to look at its name."""
        if self.model is None:
            self.load(Path(self.model_name), **self.model_args)

    def load(self, path: Path, **model_args) -> None:
        raise NotImplementedError

    def complete(self, batch: list[list[dict]], config: GenerateConfig) -> list[Completion]:
        raise NotImplementedError

    def max_connections(self) -> int:
        return 16

    def should_retry(self, ex) -> bool:
        return False

    async def generate(self, input, tools, tool_choice, config) -> ModelOutput:
        if tools:
            raise ValueError(f"{self.model_name}: expected no tools, got {len(tools)}")
        request = _Request([_plain(message) for message in input])
        self.waiting.append(request)
        if self.expect is None:
            await anyio.sleep(WINDOW)
        if self.expect in (None, len(self.waiting)) and not request.done.is_set():
            batch, self.waiting = self.waiting, []
            await self._answer(batch, config)
        await request.done.wait()
        if request.error is not None:
            raise request.error
        return _output(self.model_name, request.answer)

    async def _answer(self, batch: list[_Request], config: GenerateConfig) -> None:
        error, answers = None, [None] * len(batch)
        try:
            async with self.busy:
                self.ready()
                work = [request.messages for request in batch]
                answers = await anyio.to_thread.run_sync(self.complete, work, config)
        except Exception as caught:
            error = caught
        for request, answer in zip(batch, answers, strict=True):
            request.answer, request.error = answer, error
            request.done.set()


def _plain(message) -> dict:
    """An inspect message as {role, content}, its images as PIL images."""
    if isinstance(message.content, str):
        return {"role": message.role, "content": message.content}
    parts = []
    for part in message.content:
        if part.type == "text":
            parts.append({"type": "text", "text": part.text})
        elif part.type == "image":
            parts.append({"type": "image", "image": _decoded(part.image)})
    return {"role": message.role, "content": parts}


def _decoded(uri: str):
    from PIL import Image

    head, _, body = uri.partition(",")
    if not head.startswith("data:image/") or not head.endswith(";base64"):
        raise ValueError("image: expected a data URI, got another")
    return Image.open(io.BytesIO(base64.b64decode(body)))


def _output(name: str, answer: Completion) -> ModelOutput:
    message = ChatMessageAssistant(content=answer.text, model=name, source="generate")
    usage = ModelUsage(
        input_tokens=answer.input_tokens,
        output_tokens=answer.output_tokens,
        total_tokens=answer.input_tokens + answer.output_tokens,
    )
    choice = ChatCompletionChoice(message=message, stop_reason=answer.stop)
    return ModelOutput(model=name, choices=[choice], usage=usage)


def _device(name: str | None):
    import torch

    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def _dtype(name: str | None, device):
    import torch

    return getattr(torch, name) if name else (torch.bfloat16 if device.type == "cuda" else None)


def _greedy(config: GenerateConfig) -> None:
    if config.temperature not in (None, 0, 0.0):
        raise ValueError(f"local models: expected temperature 0, got {config.temperature}")


def _cut(ids, ends: set[int], pads: int | None) -> tuple[list[int], str]:
    """Tokens up to the first end, and why they stop."""
    ids = ids.tolist()
    for at, token in enumerate(ids):
        if token in ends:
            return ids[:at], "stop"
    while ids and ids[-1] == pads:
        ids.pop()
    return ids, "max_tokens"


class TransformersModel(Local):
    """A text-only causal model of transformers, from a folder or a GGUF file, never the hub."""

    def load(self, path: Path, device=None, dtype=None, **model_args) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        if not path.exists():
            raise ValueError(f"transformers: expected a folder or .gguf file, got {path.name}")
        where = {"local_files_only": True}
        if path.suffix == ".gguf":
            where["gguf_file"], path = path.name, path.parent
        device = _device(device)
        self.tokenizer = AutoTokenizer.from_pretrained(path, **where)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=_dtype(dtype, device), **where)
        self.model = model.to(device).eval()
        self.tokenizer.padding_side = "left"
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    def complete(self, batch: list[list[dict]], config: GenerateConfig) -> list[Completion]:
        import torch

        _greedy(config)
        chats = [[self._text(message) for message in messages] for messages in batch]
        if self.tokenizer.chat_template:
            # special tokens that a question spells out stay text only where the tokenizer knows
            rendered = self.tokenizer.apply_chat_template(
                chats, add_generation_prompt=True, tokenize=False
            )
        else:
            rendered = ["\n\n".join(m["content"] for m in chat) + "\n" for chat in chats]
        inputs = self.tokenizer(
            rendered, return_tensors="pt", padding=True, add_special_tokens=False
        ).to(self.model.device)
        with torch.inference_mode():
            out = self.model.generate(
                input_ids=inputs.input_ids,
                attention_mask=inputs.attention_mask,
                max_new_tokens=config.max_tokens or 64,
                do_sample=False,
                pad_token_id=self.tokenizer.pad_token_id,
            )
        ends = self.model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends]) | {self.tokenizer.eos_token_id}
        answers = []
        for row, mask in zip(
            out[:, inputs.input_ids.shape[1] :], inputs.attention_mask, strict=True
        ):
            ids, stop = _cut(row, ends, self.tokenizer.pad_token_id)
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            answers.append(Completion(text, stop, int(mask.sum()), len(ids)))
        return answers

    def _text(self, message: dict) -> dict:
        content = message["content"]
        if isinstance(content, list):
            if any(part["type"] == "image" for part in content):
                raise ValueError(
                    f"transformers/{Path(self.model_name).name}: expected text only, got images"
                )
            content = "\n".join(part["text"] for part in content)
        return {"role": message["role"], "content": content}


class MedGPTModel(Local):
    """A MedGPT checkpoint, its prompts packed into one batch, its cache paged."""

    def load(self, path: Path, device=None, dtype=None, **model_args) -> None:
        from medgpt.checkpoint import load

        device = _device(device)
        options = {"dtype": _dtype(dtype, device)} if _dtype(dtype, device) is not None else {}
        self.model, self.processor = load(path, **options)
        self.model = self.model.to(device).eval()

    def complete(self, batch: list[list[dict]], config: GenerateConfig) -> list[Completion]:
        import torch

        from medgpt.generate import STOPS

        _greedy(config)
        inputs = self.processor.apply_chat_template(
            batch,
            add_generation_prompt=True,
            reasoning_effort=config.reasoning_effort or "medium",
            padding_side="left",
            return_tensors="pt",
        )
        inputs = {name: value for name, value in inputs.items() if name != "tiles_per_image"}
        for name in inputs.keys() - {"image_sizes"}:
            inputs[name] = inputs[name].to(self.model.device)
        tokenizer = self.processor.tokenizer
        stops = tokenizer.convert_tokens_to_ids(list(STOPS))
        with torch.inference_mode():
            out = self.model.generate(
                **inputs,
                max_new_tokens=config.max_tokens or 4096,
                do_sample=False,
                eos_token_id=stops,
                pad_token_id=tokenizer.pad_token_id,
                suppress_tokens=list(self.processor.image_ids),
            )
        width = inputs["input_ids"].shape[1]
        answers = []
        for row, mask in zip(out[:, width:], inputs["attention_mask"], strict=True):
            ids, stop = _cut(row, set(stops), tokenizer.pad_token_id)
            text = tokenizer.decode(ids, skip_special_tokens=False)
            answers.append(Completion(text, stop, int(mask.sum()), len(ids)))
        return answers


@modelapi(name="transformers")
def transformers_api():
    return TransformersModel


@modelapi(name="medgpt")
def medgpt_api():
    return MedGPTModel


def fingerprint(path: str | Path) -> str:
    """sha256 over the small files of a checkpoint and over size and samples of its weights.

    Sixteen pieces of 64 KiB of each file of weights: another training step changes it, and 40 GB
    need not be read.
    """
    path, total = Path(path), hashlib.sha256()
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file())
    for file in files:
        size = file.stat().st_size
        total.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as stream:
            if file.suffix not in WEIGHTS or size <= 1 << 20:
                total.update(stream.read())
                continue
            for piece in range(16):
                stream.seek(piece * (size - (1 << 16)) // 15)
                total.update(stream.read(1 << 16))
    return total.hexdigest()
