"""What a model answered: an option's letter, or a label such as yes / no / maybe, or nothing.

Nothing is guessed. An answer that cannot be read is `None` with a reason, and counts as wrong; no
random letter stands in for it and no option is taken for being the nearest string.
"""

import functools
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import NamedTuple

REASONS = ("empty", "no final answer", "refusal", "ambiguous", "none of the options", "unreadable")

_HARMONY = re.compile(
    r"<\|channel\|>\s*final[^<]*<\|message\|>(.*?)(?=<\|(?:end|return)\|>|$)", re.S
)
_HARMONY_BARE = re.compile(r"\Aanalysis.*?assistant\s*final(.*)\Z", re.S)
_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_WRAPPER = re.compile(r"\\(?:text|textbf|mathbf|mathrm|boldsymbol)\s*\{([^{}]*)\}")
_TAG = re.compile(r"</?(?:answer|b|strong|i|em|p|final_answer)\s*>", re.I)
_REFUSAL = re.compile(
    r"\b(?:i(?:'m| am) (?:sorry|unable|not able)|i (?:cannot|can't|can not|won't|will not) "
    r"(?:answer|assist|help|provide|give|determine|choose|select|identify|diagnose)|"
    r"as an ai\b|not able to (?:answer|view|see)|consult (?:a|your) (?:doctor|physician|"
    r"healthcare))|无法(?:回答|提供|确定)|抱歉",
    re.I,
)
_NONE = re.compile(
    r"\b(?:none|neither) of (?:the|these) (?:above|options|choices|given)|^\W*none of (?:the )?"
    r"above\W*$|\bno (?:correct )?(?:option|answer|choice) (?:is|given)",
    re.I,
)
_IS = (
    r"\s*(?:is|are|would be|should be|will be|must be|=|:|是|为|\uff1a)+[\s:\uff1a]*"
    r"(?:option|choice)?\s*"
)
_FINAL = re.compile(rf"\bfinal answer(?:{_IS}|\s+)|最终答案{_IS}", re.I)
_STATED = re.compile(
    r"(?:\b(?:answer|option|choice|response)"
    r"(?: (?:to|for|in) [^.:\n]{1,60}?)?"
    rf"{_IS}|答案{_IS}|\bi (?:would )?(?:choose|select|pick|go with)[\s:]+(?:option|choice)?\s*"
    r"|应?该?选[择项]?\s*[:\uff1a]?\s*|^\W*answer\s+(?=[\W]*[a-z]\W*$))",
    re.I | re.M,
)
_IS_CORRECT = re.compile(
    r"(?:\boption|\bchoice|\banswer|^)\W{0,3}([A-Z])\W{0,3}\s*(?:[^.\n]{0,80}?\s)?(?:is|being)"
    r"(?: the)?(?: most| best| only| single)*(?: likely| appropriate)? "
    r"(?:correct|right|best|answer)\b",
    re.M,
)
_MENTION = re.compile(r"(?:\b(?:[Oo]ption|[Cc]hoice)\s+([A-Z])(?![\w'\u2019-]))|\(([A-Z])\)")
_LINE = re.compile(
    r"^\W{0,4}(?:option |choice )?\(?([A-Za-z])\s*(?:[.):\uff1a]|-\s|\u2013|—|$)", re.I | re.M
)
_MORE = re.compile(
    r"^[\s).\]]*(?:,|;|/|&|\band\b|\bor\b|和|或|、)\s*(?:option\s*)?\(?([A-Z])(?![\w'\u2019-])"
)
_AFTER = re.compile(
    r"\s*(?:$|[\n.,;:\uff1a)\]}!?/&=。\uff0c、]|[-\u2013—]\s|\(|(?:because|since|as|and|or|is)\b|和|或)"
)


class Answer(NamedTuple):
    """A letter or label, or None and the reason, one of REASONS."""

    value: str | None
    reason: str | None = None


def final_text(text: str) -> tuple[str, str | None]:
    """What stands after a model's reasoning: Harmony's final channel, or what follows </think>.

    Returns:
        The text, and the reason where there is none: "empty" or "no final answer".
    """
    if "<|channel|>" in text:
        finals = _HARMONY.findall(text)
        return (finals[-1].strip(), None) if finals else ("", "no final answer")
    if bare := _HARMONY_BARE.match(text):
        text = bare[1]
    elif re.match(r"\s*<(think|thinking)>", text) or "</think" in text:
        _, closed, text = text.rpartition("</think")
        if not closed:
            return "", "no final answer"
        text = text.partition(">")[2]
    return (text.strip(), None) if text.strip() else ("", "empty")


def plain(text: str) -> str:
    """Without markdown, LaTeX wrappers and tags; full-width letters as ordinary ones."""
    text = unicodedata.normalize("NFKC", text).replace("\u2019", "'")
    for _ in range(3):
        text = _WRAPPER.sub(r"\1", text)
    return re.sub(r"[*_`$]+", "", _TAG.sub(" ", text)).replace("\\(", "(").replace("\\)", ")")


@functools.lru_cache(maxsize=4096)
def normal(text: str) -> str:
    """For equality: case, spaces and the marks around a phrase set aside, nothing within it."""
    text = re.sub(r"\s+", " ", plain(text)).strip().casefold()
    return text.strip(" .,;:!?\"'()[]")


