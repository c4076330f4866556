"""Is the article right? Every number of "The DeepSeek Disruption" derived again, with a verdict and figures.

    python -m experiments.article_claims

Writes report.html (self-contained, opens offline), figures as PNG, and claims.json. Inputs are the model's own
parameters, hardware sheets, and the hours that the technical report prints; nothing is fitted. MLA's accuracy is that
of the committed result of `experiments.attention_variants`.
"""

from __future__ import annotations

import base64
import dataclasses
import datetime
import html
import json
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib
import tyro

from dsv3_jax.accounting.flops import model_flops
from dsv3_jax.accounting.hardware import HARDWARE, hardware
from dsv3_jax.accounting.parameters import count_parameters
from dsv3_jax.config import ModelConfig
from dsv3_jax.planning.attention_designs import PUBLISHED, mla, mla_expanded, same_shape
from dsv3_jax.planning.cost import cost, sustained_flops, tokens_for, training_hours
from dsv3_jax.planning.published import report_plan
from dsv3_jax.planning.step_time import step_time
from experiments import attention_variants
from experiments.small_run import RESULTS

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HOURS = {"pre-training": 2.664e6, "context extension": 0.119e6, "post-training": 0.005e6}
"""H800-hours of each phase (arXiv 2412.19437, table 1)."""
TOKENS, DEVICES, PRICE = 14.8e12, 2048, 2.0
V3 = ModelConfig.preset("v3-671b")
H800 = hardware("h800")

