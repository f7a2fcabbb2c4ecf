"""What the documents say of the package is so: names, options, defaults, links, tests."""

from __future__ import annotations

import ast
import builtins
import dataclasses
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import pytest

import lsn_consistency
from lsn_consistency import (
    AsyncRouter,
    Consistency,
    ConsistencyMiddleware,
    Reason,
    Route,
    Router,
    Session,
    Token,
    TokenCodec,
    events,
    exceptions,
)
from lsn_consistency._settings import RouterOptions, Settings
from lsn_consistency.testing import EmbeddedCluster, Node, Replica, TcpProxy
from tests.examples.documents import (
    DOCUMENTS,
    ROOT,
    anchors,
    blocks,
    column,
    links,
    parse,
    prose,
    python_blocks,
    table,
)

REFERENCE = ROOT / "docs" / "reference.md"
GUARANTEES = ROOT / "docs" / "guarantees.md"

# What a block may take for granted: the reader has it, or it is the topic of the page.
GIVEN = {"KEY", "app", "engines", "late_positions", "router"}

KINDS: dict[str, tuple[type, ...]] = {
    "ann": (Session,),
    "async_router": (AsyncRouter,),
    "codec": (TokenCodec,),
    "lagging_replica": (Replica,),
    "pg": (EmbeddedCluster,),
    "pg_cluster": (EmbeddedCluster,),
    "replica": (Replica,),
    "route": (Route,),
    "router": (Router, AsyncRouter),
    "token": (Token,),
}

by_document = pytest.mark.parametrize(
    "path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT))
)


def imported(path: Path) -> dict[str, Any]:
    """Return what a document's blocks import of this package, and fail for what is not there."""
    found: dict[str, Any] = {}
    for node in nodes(path):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lsn_consistency"):
            module = importlib.import_module(node.module or "")
            for alias in node.names:
                found[alias.asname or alias.name] = getattr(module, alias.name)
    return found


def nodes(path: Path) -> Iterator[ast.AST]:
    for block in python_blocks(path):
        yield from ast.walk(parse(block))


def has(owner: Any, name: str) -> bool:
    """Tell whether an object, or an instance of a class, has an attribute."""
    if hasattr(owner, name) or not inspect.isclass(owner):
        return hasattr(owner, name)
    ours = [each for each in owner.__mro__ if each.__module__.startswith("lsn_consistency")]
    return any(f"self.{name} = " in inspect.getsource(each) for each in ours)


@by_document
def test_python_compiles(path: Path) -> None:
    """Every python block is Python."""
    for block in python_blocks(path):
        parse(block)


@by_document
def test_names_are_known(path: Path) -> None:
    """A block uses only names that this document has introduced, or that every reader has."""
    known = {*dir(builtins), *GIVEN}
    used: set[str] = set()
    for node in nodes(path):
        match node:
            case ast.Name(id=name, ctx=ast.Load()):
                used.add(name)
            case ast.Name(id=name) | ast.arg(arg=name):
                known.add(name)
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                known.add(name)
            case ast.alias(name=name, asname=other):
                known.add(other or name.split(".")[0])
    assert set() == used - known


@by_document
def test_attributes_exist(path: Path) -> None:
    """What a block takes from the package and its objects is there."""
    owners: dict[str, tuple[Any, ...]] = {**KINDS}
    owners.update({name: (value,) for name, value in imported(path).items()})
    missing = [
        f"{name}.{attribute}"
        for node in nodes(path)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        for name, attribute in [(node.value.id, node.attr)]
        for owner in owners.get(name, ())
        if not has(owner, attribute)
    ]
    assert [] == missing


@by_document
def test_arguments_exist(path: Path) -> None:
    """A call names only arguments that the function takes."""
    names = imported(path)
    wrong = []
    for node in nodes(path):
        if isinstance(node, ast.Call):
            given = {keyword.arg for keyword in node.keywords if keyword.arg}
            for called in callees(node.func, names):
                wrong += sorted(given - accepted(called))
    assert [] == wrong


def callees(function: ast.expr, names: dict[str, Any]) -> list[Any]:
    match function:
        case ast.Name(id=name) if callable(names.get(name)):
            return [names[name]]
        case ast.Attribute(value=ast.Name(id=name), attr=attribute):
            owners = KINDS.get(name) or ((names[name],) if name in names else ())
            found = [getattr(owner, attribute, None) for owner in owners]
            return [each for each in found if callable(each)]
    return []


def accepted(called: Any) -> set[str]:
    parameters = inspect.signature(called).parameters
    options = set(RouterOptions.__annotations__) if called in (Router, AsyncRouter) else set()
    return {*parameters, *options}


@by_document
def test_links_lead_somewhere(path: Path) -> None:
    """Links inside the repository lead to a file, and to a heading of it."""
    for link in links(path):
        if "://" in link:
            continue
        target, _, anchor = link.partition("#")
        found = (path.parent / target).resolve() if target else path
        assert found.exists(), link
        assert not anchor or anchor in anchors(found), link


def test_options() -> None:
    """The table of options holds every option with its default."""
    defaults = [
        (each.name, each.default_factory() if callable(each.default_factory) else each.default)
        for each in dataclasses.fields(Settings)
    ]
    shown = {Consistency.CAUSAL: "Consistency.CAUSAL"}
    expected = [
        (name, shown.get(value, repr(value)) if isinstance(value, Consistency) else repr(value))
        for name, value in defaults
    ]
    rows = table(REFERENCE, "options")
    assert expected == [(row[0].strip("`"), row[1].strip("`")) for row in rows]


