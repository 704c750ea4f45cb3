"""`python -m crt evaluator_check`: our score of real ImageNet images beside the published one.

The 50,000 validation images against the ADM batch: whoever gets the published figures has the right weights, resize,
reference and formulas. Anything else means that no FID of this machine compares with a paper's. Needs prepared
ImageNet data and the ADM batch file; minutes on a GPU.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from crt import interrupt
from crt.chunks import ChunkStore
from crt.commands.check import add_arguments as add_params_argument
from crt.distributed import World
from crt.errors import UserError
from crt.evaluation.features import TENSORFLOW_RESIZE, FeatureNetwork, InceptionFeatures
from crt.evaluation.metrics import distances, open_reference, stored_moments
from crt.evaluation.precision_recall import inception_score, precision_recall
from crt.evaluation.shared import shared_path
from crt.evaluation.sources import AdmBatch, ImageSource, SplitSource
from crt.locks import exclusively
from crt.manifest import read_manifest
from crt.params import load_params
from crt.pictures import spread
from crt.pipeline import load_stages, path_variables
from crt.progress import start_logging

# Of ADM's evaluator on the real validation images, as LlamaGen's repository lists them.
PUBLISHED = {"FID": 1.684, "sFID": 3.692, "inception score": 231.8, "precision": 0.752, "recall": 0.671}
_IMAGES, _SIDE = 50_000, 256
# Another decoder or resize of the images moves the figures by less, a wrong resize or reference by more.
_TOLERANCE = 0.03


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the params file and the prepared data."""
    add_params_argument(parser)
    parser.add_argument(
        "--data", type=Path, metavar="FOLDER", help="ImageNet as prepare_data left it (default: its output)"
    )


def run(args: argparse.Namespace) -> int:
    """Measure and print; status 1 if the figures are not the published ones.

    Raises:
        UserError: data, reference or weights are missing or wrong.
        Stopped: a signal arrived; features that were taken are kept.
    """
    # Here, since the help is for those too who are in no project.
    folder = args.data or Path(load_stages()["prepare_data"].output)
    params = load_params(args.params)
    if params.evaluate.adm_reference is None:
        raise UserError("evaluate.adm_reference: null, but the check needs VIRTUAL_imagenet256_labeled.npz: set it")
    manifest = read_manifest(folder)
    source = manifest.params["prepare_data"]["source"]
    if source != "imagenet":
        raise UserError(f"{folder}: holds {source}, the published figures are for ImageNet: give --data of it")
    start_logging(None)
    interrupt.listen()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = InceptionFeatures(params.evaluate.inception_weights, TENSORFLOW_RESIZE, device)
    reference = AdmBatch(params.evaluate.adm_reference)
    if reference.image_size != _SIDE:
        raise UserError(f"{reference.path}: its images have {reference.image_size} pixels a side instead of {_SIDE}")
    images = SplitSource(folder, "val", _SIDE, manifest.content)
    ours, warnings = score(
        network,
        images,
        reference,
        shared=Path(path_variables()["shared"]),
        batch_size=params.evaluate.batch_size,
        neighbours=params.evaluate.neighbours,
        splits=params.evaluate.inception_score_splits,
    )
    if len(images) != _IMAGES:
        warnings.append(f"{len(images)} validation images instead of all {_IMAGES}: the published figures are for all")
    agrees = True
    print(f"\n  {'':16} {'ours':>9} {'published':>10} {'difference':>11}")
    for name, value in ours.items():
        difference = value / PUBLISHED[name] - 1
        agrees &= abs(difference) <= _TOLERANCE
        print(f"  {name:16} {value:9.4g} {PUBLISHED[name]:10.4g} {difference:+10.1%}")
    for warning in warnings:
        print(f"\nwarning: {warning}")
    print(f"\n{'agrees with' if agrees else 'differs from'} the published figures (tolerance {_TOLERANCE:.0%})\n")
    return 0 if agrees else 1


def score(
    network: FeatureNetwork,
    images: ImageSource,
    reference: ImageSource,
    *,
    shared: Path,
    batch_size: int,
    neighbours: int,
    splits: int,
) -> tuple[dict[str, float], list[str]]:
    """FID, sFID, inception score, precision and recall of images against a reference, and warnings.

    Args:
        network: whose features count.
        images: to score.
        reference: what they are held against.
        shared: folder that keeps the features.
        batch_size: images worked on at once.
        neighbours: k of precision and recall.
        splits: parts of the inception score.
    """
    stored = stored_moments(reference, network)
    stores = [_features(network, source, shared, batch_size) for source in (images, reference)]
    moments = open_reference(stores[1], network, stored).moments
    warnings: list[str] = []
    names = {"features": "FID", "spatial": "sFID"}
    found = distances(stores[0], moments, names, "validation images", warnings)
    figures = {name: distance for name, (distance, _) in found.items()}
    if "features" not in stored:
        warnings.append(
            f"{reference.name} holds no moments of the whole training set, from which the published FID is: "
            "fetch ADM's own file"
        )
    probabilities = np.concatenate([network.probabilities(part) for part in stores[0].parts("features")])
    columns = [store.column("features", spread(store.count, _IMAGES)) for store in stores]
    precision, recall = precision_recall(columns[0], columns[1], neighbours, network.device)
    figures |= {
        "inception score": inception_score(probabilities, splits, seed=0)[0],
        "precision": precision,
        "recall": recall,
    }
    return figures, warnings


def _features(network: FeatureNetwork, source: ImageSource, shared: Path, batch_size: int) -> ChunkStore:
    recipe = {
        "images": [source.checksum, source.name, source.image_size, len(source)],
        "features": [network.checksum, network.resize, network.spatial_dimension],
    }
    path = shared_path(shared, "evaluator-check", recipe)
    store = ChunkStore(path, len(source), batch_size)

    def work(start: int, stop: int) -> dict[str, np.ndarray]:
        return network.arrays(source.read(start, stop))

    with exclusively(path):
        store.fill(source.name, work, World(0, 1, network.device))
    return store
