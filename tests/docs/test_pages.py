"""The documentation is complete and hangs together: every public name has its place, and no link leads nowhere."""

import inspect
import re
from pathlib import Path

import pytest

import jaxmerge as jm
from tests.public import public_names

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [page for page in DOCS.rglob("*.md") if "_build" not in page.parts]


def test_reference_has_every_public_name_once():
    text = "\n".join(page.read_text() for page in PAGES)
    listed = re.findall(r"^\.\. auto(?:function|class|exception|data):: (?:jaxmerge\.)?(\w+)$", text, re.MULTILINE)
    assert sorted(listed) == sorted(public_names())


@pytest.mark.parametrize("folder", [DOCS, DOCS / "methods"], ids=["docs", "methods"])
def test_every_page_is_in_a_table_of_contents(folder):
    trees = re.findall(r"^```{toctree}\n(.*?)^```$", (folder / "index.md").read_text(), re.MULTILINE | re.DOTALL)
    entries = set(re.findall(r"^[\w/-]+$", "\n".join(trees), re.MULTILINE))
    pages = {page.stem for page in folder.glob("*.md")} | {page.stem for page in folder.glob("*.ipynb")}
    assert {entry for entry in entries if "/" not in entry} == pages - {"index"}


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    local = [link.partition("#")[0] for link in links if not re.match(r"https?:|#", link)]
    assert not [link for link in local if not (page.parent / link).exists()]


@pytest.mark.parametrize("page", sorted((DOCS / "methods").glob("*.md")), ids=lambda page: page.stem)
def test_what_a_method_page_offers_exists(page):
    """In the last column of `What others do`, every call can be made and every parameter exists."""
    text = page.read_text()
    methods = [getattr(jm, name) for name in re.findall(r"autofunction:: jaxmerge\.(\w+)", text)]
    parameters = {name for function in (*methods, jm.merge) for name in inspect.signature(function).parameters}
    names = {**public_names(), "d": 0.5, "w": [1.0, 2.0], "pattern": r"h\.(\d+)"}
    for cell in re.findall(r"^\|.*\| (.*) \|$", text, re.MULTILINE):
        for code in re.findall(r"`([^`]+)`", cell):
            if re.match(r"\w+\(", code):
                eval(code, names)
            elif "=" in code:
                assert set(re.findall(r"(?:^|, )(\w+)=", code)) <= parameters, f"{code} names no parameter"