def parse_choice(text: str, options: Mapping[str, str]) -> Answer:
    """The option that a completion names.

    What counts, first to last: a letter or an option's whole text alone; \\boxed{}; "final
    answer: ..."; "the answer is ...", "I choose ...", "option C is correct"; a letter that opens
    the answer; the only "(C)" or "option C" of the text. Two letters at one place are ambiguous.

    Args:
        text: the completion, any string.
        options: text of each option by its capital letter.
    """
    body, reason = final_text(text)
    if reason:
        return Answer(None, reason)
    boxes = [_read(plain(box), options) for box in _BOXED.findall(body)]
    body = plain(_BOXED.sub(r" \1 ", body))
    reach = 200 + max(map(len, options.values()), default=0)
    if (alone := _alone(body, options)) is not None:
        return Answer(alone)
    for found in (
        boxes,
        [_read(body[m.end() : m.end() + reach], options) for m in _FINAL.finditer(body)],
        [_read(body[m.end() : m.end() + reach], options) for m in _STATED.finditer(body)]
        + [{m[1]} & set(options) for m in _IS_CORRECT.finditer(body)],
    ):
        letters = set().union(*found)
        if letters:
            return _one(letters)
    if _REFUSAL.search(body):
        return Answer(None, "refusal")
    lines = {m[1].upper() for m in _LINE.finditer(body)} & set(options)
    if opening := _read(body[:reach], options):
        return _one(opening | lines)
    letters = lines | {m[1] or m[2] for m in _MENTION.finditer(body)} & set(options)
    if letters:
        return _one(letters)
    return Answer(None, "none of the options" if _NONE.search(body) else "unreadable")


def parse_label(text: str, labels: Sequence[str]) -> Answer:
    """The label, such as yes, no or maybe, that a completion opens with, boxes or states."""
    body, reason = final_text(text)
    if reason:
        return Answer(None, reason)
    boxes = _BOXED.findall(body)
    body = plain(_BOXED.sub(r" \1 ", body))
    names = "|".join(re.escape(label) for label in sorted(labels, key=len, reverse=True))
    # "no" before a word denies that word: "No evidence was found"
    word = re.compile(
        rf"\W*(?!no +[a-z])({names})(?![\w'-])(?:\s*(?:/|,|\bor\b|\band\b)\s*({names})\b)?", re.I
    )
    for starts in (
        boxes,
        [body[m.end() : m.end() + 200] for m in _FINAL.finditer(body)],
        [body[m.end() : m.end() + 200] for m in _STATED.finditer(body)],
        [body],
    ):
        hits = [hit for start in starts if (hit := word.match(start))]
        found = {group.casefold() for hit in hits for group in hit.groups() if group}
        if found:
            by_name = {label.casefold(): label for label in labels}
            return _one({by_name[name] for name in found})
    return Answer(None, "refusal" if _REFUSAL.search(body) else "unreadable")


def _one(letters: set[str]) -> Answer:
    return Answer(next(iter(letters))) if len(letters) == 1 else Answer(None, "ambiguous")


def _alone(body: str, options: Mapping[str, str]) -> str | None:
    """The letter of a completion that is nothing but a letter, or nothing but an option's text."""
    by_text = _with_text(body, options)
    if len(by_text) == 1:
        return next(iter(by_text))
    alone = re.fullmatch(r"\W*(?:(?:option|choice|answer)\W+)?([A-Za-z])\W*", body, re.I)
    return alone[1].upper() if alone and alone[1].upper() in options else None


def _with_text(phrase: str, options: Mapping[str, str]) -> set[str]:
    wanted = normal(phrase)
    return {letter for letter, text in options.items() if wanted and normal(text) == wanted}


def _read(rest: str, options: Mapping[str, str]) -> set[str]:
    """Letters named at the very start of `rest`, which follows "the answer is" or opens the text.

    More than one where "A and C" or two equal options stand there.
    """
    rest = rest.lstrip(" \t\n\"'[<:")
    line = rest.split("\n", 1)[0]
    for phrase in (line, re.split(r"(?<=\w)[.;](?:\s|$)|,\s| because | since ", line)[0]):
        if letters := _with_text(phrase, options):
            return letters
    hit = re.match(r"(?:option |choice )?(\(?)([A-Za-z])(?![\w'\u2019])(\)?)", rest, re.I)
    if hit is None or hit[2].upper() not in options:
        return set()
    letter, after = hit[2].upper(), rest[hit.end() :]
    enclosed = bool(hit[3])
    follows = re.sub(r"^\s*[.):\uff1a-]?\s*", "", after.split("\n", 1)[0])
    own = normal(options[letter])
    same = bool(follows) and bool(own) and normal(follows).startswith(own[: max(len(own) // 2, 1)])
    if not enclosed and not same:
        if hit[2].islower() and not re.match(r"\s*(?:$|[\n.):])", after):
            return set()
        if re.match(r"\.\s?[a-z]|-\S", after):  # E. coli, C-reactive protein
            return set()
        if not _AFTER.match(after):  # "A patient ...", "I think ..."
            return set()
    letters, rest = {letter}, after
    while more := _MORE.match(rest):
        if more[1] in options:
            letters.add(more[1])
        rest = rest[more.end() :]
    return letters
