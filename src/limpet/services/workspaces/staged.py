"""A git directory made by hand for one import or apply: it borrows the user's objects and writes only its own files.

For an import it becomes the guest's `.git`; for an apply it is thrown away. The user's index is copied with its
modification time: git takes a file as unchanged when its time is older than the index's (gitformat-index(5), "racy").
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from limpet.errors import FailedPrecondition
from limpet.services.workspaces import git
from limpet.services.workspaces.repository import Repository
from limpet.services.workspaces.tree import Entry, ImportPlan

BASE_REF = "refs/limpet/base"
EXTRA = "limpet/extra"  # in the guest's git directory: files that its index does not list but the base has
LINKS = "limpet/links"  # … and gitlinks that the base has as plain files

# State of an unfinished operation that is one file each and means the same in the guest.
_STATE_FILES = (
    "shallow", "MERGE_HEAD", "MERGE_MSG", "MERGE_MODE", "CHERRY_PICK_HEAD", "REVERT_HEAD", "info/attributes",
)  # fmt: skip
_GUEST_CONFIG = [("core.checkstat", "minimal"), ("core.trustctime", "false")]  # inodes and change times differ there
_PLAIN_CONFIG = [("user.name", "limpet"), ("user.email", "limpet@localhost")]


@dataclass(frozen=True)
class StagedGit:
    """The git directory under `path` over the work tree `top`; `repository` is the user's, if there is one."""

    path: Path
    top: Path
    repository: Repository | None

    @property
    def index(self) -> Path:
        return self.path / "index"

    @property
    def alternates(self) -> tuple[Path, ...]:
        return self.repository.objects if self.repository else ()

    def git(self, index: Path | None = None) -> git.Git:
        """git in this directory, with its own index or another."""
        return git.Git(self.path, self.top, index=index or self.index, alternates=self.alternates)

    def create(self) -> None:
        """Write the directory: HEAD, configuration, ignore rules, and a copy of the user's index."""
        for name in ("objects/info", "objects/pack", "refs/heads", "info", "limpet"):
            (self.path / name).mkdir(parents=True)
        (self.path / "config").write_bytes(self._config())
        (self.path / "HEAD").write_bytes(self._head())
        (self.path / "info" / "exclude").write_bytes(self._exclude())
        if self.repository is None:
            return
        for source in (self.repository.git_dir, self.repository.common_dir):
            for name in _STATE_FILES:
                if (source / name).is_file() and not (self.path / name).exists():
                    shutil.copyfile(source / name, self.path / name)
        self._copy_index(self.repository)

    def _copy_index(self, repository: Repository) -> None:
        if not repository.index.is_file():
            return
        try:
            shutil.copy2(repository.index, self.index)
            for shared in repository.git_dir.glob("sharedindex.*"):
                shutil.copy2(shared, self.path / shared.name)
        except PermissionError:
            raise FailedPrecondition(f"cannot read {repository.index}", hint="check its owner") from None

    def _config(self) -> bytes:
        kept = list(self.repository.config) if self.repository else _PLAIN_CONFIG
        extended = any(key.startswith("extensions.") for key, _ in kept)
        pairs = [("core.repositoryformatversion", str(int(extended))), ("core.bare", "false"), *_GUEST_CONFIG, *kept]
        return "".join(_config_line(key, value) for key, value in pairs).encode(errors="surrogateescape")

    def _head(self) -> bytes:
        if self.repository is None:
            return b"ref: refs/heads/main\n"
        if self.repository.branch is not None:
            return b"ref: " + os.fsencode(self.repository.branch) + b"\n"
        return (self.repository.head or "").encode() + b"\n"

    def _exclude(self) -> bytes:
        """The user's own ignore rules first, then the repository's: the last match wins, as it does on the host."""
        if self.repository is None:
            return b""
        sources = [self.repository.excludes, self.repository.common_dir / "info" / "exclude"]
        return b"\n".join(source.read_bytes() for source in sources if source is not None and source.is_file())

    async def refresh_index(self) -> None:
        """Bring the copied index up to date with the files' times and make it one self-contained file."""
        if not self.index.is_file():
            return
        await self.git()(
            "update-index", "-q", "--ignore-submodules", "--no-split-index", "--no-untracked-cache", "--no-fsmonitor",
            "--force-write-index", "--refresh", check=False,
        )  # fmt: skip
        for shared in self.path.glob("sharedindex.*"):
            shared.unlink()

    async def snapshot(self, plan: ImportPlan, index: Path) -> str:
        """The commit of the work tree as it is: HEAD itself when that is the same, else a new one on top of it."""
        if self.index.is_file() and index != self.index:
            shutil.copy2(self.index, index)
        tool = self.git(index)
        if gone := [*plan.links, *plan.missing]:
            await tool("update-index", "--force-remove", "-z", "--stdin", input=git.joined(gone))
        names = git.joined([entry.path for entry in plan.entries if _in_base(plan, entry)])
        # Straight into one pack (what git does with "big" files): thousands of loose objects are slow to make.
        packing = dataclasses.replace(tool, settings=("core.bigFileThreshold=1",))
        await packing("update-index", "--add", "--replace", "-z", "--stdin", input=names)
        tree = git.one_line((await tool("write-tree", "--missing-ok")).stdout)
        head = self.repository.head if self.repository else None
        if head is not None:
            known = await tool("rev-parse", "-q", "--verify", f"{head}^{{tree}}", check=False)
            if known.stdout.decode().strip() == tree:
                return head
        parents = ("-p", head) if head else ()
        return git.one_line((await tool("commit-tree", *parents, "-m", "limpet: the imported state", tree)).stdout)

    async def write_refs(self, base: str) -> None:
        """All refs in one packed-refs file, symbolic ones as files, and the stash's log, which is what lists it."""
        packed = [b"%s %s\n" % (base.encode(), BASE_REF.encode())]
        if self.repository is None:
            packed.append(b"%s refs/heads/main\n" % base.encode())
        for ref in await self.repository.refs() if self.repository else []:
            if ref.symref:
                target = self.path / os.fsdecode(ref.name)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(b"ref: " + ref.symref + b"\n")
            else:
                packed.append(b"%s %s\n" % (ref.object.encode(), ref.name))
        (self.path / "packed-refs").write_bytes(b"".join(packed))
        stash = self.repository.common_dir / "logs/refs/stash" if self.repository else None
        if stash is not None and stash.is_file():
            (self.path / "logs/refs").mkdir(parents=True, exist_ok=True)
            shutil.copyfile(stash, self.path / "logs/refs/stash")

    def write_notes(self, plan: ImportPlan) -> None:
        """What an export must know of nested repositories."""
        present = {entry.path for entry in plan.entries}
        for name, paths in ((EXTRA, [path for path in plan.nested if path in present]), (LINKS, plan.links)):
            if paths:
                (self.path / name).write_bytes(git.joined(paths))

    async def pack_loose(self) -> None:
        """Put every loose object, the user's and ours, into one pack; the user's packs are taken as they are."""
        own = self.path / "objects"
        loose = b"".join(oid for directory in (own, *self.alternates) for oid in _loose(directory))
        if loose:
            await self.git()(
                "pack-objects", "-q", "--window=0", "--compression=1", str(own / "pack" / "pack"), input=loose
            )  # fmt: skip
        for directory in own.glob("[0-9a-f][0-9a-f]"):
            shutil.rmtree(directory)

    def borrowed_packs(self) -> list[Path]:
        """The user's packs and what belongs to them, packs before their indexes."""
        kinds = (".pack", ".idx", ".rev", ".promisor")
        found = {path.name: path for directory in self.alternates for path in (directory / "pack").glob("pack-*")}
        return sorted(
            (path for path in found.values() if path.suffix in kinds and _stem(path, ".idx") in found),
            key=lambda path: kinds.index(path.suffix),
        )


