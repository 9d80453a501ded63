"""A layer of a PagedCache: its keys and values in pages [pages, page, G, D].

B sequences of S new tokens, G key and value heads, D head_dim.
"""

import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from transformers.cache_utils import CacheLayerMixin

from medgpt_kernels.decode_attention.op import decode_attention
from medgpt_kernels.integrations import refuse

if TYPE_CHECKING:
    from medgpt_kernels.integrations.paged_cache import PagedCache

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Step:
    """What all layers of one forward share."""

    tokens: int
    before: list[int]
    cached: torch.Tensor  # int32 [B], as `before`
    valid: torch.Tensor | None  # bool [B, S] on the CPU, None: no padding among the new tokens
    rows: list[tuple[int, torch.Tensor]] | None  # with padding: a sequence, its tokens' columns
    tables: dict = field(default_factory=dict)  # of each kind of pages, as wide as is needed
    places: dict = field(default_factory=dict)  # of each kind: flat new tokens and their slots
    packing: tuple | None = None  # of a prefill with padding: positions, flat tokens, cu_seqlens
    checked: bool = False


class PagedLayer(CacheLayerMixin):
    """One layer of a PagedCache. `k_pages` and `v_pages` are [pages, page, G, D]."""

    is_croppable = True

    def __init__(self, cache: "PagedCache", window: int | None):
        super().__init__()
        self.cache, self.window, self.is_sliding = cache, window, window is not None
        self.seen = 0  # columns, padding included
        self.k_pages: torch.Tensor | None = None
        self.v_pages: torch.Tensor | None = None

    def lazy_initialization(self, key_states, value_states) -> None:
        if key_states.dtype not in DTYPES or self.cache.dtype not in (None, key_states.dtype):
            refuse(f"keys of {self.cache.dtype or DTYPES}", key_states.dtype)
        if self.cache.device not in (None, key_states.device):
            refuse(f"keys on {self.cache.device}", key_states.device)
        self.cache._start(key_states.shape[0])
        total, page = self.cache._pages[self.window].total, self.cache.page_size
        new = [
            (page, x.shape[1], x.shape[3], x.dtype, x.device) for x in (key_states, value_states)
        ]
        held = [] if self.k_pages is None else [self.k_pages, self.v_pages]
        if [(*x.shape[1:], x.dtype, x.device) for x in held] != new or len(held[0]) < total:
            with torch.inference_mode(False):
                self.k_pages, self.v_pages = (
                    torch.empty(total, *shape, dtype=dtype, device=device)
                    for *shape, dtype, device in new
                )
        self.is_initialized = True

    def update(self, key_states, value_states, *args, **kwargs):
        """Append rotated keys [B, G, S, D]; all that the layer still sees, new tokens included."""
        refuse_gradients(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        batch, _, tokens, _ = key_states.shape
        step = self.cache._enter(self, batch, tokens, None, None)
        if any(n != self.seen for n in step.before):
            refuse("a patched model behind padding that the cache left out", "another")
        k, v = key_states.transpose(1, 2), value_states.transpose(1, 2)
        start = 0 if self.window is None else max(0, self.seen - self.window + 1)
        at = torch.arange(start, self.seen, device=k.device).expand(batch, -1)
        slots = self.cache._slots(self, at)
        past = [pages.flatten(0, 1)[slots] for pages in (self.k_pages, self.v_pages)]
        self.write(k, v, step)
        self.seen += tokens
        both = zip(past, (k, v), strict=True)
        return tuple(torch.cat(parts, 1).transpose(1, 2) for parts in both)

    def write(self, k: torch.Tensor, v: torch.Tensor, step: Step) -> None:
        """Rotated k and v [B, S, G, D] into their pages, but for padding and what no query sees."""
        rows, slots = self.cache._places(self, step)
        for pages, new in ((self.k_pages, k), (self.v_pages, v)):
            new = new.flatten(0, 1)
            pages.flatten(0, 1).index_copy_(0, slots, new if rows is None else new[rows])

    def decode(self, q, k, v, cached, table, options: dict) -> torch.Tensor:
        """decode_attention, in as many calls as a ring of pages takes."""
        tokens, most = q.shape[1], q.shape[1]
        if self.window is not None:
            most = self.cache._pages[self.window].most
        if tokens <= most:
            return decode_attention(
                q, self.k_pages, self.v_pages, cached, block_table=table, k=k, v=v, **options
            )
        parts = (
            self.decode(
                q[:, n : n + most],
                k[:, n : n + most],
                v[:, n : n + most],
                cached + n,
                table,
                options,
            )
            for n in range(0, tokens, most)
        )
        return torch.cat(list(parts), 1)

    def __deepcopy__(self, memo) -> "PagedLayer":
        """For prefixes that several prompts share: pages that are not used are not touched."""
        made = memo[id(self)] = copy.copy(self)
        made.cache = copy.deepcopy(self.cache, memo)
        if self.is_initialized:
            used = self.cache._pages[self.window].taken()
            for name in ("k_pages", "v_pages"):
                pages = getattr(self, name)
                setattr(made, name, torch.empty_like(pages))
                getattr(made, name)[used] = pages[used]
        return made

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        offset = 0 if self.window is None else max(self.seen - self.window + 1, 0)
        return self.seen - offset + query_length, offset

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return self.cache.max_length if self.window is None else self.window

    @property
    def batch_size(self) -> int:
        if not self.cache.lengths:
            raise AttributeError("batch_size")  # transformers asks by hasattr
        return len(self.cache.lengths)

    def offload(self):
        refuse("a cache that stays on its device", "offloading")

    def reset(self) -> None:
        self.cache.reset()

    def crop(self, tokens_to_remove: int) -> None:
        refuse("crop of the whole PagedCache", "that of one layer")

    reorder_cache = crop


def refuse_gradients(*tensors: torch.Tensor) -> None:
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        refuse("inference with a PagedCache (use torch.no_grad())", "a required gradient")
