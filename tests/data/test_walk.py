"""The list of what is below a folder: links, junk, and what is not entered."""

import os
import socket

from mmft_hf.data import walk as w
from mmft_hf.data.walk import walk


def make(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(path)
    return root


def test_files_are_sorted_by_their_path_whatever_the_order_of_creation(tmp_path):
    names = ["b/2.png", "a/10.png", "a.x/1.png", "a/2.png", "0.txt", "ä [1]/% #*?.png", "a/b c'\"/1.png"]
    tree = walk(make(tmp_path, *names))
    assert tree.files == sorted(names)
    assert tree.folders == ["a", "a.x", "a/b c'\"", "b", "ä [1]"] and not tree.left_out
    assert all(os.path.isfile(tree.path(file)) for file in tree.files)


def test_junk_and_hidden_names_are_passed_over_in_silence(tmp_path):
    junk = [".DS_Store", "a/._1.png", "a/Thumbs.db", "__MACOSX/a/1.png", "a/desktop.ini", "@eaDir/1.png", ".git/1.png"]
    tree = walk(make(tmp_path, "a/1.png", "a/_DSC1.png", "a/.ipynb_checkpoints/1.png", *junk))
    assert (tree.files, tree.folders, tree.left_out) == (["a/1.png", "a/_DSC1.png"], ["a"], {})


def test_links_are_followed_and_circles_end(tmp_path):
    elsewhere, root = make(tmp_path / "elsewhere", "cats/1.png", "cats/2.png", "dog.png"), tmp_path / "root"
    make(root, "dog/1.png")
    (root / "cat").symlink_to(elsewhere / "cats")
    (root / "dog" / "linked.png").symlink_to(elsewhere / "dog.png")
    (root / "dog" / "again.png").symlink_to(elsewhere / "dog.png")
    (root / "dog" / "up").symlink_to(root)
    (root / "dog" / "self").symlink_to("self")
    (root / "dog" / "lost.png").symlink_to("nowhere.png")
    (root / "dog" / "cats").symlink_to(elsewhere / "cats")  # another class, so it is listed there, too
    tree = walk(root)
    assert tree.files == [
        "cat/1.png",
        "cat/2.png",
        "dog/1.png",
        "dog/again.png",
        "dog/cats/1.png",
        "dog/cats/2.png",
        "dog/linked.png",
    ]
    assert tree.left_out == {w.LOOP: ["dog/up"], w.BROKEN: ["dog/lost.png", "dog/self"]}
    assert tree.real("cat/1.png") == tree.real("dog/cats/1.png") == os.path.realpath(elsewhere / "cats" / "1.png")
    assert tree.real("dog/again.png") == tree.real("dog/linked.png") != tree.real("dog/1.png")


def test_folders_that_link_to_each_other_are_listed_a_few_times_at_most(tmp_path):
    for one in "abcdef":
        make(tmp_path, f"{one}/1.png")
        for other in "abcdef":
            (tmp_path / one / other).symlink_to(tmp_path / other)
    tree = walk(tmp_path)
    assert {path.split("/")[0] for path in tree.files} == set("abcdef") and len(tree.files) < 1000
    assert tree.left_out[w.LOOP]


def test_what_is_no_file_is_never_opened(tmp_path):
    make(tmp_path, "a/1.png")
    os.mkfifo(tmp_path / "a" / "2.png")
    with socket.socket(socket.AF_UNIX) as opened:
        here = os.getcwd()
        os.chdir(tmp_path)  # the name of a socket is short
        try:
            opened.bind("3.png")
        finally:
            os.chdir(here)
        tree = walk(tmp_path)
    assert (tree.files, tree.left_out) == (["a/1.png"], {w.SPECIAL: ["3.png", "a/2.png"]})


def test_folders_that_are_not_entered_are_named(tmp_path):
    make(tmp_path, "a/1.png", "_old/1.png", "a/_raw/1.png", "runs/one/mmft.json", "runs/one/confusion.png")
    (tmp_path / os.fsdecode(b"caf\xe9")).mkdir()
    tree = walk(tmp_path)
    assert tree.files == ["a/1.png"] and tree.folders == ["a", "runs"]
    assert tree.left_out == {w.UNDERSCORE: ["_old", "a/_raw"], w.OURS: ["runs/one"], w.NO_TEXT: ["caf\ufffd"]}
    assert walk(tmp_path / "_old").files == ["1.png"]
    assert walk(tmp_path / "runs" / "one").files == ["confusion.png", "mmft.json"]


def test_a_folder_without_permission_is_named(tmp_path, monkeypatch):
    make(tmp_path, "a/1.png", "b/1.png")
    scandir = os.scandir

    def refuse(path):
        if os.path.basename(path) == "b":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    tree = walk(tmp_path)
    assert tree.files == ["a/1.png"] and tree.left_out == {w.CLOSED: ["b"]}
