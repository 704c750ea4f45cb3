"""Oracles: the standard library's own extraction, and archives built to mislead."""

from __future__ import annotations

import errno
import io
import os
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from crt.data.archives import list_tar
from crt.data.decode import Undecodable
from crt.data.listing import read_entry
from crt.data.tree import open_tree
from crt.errors import UserError
from crt.interrupt import Stopped

FILES = {"b/2.png": b"two" * 500, "a/1.png": b"one", "a/inner/3.png": b"three", "readme.txt": b"", "ä ö/ü.png": b"4"}


def add(tar: tarfile.TarFile, name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "") -> None:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(data), kind, link
    tar.addfile(info, io.BytesIO(data))


def build_tar(path: Path, mode: str, entries: dict[str, bytes] | None = None, **options) -> Path:
    with tarfile.open(path, mode, **options) as tar:
        for name, data in (FILES if entries is None else entries).items():
            add(tar, name, data)
    return path


def build_zip(path: Path, method: int, entries: dict[str, bytes] | None = None) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in (FILES if entries is None else entries).items():
            archive.writestr(name, data)
    return path


def contents(path: Path, work: Path) -> dict[str, bytes]:
    tree = open_tree(path, "path", work)
    return {
        name: read_entry([tree.container], name, place) for name, place in zip(tree.files, tree.places, strict=True)
    }


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz", "x.tar.bz2", "x.tar.xz", "pax", "gnu", "deflated", "stored"])
def test_every_kind_of_archive_gives_its_files_whatever_its_name(tmp_path, name):
    path = tmp_path / name
    if name in ("deflated", "stored"):
        build_zip(path, zipfile.ZIP_DEFLATED if name == "deflated" else zipfile.ZIP_STORED)
    elif name in ("pax", "gnu"):
        entries = FILES | {f"{'long' * 60}/1.png": b"far"}
        build_tar(path, "w", entries, format=tarfile.PAX_FORMAT if name == "pax" else tarfile.GNU_FORMAT)
        assert contents(path, tmp_path) == entries
        return
    else:
        build_tar(path, "w:" + (path.suffix[1:] if path.suffix != ".tar" else ""))
    assert contents(path, tmp_path) == FILES


def test_folders_are_known_and_names_normalised(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        add(tar, "./", kind=tarfile.DIRTYPE)
        add(tar, "./empty//", kind=tarfile.DIRTYPE)
        add(tar, "./a//b/1.png", b"1")
        add(tar, "a/b/1.png", b"newer")  # as `tar --append` leaves it
    tree = open_tree(tmp_path / "x.tar", "path", tmp_path)
    assert tree.files == ["a/b/1.png"] and tree.folders == {"a", "a/b", "empty"}
    assert contents(tmp_path / "x.tar", tmp_path) == {"a/b/1.png": b"newer"}


def test_clutter_is_left_out(tmp_path):
    entries = {"a/1.png": b"1", ".DS_Store": b"", "a/._1.png": b"", "__MACOSX/a/1.png": b"", ".git/x/1.png": b""}
    path = build_zip(tmp_path / "x.zip", zipfile.ZIP_STORED, entries)
    tree = open_tree(path, "path", tmp_path)
    assert tree.files == ["a/1.png"] and tree.folders == {"a"}


def test_links_inside_are_followed(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        add(tar, "a/1.png", b"one")
        add(tar, "b/soft.png", kind=tarfile.SYMTYPE, link="../a/1.png")
        add(tar, "b/hard.png", kind=tarfile.LNKTYPE, link="a/1.png")
        add(tar, "b/chain.png", kind=tarfile.SYMTYPE, link="soft.png")
        add(tar, "b/nowhere.png", kind=tarfile.SYMTYPE, link="gone.png")
        add(tar, "b/loop.png", kind=tarfile.SYMTYPE, link="loop.png")
    assert contents(tmp_path / "x.tar", tmp_path) == dict.fromkeys(
        ["a/1.png", "b/soft.png", "b/hard.png", "b/chain.png"], b"one"
    )


@pytest.mark.parametrize(
    "name, kind, link",
    [
        ("../evil.png", tarfile.REGTYPE, ""),
        ("a/../../evil.png", tarfile.REGTYPE, ""),
        ("a/../b/1.png", tarfile.REGTYPE, ""),
        ("/etc/evil.png", tarfile.REGTYPE, ""),
        ("a/link.png", tarfile.SYMTYPE, "/etc/passwd"),
        ("a/link.png", tarfile.SYMTYPE, "../../evil.png"),
        ("a/link", tarfile.SYMTYPE, "../.."),
        ("a/link.png", tarfile.LNKTYPE, "../evil.png"),
    ],
)
def test_tar_members_that_lead_outside_refuse_the_archive(tmp_path, name, kind, link):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        add(tar, "a/1.png", b"1")
        add(tar, name, kind=kind, link=link)
    with pytest.raises(UserError, match="outside the archive: refused") as error:
        open_tree(tmp_path / "x.tar", "path", tmp_path)
    assert str(tmp_path / "x.tar") in str(error.value) and (link or name) in str(error.value)


@pytest.mark.parametrize("name", ["../evil.png", "/evil.png", "..\\evil.png", "C:\\evil.png", "a/../../evil.png"])
def test_zip_members_that_lead_outside_refuse_the_archive(tmp_path, name):
    build_zip(tmp_path / "x.zip", zipfile.ZIP_STORED, {"a/1.png": b"1", name: b"evil"})
    with pytest.raises(UserError, match="outside the archive: refused"):
        open_tree(tmp_path / "x.zip", "path", tmp_path)


def test_zip_links_that_lead_outside_refuse_the_archive(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        info = zipfile.ZipInfo("a/link.png")
        info.external_attr = 0o120777 << 16
        archive.writestr(info, "../../etc/passwd")
    with pytest.raises(UserError, match="outside the archive: refused"):
        open_tree(tmp_path / "x.zip", "path", tmp_path)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.8])
@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "tar.bz2", "tar.xz", "zip"])
def test_archives_cut_short_are_refused(tmp_path, suffix, share):
    path, rng = tmp_path / f"x.{suffix}", np.random.default_rng(0)
    entries = {f"a/{number}.png": rng.bytes(3000) for number in range(20)}
    if suffix == "zip":
        build_zip(path, zipfile.ZIP_DEFLATED, entries)
    else:
        build_tar(path, "w:" + suffix[4:], entries)
    os.truncate(path, int(path.stat().st_size * share))
    with pytest.raises(UserError, match=r"cut short|damaged") as error:
        open_tree(path, "path", tmp_path)
    assert str(path) in str(error.value) and "fetch it again" in str(error.value)


