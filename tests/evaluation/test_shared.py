"""Where evaluations keep what they share."""

from __future__ import annotations

from pathlib import Path

from crt.evaluation.shared import shared_path


def test_a_place_depends_on_the_whole_recipe():
    places = {
        shared_path(Path("x"), kind, recipe)
        for kind in ("classifier", "features")
        for recipe in ({"a": 1, "b": [1, 2]}, {"a": 1, "b": [2, 1]}, {"a": 2, "b": [1, 2]})
    }
    assert len(places) == 6
    assert shared_path(Path("x"), "k", {"a": 1, "b": 2}) == shared_path(Path("x"), "k", {"b": 2, "a": 1})
