"""Making folders where a user asked for them."""

from __future__ import annotations

from pathlib import Path

from crt.errors import UserError


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it, unless it is there.

    Raises:
        UserError: something that is no folder lies there, or its place takes none, such as /proc.
        OSError: the disk's own, which the command line explains.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise UserError(f"{folder}: is no folder: move it away, or choose another place") from None
    except FileNotFoundError:
        above = next(parent for parent in folder.absolute().parents if parent.exists())
        raise UserError(f"{above}: no folder can be made in it: choose another place than {folder}") from None
