"""Payloads: host directories that a guest directory is kept in step with (PAY-1 … 10).

    host directory ── seeding ──► volume in the guest ── generations ──► vault ── publishing ──► host directory

`attachments` is what those who run VMs call, `service` what users ask for, `keeping` runs while a VM does.
"""

from limpet.services.payloads.attachments import Attachments

__all__ = ["Attachments"]
