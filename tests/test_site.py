"""The documentation's site has every page, and links lead somewhere."""

import re
from pathlib import Path

from scripts import pictures

ROOT = Path(__file__).parents[1]


def test_the_navigation_has_every_page():
    _, nav = (ROOT / "mkdocs.yml").read_text().split("\nnav:\n")
    listed = re.findall(r"^ +- (\S+\.md)$", nav, re.MULTILINE)
    pages = [str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")]
    assert sorted(listed) == sorted(pages), "mkdocs.yml lists the pages under nav"


def test_links_lead_somewhere():
    for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text()):
            assert (path.parent / target).exists(), f"{path}: {target}"


def test_pictures_are_drawn_from_the_reports(tmp_path):
    rows = pictures.kernel_rows((pictures.RESULTS / "kernels-h100.md").read_text())
    assert all(0 < rows[case, pictures.DEFAULT] < 110 for case in pictures.CASES)
    pictures.draw(tmp_path)
    assert (tmp_path / "kernels.png").stat().st_size > 10_000
    readme = (ROOT / "README.md").read_text()
    for path in tmp_path.iterdir():
        assert f"docs/pictures/{path.name}" in readme
        assert (pictures.PICTURES / path.name).exists()
