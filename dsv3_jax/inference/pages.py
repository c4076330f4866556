"""Accounting of pages on the host: who holds which, and which hold the beginning of a prompt that may come again."""

from __future__ import annotations

import collections
from collections.abc import Sequence

from dsv3_jax.inference.paged_cache import SCRATCH
from dsv3_jax.model.auto import PAGE

_Key = tuple[int, tuple[int, ...]]
"""The number of the content before, and the page's tokens: together they name everything up to the page's end."""


class PageAllocator:
    """Pages with counts of their holders. Full pages of known tokens can be shared; nothing writes to them again.

    A page that nobody holds any longer stays known until its room is needed, longest unused first.
    """

    def __init__(self, pages: int) -> None:
        self.total = pages - 1  # without the scratch page
        self._free = [page for page in range(pages - 1, -1, -1) if page != SCRATCH]
        self._holders = [0] * pages
        self._known: dict[_Key, int] = {}
        self._key_of: dict[int, _Key] = {}
        self._content = [0] * pages  # numbers of known contents, none of which comes twice: a page may get another one
        self._contents = 0
        self._unused: collections.OrderedDict[int, None] = collections.OrderedDict()
        self.queries = self.hits = 0
        """Tokens of prompts that were looked for, and found."""

    @property
    def available(self) -> int:
        """Pages that nobody holds."""
        return len(self._free) + len(self._unused)

    @property
    def usage(self) -> float:
        """Share of the pages that somebody holds."""
        return 1 - self.available / self.total

    def allocate(self, count: int) -> list[int] | None:
        """Takes pages; None, and takes nothing, if there aren't so many."""
        if count > self.available:
            return None
        return [self._take() for _ in range(count)]

    def _take(self) -> int:
        if not self._free:
            page, _ = self._unused.popitem(last=False)
            self._forget(page)
            self._free.append(page)
        page = self._free.pop()
        self._holders[page] = 1
        return page

    def match(self, tokens: Sequence[int]) -> list[int]:
        """Takes the known pages that a prompt begins with. Its last token is never in them: its logits are wanted."""
        found: list[int] = []
        before = 0
        for start in range(0, len(tokens) - PAGE, PAGE):
            page = self._known.get((before, tuple(tokens[start : start + PAGE])))
            if page is None:
                break
            found.append(page)
            before = self._content[page]
        for page in found:
            self._holders[page] += 1
            self._unused.pop(page, None)
        return found

    def count(self, tokens: int, found: int) -> None:
        """Counts a prompt of so many tokens, of which so many were found."""
        self.queries, self.hits = self.queries + tokens, self.hits + found

    def publish(self, tokens: Sequence[int], pages: Sequence[int]) -> None:
        """Makes the full pages of a sequence known, whose first tokens these are."""
        before = 0
        for i in range(len(tokens) // PAGE):
            key, page = (before, tuple(tokens[i * PAGE : (i + 1) * PAGE])), pages[i]
            if key not in self._known:
                self._forget(page)
                self._contents += 1
                self._known[key], self._key_of[page], self._content[page] = page, key, self._contents
            before = self._content[self._known[key]]

    def release(self, pages: Sequence[int], *, forget: bool = False) -> None:
        """Gives pages back; with `forget`, what they hold is not to be found again."""
        for page in reversed(pages):  # the end of a prompt goes before its beginning
            self._holders[page] -= 1
            assert self._holders[page] >= 0, f"page {page} was given back twice"
            if forget:
                self._forget(page)
            if not self._holders[page]:
                if page in self._key_of:
                    self._unused[page] = None
                else:
                    self._unused.pop(page, None)
                    self._free.append(page)

    def forget(self) -> None:
        """Makes nothing known any longer: the pages hold what other weights made of their tokens."""
        for page in list(self._key_of):
            self._forget(page)
        self._free += self._unused
        self._unused.clear()

    def _forget(self, page: int) -> None:
        key = self._key_of.pop(page, None)
        if key is not None:
            del self._known[key]
