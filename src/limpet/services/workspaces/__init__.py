"""The workspace round trip: a host directory into the guest, the work done there back as a patch, and onto the host.

    plan_import(host_dir)        what would be copied                          tree.py, repository.py
    import_tree(guest, plan)     copy it; one rename makes it visible          transfer.py, staged.py, tarstream.py
    drift(info)                  did the host move since?                      transfer.py
    changes / patch(guest, …)    what the guest did; its repository untouched  export.py
    apply(patch_file, host_dir)  bring it to the host: all or nothing          applying.py, install.py

Everything out of a guest is hostile; nothing here runs a program that a guest could have chosen.
"""

from limpet.services.workspaces.applying import apply
from limpet.services.workspaces.export import Patch, changes, check_revision, patch
from limpet.services.workspaces.guest import Completed, Guest
from limpet.services.workspaces.transfer import (
    ROOT,
    check_guest_name,
    drift,
    git_directory,
    guest_name_for,
    import_tree,
)
from limpet.services.workspaces.tree import ImportPlan, plan_import

__all__ = [
    "ROOT", "Completed", "Guest", "ImportPlan", "Patch", "apply", "changes", "check_guest_name", "check_revision",
    "drift", "git_directory", "guest_name_for", "import_tree", "patch", "plan_import",
]  # fmt: skip
