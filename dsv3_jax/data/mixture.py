"""The source of each sequence in a mixture: exact shares at every point of a run, deterministically."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction


class Mixture:
    """Assigns sequences 0, 1, 2, ... to sources such that each is always within one sequence of its share.

    Tijdeman, "The chairman assignment problem" (Discrete Mathematics 32, 1980): with K sources, none is ever more than
    1 - 1 / (2K - 2) sequences from its share, even if shares change.

    Args:
      stages: (first sequence, weights of the sources), starting at sequence 0; weights needn't add up to 1.
    """

    def __init__(self, stages: Sequence[tuple[int, Sequence[Fraction]]]) -> None:
        shares = [[w / sum(weights) for w in weights] for _, weights in stages]
        # Integers over one denominator: exact, and fast.
        self._unit = math.lcm(*(share.denominator for stage in shares for share in stage))
        self._starts = [start for start, _ in stages]
        self._shares = [[int(share * self._unit) for share in stage] for stage in shares]
        self.sources = len(shares[0])
        self._before = [[0] * self.sources]  # what each source is due, in units, when a stage starts
        for i, start in enumerate(self._starts[1:]):
            gone = start - self._starts[i]
            self._before.append([b + gone * s for b, s in zip(self._before[i], self._shares[i], strict=True)])
        self._slack = max(2 * self.sources - 2, 1)

    def due(self, source: int, sequences: int) -> Fraction:
        """Returns the source's share of the first sequences."""
        return Fraction(self._due(source, sequences), self._unit)

    def next(self, sequence: int, taken: Sequence[int]) -> int:
        """Returns the source of the next sequence, given how many were taken from each."""
        if self.sources == 1:
            return 0
        best, deadline = -1, math.inf
        for source, count in enumerate(taken):
            least = self._unit * (count * self._slack + 1)
            if self._due(source, sequence + 1) * self._slack >= least:
                last = self._when(source, least + self._unit * (self._slack - 2))
                if last < deadline or best < 0:
                    best, deadline = source, last
        return best

    def _due(self, source: int, sequences: int) -> int:
        stage = len(self._starts) - 1
        while self._starts[stage] > sequences:
            stage -= 1
        return self._before[stage][source] + (sequences - self._starts[stage]) * self._shares[stage][source]

    def _when(self, source: int, scaled: int) -> float:
        """Number of sequences after which the source is due more than `scaled` / slack units; inf for never."""
        for stage in reversed(range(len(self._starts))):
            share = self._shares[stage][source]
            missing = scaled - self._before[stage][source] * self._slack
            if missing < 0 and stage:
                continue
            if share:
                when = self._starts[stage] + missing // (share * self._slack) + 1
                if stage + 1 == len(self._starts) or when <= self._starts[stage + 1]:
                    return when
            following = [s for s in range(stage + 1, len(self._starts)) if self._shares[s][source]]
            for later in following:
                missing = scaled - self._before[later][source] * self._slack
                return self._starts[later] + max(missing, 0) // (self._shares[later][source] * self._slack) + 1
            return math.inf
        return math.inf
