"""Kinds of files that a source does not read: what to do with them instead, as the end of a message."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePosixPath

_CONVERT = (
    "write the images as files into a folder for each class, or get the data set as Parquet files, as the Hugging Face "
    "Hub has most, and set prepare_data.source to parquet: files of this kind are not read"
)
UNREAD_PICTURES = (".jxl", ".dcm", ".nii", ".svg", ".psd", ".exr")
"""Endings of pictures in formats that are not read."""
ARCHIVES = (".tar", ".zip", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
_TAR = r".*\.tar"
# By patterns of files' names in lower case; the first that any name has counts.
_KINDS = {
    r"ilsvrc2012_img_.*\.tar": "set prepare_data.source to imagenet to read ImageNet's own archives",
    r"n\d{8}\.tar": "unpack each class archive (nXXXXXXXX.tar) into a folder of its name",
    _TAR: "set prepare_data.source to webdataset to read images inside these files",
    r".*\.parquet": "set prepare_data.source to parquet to read images inside these files",
    r".*\.(mdb|lmdb)": "set prepare_data.source to lmdb to read LMDB files",
    r".*\.(npz|npy|h5|hdf5|mat)|.*[-.]idx[13]-ubyte(\.gz)?": "set prepare_data.source to arrays to read arrays of "
    "images in .npz, .npy, HDF5, .mat and idx files",
    r"fine_label_names\.txt|(train|test|unlabeled)_x\.bin": "set prepare_data.source to arrays to read the binary "
    "versions of CIFAR-100 and STL-10",
    r"(data_batch_\d|test_batch)(\.bin)?": "set prepare_data.source to cifar10 to read CIFAR-10's binary version",
    r"file\.txt~": "get CIFAR-100's binary version, unpack it and set prepare_data.source to arrays: pickles are not "
    "read",
    r".*\.arrow": "set prepare_data.source to arrow to read images inside these files",
    r".*\.(tfrecords?|tfrec)(-\d+-of-\d+)?|.*-\d{5}-of-\d{5}": "set prepare_data.source to tfrecord to read TFRecord "
    "files",
    r".*\.(beton|rec|bin|pt|pth|pkl|pickle)": _CONVERT,
    r".*\.(rar|7z|t?zst|z\d\d|(zip|tar|gz|tgz|7z|rar)\.(\d{2,3}|a[a-z]))": "unpack it, from all its parts if there are "
    "several: archives of this kind are not read",
    rf".*({'|'.join(map(re.escape, UNREAD_PICTURES))})": "convert them to PNG or JPEG",
}


def read_otherwise(files: Sequence[str]) -> str:
    """What to do with files of which none is an image, or "" if nothing is known of them.

    Args:
        files: their paths; of a folder's files, or one alone.
    """
    names = [PurePosixPath(name).name.lower() for name in files]
    archives = [name for name in files if name.lower().endswith(ARCHIVES)]
    packed = [name for name in archives if not name.lower().endswith(".tar")]  # beside which a .tar is hardly a shard
    for pattern, remedy in _KINDS.items():
        if any(re.fullmatch(pattern, name) for name in names) and not (pattern == _TAR and packed):
            return remedy
    if archives:
        return f"set prepare_data.path to the archive itself, such as {(packed or archives)[0]}, or unpack it"
    return ""
