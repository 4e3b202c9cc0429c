"""The data of the example: IDX files, their checksums, where they come from, and the step ``prepare``."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from examples.te_vqgan.__main__ import main
from examples.te_vqgan.data import archives, sources
from examples.te_vqgan.data.archives import IdxFile, find_idx_folder
from examples.te_vqgan.data.heldout import allowed, held_out
from examples.te_vqgan.data.idx import read_idx
from examples.te_vqgan.data.prepare import prepare
from examples.te_vqgan.data.quadrants import QuadrantDataset
from examples.te_vqgan.data.recipes import LAYOUTS
from examples.te_vqgan.data.sources import SPLITS, DigitSource, DigitSplit, load_digits
from examples.te_vqgan.runs import files
from examples.te_vqgan.runs.files import write_bytes_atomically, write_text_atomically
from examples.te_vqgan.stage1.presets import settings_for
from tests.example.tiny_runs import random_source
from tests.helpers import numpy_generator

STEMS = tuple(archives.CHECKSUMS["mnist"])


def idx_bytes(values: np.ndarray, kind: int = 8) -> bytes:
    """The IDX file of an array, written field by field."""
    sides = b"".join(side.to_bytes(4, "big") for side in values.shape)
    return bytes([0, 0, kind, values.ndim]) + sides + values.tobytes()


def write_archive(folder: Path, rng: np.random.Generator, first_label: int = 0) -> dict[str, IdxFile]:
    """A small data set as four ``.gz`` files; returns its checksums."""
    folder.mkdir(parents=True)
    checksums = {}
    for stem in STEMS:
        count = 30 if stem.startswith("train") else 12
        pictures = "images" in stem
        labels = np.arange(first_label, first_label + count, dtype=np.uint8) % 10
        values = rng.integers(0, 256, (count, 28, 28), np.uint8) if pictures else labels
        plain = idx_bytes(values)
        packed = gzip.compress(plain, mtime=0)
        (folder / f"{stem}.gz").write_bytes(packed)
        checksums[stem] = IdxFile(hashlib.sha256(plain).hexdigest(), hashlib.sha256(packed).hexdigest())
    return checksums


@pytest.fixture
def small_mnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a small "mnist" under the folder ``mnist``, its checksums made the known ones."""
    root = tmp_path / "data"
    monkeypatch.setitem(archives.CHECKSUMS, "mnist", write_archive(root / "mnist", numpy_generator()))
    monkeypatch.setattr(sources, "_NUM_VALIDATION", 7)
    monkeypatch.setattr(archives, "SYSTEM_FOLDER", tmp_path / "nowhere")
    monkeypatch.delenv(archives.DATA_VARIABLE, raising=False)
    for variable in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(variable, "127.0.0.1")
    return root


class QuietHandler(SimpleHTTPRequestHandler):
    """Serves a folder and logs nothing."""

    def log_message(self, *args: object) -> None:
        """Keep the test's output clean."""


@pytest.fixture
def mirror(small_mnist: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A mirror on this machine that serves the small data set; yields the folder it serves."""
    folder = small_mnist / "mnist"
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        monkeypatch.setitem(archives.MIRRORS, "mnist", (f"http://127.0.0.1:{server.server_port}/",))
        yield folder
        server.shutdown()
        thread.join()


def dead_mirror() -> str:
    """An address of this machine at which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}/"


# IDX files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5,), (2, 3, 4), (1, 1, 1)])
@pytest.mark.parametrize("packed", [False, True])
def test_idx_round_trip(tmp_path: Path, shape: tuple[int, ...], packed: bool) -> None:
    """What is written is read, plain or gzipped, as an array of its own."""
    values = numpy_generator().integers(0, 256, shape, np.uint8)
    path = tmp_path / ("x.gz" if packed else "x")
    content = idx_bytes(values)
    path.write_bytes(gzip.compress(content) if packed else content)
    result = read_idx(path, len(shape), sha256=hashlib.sha256(content).hexdigest())
    assert result.dtype == np.uint8
    assert (result == values).all()
    assert result.flags.writeable


