"""What is true of a running machine: enough for another daemon to find it, and to know that it is the same one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast, get_args

from limpet.errors import BadRequest
from limpet.process import ProcessRef
from limpet.vmm import lock
from limpet.vmm.command import Accel, MachineSpec


@dataclass(frozen=True)
class Handles:
    """Processes, sockets and files of one running machine."""

    name: str
    uuid: str
    accel: Accel
    qemu: ProcessRef
    helpers: tuple[ProcessRef, ...]  # gate and passt; they end with QEMU
    qmp_socket: Path
    channel_socket: Path
    lock: Path

    @classmethod
    def of(cls, spec: MachineSpec, qemu: ProcessRef, helpers: tuple[ProcessRef, ...]) -> Handles:
        """The handles of a machine that was started from `spec`."""
        return cls(spec.name, spec.uuid, spec.accel, qemu, helpers, spec.qmp_socket, spec.channel_socket, spec.lock)

    def to_dict(self) -> dict[str, object]:
        """As JSON-able data, for `from_dict`."""
        return {
            "name": self.name, "uuid": self.uuid, "accel": self.accel, "qemu": _process(self.qemu),
            "helpers": [_process(helper) for helper in self.helpers], "qmp_socket": str(self.qmp_socket),
            "channel_socket": str(self.channel_socket), "lock": str(self.lock),
        }  # fmt: skip

    @classmethod
    def from_dict(cls, record: Mapping[str, object]) -> Handles:
        """What `to_dict` wrote. Raises BadRequest for anything else: a file may be damaged."""
        try:
            accel, helpers = record["accel"], record["helpers"]
            if accel not in get_args(Accel) or not isinstance(helpers, list):
                raise ValueError(f"accel is {accel!r}, helpers are {helpers!r}")
            return cls(
                _text(record["name"]), _text(record["uuid"]), cast(Accel, accel), _reference(record["qemu"]),
                tuple(_reference(helper) for helper in helpers), Path(_text(record["qmp_socket"])),
                Path(_text(record["channel_socket"])), Path(_text(record["lock"])),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError) as error:
            raise BadRequest(f"the record of the running machine makes no sense: {error!r}") from None


def rediscover(name: str, uuid: str, lock_file: Path, qmp_socket: Path, channel_socket: Path) -> Handles | None:
    """Handles of a running machine from the live system alone, when its record is lost: whoever holds its lock is it.
    None when it does not run. `adopt` still compares the uuid. Helpers are left out: they end with QEMU."""
    qemu = lock.holder(lock_file) if lock.held(lock_file) else None
    if qemu is None:
        return None
    # Which accelerator it runs with `adopt` asks it.
    return Handles(name, uuid, "tcg", qemu, (), qmp_socket, channel_socket, lock_file)


def _process(ref: ProcessRef) -> dict[str, int]:
    return {"pid": ref.pid, "started": ref.started}


def _reference(value: object) -> ProcessRef:
    if not isinstance(value, Mapping) or not all(isinstance(value.get(key), int) for key in ("pid", "started")):
        raise ValueError(f"{value!r} is no process")
    return ProcessRef(value["pid"], value["started"])


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no text")
    return value
