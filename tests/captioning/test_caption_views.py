"""What is shown of a picture: parts and outlines. The stored bytes stay as they are."""

import io

import numpy as np
import pytest
from PIL import Image

from mmft_hf.captioning.ask.pictures import OUTLINE, PicturePolicy, outlined, part, prepare, shown
from mmft_hf.data.images import BadImage

QUARTERS = np.array([[[200, 0, 0], [0, 200, 0]], [[0, 0, 200], [200, 200, 0]]], np.uint8)


def encoded(pixels: np.ndarray, **how) -> bytes:
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG", **how)
    return data.getvalue()


@pytest.fixture
def four():
    """Four coloured quarters, 40 x 60 pixels."""
    return QUARTERS.repeat(30, 0).repeat(20, 1)


@pytest.mark.parametrize("number", range(4))
def test_a_quarter_has_its_colour_alone(four, number):
    found = np.asarray(part(Image.fromarray(four), f"quadrant:{number}"))
    assert found.shape == (30, 20, 3) and (found == QUARTERS.reshape(4, 3)[number]).all()


def test_quarters_of_odd_sides_cover_the_picture_once():
    image = np.arange(15).reshape(5, 3, 1).repeat(3, 2).astype(np.uint8)
    found = [np.asarray(part(Image.fromarray(image), f"quadrant:{k}"))[..., 0].ravel() for k in range(4)]
    assert sorted(np.concatenate(found)) == list(range(15))
    assert np.asarray(part(Image.fromarray(image[:1, :1]), "quadrant:0")).size == 3


def test_centre_and_box(four):
    image = Image.fromarray(four)
    assert (np.asarray(part(image, "centre")) == four[15:45, 10:30]).all()
    assert (np.asarray(part(image, "box:5,10,25,40")) == four[10:40, 5:25]).all()
    assert (np.asarray(part(image, "box:-5,50.2,10.5,99")) == four[50:, :11]).all()  # what lies within
    with pytest.raises(BadImage, match="a box within 40 x 60 pixels"):
        part(image, "box:50,0,60,9")
    with pytest.raises(ValueError, match="corner"):
        part(image, "corner")


@pytest.mark.parametrize("max_side", [60, 30])
def test_only_pixels_of_the_outline_change(four, max_side):
    policy = PicturePolicy(max_side)
    image = Image.fromarray(four)
    plain, marked = image.copy(), np.asarray(outlined(image, (10, 12, 30, 48), policy))
    plain.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    scale, edge = max_side / 60, np.zeros(marked.shape[:2], bool)
    x0, y0, x1, y1 = (int(scale * value) for value in (10, 12, 30, 48))
    edge[y0:y1, x0:x1] = True
    edge[y0 + 1 : y1 - 1, x0 + 1 : x1 - 1] = False
    assert (marked[edge] == OUTLINE).all()
    assert (marked[~edge] == np.asarray(plain)[~edge]).all()
    assert (np.asarray(image) == four).all()


def test_the_stored_bytes_stay_and_the_whole_is_what_captioning_sends(four):
    data = encoded(four)
    before = bytes(data)
    policy = PicturePolicy()
    assert shown(data, "whole", policy) == prepare(data, policy)
    found = shown(data, "marked:10,12,30,48", policy)
    assert (found.mime, found.width, found.height) == ("image/jpeg", 40, 60) and data == before
    small = shown(data, "quadrant:3", PicturePolicy(10))
    assert (small.width, small.height) == (7, 10)
    assert np.abs(np.asarray(Image.open(io.BytesIO(small.data))).astype(int) - QUARTERS[1, 1]).max() < 5


def test_parts_are_those_of_the_upright_picture(four):
    """A photograph that is stored on its side, with a tag that says so: the box counts in pixels as it is seen."""
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = encoded(np.rot90(four).copy(), exif=exif)
    found = np.asarray(Image.open(io.BytesIO(shown(stored, "box:0,0,20,30", PicturePolicy()).data)))
    assert found.shape == (30, 20, 3) and np.abs(found.astype(int) - QUARTERS[0, 0]).max() < 5


def test_what_cannot_be_decoded_is_told():
    with pytest.raises(BadImage):
        shown(b"\x89PNG broken", "centre", PicturePolicy())
