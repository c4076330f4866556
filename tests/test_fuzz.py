"""Some cases of the fuzzing whose parts have no test of their own elsewhere; `python -m tests.fuzz` runs many."""

import pytest

from tests.fuzz import fuzz


@pytest.mark.parametrize("name", ["orbax", "tokenizers", "datasets", "requests"])
def test_damaged_input_is_read_or_refused(name, tmp_path):
    assert fuzz(name, tmp_path / name, seed=1, most=15) == 15