HOLDS, CONDITION, FAILS = "holds", "holds with a condition", "doesn't hold"
COLORS = ("#1f6f8b", "#c8553d", "#6a8d3f", "#8c6bb1", "#b58900", "#5c5c5c")


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim of the article, what follows from first principles, and the figure that shows it."""

    says: str
    verdict: str
    finding: str
    derivation: str
    figure: str | None = None


# The numbers -----------------------------------------------------------------------------------------------


def numbers() -> dict[str, float]:
    """Everything that the verdicts rest on."""
    counted = count_parameters(V3)
    hours = sum(HOURS.values())
    flops, flops_mtp = model_flops(V3, 4096, mtp=False).total, model_flops(V3, 4096).total
    rate, rate_mtp = (sustained_flops(TOKENS, f, HOURS["pre-training"]) for f in (flops, flops_mtp))
    latent, gqa, mha = mla(V3), same_shape(V3, 8), same_shape(V3, 128)
    llama, qwen = PUBLISHED
    planned = step_time(report_plan())
    return {
        "parameters": counted.total,
        "activated": counted.activated,
        "activated_share": counted.activated / counted.total,
        "hours": hours,
        **{f"dollars {k}": v * PRICE for k, v in HOURS.items()},
        "dollars": hours * PRICE,
        "days_pretraining": cost(HOURS["pre-training"], DEVICES, None, None).days,
        "days": cost(hours, DEVICES, None, None).days,
        "days_rounded": 3.7 * TOKENS / 1e12,
        "flops_per_token": flops,
        "flops_per_token_with_mtp": flops_mtp,
        "sustained": rate,
        "mfu_bf16": rate / H800.peak("bf16"),
        "mfu_fp8": rate / H800.peak("fp8"),
        "sustained_with_mtp": rate_mtp,
        "mfu_bf16_with_mtp": rate_mtp / H800.peak("bf16"),
        "planned_days": TOKENS / planned.tokens_per_device_second / DEVICES / 86400,
        "megawatt_hours": cost(hours, DEVICES, None, H800.watts).megawatt_hours or 0.0,
        "cache_mla": latent.bytes_per_token,
        "bytes_gqa8": gqa.bytes_per_token / latent.bytes_per_token,
        "bytes_mha": mha.bytes_per_token / latent.bytes_per_token,
        "bytes_expanded": mla_expanded(V3).bytes_per_token / latent.bytes_per_token,
        "bytes_qwen": qwen.bytes_per_token / latent.bytes_per_token,
        "bytes_llama": llama.bytes_per_token / latent.bytes_per_token,
        "groups_for_12": 12 * latent.bytes_per_token / same_shape(V3, 1).bytes_per_token,
        "flops_up": latent.flops_per_position / gqa.flops_per_position,
        "intensity_mla": latent.intensity,
        "intensity_gqa8": gqa.intensity,
        "ridge_h800": H800.peak("bf16") / H800.bandwidth,
    }


def claims(n: dict[str, float]) -> list[Claim]:
    """The article's claims with their verdicts."""
    return [
        Claim(
            "671B parameters, of which 37B are activated for a token",
            HOLDS,
            f"{n['parameters']:,.0f} and {n['activated']:,.0f}, embedding included ({n['activated_share']:.1%}).",
            "Counted on the model's abstract parameters. Activated: everything but the routed experts, of which "
            "8 of 256. The module for multi-token prediction adds 11,610,068,224 that inference can drop.",
        ),
        Claim(
            "Trained on 2,048 H800",
            HOLDS,
            "The report says so (section 3.1), and hours and days agree with it.",
            f"2,664K hours / 2,048 / 24 = {n['days_pretraining']:.1f} days; the report says less than two months.",
        ),
        Claim(
            "In 55 days",
            CONDITION,
            f"Pre-training alone: {n['days_pretraining']:.1f} days unrounded, {n['days_rounded']:.1f} from the "
            f"report's rounded 3.7 days a trillion tokens. The whole run: {n['days']:.1f} days.",
            f"2,664K / (2,048 x 24) = {n['days_pretraining']:.1f}; 2,788K / (2,048 x 24) = {n['days']:.1f}; "
            f"3.7 x 14.8 = {n['days_rounded']:.1f}. Our planner, from parameters and hardware sheet alone: "
            f"{n['planned_days']:.1f} days.",
            "days",
        ),
        Claim(
            "Pre-training cost $5.32M",
            CONDITION,
            f"${n['dollars pre-training'] / 1e6:.3f}M: cut off rather than rounded, and only at $2 an hour.",
            "2,664K H800-hours x $2. The price is the report's assumption of a rent, not a bill.",
            "phases",
        ),
        Claim(
            "Context extension cost $238K",
            HOLDS,
            f"${n['dollars context extension']:,.0f}.",
            "119K H800-hours x $2.",
            "phases",
        ),
        Claim(
            "Reinforcement learning cost $10K a phase",
            FAILS,
            "$10,000 is all of post-training, fine-tuning and reinforcement learning together, not a phase of it.",
            "5K H800-hours x $2; the report has no finer split.",
            "phases",
        ),
        Claim(
            "$5.58M in total",
            CONDITION,
            f"${n['dollars'] / 1e6:.3f}M for the final run at $2 an hour. Research, ablations, failed runs, data and "
            "people aren't in it, as the report itself says.",
            f"$5.328M + $0.238M + $0.010M. It implies {n['sustained'] / 1e12:.0f} TFLOP/s sustained a device, "
            f"{n['mfu_bf16']:.1%} of the bfloat16 peak ({n['mfu_fp8']:.1%} of FP8's): 14.8T tokens x "
            f"{n['flops_per_token'] / 1e9:.1f} GFLOP / (2,664K h x 3,600 s). Counting the MTP module: "
            f"{n['sustained_with_mtp'] / 1e12:.0f} TFLOP/s, {n['mfu_bf16_with_mtp']:.1%}.",
            "price",
        ),
        Claim(
            "MLA needs 12x less bandwidth than GQA",
            FAILS,
            f"{n['bytes_gqa8']:.2f}x less than 8 groups in the same shape, {n['bytes_qwen']:.2f}x less than Qwen2.5 "
            f"72B, {n['bytes_llama']:.2f}x less than LLaMA-3.1 405B. Twelve would be GQA with "
            f"{n['groups_for_12']:.0f} groups.",
            f"Cache bytes per token: (512 + 64) x 61 layers x 2 bytes = {n['cache_mla']:,.0f}, against "
            f"2 x 8 x 128 x 61 x 2 = {same_shape(V3, 8).bytes_per_token:,.0f}. Against multi-head attention it is "
            f"{n['bytes_mha']:.1f}x. All of it where one device holds a sequence: over several, GQA's cache splits by "
            "group, while every device needs the whole latent.",
            "cache",
        ),
        Claim(
            "MLA needs 12x fewer FLOPs than GQA",
            FAILS,
            f"It needs {n['flops_up']:.2f}x more in decoding: bytes are bought with FLOPs.",
            "Absorbed: 2 x (576 + 512) = 2,176 FLOPs a head and cached token; 128-wide GQA: 2 x (128 + 128) = 512. "
            f"A good trade where memory limits: MLA does {n['intensity_mla']:.0f} FLOPs a byte of cache, below an "
            f"H800's {n['ridge_h800']:.0f}, so the extra FLOPs take no time there; GQA with 8 groups does "
            f"{n['intensity_gqa8']:.0f}.",
            "decode",
        ),
        accuracy(),
    ]


