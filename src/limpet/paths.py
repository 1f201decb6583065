"""Every name that limpet puts on a disk, with what it is. No other module spells one.

    data/                       durable: back this up
      limpet.db                 SQLite: what every sandbox *is* (spec, state, workspace), events, operations
      limpet.db.bak             a copy of it, at most a day old while the daemon runs
      lock                      flock: one daemon per state directory
      layers/<id>.qcow2         what disks are made of: each lies on another one or on an image's root.raw; the
                                database says which are whose
      checkpoints/<id>/         one instant of a sandbox: checkpoint.json (spec, layers, digests), and of its memory
                                ram (sparse), state (devices), agent.squashfs (what it had mounted)
      sandboxes/<id>/           everything else of one sandbox; removed with it
        intake.raw              scratch for bulk host → guest; sparse, meaningless after a stop
        agent.squashfs          the agent disk that its VM has mounted: another name of it (a hard link)
        handles.json            what is true now: pids, start times, sockets; rebuilt from the live system
        vm.lock                 flock held by QEMU: "locked" is what "running" means
        console.log             serial console, bounded
        agent.log               the guest agent's own log, bounded
        qemu.log                QEMU's stderr, bounded
      vaults/<sandbox id>/      generations of what a sandbox wrote, whatever becomes of its disks (see vault/)
      payloads/<id>.json        what a payload's host directory shows, and what it is about to
      images/<name>/<digest>/   image: root.raw, data.raw (unless its data disk is blank) and image.json, named by
                                content; sandboxes' disks build on it
      images/<name>/current     which of them the name means: the tag `latest`
      images/<name>/tags/<tag>  which of them `<name>:<tag>` means
    cache/                      can be made again by `limpet setup`
      pieces/<key>/             kernel, modules, guest Python: unpacked from Debian packages
      artifacts/<name>-<key>    vmlinux, initramfs, agent disk, blank data disk: content-addressed
      templates/<key>/          a booted, warmed VM: template.json, ram, state, root.qcow2, data.qcow2
      setup.lock                flock: one setup at a time
      probe.json                the accelerator verdict and its key
    run/                        gone after a reboot; 0700
      daemon.sock               the API
      daemon.log                structured log of the daemon (JSON lines)
      daemon.err                what the daemon wrote to stderr: why it could not start
      daemon.json               pid, version and start time of the daemon
      vm/<short>/qmp, chan      a VM's sockets
      vm/<short>/docker.sock    the Docker API of its guest, served by the daemon

`LIMPET_HOME` puts all three under one directory. Unix socket paths hold at most 107 bytes (unix(7)): when `run` is
too deep for them, sockets move to a 0700 directory in /tmp named after a hash of it.
"""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from limpet.errors import FailedPrecondition

_LONGEST_SOCKET = len("/vm/0123456789ab/docker.sock")
_SUN_PATH_MAX = 107  # bytes, unix(7): sun_path[108] with its final NUL
_ELSEWHERE = "set LIMPET_HOME to a directory you can write to"


@dataclass(frozen=True)
class SandboxPaths:
    """The files of one sandbox, and the directory of its sockets."""

    root: Path
    sockets: Path

    @property
    def old_disks(self) -> dict[str, Path]:
        """Where limpet 0.1 had the disks; they become layers when a newer daemon first starts."""
        return {name: self.root / f"{name}.qcow2" for name in ("root", "data")}

    @property
    def intake(self) -> Path:
        return self.root / "intake.raw"

    @property
    def agent_disk(self) -> Path:
        return self.root / "agent.squashfs"

    @property
    def handles(self) -> Path:
        return self.root / "handles.json"

    @property
    def lock(self) -> Path:
        return self.root / "vm.lock"

    @property
    def console_log(self) -> Path:
        return self.root / "console.log"

    @property
    def agent_log(self) -> Path:
        return self.root / "agent.log"

    @property
    def qemu_log(self) -> Path:
        return self.root / "qemu.log"

    @property
    def qmp(self) -> Path:
        return self.sockets / "qmp"

    @property
    def channel(self) -> Path:
        return self.sockets / "chan"

    @property
    def docker_socket(self) -> Path:
        return self.sockets / "docker.sock"


