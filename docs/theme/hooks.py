"""Hooks of mkdocs: pages from files outside docs/, pages of the API, and a check of paths into the repository."""

from __future__ import annotations

import ast
import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
INCLUDED = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
SHOWN = {
    "CITATION.cff": "yaml",
    **{f"examples/{path.name}": path.suffix[1:] for path in sorted((ROOT / "examples").glob("*.*"))},
}
PACKAGES = ("optim", "train", "loaders", "recipes", "evaluate", "export", "kernels.reference")
MODULES = ("", "model")  # folders of which each module has a page of its own
HISTORY = {"log.md", "changelog.md"}  # they name files as they were called then
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)\s]+)\)|(?<=\]\()([^)\s]+)(?=\))")
PATH = re.compile(r"(?<![\w/.-])(?:fastbyol|kernels|data_prep|benchmarks|tests|examples|docs)/[\w./-]*\w")
log = logging.getLogger("mkdocs.hooks.fastbyol")  # --strict counts the warnings of loggers below "mkdocs"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Append the examples and the pages of the API to the navigation."""
    examples = [{Path(name).name: f"{name}.md"} for name in SHOWN if name.startswith("examples/")]
    pages = [{name.removeprefix("fastbyol."): _page_of(name)} for name in _api()]
    assert config.nav is not None
    config.nav += [{"Examples": examples}, {"API reference": ["api/index.md", *pages]}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files outside docs/ that are pages, and a page for each public module."""
    for name, page in INCLUDED.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text()))
    for name, language in SHOWN.items():
        shown = _cells(ROOT / name) if language == "ipynb" else f"```{language}\n{(ROOT / name).read_text()}```\n"
        files.append(File.generated(config, f"{name}.md", content=f"# {Path(name).name}\n\n{shown}"))
    rows = ["# API reference", "", "| module | holds |", "|---|---|"]
    for name, path in _api().items():
        first = (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]
        rows.append(f"| [{name.removeprefix('fastbyol.')}]({Path(_page_of(name)).name}) | {first} |")
        files.append(File.generated(config, _page_of(name), content=f"::: {name}\n"))
    files.append(File.generated(config, "api/index.md", content="\n".join(rows) + "\n"))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:  # noqa: ARG001
    """Point links at pages of the site, check paths, and set blocks apart as Python-Markdown wants them."""
    uri = page.file.src_uri
    if uri.startswith("api/") or uri.removesuffix(".md") in SHOWN:
        return markdown
    lines = list(_apart(markdown))
    if uri not in HISTORY:
        for found in sorted({path for line in lines for path in PATH.findall(line)}):
            if "NAME" not in found and not (ROOT / found).exists():
                log.warning("%s names %s, which is not in the repository", uri, found)
    origin = next((ROOT / name for name, made in INCLUDED.items() if made == uri), DOCS / uri)
    is_code, out = False, []
    for line in lines:
        is_code ^= line.lstrip().startswith("```")
        out.append(line if is_code else LINK.sub(lambda link: _link(link, origin, uri, config.repo_url), line))
    return "\n".join(out)


def _cells(notebook: Path) -> str:
    """Return a notebook as Markdown, without its title."""
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(notebook.read_text())["cells"]]
    shown = [f"```python\n{text}\n```" if kind == "code" else text for kind, text in cells]
    return "\n\n".join(shown).removeprefix("# ").partition("\n")[2] + "\n"


def _api() -> dict[str, Path]:
    """Map the name of each public module or package to its file."""
    modules = [path for name in MODULES for path in sorted((ROOT / "fastbyol" / name).glob("*.py"))]
    paths = [path for path in modules if path.stem[0] != "_"]
    paths += [ROOT / "fastbyol" / name.replace(".", "/") / "__init__.py" for name in PACKAGES]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in paths}


def _page_of(name: str) -> str:
    return f"api/{name.removeprefix('fastbyol.')}.md"


def _apart(markdown: str) -> Iterator[str]:
    """Put a blank line before a list or table that follows text at once, which Python-Markdown needs."""
    before, is_code = "", False
    for line in markdown.split("\n"):
        is_code ^= line.lstrip().startswith("```")
        for mark in ("- ", "|"):
            if not is_code and line.startswith(mark) and before.strip() and not before.startswith((mark, " ")):
                yield ""
        yield line
        before = line


def _link(link: re.Match[str], origin: Path, uri: str, repo_url: str | None) -> str:
    """Rewrite one link: to a page of the site, to the hosted repository, or where that has no address to plain text."""
    text, target = link[1], link[2] or link[3]
    if re.match(r"[a-z]+:|#", target):
        return link[0]
    place, hash_, anchor = target.partition("#")
    path = Path(os.path.normpath(origin.parent / place))
    if not path.exists():
        log.warning("%s links to %s, which does not exist", uri, target)
        return link[0]
    name = str(path.relative_to(ROOT))
    inside = f"{name}.md" if name in SHOWN else INCLUDED.get(name)
    if inside is None and path.is_relative_to(DOCS) and path.is_file():
        inside = str(path.relative_to(DOCS))
    if inside is not None:
        new = os.path.relpath(inside, Path(uri).parent) + hash_ + anchor
    elif repo_url:
        new = f"{repo_url.rstrip('/')}/blob/main/{name}"
    else:
        return text if text is not None else link[0]
    return new if text is None else f"[{text}]({new})"
