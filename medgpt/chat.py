"""Conversations to Harmony's token ids, piece by piece, and completions back to channels.

Text is encoded without special tokens, so whatever a user types stays text: `<|start|>` is letters,
and so is `<image>`. Format: openai/harmony; equal to openai-harmony's own rendering token by token.
"""

from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from .completion import CHANNELS, parse
from .config import SYSTEM_PROMPT
from .tokenizer import plain_encoder

__all__ = ["ImageIds", "Rendered", "image_parts", "parse", "render"]

KNOWLEDGE_CUTOFF = "2024-06"  # gpt-oss's
EFFORTS = ("low", "medium", "high")
ROLES = ("system", "developer", "user", "assistant", "tool")
MARKS = ("start", "channel", "message", "constrain", "end", "return", "call")


class ImageIds(NamedTuple):
    """Reserved ids of Harmony that stand for an image's tokens, its start and its end."""

    token: int = 200013
    start: int = 200014
    end: int = 200015


class Rendered(NamedTuple):
    """Token ids, and which of them an assistant writes: the targets of training."""

    input_ids: list[int]
    assistant_mask: list[bool]


def _refuse(expected: str, got: object) -> None:
    raise ValueError(f"chat: expected {expected}, got {got}")


def _parts(message: dict) -> list[dict]:
    content = message.get("content")
    if content is None:
        return []
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, (list, tuple)) or not all(isinstance(p, dict) for p in content):
        _refuse("content as a string or a list of parts", type(content).__name__)
    for part in content:
        if part.get("type") == "text":
            if not isinstance(part.get("text"), str):
                _refuse("a string in a text part", type(part.get("text")).__name__)
        elif part.get("type") != "image":
            _refuse('parts of type "text" or "image"', "another type")
        elif message["role"] not in ("user", "tool"):
            _refuse("images in user or tool messages", f"one of the {message['role']}")
    return list(content)


def _checked(messages: Sequence[dict]) -> list[dict]:
    """Messages with their parts, an assistant's `thinking` as an analysis message before it."""
    if isinstance(messages, (str, dict)) or not messages:
        _refuse("a list of messages", "none" if not messages else type(messages).__name__)
    flat = []
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            _refuse(f"messages with a role among {', '.join(ROLES)}", "another")
        role, before = message["role"], [m["role"] for m in flat]
        if role == "system" and before:
            _refuse("the system message first", "one after another message")
        if role == "developer" and set(before) - {"system"}:
            _refuse("the developer message before the conversation", "one after it began")
        if message.get("tool_calls"):
            _refuse("a tool's call as a message with recipient and content", "tool_calls")
        new = {**message, "parts": _parts(message)}
        if role == "assistant":
            new.setdefault("channel", "final")
            if new["channel"] not in CHANNELS:
                _refuse(f"a channel among {', '.join(CHANNELS)}", "another")
            if thinking := message.get("thinking"):
                thought = [{"type": "text", "text": thinking}]
                flat.append({"role": role, "channel": "analysis", "parts": thought})
        flat.append(new)
    return flat


def image_parts(messages: Sequence[dict]) -> list[dict]:
    """The image parts of a conversation in their order."""
    return [p for m in _checked(messages) for p in m["parts"] if p["type"] == "image"]


def _system_text(identity: str, cutoff: str | None, date: str | None, effort: str) -> str:
    text = identity
    text += f"\nKnowledge cutoff: {cutoff}" if cutoff else ""
    text += f"\nCurrent date: {date}" if date else ""
    channels = "# Valid channels: analysis, commentary, final."
    return (
        f"{text}\n\nReasoning: {effort}\n\n{channels} Channel must be included for every message."
    )


def _joined(message: dict) -> str:
    return "".join(part["text"] for part in message["parts"])


class _Writer:
    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.marks = {mark: tokenizer.convert_tokens_to_ids(f"<|{mark}|>") for mark in MARKS}
        if None in self.marks.values():
            _refuse("a tokenizer with Harmony's special tokens", "one without")
        self.encode = plain_encoder(tokenizer)
        self.ids: list[int] = []
        self.mask: list[bool] = []

    def put(self, ids: list[int], target: bool = False) -> None:
        self.ids += ids
        self.mask += [target] * len(ids)

    def mark(self, name: str, target: bool = False) -> None:
        self.put([self.marks[name]], target)

    def text(self, text: str, target: bool = False) -> None:
        if text:
            self.put(self.encode(text), target)

    def plain_message(self, role: str, text: str) -> None:
        self.mark("start")
        self.text(role)
        self.mark("message")
        self.text(text)
        self.mark("end")