def trackable(path: bytes) -> bool:
    """Whether git can hold a file of this name: no component is `.git`."""
    return all(part.lower() != b".git" for part in path.split(b"/"))


def _in_base(plan: ImportPlan, entry: Entry) -> bool:
    return not entry.is_directory and trackable(entry.path) and entry.path not in plan.outside_base


def _stem(path: Path, suffix: str) -> str:
    return path.with_suffix(suffix).name


def _loose(objects: Path) -> Iterable[bytes]:
    """The ids of the loose objects in an object directory, one a line."""
    for first in range(256):
        try:
            names = [path.name for path in (objects / f"{first:02x}").iterdir()]
        except (FileNotFoundError, NotADirectoryError):
            continue
        yield from (f"{first:02x}{name}\n".encode() for name in names if len(name) in (38, 62))


def _config_line(key: str, value: str) -> str:
    """One setting in git-config(1) syntax; the key is `section.name` or `section.subsection.name`."""
    section, _, rest = key.partition(".")
    subsection, _, name = rest.rpartition(".")
    escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t")
    quoted = subsection.replace("\\", "\\\\").replace('"', '\\"')
    head = f'[{section} "{quoted}"]' if subsection else f"[{section}]"
    return f'{head}\n\t{name} = "{escaped}"\n'
