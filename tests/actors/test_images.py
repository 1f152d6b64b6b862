"""Reading images as cameras and web sites make them: always 8-bit RGB, upright, or an error that names the file."""

import warnings

import numpy as np
import pytest
from PIL import Image

from actors.images import open_image


def colours(image: Image.Image) -> list:
    return np.asarray(image).reshape(-1, 3).tolist()


def test_16_bit_grey_is_scaled_to_its_range(tmp_path):
    """1000, 2000, 5000 of a 16-bit PNG become 0, 63 (255 x 1000 / 4000 = 63.75, cut), 255."""
    Image.fromarray(np.array([[1000, 2000, 5000]], dtype=np.uint16)).save(tmp_path / "a.png")
    image = open_image(str(tmp_path / "a.png"))
    assert image.mode == "RGB"
    assert colours(image) in ([[0] * 3, [63] * 3, [255] * 3], [[0] * 3, [64] * 3, [255] * 3])


def test_16_bit_black_stays_finite(tmp_path):
    """A 16-bit image of one value has no range to divide by."""
    Image.fromarray(np.full((2, 2), 700, dtype=np.uint16)).save(tmp_path / "a.png")
    assert colours(open_image(str(tmp_path / "a.png"))) == [[0, 0, 0]] * 4


def test_float_tiff(tmp_path):
    """Values 0, 0.5 and 1 of a float TIFF become grey levels in the same order over the whole range."""
    Image.fromarray(np.array([[0.0, 0.5, 1.0]], dtype=np.float32)).save(tmp_path / "a.tiff")
    grey = [pixel[0] for pixel in colours(open_image(str(tmp_path / "a.tiff")))]
    assert grey[0] == 0 and abs(grey[1] - 127) <= 1 and grey[2] == 255


def test_cmyk_jpeg(tmp_path):
    """Full cyan, no other ink: red is dark, green and blue are bright."""
    Image.new("CMYK", (16, 16), (255, 0, 0, 0)).save(tmp_path / "a.jpg", quality=100)
    image = open_image(str(tmp_path / "a.jpg"))
    red, green, blue = colours(image)[0]
    assert image.mode == "RGB" and red < 20 and green > 150 and blue > 150


def test_palette(tmp_path):
    """A palette's numbers are looked up."""
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([0, 1])
    image.save(tmp_path / "a.png")
    assert colours(open_image(str(tmp_path / "a.png"))) == [[10, 20, 30], [200, 100, 50]]


def test_alpha_is_dropped(tmp_path):
    """The colour of an opaque pixel stays as it is."""
    Image.new("RGBA", (1, 1), (1, 2, 3, 255)).save(tmp_path / "a.png")
    assert colours(open_image(str(tmp_path / "a.png"))) == [[1, 2, 3]]


def test_one_bit(tmp_path):
    """Black and white."""
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "a.png")
    assert colours(open_image(str(tmp_path / "a.png"))) == [[255] * 3, [0] * 3]


def test_exif_rotation(tmp_path):
    """Orientation 6 (turn 90 degrees clockwise): the left column, red, becomes the top row."""
    image = Image.new("RGB", (32, 16), (0, 0, 255))
    image.paste((255, 0, 0), (0, 0, 8, 16))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.jpg", exif=exif, quality=100)
    upright = open_image(str(tmp_path / "a.jpg"))
    assert upright.size == (16, 32)
    assert upright.getpixel((8, 2))[0] > 200 and upright.getpixel((8, 30))[2] > 200


def jpeg(path) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, quality=95)
    return path.read_bytes()


@pytest.mark.parametrize("broken", ["zero", "text", "cut", "header"])
def test_unreadable_files_are_named(tmp_path, broken):
    """Zero bytes, a text file, a download that stopped half way, and one that stopped in the header."""
    data = jpeg(tmp_path / "good.jpg")
    contents = {"zero": b"", "text": b"<html>404</html>", "cut": data[: len(data) // 2], "header": data[:20]}
    (tmp_path / "bad.jpg").write_bytes(contents[broken])
    with pytest.raises(ValueError, match=r"bad\.jpg' is not a readable image"):
        open_image(str(tmp_path / "bad.jpg"))


def test_missing_file_is_named(tmp_path):
    """The path that was asked for is in the message."""
    with pytest.raises(ValueError, match=r"absent\.png' is not a readable image"):
        open_image(str(tmp_path / "absent.png"))


def test_decompression_bomb(tmp_path, monkeypatch):
    """An image of more than twice Pillow's limit of pixels is refused, not unpacked."""
    Image.new("RGB", (30, 30)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)
    with warnings.catch_warnings(), pytest.raises(ValueError, match=r"a\.png' is not a readable image"):
        warnings.simplefilter("ignore")
        open_image(str(tmp_path / "a.png"))
