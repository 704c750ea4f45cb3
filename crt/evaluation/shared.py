"""What evaluations of the same data have in common, made once: the classifier, features of real images, and those of a
tokenizer's reconstructions.

Each thing lies in the shared folder under a fingerprint of all that it depends on, so that it is never stale and runs,
studies and restarts find each other's. One process makes it while the others wait (`crt.locks`), and what a killed one
had finished is kept. Deleting the folder costs time only.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from crt.pipeline import canonical_json

# Raised when the code changes what is kept.
VERSION = 4


def shared_path(folder: Path, kind: str, recipe: Any) -> Path:
    """Where a thing lies: KIND-FINGERPRINT in the shared folder, which need not exist yet.

    Args:
        folder: the shared folder.
        kind: such as "classifier".
        recipe: all that the thing depends on, as plain values.
    """
    key = hashlib.sha256(canonical_json([VERSION, kind, recipe]).encode()).hexdigest()
    return folder / f"{kind}-{key[:16]}"