def accuracy() -> Claim:
    """MLA's claim to lose no accuracy, from the committed result of `experiments.attention_variants`."""
    results = json.loads((RESULTS / f"{attention_variants.NAME}.json").read_text())
    size = f"{results['parameters']['MLA'] / 1e6:.2f}M parameters and {results['tokens'] / 1e6:.2f}M tokens"
    return Claim(
        "MLA sacrifices no accuracy",
        CONDITION,
        f"At {size}: {attention_variants.verdict(results)}",
        "Models that differ in their attention alone, of equal parameters, on the same tokens "
        "(docs/results/attention-variants.md). At 16B and 250B parameters the DeepSeek-V2 report (arXiv 2405.04434, "
        "table 9) has MLA ahead of MHA, which nothing here can confirm.",
    )


# Figures ---------------------------------------------------------------------------------------------------


def figure_phases(wide: bool) -> plt.Figure:
    fig, ax = plt.subplots(layout="constrained", figsize=(8, 2.6) if wide else (4, 3))
    names, values = list(HOURS), [h * PRICE / 1e6 for h in HOURS.values()]
    bars = ax.barh(names[::-1], values[::-1], color=COLORS[0])
    ax.bar_label(bars, [f"${v:.3f}M" for v in values[::-1]], padding=4)
    ax.set_xlim(0, 6.6 if wide else 8)
    ax.set_xlabel("million dollars at $2 an H800-hour")
    ax.set_title(f"Training cost by phase: ${sum(values):.3f}M")
    return fig


def figure_days(wide: bool) -> plt.Figure:
    n = numbers()
    fig, ax = plt.subplots(layout="constrained", figsize=(8, 2.8) if wide else (4, 3.2))
    names = ["the article", "3.7 d x 14.8T", "pre-training, unrounded", "whole run", "our planner, pre-training"]
    values = [55, n["days_rounded"], n["days_pretraining"], n["days"], n["planned_days"]]
    bars = ax.barh(names[::-1], values[::-1], color=[COLORS[2], COLORS[0], COLORS[0], COLORS[0], COLORS[1]])
    ax.bar_label(bars, [f"{v:.1f}" for v in values[::-1]], padding=4)
    ax.set_xlim(0, 70)
    ax.set_xlabel("days on 2,048 H800")
    ax.set_title("How many days")
    return fig


def figure_cache(wide: bool) -> plt.Figure:
    designs = [mla(V3), same_shape(V3, 1), same_shape(V3, 8), *PUBLISHED[::-1], same_shape(V3, 128), mla_expanded(V3)]
    fig, ax = plt.subplots(layout="constrained", figsize=(8, 3.6) if wide else (4, 4.2))
    values = [d.bytes_per_token / 1e3 for d in designs]
    names = [d.name if wide else d.name.replace(", ", ",\n").replace(" (", "\n(") for d in designs]
    bars = ax.barh(
        names[::-1], values[::-1], color=[COLORS[1] if d is designs[0] else COLORS[0] for d in designs][::-1]
    )
    ax.bar_label(bars, [f"{v:,.0f} KB  {v / values[0]:.2f}x" for v in values[::-1]], padding=4, fontsize=8)
    ax.set_xscale("log")
    ax.set_xlim(10, 1e5 if wide else 5e5)
    ax.set_xlabel("KB of bfloat16 cache a token, all layers")
    ax.set_title("Cache of a token; MLA is 1x")
    return fig


