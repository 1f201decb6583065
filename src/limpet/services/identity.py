"""Who a guest is: what a clone must get anew so that no two machines are one (GST-3).

The host name and the machine-id follow from the sandbox and stay the same for its life; boot id and entropy are made
for each start from a memory image.
"""

from __future__ import annotations

import os
import uuid

from limpet.guest import Identity
from limpet.services.live import LiveVM
from limpet.store import SandboxRecord
from limpet.vmm.command import mac_address
from limpet.vmm.network import GuestNetwork

_NAMELESS = "limpet"  # the host name of a VM that is nobody's yet
_ENTROPY = 64  # bytes


def machine_uuid(sandbox_id: str) -> str:
    """A UUID that follows from the sandbox's id: what QEMU is recognised by."""
    return str(uuid.uuid5(uuid.NAMESPACE_OID, sandbox_id))


def of(record: SandboxRecord) -> Identity:
    """The identity that this sandbox's guest has to have, with a boot id and entropy that were never used."""
    network = GuestNetwork()
    return Identity(
        hostname=_NAMELESS if record.name.startswith("+") else record.name,
        machine_id=uuid.uuid5(uuid.NAMESPACE_OID, f"machine-id of {record.id}").hex,
        boot_id=str(uuid.uuid4()),
        entropy=os.urandom(_ENTROPY).hex(),
        network={
            "address": f"{network.address}/{network.prefix}", "gateway": network.gateway, "dns": network.dns,
            "mac": mac_address(machine_uuid(record.id)),
        } if record.spec.network == "user" else None,
    )  # fmt: skip


async def renew(vm: LiveVM, record: SandboxRecord, timeout: float) -> str:
    """Make the guest of `vm` the one of this sandbox; its new boot id. Raises Unavailable, DeadlineExceeded."""
    me = of(record)
    await (await vm.agent(timeout)).renew(me, timeout=timeout)
    return me.boot_id
