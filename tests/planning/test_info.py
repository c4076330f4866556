"""Parameter counts against the released checkpoints' own, and what `info` prints."""

import json

import pytest

from dsv3_jax.accounting.parameters import cache_bytes_per_token, count_parameters
from dsv3_jax.cli import main
from dsv3_jax.config import ModelConfig


@pytest.mark.parametrize(
    ("preset", "total", "activated", "mtp", "cache"),
    [
        ("v3-671b", 671_026_419_200, 37_552_297_472, 11_610_068_224, 70_272),
        ("v2-236b", 235_741_434_880, 21_375_800_320, 0, 69_120),
        ("v2-lite-16b", 15_706_484_224, 2_661_150_208, 0, 31_104),
    ],
)
def test_counts_of_released_models(preset, total, activated, mtp, cache):
    counted = count_parameters(ModelConfig.preset(preset))
    assert (counted.total, counted.activated, counted.mtp_total) == (total, activated, mtp)
    assert cache_bytes_per_token(ModelConfig.preset(preset)) == cache


def test_the_checkpoint_of_v3_has_as_many_weights():
    """The released files hold embedding and head again beside the MTP module, and FP8 scales that aren't weights."""
    counted = count_parameters(ModelConfig.preset("v3-671b"))
    shared = 2 * 129280 * 7168
    fp8, bf16, biases = 680_571_043_840, 3_918_786_560, 59 * 256
    assert counted.total + counted.mtp_total + shared == fp8 + bf16 + biases


def test_rows_add_up():
    for preset in ("tiny", "v2-lite-16b", "v3-671b"):
        counted = count_parameters(ModelConfig.preset(preset))
        assert sum(r.total for r in counted.components) == counted.total
        assert sum(r.activated for r in counted.components) == counted.activated
        assert sum(r.total for r in counted.mtp_components) == counted.mtp_total


def test_info_prints_plain_numbers(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    main(["info", "--preset", "v3-671b"])
    out = capsys.readouterr().out
    for number in ("671,026,419,200", "37,552,297,472", "11,610,068,224", "70,272"):
        assert number in out


def test_info_json_of_a_config_file(capsys, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(ModelConfig.preset("v2-lite-16b").to_hf()))
    main(["info", "--config", str(path), "--json"])
    assert json.loads(capsys.readouterr().out)["total"] == 15_706_484_224


@pytest.mark.parametrize("arguments", [["--preset", "v4"], ["--config", "nowhere.json"]])
def test_info_refuses_in_one_line(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["info", *arguments])
    assert stopped.value.code == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert "\n" not in error