@pytest.mark.parametrize(
    ("name", "function"), [("middleware", ConsistencyMiddleware), ("codec", TokenCodec)]
)
def test_keyword_options(name: str, function: Any) -> None:
    """The tables of the middleware's and the codec's options hold each with its default."""
    parameters = list(inspect.signature(function).parameters.values())
    expected = [
        (each.name, "required" if each.default is each.empty else repr(each.default))
        for each in parameters
        if each.name != "app"
    ]
    rows = [(row[0].strip("`"), row[1].strip("`")) for row in table(REFERENCE, name)]
    methods = ("write_methods", "POST, PUT, PATCH, DELETE")
    assert [each[0] for each in expected] == [each[0] for each in rows]
    assert {each for each in expected if each[0] != "write_methods"} == set(rows) - {methods}


def test_events() -> None:
    """The table of events holds every event with its fields."""
    expected = [
        (event.__name__, [each.name for each in dataclasses.fields(event)])
        for event in get_args(events.Event)
    ]
    rows = table(REFERENCE, "events")
    assert expected == [(row[0].strip("`"), re.findall(r"`(\w+)`", row[1])) for row in rows]


def test_errors() -> None:
    """The table of errors holds every error with its bases."""
    classes = [
        value
        for value in vars(exceptions).values()
        if inspect.isclass(value) and issubclass(value, Exception)
    ]
    expected = {each.__name__: [base.__name__ for base in each.__bases__] for each in classes}
    rows = table(REFERENCE, "errors")
    assert expected == {row[0].strip("`"): re.findall(r"`(\w+)`", row[1]) for row in rows}
    for name, _, attributes, _ in rows:
        source = inspect.getsource(getattr(exceptions, name.strip("`")))
        for attribute in re.findall(r"`(\w+)`", attributes):
            assert f"self.{attribute}" in source


@pytest.mark.parametrize("path", [REFERENCE, ROOT / "docs" / "routing.md"], ids=lambda p: p.name)
def test_reasons(path: Path) -> None:
    """Every reason is in the reference and in the page about routing."""
    if path == REFERENCE:
        assert [(each.name, each.value) for each in Reason] == [
            (row[0].strip("`"), row[1].strip("`")) for row in table(path, "reasons")
        ]
    named = set(re.findall(r"^\| `(\w+)` \|", prose(path), re.MULTILINE))
    expected = {each.name if path == REFERENCE else each.value for each in Reason}
    assert set() == expected - named


def test_snapshot() -> None:
    """The table of snapshot fields is what `snapshot()` gives."""
    from lsn_consistency._cluster import Cluster
    from lsn_consistency._snapshot import snapshot

    (node,) = snapshot(Cluster(["primary"], Settings()), 0.0, 0.0).values()
    assert list(node) == column(REFERENCE, "snapshot")


def test_levels() -> None:
    """The reference and the README list every level."""
    for path, rows in (
        (REFERENCE, column(REFERENCE, "levels")),
        (
            ROOT / "README.md",
            re.findall(r"^\| `(Consistency\.[^`]+)`", prose(ROOT / "README.md"), re.M),
        ),
    ):
        names = [re.sub(r"\(seconds\)", "", row.removeprefix("Consistency.")) for row in rows]
        assert all(hasattr(Consistency, name) for name in names), path
        assert 6 == len(set(names)), path


def test_public_names() -> None:
    """Every public name and every method of the routers is in the reference."""
    text = REFERENCE.read_text("utf-8")
    names = {name for name in lsn_consistency.__all__ if name != "__version__"}
    modules = {name for name in names if isinstance(getattr(lsn_consistency, name), ModuleType)}
    methods = {name for name in dir(Router) if not name.startswith("_")}
    assert [] == [name for name in sorted(names - modules) if f"`{name}" not in text]
    assert [] == [name for name in sorted(modules) if f"`lsn_consistency.{name}`" not in text]
    assert [] == [name for name in sorted(methods) if not re.search(rf"`{name}[`(]", text)]


def test_testing_kit_faults() -> None:
    """Every fault that docs/testing.md lists exists."""
    text = (ROOT / "docs" / "testing.md").read_text("utf-8")
    owners: dict[str, Any] = {
        "replica": Replica,
        "node": Node,
        "pg": EmbeddedCluster,
        "proxy": TcpProxy,
    }
    found = re.findall(r"`(replica|node|pg|proxy)\.(\w+)", text)
    assert found
    assert [] == [f"{owner}.{name}" for owner, name in found if not has(owners[owner], name)]


def test_guarantees_name_their_tests() -> None:
    """Every test that a guarantee names exists, and every guarantee names one."""
    text = GUARANTEES.read_text("utf-8")
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    missing = [
        f"{path}::{name}"
        for path, name in named
        if not re.search(rf"(def|class) {name}\(", (ROOT / path).read_text("utf-8"))
    ]
    assert [] == missing
    without = [
        section.splitlines()[0]
        for section in re.split(r"^### ", text, flags=re.MULTILINE)[1:]
        if "tests/" not in section
    ]
    assert [] == without


def test_blocks_are_closed() -> None:
    """Every fence has a language that is known, so that none of them escapes these tests."""
    known = {"python", "sh", "sql", "text"}
    for path in DOCUMENTS:
        fences = re.findall(r"^```", path.read_text("utf-8"), re.MULTILINE)
        assert len(fences) == 2 * len(blocks(path)), path
        assert {each.language for each in blocks(path)} <= known, path
