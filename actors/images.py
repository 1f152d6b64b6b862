"""Reads images of any kind as upright 8-bit RGB, and draws the probe's image."""

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

QUESTION = "What is shown in this image?"  # asked about the probe


def open_image(path: str) -> Image.Image:
    """Open an image as 8-bit RGB, upright; ValueError: the file is not a readable image.

    Palette, grey and CMYK images are converted; 16-bit greys are scaled to their own range.
    """
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I") or image.mode == "F":
                low, high = image.getextrema()
                scale = 255 / max(high - low, 1)
                image = image.convert("F").point(lambda value: value * scale - low * scale).convert("L")
            return image.convert("RGB")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path!r} is not a readable image ({error}).") from None


def probe_image() -> Image.Image:
    """Draw the probe's image: a colour gradient with a spot."""
    y, x = np.mgrid[0:96, 0:96]
    spot = ((x - 60) ** 2 + (y - 40) ** 2 < 400) * 90
    channels = np.stack([255 - x - spot, 160 - y // 2 - spot, 40 + x + y], axis=-1)
    return Image.fromarray(channels.clip(0, 255).astype("u1"))


def blank_image() -> Image.Image:
    """Return a mean-grey image, which shows nothing."""
    return Image.new("RGB", (336, 336), (128, 128, 128))
