"""Oracle: torchvision's class names in the order that its published models use, and the folders of real images."""

from __future__ import annotations

import json
from pathlib import Path

import crt.data.synsets
from crt.data.synsets import class_names, imagenet_names


def plain(name: str) -> str:
    return name.lower().replace("-", " ")


def test_ids_are_the_1000_in_sorted_order_and_names_are_unique():
    names = imagenet_names()
    assert len(names) == 1000 and list(names) == sorted(names)
    assert len({name.lower() for name in names.values()}) == 1000
    assert names["n01440764"] == "tench" and names["n02012849"] == "crane (n02012849)"


def test_order_and_first_lemmas_are_those_of_published_models():
    from torchvision.models._meta import _IMAGENET_CATEGORIES

    path = Path(crt.data.synsets.__file__).with_name("imagenet_synsets.json")
    lemmas = json.loads(path.read_text(encoding="utf-8"))["synsets"]
    differing = {
        index: (text.split(",")[0], theirs)
        for index, (text, theirs) in enumerate(zip(lemmas.values(), _IMAGENET_CATEGORIES, strict=True))
        if plain(text.split(",")[0]) != plain(theirs)
    }
    # torchvision tells namesakes apart in its own way: the bird from the machine, and two swimsuits.
    assert differing == {134: ("crane", "crane bird"), 639: ("maillot", "maillot tank suit")}


def test_the_sample_of_real_images_is_named(imagenet_sample):
    folders = sorted(path.name for path in imagenet_sample.iterdir() if path.is_dir())
    assert len(folders) > 100
    assert class_names(folders) == [imagenet_names()[folder] for folder in folders]


def test_other_folders_keep_their_names():
    assert class_names(["n01440764", "cats"]) == ["n01440764", "cats"]