def render(
    messages: Sequence[dict],
    tokenizer: PreTrainedTokenizerBase,
    *,
    image_tokens: Sequence[int] = (),
    image_ids: ImageIds | None = None,
    system_prompt: str = SYSTEM_PROMPT,
    knowledge_cutoff: str | None = KNOWLEDGE_CUTOFF,
    current_date: str | None = None,
    reasoning_effort: str = "medium",
    add_generation_prompt: bool = False,
    channel: str | None = None,
) -> Rendered:
    """A conversation as Harmony token ids.

    Args:
        messages: {role, content} with content a string or a list of {type: "text", text} and
            {type: "image", ...}. A system message's text stands in system_prompt's place; a
            developer's goes under `# Instructions`. An assistant's may have `channel` (default
            final), `thinking` (an analysis before it), `recipient` and `content_type` (a call of
            a tool); a tool's has `name`.
        image_tokens: how many tokens each image part becomes, between image start and end.
        image_ids: default ImageIds().
        system_prompt: who the model is, the first line of Harmony's system message.
        knowledge_cutoff, current_date: its further lines, YYYY-MM and YYYY-MM-DD; None: no line.
        reasoning_effort: "low", "medium" or "high".
        add_generation_prompt: end with `<|start|>assistant`, for the model to go on.
        channel: a channel to open after it, so that the model writes its text at once.

    Analysis of turns that have their final answer is left out, but for that of a last turn which is
    trained on. A last final answer ends with `<|return|>`, those before it with `<|end|>`.

    Returns:
        Rendered(input_ids, assistant_mask). The mask holds what a model itself would write: not
        `<|start|>assistant` of a turn, not `<|end|>` where it would have written `<|return|>`, and
        nothing of a turn whose analysis was left out.

    Raises:
        ValueError: roles, parts or numbers of images that do not fit; never quotes the messages.
    """
    if reasoning_effort not in EFFORTS:
        _refuse(f"reasoning_effort among {', '.join(EFFORTS)}", "another")
    if channel is not None and (channel not in CHANNELS or not add_generation_prompt):
        _refuse(f"a channel among {', '.join(CHANNELS)} of a generation prompt", "another")
    flat = _checked(messages)
    images = sum(p["type"] == "image" for m in flat for p in m["parts"])
    if images != len(image_tokens):
        _refuse(f"{images} numbers of image tokens, one an image part", len(image_tokens))
    if add_generation_prompt and flat[-1].get("channel") == "final":
        _refuse("a user or tool message last in a prompt", "a final answer")
    ids, counts = image_ids or ImageIds(), iter(image_tokens)
    out = _Writer(tokenizer)
    start = 0
    if flat[0]["role"] == "system":
        system_prompt, start = _joined(flat[0]), 1
    out.plain_message(
        "system", _system_text(system_prompt, knowledge_cutoff, current_date, reasoning_effort)
    )
    keeps = _kept(flat, add_generation_prompt)
    for index in range(start, len(flat)):
        message, last = flat[index], index == len(flat) - 1
        if message["role"] == "developer":
            text = _joined(message)
            out.plain_message("developer", f"# Instructions\n\n{text}" if text else "")
        elif message["role"] == "assistant":
            if keeps[index] is None:
                continue
            goes_on = index > 0 and _goes_on(flat[index - 1])
            _assistant(out, message, target=keeps[index], goes_on=goes_on, last=last)
        else:
            out.mark("start")
            if message["role"] == "tool":
                out.text(f"{message.get('name', 'tool')} to=assistant")
                out.mark("channel")
                out.text("commentary")
            else:
                out.text("user")
            out.mark("message")
            for part in message["parts"]:
                if part["type"] == "image":
                    out.put([ids.start, *[ids.token] * next(counts), ids.end])
                else:
                    out.text(part["text"])
            out.mark("end")
    if add_generation_prompt:
        out.mark("start")
        out.text("assistant")
        if channel is not None:
            out.mark("channel")
            out.text(channel)
            out.mark("message")
    return Rendered(out.ids, out.mask)


def _kept(flat: list[dict], prompt: bool) -> list[bool | None]:
    """Of each message: None if it is left out, else whether it is a target."""
    finals = [i for i, m in enumerate(flat) if m.get("channel") == "final"]
    # the turn that is being trained on keeps its analysis
    history = finals[:-1] if finals and finals[-1] == len(flat) - 1 and not prompt else finals
    end = history[-1] if history else -1
    keeps: list[bool | None] = [True] * len(flat)
    cut = False
    for i, message in enumerate(flat[: end + 1]):
        if message.get("channel") == "analysis":
            keeps[i], cut = None, True
        elif cut:
            keeps[i] = False
            cut = message.get("channel") != "final"
    return keeps


def _goes_on(message: dict) -> bool:
    """Whether the model itself starts its next message after this one."""
    thought_or_said = message["role"] == "assistant" and message["channel"] != "final"
    return thought_or_said and not message.get("recipient")


def _assistant(out: _Writer, message: dict, *, target: bool, goes_on: bool, last: bool) -> None:
    recipient, kind = message.get("recipient"), message.get("content_type")
    out.mark("start", target and goes_on)
    role, *address = out.encode(f"assistant to={recipient}" if recipient else "assistant")
    out.put([role], target and goes_on)
    out.put(address, target)
    out.mark("channel", target)
    out.text(message["channel"] + (" " if kind else ""), target)
    if kind:
        out.mark("constrain", target)
        out.text(kind, target)
    out.mark("message", target)
    for part in message["parts"]:
        out.text(part["text"], target)
    if recipient:
        out.mark("call", target)
    elif message["channel"] == "final" and last:
        out.mark("return", target)
    else:
        out.mark("end", target and message["channel"] != "final")
