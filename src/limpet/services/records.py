"""Sandboxes as the store knows them, with the questions that every service asks of them."""

from __future__ import annotations

from typing import Any, Unpack

from pydantic import ValidationError

from limpet.errors import BadRequest, NotFound
from limpet.models import MIN_MEMORY_MIB, SandboxSpec
from limpet.names import check_name
from limpet.store import SandboxChanges, SandboxRecord, Store

HIDDEN = "+"  # how the names of limpet's own sandboxes begin


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
        """Raises BadRequest for what cannot be a name, NotFound with the nearest one for what is not."""
        return self._store.sandbox_by_name(check_name(name))

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
    """Whether a sandbox is limpet's own (a template being made, a pooled VM): its name is none that users can give."""
    return record.name.startswith(HIDDEN)


def checked_spec(fields: dict[str, Any]) -> SandboxSpec:
    """A spec out of plain values. Raises BadRequest naming the field that is wrong."""
    try:
        return SandboxSpec.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        hint = f"a sandbox needs at least {MIN_MEMORY_MIB} MiB to boot" if where == "memory_mib" else None
        raise BadRequest(f"{where}: {first['msg']}", hint=hint) from None
