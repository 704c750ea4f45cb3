"""What Snakemake believes of a stage's outputs, and where a stage knows better.

A result appears with its stamp in one rename, so what exists is complete. Snakemake cannot know that: it marks the
outputs of each job while that runs, and after `kill -9` of Snakemake itself the marks stay, also those of stages that
went on alone and ended well.
"""

from __future__ import annotations

import base64
import binascii
import os
from collections.abc import Iterable
from pathlib import Path

MARKS = Path(".snakemake/incomplete")
# In the environment of stages while Snakemake runs with -F, -f or -R: a complete result without its stamp is to be made
# again. Without it, the stamp is all that such a result has lost.
MAKE_ANEW = "CRT_MAKE_ANEW"


def forget_incomplete(outputs: Iterable[str], marks: Path = MARKS) -> None:
    """Remove Snakemake's marks from outputs that exist: it would refuse to start, or make them again.

    A mark is a file whose name is the output's in base64; where that is long, in folders that begin with @.
    """
    known = set(outputs)
    for folder, _, names in os.walk(marks):
        for name in names:
            path = Path(folder, name)
            text = "".join(part.removeprefix("@") for part in path.relative_to(marks).parts)
            try:
                output = base64.urlsafe_b64decode(text).decode()
            except (binascii.Error, UnicodeDecodeError):
                continue
            if output in known and os.path.exists(output):
                path.unlink(missing_ok=True)
