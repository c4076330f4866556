"""TPU generations that tests compile kernels for: one by default, all with the slow tests."""

import pytest

from pallas_kernels.ahead_of_time import TPUS

GENERATIONS = [pytest.param(name, marks=[pytest.mark.slow] if name != "v5p" else []) for name in TPUS]
