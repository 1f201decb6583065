"""The vault: what a sandbox wrote, as generations on the host, independent of its disks."""

from limpet.vault.drafts import Draft
from limpet.vault.editing import Editor
from limpet.vault.errors import BadStream, Damaged
from limpet.vault.generations import Generation, VolumeInfo
from limpet.vault.nodes import BLOCK, Kind, Node
from limpet.vault.trees import Tree
from limpet.vault.vault import Usage, Vault

__all__ = [
    "BLOCK", "BadStream", "Damaged", "Draft", "Editor", "Generation", "Kind", "Node", "Tree", "Usage", "Vault",
    "VolumeInfo",
]  # fmt: skip