def test_a_damaged_tar_header_is_no_silent_end(tmp_path):
    path = build_tar(tmp_path / "x.tar", "w")
    members, _ = list_tar(path, "x")
    assert len(members) == len(FILES)
    with open(path, "r+b") as file:
        file.seek(sorted(offset for offset, _, _ in members.values())[2] - 512)
        file.write(b"\xff" * 300)
    with pytest.raises(UserError, match="damaged"):
        open_tree(path, "path", tmp_path)


def test_a_tar_may_lack_its_end_mark(tmp_path):
    path = build_tar(tmp_path / "x.tar", "w", {"a/1.png": b"1"})
    os.truncate(path, 1024)
    assert contents(path, tmp_path) == {"a/1.png": b"1"}


@pytest.mark.parametrize("data", [b"", b"no archive at all" * 100, b"PK\x03\x04 and nothing", b"\x1f\x8b\x08\x00 none"])
def test_what_is_no_archive_is_refused(tmp_path, data):
    (tmp_path / "x.zip").write_bytes(data)
    with pytest.raises(UserError, match=r"no archive|damaged"):
        open_tree(tmp_path / "x.zip", "path", tmp_path)


def test_a_compressed_file_that_is_no_tar_is_refused(tmp_path):
    import gzip

    (tmp_path / "x.gz").write_bytes(gzip.compress(b"some text" * 200))
    with pytest.raises(UserError, match="holds no tar"):
        open_tree(tmp_path / "x.gz", "path", tmp_path)


def test_a_missing_path_names_the_key(tmp_path):
    with pytest.raises(UserError, match=r"gone: not found: set prepare_data\.path"):
        open_tree(tmp_path / "gone", "prepare_data.path", tmp_path)


def test_encrypted_zips_are_refused(tmp_path):
    path = build_zip(tmp_path / "x.zip", zipfile.ZIP_STORED, {"a/1.png": b"1"})
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="encrypted"):
        open_tree(path, "path", tmp_path)


def test_damage_inside_a_zip_member_is_that_files_alone(tmp_path):
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        rng = np.random.default_rng(1)
        path = build_zip(tmp_path / f"{method}.zip", method, {"a.png": rng.bytes(2000), "b.png": b"fine"})
        data = bytearray(path.read_bytes())
        data[900] ^= 0xFF
        path.write_bytes(data)
        tree = open_tree(path, "path", tmp_path)
        assert read_entry([tree.container], "b.png", tree.places[1]) == b"fine"
        with pytest.raises(Undecodable, match="corrupt in the archive"):
            read_entry([tree.container], "a.png", tree.places[0])


def test_a_zip_member_that_unpacks_to_far_more_than_an_image_is_set_aside(tmp_path, monkeypatch):
    monkeypatch.setattr("crt.data.listing._MOST_BYTES", 1000)
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("fits.png", b"1" * 1000)
        archive.writestr("bomb.png", b"0" * 1001)
    tree = open_tree(tmp_path / "a.zip", "prepare_data.path", tmp_path)
    assert tree.files == ["bomb.png", "fits.png"]
    assert read_entry([tree.container], "fits.png", tree.places[1]) == b"1" * 1000
    with pytest.raises(Undecodable, match="more than 1000 bytes"):
        read_entry([tree.container], "bomb.png", tree.places[0])


