"""What a model wrote after `<|start|>assistant`, by Harmony's channels, whatever it wrote."""

import re
from collections.abc import Iterable, Iterator

from transformers import PreTrainedTokenizerBase

CHANNELS = ("analysis", "commentary", "final")
STOPS = ("return", "call", "endoftext")
NAMES = ("start", "channel", "message", "constrain", "end", *STOPS)
MARK = re.compile(rf"<\|({'|'.join(NAMES)})\|>")
ROLE = re.compile(r"\s*(?:to=(?P<recipient>\S+))?\s*")
CHANNEL = re.compile(r"(?P<channel>\w+)(?:\s+to=(?P<recipient>\S+))?\s*(?P<kind>\S+)?\s*")
Piece = tuple[str, str]


def _pieces(
    completion: str | Iterable[int], tokenizer: PreTrainedTokenizerBase | None
) -> Iterator[Piece]:
    """("mark", name) and ("text", words) in their order."""
    if isinstance(completion, str):
        for i, piece in enumerate(MARK.split(completion)):
            if piece:
                yield ("mark" if i % 2 else "text", piece)
        return
    if tokenizer is None:
        raise ValueError("parse: expected a tokenizer with ids, got none")
    ids = completion.tolist() if hasattr(completion, "tolist") else list(completion)
    marks = {tokenizer.convert_tokens_to_ids(f"<|{name}|>"): name for name in NAMES}
    run: list[int] = []
    for token in (*ids, None):
        if token is not None and token not in marks:
            run.append(token)
            continue
        known = [t for t in run if 0 <= t < len(tokenizer)]
        if known:
            yield "text", tokenizer.decode(known, clean_up_tokenization_spaces=False)
        run = []
        if token is not None:
            yield "mark", marks[token]


def _message(pieces: list[Piece], first: bool) -> dict | None:
    """Of the pieces between two `<|end|>`; None where they are not in the format."""
    rest = list(pieces)

    def mark(name: str) -> bool:
        return bool(rest) and rest[0] == ("mark", name) and bool(rest.pop(0))

    def text() -> str:
        return rest.pop(0)[1] if rest and rest[0][0] == "text" else ""

    role = "assistant" if first else ""
    if first or mark("start"):
        role += text()
    opened = role.startswith("assistant") and mark("channel")
    name = CHANNEL.fullmatch(text()) if opened else None
    address = ROLE.fullmatch(role.removeprefix("assistant"))
    kind = text().strip() if mark("constrain") else None
    if not (name and address and name["channel"] in CHANNELS and mark("message")):
        return None
    content = text()
    if rest:
        return None
    return {
        "channel": name["channel"],
        "recipient": address["recipient"] or name["recipient"],
        "content_type": kind or name["kind"],
        "content": content,
    }


def parse(
    completion: str | Iterable[int],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    channel: str | None = None,
) -> dict:
    """A completion by channels, finished or not.

    Args:
        completion: ids (list, array or tensor) as they follow `<|start|>assistant`, or their text
            with the special tokens in it. What follows a stop token is padding.
        tokenizer: needed for ids.
        channel: the channel that the prompt already opened.

    Returns:
        {"analysis", "commentary", "final": text, or None where the channel was not opened;
        "calls": [{"recipient", "content_type", "content"}];
        "stop": "return", "call", "endoftext" or None (cut by a length limit, or still running);
        "unparsed": what does not follow the format, as it came, or None}.
        Several messages in one channel are parted by a blank line.
    """
    found: dict[str, list[str]] = {name: [] for name in CHANNELS}
    calls: list[dict] = []
    unparsed: list[str] = []
    stop = None
    messages: list[list[Piece]] = [[]]
    if channel is not None:
        messages = [[("mark", "channel"), ("text", channel), ("mark", "message")]]
    for piece in _pieces(completion, tokenizer):
        if piece[0] == "mark" and piece[1] in STOPS:
            stop = piece[1]
            break
        if piece == ("mark", "end"):
            messages.append([])
        else:
            messages[-1].append(piece)
    for index, pieces in enumerate(messages):
        read = _message(pieces, first=index == 0)
        raw = "".join(f"<|{words}|>" if kind == "mark" else words for kind, words in pieces)
        if read is None and raw.strip() not in ("", "<|start|>", "<|start|>assistant"):
            unparsed.append(raw)
        elif read is not None and read["recipient"]:
            calls.append({name: read[name] for name in ("recipient", "content_type", "content")})
        elif read is not None:
            found[read["channel"]].append(read["content"])
    result: dict = {name: "\n\n".join(texts) if texts else None for name, texts in found.items()}
    result.update(calls=calls, stop=stop, unparsed="\n\n".join(unparsed) or None)
    return result
