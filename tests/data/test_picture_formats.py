"""Which files are pictures: formats, suffixes, and what is said about the others."""

import base64
import io

import pytest
from PIL import Image as PILImage

from mmft_hf.data import images
from mmft_hf.data.images import PICTURE_SUFFIXES, UNREADABLE_SUFFIXES, BadImage, read_image

# Stored with 32 x 64 pixels, red above blue. The container turns it by 90 degrees clockwise, to blue beside red. Its EXIF tag says
# the same once more, and must not turn it again.
HEIC = base64.b64decode(
    """
AAAAHGZ0eXBoZWljAAAAAG1pZjFoZWljbWlhZgAAAchtZXRhAAAAAAAAACFoZGxyAAAAAAAAAABwaWN0AAAAAAAAAAAAAAAAAAAAADRpbG9jAA
AAAERAAAIAAQAAAAAB7AABAAAAAAAAAHEAAgAAAAACXQABAAAAAAAAACQAAAA4aWluZgAAAAAAAgAAABVpbmZlAgAAAAABAABodmMxAAAAABVp
bmZlAgAAAQACAABFeGlmAAAAAA5waXRtAAAAAAABAAABB2lwcnAAAADmaXBjbwAAAHZodmNDAQNwAAAAkAAAAAAAHvAA/P34+AAADwNgAAEAGE
ABDAH//wNwAAADAJAAAAMAAAMAHroCQGEAAQAqQgEBA3AAAAMAkAAAAwAAAwAeoCCBBZbq5Ka5uAhoMCAAAAMDIAAAAwAhYgABAAZEAcFzwIkA
AAATY29scm5jbHgAAQANAAaAAAAAFGlzcGUAAAAAAAAAQAAAAEAAAAAoY2xhcAAAACAAAAABAAAAQAAAAAH////gAAAAAgAAAAAAAAACAAAAEH
BpeGkAAAAAAwgICAAAAAlpcm90AwAAABlpcG1hAAAAAAAAAAEAAQaBAgMFhIYAAAAaaXJlZgAAAAAAAAAOY2RzYwACAAEAAQAAAJ1tZGF0AAAA
bSgBrwngOSMkv//6Mb//+EaeQ/a5hrVdc//4wXn3+GxJ//uJ7rnmiQW9zn++IREhAR5jzD7xfAx2MEfWvfThUyVnf1sSO32xWhBvhzLv9Llb2I
dfu0J1L0K9sRv/Z7oTvoDHqLkd+tws4iDWR4AAAAAGRXhpZgAATU0AKgAAAAgAAQESAAMAAAABAAYAAAAAAAA=
    """
)


@pytest.mark.parametrize("suffix", sorted(PICTURE_SUFFIXES - {".heic", ".heif", ".hif"}))
def test_every_suffix_of_pictures_is_read(suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    formats = {
        ".jfif": "JPEG",
        ".jpe": "JPEG",
        ".apng": "PNG",
        ".pbm": "PPM",
        ".pgm": "PPM",
        ".pnm": "PPM",
        ".pfm": "PPM",
    }
    mode = {".pbm": "1", ".pgm": "L", ".pfm": "F"}.get(suffix, "RGB")
    picture = PILImage.new("L", (8, 6), "black")
    picture.paste(255, (4, 0, 8, 6))
    picture.convert(mode).save(path, formats.get(suffix))
    read = read_image(path)
    assert read.size == (8, 6) and max(read.getpixel((0, 3))) < 30 and min(read.getpixel((7, 3))) > 225


def test_no_suffix_is_both_and_phones_are_in_one():
    assert not PICTURE_SUFFIXES & set(UNREADABLE_SUFFIXES)
    for suffix in (".heic", ".heif", ".avif", ".cr2", ".nef", ".dng", ".arw", ".psd", ".svg", ".pdf", ".jxl"):
        assert suffix in PICTURE_SUFFIXES or UNREADABLE_SUFFIXES[suffix], suffix


def test_heic_is_read_upright_with_a_plug_in_and_otherwise_names_the_extra():
    if images.HEIF:
        read = read_image(HEIC)
        assert read.size == (64, 32)
        assert read.getpixel((8, 16))[2] > 150 and read.getpixel((56, 16))[0] > 150
        return
    with pytest.raises(BadImage, match=r'found HEIC: type pip install "mmft_hf\[heic\]"'):
        read_image(HEIC)
    assert "mmft_hf[heic]" in UNREADABLE_SUFFIXES[".heic"]


@pytest.mark.skipif(not images.AVIF, reason="this Pillow has no AVIF")
def test_avif_keeps_orientation_and_transparency():
    picture = PILImage.new("RGBA", (64, 32), (200, 0, 0, 255))
    picture.paste((0, 0, 0, 0), (32, 0, 64, 32))
    exif, buffer = PILImage.Exif(), io.BytesIO()
    exif[0x0112] = 6
    picture.save(buffer, "AVIF", exif=exif)
    read = read_image(buffer.getvalue())
    assert read.size == (32, 64) and read.getpixel((16, 8))[0] > 150 and min(read.getpixel((16, 56))) > 240


def test_avif_names_what_to_install_where_pillow_lacks_it(monkeypatch):
    start = b"\0\0\0\x20ftypavif\0\0\0\0avifmif1miafMA1B"
    monkeypatch.setitem(images.UNREADABLE_SUFFIXES, ".avif", images._INSTALL[".avif"])
    with pytest.raises(BadImage, match=r'found AVIF: type pip install "pillow>=11.3"'):
        read_image(start)
