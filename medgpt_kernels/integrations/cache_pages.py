"""Which pages of a PagedCache hold whose tokens; the pages themselves lie in its layers."""

import torch

FEW = 16  # new tokens up to which decode_attention splits the keys


class Growing:
    """Pages of the layers that keep every token: taken as sequences grow, shared among beams."""

    def __init__(self, batch: int, page: int, max_pages: int):
        self.page, self.total = page, batch * max_pages
        self.table = torch.zeros(batch, max_pages, dtype=torch.int32)
        self.held: list[list[int]] = [[] for _ in range(batch)]
        self.users = [0] * self.total
        self.free: list[int] = []
        self.fresh = 0  # pages from here on were never taken

    def _take(self) -> int:
        if self.free:
            found = self.free.pop()
        else:
            found, self.fresh = self.fresh, self.fresh + 1
        self.users[found] = 1
        return found

    def _drop(self, page: int) -> None:
        self.users[page] -= 1
        if not self.users[page]:
            self.free.append(page)

    def reserve(self, before: list[int], after: list[int]) -> list[tuple[int, int]]:
        """Room for new tokens; (to, from) of the shared pages that would be written to."""
        copies = []
        for row, (start, end) in enumerate(zip(before, after, strict=True)):
            held = self.held[row]
            if start % self.page and end > start and self.users[held[-1]] > 1:
                copies.append((self._take(), held[-1]))
                self._drop(held[-1])
                held[-1] = copies[-1][0]
                self.table[row, len(held) - 1] = held[-1]
            while len(held) * self.page < end:
                held.append(self._take())
                self.table[row, len(held) - 1] = held[-1]
        return copies

    def reorder(self, order: list[int], lengths: list[int]) -> list[tuple[int, int]]:
        """Row n becomes what row order[n] was; pages are shared until they are written to."""
        held = [list(self.held[n]) for n in order]
        for pages in held:
            for page in pages:
                self.users[page] += 1
        for pages in self.held:
            for page in pages:
                self._drop(page)
        self.held = held
        with torch.inference_mode(False):
            self.table = self.table[order]
        return []

    def crop(self, lengths: list[int]) -> None:
        for held, length in zip(self.held, lengths, strict=True):
            while held and (len(held) - 1) * self.page >= length:
                self._drop(held.pop())

    def taken(self) -> list[int]:
        return [page for page, users in enumerate(self.users) if users]

    def used(self, longest: list[int]) -> int:
        return self.fresh - len(self.free)


class Ring:
    """Pages of the sliding layers: the same few for each sequence, written over in turn."""

    def __init__(self, batch: int, page: int, max_pages: int, window: int):
        self.page, self.window = page, window
        self.pages = min(-(-(window - 1 + max(window, FEW)) // page), max_pages)
        self.total = batch * self.pages
        # new tokens that do not write over what the first of them sees
        self.most = self.tokens - window + 1 if self.pages < max_pages else max_pages * page
        first = torch.arange(batch, dtype=torch.int32)[:, None] * self.pages
        self.rows = first + torch.arange(max_pages, dtype=torch.int32) % self.pages
        self.table = self.rows

    @property
    def tokens(self) -> int:
        return self.pages * self.page

    def reserve(self, before: list[int], after: list[int]) -> list[tuple[int, int]]:
        return []

    def reorder(self, order: list[int], lengths: list[int]) -> list[tuple[int, int]]:
        """(to, from) of the pages that are another sequence's now."""
        self.table = self.rows[: len(order)]
        return [
            (to * self.pages + n, old * self.pages + n)
            for to, old in enumerate(order)
            if to != old
            for n in range(min(self.pages, -(-lengths[old] // self.page)))
        ]

    def crop(self, lengths: list[int]) -> None:
        pass

    def taken(self) -> list[int]:
        return list(range(self.total))

    def used(self, longest: list[int]) -> int:
        return sum(min(self.pages, -(-n // self.page)) for n in longest)
