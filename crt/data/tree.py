"""The files of a folder or an archive, as one kind of thing."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from crt.data.archives import archive_kind, list_tar, list_zip, unpacked
from crt.data.listing import PLACE, Container
from crt.errors import UserError
from crt.interrupt import raise_if_stopped
from crt.progress import Progress

EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp"),
    *(".tif", ".tiff", ".gif", ".avif", ".heic", ".heif", ".hif", ".jp2", ".j2k", ".jpx"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
)
# Of macOS, Windows, network drives of Synology (whose @eaDir hold thumbnails of the images beside) and disks' roots.
_CLUTTER = ("__MACOSX", "Thumbs.db", "desktop.ini", "$RECYCLE.BIN", "System Volume Information", "@eaDir", "lost+found")


@dataclass(frozen=True)
class Tree:
    """Files and folders by path relative to the root, with `/` between the parts; hidden ones are left out."""

    name: str
    """How messages call it: the path that the user gave."""
    container: Container
    files: list[str]
    """Sorted."""
    places: np.ndarray
    """(n,) of type PLACE, in container 0."""
    folders: set[str]

    @property
    def unpack_first(self) -> str:
        """How the remedy begins that moves files or names a folder inside."""
        return "" if self.container.layout == "folder" else "unpack it and "


def open_tree(path: Path, key: str, work: Path) -> Tree:
    """List a folder or an archive (.tar, also compressed, or .zip, told apart by content).

    Nothing is unpacked, except that a compressed tar is decompressed into `work` as a whole, since it offers
    no way to reach a file but through all that precede it.

    Args:
        path: the folder or archive.
        key: the params key that named it, for messages.
        work: for the decompressed tar; one that an earlier run left there is used again.

    Raises:
        UserError: missing, unreadable, no archive, damaged, or with a member that points outside.
    """
    try:
        state = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: not found: set {key} to a folder or archive that exists") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): fix that and run again") from None
    if stat.S_ISDIR(state.st_mode):
        return folder_tree(path)
    kind = archive_kind(path)
    if kind == "zip":
        container, (members, folders) = Container(str(path), "zip"), list_zip(path)
    else:
        plain = path if kind == "tar" else unpacked(path, kind, work)
        container, (members, folders) = Container(str(plain), "tar"), list_tar(plain, str(path))
    files = sorted(name for name in members if not is_clutter(name))
    places = np.array([(0, *members[name], state.st_mtime_ns) for name in files], PLACE)
    parents = {parent for name in files for parent in _parents(name)}
    return Tree(str(path), container, files, places, parents | {name for name in folders if not is_clutter(name)})


def folder_tree(root: Path) -> Tree:
    """List a folder; links to folders are followed.

    Raises:
        UserError: a folder cannot be read.
        Stopped: a signal arrived.
    """
    states: dict[str, tuple[int, int]] = {}
    folders: set[str] = set()
    progress = Progress(f"listing {root.name}", 0, "files")
    for name, state in _walk(root, "", (os.path.realpath(root),)):
        progress.update(len(states))
        raise_if_stopped()
        if state is None:
            folders.add(name)
        else:
            states[name] = state
    progress.total = len(states)
    progress.update(len(states))
    files = sorted(states)
    places = np.fromiter(((0, 0, states[name][0], -1, states[name][1]) for name in files), PLACE, len(files))
    return Tree(str(root), Container(str(root), "folder"), files, places, folders)


def _walk(folder: Path | str, prefix: str, ancestors: tuple[str, ...]) -> Iterator[tuple[str, tuple[int, int] | None]]:
    """(relative path, `_state` or None for a folder) of all that lies below.

    A link to a folder that holds it is not followed.
    """
    try:
        with os.scandir(folder) as entries:
            found = [entry for entry in entries if not is_clutter(entry.name)]
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror}): make it readable and run again") from None
    for entry in found:
        name = prefix + entry.name
        if not _is_folder(entry):
            # Broken links too: the decoder will list them with the reason.
            if entry.is_symlink() or entry.is_file():
                yield name, _state(entry)
            continue
        real = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(ancestors[-1], entry.name)
        if real not in ancestors:
            yield name, None
            yield from _walk(entry.path, name + "/", (*ancestors, real))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder, or a link to one; a link that leads nowhere, as in a loop of links, is none.

    Raises:
        UserError: the file system does not say.
    """
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            return False
        raise UserError(f"{entry.path}: cannot be read ({error.strerror}): fix that and run again") from None


def _state(entry: os.DirEntry[str]) -> tuple[int, int]:
    """Size of a file and when it was last changed (ns); zeros where it cannot be told, as of a broken link."""
    try:
        found = entry.stat()
    except OSError:
        return 0, 0
    return found.st_size, found.st_mtime_ns


def is_image(name: str) -> bool:
    """Whether a file counts as an image by its name; its content is another matter."""
    return name.lower().endswith(EXTENSIONS)


def is_clutter(name: str) -> bool:
    """Whether a path has a hidden part (.DS_Store, ._a.jpg), or one that systems leave behind."""
    return any(part.startswith(".") or part in _CLUTTER for part in name.split("/"))


def _parents(name: str) -> Iterator[str]:
    while "/" in name:
        name = name.rpartition("/")[0]
        yield name
