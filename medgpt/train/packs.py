"""Packs of all epochs on their way to the trainer, with their sources and what was left out."""

from bisect import bisect_right
from itertools import accumulate

import torch

OURS = ("pack", "sources", "left_out")  # of the batch, not of forward


class Packs(torch.utils.data.Dataset):
    """The packs of all epochs, one epoch after another, as one sequence.

    Epochs pack their rows anew and may differ by a pack: as one sequence the number of a step alone
    says where in the data it stands.

    Args:
        dataset: with `read(pack)` and `ids(pack)` as PackedDataset has them; with set_epoch, and
            packs as (epoch, pack), for more epochs than one.
        epochs: how many.
    """

    def __init__(self, dataset, epochs: int = 1):
        self.dataset, lengths = dataset, []
        for epoch in range(epochs):
            if epochs > 1:
                dataset.set_epoch(epoch)
            lengths.append(len(dataset))
        self.ends = list(accumulate(lengths))

    def __len__(self) -> int:
        return self.ends[-1]

    def _place(self, index: int):
        if len(self.ends) == 1:
            return index
        epoch = bisect_right(self.ends, index)
        return epoch, index - (self.ends[epoch - 1] if epoch else 0)

    def __getitem__(self, index: int) -> dict:
        pack, sources, left_out = self.dataset.read(self._place(index))
        return {**pack, "pack": index, "sources": sources, "left_out": left_out}

    def ids(self, index: int) -> list[str]:
        return list(self.dataset.ids(self._place(index)))


def only_pack(packs: list[dict]) -> dict:
    """The data_collator: a micro-batch is one pack."""
    (pack,) = packs
    return pack
