"""Files and directory trees in the guest. Bodies are streamed both ways; nothing holds a whole file."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.responses import Response

from limpet.api._endpoint import RAW, TAR, Call, Endpoint, Many, Raw, stream
from limpet.api.queries import DeleteQuery, MkdirBody, PathQuery, RenameBody, UnpackQuery, WriteQuery
from limpet.models import FileInfo, Unpacked

_FILES = "/v1/sandboxes/{name}/files"
_ARCHIVE = "/v1/sandboxes/{name}/archive"


async def read_file(call: Call) -> Response:
    # No Content-Length: a file may grow or shrink while it is read.
    body = await call.services.files.read(call.name, call.query(PathQuery).path)
    return await stream(body.chunks, RAW)


async def write_file(call: Call) -> FileInfo:
    query = call.query(WriteQuery)
    return await call.services.files.write(
        call.name, query.path, call.chunks(), mode=query.mode, user=query.user, parents=query.parents, size=call.size
    )


async def remove_file(call: Call) -> None:
    query = call.query(DeleteQuery)
    await call.services.files.remove(call.name, query.path, recursive=query.recursive)


async def stat_file(call: Call) -> FileInfo:
    return await call.services.files.stat(call.name, call.query(PathQuery).path)


async def list_files(call: Call) -> Sequence[FileInfo]:
    return await call.services.files.list(call.name, call.query(PathQuery).path)


async def make_directory(call: Call) -> None:
    body = call.body(MkdirBody)
    await call.services.files.mkdir(call.name, body.path, parents=body.parents, mode=body.mode)


async def rename_file(call: Call) -> None:
    body = call.body(RenameBody)
    await call.services.files.rename(call.name, body.source, body.target)


async def pack_archive(call: Call) -> Response:
    return await stream(await call.services.files.pack(call.name, call.query(PathQuery).path), TAR)


async def unpack_archive(call: Call) -> Unpacked:
    query = call.query(UnpackQuery)
    return await call.services.files.unpack(call.name, query.path, call.chunks(), user=query.user)


ROUTES = (
    Endpoint("GET", _FILES, read_file, "Read a file", Raw(), query=PathQuery),
    Endpoint("PUT", _FILES, write_file, "Replace a file, atomically", FileInfo, query=WriteQuery, body=Raw()),
    Endpoint("DELETE", _FILES, remove_file, "Remove a file or directory", query=DeleteQuery),
    Endpoint("GET", _FILES + "/stat", stat_file, "What a path is", FileInfo, query=PathQuery),
    Endpoint("GET", _FILES + "/list", list_files, "What is in a directory", Many(FileInfo), query=PathQuery),
    Endpoint("POST", _FILES + "/mkdir", make_directory, "Make a directory", body=MkdirBody),
    Endpoint("POST", _FILES + "/rename", rename_file, "Rename within the guest", body=RenameBody),
    Endpoint("GET", _ARCHIVE, pack_archive, "A directory as a tar stream", Raw(TAR), query=PathQuery),
    Endpoint("PUT", _ARCHIVE, unpack_archive, "Unpack a tar stream", Unpacked, query=UnpackQuery, body=Raw(TAR)),
)  # fmt: skip
