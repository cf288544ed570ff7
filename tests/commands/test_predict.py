"""`mmft-hf predict FOLDER`: what is classified, what is passed over, and what is said about it."""

import os

import pytest
from PIL import Image as PILImage
from tiny_clip import COLOURS

from mmft_hf.cli import main
from mmft_hf.data import images
from mmft_hf.predict.classifier import ImageClassifier
from mmft_hf.predict.heads import ClassPrototypes


@pytest.fixture(scope="module")
def saved(_clip, tmp_path_factory):
    """The folder of an untrained classifier."""
    folder = tmp_path_factory.mktemp("classifier")
    head = ClassPrototypes.from_templates(*_clip, list(COLOURS), "a photo of a {}.")
    ImageClassifier(*_clip, head).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shots").mkdir()
    return tmp_path / "shots"


def write(path, kind="PNG"):
    path.parent.mkdir(parents=True, exist_ok=True)
    PILImage.new("RGB", (8, 6), "red").save(path, kind)


def predict(capsys, saved, *arguments):
    """Exit code, classified files, and the lines about what is left out."""
    code = main(["predict", *arguments, "--model_name_or_path", str(saved)])
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return code, [line.split(": ")[0] for line in out.splitlines()], err


def test_junk_is_passed_over_and_other_files_are_counted_by_kind(saved, folder, capsys):
    for name, kind in (
        ("b.PNG", "PNG"),
        ("sub/a.jfif", "JPEG"),
        ("c.jpe", "JPEG"),
        ("d.ppm", "PPM"),
        ("q [1] é.png", "PNG"),
    ):
        write(folder / name, kind)
    for name in ("._b.png", "__MACOSX/b.png", ".cache/b.png", "@eaDir/b.png", "Thumbs.db", "_old/b.png"):
        write(folder / name)
    for name in ("x.CR2", "y.cr2", "z.psd", "notes.txt", "README"):
        (folder / name).write_bytes(b"something")
    code, files, err = predict(capsys, saved, "shots")
    assert code == 0
    assert files == [f"shots/{name}" for name in ("b.PNG", "c.jpe", "d.ppm", "q [1] é.png", "sub/a.jfif")]
    assert [line for line in err.splitlines() if "eft out" in line] == [
        "shots: Pictures that cannot be read, left out: 3 (x.CR2, y.cr2, z.psd). Convert them to JPEG or PNG.",
        "shots: Left out: files without a suffix: 1 (README); text files: 1 (notes.txt); folders that begin with _: 1 (_old with 1 picture).",
    ]


def test_heic_without_the_plug_in_names_the_extra(saved, folder, capsys, monkeypatch):
    heic = {".heic", ".heif", ".hif"}
    monkeypatch.setattr(images, "PICTURE_SUFFIXES", images.PICTURE_SUFFIXES - heic)
    for suffix in heic:
        monkeypatch.setitem(images.UNREADABLE_SUFFIXES, suffix, images._INSTALL[suffix])
    write(folder / "a.png")
    (folder / "IMG_1.HEIC").write_bytes(b"x")
    code, files, err = predict(capsys, saved, "shots")
    assert (code, files) == (0, ["shots/a.png"])
    assert 'shots: Pictures that cannot be read, left out: 1 (IMG_1.HEIC). Type pip install "mmft_hf[heic]".' in err
    (folder / "a.png").unlink()
    code, files, err = predict(capsys, saved, "shots")
    assert (code, files) == (2, [])
    assert "expected pictures in this folder" in err and '1 (IMG_1.HEIC). Type pip install "mmft_hf[heic]".' in err


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")
def test_links_are_followed_and_loops_end(saved, folder, capsys, tmp_path):
    write(folder / "a.png")
    write(tmp_path / "elsewhere" / "b.png")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (folder / "loop").symlink_to(folder)
    (folder / "broken.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(folder / "pipe.png")
    code, files, err = predict(capsys, saved, "shots")
    assert (code, files) == (0, ["shots/a.png", "shots/linked/b.png"])
    for words in (
        "links back to a folder above them: 1 (loop)",
        "broken links: 1 (broken.png)",
        "sockets: 1 (pipe.png)",
    ):
        assert words in err


def test_a_folder_without_anything_left_out_has_no_note(saved, folder, capsys):
    write(folder / "a.png")
    write(folder / "._a.png")
    code, files, err = predict(capsys, saved, "shots")
    assert (code, files) == (0, ["shots/a.png"]) and "eft out" not in err


def test_answers_do_not_depend_on_the_batch(saved, folder, capsys):
    for i in range(5):
        PILImage.new("RGB", (30 + i, 20), (50 * i, 90, 200 - 40 * i)).save(folder / f"{i}.png")
    (folder / "2b.png").write_bytes(b"no picture")
    classifier = ImageClassifier.from_pretrained(saved)
    expected = classifier.predict([str(folder / f"{i}.png") for i in range(5)], top_k=1)
    for size in ("1", "2", "64"):
        command = ["predict", "shots", "--model_name_or_path", str(saved), "--top_k", "1", "--batch_size", size]
        assert main(command) == 3
        lines = capsys.readouterr().out.splitlines()
        assert lines == [f"shots/{i}.png: {best['label']} {best['score']:.1%}" for i, (best,) in enumerate(expected)]
