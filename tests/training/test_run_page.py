"""`report`: the page about runs that were written by hand, and what is said of a directory that is none."""

import html.parser
import json

import pytest

from dsv3_jax import cli
from dsv3_jax.training.directory import write_config
from dsv3_jax.training.metrics import read_metrics
from tests.parallel.small_run import small_config


def write_run(directory, scale, **options):
    directory.mkdir()
    config = small_config("", "single", **options)
    write_config(directory, config, None)
    lines = [{"step": s, "loss": scale / s, "grad_norm": 1.0, "load_violation/moe_layers": [0.1]} for s in (2, 4)]
    lines += [{"step": 4, "validation_loss": scale, "goodput": 0.5}, {"step": 4, "event": "rolled back & <on>"}]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines) + '{"step": 5, "lo')
    assert len(read_metrics(directory / "metrics.jsonl")) == len(lines)


class Page(html.parser.HTMLParser):
    """Rows of the tables, and what the page would load."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.sources, self.cell = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.sources += [value for name, value in attributes if name in ("src", "href")]
        if tag == "tr":
            self.rows.append([])
        self.cell = tag in ("td", "th")
        if self.cell:
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        self.cell = False

    def handle_data(self, data):
        if self.cell:
            self.rows[-1][-1] += data


def test_two_runs_on_a_page(tmp_path, capsys):
    write_run(tmp_path / "one", 8.0)
    write_run(tmp_path / "two", 6.0, hidden_size=32)
    out = tmp_path / "pages/both.html"
    cli.main(["report", str(tmp_path / "one"), str(tmp_path / "two"), "--out", str(out)])
    page = Page(out.read_text())
    assert (out.with_suffix(".png")).read_bytes().startswith(b"\x89PNG")
    assert len(page.sources) == 1
    assert page.sources[0].startswith("data:image/png")  # nothing from elsewhere
    for row in (
        ["", "one", "two"],
        ["steps", "4 of 8", "4 of 8"],
        ["tokens", "512", "512"],  # 4 steps of 8 sequences of 16
        ["loss", "2.0000", "1.5000"],
        ["validation loss", "8.0000", "6.0000"],
        ["goodput", "50.0%", "50.0%"],
        ["rollbacks", "1", "1"],
        ["two", "model.hidden_size: 32, there 16"],
        ["one", "4", "rolled back & <on>"],
    ):
        assert row in page.rows


def test_what_is_no_run_is_named(tmp_path, capsys):
    write_run(tmp_path / "run", 8.0)
    (tmp_path / "run/metrics.jsonl").write_text("")
    for arguments, named in (
        ([tmp_path], "holds no run"),
        ([tmp_path / "run"], "has no step yet"),
        ([tmp_path / "run", "--out", "page.pdf"], "must end with .html"),
        ([tmp_path / "run"] * 2, "named twice"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(["report", *map(str, arguments)])
        assert stop.value.code == 2
        assert named in capsys.readouterr().err
