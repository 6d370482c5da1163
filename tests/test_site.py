"""The documentation builds without a warning and without the network, and its links resolve."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

import pytest
from helpers import ROOT

DOCS = ROOT / "docs"
BUILT = ("_build", "notebooks")
PAGES = [
    *sorted(each for each in ROOT.glob("*.md")),
    *sorted(
        each for each in DOCS.rglob("*.md") if not {*each.relative_to(DOCS).parts} & {*BUILT}
    ),
]  # fmt: skip
TABLES = {"summary.md", "map.md"}  # Written by commands; the pages beside them show them.


class Page(HTMLParser):
    """The ids of an HTML page, the links of its text, and what it loads."""

    def __init__(self, file):
        super().__init__()
        self.ids, self.links, self.loaded = set(), [], []
        self.feed(file.read_text())

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.ids |= {given[key] for key in ("id", "name") if given.get(key)}
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        elif tag in ("img", "script", "iframe", "source") and given.get("src"):
            self.loaded.append(given["src"])
        elif tag == "link" and given.get("href"):
            self.loaded.append(given["href"])


def find_faults(folder):
    """The links of a site's pages that lead nowhere, and what pages load from other servers."""
    pages = {file: Page(file) for file in folder.rglob("*.html")}
    faults = []
    for file, page in pages.items():
        name = file.relative_to(folder).as_posix()
        faults += [f"{name} loads {url}" for url in page.loaded if urlsplit(url).netloc]
        for url in [*page.links, *page.loaded]:
            path, fragment = urldefrag(url)
            parts = urlsplit(path)
            if parts.scheme or parts.netloc:
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            known = pages[target].ids if target in pages else set()
            if not target.is_file() or (fragment and unquote(fragment) not in known):
                faults.append(f"{name} links to {url}")
    return faults


def slug(heading):
    """The anchor that GitHub gives a heading."""
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def without_code(text):
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda each: str(each.relative_to(ROOT)))
def test_the_links_of_a_page_resolve_on_github(page):
    for path, fragment in re.findall(
        r"\]\(([^)#:\s]*)#?([^)\s:]*)\)", without_code(page.read_text())
    ):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), path
        assert "_build" not in target.parts and target.parent != DOCS / "notebooks", path
        if fragment:
            target = target / "README.md" if target.is_dir() else target
            headings = re.findall(
                r"^#+ (.*)$", without_code(target.read_text()), flags=re.MULTILINE
            )
            assert fragment in map(slug, headings), f"{path}#{fragment}"


def test_a_broken_site_is_told(tmp_path):
    (tmp_path / "a.html").write_text(
        "<p id=here><a href='#here'>1</a><a href='b.html?v=1#there'>2</a><a href='b.html'>3</a>"
        "<a href='#gone'>4</a><a href='b.html#gone'>5</a><a href='c.html'>6</a>"
        "<a href='https://example.org/x'>7</a><img src='gone.png'>"
        "<script src='https://example.org/x.js'></script>"
    )
    (tmp_path / "b.html").write_text("<h1 id=there>")
    assert find_faults(tmp_path) == [
        "a.html loads https://example.org/x.js",
        *(f"a.html links to {each}" for each in ("#gone", "b.html#gone", "c.html", "gone.png")),
    ]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    options = ["-W", "--keep-going", "-n", "-q", "-d", folder / "doctrees"]
    nowhere = dict.fromkeys(
        ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9"
    )
    line = [sys.executable, "-m", "sphinx", *options, DOCS, folder / "html"]
    done = subprocess.run(
        [*map(str, line)], capture_output=True, text=True, env={**os.environ, **nowhere}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "html"


@pytest.mark.slow
def test_the_site_builds_and_its_links_resolve(site):
    assert find_faults(site) == []


@pytest.mark.slow
def test_every_page_is_in_the_menu(site):
    text = (site / "index.html").read_text()
    menu = text[text.index("sidebar-tree") : text.index("</aside>")]
    linked = {unquote(each) for each in re.findall(r'href="([^"#]+)"', menu)}
    sources = [each for each in PAGES if each.parent != ROOT and each.name not in TABLES]
    sources += sorted(
        Path(DOCS / "notebooks" / each.name) for each in (ROOT / "notebooks").glob("*.ipynb")
    )
    pages = {each.relative_to(DOCS).with_suffix(".html").as_posix() for each in sources}
    assert linked == pages - {"index.html"}


@pytest.mark.slow
def test_a_flag_keeps_its_dashes(site):
    text = (site / "commands.html").read_text()
    assert "with hydra's --multirun" in text and "\N{EN DASH}" not in text


@pytest.mark.slow
def test_the_notebooks_show_their_committed_outputs(site):
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        text = (site / "notebooks" / notebook.name).with_suffix(".html").read_text()
        assert "cell_output" in text, notebook.name


@pytest.mark.slow
def test_the_api_has_every_public_name_and_every_rule(site):
    import grap_solo
    from grap_solo.weighting import WEIGHTINGS

    ids = Page(site / "api.html").ids
    names = {each.rpartition(".")[2] for each in ids}
    assert {*grap_solo.__all__} <= {each.removeprefix("grap_solo.") for each in ids}
    assert {rule.__name__ for rule in WEIGHTINGS.values()} <= names
