"""A folder of pictures as a data set: files, pixels, splits, crops, and what is refused."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from examples.te_vqgan.data.crops import CropDataset
from examples.te_vqgan.data.decoding import decode, reduced
from examples.te_vqgan.data.pictures import (
    PictureSource,
    changed_pictures,
    find_pictures,
    folder_of,
    load_pictures,
    short_name,
    split_by_content,
    split_regions,
)
from examples.te_vqgan.data.rows import EpochOrder
from examples.te_vqgan.data.sources import SPLITS
from tests.example.tiny_runs import save_picture, write_pictures
from tests.helpers import numpy_generator

CROP, SMALLEST = 32, 48


def _bytes(image: Image.Image, kind: str = "png", **options: Any) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


def _noise(*shape: int) -> NDArray[np.uint8]:
    return numpy_generator().integers(0, 256, shape, dtype=np.uint8)


def test_a_plain_picture_is_its_pixels() -> None:
    """Three channels of eight bits need no conversion."""
    pixels = _noise(5, 7, 3)
    assert np.array_equal(decode(_bytes(Image.fromarray(pixels)), "a.png"), pixels)


@pytest.mark.parametrize(
    ("mode", "color", "expected"),
    [
        ("L", 77, (77, 77, 77)),
        ("1", 1, (255, 255, 255)),
        ("LA", (77, 255), (77, 77, 77)),
        # Half transparent on white.
        ("RGBA", (0, 100, 200, 51), (204, 224, 244)),
        ("RGBA", (9, 9, 9, 0), (255, 255, 255)),
        ("RGBA", (9, 8, 7, 255), (9, 8, 7)),
        ("CMYK", (0, 0, 0, 0), (255, 255, 255)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("CMYK", (0, 0, 0, 255), (0, 0, 0)),
    ],
)
def test_other_modes_become_rgb(mode: str, color: Any, expected: tuple[int, int, int]) -> None:
    """Grey values are repeated, transparent pixels are put on white, inks are taken from white."""
    content = _bytes(Image.new(mode, (3, 2), color), "tiff" if mode == "CMYK" else "png")
    pixels = decode(content, "a picture")
    assert pixels.shape == (2, 3, 3)
    assert pixels.dtype == np.uint8
    np.testing.assert_allclose(pixels, np.broadcast_to(expected, (2, 3, 3)), atol=1)


def test_a_palette_becomes_its_colours_and_its_transparent_entry_white() -> None:
    """With and without an entry that is transparent."""
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putdata([0, 1])
    assert decode(_bytes(image), "a.png").tolist() == [[[10, 20, 30], [40, 50, 60]]]
    assert decode(_bytes(image, transparency=0), "a.png").tolist() == [[[255, 255, 255], [40, 50, 60]]]


def test_sixteen_bits_are_rounded_to_eight() -> None:
    """The nearest of 256 levels, and not the upper byte."""
    values = np.array([[0, 257, 65535], [128, 129, 65407]], np.uint16)
    expected = np.round(values.astype(np.float64) * 255 / 65535)
    pixels = decode(_bytes(Image.fromarray(values)), "a.png")
    assert np.array_equal(pixels, np.repeat(expected[..., None], 3, -1))


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [(1, lambda x: x), (3, lambda x: x[::-1, ::-1]), (6, lambda x: np.rot90(x, -1)), (8, np.rot90)],
)
def test_a_picture_is_turned_as_its_tag_says(
    orientation: int, upright: Callable[[NDArray[np.uint8]], NDArray[np.uint8]]
) -> None:
    """Cameras store what their sensor saw, and how they were held."""
    pixels = _noise(4, 6, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(decode(_bytes(Image.fromarray(pixels), exif=exif), "a.png"), upright(pixels))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"Dear diary", "dir/a.png must be a picture that Pillow can read, got a file of another kind"),
        (b"", "dir/a.png must be a picture that Pillow can read, got a file of another kind"),
        (_bytes(Image.new("RGB", (64, 64)), "bmp")[:900], "dir/a.png must be a whole picture, got a damaged file"),
        (
            _bytes(Image.new("F", (2, 2)), "tiff"),
            "dir/a.png must be of a mode among 1, L, .* 16-bit grey, got 'F'",
        ),
        (_bytes(Image.new("I", (2, 2), 70_000), "tiff"), "dir/a.png must be a picture of at most sixteen bits"),
        (_bytes(Image.new("I", (2, 2), -1), "tiff"), "dir/a.png must be a picture of at most sixteen bits"),
        (_bytes(Image.new("LAB", (2, 2)), "tiff"), "dir/a.png must be of a mode among .*, got 'LAB'"),
    ],
)
def test_what_cannot_be_decoded_is_refused_by_name(content: bytes, message: str) -> None:
    """Whatever Pillow raises, the message names the file."""
    with pytest.raises(ValueError, match=message):
        decode(content, "dir/a.png")


def test_a_picture_too_large_for_pillow_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice its limit is an error; between, its warning says nothing that matters here."""
    content = _bytes(Image.new("RGB", (20, 20)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    assert decode(content, "a.png").shape == (20, 20, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"a\.png must be small enough for Pillow, got a larger picture"):
        decode(content, "a.png")


@pytest.mark.parametrize("factor", [1, 2, 3, 5])
def test_reduction_averages_blocks_and_rounds_half_up(factor: int) -> None:
    """Against means in float64, the incomplete blocks cut off."""
    pixels = _noise(11, 17, 3)
    height, width = 11 // factor, 17 // factor
    blocks = pixels[: height * factor, : width * factor].reshape(height, factor, width, factor, 3)
    expected = np.floor(blocks.astype(np.float64).mean((1, 3)) + 0.5)
    assert np.array_equal(reduced(pixels, factor), expected)


def test_files_count_by_their_suffix_and_copies_once(tmp_path: Path) -> None:
    """Folders below are searched; hidden files and folders are not; other files and copies are told."""
    save_picture(tmp_path / "a.PNG", 1)
    save_picture(tmp_path / "deep" / "er" / "b.png", 2)
    save_picture(tmp_path / "deep" / "copy of a.png", 1)
    save_picture(tmp_path / ".thumbnails" / "c.png", 3)
    save_picture(tmp_path / "._a.png", 4)
    (tmp_path / "LICENCE.txt").write_text("CC0")
    found = find_pictures(tmp_path)
    assert {file.name for file in found.files} == {"a.PNG", "deep/er/b.png"}
    assert found.left_out == ("LICENCE.txt", "deep/copy of a.png")
    assert [file.sha256 for file in found.files] == sorted(file.sha256 for file in found.files)


@pytest.mark.parametrize(
    ("prepare", "error", "message"),
    [
        (lambda path: None, FileNotFoundError, "data must name a folder that exists, got .*pictures"),
        (Path.touch, NotADirectoryError, "data must name a folder of pictures, got the file .*pictures"),
        (
            Path.mkdir,
            ValueError,
            r"data must be a folder with at least one picture \(.bmp, .*\), got .*pictures\.",
        ),
        (
            lambda path: (path.mkdir(), (path / "a.heic").touch()),
            ValueError,
            "data must be a folder with at least one picture .* with 1 other files",
        ),
    ],
)
def test_a_folder_without_pictures_is_refused(
    prepare: Callable[[Path], Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    """Missing, a file, empty, or full of something else."""
    prepare(tmp_path / "pictures")
    with pytest.raises(error, match=message):
        find_pictures(tmp_path / "pictures")


def test_the_name_of_a_data_set_follows_from_the_contents(tmp_path: Path) -> None:
    """Renamed and moved files are the same data; one other pixel, or one more picture, is not."""
    first, second = tmp_path / "first", tmp_path / "second"
    write_pictures(first, 3)
    for number, path in enumerate(sorted(first.iterdir())):
        (second / "moved").mkdir(parents=True, exist_ok=True)
        (second / "moved" / f"{9 - number}.png").write_bytes(path.read_bytes())
    name = find_pictures(first).data
    assert name == find_pictures(second).data
    assert name.startswith("images:")
    assert len(name) == len("images:") + 16
    save_picture(second / "one more.png", 77)
    assert find_pictures(second).data != name
    (second / "one more.png").unlink()
    changed = next((second / "moved").iterdir())
    pixels = np.asarray(Image.open(changed)).copy()
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(changed)
    assert find_pictures(second).data != name


def test_folders_are_named_by_their_last_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever way leads to them."""
    assert folder_of("images:~/x").is_absolute()
    assert short_name(f"images:{tmp_path}/My Pictures (2024)/") == "My-Pictures-2024"
    assert short_name("images:/") == "pictures"
    monkeypatch.chdir(tmp_path)
    assert short_name("images:.") == tmp_path.name
    for data in ("images:", "mnist"):
        with pytest.raises(
            ValueError, match=f"data must be images:FOLDER with your pictures in FOLDER, got '{data}'"
        ):
            folder_of(data)


@pytest.mark.parametrize("count", [3, 4, 5, 7, 12, 30])
def test_every_picture_is_in_one_split(count: int) -> None:
    """At least one in each, a fifth in both smaller ones, whatever the order of the files."""
    digests = [f"{number:064x}" for number in numpy_generator().permutation(10**6)[:count]]
    splits = split_by_content(digests)
    assert splits.keys() == set(digests)
    sizes = [list(splits.values()).count(split) for split in SPLITS]
    assert sizes[1] == sizes[2] == max(1, round(count / 5))
    assert sizes[0] == count - 2 * sizes[1] >= 1
    assert split_by_content(digests[::-1]) == splits


@given(side=st.integers(0, 4_000), margin=st.integers(0, 64))
def test_regions_of_a_picture_lie_apart(side: int, margin: int) -> None:
    """Within the picture, in order, and no closer than the margin."""
    regions = [split_regions(side, margin)[split] for split in SPLITS]
    assert regions[0].start == 0
    assert regions[-1].stop == side
    for region in regions:
        assert region.start <= region.stop
    if side >= 2 * margin:
        for before, after in itertools.pairwise(regions):
            assert after.start - before.stop >= margin
        part = (side - 2 * margin) // 5
        assert [len(range(region.start, region.stop)) for region in regions[1:]] == [part, part]


def test_a_picture_that_is_too_small_is_refused_by_name(tmp_path: Path) -> None:
    """By its size as shown, and with the size that is needed."""
    write_pictures(tmp_path, 3)
    save_picture(tmp_path / "tiny.png", 9, height=47, width=200)
    expected = r"tiny\.png must be at least 48 pixels high and wide, got 47 pixels high and 200 wide"
    with pytest.raises(ValueError, match=expected):
        load_pictures(tmp_path, crop_size=CROP, smallest=SMALLEST)
    save_picture(tmp_path / "tiny.png", 9, height=48, width=200)
    load_pictures(tmp_path, crop_size=CROP, smallest=SMALLEST)


@pytest.mark.parametrize(("width", "fits"), [(271, False), (272, True), (1_024, True)])
def test_two_pictures_need_a_long_side(width: int, fits: bool, tmp_path: Path) -> None:
    """Five windows and two margins; a large square picture is not reduced so far that they no longer fit."""
    for number in (1, 2):
        save_picture(tmp_path / f"{number}.png", number, height=width if width > 500 else 60, width=width)
    if fits:
        source = load_pictures(tmp_path, crop_size=CROP, smallest=SMALLEST)
        assert all(min(part.shape[:2]) >= SMALLEST for parts in source.pixels.values() for part in parts)
        assert {row["split"] for row in source.manifest} == {"three parts"}
        return
    expected = r"[12]\.png must be at least 48 pixels high and wide, and 272 along one side, as fewer than 3"
    with pytest.raises(ValueError, match=expected):
        load_pictures(tmp_path, crop_size=CROP, smallest=SMALLEST)


def test_copies_that_make_pictures_few_are_counted(tmp_path: Path) -> None:
    """Three equal files are one picture; other files are no copies."""
    for name, reds, copies in (("a", (1, 1, 1), "2 copies"), ("b", (1, 1, 2), "1 copy")):
        for number, red in enumerate(reds):
            save_picture(tmp_path / name / f"{number}.png", red, height=60)
        (tmp_path / name / "notes.txt").touch()
        with pytest.raises(ValueError, match=rf"as fewer than 3 pictures \({copies} left out\) are cut"):
            load_pictures(tmp_path / name, crop_size=CROP, smallest=SMALLEST)


def test_changes_of_a_folder_are_named(tmp_path: Path) -> None:
    """Missing, new and changed files, a few of each; a file that is only renamed is none of them."""
    write_pictures(tmp_path, 9)
    before = [{"name": file.name, "sha256": file.sha256} for file in find_pictures(tmp_path).files]
    assert changed_pictures(before, find_pictures(tmp_path)) == ""
    (tmp_path / "0.png").rename(tmp_path / "renamed.png")
    assert changed_pictures(before, find_pictures(tmp_path)) == ""
    for number in range(1, 8):
        (tmp_path / f"{number}.png").unlink()
    save_picture(tmp_path / "8.png", 250)
    save_picture(tmp_path / "new.png", 251)
    expected = "missing 1.png, 2.png, 3.png, 4.png, 5.png and 2 more; new new.png; changed 8.png"
    assert changed_pictures(before, find_pictures(tmp_path)) == expected


def test_a_damaged_file_among_good_ones_is_named(tmp_path: Path) -> None:
    """With its whole path."""
    write_pictures(tmp_path, 3)
    (tmp_path / "notes.jpg").write_text("Dear diary")
    with pytest.raises(ValueError, match=rf"{tmp_path}/notes\.jpg must be a picture that Pillow can read"):
        load_pictures(tmp_path, crop_size=CROP, smallest=SMALLEST)


def test_large_pictures_are_reduced_and_the_manifest_says_so(tmp_path: Path) -> None:
    """To at least eight crops along the shorter side; hash, size and split of every file are told."""
    write_pictures(tmp_path, 3)
    save_picture(tmp_path / "large.png", 9, height=800, width=1_100)
    source = load_pictures(tmp_path, crop_size=CROP, smallest=SMALLEST)
    rows = {row["name"]: row for row in source.manifest}
    assert rows["large.png"]["reduced_by"] == 800 // (8 * CROP)
    assert (rows["large.png"]["width"], rows["large.png"]["height"]) == (1_100, 800)
    assert rows["0.png"]["reduced_by"] == 1
    assert {row["sha256"] for row in source.manifest} == {file.sha256 for file in find_pictures(tmp_path).files}
    assert {row["split"] for row in source.manifest} == set(SPLITS)
    sizes = {part.shape[:2] for parts in source.pixels.values() for part in parts}
    assert (800 // 3, 1_100 // 3) in sizes


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> PictureSource:
    """Seven pictures, each of one red value of its own; green and blue tell row and column."""
    folder = tmp_path_factory.mktemp("seven")
    write_pictures(folder, 7)
    return load_pictures(folder, crop_size=CROP, smallest=SMALLEST)


def _crops(source: PictureSource, split: str, **options: Any) -> CropDataset:
    return CropDataset(source, split, **{"crop_size": CROP, "size": 200, **options})


def _seen(crops: torch.Tensor) -> set[int]:
    """The red values, which tell the pictures of the crops."""
    return set(((crops[:, 0] + 1) * 127.5).round().int().flatten().tolist())


def test_no_crop_of_a_test_picture_is_trained_on(source: PictureSource) -> None:
    """Nor of a validation picture. Negative control: with a test picture among the others it is found."""
    seen = {split: _seen(_crops(source, split).fixed(0, 200)) for split in SPLITS}
    for split in SPLITS:
        assert seen[split] == {int(part[0, 0, 0]) for part in source.pixels[split]}
    assert not seen["train"] & seen["test"]
    assert not seen["train"] & seen["validation"]
    assert not seen["validation"] & seen["test"]
    mixed = {**source.pixels, "train": [*source.pixels["train"], *source.pixels["test"]]}
    wrong = PictureSource(source.name, mixed, source.manifest, source.smallest)
    assert _seen(_crops(wrong, "train").fixed(0, 200)) & seen["test"]


def test_no_crop_of_a_test_region_is_trained_on(tmp_path: Path) -> None:
    """Of a picture in three parts: half a crop lies between the columns of any two splits."""
    save_picture(tmp_path / "one.png", 5, height=60, width=255)
    source = load_pictures(tmp_path, crop_size=16, smallest=24)
    columns = {
        split: ((_crops(source, split, crop_size=16).fixed(0, 200)[:, 2] + 1) * 127.5).round() for split in SPLITS
    }
    assert columns["train"].max() + 8 < columns["validation"].min()
    assert columns["validation"].max() + 8 < columns["test"].min()
    assert columns["test"].max() == 254


def test_equal_seeds_give_equal_crops(source: PictureSource) -> None:
    """And an equal order; another seed gives others, and so does another split."""
    first, again = (_crops(source, "train", seed=3) for _ in range(2))
    assert torch.equal(first.fixed(0, 50), again.fixed(0, 50))
    for step in (0, 7, 13):
        assert np.array_equal(first.row_batch(step, 16), again.row_batch(step, 16))
        assert torch.equal(first.batch(step, 16), again.render(again.row_batch(step, 16)))
    other = _crops(source, "train", seed=4)
    assert not torch.equal(first.fixed(0, 50), other.fixed(0, 50))
    assert not np.array_equal(first.row_batch(0, 16), other.row_batch(0, 16))
    assert torch.equal(first.windows(3, SMALLEST), again.windows(3, SMALLEST))


def test_a_crop_is_a_square_of_its_picture(source: PictureSource) -> None:
    """Rows and columns follow each other, positions vary and reach the last row and column."""
    crops = _crops(source, "train", size=2_000).fixed(0, 2_000)
    assert crops.shape == (2_000, 3, CROP, CROP)
    assert crops.dtype == torch.float32
    assert crops.min() >= -1
    assert crops.max() <= 1
    pixels = ((crops + 1) * 127.5).round()
    steps = torch.arange(CROP)
    assert torch.equal(pixels[:, 1], (pixels[:, 1, :1, :1] + steps[:, None]).expand(-1, CROP, CROP))
    assert torch.equal(pixels[:, 2], (pixels[:, 2, :1, :1] + steps).expand(-1, CROP, CROP))
    height, width = source.pixels["train"][0].shape[:2]
    assert set(pixels[:, 1, 0, 0].int().tolist()) == set(range(height - CROP + 1))
    assert set(pixels[:, 2, 0, 0].int().tolist()) == set(range(width - CROP + 1))


def test_windows_are_larger_crops_of_the_same_split(source: PictureSource) -> None:
    """As many and as large as asked for."""
    windows = _crops(source, "test").windows(5, SMALLEST)
    assert windows.shape == (5, 3, SMALLEST, SMALLEST)
    assert _seen(windows) <= {int(part[0, 0, 0]) for part in source.pixels["test"]}
    assert _crops(source, "test").windows(0, SMALLEST).shape == (0, 3, SMALLEST, SMALLEST)


def test_reductions_are_equally_likely_where_they_fit(source: PictureSource) -> None:
    """The step between two columns tells by how much; 97 rows halve once and no more."""
    pixels = ((_crops(source, "train", size=600, max_reduction=8).fixed(0, 600) + 1) * 127.5).round()
    steps = (pixels[:, 2, 0, 9] - pixels[:, 2, 0, 8]).int()
    counts = torch.bincount(steps, minlength=9)
    assert counts[1] + counts[2] == 600
    assert 200 < counts[2] < 400
    plain = ((_crops(source, "train", size=600).fixed(0, 600) + 1) * 127.5).round()
    assert torch.equal((plain[:, 2, 0, 9] - plain[:, 2, 0, 8]).int(), torch.ones(600, dtype=torch.int32))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "dev"}, "split must be one of 'train', 'validation', 'test', got 'dev'"),
        ({"size": 0}, "size must be an int >= 1, got 0"),
        ({"seed": -1}, "seed must be an int >= 0, got -1"),
        ({"max_reduction": 0}, "max_reduction must be an int >= 1, got 0"),
        ({"crop_size": 49}, "crop_size must be <= 48, the smallest side, got 49"),
    ],
)
def test_wrong_options_of_crops_are_refused(options: dict[str, Any], message: str, source: PictureSource) -> None:
    """By one sentence."""
    with pytest.raises(ValueError, match=message):
        CropDataset(source, **{"split": "train", "crop_size": CROP, **options})


def test_every_epoch_is_a_permutation() -> None:
    """Batches go on across its end, and each epoch is drawn once while it is used."""
    drawn: list[int] = []

    def permutation(epoch: int) -> NDArray[np.int64]:
        drawn.append(epoch)
        return np.roll(np.arange(5), epoch)

    order = EpochOrder(5, permutation)
    rows = np.concatenate([order.batch(step, 3) for step in range(5)])
    assert rows.tolist() == [0, 1, 2, 3, 4, 4, 0, 1, 2, 3, 3, 4, 0, 1, 2]
    assert drawn == [0, 1, 2]