@dataclass(frozen=True)
class Paths:
    """The three roots of one limpet installation."""

    data: Path
    cache: Path
    run: Path

    @property
    def database(self) -> Path:
        return self.data / "limpet.db"

    @property
    def database_backup(self) -> Path:
        return self.data / "limpet.db.bak"

    @property
    def state_lock(self) -> Path:
        return self.data / "lock"

    @property
    def sandboxes(self) -> Path:
        return self.data / "sandboxes"

    @property
    def layers(self) -> Path:
        return self.data / "layers"

    @property
    def checkpoints(self) -> Path:
        return self.data / "checkpoints"

    @property
    def vaults(self) -> Path:
        return self.data / "vaults"

    def vault(self, sandbox_id: str) -> Path:
        """The generations of one sandbox."""
        return self.vaults / sandbox_id

    @property
    def payloads(self) -> Path:
        return self.data / "payloads"

    @property
    def templates(self) -> Path:
        return self.cache / "templates"

    @property
    def pieces(self) -> Path:
        return self.cache / "pieces"

    @property
    def artifacts(self) -> Path:
        return self.cache / "artifacts"

    @property
    def images(self) -> Path:
        return self.data / "images"

    def image(self, name: str) -> Path:
        """Everything of the images with this name."""
        return self.images / name

    def image_tags(self, name: str) -> Path:
        """One file for each tag but `latest`."""
        return self.image(name) / "tags"

    def image_tag(self, name: str, tag: str) -> Path:
        """Which version a tag means."""
        return self.image(name) / "current" if tag == "latest" else self.image_tags(name) / tag

    @property
    def setup_lock(self) -> Path:
        return self.cache / "setup.lock"

    @property
    def probe(self) -> Path:
        return self.cache / "probe.json"

    @property
    def sockets(self) -> Path:
        """Where sockets live: `run`, or a short stand-in in /tmp when `run` is too deep."""
        if len(os.fsencode(self.run)) + _LONGEST_SOCKET <= _SUN_PATH_MAX:
            return self.run
        digest = hashlib.sha256(os.fsencode(self.run)).hexdigest()[:12]
        return Path(f"/tmp/limpet-{os.getuid()}-{digest}")

    @property
    def daemon_socket(self) -> Path:
        return self.sockets / "daemon.sock"

    @property
    def daemon_log(self) -> Path:
        return self.run / "daemon.log"

    @property
    def daemon_errors(self) -> Path:
        return self.run / "daemon.err"

    @property
    def daemon_info(self) -> Path:
        return self.run / "daemon.json"

    def sandbox(self, sandbox_id: str) -> SandboxPaths:
        """The files of the sandbox with this id (`sb_…`)."""
        short = hashlib.sha256(sandbox_id.encode()).hexdigest()[:12]
        return SandboxPaths(self.sandboxes / sandbox_id, self.sockets / "vm" / short)

    def make(self) -> None:
        """Create the roots (0700 where only the user has business). Raises FailedPrecondition when one cannot be."""
        data = (self.data, self.sandboxes, self.layers, self.checkpoints, self.vaults, self.payloads)
        for directory in (*data, self.cache, self.run, self.sockets):
            try:
                directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            except OSError as error:
                raise FailedPrecondition(f"cannot create {directory}: {error.strerror}", hint=_ELSEWHERE) from None
            if not os.access(directory, os.W_OK | os.X_OK):
                raise FailedPrecondition(f"{directory} is not writable", hint=_ELSEWHERE)
        found = self.sockets.stat()
        if found.st_uid != os.getuid():
            raise FailedPrecondition(f"{self.sockets} belongs to another user", hint="set LIMPET_HOME to a short path")
        if stat.S_IMODE(found.st_mode) & 0o077:
            self.sockets.chmod(0o700)


def discover(home: str | os.PathLike[str] | None = None) -> Paths:
    """The paths under `home` (default: `LIMPET_HOME`), else this user's data, cache and runtime directories."""
    if home := home or os.environ.get("LIMPET_HOME"):
        root = Path(home).absolute()
        return Paths(root / "data", root / "cache", root / "run")
    import platformdirs

    dirs = platformdirs.PlatformDirs("limpet", appauthor=False)
    runtime = Path(os.environ["XDG_RUNTIME_DIR"]) / "limpet" if _runtime_dir_usable() else dirs.user_state_path / "run"
    return Paths(dirs.user_data_path, dirs.user_cache_path, runtime)


def _runtime_dir_usable() -> bool:
    directory = os.environ.get("XDG_RUNTIME_DIR")
    return bool(directory) and os.access(directory or "", os.W_OK)
