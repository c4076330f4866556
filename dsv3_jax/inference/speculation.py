"""Decides whether a step verifies drafts: whether they pay is measured, from the steps themselves.

A step with drafts takes longer than one without, and gives each text 1 token and those drafts that are accepted. It
pays if the time per token is less. The tokens are the same either way.

Single steps can't be timed well, since the host notices late that one has ended, and then early that the next has. So
a few in a row are, of one kind and then of the other, which shows how much longer drafts take whatever else the machine
does.
"""

from __future__ import annotations

import collections
import statistics

RUN = 16
"""Steps in a row that are timed together."""
TRY = RUN + 2
"""Steps in a row that are taken for this: the first may be compiled, and the last overlaps with others."""
PERIOD = 512
"""So rarely it is tried again whether what doesn't pay still doesn't."""
RATIOS = 16
"""Latest comparisons that count."""
MARGIN = 1.05
"""Drafts must give so many times more tokens than they take time, since neither is known exactly."""
PRIOR = 0.85
"""Acceptance of a draft to begin with, as in section 5.4.3 of the report."""

Step = tuple[int, int, int]
"""Texts and pages per text that a step is compiled for, and its drafts."""


class Acceptance:
    """Mean number of drafts accepted per verification, lately: it begins at `mean`, which counts as `weight` ones."""

    def __init__(self, mean: float, weight: int, memory: int) -> None:
        self.mean, self._weight, self._memory = mean, weight, memory

    def add(self, accepted: int) -> None:
        """Counts a verification."""
        self._weight = min(self._weight + 1, self._memory)
        self.mean += (accepted - self.mean) / self._weight


class Speculation:
    """Chooses steps with or without drafts, by their times and by how many drafts texts accept.

    Args:
      drafts: how many tokens a step with drafts verifies per text; 0 for an engine without.
      up_to: texts up to which all steps have drafts, and beyond which none; None to measure.
    """

    def __init__(self, drafts: int, up_to: int | None = None) -> None:
        self.drafts, self.up_to = drafts, up_to
        self.acceptance = Acceptance(PRIOR * drafts, weight=16, memory=512)
        self._steps: collections.Counter[int] = collections.Counter()
        self._run: tuple[Step | None, list[float]] = None, []
        self._last: tuple[Step, float] | None = None
        self._ratios: dict[int, collections.deque[float]] = collections.defaultdict(
            lambda: collections.deque(maxlen=RATIOS)
        )

    def of_text(self) -> Acceptance:
        """The acceptance of a new text, which begins as that of all."""
        return Acceptance(self.acceptance.mean, weight=8, memory=32)

    def choose(self, batch: int, texts: int, accepted: float) -> int:
        """How many drafts the next step has.

        batch: texts that it is compiled for. texts: those that it has. accepted: drafts that these will accept, in all.
        """
        if not self.drafts:
            return 0
        if self.up_to is not None:
            return self.drafts if texts <= self.up_to else 0
        step = self._steps[batch]
        self._steps[batch] += 1
        wanted = step // TRY % 2 == 0 if step < 4 * TRY else self._pays(batch, accepted / texts)
        if step >= 4 * TRY and step % PERIOD < TRY:
            wanted = not wanted
        return self.drafts if wanted else 0

    def _pays(self, batch: int, accepted: float) -> bool:
        """Whether drafts shorten the time per token; False if it isn't known, as where prompts come all the time."""
        ratios = self._ratios.get(batch)
        return ratios is not None and MARGIN * statistics.median(ratios) < 1 + accepted

    def took(self, step: Step | None, seconds: float) -> None:
        """Notes the time of a step that followed the last one; None if something else came between them."""
        run, times = self._run
        if step is None or step != run:
            self._run = step, []
            return
        times.append(seconds)
        if len(times) == RUN:
            self._compare(step, statistics.mean(times))
            times.clear()

    def _compare(self, step: Step, seconds: float) -> None:
        """Compares a run with the one before, if it was like it but for the drafts."""
        before, self._last = self._last, (step, seconds)
        if before and before[0][:2] == step[:2] and before[0][2] != step[2]:
            self._ratios[step[0]].append(seconds / before[1] if step[2] else before[1] / seconds)

    @property
    def pays_up_to(self) -> int | None:
        """The number of texts up to which most have drafts, as far as steps have had so many; None if unknown."""
        if self.up_to is not None or not self.drafts:
            return self.up_to if self.drafts else 0
        found = None
        for batch in sorted(self._ratios):
            if not self._pays(batch, self.acceptance.mean):
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
