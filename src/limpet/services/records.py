"""Sandboxes as the store knows them, with the questions that every service asks of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

from pydantic import ValidationError

from limpet.errors import BadRequest, NotFound, nearest
from limpet.models import MIN_MEMORY_MIB, SandboxSpec, SetRequest
from limpet.names import check_name
from limpet.store import SandboxChanges, SandboxRecord, Store

HIDDEN = "+"  # how the names begin that no user can give: of limpet's own sandboxes, and of what is in the trash
_ID = "sb_"
_SHORTEST = len(_ID) + 4  # characters of an id's beginning


class Records:
    """Look-ups that end in a helpful error, and changes of a sandbox's spec."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def all(self) -> list[SandboxRecord]:
        """The sandboxes of users."""
        return [record for record in self._store.sandboxes() if not hidden(record)]

    def everything(self) -> list[SandboxRecord]:
        """Those of limpet itself too."""
        return self._store.sandboxes()

    def by_name(self, name: str) -> SandboxRecord:
        """Never one in the trash. Raises BadRequest for what cannot be a name, NotFound with the nearest one for what
        is not."""
        try:
            return self._store.sandbox_by_name(check_name(name))
        except NotFound as error:
            if any(known_as(record) == name for record in self.trashed()):
                raise NotFound(error.message, hint=f"it is in the trash: limpet undelete {name}") from None
            raise

    def trashed(self) -> list[SandboxRecord]:
        """What is in the trash, the newest first."""
        found = [record for record in self._store.sandboxes() if record.trash is not None]
        return sorted(found, key=_removed_at, reverse=True)

    def find_trashed(self, reference: str) -> SandboxRecord:
        """By the name that it had (the newest of several), by its id or the beginning of one. Raises NotFound, and
        BadRequest when several ids begin so."""
        return _referred(reference, self.trashed(), "nothing in the trash is called", "limpet trash ls")

    def find_any(self, reference: str) -> SandboxRecord:
        """By name, by the name that one in the trash had where no other has it now, by id or the beginning of one.
        Raises NotFound, and BadRequest when several ids begin so."""
        return _referred(reference, [*self.all(), *self.trashed()], "no sandbox is or was called", "limpet ls")

    def by_id(self, sandbox_id: str) -> SandboxRecord:
        """Raises NotFound."""
        return self._store.sandbox_by_id(sandbox_id)

    def find(self, sandbox_id: str) -> SandboxRecord | None:
        """The record, or None when the sandbox is gone."""
        try:
            return self._store.sandbox_by_id(sandbox_id)
        except NotFound:
            return None

    def insert(self, record: SandboxRecord) -> None:
        """Reserve the name. Raises AlreadyExists."""
        self._store.insert_sandbox(record)

    def update(self, sandbox_id: str, **changes: Unpack[SandboxChanges]) -> SandboxRecord:
        """Change columns of a row; durable when this returns."""
        return self._store.update_sandbox(sandbox_id, **changes)

    def change_spec(self, sandbox_id: str, **changes: Any) -> SandboxRecord:
        """Change fields of the spec, validated as a whole. Raises BadRequest."""
        spec = checked_spec({**self.by_id(sandbox_id).spec.model_dump(), **changes})
        return self.update(sandbox_id, spec=spec)

    def delete(self, sandbox_id: str) -> None:
        self._store.delete_sandbox(sandbox_id)


def hidden(record: SandboxRecord) -> bool:
    """Whether users do not see a sandbox by its name: limpet's own (a template being made, a pooled VM), the trash."""
    return record.name.startswith(HIDDEN)


def known_as(record: SandboxRecord) -> str:
    """The name under which users know a sandbox, also one in the trash."""
    return record.trash["name"] if record.trash else record.name


def _removed_at(record: SandboxRecord) -> str:
    return record.trash["removed_at"] if record.trash else ""


def _referred(reference: str, candidates: Sequence[SandboxRecord], problem: str, hint: str) -> SandboxRecord:
    for record in candidates:
        if reference in (known_as(record), record.id):
            return record
    begin = reference if reference.startswith(_ID) else f"{_ID}{reference}"
    matching = [record for record in candidates if record.id.startswith(begin)] if len(begin) >= _SHORTEST else []
    if len(matching) > 1:
        ids = ", ".join(record.id for record in matching[:5])
        raise BadRequest(f"{reference!r} is the beginning of {len(matching)} ids", hint=f"for example {ids}")
    if not matching:
        names = [known_as(record) for record in candidates]
        raise NotFound(f"{problem} {reference!r}", hint=nearest(reference, names) or f"see `{hint}`")
    return matching[0]


def checked_spec(fields: dict[str, Any]) -> SandboxSpec:
    """A spec out of plain values. Raises BadRequest naming the field that is wrong."""
    try:
        return SandboxSpec.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        hint = f"a sandbox needs at least {MIN_MEMORY_MIB} MiB to boot" if where == "memory_mib" else None
        raise BadRequest(f"{where}: {first['msg']}", hint=hint) from None


def changed_spec(spec: SandboxSpec, request: SetRequest) -> tuple[SandboxSpec, list[str], list[str]]:
    """The new spec, and which fields are in force now and at the next start."""
    fields = spec.model_dump()
    now: list[str] = []
    later: list[str] = []
    for key in ("vcpus", "memory_mib"):
        if (value := getattr(request, key)) is not None and value != fields[key]:
            fields[key] = value
            later.append(key)
    for key in ("ttl", "idle_timeout", "idle_suspend", "user", "workdir"):
        if (value := getattr(request, key)) is not None:
            fields[key] = value or None
            now.append(key)
    if request.every_exec is not None:
        fields["every_exec"] = request.every_exec
        now.append("every_exec")
    for key in ("env", "labels"):
        if (changes := getattr(request, key)) is not None:
            merged = {**fields[key], **changes}
            fields[key] = {k: v for k, v in merged.items() if v is not None}
            now.append(key)
    return checked_spec(fields), now, later
