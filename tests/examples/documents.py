"""Take Markdown documents apart: fenced blocks, tables, links, headings."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted(
    [ROOT / "README.md", ROOT / "examples" / "README.md", *(ROOT / "docs").glob("*.md")]
)

_FENCE = re.compile(r"(?:^<!-- ([^\n]*) -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block: the comment before it, its language, its text, and its line."""

    marker: str
    language: str
    text: str
    line: int


@cache
def blocks(path: Path) -> list[Block]:
    text = path.read_text("utf-8")
    return [
        Block(found[1] or "", found[2], found[3], text.count("\n", 0, found.start()) + 1)
        for found in _FENCE.finditer(text)
    ]


def python_blocks(path: Path) -> list[Block]:
    return [block for block in blocks(path) if block.language == "python"]


def parse(block: Block) -> ast.Module:
    flags = ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    tree: ast.Module = compile(block.text, "block", "exec", flags)
    return tree


def table(path: Path, name: str) -> list[list[str]]:
    """Return the rows of the table after the comment ``<!-- table: name -->``."""
    text = path.read_text("utf-8")
    (found,) = re.findall(rf"^<!-- table: {name} -->\n((?:\|.*\n)+)", text, re.MULTILINE)
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in found.splitlines()]
    return [[cell.strip() for cell in row] for row in rows[2:]]


def column(path: Path, name: str, index: int = 0) -> list[str]:
    return [row[index].strip("`") for row in table(path, name)]


def prose(path: Path) -> str:
    return _FENCE.sub("", path.read_text("utf-8"))


def links(path: Path) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", prose(path))


def anchors(path: Path) -> set[str]:
    """Return the anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
