"""Page allocation on the host, with reference counts and prefix sharing."""

from __future__ import annotations

import collections
from collections.abc import Sequence

from dsv3_jax.inference.paged_cache import SCRATCH
from dsv3_jax.model.auto import PAGE

_Key = tuple[int, tuple[int, ...]]
"""The number of the preceding content, and the tokens of the page, which together identify everything up to its end."""


class PageAllocator:
    """Pages with reference counts. Full pages of known tokens can be shared; they aren't written again.

    A page without holders stays known until it is needed, least recently used first.
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
        """Tokens of prompts that were looked up, and found."""

    @property
    def available(self) -> int:
        """Number of pages without holders."""
        return len(self._free) + len(self._unused)

    @property
    def usage(self) -> float:
        """Fraction of pages with holders."""
        return 1 - self.available / self.total

    def allocate(self, count: int) -> list[int] | None:
        """Allocates pages. Returns None, allocating nothing, if there aren't enough."""
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
        """Takes the known pages of a prompt's prefix, without its last token, whose logits are needed."""
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
        """Counts the tokens of a prompt, and how many were found."""
        self.queries, self.hits = self.queries + tokens, self.hits + found

    def publish(self, tokens: Sequence[int], pages: Sequence[int]) -> None:
        """Registers the full pages of a sequence that begins with these tokens."""
        before = 0
        for i in range(len(tokens) // PAGE):
            key, page = (before, tuple(tokens[i * PAGE : (i + 1) * PAGE])), pages[i]
            if key not in self._known:
                self._forget(page)
                self._contents += 1
                self._known[key], self._key_of[page], self._content[page] = page, key, self._contents
            before = self._content[self._known[key]]

    def release(self, pages: Sequence[int], *, forget: bool = False) -> list[int]:
        """Gives pages back; with `forget`, their content won't be found again. Returns those that are free."""
        free = []
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
                    free.append(page)
        return free

    def forget(self) -> None:
        """Forgets all content, since it was computed with other weights."""
        for page in list(self._key_of):
            self._forget(page)
        self._free += self._unused
        self._unused.clear()

    def _forget(self, page: int) -> None:
        key = self._key_of.pop(page, None)
        if key is not None:
            del self._known[key]
