"""What the workspace tests share: a guest that is a directory of this machine, and real git repositories."""

from __future__ import annotations

import asyncio
import hashlib
import os
import stat
import subprocess
import tarfile
import tempfile
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from limpet.models import Change, WorkspaceInfo
from limpet.services import workspaces

T = TypeVar("T")


@dataclass
class Ended:
    exit_code: int
    stdout: bytes
    stderr: bytes


class LocalGuest:
    """Runs the guest's commands here, with the git configuration of the guest image. `root` stands for /workspace."""

    def __init__(self, directory: Path) -> None:
        self.root = str(directory / "workspace")
        self._config = directory / "gitconfig"
        self._home = directory / "home"
        self._home.mkdir(parents=True)
        self._config.write_text("[core]\ncheckStat = minimal\ntrustctime = false\nfsync = all\n[safe]\ndirectory = *\n")

    def environment(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        return {
            "PATH": os.environ["PATH"], "HOME": str(self._home), "GIT_CONFIG_SYSTEM": str(self._config),
            "TMPDIR": str(self._home.parent), **(extra or {}),
        }  # fmt: skip

    async def run(
        self, argv: Sequence[str], *, user: str | None = None, cwd: str | None = None,
        env: Mapping[str, str] | None = None, input: bytes = b"", timeout: float = 60.0, limit: int = 1 << 20,
    ) -> Ended:  # fmt: skip
        process = await asyncio.create_subprocess_exec(
            *argv, cwd=cwd, env=self.environment(env), stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        out, err = await asyncio.wait_for(process.communicate(input), timeout)
        assert process.returncode is not None
        return Ended(process.returncode, out[:limit], err[:limit])

    async def stream(
        self, argv: Sequence[str], *, user: str | None = None, cwd: str | None = None,
        env: Mapping[str, str] | None = None, timeout: float = 60.0,
    ) -> AsyncIterator[bytes]:  # fmt: skip
        done = await self.run(argv, user=user, cwd=cwd, env=env, timeout=timeout, limit=1 << 30)
        size = 7 if len(done.stdout) < 100_000 else 65_536  # small pieces: every boundary falls somewhere odd
        for start in range(0, len(done.stdout), size):
            yield done.stdout[start : start + size]

    async def unpack(self, path: str, chunks: AsyncIterator[bytes], *, user: str | None = None) -> None:
        with tempfile.TemporaryFile() as file:
            async for chunk in chunks:
                file.write(chunk)
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:", errors="surrogateescape", encoding="utf-8") as archive:
                # Debian 12's Python 3.11.2 does not know the argument yet; later ones warn without it.
                known: dict[str, Any] = {"filter": "fully_trusted"} if hasattr(tarfile, "data_filter") else {}
                archive.extractall(path, **known)

    def git(self, info: WorkspaceInfo, *args: str) -> str:
        """git as a person in the sandbox would type it."""
        env = self.environment()
        done = subprocess.run(["git", *args], cwd=info.guest_dir, env=env, capture_output=True, check=True)
        return done.stdout.decode(errors="surrogateescape")


def wait(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(work)


def git(directory: Path, *args: str, input: bytes | None = None) -> str:
    """git as the user on the host would type it."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    env |= {"GIT_AUTHOR_NAME": "A", "GIT_AUTHOR_EMAIL": "a@b", "GIT_COMMITTER_NAME": "A", "GIT_COMMITTER_EMAIL": "a@b"}
    done = subprocess.run(["git", *args], cwd=directory, env=env, input=input, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    return done.stdout.decode(errors="surrogateescape")


def make_repository(directory: Path) -> Path:
    """A repository with one commit: text, binary, executable, symlink, odd names, a directory, an ignore rule."""
    directory.mkdir(parents=True)
    git(directory, "init", "-q", "-b", "main")
    (directory / "readme").write_text("one\ntwo\nthree\n")
    (directory / "blob.bin").write_bytes(bytes(range(256)) * 8)
    (directory / "run.sh").write_text("#!/bin/sh\necho hi\n")
    (directory / "run.sh").chmod(0o755)
    (directory / "link").symlink_to("readme")
    (directory / "new\nline").write_text("odd\n")
    Path(os.fsdecode(os.fsencode(directory) + b"/caf\xe9")).write_text("latin\n")
    (directory / "src").mkdir()
    for number in range(5):
        (directory / "src" / f"m{number}.py").write_text(f"x = {number}\n" * 10)
    (directory / ".gitignore").write_text("*.log\nbuild/\n")
    git(directory, "add", "-A")
    git(directory, "commit", "-qm", "first")
    return directory


def make_dirty(directory: Path) -> None:
    """Every kind of uncommitted work at once."""
    (directory / "readme").write_text("one\ntwo staged\nthree\n")
    git(directory, "add", "readme")
    (directory / "readme").write_text("one\ntwo staged\nthree unstaged\n")
    (directory / "src/m0.py").unlink()
    git(directory, "rm", "-q", "--cached", "src/m1.py")
    (directory / "run.sh").chmod(0o644)
    (directory / "blob.bin").write_bytes(b"\0\xff" * 100)
    (directory / "link").unlink()
    (directory / "link").symlink_to("src")
    (directory / "new\nline").write_text("odder\n")
    (directory / "untracked file").write_text("mine\n")
    (directory / "src/deep/er").mkdir(parents=True)
    (directory / "src/deep/er/\xfc").write_text("new\n")
    (directory / "noise.log").write_text("ignored\n")
    (directory / "build").mkdir()
    (directory / "build/out").write_text("ignored\n")


def state(directory: Path, *, times: bool = False) -> dict[str, tuple[object, ...]]:
    """Every path below `directory` with type, mode, content; what "byte for byte" means in these tests."""
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(directory.rglob("*")):
        status = path.lstat()
        content: object = None
        if stat.S_ISREG(status.st_mode):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        elif stat.S_ISLNK(status.st_mode):
            content = os.readlink(path)
        # Not of objects: git marks one that it finds already there as used today, as any `git add` does.
        timed = times and not stat.S_ISDIR(status.st_mode) and ".git/objects/" not in str(path)
        moment = status.st_mtime_ns if timed else None
        name = str(path.relative_to(directory))
        found[name] = (stat.S_IFMT(status.st_mode), stat.S_IMODE(status.st_mode), content, moment)
    return found


def without_git(found: dict[str, tuple[object, ...]]) -> dict[str, tuple[object, ...]]:
    return {path: what for path, what in found.items() if path.split("/")[0] != ".git"}


def bring_in(guest: LocalGuest, directory: Path, name: str = "work", **options: Any) -> WorkspaceInfo:
    """Plan and import."""
    untracked = options.pop("untracked", True)

    async def both() -> WorkspaceInfo:
        plan = await workspaces.plan_import(directory, untracked)
        return await workspaces.import_tree(guest, plan, name, root=guest.root, **options)

    return wait(both())


def take_out(guest: LocalGuest, info: WorkspaceInfo, target: Path, base: str | None = None) -> list[Change]:
    """Export the patch into the file `target`; the list that came with it."""

    async def collect() -> list[Change]:
        found = await workspaces.patch(guest, info, base)
        with target.open("wb") as file:
            async for chunk in found.chunks:
                file.write(chunk)
        return found.changes

    return wait(collect())


def listed(changes: list[Change]) -> dict[str, str]:
    return {change.path: change.status for change in changes}
