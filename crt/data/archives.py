"""Members of tar and zip archives by byte offset, so that images are read where they lie."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import posixpath
import re
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Literal

from crt import interrupt
from crt.data.listing import printable
from crt.errors import UserError
from crt.files import replacing
from crt.progress import Progress

Kind = Literal["tar", "zip", "gzip", "bzip2", "xz"]
# Offset, size and checksum (-1: none) of a member, as in the fields of `crt.data.listing.PLACE`.
Members = dict[str, tuple[int, int, int]]

_MAGIC: dict[bytes, Kind] = {
    b"PK\x03\x04": "zip",
    b"PK\x05\x06": "zip",
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
}
_TAR_BLOCK = 512
_COPY_BYTES = 1 << 20
_MAX_LINKS = 8


def archive_kind(path: Path) -> Kind:
    """The kind of an archive, by its content.

    Raises:
        UserError: the file is none, or cannot be read.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(_TAR_BLOCK)
        for magic, kind in _MAGIC.items():
            if start.startswith(magic):
                return kind
        with tarfile.open(path, "r:"):
            return "tar"
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): fix that and run again") from None
    except tarfile.TarError:
        raise UserError(f"{path}: no archive: give a folder, or a .tar, .tar.gz or .zip file") from None


def list_tar(path: Path, name: str) -> tuple[Members, set[str]]:
    """Regular files of an uncompressed tar, with links between them resolved, and its folders.

    Args:
        name: how messages call the archive.

    Raises:
        UserError: the archive is damaged or cut short, or a member or link points outside it.
    """
    members: Members = {}
    folders: set[str] = set()
    links: dict[str, str] = {}
    with open(path, "rb") as file:
        end = os.fstat(file.fileno()).st_size
        progress = Progress(f"reading {Path(name).name}", max(end >> 20, 1), "MiB")
        for member in tar_members(file, 0, end, name):
            progress.update(min(member.offset >> 20, progress.total - 1))
            interrupt.raise_if_stopped()
            inside = _inside(member.name, name)
            if member.issparse():
                raise UserError(f"{name}: {member.name} is stored as a sparse file: pack the archive without --sparse")
            if member.isreg():
                members[inside] = (member.offset_data, member.size, -1)
            elif member.isdir():
                folders.add(inside)
            elif member.issym() or member.islnk():
                # A symbolic link is relative to its own folder, a hard link to the archive's root.
                base = posixpath.dirname(inside) if member.issym() else ""
                links[inside] = _link_target(member.linkname, name, base)
        progress.update(progress.total)
    return _with_links(members, links), folders


def tar_members(file: IO[bytes], start: int, end: int, name: str) -> Iterator[tarfile.TarInfo]:
    """Headers of the tar that lies in bytes `start` to `end` of a file, which may itself be a tar.

    Offsets count from the file's beginning. Memory does not grow with the number of members.

    Raises:
        UserError: it is damaged or cut short.
    """
    file.seek(start)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None and member.offset < end:
                if member.offset_data + member.size > end and not member.issparse():  # whose size is that without holes
                    raise UserError(f"{name}: cut short in {printable(member.name)}: fetch it again")
                yield member
                tar.members.clear()  # type: ignore[attr-defined]
            # tarfile takes a damaged header for the end; the real end is a block of zeros, or the file's.
            file.seek(tar.offset)
            if any(file.read(min(_TAR_BLOCK, max(end - tar.offset, 0)))):
                raise UserError(f"{name}: damaged at byte {tar.offset}: fetch it again")
    except (tarfile.TarError, EOFError):
        raise UserError(f"{name}: no tar archive, or damaged: fetch it again") from None


def list_zip(path: Path) -> tuple[Members, set[str]]:
    """Files of a zip, with links between them resolved, and its folders. Offsets are those of local headers.

    Raises:
        UserError: the archive is damaged, encrypted or packed by a rare method, or a member points outside it.
    """
    members: Members = {}
    folders: set[str] = set()
    links: dict[str, str] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                inside = _inside(info.filename.replace("\\", "/"), str(path))
                if info.is_dir():
                    folders.add(inside)
                    continue
                if info.flag_bits & 1:
                    raise UserError(f"{path}: {info.filename} is encrypted: pack the archive without a password")
                if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise UserError(f"{path}: {info.filename} is packed by method {info.compress_type}: use deflate")
                if stat.S_ISLNK(info.external_attr >> 16):
                    target = archive.read(info).decode("utf-8", "surrogateescape")
                    links[inside] = _link_target(target, str(path), posixpath.dirname(inside))
                else:
                    members[inside] = (info.header_offset, info.compress_size, info.CRC)
    except (zipfile.BadZipFile, NotImplementedError, EOFError, zlib.error):
        raise UserError(f"{path}: damaged zip archive: fetch it again") from None
    return _with_links(members, links), folders


def unpacked(path: Path, kind: Kind, work: Path) -> Path:
    """Decompress a whole tar into `work`; what an earlier run finished there is used again.

    Raises:
        UserError: the archive is damaged or cut short, or holds no tar.
    """
    target, record = work / "unpacked.tar", work / "unpacked.json"
    state = path.stat()
    identity = {"path": str(path), "bytes": state.st_size, "modified": state.st_mtime_ns}
    if not (target.exists() and _read_json(record) == identity):
        record.unlink(missing_ok=True)
        _decompress(path, kind, target)
        record.write_text(json.dumps(identity))
    try:
        with tarfile.open(target, "r:"):
            return target
    except tarfile.TarError:
        raise UserError(f"{path}: no archive: the compressed file holds no tar") from None


def _decompress(path: Path, kind: Kind, target: Path) -> None:
    openers: dict[str, Any] = {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open}
    try:
        with (
            replacing(target) as temporary,
            open(path, "rb") as packed,
            openers[kind](packed) as content,
            open(temporary, "wb") as out,
        ):
            total = max(os.fstat(packed.fileno()).st_size >> 20, 1)
            progress = Progress(f"unpacking {path.name}", total, "MiB")
            while block := content.read(_COPY_BYTES):
                out.write(block)
                progress.update(min(packed.tell() >> 20, total - 1))
                interrupt.raise_if_stopped()
            progress.update(total)
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile):
        raise UserError(f"{path}: damaged or cut short: fetch it again") from None
    except OSError as error:
        if error.errno is not None:
            raise
        raise UserError(f"{path}: damaged or cut short: fetch it again") from None  # bz2 says it so


def _inside(member: str, archive: str) -> str:
    """A member's path in normal form.

    Raises:
        UserError: it is absolute or climbs.
    """
    if member.startswith("/") or re.match("[A-Za-z]:/", member) or ".." in member.split("/"):
        raise UserError(f"{archive}: member {member!r} may lead outside the archive: refused, get a clean archive")
    return posixpath.normpath(member)


def _link_target(target: str, archive: str, base: str) -> str:
    """Path of what a link in folder `base` of the archive points to.

    Raises:
        UserError: that is outside the archive.
    """
    path = posixpath.normpath(posixpath.join(base, target))
    if path.startswith("/") or path.split("/")[0] == "..":
        raise UserError(f"{archive}: a link points to {target!r}, outside the archive: refused, get a clean archive")
    return path


def _with_links(members: Members, links: dict[str, str]) -> Members:
    """Members and the links that end at one; links to folders and to nothing are dropped."""
    resolved = dict(members)
    for name in links:
        target = name
        for _ in range(_MAX_LINKS):
            target = links.get(target, target)
        if target in members:
            resolved[name] = members[target]
    return resolved


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None
