"""One row through every check that needs no other row: kept with its features, or left out."""

import functools
from typing import NamedTuple

import numpy as np

from .captions import caption_fault
from .config import Curation, Source
from .decontaminate import Contamination
from .features import Features, features
from .glyphs import letters
from .panels import is_screenshot, names_panels, panel_count
from .phi import deidentify
from .pictures import Picture, read_picture
from .reader import image_sources
from .rows import RowError, checked, texts

OVERLAID = 12  # letters
BURNED_IN = 4


class Kept(NamedTuple):
    row: dict
    features: Features
    tokens: int
    replaced: dict  # identifiers replaced, by kind


class Dropped(RowError):
    """RowError with the benchmark items that a row holds."""

    def __init__(self, reason: str, hits=()):
        super().__init__(reason)
        self.hits = list(hits)


class Inspector:
    """What a worker needs for all rows of a run.

    Args:
        processor: a MedGPTProcessor that counts tokens, or None.
    """

    def __init__(self, config: Curation, contamination: Contamination, processor=None):
        self.config, self.contamination, self.processor = config, contamination, processor

    def __call__(self, row: dict, source: Source) -> Kept:
        """The row with its images' bytes in it.

        Raises:
            RowError: with the first reason against it.
        """
        config = self.config
        caption = "\n".join(texts(row, "assistant"))
        if "caption" in source.filters and (fault := caption_fault(caption)):
            raise RowError(fault)
        if "single_panel" in source.filters and names_panels(caption):
            raise RowError("multiple_panels")
        bounds = {"max_pixels": config.max_pixels, "min_side": config.min_side}
        pictures = [
            read_picture(s, clean=config.deidentify, **bounds) for s in image_sources(row, "/")
        ]
        flags = sorted(set().union(*(self._flags(p, source) for p in pictures)))
        row, replaced = self._texts(row, [k for p in pictures for k in p.known])
        row["images"] = [
            {"bytes": p.content, "height": p.image.shape[0], "width": p.image.shape[1]}
            for p in pictures
        ]
        if flags:
            row["meta"] = {**row["meta"], "flags": flags}
        found = features(row, [p.image for p in pictures])
        hashes = np.frombuffer(found.hashes, np.uint8).reshape(-1, 32)
        if hits := self.contamination.hits(row, hashes):
            raise Dropped("contaminated", hits)
        return Kept(row, found, self._tokens(row, pictures), replaced)

    def _flags(self, picture: Picture, source: Source) -> set[str]:
        """What is only noted; RowError for what is not kept."""
        if "single_panel" in source.filters and panel_count(picture.image) > 1:
            raise RowError("multiple_panels")
        if "screenshot" in source.filters and is_screenshot(picture.image):
            raise RowError("screenshot")
        overlaid = "overlaid_text" in source.filters
        if not overlaid and source.burned_in == "off":
            return set()
        count = letters(picture.image)
        if overlaid and count >= OVERLAID:
            raise RowError("overlaid_text")
        if source.burned_in == "off" or not (count >= BURNED_IN or picture.burned_in):
            return set()
        if source.burned_in == "drop":
            raise RowError("burned_in_text")
        return {"burned_in_text"}

    def _texts(self, row: dict, known: list[str]) -> tuple[dict, dict]:
        if not self.config.deidentify:
            return row, {}
        replaced: dict[str, int] = {}

        def clean(text: str) -> str:
            text, counts = deidentify(text, known)
            for kind, count in counts.items():
                replaced[kind] = replaced.get(kind, 0) + count
            return text

        messages = []
        for message in row["messages"]:
            parts = [
                {**p, "text": clean(p["text"])} if p["type"] == "text" else p
                for p in message["content"]
            ]
            new = {**message, "content": parts}
            if message.get("thinking"):
                new["thinking"] = clean(message["thinking"])
            messages.append(new)
        return checked({**row, "messages": messages}), replaced

    def _tokens(self, row: dict, pictures: list[Picture]) -> int:
        if self.processor is None:
            return 0
        from ..chat import render

        count = self.processor.image_processor.num_tokens
        tokens = [count(*p.image.shape[:2]) for p in pictures]
        rendered = render(row["messages"], self.processor.tokenizer, image_tokens=tokens)
        return len(rendered.input_ids)


@functools.cache
def token_counter(name: str):
    """A MedGPTProcessor of the default configuration with that tokenizer; "none": None."""
    if name == "none":
        return None
    from ..config import MedGPTConfig
    from ..processor import MedGPTProcessor
    from ..tokenizer import harmony_tokenizer

    if name == "harmony":
        return MedGPTProcessor.from_config(MedGPTConfig(), harmony_tokenizer())
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=True)
    return MedGPTProcessor.from_config(MedGPTConfig(), tokenizer)
