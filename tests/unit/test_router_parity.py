"""The blocking and the async router are one API: this test holds them together."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Any, get_type_hints

import pytest

from lsn_consistency import AsyncRouter, Router
from lsn_consistency._settings import RouterOptions, Settings

WITHOUT_IO = {"emit", "settings", "snapshot"}
ASYNC_IN_BOTH = {"lifespan"}
BLOCKS = {"read", "write"}
NODE = "host=127.0.0.1"


def _public(router: type[Any]) -> dict[str, Any]:
    return {name: member for name, member in inspect.getmembers(router) if not name.startswith("_")}


NAMES = sorted(set(_public(Router)) | set(_public(AsyncRouter)))
METHODS = [name for name in NAMES if name != "settings"]


def _parameters(router: type[Any], name: str) -> list[tuple[str, Any, Any]]:
    signature = inspect.signature(getattr(router, name))
    return [(each.name, each.kind, each.default) for each in signature.parameters.values()]


def test_both_routers_have_the_same_public_names() -> None:
    """Every public method exists in both."""
    assert set(_public(Router)) == set(_public(AsyncRouter))


def test_the_public_names_are_those_of_the_contract() -> None:
    """The names are what users rely on: one that comes or goes is a decision."""
    assert [
        "capture",
        "choose",
        "close",
        "emit",
        "lifespan",
        "open",
        "read",
        "run_read",
        "settings",
        "snapshot",
        "token",
        "write",
    ] == NAMES


@pytest.mark.parametrize("name", METHODS)
def test_a_method_takes_the_same_parameters_in_both(name: str) -> None:
    """Names, kinds and defaults of the parameters are the same in both."""
    assert _parameters(Router, name) == _parameters(AsyncRouter, name)


def test_the_routers_are_made_with_the_same_parameters() -> None:
    """The constructors are the same as well."""
    assert _parameters(Router, "__init__") == _parameters(AsyncRouter, "__init__")


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_awaited_or_entered_in_the_same_way(name: str) -> None:
    """What is a call or a ``with`` block in one is an ``await`` or ``async with`` in the other."""
    blocking, awaited = getattr(Router, name), getattr(AsyncRouter, name)
    if name in WITHOUT_IO:
        assert blocking is awaited
    elif name in ASYNC_IN_BOTH:
        assert inspect.isasyncgenfunction(inspect.unwrap(blocking))
        assert inspect.isasyncgenfunction(inspect.unwrap(awaited))
    elif name in BLOCKS:
        block, awaited_block = blocking(Router(primary=NODE)), awaited(AsyncRouter(primary=NODE))
        assert (True, False) == (hasattr(block, "__exit__"), hasattr(block, "__aexit__"))
        expected = (False, True)
        assert expected == (hasattr(awaited_block, "__exit__"), hasattr(awaited_block, "__aexit__"))
    else:
        assert not inspect.iscoroutinefunction(blocking)
        assert inspect.iscoroutinefunction(awaited)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_has_a_docstring_in_both(name: str) -> None:
    """Whoever reads one of them finds the promise there."""
    assert all((getattr(router, name).__doc__ or "").strip() for router in (Router, AsyncRouter))


def test_both_are_context_managers() -> None:
    """``with`` for the one, ``async with`` for the other, and not the other way round."""
    assert (True, False) == (hasattr(Router, "__enter__"), hasattr(Router, "__aenter__"))
    assert (False, True) == (hasattr(AsyncRouter, "__enter__"), hasattr(AsyncRouter, "__aenter__"))


def test_the_typed_options_are_the_settings() -> None:
    """What editors offer (`RouterOptions`) is what is validated (`Settings`)."""
    assert set(get_type_hints(RouterOptions)) == {field.name for field in fields(Settings)}


def test_an_option_has_the_same_type_in_both() -> None:
    """The annotations of `RouterOptions` and `Settings` say the same."""
    assert get_type_hints(RouterOptions) == get_type_hints(Settings)


def test_every_option_has_a_default() -> None:
    """A primary is all that a router needs."""
    assert Settings() == Settings.of({})
