"""From a kernel package to a bootable kernel: what a boot is made of (VM-6's first step)."""

from __future__ import annotations

import asyncio
import gzip
import lzma
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from limpet import process
from limpet.errors import FailedPrecondition
from limpet.images import kernel

ELF = b"\x7fELF" + bytes(range(256)) * 400


def bzimage(packed: bytes, unpacked_size: int) -> bytes:
    """A bzImage as the boot protocol describes it: one boot sector, three setup sectors, then the payload at 0x40."""
    setup = bytearray(4 * 512)
    setup[0x1F1] = 3
    setup[0x1FE:0x200] = b"\x55\xaa"
    setup[0x202:0x206] = b"HdrS"
    struct.pack_into("<II", setup, 0x248, 0x40, len(packed) + 4)
    return bytes(setup) + b"\x90" * 0x40 + packed + struct.pack("<I", unpacked_size) + b"trailing code"


def lz4_legacy(data: bytes) -> bytes:
    lz4 = process.find("lz4")
    if lz4 is None:
        pytest.skip("lz4 is not installed")
    return subprocess.run([lz4, "-l", "-c"], input=data, capture_output=True, check=True).stdout


@pytest.mark.parametrize(
    "pack",
    [lz4_legacy, gzip.compress, lambda data: lzma.compress(data, check=lzma.CHECK_CRC32), zstandard.compress, bytes],
    ids=["lz4", "gzip", "xz", "zstd", "plain"],
)
def test_kernel_is_unpacked_whatever_the_distribution_packed_it_with(pack: Callable[[bytes], bytes]) -> None:
    image = bzimage(pack(ELF), len(ELF))
    assert asyncio.run(kernel.vmlinux(image)) == ELF


def test_unknown_packing_is_refused_and_named() -> None:
    with pytest.raises(FailedPrecondition, match="unknown way"):
        asyncio.run(kernel.vmlinux(bzimage(b"LZIP whatever", 10)))


def test_packed_file_that_is_no_kernel_is_refused() -> None:
    with pytest.raises(FailedPrecondition, match="no ELF"):
        asyncio.run(kernel.vmlinux(bzimage(gzip.compress(b"not a kernel"), 12)))


def test_file_that_is_no_bzimage_is_refused() -> None:
    with pytest.raises(FailedPrecondition, match="not a bzImage"):
        asyncio.run(kernel.vmlinux(bytes(4096)))


def test_signature_of_a_module_is_taken_off_and_nothing_else() -> None:
    module, signature = b"\x7fELF module", b"PKCS7" * 30
    info = bytes([0, 0, 2, 0, 0, 0, 0, 0]) + struct.pack(">I", len(signature))
    signed = module + signature + info + b"~Module signature appended~\n"
    assert kernel.unsigned(signed) == module
    assert kernel.unsigned(module) == module
    assert kernel.lean(module) == module  # too short to be an ELF file of 64 bits


def elf_with_sections(*names: bytes) -> bytes:
    """An ELF file with allocated, empty sections of these names; the last section is the table of names."""
    table, names_at = 64, 64 + 64 * (len(names) + 1)
    strings = b"\0" + b"\0".join((*names, b".shstrtab")) + b"\0"
    headers = b""
    for name in (*names, b".shstrtab"):
        headers += struct.pack("<IIQQQQIIQQ", strings.index(name + b"\0"), 1, 2, 0, names_at, len(strings), 0, 0, 1, 0)
    ident = b"\x7fELF\x02\x01\x01" + bytes(9)
    counts = (64, 0, 0, 64, len(names) + 1, len(names))
    return ident + struct.pack("<HHIQQQIHHHHHH", 1, 62, 1, 0, 0, table, 0, *counts) + headers + strings


def test_slow_sections_of_a_module_are_hidden_and_all_others_stay_as_they_are() -> None:
    module = elf_with_sections(b".text", b".BTF", b".rela.orc_unwind_ip", b".orc_unwind_ip", b".data")
    lean = kernel.lean(module)
    assert len(lean) == len(module)
    headers = [lean[64 + 64 * n : 128 + 64 * n] for n in range(6)]
    originals = [module[64 + 64 * n : 128 + 64 * n] for n in range(6)]
    hidden = [n for n in range(6) if headers[n] != originals[n]]
    assert hidden == [1, 3]
    for n in hidden:
        name, flags = struct.unpack_from("<I4xQ", headers[n])
        assert (name, flags) == (0, 0)
    assert lean[64 * 7 :] == module[64 * 7 :]


def test_modules_come_after_everything_they_need_and_only_once(tmp_path: Path) -> None:
    (tmp_path / "modules.dep").write_text(
        "kernel/virtio.ko: kernel/virtio_ring.ko\nkernel/virtio_ring.ko:\n"
        "kernel/virtio-net.ko: kernel/net_failover.ko kernel/failover.ko kernel/virtio.ko kernel/virtio_ring.ko\n"
        "kernel/net_failover.ko: kernel/failover.ko\nkernel/failover.ko:\n"
    )
    order = [path.stem for path in kernel.load_order(tmp_path, ["virtio", "virtio_net", "built-in-one"])]
    assert order == ["virtio_ring", "virtio", "failover", "net_failover", "virtio-net"]
