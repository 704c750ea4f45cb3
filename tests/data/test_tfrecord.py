"""Oracle: TensorBoard's writer of TFRecord files, and protobuf's own encoder of `tf.train.Example`."""

from __future__ import annotations

from contextlib import suppress
from io import BytesIO

import numpy as np
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c as of_tensorboard
from tensorboard.summary.writer.record_writer import RecordWriter

from crt.data.listing import read_entry
from crt.data.packed import PackedImages
from crt.data.tfrecord import masked_crc32c, open_tfrecords
from crt.errors import UserError

TFRECORD = {"source": "tfrecord"}


def example_class(*, packed: bool):
    """`tf.train.Example` by TensorFlow's example.proto and feature.proto; integers packed or each by itself."""
    file = descriptor_pb2.FileDescriptorProto(name=f"example_{packed}.proto", package=f"p{packed}", syntax="proto3")
    field = descriptor_pb2.FieldDescriptorProto

    def message(name, *fields):
        added = file.message_type.add(name=name)
        for number, (called, kind, label, inner) in enumerate(fields, 1):
            entry = added.field.add(name=called, number=number, type=kind, label=label)
            if inner:
                entry.type_name = f".p{packed}.{inner}"
            elif kind != field.TYPE_BYTES and label == field.LABEL_REPEATED:
                entry.options.packed = packed
        return added

    one, many, nested = field.LABEL_OPTIONAL, field.LABEL_REPEATED, field.TYPE_MESSAGE
    message("BytesList", ("value", field.TYPE_BYTES, many, None))
    message("FloatList", ("value", field.TYPE_FLOAT, many, None))
    message("Int64List", ("value", field.TYPE_INT64, many, None))
    lists = [(f"{name.lower()}_list", nested, one, f"{name}List") for name in ("Bytes", "Float", "Int64")]
    message("Feature", *lists)
    message("Entry", ("key", field.TYPE_STRING, one, None), ("value", nested, one, "Feature"))  # of a map
    message("Features", ("feature", nested, many, "Entry"))
    message("Example", ("features", nested, one, "Features"))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"p{packed}.Example"))


EXAMPLES = {packed: example_class(packed=packed) for packed in (True, False)}


def example(features, *, packed=True) -> bytes:
    made = EXAMPLES[packed]()
    for name, values in features.items():
        several = values if isinstance(values, list) else [values]
        entry = made.features.feature.add(key=name)
        kind = {bytes: "bytes_list", int: "int64_list", float: "float_list"}[type(several[0])]
        getattr(entry.value, kind).value.extend(several)
    return made.SerializeToString()


def records(*data: bytes) -> bytes:
    file = BytesIO()
    file.close, writer = lambda: None, RecordWriter(file)
    for one in data:
        writer.write(one)
    return file.getvalue()


def labels(out, split):
    part = PackedImages(out, split)
    return {part.source_id(row): part.class_names[part.labels[row]] for row in range(len(part))}


def test_the_checksum_is_tensorboards():
    for size in (0, 1, 8, 300):
        data = np.random.default_rng(size).bytes(size)
        assert masked_crc32c(data) == of_tensorboard(data)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    "names", ["mnist-{}.tfrecord-0000{}-of-00002", "{}-0000{}-of-00002", "{}/0{}.tfrec", "data/{}_{}.TFRecords"]
)
def test_files_as_tensorflow_datasets_and_others_have_them(prepare, make, tmp_path, names, packed):
    expected, seed = {}, 0
    for split, part in (("train", 0), ("train", 1), ("test", 0)):
        written = []
        for row in range(5):
            label = (row + part) % 3 - 1
            image = make.encode(make.noise(seed := seed + 1))
            features = {"label": label, "image": image, "fine": [1.0, 2.0], "ids": [1, 2], "name": b"x"}
            written.append(example(features, packed=packed))
            expected.setdefault(split, {})[f"{names.format(split, part)}/{row:06d}"] = str(label)
        make.write(tmp_path / "data" / names.format(split, part), records(*written))
    make.write(tmp_path / "data" / "features.json", b"{}")
    status, out = prepare(path=tmp_path / "data", storage="encoded", image_size=None, **TFRECORD)
    assert status == 0
    assert PackedImages(out, "train").class_names == ["-1", "0", "1"]
    assert labels(out, "train") == expected["train"] and labels(out, "val") == expected["test"]


def test_images_are_read_where_they_lie(make, tmp_path):
    images = [make.encode(make.noise(seed)) for seed in range(3)]
    path = make.write(tmp_path / "a.tfrecord", records(*(example({"image": image, "label": 0}) for image in images)))
    source = open_tfrecords(path)
    found = source.splits["all"]
    assert [read_entry(source.containers, *entry) for entry in zip(found.ids, found.places, strict=True)] == images


