"""From a Debian kernel package to what a microVM boots: an uncompressed vmlinux and an ordered list of modules.

An uncompressed kernel is entered directly (PVH) and saves the guest from unpacking itself, which costs 0.3 s under
emulation. The compressed payload is found by the fields of the boot protocol's setup header
(Documentation/arch/x86/boot.rst, "payload_offset" and "payload_length", since protocol 2.08).
"""

from __future__ import annotations

import gzip
import lzma
import struct
from collections.abc import Sequence
from pathlib import Path

import zstandard

from limpet import process
from limpet.errors import FailedPrecondition

_LZ4_LEGACY = b"\x02\x21\x4c\x18"
_GZIP = b"\x1f\x8b"
_XZ = b"\xfd7zXZ\0"
_ZSTD = b"\x28\xb5\x2f\xfd"
_ELF = b"\x7fELF"

_ELF64 = _ELF + b"\x02\x01"  # 64 bits, little-endian
_SLOW_SECTIONS = (b".BTF", b".orc_unwind", b".orc_unwind_ip")
_SIGNATURE_MARK = b"~Module signature appended~\n"
_SIGNATURE_INFO = 12  # bytes of struct module_signature


async def vmlinux(bzimage: bytes) -> bytes:
    """The ELF kernel inside a bzImage. Raises FailedPrecondition when it is no bzImage or packed in an unknown way."""
    packed = payload(bzimage)
    kernel = await _unpack(packed)
    if not kernel.startswith(_ELF):
        raise FailedPrecondition("the kernel package holds no ELF kernel", hint="report this; it is a limpet bug")
    return kernel


def payload(bzimage: bytes) -> bytes:
    """The compressed kernel in a bzImage, without the four bytes of its unpacked size that follow it."""
    if bzimage[0x202:0x206] != b"HdrS" and bzimage[0x1FE:0x200] != b"\x55\xaa":
        raise FailedPrecondition("the kernel is not a bzImage")
    protected_mode = (bzimage[0x1F1] + 1) * 512
    offset, length = struct.unpack_from("<II", bzimage, 0x248)
    start = protected_mode + offset
    return bzimage[start : start + length - 4]


async def _unpack(packed: bytes) -> bytes:
    if packed.startswith(_LZ4_LEGACY):
        return (await process.run(["lz4", "-d", "-c"], input=packed, timeout=60)).stdout
    if packed.startswith(_GZIP):
        return gzip.decompress(packed)
    if packed.startswith(_XZ):
        return lzma.LZMADecompressor().decompress(packed)
    if packed.startswith(_ZSTD):
        return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj().decompress(packed)
    if packed.startswith(_ELF):
        return packed
    raise FailedPrecondition(f"the kernel is packed in an unknown way (it begins with {packed[:6].hex(' ')})")


def unsigned(module: bytes) -> bytes:
    """A kernel module without the signature that is appended to it (Documentation/admin-guide/module-signing.rst).

    Checking one costs an emulated guest more than loading the module, and proves nothing there: whoever could replace
    a module could replace the kernel too."""
    if not module.endswith(_SIGNATURE_MARK):
        return module
    # struct module_signature: four bytes of algorithm and kind, two lengths and padding, then the signature's length
    length = struct.unpack_from(">I", module, len(module) - len(_SIGNATURE_MARK) - 4)[0]
    return module[: len(module) - len(_SIGNATURE_MARK) - _SIGNATURE_INFO - length]


def lean(module: bytes) -> bytes:
    """A kernel module without what makes loading it slow in an emulated guest: its signature, and the sections with
    type descriptions for BPF (.BTF, checked at every load) and for exact stack traces (.orc_unwind*, sorted at every
    load).

    The sections stay where they are and lose their names and flags, so the kernel does not see them. Offsets are those
    of Elf64_Ehdr and Elf64_Shdr in elf(5)."""
    content = bytearray(unsigned(module))
    if not content.startswith(_ELF64):
        return bytes(content)
    (table,) = struct.unpack_from("<Q", content, 0x28)
    size, count, names_index = struct.unpack_from("<HHH", content, 0x3A)
    (names,) = struct.unpack_from("<Q", content, table + size * names_index + 0x18)
    for header in range(table, table + size * count, size):
        start = names + struct.unpack_from("<I", content, header)[0]
        if bytes(content[start : content.index(0, start)]) in _SLOW_SECTIONS:
            struct.pack_into("<I", content, header, 0)  # sh_name: the empty name
            struct.pack_into("<Q", content, header + 8, 0)  # sh_flags: not loaded
    return bytes(content)


def load_order(modules: Path, names: Sequence[str]) -> list[Path]:
    """Files of these modules and all that they depend on, in an order in which insmod takes them.

    `modules` is the directory that holds depmod's modules.dep; the paths are relative to it. A name that is not there
    is built into the kernel or unknown; both are left out."""
    table = _dependencies(modules / "modules.dep")
    by_name = {_module_name(path): path for path in table}
    order: list[Path] = []
    for name in names:
        if (path := by_name.get(name.replace("-", "_"))) is None:
            continue
        # modules.dep lists direct and indirect dependencies, the most basic one last
        order += [Path(item) for item in (*reversed(table[path]), path) if Path(item) not in order]
    return order


def _dependencies(table: Path) -> dict[str, list[str]]:
    lines = (line.partition(":") for line in table.read_text().splitlines())
    return {path: needs.split() for path, _, needs in lines}


def _module_name(path: str) -> str:
    return Path(path).name.partition(".ko")[0].replace("-", "_")
