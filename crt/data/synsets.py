"""The 1,000 ImageNet classes in the order that published models use: sorted WordNet ids."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path


@lru_cache(maxsize=1)
def imagenet_names() -> dict[str, str]:
    """Class name by WordNet id, in index order.

    A class is called by its synset's first lemma; where two classes share that, by all lemmas, and the id
    if they share those too. So names are unique.
    """
    path = Path(__file__).with_name("imagenet_synsets.json")
    lemmas: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))["synsets"]
    names = _told_apart({wnid: text.split(",")[0] for wnid, text in lemmas.items()}, lemmas)
    return _told_apart(names, {wnid: f"{name} ({wnid})" for wnid, name in names.items()})


def class_names(folders: Sequence[str]) -> list[str]:
    """What to call classes by their folders' names: ImageNet's names if all are ids of it, else as they are."""
    names = imagenet_names()
    return [names[folder] for folder in folders] if set(folders) <= names.keys() else list(folders)


def _told_apart(names: dict[str, str], longer: dict[str, str]) -> dict[str, str]:
    uses = Counter(name.lower() for name in names.values())
    return {wnid: longer[wnid] if uses[name.lower()] > 1 else name for wnid, name in names.items()}