def figure_decode(wide: bool) -> plt.Figure:
    contexts = [2**k for k in range(9, 18)]
    fig, axes = plt.subplots(*((1, 2) if wide else (2, 1)), layout="constrained", figsize=(8, 3.6) if wide else (4, 6))
    for design, color in zip((mla(V3), same_shape(V3, 8), same_shape(V3, 128)), COLORS, strict=False):
        label = design.name.replace(", same shape", "")
        axes[0].plot(contexts, [c * design.bytes_per_token / 1e9 for c in contexts], color=color, label=label)
        axes[1].plot(contexts, [c * design.flops_per_position / 1e9 for c in contexts], color=color, label=label)
    axes[1].lines[2].set_linestyle("--")  # MHA's FLOPs are GQA's
    for ax, unit, title in zip(axes, ("GB read", "GFLOP"), ("Bytes fall", "FLOPs rise"), strict=True):
        ax.set(xscale="log", yscale="log", xlabel="cached tokens", ylabel=f"{unit} a decoded token", title=title)
        ax.set_xticks([512, 4096, 32768, 131072], ["512", "4K", "32K", "128K"])
        ax.minorticks_off()
        ax.legend(fontsize=8, frameon=False)
    return fig


def figure_trade(wide: bool) -> plt.Figure:
    """How much faster MLA's attention is than same-shape GQA-8, by hardware and tokens decoded at once."""
    latent, gqa = mla(V3), same_shape(V3, 8)
    fig, ax = plt.subplots(layout="constrained", figsize=(8, 3.4) if wide else (4, 3.8))
    sheets = list(HARDWARE.values())
    for i, queries in enumerate((1, 2, 4)):
        gains = [gqa.seconds_per_position(s, queries) / latent.seconds_per_position(s, queries) for s in sheets]
        places = [k + (i - 1) * 0.27 for k in range(len(sheets))]
        label = f"{queries} token{'s' if queries > 1 else ''} at once"
        bars = ax.bar(places, gains, 0.26, color=COLORS[i], label=label)
        if wide:
            ax.bar_label(bars, [f"{g:.1f}" for g in gains], fontsize=7)
    ax.axhline(1, color="black", linewidth=0.8)
    ax.axhline(12, color=COLORS[5], linestyle=":", linewidth=1)
    ax.text(len(sheets) - 0.5, 11.4, "the article's 12x", ha="right", va="top", fontsize=8)
    ax.set_xticks(range(len(sheets)), [s.name for s in sheets], rotation=0 if wide else 60)
    ax.set_ylabel("times faster than GQA-8")
    ax.set_title("What the trade gains in decoding (roofline)")
    ax.legend(fontsize=8, frameon=False, loc="center right", bbox_to_anchor=(1, 0.62))
    return fig


def figure_price(wide: bool) -> plt.Figure:
    n = numbers()
    fig, ax = plt.subplots(layout="constrained", figsize=(8, 3.8) if wide else (4, 4))
    shares = [k / 100 for k in range(10, 71)]
    for price, color in zip((1, 2, 4, 8), COLORS, strict=False):
        hours = [training_hours(TOKENS, n["flops_per_token"], H800.peak("bf16"), s) for s in shares]
        ax.plot([100 * s for s in shares], [h * price / 1e6 for h in hours], color=color, label=f"${price} an hour")
    ax.plot(100 * n["mfu_bf16"], n["dollars pre-training"] / 1e6, "o", color="black", markersize=7)
    ax.annotate(
        f"the article: \\$5.32M, so {n['mfu_bf16']:.1%} at \\$2",
        (100 * n["mfu_bf16"], n["dollars pre-training"] / 1e6),
        xytext=(6, 7),
        textcoords="offset points",
        fontsize=8,
    )
    ax.set(yscale="log", xlabel="MFU, % of an H800's bfloat16 peak", ylabel="million dollars")
    ax.set_yticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"])
    ax.minorticks_off()
    ax.set_title("Cost of 14.8T tokens")
    ax.legend(fontsize=8, frameon=False)
    return fig


