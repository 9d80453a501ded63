"""A paged KV cache that transformers' generate() accepts, for decode_attention under `patch`.

B sequences of S new tokens, G key and value heads, D head_dim, W sliding window; a layer's keys and
values lie in pages [pages, page, G, D]. Padding is not stored: each sequence has its own length.
"""

from dataclasses import dataclass
from weakref import WeakSet

import torch
from transformers.cache_utils import Cache

from medgpt_kernels.attention.op import attention
from medgpt_kernels.integrations import refuse
from medgpt_kernels.integrations.cache_pages import FEW, Growing, Ring
from medgpt_kernels.integrations.paged_layer import DTYPES, PagedLayer, Step, refuse_gradients
from medgpt_kernels.rotary.op import apply_rotary
from medgpt_kernels.rotary.tables import Rotary


@dataclass(eq=False)
class Mark:
    """A PagedCache's sequences at some time; of sliding layers also what they held."""

    seen: int
    tail: int
    lengths: list[int]
    longest: list[int]
    start: list[int]
    rings: list[tuple[torch.Tensor, torch.Tensor] | None]  # of each layer


class PagedCache(Cache):
    """KV cache in pages, for `generate(past_key_values=PagedCache(model.config))`.

    Under `patch` one decode_attention a layer appends, rotates and attends; prompts of an empty
    cache go through `attention`. Other attention gets its keys and values from `update`, copied.
    Sliding layers keep a ring of pages that holds their window and as many tokens again.

    `rewind` goes back to a `mark`, such as a prompt that another continues, whatever followed it.

    Beams share full pages. Padding takes no part and is not stored, between turns either: a row of
    a batch is as it would be alone. The cache may be given to generate() again, with all ids so
    far, for the next turn.

    Args:
        config: the model's, or one that holds a text config: its layer types and sliding_window.
        page_size: tokens a page.
        max_length: most tokens of a sequence. None is max_position_embeddings.
        max_batch: most sequences or beams. None is the batch of the first call.
        dtype, device: fp32, bf16 or fp16, that keys have to have. None: as they come.

    The pages for max_batch * max_length tokens are allocated at once and never copied. On a CPU
    memory is taken only where a page is written to; on a GPU give a max_length.

    Raises:
        ValueError: layers other than full and sliding attention. In use: gradients, more tokens or
            sequences than asked for, another batch size without `reset`, positions that do not
            count on, an attention_mask that disagrees with what is stored, `crop` beyond what a
            ring holds.
    """

    def __init__(
        self,
        config,
        *,
        page_size: int = 64,
        max_length: int | None = None,
        max_batch: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        text = config.get_text_config(decoder=True)
        window = getattr(text, "sliding_window", None)
        types = getattr(text, "layer_types", None)
        if types is None:
            types = ["full_attention" if window is None else "sliding_attention"]
            types = types * text.num_hidden_layers
        other = set(types) - {"full_attention", "sliding_attention"}
        if other or getattr(text, "num_kv_shared_layers", 0):
            refuse("layers of full or sliding attention", sorted(other) or "shared ones")
        self.max_length = text.max_position_embeddings if max_length is None else max_length
        sizes = (page_size, self.max_length, 1 if max_batch is None else max_batch)
        if min(sizes) < 1:
            refuse("page_size, max_length and max_batch of at least 1", sizes)
        if dtype not in (None, *DTYPES):
            refuse(f"dtype among {DTYPES}", dtype)
        self.page_size, self.max_batch, self.dtype = page_size, max_batch, dtype
        self.device = None if device is None else torch.device(device)
        self._pages: dict[int | None, Growing | Ring] = {}
        sliding = [kind == "sliding_attention" for kind in types]
        super().__init__(layers=[PagedLayer(self, window if s else None) for s in sliding])
        self.reset()

    def reset(self) -> None:
        """Forget every sequence; the memory stays."""
        self.seen = 0  # columns, padding included
        self.lengths: list[int] = []
        self._longest: list[int] = []  # that a ring has been written to
        self._from: list[int] = []  # the position of each sequence's first token
        self._tail = 0  # columns since the last padding
        self._step: Step | None = None
        self._marks: WeakSet[Mark] = WeakSet()  # that can be gone back to
        self._pages.clear()
        for layer in self.layers:
            layer.seen, layer.is_initialized = 0, False

    def used_pages(self, layer_idx: int) -> int:
        """Pages that a layer's keys lie in, and as many for its values."""
        pages = self._pages.get(self.layers[layer_idx].window)
        return 0 if pages is None else pages.used(self._longest)

    def attend(
        self,
        layer_idx: int,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        mask: torch.Tensor | None,
        position_ids: torch.Tensor,
        rotary: Rotary,
        window: int | None,
        sinks: torch.Tensor | None,
        softmax_scale: float,
    ) -> torch.Tensor:
        """Append k and v [B, S, G, D], before rotation, and attend to what is cached.

        Args:
            q: [B, S, H, D]. mask: bool [B, keys] that ends with the new tokens, False for padding.
            position_ids: [1 or B, S]; rotary: tables as long as the longest sequence.

        Returns:
            out as q; 0 for padding.
        """
        layer = self.layers[layer_idx]
        if window != layer.window:
            refuse(f"the window of {layer.window} that the cache was made for", window)
        refuse_gradients(q, k, v)
        if not layer.is_initialized:
            layer.lazy_initialization(k.transpose(1, 2), v.transpose(1, 2))
        step = self._enter(layer, q.shape[0], q.shape[1], mask, position_ids)
        options = {
            "window_size": (-1 if window is None else window - 1, 0),
            "sinks": sinks,
            "softmax_scale": softmax_scale,
        }
        if not any(step.before) and step.tokens > FEW:
            out = self._prefill(layer, q, k, v, step, rotary, options)
        elif step.rows is None:
            options["rotary"] = rotary
            out = layer.decode(q, k, v, step.cached, step.tables[window], options)
        else:
            options["rotary"] = rotary
            out = torch.zeros_like(q)
            for row, at in step.rows:
                parts = (x[row, at][None] for x in (q, k, v))
                cached, table = (x[row : row + 1] for x in (step.cached, step.tables[window]))
                out[row, at] = layer.decode(*parts, cached, table, options)[0]
        layer.seen += step.tokens
        return out

    def step(
        self,
        layer_idx: int,
        batch: int,
        tokens: int,
        dtype: torch.dtype,
        *,
        mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        window: int | None,
    ) -> tuple[PagedLayer, torch.Tensor, torch.Tensor] | None:
        """A layer, its sequences' lengths and table, for a kernel that appends by itself.

        It adds `tokens` to the layer's `seen` when it is done. None where `attend` has to do it:
        before its pages exist, with padding, or with more tokens than a ring takes at once.
        """
        layer = self.layers[layer_idx]
        if not layer.is_initialized or window != layer.window or layer.k_pages.dtype != dtype:
            return None
        if position_ids is None or (window and tokens > self._pages[window].most):
            return None
        step = self._enter(layer, batch, tokens, mask, position_ids)
        return None if step.rows is not None else (layer, step.cached, step.tables[window])

    def _prefill(self, layer, q, k, v, step: Step, rotary: Rotary, options: dict) -> torch.Tensor:
        """The first tokens: attention over themselves."""
        if step.valid is None:
            q, k = apply_rotary(q, k, rotary)
            layer.write(k, v, step)
            return attention(q, k, v, **options)
        if step.packing is None:
            lengths = step.valid.sum(1)
            cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(torch.int32)
            rows = step.valid.flatten().nonzero().flatten()
            positions = (step.valid.cumsum(1) - 1).clamp(min=0)
            on_device = (x.to(q.device) for x in (positions, rows, cu_seqlens))
            step.packing = (*on_device, int(lengths.max()))
        positions, rows, cu_seqlens, longest = step.packing
        q, k = apply_rotary(q, k, rotary, position_ids=positions)
        layer.write(k, v, step)
        packed = (x.flatten(0, 1).index_select(0, rows) for x in (q, k, v))
        cu = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens}
        out = attention(*packed, **cu, max_seqlen_q=longest, max_seqlen_k=longest, **options)
        return torch.zeros_like(q).flatten(0, 1).index_copy(0, rows, out).view(q.shape)

    def _start(self, batch: int) -> None:
        """Tables for the sequences of the first call."""
        if self.lengths:
            return
        room = batch if self.max_batch is None else self.max_batch
        if batch > room:
            refuse(f"at most max_batch {room} sequences", batch)
        max_pages = -(-self.max_length // self.page_size)
        with torch.inference_mode(False):
            for window in {layer.window for layer in self.layers}:
                if window is None:
                    pages = Growing(room, self.page_size, max_pages)
                    pages.held, pages.table = pages.held[:batch], pages.table[:batch]
                else:
                    pages = Ring(room, self.page_size, max_pages, window)
                    pages.table = pages.table[:batch]
                self._pages[window] = pages
        self._room = room
        self.lengths, self._longest, self._from = ([0] * batch for _ in range(3))

    def _enter(self, layer: PagedLayer, batch: int, tokens: int, mask, position_ids) -> Step:
        """What this forward's layers share, made by the first of them."""
        if layer.seen == self.seen:
            self._step = self._begin(layer, batch, tokens, mask, position_ids)
            self.seen += tokens
        step = self._step
        if step is None or (layer.seen + tokens, tokens) != (self.seen, step.tokens):
            refuse(
                "the same tokens in every layer, and reset() after a call that failed",
                f"{tokens} after {layer.seen} in one of them, {self.seen} in another",
            )
        if layer.window is None and position_ids is not None and not step.checked:
            past = [layer.seen] * batch
            if mask is not None:
                past = mask[:, : mask.shape[1] - tokens].sum(1).tolist()
            if past != step.before:
                refuse(f"an attention_mask with the {step.before} tokens that are cached", past)
            step.checked = True
        return step

    def _begin(self, layer, batch: int, tokens: int, mask, position_ids) -> Step:
        if batch != len(self.lengths):
            refuse(f"the {len(self.lengths)} sequences of before, or reset()", batch)
        valid, new = None, [tokens] * batch
        if mask is not None:
            if mask.ndim != 2 or mask.is_floating_point():
                refuse("no mask or a padding mask [B, keys]", f"{mask.dtype} {list(mask.shape)}")
            valid = mask[:, mask.shape[1] - tokens :].bool().cpu()
            if valid.all():
                valid = None
            else:
                new = valid.sum(1).tolist()
        before = self.lengths
        after = [n + m for n, m in zip(before, new, strict=True)]
        if max(after) > self.max_length:
            refuse(f"at most max_length {self.max_length} tokens", max(after))
        start = self._from
        if position_ids is not None and (tokens > 1 or position_ids.device.type == "cpu"):
            start = self._positions(position_ids, valid, tokens)
        device = layer.k_pages.device
        cached = torch.tensor(before, dtype=torch.int32, device=device)
        rows = None
        if valid is not None:
            found = ((b, v.nonzero().flatten()) for b, v in enumerate(valid))
            rows = [(b, at.to(device)) for b, at in found if len(at)]
        step = Step(tokens, before, cached, valid, rows)
        wide = 1 << (max(1, -(-max(after) // self.page_size)) - 1).bit_length()
        for window, pages in self._pages.items():
            self._copy(window, pages.reserve(before, after))
            step.tables[window] = pages.table[:, :wide].to(device)
        self.lengths, self._from = after, start
        self._longest = [max(n, m) for n, m in zip(self._longest, after, strict=True)]
        self._tail = self._tail + tokens if valid is None else 0
        return step

    def _positions(self, position_ids, valid, tokens: int) -> list[int]:
        """Where each sequence's positions start; they have to count its tokens."""
        count = torch.arange(tokens)[None] if valid is None else valid.cumsum(1) - 1
        count = count + torch.tensor(self.lengths)[:, None]
        apart = position_ids.cpu() - count
        if valid is not None:
            first = valid.long().argmax(1, keepdim=True)
            apart = torch.where(valid, apart, apart.gather(1, first))
        start = apart[:, 0].tolist()
        known = [
            s if n == 0 else old for s, n, old in zip(start, self.lengths, self._from, strict=True)
        ]
        if valid is not None:
            start = [
                s if any_new else old
                for s, any_new, old in zip(start, valid.any(1).tolist(), known, strict=True)
            ]
        if start != known or (apart != apart[:, :1]).any():
            refuse(
                "position_ids that count each sequence's tokens on", f"{start}, not {known}, off"
            )
        return known

    def _slots(self, layer: PagedLayer, at: torch.Tensor) -> torch.Tensor:
        """Where positions [B, n] lie in a layer's flat pages."""
        table = self._pages[layer.window].table.to(at.device)
        return table.long().gather(1, at // self.page_size) * self.page_size + at % self.page_size

    def _places(self, layer: PagedLayer, step: Step) -> tuple:
        """The flat new tokens that a layer keeps (None: all), and their slots in its pages."""
        if layer.window not in step.places:
            batch = len(step.before)
            valid = torch.ones(batch, step.tokens, dtype=torch.bool)
            valid = valid if step.valid is None else step.valid
            at = torch.tensor(step.before)[:, None] + valid.cumsum(1) - 1
            if layer.window is not None:
                ring = self._pages[layer.window].tokens
                valid = valid & (at >= at[:, -1:] + 1 - ring)
            slots = self._slots(layer, at.clamp(min=0))
            rows = None if valid.all() else valid.flatten().nonzero().flatten()
            slots = slots.flatten() if rows is None else slots.flatten()[rows]
            device = layer.k_pages.device
            rows = None if rows is None else rows.to(device)
            step.places[layer.window] = rows, slots.to(device)
        return step.places[layer.window]

    def _copy(self, window: int | None, copies: list[tuple[int, int]]) -> None:
        if not copies:
            return
        to, old = (list(pages) for pages in zip(*copies, strict=True))
        for layer in self.layers:
            if layer.window == window and layer.is_initialized:
                for pages in (layer.k_pages, layer.v_pages):
                    pages[to] = pages[old]

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Row n becomes what row beam_idx[n] was; there may be more or fewer rows than before."""
        order = beam_idx.tolist()
        if not self.lengths or order == list(range(len(self.lengths))):
            return
        if not order or len(order) > self._room:
            refuse(f"1 to max_batch {self._room} sequences", len(order))
        self._marks.clear()
        for window, pages in self._pages.items():
            self._copy(window, pages.reorder(order, self._longest))
        for name in ("lengths", "_longest", "_from"):
            setattr(self, name, [getattr(self, name)[n] for n in order])
        self._step = None

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.reorder_cache(torch.arange(len(self.lengths)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.reorder_cache(torch.arange(len(self.lengths))[indices.cpu()])

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last -tokens_to_remove tokens off every sequence.

        Raises:
            ValueError: a positive number, padding among those tokens, or tokens that follow more
                than a window's ring of pages still holds.
        """
        tokens_to_remove = int(tokens_to_remove)  # transformers 5.17 gives a tensor
        if tokens_to_remove > 0:
            refuse("a negative number of tokens to remove", tokens_to_remove)
        if tokens_to_remove == 0 or not self.lengths:
            return
        left = [n + tokens_to_remove for n in self.lengths]
        if min(left) < 0 or (-tokens_to_remove > self._tail and self._tail < self.seen):
            refuse("to remove tokens behind the last padding only", -tokens_to_remove)
        for window, pages in self._pages.items():
            if window is None:
                continue
            for length, longest in zip(left, self._longest, strict=True):
                if longest - pages.tokens > max(0, length - window + 1):
                    refuse(
                        f"to remove at most {pages.most} tokens behind a window",
                        longest - length,
                    )
        for pages in self._pages.values():
            pages.crop(left)
        self._forget_marks(self.seen + tokens_to_remove)
        self.lengths, self.seen = left, self.seen + tokens_to_remove
        self._tail, self._step = max(0, self._tail + tokens_to_remove), None
        for layer in self.layers:
            layer.seen = self.seen

    def mark(self) -> Mark:
        """The sequences as they are now, for `rewind`.

        Sliding layers write over their tokens, so what they hold is copied: a window and as many
        tokens again, for as long as the mark is kept. A copy of the cache has no marks.

        Raises:
            ValueError: nothing is cached yet, or a forward is under way.
        """
        if not self.seen or any(layer.seen != self.seen for layer in self.layers):
            refuse("the same tokens in every layer", [layer.seen for layer in self.layers])
        rings = [
            (layer.k_pages.clone(), layer.v_pages.clone()) if layer.is_sliding else None
            for layer in self.layers
        ]
        sequences = (list(x) for x in (self.lengths, self._longest, self._from))
        mark = Mark(self.seen, self._tail, *sequences, rings)
        self._marks.add(mark)
        return mark

    def rewind(self, mark: Mark) -> None:
        """Back to a mark, as often as wanted, after a call that failed too.

        Raises:
            ValueError: not this cache's, or since then reset(), other beams, a crop or a rewind to
                before it.
        """
        if mark not in self._marks:
            refuse("a mark of these sequences that nothing before it was written over", "another")
        self._forget_marks(mark.seen)
        for pages in self._pages.values():
            pages.crop(mark.lengths)
        for layer, ring in zip(self.layers, mark.rings, strict=True):
            layer.seen = mark.seen
            if ring is not None:
                with torch.inference_mode(layer.k_pages.is_inference()):
                    layer.k_pages.copy_(ring[0])
                    layer.v_pages.copy_(ring[1])
        self.seen, self._tail, self._step = mark.seen, mark.tail, None
        sequences = (list(x) for x in (mark.lengths, mark.longest, mark.start))
        self.lengths, self._longest, self._from = sequences

    def _forget_marks(self, seen: int) -> None:
        """Those behind so many columns."""
        for mark in [mark for mark in self._marks if mark.seen > seen]:
            self._marks.discard(mark)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_marks": WeakSet()}
