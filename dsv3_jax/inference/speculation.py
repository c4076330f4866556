"""Decides whether a step verifies drafts: whether they pay is measured, from the steps themselves.

A step with drafts takes longer than one without, and gives each text 1 token and those drafts that are accepted. It
pays if the time per token is less. The tokens are the same either way.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable

TRIES = 8
"""Steps of each kind with which a size begins; a few of them are timed."""
PERIOD, PROBES = 128, 2
"""So many of so many steps are of the kind that doesn't pay, so that what is known of it stays true."""
TIMES = 16
"""Latest times of a kind that are kept."""
PRIOR = 0.85
"""Acceptance of a draft to begin with, as in section 5.4.3 of the report."""

Sizes = tuple[int, int]
"""Texts and pages per text that a step is compiled for."""


class Acceptance:
    """Mean number of drafts accepted per verification, lately: it begins at `mean`, which counts as `weight` ones."""

    def __init__(self, mean: float, weight: int, memory: int) -> None:
        self.mean, self._weight, self._memory = mean, weight, memory

    def add(self, accepted: int) -> None:
        """Counts a verification."""
        self._weight = min(self._weight + 1, self._memory)
        self.mean += (accepted - self.mean) / self._weight


class Speculation:
    """What is known of steps with and without drafts, and of the drafts of all texts.

    Args:
      drafts: how many tokens a step with drafts verifies per text; 0 for an engine without.
      up_to: texts up to which all steps have drafts, and beyond which none; None to measure.
    """

    def __init__(self, drafts: int, up_to: int | None = None) -> None:
        self.drafts, self.up_to = drafts, up_to
        self.acceptance = Acceptance(PRIOR * drafts, weight=16, memory=512)
        self._steps: collections.Counter[Sizes] = collections.Counter()
        self._seconds: dict[tuple[Sizes, int], collections.deque[float]] = {}
        self._pays: dict[int, bool] = {}

    def of_text(self) -> Acceptance:
        """The acceptance of a new text, which begins as that of all."""
        return Acceptance(self.acceptance.mean, weight=8, memory=32)

    def choose(self, sizes: Sizes, texts: int, accepted: float) -> int:
        """How many drafts the next step has, of so many texts that are expected to accept so many in all."""
        if not self.drafts:
            return 0
        if self.up_to is not None:
            return self.drafts if texts <= self.up_to else 0
        step = self._steps[sizes]
        self._steps[sizes] += 1
        if step < 2 * TRIES:
            wanted = step < TRIES
        else:
            wanted = self._shortens(sizes, accepted / texts)
            self._pays[sizes[0]] = self._shortens(sizes, self.acceptance.mean)
            if step % PERIOD < PROBES:
                wanted = not wanted
        return self.drafts if wanted else 0

    def _shortens(self, sizes: Sizes, accepted: float) -> bool:
        """Whether drafts shorten the time per token; False if it isn't known, as where prompts come all the time."""
        plain, drafted = self._seconds.get((sizes, 0)), self._seconds.get((sizes, self.drafts))
        if plain is None or drafted is None:
            return False
        return _usual(drafted) < _usual(plain) * (1 + accepted)

    def took(self, sizes: Sizes, drafts: int, seconds: float) -> None:
        """Notes the time of a step."""
        self._seconds.setdefault((sizes, drafts), collections.deque(maxlen=TIMES)).append(seconds)

    @property
    def pays_up_to(self) -> int | None:
        """The number of texts up to which most have drafts, as far as steps have had so many; None if unknown."""
        if self.up_to is not None or not self.drafts:
            return self.up_to if self.drafts else 0
        found = None
        for batch, pays in sorted(self._pays.items()):
            if not pays:
                return found or 0
            found = batch
        return found

    def __str__(self) -> str:
        if not self.drafts:
            return "no drafts"
        if self.up_to is not None:
            return f"drafts: up to {self.up_to} texts"
        texts = self.pays_up_to
        return "drafts: by measurement" if texts is None else f"drafts: up to {texts} texts, measured"


def _usual(seconds: Iterable[float]) -> float:
    """The lower quartile: what else the machine does only makes steps longer."""
    ordered = sorted(seconds)
    return ordered[len(ordered) // 4]
