"""Encoded documents to one packed row, in the arguments of MedGPT's forward.

Dims: S tokens of all documents, N tiles.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

IGNORE = -100
NO_SIZES = np.empty((0, 2), np.int32)


class Document(NamedTuple):
    """One encoded conversation of L tokens."""

    input_ids: np.ndarray  # int64 [L]
    targets: np.ndarray  # bool [L]: what an assistant writes
    pixel_values: np.ndarray = np.empty(0, np.uint8)  # uint8, flat: tile after tile, HWC
    image_sizes: np.ndarray = NO_SIZES  # int32 [tiles, 2] of height, width


def blank_image(unit: int, image_ids) -> Document:
    """A black image of one token and nothing to learn.

    With ZeRO-3 all processes have to go through the vision tower together; this brings one to a
    pack without images. It takes three tokens.
    """
    ids = np.array([image_ids.start, image_ids.token, image_ids.end], np.int64)
    pixels, sizes = np.zeros(3 * unit * unit, np.uint8), np.array([[unit, unit]], np.int32)
    return Document(ids, np.zeros(3, bool), pixels, sizes)


def collate(
    documents: Sequence[Document],
    *,
    weighting: str | None = None,
    pad_to: int | None = None,
    pad_token_id: int = 199999,
) -> dict:
    """One row of documents that do not see each other.

    Args:
        documents: in the order in which they stand in the row.
        weighting: None, or "sqrt": loss_weights of 1 / sqrt(n) on the n targets of a document.
        pad_to: fill up to that many tokens with a last document of padding, without loss.

    Returns:
        input_ids int64 [1, S]; labels int64 [1, S], -100 outside of targets and at each document's
        first token (forward shifts them); position_ids int64 [1, S], from 0 in each document;
        cu_seq_lens_q, cu_seq_lens_k int32 [documents + 1] (the same); max_length_q, max_length_k
        int; where there are images pixel_values uint8 [sum H W 3] and image_sizes int32 [N, 2];
        with a weighting loss_weights float32 [1, S], 0 where labels are -100.

    Raises:
        ValueError: no documents, an empty one, more tokens than pad_to, an unknown weighting.
    """
    import torch

    if weighting not in (None, "sqrt"):
        raise ValueError(f'collate: expected weighting None or "sqrt", got {weighting!r}')
    documents = list(documents)
    lengths = [len(d.input_ids) for d in documents]
    if not lengths or min(lengths) < 1:
        raise ValueError(f"collate: expected documents of one token and more, got {lengths}")
    spare = 0 if pad_to is None else pad_to - sum(lengths)
    if spare < 0:
        raise ValueError(f"collate: expected at most {pad_to} tokens, got {sum(lengths)}")
    if spare:
        filler = np.full(spare, pad_token_id, np.int64)
        documents.append(Document(filler, np.zeros(spare, bool)))
        lengths.append(spare)
    targets = [_targets(d) for d in documents]
    ids = np.concatenate([d.input_ids for d in documents]).astype(np.int64, copy=False)
    labels = np.where(np.concatenate(targets), ids, IGNORE)
    cu_seqlens = torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32))
    row = {
        "input_ids": torch.from_numpy(ids)[None],
        "labels": torch.from_numpy(labels)[None],
        "position_ids": torch.from_numpy(np.concatenate([np.arange(n) for n in lengths]))[None],
        "cu_seq_lens_q": cu_seqlens,
        "cu_seq_lens_k": cu_seqlens,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }
    if weighting is not None:
        weights = np.concatenate([t / np.sqrt(max(1, t.sum())) for t in targets])
        row["loss_weights"] = torch.from_numpy(weights.astype(np.float32))[None]
    if any(len(d.image_sizes) for d in documents):
        row["pixel_values"] = torch.from_numpy(np.concatenate([d.pixel_values for d in documents]))
        sizes = np.concatenate([d.image_sizes for d in documents])
        row["image_sizes"] = torch.from_numpy(sizes.astype(np.int32, copy=False))
    return row


def _targets(document: Document) -> np.ndarray:
    targets = np.array(document.targets, bool)
    targets[0] = False  # nothing stands before it to predict it from
    return targets


def join_packs(packs: Sequence[dict]) -> dict:
    """Several packs as one row: the data_collator of a Trainer, whatever its batch size.

    Documents stay apart; a pack alone comes back as it is.
    """
    import torch

    packs = list(packs)
    if len(packs) == 1:
        return packs[0]
    if not packs or len({frozenset(p) - {"pixel_values", "image_sizes"} for p in packs}) > 1:
        raise ValueError("join_packs: expected packs of the same arguments, got others or none")
    row = {}
    for name in ("input_ids", "labels", "position_ids", "loss_weights"):
        if name in packs[0]:
            row[name] = torch.cat([p[name] for p in packs], 1)
    ends = np.cumsum([0] + [p["input_ids"].shape[1] for p in packs])
    pieces = [p["cu_seq_lens_q"][bool(i) :] + int(ends[i]) for i, p in enumerate(packs)]
    row["cu_seq_lens_q"] = row["cu_seq_lens_k"] = torch.cat(pieces).to(torch.int32)
    row["max_length_q"] = row["max_length_k"] = max(p["max_length_q"] for p in packs)
    for name in ("pixel_values", "image_sizes"):
        found = [p[name] for p in packs if name in p]
        if found:
            row[name] = torch.cat(found)
    return row
