"""The pieces that a guest is made of, besides its image: kernel, modules, Python, busybox, Btrfs tools.

They come from Debian packages that are downloaded and unpacked but not installed; nothing of them runs as root.

    facts.json       kernel release
    vmlinuz          as packaged
    modules/         lib/modules/<release>, with depmod's tables
    runtime/         what the agent disk carries besides the agent: bin/, lib/ (loader, libraries, standard library)
    tools/           mkfs.btrfs and btrfs with their libraries, for the one boot that makes the blank data disk
"""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from limpet import process
from limpet.errors import Internal
from limpet.images import bootstrap, kernel, keys

PACKAGES = (
    "linux-image-cloud-amd64", "python3.11-minimal", "libpython3.11-stdlib", "libffi8", "libexpat1", "zlib1g",
    "busybox-static", "btrfs-progs",
)  # fmt: skip
PYTHON = "python3.11"
LOADER = "ld-linux-x86-64.so.2"

_LIBRARIES = ("lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu")
_TAKE = (
    "boot/vmlinuz-", "lib/modules/", "bin/busybox", "bin/btrfs", "sbin/mkfs.btrfs", f"usr/bin/{PYTHON}",
    f"usr/lib/{PYTHON}/", *(f"{directory}/" for directory in _LIBRARIES),
)  # fmt: skip

# Of the standard library: what a server without a screen, a compiler and OpenSSL never imports is left out
_DROP = (
    "__pycache__", "config-*", "distutils", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "sqlite3", "test",
    "tkinter", "turtledemo", "unittest", "venv", "wsgiref", "xmlrpc", "dbm", "curses", "lib-dynload", "LICENSE.txt",
    "_sysconfigdata*", "turtle.py", "doctest.py", "pydoc.py", "antigravity.py", "this.py", "sitecustomize.py",
)  # fmt: skip
_EXTENSIONS = (
    "_asyncio", "_contextvars", "_ctypes", "_json", "_multiprocessing", "_posixshmem", "_queue", "_zoneinfo",
    "mmap", "resource", "termios",
)  # fmt: skip


@dataclass(frozen=True)
class Pieces:
    """Unpacked and published pieces."""

    root: Path
    kernel_release: str

    @property
    def vmlinuz(self) -> Path:
        return self.root / "vmlinuz"

    @property
    def modules(self) -> Path:
        """depmod's directory of the kernel: lib/modules/<release>."""
        return self.root / "modules" / "lib" / "modules" / self.kernel_release

    @property
    def runtime(self) -> Path:
        return self.root / "runtime"

    @property
    def tools(self) -> Path:
        return self.root / "tools"

    @property
    def busybox(self) -> Path:
        return self.runtime / "bin" / "busybox"


def key() -> str:
    """What the pieces depend on: which packages, what is taken of them and how; all of it is in these sources."""
    sources = (__file__, bootstrap.__file__, kernel.__file__)
    return keys.key_of("pieces", *(Path(source).read_bytes() for source in sources))


def load(directory: Path) -> Pieces:
    """The pieces published in `directory`; raises OSError or ValueError when they are not whole."""
    return Pieces(directory, str(json.loads((directory / "facts.json").read_text())["kernel_release"]))


async def build(staging: Path, report: bootstrap.Report, mirror: str | None) -> None:
    """Fetch and arrange the pieces in the empty directory `staging`."""
    archive, tree = staging / "packages.tar", staging / "tree"
    await bootstrap.mmdebstrap(archive, variant="extract", include=PACKAGES, report=report, mirror=mirror)
    report(0.6, "unpacking")
    _unpack(archive, tree)
    archive.unlink()
    release = _only(tree / "lib" / "modules", "*").name
    shutil.move(_only(tree / "boot", "vmlinuz-*"), staging / "vmlinuz")
    modules = staging / "modules" / "lib" / "modules"
    modules.mkdir(parents=True)
    shutil.move(tree / "lib" / "modules" / release, modules / release)
    for module in modules.rglob("*.ko"):
        module.write_bytes(kernel.lean(module.read_bytes()))
    await process.run(["depmod", "-b", str(staging / "modules"), release], timeout=60)
    report(0.75, "compiling the standard library")
    await _runtime(tree, staging / "runtime")
    await _tools(tree, staging / "tools")
    shutil.rmtree(tree)
    (staging / "facts.json").write_text(json.dumps({"kernel_release": release, "suite": bootstrap.SUITE}) + "\n")


