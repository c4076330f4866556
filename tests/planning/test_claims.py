"""The arithmetic behind the article's claims, against the report's and other papers' printed numbers."""

import json

import pytest

from dsv3_jax.accounting.hardware import hardware
from dsv3_jax.config import ModelConfig
from dsv3_jax.planning.attention_designs import PUBLISHED, mla, mla_expanded, same_shape
from dsv3_jax.planning.cost import cost, sustained_flops, tokens_for, training_hours

V3 = ModelConfig.preset("v3-671b")


def test_cache_of_published_models():
    """arXiv 2505.09343, table 1 prints 70.272, 327.680 and 516.096 KB."""
    llama, qwen = PUBLISHED
    assert mla(V3).bytes_per_token == 70_272
    assert qwen.bytes_per_token == 327_680
    assert llama.bytes_per_token == 516_096


def test_bytes_fall_and_flops_rise():
    latent, gqa = mla(V3), same_shape(V3, 8)
    assert gqa.bytes_per_token / latent.bytes_per_token == pytest.approx(3.556, abs=1e-3)
    assert latent.flops_per_position / gqa.flops_per_position == pytest.approx(4.25)
    assert mla_expanded(V3).bytes_per_token == 4_997_120
    assert same_shape(V3, 27).bytes_per_token / latent.bytes_per_token == pytest.approx(12.0)


def test_where_the_trade_is_good():
    """On an H800 MLA stays just below the ridge, so that its FLOPs are free; two tokens at once are not."""
    h800, latent, gqa = hardware("h800"), mla(V3), same_shape(V3, 8)
    assert latent.intensity < h800.peak("bf16") / h800.bandwidth
    gain = gqa.seconds_per_position(h800) / latent.seconds_per_position(h800)
    assert gain == pytest.approx(gqa.bytes_per_token / latent.bytes_per_token)
    assert gqa.seconds_per_position(h800, 2) / latent.seconds_per_position(h800, 2) < gain


def test_money_and_days():
    total = cost(2.788e6, 2048, 2.0, 700)
    assert total.dollars == pytest.approx(5.576e6)
    assert total.days == pytest.approx(56.7, abs=0.05)
    assert cost(2.664e6, 2048, 2.0, None).days == pytest.approx(54.2, abs=0.05)


def test_rates_and_hours_are_inverse():
    rate = sustained_flops(14.8e12, 250e9, 2.664e6)
    assert training_hours(14.8e12, 250e9, 989e12, rate / 989e12) == pytest.approx(2.664e6)
    assert tokens_for(2 * 2.664e6, 2.0, 250e9, rate) == pytest.approx(14.8e12)


def test_every_claim_has_its_verdict(tmp_path, capsys):
    from experiments import article_claims

    article_claims.main(tmp_path)
    record = json.loads((tmp_path / "claims.json").read_text())
    verdicts = {c["says"]: c["verdict"] for c in record["claims"]}
    assert [v for k, v in verdicts.items() if "12x" in k or "Reinforcement" in k] == [article_claims.FAILS] * 3
    assert verdicts["In 55 days"] == verdicts["Pre-training cost $5.32M"] == article_claims.CONDITION
    assert verdicts["Context extension cost $238K"] == article_claims.HOLDS
    assert record["numbers"]["dollars"] == pytest.approx(5.576e6)
    page = (tmp_path / "report.html").read_text()
    assert all(c["figure"] is None or f'id="{c["figure"]}"' in page for c in record["claims"])
    assert "http" not in page.replace("https://docs", "")  # opens offline