@pytest.mark.parametrize("is_named", [True, False])
def test_imagenet_as_it_is_converted(make, tmp_path, is_named):
    """Its labels count from 1; WordNet ids, where there are some, are the classes."""
    wnids = ["n01440764", "n01443537"]
    for split in ("train", "validation"):
        written = []
        for row in range(4):
            features = {"image/encoded": make.encode(make.noise(row)), "image/class/label": row % 2 + 1}
            features |= {"image/class/synset": wnids[row % 2].encode()} if is_named else {}
            written.append(example(features))
        make.write(tmp_path / f"{split}-00000-of-00128", records(*written))
    source = open_tfrecords(tmp_path)
    assert source.class_ids == (wnids if is_named else ["1", "2"]) and set(source.splits) == {"train", "val"}
    assert source.class_names == (["tench", "goldfish"] if is_named else ["1", "2"])


def test_records_without_labels_are_one_class(prepare, make, tmp_path):
    written = [example({"image": make.encode(make.noise(seed))}) for seed in range(12)]
    status, out = prepare(path=make.write(tmp_path / "faces.tfrecords", records(*written)), **TFRECORD)
    assert status == 0 and PackedImages(out, "train").class_names == ["images"]


@pytest.mark.parametrize(
    ("features", "told"),
    [
        (
            {"data": b"raw", "shape": [3, 4, 4]},
            "record 1 has no feature image/encoded or image, but data, shape",
        ),
        ({"image": [1.0, 2.0], "label": 1}, "record 1 has no image file as its feature image"),
        ({"image": [b"1", b"2"], "label": 1}, "record 1 has no image file as its feature image"),
        ({"image": b"1", "label": [1, 2]}, "record 1 has as its feature label not one integer or text"),
        ({"image": b"1", "label": 1.0}, "record 1 has as its feature label not one integer or text"),
        ({"image": b"1"}, "a.tfrecord/000001 has no label (feature image/class/synset or image/class/label or label"),
        ({}, "record 1 is no tf.train.Example"),
    ],
)
def test_other_records_are_refused(refused, make, tmp_path, features, told):
    good = example({"image": make.encode(make.noise(1)), "label": 1})
    make.write(tmp_path / "a.tfrecord", records(good, example(features)))
    assert told in refused(path=tmp_path, **TFRECORD)


def test_files_that_are_not_right_are_refused(refused, make, tmp_path):
    assert "gone: not found: set prepare_data.path to a TFRecord file" in refused(path=tmp_path / "gone", **TFRECORD)
    make.write(tmp_path / "x.npz", b"data")
    assert "holds no TFRecord files" in (message := refused(path=tmp_path, **TFRECORD))
    assert "or set prepare_data.source to arrays" in message
    clean = records(*(example({"image": make.encode(make.noise(row)), "label": 1}) for row in range(2)))
    for damaged, told in (
        (clean[:-1], "cut short in record 1: get it again"),
        (clean + b"\0" * 5, f"no TFRecord file, compressed as a whole, or damaged at byte {len(clean)}"),
        (b"\x1f\x8b" + clean, "no TFRecord file, compressed as a whole, or damaged at byte 0"),
        (b"", "empty"),
        (records(b"\x0f\x01"), "record 0 is damaged"),
        (records(b"\x0a\x7f\x01"), "record 0 is damaged"),
        (records(b"\x0a\x80"), "record 0 is damaged"),
        (records(example({"image": b"abc"}).replace(b"\3abc", b"\7abc")), "record 0 is damaged"),
    ):
        make.write(tmp_path / "a.tfrecord", damaged)
        assert f"a.tfrecord: {told}" in refused(path=tmp_path, **TFRECORD)


def test_several_data_sets_are_not_mixed(refused, make, tmp_path):
    """As in the folder where TensorFlow Datasets keeps all, and versions of each."""
    for name in ("mnist/3.0.1/mnist-train.tfrecord-00000-of-00001", "mnist/3.0.0/mnist-train.tfrecord-00000-of-00001"):
        make.write(tmp_path / name, records(example({"image": b"1"})))
    told = (
        "mnist/3.0.0/mnist-train.tfrecord-00000-of-00001 and mnist/3.0.1/mnist-train.tfrecord-00000-of-00001 look like"
    )
    assert told in refused(path=tmp_path, **TFRECORD)


def test_random_damage_to_records_is_told(make, tmp_path):
    clean = bytearray(example({"image": b"0" * 40, "label": [300], "x": [1.0], "name": b"some"}))
    draw, path = np.random.default_rng(0), tmp_path / "a.tfrecord"
    for _ in range(2000):
        damaged = bytearray(clean)
        for place in draw.integers(len(clean), size=2):
            damaged[place] = draw.integers(256)
        make.write(path, records(bytes(damaged)))
        with suppress(UserError):
            open_tfrecords(path)