def figure_budget(wide: bool) -> plt.Figure:
    """Tokens that a sum trains, at the MFU that V3's run implies and $2 an hour."""
    n = numbers()
    fig, ax = plt.subplots(layout="constrained", figsize=(8, 3.8) if wide else (4, 4))
    sums = [1e4 * 10 ** (k / 10) for k in range(0, 32)]
    presets = ("v2-lite-16b", "v2-236b", "v3-671b")
    for preset, color, down in zip(presets, COLORS[2::-1], (-4, 6, -12), strict=True):
        flops = model_flops(ModelConfig.preset(preset), 4096, mtp=False).total
        tokens = [tokens_for(s, PRICE, flops, n["sustained"]) for s in sums]
        ax.plot([s / 1e6 for s in sums], [t / 1e12 for t in tokens], color=color, label=preset)
        for dollars in (1e6, 10e6):
            many = tokens_for(dollars, PRICE, flops, n["sustained"]) / 1e12
            ax.plot(dollars / 1e6, many, "o", color=color, markersize=5)
            side = dict(xytext=(-6 if down == 6 else 6, down), ha="right" if down == 6 else "left")
            ax.annotate(f"{many:.3g}T", (dollars / 1e6, many), textcoords="offset points", fontsize=8, **side)
    ax.set_xlim(0.008, 40)
    ax.axhline(14.8, color=COLORS[5], linestyle=":", linewidth=1)
    ax.text(0.011, 16.5, "14.8T, as V3", fontsize=8)
    ax.set(xscale="log", yscale="log", xlabel="million dollars", ylabel="trillion tokens")
    ax.set_xticks([0.01, 0.1, 1, 10], ["0.01", "0.1", "1", "10"])
    ax.set_yticks([0.1, 1, 10, 100], ["0.1", "1", "10", "100"])
    ax.minorticks_off()
    ax.set_title(f"What a sum trains: $2 an hour, {n['mfu_bf16']:.0%} of bfloat16 peak")
    ax.legend(fontsize=8, frameon=False)
    return fig


FIGURES: dict[str, tuple[Callable[[bool], plt.Figure], str]] = {
    "phases": (figure_phases, "Hours from the report's table 1, at its $2."),
    "days": (figure_days, "The planner predicts pre-training from parameters, layout and hardware sheet alone."),
    "cache": (figure_cache, "Same shape: V3's 61 layers and 128 heads, 128 wide."),
    "decode": (
        figure_decode,
        "One decoded token, all layers. Grouping changes bytes, not FLOPs: two lines on the right coincide.",
    ),
    "trade": (
        figure_trade,
        "A whole sequence on one device. Over several, GQA's cache splits by group; MLA's latent is copied to each.",
    ),
    "price": (figure_price, "MFU counts model FLOPs without recomputation and without the MTP module."),
    "budget": (figure_budget, "Training compute alone; a smaller model isn't as good after as many tokens."),
}


