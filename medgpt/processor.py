"""Texts and chats with images to what MedGPT's forward takes.

Dims: B rows, S tokens, N tiles (or native images), H W of each.
"""

from collections.abc import Sequence

import numpy as np
from transformers import AutoConfig, AutoProcessor, BatchFeature, ProcessorMixin

from .chat import ImageIds, image_parts, parse, render
from .config import SYSTEM_PROMPT, MedGPTConfig
from .image_processor import MedGPTImageProcessor, packed
from .images import load_image

IMAGE = "<image>"


def _refuse(expected: str, got: object) -> None:
    raise ValueError(f"MedGPTProcessor: expected {expected}, got {got}")


class MedGPTProcessor(ProcessorMixin):
    """Texts or chats with images to input_ids, attention_mask, pixel_values and image_sizes.

    Args:
        image_processor, tokenizer: a MedGPTImageProcessor and Harmony's tokenizer.
        chat_template: kept for saving; chats are rendered by medgpt.chat.
        image_token_id, image_start_token_id, image_end_token_id, system_prompt: MedGPTConfig's.
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        chat_template=None,
        image_token_id: int = 200013,
        image_start_token_id: int = 200014,
        image_end_token_id: int = 200015,
        system_prompt: str = SYSTEM_PROMPT,
    ):
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.image_token = IMAGE
        self.image_token_id = image_token_id
        self.image_start_token_id = image_start_token_id
        self.image_end_token_id = image_end_token_id
        self.system_prompt = system_prompt

    @classmethod
    def from_config(cls, config: MedGPTConfig, tokenizer) -> "MedGPTProcessor":
        names = ("image_token_id", "image_start_token_id", "image_end_token_id", "system_prompt")
        image_processor = MedGPTImageProcessor.from_config(config)
        return cls(image_processor, tokenizer, **{name: getattr(config, name) for name in names})

    @property
    def image_ids(self) -> ImageIds:
        return ImageIds(self.image_token_id, self.image_start_token_id, self.image_end_token_id)

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values", "image_sizes"]

    def __call__(
        self,
        images=None,
        text: str | Sequence[str] | None = None,
        *,
        window=None,
        padding: bool | str = True,
        padding_side: str = "left",
        return_tensors: str | None = None,
    ) -> BatchFeature:
        """Trusted text, its special tokens real ones, with `<image>` where an image stands.

        For what a user typed use apply_chat_template.

        Args:
            images: one, a list in the order of the `<image>`s, or a list for each text.
            text: one or a batch.
            window: of load_image, for every image.
            padding: to the longest row, True or "longest", or False.
            padding_side: "left" to generate, "right" to train.
            return_tensors: "pt", "np" or None.

        Returns:
            input_ids, attention_mask [B, S]; with images pixel_values uint8 [sum H W 3],
            image_sizes int32 [N, 2] and tiles_per_image int32 [images], in the order of the rows.

        Raises:
            ValueError: numbers of images that do not fit, image ids in the text itself.
        """
        texts = [text] if isinstance(text, str) else text
        if not isinstance(texts, (list, tuple)) or not all(isinstance(t, str) for t in texts):
            _refuse("text as a string or a list of them", type(text).__name__)
        counts = [t.count(IMAGE) for t in texts]
        sources = _by_row(images, counts)
        cuts = [self.image_processor.cut(load_image(s, window=window)) for s in sources]
        spans = iter(self._spans(cuts))
        rows = []
        for t in texts:
            ids: list[int] = []
            for index, piece in enumerate(t.split(IMAGE)):
                ids += next(spans) if index else []
                plain = self.tokenizer(
                    piece, add_special_tokens=False, split_special_tokens=False
                ).input_ids
                if set(self.image_ids) & set(plain):
                    _refuse(f"images as {IMAGE}", "their token ids in the text")
                ids += plain
            rows.append(ids)
        return self._batch(rows, cuts, padding, padding_side, return_tensors)

    def apply_chat_template(
        self,
        conversation,
        chat_template=None,
        *,
        images=None,
        add_generation_prompt: bool = True,
        tokenize: bool = True,
        return_dict: bool = True,
        return_assistant_tokens_mask: bool = False,
        window=None,
        padding: bool | str = True,
        padding_side: str = "left",
        return_tensors: str | None = None,
        **render_kwargs,
    ) -> BatchFeature:
        """Chats in Harmony, token by token: what a user typed never becomes a special token.

        Args:
            conversation: messages, or a batch of them, as medgpt.chat.render takes them; an image
                part holds its source as `image` or `path`, and its own `window` and `frame`.
            images: the sources of parts that hold none, as in __call__.
            add_generation_prompt: False for training.
            return_assistant_tokens_mask: also assistant_masks [B, S], render's mask.
            padding, padding_side, return_tensors, window: as in __call__.
            render_kwargs: reasoning_effort, current_date, knowledge_cutoff, system_prompt, channel.

        Returns:
            as __call__.

        Raises:
            ValueError: a chat_template or tokenize=False (a string cannot say what is a token and
                what a user typed), return_dict=False, URLs, numbers of images that do not fit.
        """
        if chat_template is not None or not tokenize or not return_dict:
            _refuse("no chat_template, tokenize and return_dict True", "another")
        if not isinstance(conversation, (list, tuple)) or not conversation:
            _refuse("messages or a batch of them", type(conversation).__name__)
        chats = [conversation] if isinstance(conversation[0], dict) else conversation
        parts = [image_parts(chat) for chat in chats]
        empty = [sum(_source(part) is None for part in row) for row in parts]
        given = iter(_by_row(images, empty))
        cuts = []
        for part in (part for row in parts for part in row):
            source = _source(part)
            image = load_image(
                next(given) if source is None else source,
                window=part.get("window", window),
                frame=part.get("frame", 0),
            )
            cuts.append(self.image_processor.cut(image))
        lengths = iter([len(span) - 2 for span in self._spans(cuts)])
        rendered = [
            render(
                chat,
                self.tokenizer,
                image_tokens=[next(lengths) for _ in row],
                image_ids=self.image_ids,
                add_generation_prompt=add_generation_prompt,
                **{"system_prompt": self.system_prompt, **render_kwargs},
            )
            for chat, row in zip(chats, parts, strict=True)
        ]
        masks = [r.assistant_mask for r in rendered] if return_assistant_tokens_mask else None
        rows = [r.input_ids for r in rendered]
        return self._batch(rows, cuts, padding, padding_side, return_tensors, masks)

    def parse(self, completion, *, channel: str | None = None) -> dict:
        """A completion by channels: medgpt.chat.parse."""
        return parse(completion, self.tokenizer, channel=channel)

    def _spans(self, cuts: list[list[np.ndarray]]) -> list[list[int]]:
        """The ids of each image: start, its tokens, end."""
        unit, ids = self.image_processor.unit, self.image_ids
        counts = [sum((t.shape[0] // unit) * (t.shape[1] // unit) for t in cut) for cut in cuts]
        return [[ids.start, *[ids.token] * count, ids.end] for count in counts]

    def _batch(self, rows, cuts, padding, padding_side, return_tensors, masks=None):
        if padding not in (True, False, "longest"):
            _refuse('padding True, False or "longest"', padding)
        if padding_side not in ("left", "right"):
            _refuse('padding_side "left" or "right"', padding_side)
        lengths = {len(row) for row in rows}
        if not padding and return_tensors is not None and len(lengths) > 1:
            _refuse("padding for rows of different lengths", "padding=False")
        longest = max(lengths, default=0) if padding else 0

        def padded(row: list, filler) -> list:
            pad = [filler] * (longest - len(row))
            return pad + row if padding_side == "left" else row + pad

        data = {
            "input_ids": [padded(row, self.tokenizer.pad_token_id) for row in rows],
            "attention_mask": [padded([1] * len(row), 0) for row in rows],
        }
        if masks is not None:
            data["assistant_masks"] = [padded(list(map(int, mask)), 0) for mask in masks]
        if cuts:
            data.update(packed(cuts))
        return BatchFeature(data, tensor_type=return_tensors)


def _source(part: dict):
    """An image part's own source; None where it has none."""
    if part.get("url") is not None:
        _refuse("an image or a path", "a URL: nothing is ever fetched")
    found = [part[name] for name in ("image", "path") if part.get(name) is not None]
    if len(found) > 1:
        _refuse("an image or a path", "both")
    return found[0] if found else None


def _by_row(images, counts: list[int]) -> list:
    """Images in order, once their number is known to be that of the places in each row."""
    if images is None:
        images = []
    elif not isinstance(images, (list, tuple)):
        images = [images]
    if any(isinstance(image, (list, tuple)) for image in images):
        rows = [list(row) if isinstance(row, (list, tuple)) else [row] for row in images]
        if [len(row) for row in rows] != counts:
            _refuse(f"{counts} images in the rows", [len(row) for row in rows])
        return [image for row in rows for image in row]
    if len(images) != sum(counts):
        _refuse(f"{sum(counts)} images", len(images))
    return list(images)


AutoConfig.register("medgpt", MedGPTConfig, exist_ok=True)
AutoProcessor.register(MedGPTConfig, MedGPTProcessor, exist_ok=True)
