"""One answer: messages and images in, the final channel and its metadata out.

model, processor = load("medgpt")
answer = generate(model, processor, [{"role": "user", "content": [
    {"type": "image", "path": "chest.dcm"}, {"type": "text", "text": "What is seen?"}]}])
print(answer["final"])
"""

import secrets
import time
from collections.abc import Callable, Sequence

import torch
from transformers.generation.streamers import BaseStreamer

from medgpt import NOTICE
from medgpt.completion import NAMES
from medgpt.memory import PromptMemory
from medgpt.model import CACHE
from medgpt_kernels.integrations import refuse

STOPS = ("<|return|>", "<|call|>", "<|endoftext|>")  # gpt-oss's own
FINISH = {"return": "stop", "call": "tool_call", "endoftext": "stop", None: "length"}


def generate(
    model,
    processor,
    messages: Sequence[dict],
    *,
    max_new_tokens: int = 1024,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    reasoning_effort: str = "medium",
    stream: Callable[[str, str], None] | None = None,
    window=None,
    memory: PromptMemory | None = None,
) -> dict:
    """The model's next message in a conversation.

    Args:
        model, processor: of medgpt.checkpoint.load.
        messages: as processor.apply_chat_template takes them, one conversation.
        max_new_tokens: analysis and answer together.
        temperature: 0 is greedy.
        top_p: of the distribution that is sampled from; 1 is all of it.
        seed: of sampling; None draws one, which the result names.
        reasoning_effort: "low", "medium" or "high".
        stream: called with (text, channel) as the text comes, whole characters at a time.
        window: of load_image, for every image.
        memory: keeps this prompt's keys and values for a prompt that goes on from it.

    Returns:
        A dict that JSON can hold: "research_use_only" (always first), "final" and "analysis" (text,
        None where the channel was not opened), "finish_reason" ("stop", "tool_call", "length"),
        "usage" {prompt_tokens, cached_tokens (of them, not computed
        again), image_tokens, completion_tokens}, "timing" in seconds {first_token, total,
        tokens_per_second}, "seed" (None: greedy), "model", "unparsed" (what is
        not Harmony in the completion, or None).

    Raises:
        ValueError: options out of range, messages or images that cannot be read, a prompt that
            leaves no room in the model's context.
    """
    _check(max_new_tokens, temperature, top_p, seed)
    start = time.perf_counter()
    inputs = processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        reasoning_effort=reasoning_effort,
        window=window,
        return_tensors="pt",
    )
    inputs = {name: value for name, value in inputs.items() if name != "tiles_per_image"}
    cache = None if memory is None else memory.recall(model, inputs)
    for name in inputs.keys() - {"image_sizes"}:  # sizes are read on the host
        inputs[name] = inputs[name].to(model.device)
    ids, config = inputs["input_ids"], model.config
    length, room = ids.shape[1], config.text_config.max_position_embeddings
    if length + max_new_tokens > room:
        refuse(f"at most {room} tokens in all", f"{length} + {max_new_tokens}", "generate")
    tokenizer = processor.tokenizer
    sampled = temperature > 0
    if sampled and seed is None:
        seed = secrets.randbits(31)
    choices = {"temperature": temperature, "top_p": top_p, "top_k": 0} if sampled else {}
    streamer = ChannelStreamer(
        tokenizer, stream or (lambda text, channel: None), None if cache is None else memory.keep
    )
    if cache is not None:
        choices[CACHE] = cache
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        if sampled:
            torch.manual_seed(seed)
        out = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=sampled,
            eos_token_id=tokenizer.convert_tokens_to_ids(list(STOPS)),
            pad_token_id=tokenizer.pad_token_id,
            suppress_tokens=list(processor.image_ids),
            streamer=streamer,
            **choices,
        )
    total = time.perf_counter() - start
    completion = out[0, length:].tolist()
    parsed = processor.parse(completion)
    first = streamer.first_token - start
    later = len(completion) - 1
    return {
        "research_use_only": NOTICE,
        "final": parsed["final"],
        "analysis": parsed["analysis"],
        "finish_reason": FINISH[parsed["stop"]],
        "usage": {
            "prompt_tokens": length,
            "cached_tokens": 0 if memory is None else memory.reused,
            "image_tokens": int((ids == config.image_token_id).sum()),
            "completion_tokens": len(completion),
        },
        "timing": {
            "first_token": round(first, 4),
            "total": round(total, 4),
            "tokens_per_second": round(later / (total - first), 2) if later else None,
        },
        "seed": seed if sampled else None,
        "model": str(config.name_or_path or ""),
        "unparsed": parsed["unparsed"],
    }


def _check(max_new_tokens, temperature, top_p, seed) -> None:
    for good, expected, got in (
        (max_new_tokens >= 1, "max_new_tokens of at least 1", max_new_tokens),
        (0 <= temperature < float("inf"), "a temperature of at least 0", temperature),
        (0 < top_p <= 1, "0 < top_p <= 1", top_p),
        (seed is None or 0 <= seed < 2**63, "a seed of at least 0", seed),
    ):
        if not good:
            refuse(expected, got, "generate")


class ChannelStreamer(BaseStreamer):
    """Hands (text, channel) to `stream` as Harmony's messages come, without its special tokens."""

    def __init__(
        self,
        tokenizer,
        stream: Callable[[str, str], None],
        after_prompt: Callable[[], None] | None = None,
    ):
        found = tokenizer.convert_tokens_to_ids([f"<|{name}|>" for name in NAMES])
        self.marks = dict(zip(found, NAMES, strict=True))
        self.tokenizer, self.stream = tokenizer, stream
        self.state, self.channel = "role", ""
        self.held: list[int] = []  # not yet whole characters
        self.first_token: float | None = None
        self.after_prompt = after_prompt
        self.prompt = True

    def put(self, value: torch.Tensor) -> None:
        if self.prompt:
            self.prompt = False
            return
        if self.first_token is None:
            if self.after_prompt is not None:
                self.after_prompt()
            self.first_token = time.perf_counter()
        for token in value.reshape(-1).tolist():
            if token in self.marks:
                self._mark(self.marks[token])
            else:
                self._text(token)

    def end(self) -> None:
        self._flush()

    def _mark(self, name: str) -> None:
        self._flush()
        if name == "channel":
            self.channel = ""
        self.state = name

    def _text(self, token: int) -> None:
        self.held.append(token)
        text = self._decode()
        if not text.endswith("\N{REPLACEMENT CHARACTER}") or len(self.held) > 4:
            self._flush()

    def _flush(self) -> None:
        text, self.held = self._decode(), []
        if self.state == "channel":
            self.channel += text
        elif self.state == "message" and text:
            self.stream(text, (self.channel.split() or [""])[0])

    def _decode(self) -> str:
        return self.tokenizer.decode(self.held, clean_up_tokenization_spaces=False)
