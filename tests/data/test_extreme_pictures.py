"""Pictures with values or shapes far from ordinary: one value must not blacken a picture, one shape must not fill the memory."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image as PILImage
from tiny_clip import colour_dataset

from mmft_hf.captioning.ask.pictures import PicturePolicy, prepare
from mmft_hf.data.images import BadImage, original_bytes, read_image, to_bytes
from mmft_hf.data.views import ImageView, TextView, TrainingView
from mmft_hf.model.collator import MMFTDataCollator
from mmft_hf.predict.classifier import ImageClassifier
from mmft_hf.predict.heads import ClassPrototypes

RAMP = np.linspace(20_000, 22_000, 32 * 32).reshape(32, 32)
GREY = np.floor((RAMP - 20_000) / 2000 * 255 + 1e-9)  # an independent reckoning of what the ramp becomes


def tiff(values: np.ndarray, order: str = "<") -> bytes:
    """A grey TIFF, written by hand: Pillow writes neither signed nor big-endian values as they are."""
    height, width = values.shape
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    data = values.astype(values.dtype.newbyteorder(order)).tobytes()
    tags = [(256, width), (257, height), (258, 8 * values.itemsize), (259, 1), (262, 1), (273, 8), (277, 1)]
    tags += [(278, height), (279, len(data)), (339, kind)]
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags)
    start = b"II*\0" if order == "<" else b"MM\0*"
    return (
        start
        + struct.pack(f"{order}I", 8 + len(data))
        + data
        + struct.pack(f"{order}H", len(tags))
        + entries
        + b"\0" * 4
    )


def png(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    PILImage.fromarray(values.astype(np.uint16)).save(buffer, "PNG")
    return buffer.getvalue()


def read(data) -> np.ndarray:
    picture = np.asarray(read_image(data))
    assert (picture == picture[:, :, :1]).all()
    return picture[:, :, 0].astype(int)


FILES = {
    "png of 16 bits": lambda v: png(v),
    "tiff of 16 bits": lambda v: tiff(v.astype(np.uint16)),
    "big-endian tiff of 16 bits": lambda v: tiff(v.astype(np.uint16), ">"),
    "signed tiff of 16 bits": lambda v: tiff(v.astype(np.int16)),
    "signed big-endian tiff of 16 bits": lambda v: tiff(v.astype(np.int16), ">"),
    "tiff of 32 bits": lambda v: tiff(v.astype(np.int32)),
    "float tiff": lambda v: tiff(v.astype(np.float32)),
    "big-endian float tiff": lambda v: tiff(v.astype(np.float32), ">"),
}


@pytest.mark.parametrize("kind", FILES)
def test_ordinary_values_are_stretched_from_the_smallest_to_the_largest(kind):
    found = read(FILES[kind](RAMP))
    assert abs(found - GREY).max() <= 1 and found.min() == 0 and found.max() == 255


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("hot", [[32_767], [0], [32_767, 32_000, 31_000], [0, 32_767]])
def test_a_few_hot_or_dead_values_do_not_decide(kind, hot):
    values = RAMP.copy()
    values.flat[100 : 100 + len(hot)] = hot
    found = read(FILES[kind](values)).ravel()
    ordinary = np.delete(np.arange(found.size), range(100, 100 + len(hot)))
    assert abs(found - GREY.ravel())[ordinary].max() <= 3
    assert [found[100 + i] // 254 * 254 for i in range(len(hot))] == [254 if value > 22_000 else 0 for value in hot]


@pytest.mark.parametrize(("bad", "becomes"), [(np.nan, 0), (np.inf, 255), (-np.inf, 0), (3e38, 255), (-3e38, 0)])
@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("order", "<>")
def test_undefined_and_infinite_values_do_not_decide(bad, becomes, count, order):
    values = RAMP.astype(np.float32)
    values.flat[500 : 500 + count] = bad
    found = read(tiff(values, order)).ravel()
    assert abs(found[500 : 500 + count] - becomes).max() <= 1
    assert abs(np.delete(found - GREY.ravel(), range(500, 500 + count))).max() <= 3


@pytest.mark.filterwarnings("error")
def test_nothing_but_undefined_values_and_no_range_at_all_are_black():
    for value in (np.nan, np.inf, -np.inf, 0, 7e30):
        assert not read(PILImage.fromarray(np.full((4, 5), value, np.float32))).any(), value


@pytest.mark.filterwarnings("error")
def test_any_range_of_floats_is_stretched():
    for scale in (1e-37, 1e-20, 1, 1e35):
        found = to_bytes((np.linspace(-1, 1, 256).reshape(16, 16) * scale).astype(np.float32))
        assert abs(found.ravel().astype(int) - np.arange(256)).max() <= 1, scale


def test_bright_things_on_an_even_ground_stay():
    """Where all other values are equal, the few are the picture."""
    values = np.full((64, 64), 300.0)
    values[10, 10:12] = 60_000
    found = read(png(values))
    assert found[10, 10] == 255 and (found == 255).sum() == 2 and (found == 0).sum() == 64 * 64 - 2


def test_a_bright_part_of_some_size_decides():
    values = RAMP.copy()
    values[:2] = 32_000  # 64 of 1,024 pixels
    found = read(png(values))
    low = values.min()
    assert found[2:].max() == int((22_000 - low) / (32_000 - low) * 255)


def test_colours_of_16_bits_are_those_of_the_upper_byte():
    """Pillow scales them by a constant, so that no value decides for others."""
    raw = np.zeros((2, 3, 3), ">u2")
    raw[0, 0], raw[1, 2] = (0x1234, 0x5678, 0x9ABC), 0xFFFF
    lines = b"".join(b"\0" + row.tobytes() for row in raw)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 3, 2, 16, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    read = read_image(data)
    assert read.getpixel((0, 0)) == (0x12, 0x56, 0x9A) and read.getpixel((2, 1)) == (255,) * 3


# -- shapes -----------------------------------------------------------------------------------------------------------
SHAPES = [(100_000, 1), (1, 100_000), (30_000, 2), (2, 30_000), (20_000, 3)]


def strip(width: int, height: int, kind: str = "PNG") -> bytes:
    """Red, but blue in the middle fifth."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, :, 0] = 255
    long = pixels if height > width else pixels.swapaxes(0, 1)
    middle = len(long) // 2
    long[middle - len(long) // 10 : middle + len(long) // 10] = (0, 0, 255)
    buffer = io.BytesIO()
    PILImage.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def small_only(monkeypatch):
    """No picture of more than a million pixels is made on the way. The processor alone made 16 x 1,600,000 of 1 x 100,000."""
    resize, made = PILImage.Image.resize, []

    def recording(image, size, *args, **kwargs):
        made.append(size[0] * size[1])
        return resize(image, size, *args, **kwargs)

    monkeypatch.setattr(PILImage.Image, "resize", recording)
    yield
    assert max(made, default=0) < 1e6


@pytest.mark.parametrize("shape", SHAPES)
def test_of_an_extreme_shape_the_middle_is_read(shape):
    picture = read_image(strip(*shape))
    short, long = sorted(picture.size)
    assert short == min(shape) and long == 100 * short
    assert (picture.size[0] > picture.size[1]) == (shape[0] > shape[1])
    assert np.unique(np.asarray(picture).reshape(-1, 3), axis=0).tolist() == [[0, 0, 255]]


@pytest.mark.parametrize("shape", [(100, 1), (1, 100), (200, 2), (60, 60)])
def test_an_ordinary_shape_is_kept_whole(shape):
    assert read_image(PILImage.new("RGB", shape)).size == shape


@pytest.mark.parametrize("shape", SHAPES)
def test_every_way_of_an_extreme_shape_is_short(shape, clip, small_only):
    """Training with and without crops, evaluation, prediction, and what a captioner gets."""
    model, processor = clip
    features = colour_dataset(1).features
    pictures = [{"bytes": strip(*shape), "path": None}] * 2
    data = Dataset.from_dict({"image": pictures, "label": [0, 1], "captions": [[], []]}, features=features)
    names = data.features["label"].names
    blue = processor.image_processor(PILImage.new("RGB", (40, 40), (0, 0, 255)), return_tensors="pt")["pixel_values"][0]
    for view in (
        ImageView(data),
        TrainingView(data, TextView(names, "a {}."), 0.5),
        TrainingView(data, TextView(names, "a {}."), 1),
        TrainingView(data, TextView(names, "a {}."), 0.5, short_side=32),
    ):
        pixels = MMFTDataCollator(processor)([view[i] for i in range(2)])["pixel_values"]
        assert (pixels - blue).abs().max() < 0.02, type(view)
    classifier = ImageClassifier(model, processor, ClassPrototypes.from_templates(model, processor, names, "a {}."))
    assert (classifier.preprocess([strip(*shape)])[0] - blue).abs().max() < 0.02
    sent = prepare(strip(*shape), PicturePolicy())
    assert max(sent.width, sent.height) <= 512 and max(sent.width, sent.height) <= 100 * min(sent.width, sent.height)
    middle = PILImage.open(io.BytesIO(sent.data)).getpixel((sent.width // 2, sent.height // 2))
    assert middle[2] > 200 and middle[0] < 50


def test_a_small_but_extreme_picture_is_not_sent_as_it_is():
    sent = prepare(strip(500, 1, "PNG"), PicturePolicy())
    assert (sent.width, sent.height, sent.mime) == (100, 1, "image/jpeg")


# -- files that are no files -------------------------------------------------------------------------------------------
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_is_not_opened_and_an_address_not_fetched(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    for source in (tmp_path / "a.png", {"bytes": None, "path": str(tmp_path / "a.png")}):
        with pytest.raises(BadImage, match="expected a regular file"):
            read_image(source)
    with pytest.raises(BadImage, match="zero: expected a regular file"):
        original_bytes({"bytes": None, "path": "/dev/zero"})
    with pytest.raises(BadImage, match="found an address"):
        read_image("https://example.com/a.png")
    with pytest.raises(BadImage, match="expected a picture, found no such file"):
        read_image(tmp_path / "b.png")
