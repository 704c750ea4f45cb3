"""The stage as a user runs it: codes against the tokenizer's own, and the same bytes whatever happens on the way."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import entropy
from torchvision.transforms import TenCrop

from crt.__main__ import main
from crt.data.packed import PackedImages
from crt.data.transforms import center_crop, to_unit_range
from crt.launch import local_command
from crt.stage import exclusive, open_run
from crt.tokenizer.model import Tokenizer
from crt.tokens.cache import TokenCache
from crt.tokens.encode import Encoder
from tests.conftest import ROOT, run_out_of_memory


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def encode_one_by_one(tokenizer, images):
    """Codes by the tokenizer alone: one image at a time, in float64, where rounding decides nothing."""
    double = tokenizer.double()
    codes = [double.encode(to_unit_range(torch.from_numpy(image.copy())[None]).double())[0] for image in images]
    return torch.stack(codes).numpy()


@pytest.fixture(scope="module")
def small(small_project):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        out = small_project.folder / "tokens"
        assert main(small_project.command(out)) == 0
    return out


@pytest.fixture(scope="module")
def large(large_project):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        out = large_project.folder / "tokens"
        assert main(large_project.command(out)) == 0
    return out


def test_codes_are_the_tokenizers(small_project, small):
    tokenizer = Tokenizer.load(small_project.tokenizer)
    for split, views in (("train", ("center", "flip")), ("val", ("center",))):
        images, cache = PackedImages(small_project.data, split), TokenCache(small, split)
        assert cache.views == views
        assert len(cache) == len(images)
        np.testing.assert_array_equal(cache.labels, images.labels)
        np.testing.assert_array_equal(cache.source_index, np.arange(len(images)))
        assert cache.class_names == images.class_names
        pixels = images.pixels(np.arange(len(images)))
        for view, rendered in enumerate((pixels, pixels[:, :, ::-1])[: len(views)]):
            expected = encode_one_by_one(tokenizer, rendered)
            # Float32 may decide a tie in thousands otherwise than float64.
            assert (cache.array[:, view] == expected).mean() > 0.999
    assert cache.tokenizer_content == json.loads((small_project.tokenizer / "manifest.json").read_text())["content"]
    assert cache.data_content == json.loads((small_project.data / "manifest.json").read_text())["content"]


def test_encoded_images_and_ten_crops(encoded_project, tmp_path):
    """Crops against torchvision's TenCrop of the centre square, in its order."""
    assert main(encoded_project.command(tmp_path / "tokens")) == 0
    cache, images = TokenCache(tmp_path / "tokens", "train"), PackedImages(encoded_project.data, "train")
    names = [f"ten_crop@1.1/{n}" for n in range(10)] + ["flip"] + [f"ten_crop@1.25/{n}" for n in range(10)]
    assert list(cache.views) == names
    assert TokenCache(tmp_path / "tokens", "val").views == ("center",)
    tokenizer = Tokenizer.load(encoded_project.tokenizer)
    for row in (0, 7, len(cache) - 1):
        image = images.image(row)
        crops = []
        for side in (17, 20):
            square = torch.from_numpy(center_crop(image, side).copy()).permute(2, 0, 1)
            crops.append([crop.permute(1, 2, 0).numpy() for crop in TenCrop(16)(square)])
        rendered = [*crops[0], center_crop(image, 16)[:, ::-1], *crops[1]]
        assert (cache.array[row] == encode_one_by_one(tokenizer, rendered)).mean() > 0.99


def test_a_damaged_image_stops_with_one_line(encoded_project, tmp_path, capsys):
    project = copied(encoded_project, tmp_path / "project")
    images = PackedImages(project.data, "train")
    shard, file = project.data / "train-00000.h5", images.encoded(5)
    shard.write_bytes(shard.read_bytes().replace(file, bytes(len(file))))
    assert main(project.command(tmp_path / "tokens")) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "rror" in line or "Traceback" in line]
    assert len(errors) == 1 and f"{shard}: image 5 ({images.source_id(5)}) is damaged (" in errors[0]


def copied(project, folder):
    """A copy of a project, without its tokens."""
    shutil.copytree(project.folder, folder, ignore=shutil.ignore_patterns("tokens", "images"))
    copy = object.__new__(type(project))
    copy.__dict__ |= {"folder": folder, "data": folder / "data", "tokenizer": folder / "tokenizer"}
    copy.params = folder / "params.yaml"
    return copy


def test_summary_describes_the_training_codes(small):
    summary = json.loads((small / "manifest.json").read_text())["summary"]
    train, val = TokenCache(small, "train"), TokenCache(small, "val")
    counts = np.bincount(np.asarray(train.array).reshape(-1), minlength=300)
    assert summary["train_rows"], summary["val_rows"] == (len(train), len(val))
    assert summary["codebook_usage"] == pytest.approx((counts > 0).mean())
    assert summary["code_entropy_bits"] == pytest.approx(entropy(counts, base=2))
    size = sum(path.stat().st_size for path in small.glob("*.h5"))
    assert summary["bytes_per_token"] == pytest.approx(size / (train.array.size + val.array.size))