def _unpack(archive: Path, tree: Path) -> None:
    """Take the wanted members of a package tar: plain files and symbolic links, owned by whoever we are."""
    with tarfile.open(archive) as tar:
        for member in tar:
            name = str(PurePosixPath(member.name))
            target = tree / name
            if not name.startswith(_TAKE) or ".." in target.parts:
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            if member.issym():
                target.symlink_to(member.linkname)
            elif member.isfile() and (content := tar.extractfile(member)) is not None:
                with open(target, "wb") as file:
                    shutil.copyfileobj(content, file, 1 << 20)
                target.chmod(0o755 if member.mode & 0o100 else 0o644)


async def _runtime(tree: Path, runtime: Path) -> None:
    """The relocatable Python: interpreter, libraries and a trimmed, compiled standard library."""
    library = runtime / "lib" / PYTHON
    dynload = library / "lib-dynload"
    (runtime / "bin").mkdir(parents=True)
    shutil.copytree(tree / "usr" / "lib" / PYTHON, library, symlinks=True, ignore=shutil.ignore_patterns(*_DROP))
    dynload.mkdir()
    extensions = [_only(tree / "usr" / "lib" / PYTHON / "lib-dynload", f"{name}.*.so") for name in _EXTENSIONS]
    for extension in extensions:
        shutil.copy(extension, dynload)
    shutil.copy(tree / "usr" / "bin" / PYTHON, runtime / "bin" / "python3")
    shutil.copy(tree / "bin" / "busybox", runtime / "bin" / "busybox")
    await _copy_libraries(tree, [runtime / "bin" / "python3", *extensions], runtime / "lib")
    await compile_python(runtime, library, f"/run/limpet/agent/lib/{PYTHON}")


async def _tools(tree: Path, tools: Path) -> None:
    (tools / "bin").mkdir(parents=True)
    programs = [tree / "sbin" / "mkfs.btrfs", tree / "bin" / "btrfs"]
    for program in programs:
        shutil.copy(program, tools / "bin")
    await _copy_libraries(tree, programs, tools / "lib")


async def _copy_libraries(tree: Path, programs: Iterable[Path], target: Path) -> None:
    """Copy the loader and every shared library that these ELF files need, as the loader itself resolves them."""
    target.mkdir(parents=True, exist_ok=True)
    loader = tree / _LIBRARIES[0] / LOADER
    search = ":".join(str(tree / directory) for directory in _LIBRARIES)
    needed = {loader}
    for program in programs:
        listing = await process.run([str(loader), "--library-path", search, "--list", str(program)], timeout=30)
        for line in listing.stdout.decode().splitlines():
            name, arrow, path = line.strip().partition(" => ")
            if arrow:
                found = Path(path.rpartition(" (")[0])
                if tree not in found.parents:
                    raise Internal(f"{program.name} needs {name}, which the packages do not bring")
                needed.add(found)
    for file in sorted(needed):
        shutil.copy(file, target / file.name)  # follows the link from the soname to the file


async def compile_python(runtime: Path, directory: Path, guest_path: str) -> None:
    """Compile the sources below `directory` with the guest's own interpreter (the host's may be another version).

    The results are never checked against the sources again ("unchecked-hash", PEP 552): the disk is read-only, and
    every check would cost a system call at each import. Raises CommandFailed for a source with a syntax error."""
    command = [str(runtime / "lib" / LOADER), "--library-path", str(runtime / "lib"), str(runtime / "bin" / "python3")]
    # -B: or the interpreter would store what it imports itself, in the other format, and compileall would skip that
    command += ["-ISEB", "-m", "compileall", "-q", "--invalidation-mode", "unchecked-hash"]
    await process.run([*command, "-s", str(directory), "-p", guest_path, str(directory)], timeout=300)


def _only(directory: Path, pattern: str) -> Path:
    found = sorted(directory.glob(pattern))
    if not found:
        raise Internal(f"the packages bring no {pattern} in {directory.name}")
    return found[-1]
