"""What the command reads and writes: pictures of every kind, and tables that grow."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")

from PIL import Image

from te_quant.cli.pictures import find_pictures, read_picture, write_picture
from te_quant.cli.rows import put_row

HEADER = ["name", "κ"]


def test_a_picture_comes_back_bit_for_bit(tmp_path: Path) -> None:
    """All 256 values, through [-1, 1]."""
    values = torch.arange(256.0).view(1, 16, 16).expand(3, -1, -1) / 127.5 - 1
    write_picture(tmp_path / "x.png", values)
    assert torch.equal(read_picture(tmp_path / "x.png", 3), values)


def test_values_outside_are_clamped(tmp_path: Path) -> None:
    """They do not wrap around."""
    write_picture(tmp_path / "x.png", torch.tensor([[[-3.0, 3.0]]]))
    assert read_picture(tmp_path / "x.png", 1).tolist() == [[[-1.0, 1.0]]]


@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [
        ("L", 51, [51, 51, 51]),
        ("RGBA", (10, 20, 30, 255), [10, 20, 30]),
        ("RGBA", (10, 20, 30, 0), [255, 255, 255]),
        ("LA", (51, 0), [255, 255, 255]),
        ("I;16", 51 * 257, [51, 51, 51]),
        ("1", 1, [255, 255, 255]),
    ],
)
def test_every_kind_of_pixel_is_read(tmp_path: Path, mode: str, value: object, expected: list[int]) -> None:
    """Sixteen bits are scaled, and transparent pixels are white."""
    Image.new(mode, (2, 2), value).save(tmp_path / "x.png")
    pixels = (read_picture(tmp_path / "x.png", 3) + 1) * 127.5
    assert pixels[:, 0, 0].round().tolist() == expected


def test_a_picture_is_turned_as_its_tag_says(tmp_path: Path) -> None:
    """Cameras store the turn next to the pixels."""
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGB", (4, 2)).save(tmp_path / "x.png", exif=exif)
    assert read_picture(tmp_path / "x.png", 3).shape == (3, 4, 2)


@pytest.mark.parametrize(("height", "width"), [(8, 20), (20, 8), (5, 5)])
def test_the_square_in_the_middle_is_cut_out(tmp_path: Path, height: int, width: int) -> None:
    """After the shorter side has the size that was asked for."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[height // 2 - 1 : height // 2 + 1, width // 2 - 1 : width // 2 + 1] = 255
    Image.fromarray(pixels).save(tmp_path / "x.png")
    image = read_picture(tmp_path / "x.png", 3, size=16)
    assert image.shape == (3, 16, 16)
    assert image[:, 6:10, 6:10].mean() > image.mean()


def test_folders_are_read_in_order_without_hidden_files(tmp_path: Path) -> None:
    """With the folders inside; a limit takes the first."""
    for name in ("b.png", "a.PNG", "in/c.jpg", ".hidden.png", ".cache/d.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [found.name for found in find_pictures([tmp_path])] == ["a.PNG", "b.png", "in/c.jpg"]
    assert [found.name for found in find_pictures([tmp_path], limit=1)] == ["a.PNG"]


def test_a_table_grows_and_replaces(tmp_path: Path) -> None:
    """A row of the same name is replaced in its place; what stands around the table stays."""
    path = tmp_path / "table.md"
    put_row(path, HEADER, ["a", "1"], "lr")
    assert path.read_text() == "| name | κ |\n| --- | ---: |\n| a | 1 |\n"
    path.write_text("# Title\n\n" + path.read_text() + "\nText.\n")
    put_row(path, HEADER, ["b|c", "2"], "lr")
    put_row(path, HEADER, ["a", "3"], "lr")
    put_row(path, HEADER, ["b|c", "4"], "lr")
    rows = "| name | κ |\n| --- | ---: |\n| a | 3 |\n| b\\|c | 4 |\n"
    assert path.read_text() == f"# Title\n\n{rows}\nText.\n"


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_a_table_leaves_the_rest_of_its_file_byte_for_byte(tmp_path: Path, ending: str) -> None:
    """Line ends of either kind, and characters that Python takes for some; new rows end as the table does."""
    path = tmp_path / "table.md"
    before, behind = f"one\ftwo\u2028three{ending}{ending}", f"{ending}four\x1cfive{ending}six"
    table = ["| name | κ |", "| --- | ---: |", "| a | 1 |"]
    path.write_bytes((before + "".join(row + ending for row in table) + behind).encode())
    put_row(path, HEADER, ["b", "2"], "lr")
    put_row(path, HEADER, ["a", "3"], "lr")
    table[2:] = ["| a | 3 |", "| b | 2 |"]
    assert path.read_bytes() == (before + "".join(row + ending for row in table) + behind).encode()
    path.write_bytes(ending.join(table).encode())
    put_row(path, HEADER, ["c", "4"], "lr")
    put_row(path, HEADER, ["b", "5"], "lr")
    table[3:] = ["| b | 5 |", "| c | 4 |"]
    assert path.read_bytes() == "".join(row + ending for row in table).encode()


def test_a_table_with_other_columns_is_refused(tmp_path: Path) -> None:
    """And stays as it is."""
    path = tmp_path / "table.md"
    put_row(path, HEADER, ["a", "1"], "lr")
    before = path.read_bytes()
    with pytest.raises(
        ValueError, match=r"table\.md must be a file with a table that begins with '\| name \| rate"
    ):
        put_row(path, ["name", "rate"], ["a", "1"], "lr")
    assert path.read_bytes() == before