def test_a_changed_archive_is_unpacked_anew(tmp_path):
    path = build_tar(tmp_path / "x.tar.gz", "w:gz", {"a/1.png": b"old"})
    assert contents(path, tmp_path) == {"a/1.png": b"old"}
    other = tmp_path / "other"
    other.mkdir()
    path.unlink()
    build_tar(path, "w:gz", {"a/1.png": b"newer than that"})
    os.utime(path, ns=(1, 1))
    assert contents(path, other) == {"a/1.png": b"newer than that"}
    before = (tmp_path / "unpacked.tar").stat().st_ino
    assert open_tree(path, "path", tmp_path).places["size"].tolist() == [15]
    assert (tmp_path / "unpacked.tar").stat().st_ino != before


def test_a_signal_while_a_changed_archive_is_unpacked_leaves_the_old_one_recognised_as_such(tmp_path, monkeypatch):
    path = build_tar(tmp_path / "x.tar.gz", "w:gz", {"a/1.png": b"old"})
    assert open_tree(path, "path", tmp_path).places["size"].tolist() == [3]
    build_tar(path, "w:gz", {"a/1.png": b"newer than that"})
    before = (tmp_path / "unpacked.tar").stat().st_ino
    with monkeypatch.context() as patch:
        patch.setattr("crt.interrupt._received", [15])
        with pytest.raises(Stopped):
            open_tree(path, "path", tmp_path)
    assert (tmp_path / "unpacked.tar").stat().st_ino == before
    assert open_tree(path, "path", tmp_path).places["size"].tolist() == [15]


def test_a_full_disk_is_not_taken_for_a_damaged_archive(tmp_path):
    path = build_tar(tmp_path / "x.tar.gz", "w:gz")
    (tmp_path / "unpacked.tar.tmp").symlink_to("/dev/full")  # where it is written first
    with pytest.raises(OSError) as caught:
        open_tree(path, "path", tmp_path)
    assert caught.value.errno == errno.ENOSPC


def test_a_folder_that_is_reached_by_a_link_is_listed_once_and_only_its_files(tmp_path):
    """Pipes and sockets are no images, whatever they are called: to read one would wait for ever."""
    (tmp_path / "root" / "a").mkdir(parents=True)
    (tmp_path / "root" / "a" / "1.png").write_bytes(b"1")
    (tmp_path / "root" / "a" / "again").symlink_to(tmp_path / "root" / "a")
    (tmp_path / "root" / "a" / "itself.png").symlink_to("itself.png")
    os.mkfifo(tmp_path / "root" / "a" / "pipe.png")
    (tmp_path / "link").symlink_to(tmp_path / "root")
    tree = open_tree(tmp_path / "link", "path", tmp_path)
    assert tree.files == ["a/1.png", "a/itself.png"] and tree.folders == {"a"}
    with pytest.raises(Undecodable):
        read_entry([tree.container], tree.files[1], tree.places[1])


@pytest.mark.parametrize("kind", ["folder", "zip", "tar", "tar.gz"])
def test_places_tell_when_the_folders_file_or_the_archive_was_changed(tmp_path, kind):
    changed = path = tmp_path / f"x.{kind}"
    if kind == "folder":
        path.mkdir()
        changed = path / "1.png"
        changed.write_bytes(b"1")
    elif kind == "zip":
        build_zip(path, zipfile.ZIP_STORED, {"1.png": b"1"})
    else:
        build_tar(path, "w:gz" if kind == "tar.gz" else "w", {"1.png": b"1"})
    os.utime(changed, ns=(0, 123_456_789))
    assert open_tree(path, "path", tmp_path).places["modified"].tolist() == [123_456_789]


def test_a_signal_ends_the_listing_of_a_folder(tmp_path, monkeypatch):
    (tmp_path / "1.png").write_bytes(b"1")
    monkeypatch.setattr("crt.interrupt._received", [15])
    with pytest.raises(Stopped):
        open_tree(tmp_path, "path", tmp_path)


def test_symbolic_links_in_folders_are_followed_and_loops_are_not(tmp_path):
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "elsewhere" / "deep" / "1.png").write_bytes(b"1")
    root = tmp_path / "root"
    (root / "b").mkdir(parents=True)
    (root / "a").symlink_to(tmp_path / "elsewhere")
    (root / "b" / "up").symlink_to(root)
    (root / "b" / "gone.png").symlink_to(tmp_path / "nowhere")
    tree = open_tree(root, "path", tmp_path)
    assert tree.files == ["a/deep/1.png", "b/gone.png"] and tree.folders == {"a", "a/deep", "b"}
    with pytest.raises(Undecodable, match="broken link"):
        read_entry([tree.container], tree.files[1], tree.places[1])
