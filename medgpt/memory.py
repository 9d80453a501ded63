"""Keys and values of a conversation's last prompts: the next one computes what is new."""

import hashlib
import weakref
from typing import NamedTuple

import torch

from medgpt_kernels.integrations import refuse
from medgpt_kernels.integrations import transformers as kernels
from medgpt_kernels.integrations.paged_cache import Mark, PagedCache

KEPT = 2  # prompts: the last, and the one before it for a turn that is taken back


class Prompt(NamedTuple):
    """A prompt, and the place in the cache where it ends.

    Attributes:
        ids: int64 [1, S], on the CPU.
        images: sha256 of its tiles and their sizes; "" without any.
    """

    ids: torch.Tensor
    images: str
    mark: Mark


class PromptMemory:
    """What `generate(..., memory=memory)` keeps of its prompt for a prompt that begins with it.

    In a chat each prompt begins with the last one: the answer to it and the next question are
    computed, images of earlier turns are not. Another beginning (another reasoning effort, a
    changed image) starts over. On the CPU memory is taken as tokens come; on a GPU the cache is as
    long as the model's context. What it holds tells about a patient as much as the text does.

    Args:
        model: a MedGPTForConditionalGeneration. With an attention other than medgpt_kernels'
            nothing is kept. `forget` after its weights were changed.
    """

    def __init__(self, model):
        self.model = weakref.ref(model)
        self.forget()

    def forget(self) -> None:
        """Let go of the cache and all prompts."""
        self.cache: PagedCache | None = None
        self.prompts: list[Prompt] = []
        self.asked: tuple | None = None  # the prompt that is being computed: ids, inputs
        self.reused = 0

    def recall(self, model, inputs: dict) -> PagedCache | None:
        """The cache for a prompt; its first `reused` tokens are in it.

        Args:
            inputs: input_ids [1, S], and pixel_values and image_sizes as forward takes them.

        Raises:
            ValueError: another model than the memory's.
        """
        if self.model() is not model:
            refuse("the model that the memory was made for", "another", "memory")
        if model.config._attn_implementation != kernels.NAME:
            return None
        ids, self.reused = inputs["input_ids"].cpu(), 0
        self.asked = ids, self._images(inputs, ids)
        while self.prompts:
            known = self.prompts[-1]
            begins = ids[:, : known.ids.shape[1]]
            goes_on = begins.shape[1] < ids.shape[1] and torch.equal(begins, known.ids)
            if goes_on and self._images(inputs, begins) == known.images:
                self.cache.rewind(known.mark)
                self.reused = begins.shape[1]
                return self.cache
            self.prompts.pop()
        if self.cache is None:
            self.cache = PagedCache(model.config.text_config)
        self.cache.reset()
        return self.cache

    def keep(self) -> None:
        """The prompt of `recall` is in the cache, and nothing behind it."""
        if self.asked is None or self.cache is None:
            return
        (ids, images), self.asked = self.asked, None
        if self.cache.get_seq_length() == ids.shape[1]:
            made = Prompt(ids, images, self.cache.mark())
            self.prompts = [*self.prompts[1 - KEPT :], made]

    def _images(self, inputs: dict, ids: torch.Tensor) -> str:
        """Of the tiles whose tokens are in ids."""
        config = self.model().config
        tokens = int((ids == config.image_token_id).sum())
        if not tokens or "image_sizes" not in inputs:
            return ""
        sizes = inputs["image_sizes"].cpu().long()
        reached = (sizes // config.unit_size).prod(1).cumsum(0)
        sizes = sizes[reached <= tokens]
        pixels = inputs["pixel_values"][: 3 * int(sizes.prod(1).sum())].cpu().contiguous()
        described = f"{sizes.tolist()} {pixels.dtype} ".encode()
        return hashlib.sha256(described + pixels.view(torch.uint8).numpy().tobytes()).hexdigest()
