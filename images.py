"""Decode frames: image formats, size limits, EXIF orientation, 16 bit grey."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import ExifTags, Image, ImageOps

from errors import NotAnImageError, TooLargeError, TrackerError
from settings import Limits
from shapes import SizeHW

# The formats that CVAT takes as frames; requests cannot reach Pillow's rarer decoders. Pillow opens
# MPO (a camera's JPEG with further pictures) under the name JPEG.
IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
# A decoder goes over the whole frame for each scan of a progressive JPEG, and a scan may have few
# bytes. Encoders write about ten; the scans of an MPO's further pictures count too.
MAX_JPEG_SCANS = 200
# A PNG without any of these has no orientation: a chunk's name and how two other chunks begin.
PNG_ORIENTATION = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")
# Pillow loops in Python over chunks, segments and filler bytes, and stores some of their contents.
# A PNG of 64 million pixels in chunks of 8 KB takes 80 000 reads, other files far fewer.
MAX_IMAGE_READS = 200_000
# `Limits.image_pixels` is lower than Pillow's limit and is checked before anything is decoded.
Image.MAX_IMAGE_PIXELS = None


def read_image_size(data: bytes, limits: Limits) -> SizeHW:
    """Return a frame's height and width, upright, from its header alone.

    Raises:
        NotAnImageError: The bytes are none of `IMAGE_FORMATS`.
        TooLargeError: The header announces more pixels than allowed.
    """
    with _opened(data, limits) as image:
        # Pillow decodes a PNG to look for an orientation after its pixels.
        is_plain = image.format == "PNG" and not any(name in data for name in PNG_ORIENTATION)
        orientation = None if is_plain else image.getexif().get(ExifTags.Base.Orientation)
        quarter_turned = orientation in {5, 6, 7, 8}
        if quarter_turned and image.format != "TIFF":  # Pillow gives a TIFF's size as turned
            return image.size
        return image.height, image.width


def decode_image(data: bytes, limits: Limits) -> Image.Image:
    """Decode a frame, upright as the annotator sees it.

    Returns:
        An RGB image, turned as its EXIF orientation says.

    Raises:
        NotAnImageError: The bytes are none of `IMAGE_FORMATS`, or are cut off or damaged.
        TooLargeError: The header announces more pixels than allowed; nothing was decoded.
    """
    with _opened(data, limits) as image:
        return upright_rgb(image)


def upright_rgb(image: Image.Image) -> Image.Image:
    """Return a frame as the annotator sees it: RGB, turned as its EXIF orientation says."""
    image.load()  # some formats know their orientation only afterwards
    if ExifTags.Base.Orientation in image.getexif():
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits per pixel, which Pillow would clip instead of scale
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


class _BoundedFile(io.BytesIO):
    """An encoded image that limits the number of reads."""

    _left = MAX_IMAGE_READS

    def read(self, size: int | None = -1, /) -> bytes:
        self._left -= 1
        if self._left < 0:
            raise TooLargeError(f"image has too many parts: it takes over {MAX_IMAGE_READS} reads")
        return super().read(size)


@contextmanager
def _opened(data: bytes, limits: Limits) -> Iterator[Image.Image]:
    """Open an image and check its limits; turn Pillow's errors into NotAnImageError."""
    try:
        with Image.open(_BoundedFile(data), formats=IMAGE_FORMATS) as image:
            _check_size(image.size, limits)
            if image.format in {"JPEG", "MPO"}:
                _check_scans(data)
            yield image
    except TrackerError:
        raise
    except Exception as err:  # Pillow's decoders raise many kinds of errors for damaged files
        raise NotAnImageError(
            f"image cannot be decoded ({type(err).__name__}): expected one of "
            f"{', '.join(IMAGE_FORMATS)}"
        ) from err


def _check_scans(data: bytes) -> None:
    scans = data.count(b"\xff\xda")
    if scans > MAX_JPEG_SCANS:
        raise TooLargeError(
            f"image has {scans} scans: at most {MAX_JPEG_SCANS} are allowed in a JPEG"
        )


def _check_size(size: tuple[int, int], limits: Limits) -> None:
    width, height = size
    if width * height > limits.image_pixels or max(size) > limits.image_side:
        raise TooLargeError(
            f"image has {width} x {height} pixels: at most {limits.image_pixels} in all and "
            f"{limits.image_side} a side are allowed"
        )
