"""Whether payloads that somebody asks for can be, before anything is touched."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from limpet.errors import BadRequest
from limpet.models import Payload, PayloadRequest
from limpet.names import new_id
from limpet.paths import Paths
from limpet.services.payloads import locking, places


def new_payloads(requests: Sequence[PayloadRequest], present: Sequence[Payload], paths: Paths) -> tuple[Payload, ...]:
    """The new ones, beside those that are there. Raises BadRequest, FailedPrecondition, Busy."""
    known = list(present)
    for request in requests:
        host = places.check_host(request.host_dir, paths)
        guest = places.check_guest(request.guest_dir)
        for other in known:
            if places.overlap(host, Path(other.host_dir)):
                raise BadRequest(f"{host} overlaps with the payload {other.host_dir}", hint="give another one")
            if places.guest_overlap(guest, other.guest_dir):
                raise BadRequest(f"{guest} overlaps with the payload {other.guest_dir} in the guest")
        locking.peek(host)
        known.append(Payload(id=new_id("pl"), host_dir=str(host), guest_dir=guest, interval=request.interval))
    return tuple(known[len(present) :])