def test_two_processes_of_one_machine_give_the_same_bytes(large_project, large, tmp_path):
    assert TokenCache(large, "train").header.num_shards == 2
    command = local_command(2, large_project.command(tmp_path / "tokens"))  # what a machine with 2 GPUs starts
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert contents(tmp_path / "tokens") == contents(large)


def kill_once(project, out, delay, port):
    """Start two ranks, kill both at `delay` seconds after their work has begun; whether they had not yet ended."""
    ranks = project.processes(out, 2, port)
    deadline = time.monotonic() + 120
    blocks = out.parent / ".work"
    while not list(blocks.glob(f"{out.name}-*/blocks")) and time.monotonic() < deadline and ranks[0].poll() is None:
        time.sleep(0.01)
    time.sleep(delay)
    running = [rank.poll() is None for rank in ranks]
    for rank in ranks:
        rank.kill()
        rank.communicate()
    return any(running)


def test_killed_at_random_moments_the_bytes_are_the_same(large_project, large, tmp_path):
    """Three kills of two ranks in one run, wherever they strike."""
    rng = np.random.default_rng()
    out = tmp_path / "tokens"
    struck = [kill_once(large_project, out, delay, 29611 + n) for n, delay in enumerate(rng.uniform(0, 0.7, 3))]
    assert any(struck)
    assert main(large_project.command(out)) == 0
    assert contents(out) == contents(large)
    assert not list((tmp_path / ".work").glob("tokens-*"))


def stop_after(monkeypatch, blocks):
    """Let the stage see SIGTERM after so many blocks."""
    seen = iter(range(blocks))
    monkeypatch.setattr("crt.distributed.stop_signal", lambda world: 0 if next(seen, None) is not None else 15)


def test_stopped_run_continues_with_the_next_block(large_project, large, tmp_path, monkeypatch):
    out = tmp_path / "tokens"
    encoded = []
    call = Encoder.__call__
    monkeypatch.setattr(Encoder, "__call__", lambda self, pixels: encoded.append(len(pixels)) or call(self, pixels))
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        assert main(large_project.command(out)) == 128 + signal.SIGTERM
    assert not out.exists()
    first = sum(encoded)
    assert main(large_project.command(out)) == 0
    assert contents(out) == contents(large)
    # Nothing was encoded twice.
    assert first > 0
    assert sum(encoded) == sum(cache.array.shape[0] * cache.num_views for cache in both(large))


def both(folder):
    return TokenCache(folder, "train"), TokenCache(folder, "val")


