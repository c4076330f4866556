"""Decides whether a step verifies drafts: whether they pay is measured, from the steps themselves.

A step with drafts takes longer than one without, and gives each text 1 token and those drafts that are accepted. It
pays if the time per token is less. The tokens are the same either way.
"""

from __future__ import annotations

import collections
import statistics

TRIES = 8
"""Steps of each kind with which a size begins; a few of them are timed."""
PERIOD, PROBES = 128, 2
"""So many of so many steps are of the kind that doesn't pay, so that what is known of it stays true."""
PRIOR, PRIOR_WEIGHT, MEMORY = 0.85, 16, 64
"""Acceptance of a draft to begin with, as in section 5.4.3 of the report, and how many verifications it counts as; and
over how many the mean is taken."""

Sizes = tuple[int, int]
"""Texts and pages per text that a step is compiled for."""


class Speculation:
    """What is known of steps with and without drafts.

    Args:
      drafts: how many tokens a step with drafts verifies per text; 0 for an engine without.
      up_to: texts up to which all steps have drafts, and beyond which none; None to measure.
    """

    def __init__(self, drafts: int, up_to: int | None = None) -> None:
        self.drafts, self.up_to = drafts, up_to
        self._accepted, self._weight = PRIOR * drafts, PRIOR_WEIGHT
        self._steps: collections.Counter[Sizes] = collections.Counter()
        self._seconds: dict[tuple[Sizes, int], collections.deque[float]] = {}
        self._pays: dict[int, bool] = {}

    def choose(self, sizes: Sizes, texts: int, drafting: int) -> int:
        """How many drafts the next step has, of so many texts, of which `drafting` can accept them."""
        if not self.drafts or not drafting:
            return 0
        if self.up_to is not None:
            return self.drafts if texts <= self.up_to else 0
        step = self._steps[sizes]
        self._steps[sizes] += 1
        if step < 2 * TRIES:
            wanted = step < TRIES
        else:
            wanted = self._pays[sizes[0]] = self._shortens(sizes, drafting / texts)
            if step % PERIOD < PROBES:
                wanted = not wanted
        return self.drafts if wanted else 0

    def _shortens(self, sizes: Sizes, drafting: float) -> bool:
        """Whether drafts shorten the time per token; False if it isn't known, as where prompts come all the time."""
        plain, drafted = self._seconds.get((sizes, 0)), self._seconds.get((sizes, self.drafts))
        if plain is None or drafted is None:
            return False
        return statistics.median(drafted) < statistics.median(plain) * (1 + self._accepted * drafting)

    def took(self, sizes: Sizes, drafts: int, seconds: float) -> None:
        """Notes the time of a step."""
        self._seconds.setdefault((sizes, drafts), collections.deque(maxlen=9)).append(seconds)

    def verified(self, accepted: int) -> None:
        """Notes how many drafts of a text were accepted."""
        self._weight = min(self._weight + 1, MEMORY)
        self._accepted += (accepted - self._accepted) / self._weight

    @property
    def pays_up_to(self) -> int | None:
        """The number of texts up to which drafts are used, as far as steps have had so many; None if none was seen."""
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