def test_idx_spans_many_chunks(tmp_path: Path) -> None:
    """A file larger than one read is joined in order."""
    values = numpy_generator().integers(0, 256, 3 * 2**20 + 5, np.uint8)
    (tmp_path / "x").write_bytes(idx_bytes(values))
    assert (read_idx(tmp_path / "x", 1) == values).all()


GOOD = idx_bytes(np.arange(24, dtype=np.uint8).reshape(2, 3, 4))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must start with an IDX magic number, got an empty file"),
        (GOOD[:3], "must start with an IDX magic number, got 00 00 08"),
        (b"\x01" + GOOD[1:], "must start with an IDX magic number, got 01 00 08 03"),
        (b"\x00\x00\x07" + GOOD[3:], "must start with an IDX magic number, got 00 00 07 03"),
        (b"\x00\x00\x0d" + GOOD[3:], "must hold uint8, got float32"),
        (GOOD[:3] + b"\x02" + GOOD[4:], "must have 3 axes, got 2"),
        (GOOD[:15], "must hold 3 sides, got 11 bytes of them: it is cut short"),
        (GOOD[:4] + b"\0\0\0\0" + GOOD[8:], r"must hold between 1 and .* got the shape \(0, 3, 4\)"),
        (
            GOOD[:4] + b"\xff\xff\xff\xff" + GOOD[8:],
            r"must hold between 1 and .* got the shape \(4294967295, 3, 4\)",
        ),
        (GOOD[:-1], "must hold 24 bytes for its shape .* got 23: it is cut short"),
        (GOOD[:16], "must hold 24 bytes for its shape .* got 0: it is cut short"),
        (GOOD + b"\0", "must end after 24 bytes for its shape .* got more"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_idx_refuses_every_bad_file(tmp_path: Path, content: bytes, message: str, packed: bool) -> None:
    """Each kind of damage has its own message, and each names the file."""
    path = tmp_path / ("bad.gz" if packed else "bad")
    path.write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(ValueError, match=rf"bad(\.gz)? {message}"):
        read_idx(path, 3)


@pytest.mark.parametrize("damage", ["cut", "shorter", "overwritten", "another format"])
def test_idx_refuses_a_damaged_gzip(tmp_path: Path, damage: str) -> None:
    """Cut, overwritten or never gzipped: one clear error that names the file."""
    packed = gzip.compress(idx_bytes(numpy_generator().integers(0, 256, 4000, np.uint8)))
    flipped = bytearray(packed)
    flipped[len(packed) // 2] ^= 0xFF
    contents = {
        "cut": packed[:-9],
        "shorter": packed[:-4],
        "overwritten": bytes(flipped),
        "another format": b"<html>not found</html>",
    }
    (tmp_path / "bad.gz").write_bytes(contents[damage])
    with pytest.raises(
        ValueError, match=r"bad\.gz must (be a whole gzip file, got a damaged one|hold 4000|start)"
    ):
        read_idx(tmp_path / "bad.gz", 1)


def test_idx_refuses_another_checksum(tmp_path: Path) -> None:
    """One changed pixel is found by the SHA-256, and only by it."""
    (tmp_path / "x").write_bytes(GOOD[:-1] + b"\xfe")
    expected = hashlib.sha256(GOOD).hexdigest()
    assert read_idx(tmp_path / "x", 3).shape == (2, 3, 4)
    with pytest.raises(ValueError, match=rf"x must have the unpacked SHA-256 {expected}, got "):
        read_idx(tmp_path / "x", 3, sha256=expected)


def test_idx_refuses_a_missing_file(tmp_path: Path) -> None:
    """The operating system's own error says it best."""
    with pytest.raises(FileNotFoundError, match="absent"):
        read_idx(tmp_path / "absent.gz", 3)


# where the files are looked for ----------------------------------------------------------------------------


def test_files_are_found_by_option_and_variable(small_mnist: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both may name the data set's folder or the one above; the option goes first."""
    inside = small_mnist / "mnist"
    assert find_idx_folder("mnist") is None
    assert find_idx_folder("mnist", small_mnist) == inside
    assert find_idx_folder("mnist", inside) == inside
    monkeypatch.setenv("TE_QUANT_DATA", str(inside))
    assert find_idx_folder("mnist") == inside
    monkeypatch.setenv("TE_QUANT_DATA", str(small_mnist))
    assert find_idx_folder("mnist") == inside
    monkeypatch.setenv("TE_QUANT_DATA", str(small_mnist / "elsewhere"))
    assert find_idx_folder("mnist") is None
    assert find_idx_folder("mnist", small_mnist) == inside


def _ending(text: str) -> str:
    return re.escape(text) + "$"


_LAYOUTS = ["MNIST/raw", "MNIST", "mnist/raw", "raw", "mnist", "."]


@pytest.mark.parametrize("dotted", [False, True], ids=["dashed", "dotted"])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("layout", _LAYOUTS)
def test_mnist_is_found_as_others_lay_it_out_and_name_it(
    small_mnist: Path, tmp_path: Path, layout: str, packed: bool, dotted: bool
) -> None:
    """In torchvision's folders, or with a dot before idx; packed or not. What is read has the same checksums."""
    folder = tmp_path / "given" / layout
    folder.mkdir(parents=True)
    for path in (small_mnist / "mnist").glob("*.gz"):
        name = path.name.replace("-idx", ".idx") if dotted else path.name
        content = path.read_bytes()
        (folder / (name if packed else name.removesuffix(".gz"))).write_bytes(
            content if packed else gzip.decompress(content)
        )
    assert find_idx_folder("mnist", tmp_path / "given") == folder
    assert (
        load_digits("mnist", tmp_path / "given").fingerprint() == load_digits("mnist", small_mnist).fingerprint()
    )


def test_mnist_one_level_deeper_is_named_by_the_error(small_mnist: Path, tmp_path: Path) -> None:
    """What would have been right, or what else is there."""
    (tmp_path / "other").mkdir()
    with pytest.raises(FileNotFoundError, match=_ending(f"got {tmp_path / 'other'}.")):
        find_idx_folder("mnist", tmp_path / "other")
    (tmp_path / "other" / "deep").mkdir()
    with pytest.raises(FileNotFoundError, match=_ending(f"got {tmp_path / 'other'} with deep.")):
        find_idx_folder("mnist", tmp_path / "other")
    shutil.copytree(small_mnist / "mnist", tmp_path / "other" / "deep" / "MNIST" / "raw")
    expected = f"got {tmp_path / 'other'}; they are in {tmp_path / 'other' / 'deep' / 'MNIST' / 'raw'}."
    with pytest.raises(FileNotFoundError, match=_ending(expected)):
        find_idx_folder("mnist", tmp_path / "other")


def test_installed_files_are_found(small_mnist: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's folder is used when nothing else is said."""
    monkeypatch.setattr(archives, "SYSTEM_FOLDER", small_mnist)
    assert find_idx_folder("mnist") == small_mnist / "mnist"


def test_the_files_of_another_data_set_are_not_taken(
    small_mnist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both data sets use the same file names: a bare folder of the one is none of the other's."""
    fashion = tmp_path / "fashion"
    checksums = write_archive(fashion, numpy_generator(), first_label=3)
    monkeypatch.setitem(archives.CHECKSUMS, "fashion-mnist", checksums)
    assert find_idx_folder("fashion-mnist", fashion) == fashion
    monkeypatch.setenv("TE_QUANT_DATA", str(fashion))
    assert find_idx_folder("mnist") is None
    monkeypatch.setattr(archives, "SYSTEM_FOLDER", small_mnist)
    assert find_idx_folder("mnist") == small_mnist / "mnist"
    with pytest.raises(FileNotFoundError, match="data_dir must hold the files of 'mnist'"):
        find_idx_folder("mnist", fashion)


def test_an_option_without_files_is_refused(small_mnist: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever names a folder does not want another one, nor a download."""
    monkeypatch.setenv("TE_QUANT_DATA", str(small_mnist))
    with pytest.raises(FileNotFoundError, match="data_dir must hold the files of 'mnist'"):
        load_digits("mnist", small_mnist / "elsewhere")


@pytest.mark.parametrize("stem", STEMS)
def test_an_incomplete_folder_is_refused(small_mnist: Path, stem: str) -> None:
    """Three of four files are a mistake to hear about, not a reason to download."""
    (small_mnist / "mnist" / f"{stem}.gz").unlink()
    with pytest.raises(FileNotFoundError, match=rf"must hold all files of 'mnist', got none called \['{stem}'\]"):
        find_idx_folder("mnist", small_mnist)


def test_splits_are_cut_from_the_files(small_mnist: Path) -> None:
    """Train and validation share the training file without overlap; packed and plain files give the same."""
    source = load_digits("mnist", small_mnist)
    assert [len(source.split(name)) for name in SPLITS] == [23, 7, 12]
    whole = read_idx(small_mnist / "mnist" / f"{STEMS[0]}.gz", 3)
    assert (np.concatenate([source.train.images, source.validation.images]) == whole).all()
    assert (source.validation.labels == np.arange(23, 30) % 10).all()
    assert (source.test.labels == np.arange(12) % 10).all()
    for stem in STEMS:
        packed = small_mnist / "mnist" / f"{stem}.gz"
        packed.with_suffix("").write_bytes(gzip.decompress(packed.read_bytes()))
        packed.unlink()
    assert load_digits("mnist", small_mnist).fingerprint() == source.fingerprint()


def test_a_changed_local_file_is_refused(small_mnist: Path) -> None:
    """Local files are held to the checksum too, and the message names the file."""
    path = small_mnist / "mnist" / f"{STEMS[2]}.gz"
    content = bytearray(gzip.decompress(path.read_bytes()))
    content[100] ^= 1
    path.write_bytes(gzip.compress(bytes(content)))
    with pytest.raises(ValueError, match=rf"{STEMS[2]}\.gz must have the unpacked SHA-256"):
        load_digits("mnist", small_mnist)


def test_unknown_names_are_refused() -> None:
    """With those that there are."""
    with pytest.raises(ValueError, match="name must be one of 'mnist', 'fashion-mnist', 'digits', got 'MNIST'"):
        load_digits("MNIST")


def test_a_folder_for_the_data_set_that_needs_none_is_refused(tmp_path: Path) -> None:
    """It would be ignored."""
    with pytest.raises(ValueError, match="data_dir must be None for 'digits'"):
        load_digits("digits", tmp_path)


# downloads -------------------------------------------------------------------------------------------------


def test_files_are_downloaded_once(mirror: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What no folder has comes from the mirror, is checked, and serves the next time without a network."""
    source = load_digits("mnist", cache_dir=tmp_path / "cache")
    assert source.fingerprint() == load_digits("mnist", mirror).fingerprint()
    assert sorted(path.name for path in (tmp_path / "cache" / "mnist").iterdir()) == sorted(
        f"{s}.gz" for s in STEMS
    )
    monkeypatch.setitem(archives.MIRRORS, "mnist", (dead_mirror(),))
    assert load_digits("mnist", cache_dir=tmp_path / "cache").fingerprint() == source.fingerprint()


def test_the_next_mirror_is_tried(mirror: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One mirror that is down does not stop the download."""
    (living,) = archives.MIRRORS["mnist"]
    monkeypatch.setitem(archives.MIRRORS, "mnist", (dead_mirror(), living))
    assert len(load_digits("mnist", cache_dir=tmp_path / "cache").test) == 12


def test_a_wrong_download_is_refused(mirror: Path, tmp_path: Path) -> None:
    """A file with another hash is not kept, even if it is a whole IDX file."""
    (mirror / f"{STEMS[0]}.gz").write_bytes(gzip.compress(GOOD, mtime=0))
    with pytest.raises(ValueError, match=rf"(?i)hash of downloaded file \({STEMS[0]}\.gz\) does not match"):
        load_digits("mnist", cache_dir=tmp_path / "cache")
    assert list((tmp_path / "cache" / "mnist").iterdir()) == []


def test_a_damaged_cache_is_fetched_anew(mirror: Path, tmp_path: Path) -> None:
    """A cached file that lost its end is replaced, not read."""
    source = load_digits("mnist", cache_dir=tmp_path / "cache")
    path = tmp_path / "cache" / "mnist" / f"{STEMS[0]}.gz"
    path.write_bytes(path.read_bytes()[:-10])
    assert load_digits("mnist", cache_dir=tmp_path / "cache").fingerprint() == source.fingerprint()


def test_offline_says_what_to_do(small_mnist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One error, which names the option and the variable, and why each mirror failed."""
    dead = dead_mirror()
    monkeypatch.setitem(archives.MIRRORS, "mnist", (dead, dead))
    with pytest.raises(
        FileNotFoundError, match=rf"(?s)by the data_dir option or in TE_QUANT_DATA.*{dead}.*{dead}"
    ):
        load_digits("mnist", cache_dir=tmp_path / "cache")


def test_every_file_has_two_checksums_and_a_mirror() -> None:
    """The published table is complete, and no hash stands twice, as a slip of the hand would leave it."""
    assert set(archives.CHECKSUMS) == set(archives.MIRRORS) == {"mnist", "fashion-mnist"}
    hashes = [h for entry in archives.CHECKSUMS.values() for f in entry.values() for h in (f.unpacked, f.packed)]
    assert len(set(hashes)) == len(hashes) == 16
    assert all(len(h) == 64 and int(h, 16) for h in hashes)
    assert all(url.endswith("/") for urls in archives.MIRRORS.values() for url in urls)


# the data sets themselves ----------------------------------------------------------------------------------


def test_scikit_learn_digits_are_split_within_each_class() -> None:
    """Disjoint splits of 60/20/20 in every class, the same at every call, full ink at 255."""
    from sklearn.datasets import load_digits as load_sklearn

    source = load_digits("digits")
    everything = load_sklearn()
    sets = [{picture.tobytes() for picture in source.split(name).images} for name in SPLITS]
    assert not sets[0] & sets[1]
    assert not sets[0] & sets[2]
    assert not sets[1] & sets[2]
    total = sum(len(source.split(name)) for name in SPLITS)
    assert total == len(everything.target) == sum(map(len, sets)) == 1797
    pairs = {
        (picture.tobytes(), label)
        for name in SPLITS
        for picture, label in zip(source.split(name).images, source.split(name).labels, strict=True)
    }
    expected = np.floor(everything.images * 255 / 16 + 0.5).astype(np.uint8)
    assert pairs == {(p.tobytes(), t) for p, t in zip(expected, everything.target, strict=True)}
    counts = np.bincount(everything.target)
    for name, share in zip(SPLITS, (0.6, 0.2, 0.2), strict=True):
        assert np.abs(np.bincount(source.split(name).labels) - share * counts).max() < 1
    assert load_digits("digits").fingerprint() == source.fingerprint()
    assert source.train.images.max() == 255


def test_real_mnist(mnist_folder: Path) -> None:
    """The real files pass their checksums; the known class counts of both files come out."""
    source = load_digits("mnist", mnist_folder)
    assert [len(source.split(name)) for name in SPLITS] == [55_000, 5_000, 10_000]
    train = np.bincount(source.train.labels) + np.bincount(source.validation.labels)
    assert train.tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert np.bincount(source.test.labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert abs(source.train.images.mean() / 255 - 0.1307) < 1e-3


def test_real_fashion_mnist() -> None:
    """The real files pass their checksums, where they are installed; its classes are balanced."""
    folder = find_idx_folder("fashion-mnist")
    if folder is None:
        pytest.skip("real Fashion-MNIST is not here: set TE_QUANT_DATA or install dataset-fashion-mnist")
    source = load_digits("fashion-mnist", folder)
    assert np.bincount(source.test.labels).tolist() == [1000] * 10
    assert source.class_names[9] == "ankle boot"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda p, n: (p.astype(float), n), r"images must be \(N, n, n\) uint8, got float64"),
        (lambda p, n: (p[:, :, 1:], n), r"images must be \(N, n, n\) uint8, got uint8 of \(2, 8, 7\)"),
        (lambda p, n: (p, n[:1]), r"labels must be int64 of \(2,\), got int64 of \(1,\)"),
        (lambda p, n: (p, n.astype(np.int32)), r"labels must be int64 of \(2,\), got int32"),
        (lambda p, n: (p[:0], n[:0]), "images must hold at least one picture"),
    ],
    ids=["floats", "sides", "count", "int32", "none"],
)
def test_splits_refuse(change: Callable[..., tuple[Any, Any]], match: str) -> None:
    """Wrong types and shapes."""
    with pytest.raises(ValueError, match=match):
        DigitSplit(*change(np.zeros((2, 8, 8), np.uint8), np.array([0, 1])))


@pytest.mark.parametrize("labels", [[1, 2], [-1, 0]])
def test_labels_without_a_name_are_refused(labels: list[int]) -> None:
    """By the source, which knows the names."""
    pictures = np.zeros((2, 8, 8), np.uint8)
    good, bad = (DigitSplit(pictures, np.array(values)) for values in ([0, 1], labels))
    with pytest.raises(ValueError, match=r"validation.labels must be in \[0, 2\)"):
        DigitSource("x", ("a", "b"), good, bad, good)


def test_the_fingerprint_sees_every_byte() -> None:
    """Another pixel, another label or another order of splits is another data set."""
    rng = numpy_generator()
    one, two, three = (DigitSplit(rng.integers(0, 256, (3, 8, 8), np.uint8), np.arange(3)) for _ in range(3))
    names = ("a", "b", "c", "d")
    base = DigitSource("x", names, one, two, three).fingerprint()
    assert DigitSource("y", names, one, two, three).fingerprint() == base
    assert DigitSource("x", names, two, one, three).fingerprint() != base
    pixel = three.images.copy()
    pixel[2, 7, 7] ^= 1
    assert DigitSource("x", names, one, two, DigitSplit(pixel, three.labels)).fingerprint() != base
    assert DigitSource("x", names, one, two, DigitSplit(three.images, three.labels + 1)).fingerprint() != base


# prepare ---------------------------------------------------------------------------------------------------


def _splits(source: DigitSource, *, hold_out: bool) -> dict[str, QuadrantDataset]:
    sizes = {"train": 40, "validation": 30, "test": 5}
    return {
        split: QuadrantDataset(
            source,
            split,
            canvas_size=32,
            size=size,
            seed=2,
            layouts=LAYOUTS,
            allowed=allowed(split, len(source.class_names)) if hold_out else None,
        )
        for split, size in sizes.items()
    }


def test_prepare_writes_a_summary_and_a_picture(tmp_path: Path) -> None:
    """Both files are there, agree with the data, and a second run gives the same bytes."""
    out = tmp_path / "out" / "deep"
    source = random_source()
    datasets = _splits(source, hold_out=True)
    summary = prepare(source, datasets, out)
    assert sorted(path.name for path in out.iterdir()) == ["data.json", "samples.png"]
    stored = json.loads((out / "data.json").read_text())
    assert stored["fingerprint"] == summary.fingerprint == source.fingerprint()
    assert (stored["canvas_size"], stored["class_names"]) == (32, list(source.class_names))
    for name, split in stored["splits"].items():
        recipes = datasets[name].recipes
        assert (split["images"], split["seed"]) == (len(datasets[name]), 2)
        assert sum(split["images_by_num_digits"]) == split["images"]
        assert sum(split["digits_by_class"]) == split["digits"]
        assert split["drawn"] == sum(n * count for n, count in enumerate(split["images_by_num_digits"], 1))
        assert split["drawn"] == (recipes.digits >= 0).sum()
    assert (out / "samples.png").read_bytes().startswith(b"\x89PNG")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    prepare(source, datasets, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_the_summary_counts_held_out_combinations(tmp_path: Path) -> None:
    """None in training and nothing else in the test, where they are held out; some in both where they are not."""
    source = random_source()
    held = prepare(source, _splits(source, hold_out=True), tmp_path / "held").splits
    assert held["train"].held_out == 0 < held["train"].drawn
    assert held["test"].held_out == held["test"].drawn
    free = prepare(source, _splits(source, hold_out=False), tmp_path / "free").splits
    table = held_out(len(source.class_names))
    for name, dataset in _splits(source, hold_out=False).items():
        count = 0
        for digits, colors in zip(dataset.recipes.digits, dataset.recipes.colors, strict=True):
            for place, (digit, color) in enumerate(zip(digits, colors, strict=True)):
                count += digit >= 0 and table[dataset.labels[digit], place, color]
        assert free[name].held_out == count
    assert 0 < free["train"].held_out < free["train"].drawn / 2


def test_prepare_shows_what_is_trained_on(tmp_path: Path) -> None:
    """The command: combinations held out where the preset does so, and evaluation images of the fixed seed."""
    for preset, hold_out in (("smoke", False), ("small", True)):
        assert settings_for(preset, "vqgan").held_out is hold_out
        folder = tmp_path / preset
        words = ["prepare", "--preset", preset, "--data", "digits", "--seed", "3", "--out", str(folder)]
        assert main(words) == 0
        splits = json.loads((folder / "data" / "data.json").read_text())["splits"]
        assert {name: split["seed"] for name, split in splits.items()} == {"train": 3, "validation": 0, "test": 0}
        assert (splits["train"]["held_out"] == 0) is hold_out
        assert (splits["test"]["held_out"] == splits["test"]["drawn"]) is hold_out


# files -----------------------------------------------------------------------------------------------------


def test_files_are_replaced_whole(tmp_path: Path) -> None:
    """Folders are made, old content goes, nothing else stays, and others may read the file."""
    path = tmp_path / "a" / "b.txt"
    write_text_atomically(path, "λ\n")
    write_text_atomically(path, "μ\n")
    assert path.read_bytes() == "μ\n".encode()
    assert list(path.parent.iterdir()) == [path]
    ordinary = tmp_path / "ordinary"
    ordinary.write_text("x")
    assert path.stat().st_mode == ordinary.stat().st_mode


def test_a_limit_on_the_size_of_files_is_told_with_the_name_of_the_file(tmp_path: Path) -> None:
    """As a full disk; what was there stays."""
    resource = pytest.importorskip("resource", reason="the limits of POSIX")
    path = tmp_path / "x"
    write_bytes_atomically(path, b"old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(OSError, match="File too large: ") as caught:
            write_bytes_atomically(path, bytes(1000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.filename == str(path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was there stays, and no temporary file is left."""
    path = tmp_path / "x"
    write_bytes_atomically(path, b"old")

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt("Ctrl-C")

    monkeypatch.setattr(files.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt, match="Ctrl-C"):
        write_bytes_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
