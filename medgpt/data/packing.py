"""Rows as packs of a training stage's length, the same for a seed and an epoch on any machine.

Dims: S tokens of a pack, N tiles.
"""

import numpy as np

from ..images import ImageError, load_image
from .collator import Document, blank_image, collate
from .ffd import WINDOW_PACKS, plan_packs
from .lengths import reasons, row_lengths
from .pictures import image_fault
from .reader import BROKEN, Rows, image_sources
from .rows import RowError

BLANK_TOKENS = 3


def encode(row: dict, processor, folder, **render_kwargs) -> Document:
    """A row's token ids, targets and tiles.

    Args:
        folder: where the paths of its images start.
        render_kwargs: of medgpt.chat.render: reasoning_effort, system_prompt, ...

    Raises:
        RowError: an image that cannot be read, with the reason.
        ValueError: what the processor refuses, with the row's id and no text of it.
    """
    sources = image_sources(row, folder)
    try:
        found = processor.apply_chat_template(
            row["messages"],
            images=sources,
            add_generation_prompt=False,
            return_assistant_tokens_mask=True,
            padding=False,
            **render_kwargs,
        )
    except ValueError as error:
        if isinstance(error, ImageError):
            raise RowError(next(filter(None, map(_fault, sources)), "unreadable_image")) from None
        raise ValueError(f"row {row['id']}: {error}") from None
    ids = np.asarray(found["input_ids"][0], np.int64)
    targets = np.asarray(found["assistant_masks"][0], bool)
    if "pixel_values" not in found:
        return Document(ids, targets)
    return Document(ids, targets, found["pixel_values"], found["image_sizes"])


def _fault(source) -> str | None:
    try:
        load_image(source)
    except ImageError:
        return image_fault(source)
    return None


class PackedDataset:
    """Map-style over packs: `dataset[i]` is the collated pack i of the epoch, ready for forward.

    A pack is one row of documents, at most `length` tokens with their images' tokens, filled by
    first-fit-decreasing; see collate for its entries. What a pack holds depends on the rows, seed
    and epoch alone: never on workers, ranks or earlier reads. A row that cannot be trained on is in
    no pack; one whose image turns out broken when it is decoded is left out of its pack.

    Args:
        rows_path: a parquet file of rows, a folder of them, or a list of either; a path twice in
            the list counts twice.
        processor: a MedGPTProcessor, or what was saved from one.
        length: tokens of a pack, at most.
        seed: of the order and of what stands together.
        epoch: the first; see set_epoch.
        weighting: None, or "sqrt" for loss_weights of 1 / sqrt(targets of the document).
        pad: fill every pack up to `length` with padding that has no loss.
        blank: a black image of three tokens in packs that have none, for ZeRO-3.
        workers: processes that count tokens where no count is stored yet. Counts are stored
            beside the rows (`lengths-*.npy`), for later runs.
        window_packs: how many packs are packed together.
        render_kwargs: of medgpt.chat.render.

    Attributes:
        lengths: int32 [rows], tokens; 0: nothing to learn; below 0: see lengths.REASONS.
        skipped: rows that are in no pack, by reason: too_long, no_target, and those of REASONS;
            a file without a footer counts as one.

    Raises:
        ValueError: no rows that fit; `dataset[i]`: a row that is not as it was counted.
    """

    def __init__(
        self,
        rows_path,
        processor,
        length: int,
        seed: int = 0,
        *,
        epoch: int = 0,
        weighting: str | None = None,
        pad: bool = False,
        blank: bool = False,
        workers: int = 1,
        window_packs: int = WINDOW_PACKS,
        **render_kwargs,
    ):
        self.rows, self.processor = Rows(rows_path, skip_broken=True), processor
        if not self.rows.files:
            raise ValueError(f"packing: expected parquet files, got broken ones in {rows_path}")
        self.length, self.seed, self.window_packs = length, seed, window_packs
        self.weighting, self.pad, self.blank = weighting, pad, blank
        self.render_kwargs = render_kwargs
        self.capacity = length - (BLANK_TOKENS if blank else 0)
        self.lengths = row_lengths(self.rows, processor, workers=workers, **render_kwargs)
        self.skipped = {
            "too_long": int((self.lengths > self.capacity).sum()),
            "no_target": int((self.lengths == 0).sum()),
            **reasons(self.lengths),
        }
        if self.rows.broken:
            self.skipped[BROKEN] = self.skipped.get(BROKEN, 0) + len(self.rows.broken)
        if not ((self.lengths > 0) & (self.lengths <= self.capacity)).any():
            raise ValueError(
                f"packing: expected rows of at most {length} tokens, got none: {self.skipped}"
            )
        self.epoch = -1
        self.set_epoch(epoch)

    def set_epoch(self, epoch: int) -> None:
        """Packs of another epoch. Loaders with persistent workers need a PackSampler instead."""
        if epoch != self.epoch:
            self.documents, self.pack_offs = plan_packs(
                self.lengths,
                self.capacity,
                seed=self.seed,
                epoch=epoch,
                window_packs=self.window_packs,
            )
            self.epoch = epoch

    def __len__(self) -> int:
        return len(self.pack_offs) - 1

    def _split(self, index) -> int:
        """Goes to the epoch of an (epoch, pack) and gives the pack."""
        if isinstance(index, tuple):
            self.set_epoch(index[0])
            index = index[1]
        if not 0 <= index < len(self):
            raise IndexError(f"packing: expected a pack below {len(self)}, got {index}")
        return index

    def members(self, index) -> np.ndarray:
        """Row numbers of a pack; index as of __getitem__."""
        index = self._split(index)
        return self.documents[self.pack_offs[index] : self.pack_offs[index + 1]]

    def ids(self, index) -> list[str]:
        """Row ids of a pack, for a log: no text."""
        return [self.rows[int(number)]["id"] for number in self.members(index)]

    def __getitem__(self, index) -> dict:
        """Pack `index`, or (epoch, index) of a PackSampler."""
        return self.read(index)[0]

    def read(self, index) -> tuple[dict, list[str], list[tuple[str, str]]]:
        """(the pack, the source of each of its documents, (row, reason) of those left out)."""
        documents, sources, left_out = [], [], []
        for number in self.members(index).tolist():
            try:
                row = self.rows[number]
                documents.append(self._document(number, row))
                sources.append(row["source"])
            except RowError as error:
                name = self.rows.name(number) if error.reason == BROKEN else row["id"]
                left_out.append((name, error.reason))
        if not documents:  # a token without a target, so that the step has its pack
            ids = np.array([self.processor.tokenizer.pad_token_id], np.int64)
            documents.append(Document(ids, np.zeros(1, bool)))
        return self._collated(documents), sources, left_out

    def _collated(self, documents: list[Document]) -> dict:
        if self.blank and not any(len(d.image_sizes) for d in documents):
            unit = self.processor.image_processor.unit
            documents.append(blank_image(unit, self.processor.image_ids))
        return collate(
            documents,
            weighting=self.weighting,
            pad_to=self.length if self.pad else None,
            pad_token_id=self.processor.tokenizer.pad_token_id,
        )

    def _document(self, number: int, row: dict | None = None) -> Document:
        row = self.rows[number] if row is None else row
        document = encode(row, self.processor, self.rows.folder(number), **self.render_kwargs)
        if len(document.input_ids) != self.lengths[number]:
            raise ValueError(
                f"row {row['id']}: expected {self.lengths[number]} tokens as counted before, "
                f"got {len(document.input_ids)}"
            )
        return document

    def fill(self) -> float:
        """Tokens of the epoch's packs over the tokens that they could hold."""
        return float(self.lengths[self.documents].sum() / (self.length * len(self)))