def test_torn_block_is_made_again(large_project, large, tmp_path, monkeypatch):
    out = tmp_path / "tokens"
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        main(large_project.command(out))
    (journal,) = (tmp_path / ".work").glob("tokens-*/blocks/*.blocks")
    content = bytearray(journal.read_bytes())
    content[len(content) // 2] ^= 1
    journal.write_bytes(content)
    assert main(large_project.command(out)) == 0
    assert contents(out) == contents(large)


@pytest.mark.parametrize("damaged", [False, True])
def test_a_finished_shard_is_kept_with_its_counts_unless_the_disk_lost_its_bytes(
    large_project, large, tmp_path, monkeypatch, damaged
):
    out = tmp_path / "tokens"
    with monkeypatch.context() as patch:
        stop_after(patch, 7)
        main(large_project.command(out))
    (shard,) = (tmp_path / ".work").glob("tokens-*/staging/train-00000*.h5")
    if damaged:
        content = bytearray(shard.read_bytes())
        content[-1000] ^= 1
        shard.write_bytes(content)
    assert main(large_project.command(out)) == 0
    assert contents(out) == contents(large)  # the summary of codes in use among them


def test_killed_between_a_shards_last_block_and_its_file(large_project, large, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(*arguments, **values):
        raise Killed

    out = tmp_path / "tokens"
    with monkeypatch.context() as patch:
        patch.setattr("crt.stages.tokenize.write_shard", killed)
        with pytest.raises(Killed):
            main(large_project.command(out))
    assert main(large_project.command(out)) == 0
    assert contents(out) == contents(large)


def test_blocks_of_other_inputs_are_not_used(small_project, tmp_path, monkeypatch):
    """The tokenizer was made again with other weights between two runs of the same recipe."""
    copy = copied(small_project, tmp_path / "project")
    with monkeypatch.context() as patch:
        stop_after(patch, 0)
        assert main(copy.command(copy.folder / "tokens")) == 143
    other = copy.publish_tokenizer(seed=1)
    assert main(copy.command(copy.folder / "tokens")) == 0
    pixels = PackedImages(copy.data, "train").pixels(np.arange(30))
    codes = TokenCache(copy.folder / "tokens", "train").array[:30, 0]
    assert (codes == encode_one_by_one(other, pixels)).mean() > 0.999


def test_codes_do_not_depend_on_the_number_of_threads(small_project):
    tokenizer = Tokenizer.load(small_project.tokenizer)
    pixels = torch.from_numpy(PackedImages(small_project.data, "train").pixels(np.arange(150)))
    threads, codes = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            with Encoder(tokenizer, "float32", 7) as encode:
                codes.append(encode(pixels))
            assert torch.get_num_threads() == number
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(codes[0], codes[1])
    assert torch.equal(codes[0], codes[2])


@pytest.mark.parametrize("fast", [True, False])
def test_bf16_agrees_mostly(small_project, monkeypatch, fast):
    monkeypatch.setattr("crt.processor.multiplies_bfloat16", lambda: fast)
    tokenizer = Tokenizer.load(small_project.tokenizer)
    pixels = torch.from_numpy(PackedImages(small_project.data, "train").pixels(np.arange(100)))
    codes = {}
    for precision in ("float32", "bf16"):
        with Encoder(tokenizer, precision, 32) as encode:
            codes[precision] = encode(pixels)
    agreement = (codes["float32"] == codes["bf16"]).float().mean()
    assert 0.8 < agreement < 1.0 if fast else agreement == 1


def test_second_writer_is_refused(small_project, tmp_path, capsys):
    out = tmp_path / "tokens"
    inputs = {"data": small_project.data, "tokenizer": small_project.tokenizer}
    with exclusive(open_run("tokenize", small_project.params, inputs, out)):
        assert main(small_project.command(out)) == 2
    assert f"{out}: another process is writing it" in capsys.readouterr().err
    assert main(small_project.command(out)) == 0


def test_too_little_gpu_memory_is_said_in_one_line(small_project, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Encoder, "__call__", run_out_of_memory)
    assert main(small_project.command(tmp_path / "tokens")) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    line = "error: tokenize: out of GPU memory: lower tokenize.batch_size, or set tokenize.precision to bf16"
    assert errors == [line]


def test_full_disk_loses_nothing(large_project, large, tmp_path):
    """A file system too small for the result, two ranks: status 2 and why; with space the same command goes on."""
    disk = tmp_path / "disk"
    disk.mkdir()
    tokenize = " ".join([sys.executable, "-m", "crt", *large_project.command(disk / "tokens")])
    ranks = "MASTER_ADDR=127.0.0.1 MASTER_PORT=29621 WORLD_SIZE=2"
    blocks = f"{disk}/.work/tokens-*/blocks/*.blocks {disk}/.work/tokens-*/staging/*.h5"
    script = f"""
        mount -t tmpfs -o size=2500k none {disk} || exit 99
        {ranks} RANK=1 {tokenize} & other=$!
        {ranks} RANK=0 {tokenize}; echo "status $?"
        wait $other; echo "status $?"
        ls {blocks} | wc -l
        mount -o remount,size=50m {disk}
        {tokenize}; echo "status $?"
        cp -r {disk}/tokens {tmp_path}/copy
    """
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode == 99 or "unshare" in result.stderr:
        pytest.skip(f"no file system of its own can be mounted here: {result.stderr.strip()}")
    first, other, kept, last = result.stdout.split("\n")[:4]
    assert (first, other, last) == ("status 2", "status 2", "status 0"), result.stderr
    # One rank met it, or both at once; nobody complains of the other.
    errors = [line for line in result.stderr.splitlines() if "rror" in line]
    assert 1 <= len(errors) <= 2, result.stderr
    assert all("No space left on device: free some space" in line for line in errors)
    assert int(kept) > 0
    assert contents(tmp_path / "copy") == contents(large)


@pytest.mark.slow
def test_thirty_kills_on_cifar10(cifar10_archive, tmp_path_factory):
    """CIFAR-10, two ranks: killed at a random moment of the run and finished, thirty times over."""
    from tests.tokens.conftest import Project

    folder = tmp_path_factory.mktemp("cifar10")
    changes = {
        "prepare_data.source": "cifar10",
        "prepare_data.image_size": 32,
        "train_tokenizer.image_size": 32,
        "tokenize.batch_size": 500,
    }
    project = Project(folder, cifar10_archive, changes)
    started = time.monotonic()
    assert [rank.wait() for rank in project.processes(folder / "reference", 2, 29700)] == [0, 0]
    length = time.monotonic() - started
    reference, struck, rng = contents(folder / "reference"), 0, np.random.default_rng()
    for number in range(30):
        out = folder / f"run{number}"
        struck += kill_once(project, out, rng.uniform(0, 0.8 * length), 29701 + 2 * number)
        assert [rank.wait() for rank in project.processes(out, 2, 29702 + 2 * number)] == [0, 0]
        assert contents(out) == reference, f"run {number}"
        shutil.rmtree(out)
    assert struck >= 20
