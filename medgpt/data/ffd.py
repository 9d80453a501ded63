"""Documents to packs by first-fit-decreasing, a window of shuffled documents at a time."""

from collections.abc import Sequence

import numpy as np

WINDOW_PACKS = 64  # packs that one window of documents would fill


def first_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of each pack, every pack at most capacity; equal lengths keep their order.

    The first pack with room is found in a tree of free places, in log2 of the number of documents.

    Raises:
        ValueError: a length below 1 or above capacity.
    """
    lengths = np.asarray(lengths, np.int64)
    if not len(lengths):
        return []
    if lengths.min() < 1 or lengths.max() > capacity:
        raise ValueError(
            f"packing: expected lengths from 1 to {capacity}, got {lengths.min()}..{lengths.max()}"
        )
    leaves = 1 << int(len(lengths) - 1).bit_length()
    free = [capacity] * (2 * leaves)  # free[1] is the root: the most room in any pack
    packs: list[list[int]] = []
    order = np.argsort(-lengths, kind="stable")
    for index, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        node = 1
        while node < leaves:
            node *= 2
            node += free[node] < length
        if node - leaves == len(packs):
            packs.append([])
        packs[node - leaves].append(index)
        free[node] -= length
        while node > 1:
            node //= 2
            free[node] = max(free[2 * node], free[2 * node + 1])
    return packs


def plan_packs(
    lengths: Sequence[int],
    capacity: int,
    *,
    seed: int = 0,
    epoch: int = 0,
    window_packs: int = WINDOW_PACKS,
) -> tuple[np.ndarray, np.ndarray]:
    """An epoch's packs: every document of 1 to capacity tokens once, in an order of its own.

    Documents are shuffled and packed in windows, so that packs differ between epochs; what stands
    in a window's last pack goes on to the next window. The order of the packs is shuffled too.

    Args:
        lengths: tokens of each document; those below 1 or above capacity are left out.
        seed, epoch: the only sources of chance.

    Returns:
        documents int64 [D], pack_offs int64 [packs + 1]: pack p is
        documents[pack_offs[p] : pack_offs[p + 1]].
    """
    lengths = np.asarray(lengths, np.int64)
    rng = np.random.Generator(np.random.PCG64([seed, epoch]))
    order = rng.permutation(np.flatnonzero((lengths >= 1) & (lengths <= capacity)))
    reached = np.cumsum(lengths[order])
    packs: list[np.ndarray] = []
    carried, start = np.empty(0, np.int64), 0
    while start < len(order):
        before = reached[start - 1] if start else 0
        room = window_packs * capacity - int(lengths[carried].sum())
        stop = max(start + 1, int(np.searchsorted(reached, before + room, "right")))
        window = np.concatenate([carried, order[start:stop]])
        found = [window[pack] for pack in first_fit_decreasing(lengths[window], capacity)]
        carried, start = found.pop() if stop < len(order) else np.empty(0, np.int64), stop
        packs += found
    packs = [packs[i] for i in rng.permutation(len(packs))]
    offs = np.cumsum([0, *map(len, packs)], dtype=np.int64)
    return np.concatenate(packs) if packs else order, offs