class PackSampler:
    """Yields (epoch, pack) from where training stands, for one rank of several.

    A loader reads ahead, so the sampler does not count what it yields: the trainer calls
    `advance(packs)` after each step, with the packs of all ranks, and `state_dict()` is then exact.
    Every rank gets equally many packs; what is left over at an epoch's end is not yielded.

    Args:
        dataset: a PackedDataset.
        rank, world_size: rank r gets packs r, r + world_size, ... of what is left.
    """

    def __init__(self, dataset: PackedDataset, *, rank: int = 0, world_size: int = 1):
        if not 0 <= rank < world_size:
            raise ValueError(f"PackSampler: expected a rank below {world_size}, got {rank}")
        self.dataset, self.rank, self.world_size = dataset, rank, world_size
        self.epoch, self.position = dataset.epoch, 0

    def __len__(self) -> int:
        """Packs of this rank that are left in the epoch."""
        self.dataset.set_epoch(self.epoch)
        return (len(self.dataset) - self.position) // self.world_size

    def __iter__(self):
        start, epoch = self.position, self.epoch
        for step in range(len(self)):
            yield epoch, start + step * self.world_size + self.rank

    def advance(self, packs: int) -> None:
        """`packs` more, of all ranks together, have been trained on."""
        self.position += packs

    def set_epoch(self, epoch: int) -> None:
        """To the start of another epoch; the epoch that it is in stays where it is."""
        if epoch != self.epoch:
            self.epoch, self.position = epoch, 0
        self.dataset.set_epoch(epoch)

    def state_dict(self) -> dict:
        """{epoch, position}: packs of all ranks trained on in that epoch."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict) -> None:
        self.epoch, self.position = int(state["epoch"]), int(state["position"])
        self.dataset.set_epoch(self.epoch)