# The report ------------------------------------------------------------------------------------------------

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 60rem; padding: 1rem; color: #222; background: #fdfdfb;
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
table { border-collapse: collapse; width: 100%; } td, th { text-align: left; padding: .5rem; vertical-align: top; }
tr + tr { border-top: 1px solid #ddd; }
.verdict { font-weight: 600; border-radius: .3rem; padding: .1rem .5rem; white-space: nowrap; color: #fff; }
.holds { background: #3d7a3d; } .condition { background: #9a6a00; } .fails { background: #b03a2e; }
.how { color: #555; font-size: .9rem; overflow-wrap: anywhere; }
figure { margin: 2rem 0; } img { width: 100%; height: auto; display: block; }
figcaption { color: #555; font-size: .9rem; }
@media (max-width: 40rem) {
  table, tbody, tr, td { display: block; } thead { display: none; }
  tr { padding: .8rem 0; } td { padding: .15rem 0; } td:first-child { font-weight: 600; }
}
"""


def render(found: list[Claim], images: dict[str, tuple[bytes, bytes]], n: dict[str, float], command: str) -> str:
    """The report as one HTML page. images: each figure for wide and for narrow screens."""
    kind = {HOLDS: "holds", CONDITION: "condition", FAILS: "fails"}
    rows = "".join(
        f"<tr><td>{html.escape(c.says)}</td>"
        f'<td><span class="verdict {kind[c.verdict]}">{html.escape(c.verdict)}</span></td>'
        f'<td>{html.escape(c.finding)}<div class="how">{html.escape(c.derivation)}</div></td></tr>'
        for c in found
    )
    data = lambda png: "data:image/png;base64," + base64.b64encode(png).decode()
    figures = "".join(
        f'<figure id="{name}"><picture><source media="(max-width: 40rem)" srcset="{data(images[name][1])}">'
        f'<img src="{data(images[name][0])}" alt="{html.escape(note)}"></picture>'
        f"<figcaption>{html.escape(note)}</figcaption></figure>"
        for name, (_, note) in FIGURES.items()
    )
    many = {v: sum(c.verdict == v for c in found) for v in kind}
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>The DeepSeek Disruption, checked</title><style>{_STYLE}</style></head><body>
<h1>"The DeepSeek Disruption", checked</h1>
<p>{len(found)} claims: {many[HOLDS]} hold, {many[CONDITION]} hold with a condition, {many[FAILS]} don't. The numbers
come from the model's own parameters, from hardware sheets, and from the hours that the technical report prints.</p>
<table><thead><tr><th>The article</th><th>Verdict</th><th>What follows</th></tr></thead><tbody>{rows}</tbody></table>
<h2>Figures</h2>{figures}
<h2>The rate behind the price</h2>
<p>FLOP/s sustained = tokens x FLOPs per token / (device-hours x 3,600). With 6 FLOPs for each weight that multiplies a
token and causal attention over 4,096 tokens, a token takes {n["flops_per_token"] / 1e9:.1f} GFLOP, so that
2,664K H800-hours mean {n["sustained"] / 1e12:.1f} TFLOP/s a device. MFU = that / 989 TFLOP/s =
{n["mfu_bf16"]:.1%}; against the FP8 peak, in which most of the products ran, {n["mfu_fp8"]:.1%}. The devices' printed
power alone comes to {n["megawatt_hours"]:,.0f} MWh, without hosts, network and cooling.</p>
<p class="how">Made on {datetime.date.today().isoformat()} by <code>{html.escape(command)}</code>.
Sources: arXiv 2412.19437 (technical report), arXiv 2505.09343 (hardware and cache), config.json of LLaMA-3.1 405B and
Qwen2.5 72B, {html.escape("; ".join(H800.sources))}.</p>
</body></html>
"""


def draw(name: str, wide: bool) -> bytes:
    """One figure as PNG."""
    import io

    figure = FIGURES[name][0](wide)
    for ax in figure.axes:
        ax.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=170, bbox_inches="tight")
    plt.close(figure)
    return buffer.getvalue()


def main(out: Path = Path("runs/article_claims")) -> None:
    """Writes the report.

    Args:
      out: folder of the report, its figures and its numbers.
    """
    out.mkdir(parents=True, exist_ok=True)
    n = numbers()
    found = claims(n)
    images = {name: (draw(name, True), draw(name, False)) for name in FIGURES}
    for name, (wide, _) in images.items():
        (out / f"{name}.png").write_bytes(wide)
    command = " ".join(["python -m experiments.article_claims", *sys.argv[1:]])
    (out / "report.html").write_text(render(found, images, n, command))
    record = {"claims": [dataclasses.asdict(c) for c in found], "numbers": n}
    (out / "claims.json").write_text(json.dumps(record, indent=2))
    for claim in found:
        print(f"{claim.verdict:>22}  {claim.says}: {claim.finding}")
    print(f"report: {out / 'report.html'}")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
