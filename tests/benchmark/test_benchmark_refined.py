"""Methods on refined captions beside the same methods on those of the dataset: equal terms, and whether refining paid."""

import hashlib
import json
import re

import pytest
from benchmark_tools import command
from datasets import Image, List, Value, load_dataset
from test_benchmark_report import a_folder, row

from mmft_hf.benchmark.report.page import write_report
from mmft_hf.benchmark.report.refining import refining
from mmft_hf.benchmark.report.statistics import gather
from mmft_hf.benchmark.report.verdict import baselines
from mmft_hf.benchmark.run.arguments import BenchmarkArguments
from mmft_hf.benchmark.run.methods import METHODS
from mmft_hf.benchmark.run.refined import parse_refined
from mmft_hf.benchmark.run.results import RESULTS_FILE, read_results
from mmft_hf.cli import main
from mmft_hf.core.errors import UserError

SOME = ("--shots", 2, "--seeds", 0, "--methods")
OWN = ("zs-cap", "mmft")


def split_of(folder, name):
    return load_dataset("parquet", data_files=str(folder / f"{name}.parquet"), split="train")


def with_captions(data, captions):
    data = data.remove_columns("captions") if "captions" in data.column_names else data
    return data.add_column("captions", captions, feature=List(Value("string")))


def with_digests(data):
    stored = data.cast_column("image", Image(decode=False))["image"][:]
    return data.add_column("image_sha256", [hashlib.sha256(image["bytes"]).hexdigest() for image in stored])


def better(data):
    """Captions that a refinement could have left: one per picture, and none for the first."""
    texts = [[f"{own[1]}, plainly {i % 5}"] for i, own in enumerate(data["captions"][:])]
    return [[], *texts[1:]]


@pytest.fixture(scope="module")
def refined(data_folder, tmp_path_factory):
    """A folder with refined captions of the training images, in another order; captions of other splits must not be read."""
    folder = tmp_path_factory.mktemp("refined")
    train = split_of(data_folder, "train")
    rows = with_digests(with_captions(train, better(train)))
    rows.select(reversed(range(len(rows)))).to_parquet(folder / "train.parquet")
    with_captions(rows, [["of the test"]] * len(rows)).to_parquet(folder / "test.parquet")
    return folder


def whole(folder, data_folder):
    """The dataset with the refined captions for its own."""
    for name in ("validation", "test"):
        split_of(data_folder, name).to_parquet(folder / f"{name}.parquet")
    train = split_of(data_folder, "train")
    with_captions(train, better(train)).to_parquet(folder / "train.parquet")
    return folder


def numbers(folder, suffix="") -> dict:
    """What a method found, by its name without the suffix."""
    kept = ("status", "test_accuracy", "predictions", "validation_accuracy", "chosen", "steps", "train_images", "seed")
    rows = read_results(folder / RESULTS_FILE)
    return {
        row["method"].removesuffix(suffix): {k: row.get(k) for k in kept}
        for row in rows
        if row["method"].endswith(suffix)
    }


@pytest.fixture(scope="module")
def both(clip_folder, data_folder, refined, tmp_path_factory):
    """Results on the captions of the dataset, to which those on refined captions were added by a second command."""
    out = tmp_path_factory.mktemp("both") / "out"
    assert main(command(clip_folder, data_folder, out, *SOME, *OWN)) == 0
    arms = [f"{name}@refined" for name in OWN]
    assert main(command(clip_folder, data_folder, out, *SOME, *OWN, *arms, "--refined", refined)) == 0
    return out


def test_a_method_on_refined_captions_is_that_method_on_a_dataset_with_these_captions(
    both, clip_folder, data_folder, refined, tmp_path
):
    assert main(command(clip_folder, whole(tmp_path, data_folder), tmp_path / "out", *SOME, *OWN)) == 0
    expected, found, raw = numbers(tmp_path / "out"), numbers(both, "@refined"), numbers(both)
    assert found == expected and {own["status"] for own in found.values()} == {"done"}
    assert all(raw[name] != found[name] for name in OWN)  # else the captions would not matter


@pytest.mark.slow
def test_every_kind_of_method_takes_refined_captions(clip_folder, data_folder, refined, tmp_path):
    own = (
        "zs+auto",
        "zs+mean",
        "timo-cap",
        "gda-cap",
        "mmft-shuffle-within",
        "mmft-mixed",
        "mmft+auto",
        "2sfs-cap",
        "ce-last4",
    )
    arms = [f"{name}@refined" for name in own]
    words = command(clip_folder, data_folder, tmp_path / "arms", *SOME, *arms, "--refined", refined)
    assert main(words) == 0
    assert main(command(clip_folder, whole(tmp_path, data_folder), tmp_path / "out", *SOME, *own)) == 0
    assert numbers(tmp_path / "arms", "@refined") == numbers(tmp_path / "out")


def test_results_on_the_captions_of_the_dataset_stay_and_each_row_knows_the_captions_that_it_read(both, refined):
    rows = read_results(both / RESULTS_FILE)
    assert [row["method"] for row in rows] == [*OWN, *(f"{name}@refined" for name in OWN)]
    assert ["captions" in row["identity"] for row in rows] == [False] * 2 + [True] * 2
    (fingerprint,) = {row["identity"]["captions"]["refined"] for row in rows[2:]}
    assert len(fingerprint) == 16
    assert len({row["identity"]["dataset_fingerprint"] for row in rows}) == 1
    counts = json.loads((both / "data.json").read_text())["refined"]["refined"]
    assert (counts["images"], counts["captions"], counts["folder"]) == (23, 23, refined.name)


def test_the_page_answers_and_repeats_the_command(both, refined):
    page = (both / "report.html").read_text()
    assert f"--refined {refined.name}" in page and "23 refined captions of 23 training images" in page
    assert "too few seeds to say whether refining paid" in page
    assert "<th>mmft@refined − mmft<small>" in page and "mmft with the captions of refined." in page


def test_other_refined_captions_under_the_same_name_are_refused(both, clip_folder, data_folder, tmp_path, capsys):
    train = split_of(data_folder, "train")
    with_digests(with_captions(train, [["another"]] * len(train))).to_parquet(tmp_path / "train.parquet")
    words = command(clip_folder, data_folder, both, *SOME, "mmft@refined", "--refined", tmp_path)
    assert main(words) == 2
    assert "the captions of --refined refined have changed since" in capsys.readouterr().err
    words = command(clip_folder, data_folder, both, *SOME, "zs-cap@other", "--refined", f"other={tmp_path}")
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "other: With 2 shots, there are too few seeds to say whether refining paid." in printed
    assert {row["method"] for row in read_results(both / RESULTS_FILE)} == {
        *OWN,
        *(f"{m}@refined" for m in OWN),
        "zs-cap@other",
    }


def test_the_refined_folder_must_have_each_training_image(clip_folder, data_folder, refined, tmp_path, capsys):
    rows = split_of(refined, "train")
    rows.select(range(21)).to_parquet(tmp_path / "train.parquet")
    words = command(clip_folder, data_folder, tmp_path / "out", *SOME, "mmft", "mmft@refined", "--refined", tmp_path)
    assert main(words) == 2
    printed = capsys.readouterr().err
    assert "expected captions of each of the 24 training images, found 3 that are not there" in printed
    assert "Type the folder that mmft-hf caption refine made of this dataset" in printed
    turned = [(label + 1) % 3 if i < 2 else label for i, label in enumerate(rows["label"][:])]
    other = rows.remove_columns("label").add_column("label", turned, feature=rows.features["label"])
    other.to_parquet(tmp_path / "train.parquet")
    assert main(words) == 2
    assert "found 2 that have another class there" in capsys.readouterr().err
    split_of(data_folder, "train").to_parquet(tmp_path / "train.parquet")
    assert main(words) == 2
    assert "expected columns captions and image_sha256, found image, label, captions" in capsys.readouterr().err
    assert not (tmp_path / "out" / RESULTS_FILE).exists()


def test_methods_and_folders_must_fit(clip_folder, data_folder, refined, tmp_path, capsys):
    for methods, folders, expected in (
        (["mmft@refined"], [], "--methods mmft@refined: found no --refined refined. Type --refined FOLDER, too."),
        (["mmft@other"], [refined], "--methods mmft@other: found no --refined other=FOLDER. Expected one of refined."),
        (["zs@refined"], [refined], "--methods zs@refined: expected a method that reads captions, found zs."),
        (
            ["mmft"],
            [refined],
            "--refined: expected methods that read 'refined', found none. Type --methods mmft mmft@refined",
        ),
        (["mmtf@refined"], [refined], "--methods: found 'mmtf@refined'."),
        (["mmft@a"], ["a=x", "a=y"], "--refined: expected one folder for each name, found x and y for 'a'."),
        (["mmft@a b"], ["a b=x"], "--refined: expected FOLDER, or NAME=FOLDER with a name of letters"),
    ):
        words = command(clip_folder, data_folder, tmp_path / "out", *SOME, *methods)
        assert main([*words, "--refined", *map(str, folders)] if folders else words) == 2
        assert expected in capsys.readouterr().err


def test_a_refined_folder_alone_asks_for_its_methods_and_their_controls():
    assert BenchmarkArguments(refined=["outputs/a"]).methods == [
        *("zs-cap", "zs-cap@refined", "mmft", "mmft@refined"),
        *("mmft-shuffle-within", "mmft-no-captions"),
    ]
    assert "mmft@b" in BenchmarkArguments(refined=["a=x", "b=y"]).methods
    assert BenchmarkArguments(refined=["x"], methods=["mmft@refined"]).methods == ["mmft@refined"]
    assert parse_refined(["x", "short=y/z"]) == {"refined": "x", "short": "y/z"}
    with pytest.raises(UserError, match="expected FOLDER"):
        parse_refined(["a="])


def test_a_folder_with_an_equals_sign_is_a_folder(tmp_path):
    (tmp_path / "a=b").mkdir()
    assert parse_refined([str(tmp_path / "a=b")]) == {"refined": str(tmp_path / "a=b")}


def test_methods_that_read_captions_are_known_as_such():
    reading = {name for name, method in METHODS.items() if method.reads_captions}
    assert {
        "mmft",
        "zs-cap",
        "zs+auto",
        "zs+mean",
        "zs+kernel",
        "ce+auto",
        "clip-lora+kernel",
        "mmft-test-captions",
    } <= reading
    without = {"zs", "lp", "flyp", "flyp+auto", "flyp+kernel", "mmft-no-captions+auto", "zs-no-captions+auto", "ce"}
    assert not without & reading


# -- captions that count by a score --------------------------------------------------------------------------------------
def with_scores(data, sign=1):
    """Records whose score `clip` depends on the text."""

    def score(text):
        return sign * int(hashlib.sha256(text.encode()).hexdigest()[:4], 16) / 16**4

    records = [
        [{"text": text, "scores": [{"name": "clip", "value": score(text)}]} for text in own or ()]
        for own in data["captions"][:]
    ]
    return data.add_column("caption_records", records)


def test_weights_are_for_the_method_that_weighs_alone(both, clip_folder, data_folder, refined, tmp_path, capsys):
    """On a refined folder it is what it is on a dataset with these captions and scores."""
    scored, own, out = tmp_path / "scored", tmp_path / "own", tmp_path / "out"
    for folder in (scored, own):
        folder.mkdir()
    with_scores(split_of(refined, "train")).to_parquet(scored / "train.parquet")
    weight = ("--sample_weight", "score:clip")
    arms = ("mmft", "mmft@refined", "mmft-weighted@refined", "--refined", scored, *weight)
    assert main(command(clip_folder, data_folder, tmp_path / "arms", *SOME, *arms)) == 0
    captions = split_of(whole(own, data_folder), "train")
    with_scores(captions).to_parquet(own / "train.parquet")
    words = command(clip_folder, own, out, *SOME, "mmft", "mmft-weighted", *weight)
    assert main(words) == 0
    found, expected = numbers(tmp_path / "arms", "@refined"), numbers(out)
    assert found == expected and found["mmft"] != found["mmft-weighted"]
    assert {one["status"] for one in found.values()} == {"done"}
    assert numbers(tmp_path / "arms")["mmft"] == numbers(both)["mmft"]  # which weighs nothing

    identities = {row["method"]: row["identity"] for row in read_results(out / RESULTS_FILE)}
    assert "weights" not in identities["mmft"] and "sample_weight" not in identities["mmft"]["settings"]
    assert re.fullmatch(r"score:clip [0-9a-f]{16}", identities["mmft-weighted"]["weights"][""])
    assert "--sample_weight score:clip" in (out / "report.html").read_text()

    with_scores(captions, -1).to_parquet(own / "train.parquet")
    capsys.readouterr()
    assert main(words) == 2
    assert "the scores of the captions have changed since" in capsys.readouterr().err
    assert main(command(clip_folder, own, out, *SOME, "mmft")) == 0  # scores are not its business


@pytest.mark.parametrize(
    "words, expected",
    [
        (["mmft-weighted"], "--methods mmft-weighted: expected the score by which captions count, found none"),
        (
            ["mmft", "--sample_weight", "score:clip"],
            "expected a method that weighs captions, found none, with score:clip",
        ),
        (["mmft-weighted", "--sample_weight", "score:clip"], "expected columns captions and caption_records"),
        (["mmft-text-mix"], "--methods mmft-text-mix: expected the mix of texts, found none"),
        (
            ["mmft", "--text_mix", "template=0.2"],
            "expected a method that draws texts by it, found none, with template=0.2",
        ),
        (["mmft-text-mix", "--text_mix", "short=0.2"], "expected columns captions and caption_records"),
    ],
)
def test_a_setting_of_captions_and_a_method_that_reads_it_belong_together(
    words, expected, clip_folder, data_folder, tmp_path, capsys
):
    assert main(command(clip_folder, data_folder, tmp_path / "out", *SOME, *words)) == 2
    assert expected in capsys.readouterr().err


# -- the answer ------------------------------------------------------------------------------------------------------------
def told(tmp_path, **methods):
    """What refining did, from accuracies at four shots; `_at_` stands for @."""
    named = {m.replace("_at_", "@").replace("_", "-"): values for m, values in methods.items()}
    rows = [row(m, 4, seed, accuracy=x) for m, values in named.items() for seed, x in enumerate(values)]
    found = refining(gather(rows, tmp_path))
    return [(arm.headline, " ".join(arm.sentences), list(arm.comparisons)) for arm in found]


def test_the_answer_follows_from_the_numbers(tmp_path):
    raw = {"mmft": [0.5, 0.51, 0.52], "mmft_shuffle_within": [0.3, 0.32, 0.3], "mmft_no_captions": [0.4, 0.42, 0.41]}
    ((headline, text, compared),) = told(
        tmp_path, **raw, mmft_at_refined=[0.6, 0.62, 0.6], zs_cap=[0.4] * 3, zs_cap_at_refined=[0.4] * 3
    )
    assert headline == "With 4 shots, refining paid."
    # differences 10, 11, 8: mean 9.67, standard deviation 1.53, Student's t with two degrees of freedom 4.303
    assert (
        "mmft on refined captions against mmft on those of the dataset: +9.7 points with 4 shots (seeds +5.9 to +13.5)."
        in text
    )
    assert "zs-cap on refined captions against zs-cap on those of the dataset: 0.0 points" in text
    assert "captions are worth more with their own image than with another one of its class (+20.3 points" in text
    assert (
        "Against the class template alone (mmft-no-captions): with 4 shots, refined captions help (+19.7 points" in text
    )
    assert compared == [
        ("mmft@refined", "mmft"),
        ("zs-cap@refined", "zs-cap"),
        ("mmft", "mmft-shuffle-within"),
        ("mmft@refined", "mmft-no-captions"),
    ]
    ((headline, text, _),) = told(tmp_path, mmft=[0.5, 0.51, 0.52], mmft_at_refined=[0.4, 0.42, 0.41])
    assert headline == "With 4 shots, refining hurt." and "mmft-shuffle-within was not run: add it to --methods" in text
    ((headline, text, _),) = told(tmp_path, mmft=[0.5, 0.6, 0.52], mmft_at_refined=[0.55, 0.5, 0.6])
    assert headline == "With 4 shots, refining made no difference that stands out from chance."
    level = {"mmft_shuffle_within": [0.55, 0.5, 0.6]}
    ((_, text, _),) = told(tmp_path, mmft=[0.5, 0.6, 0.52], mmft_at_refined=[0.55, 0.5, 0.6], **level)
    assert (
        "which image of its class a caption belongs to, so captions that fit their image better can hardly help" in text
    )
    ((headline, text, _),) = told(tmp_path, mmft_at_refined=[0.6])
    assert (
        "there are no results of mmft on the captions of the dataset" in headline and text == "Add mmft to --methods."
    )
    assert told(tmp_path, mmft=[0.5]) == []
    rows = [row(m, 1, s, accuracy=0.5) for m in ("mmft", "mmft@refined", "mmft-shuffle-within") for s in range(3)]
    (arm,) = refining(gather(rows, tmp_path))  # with one image per class nothing is shuffled
    assert "shuffle" not in " ".join(arm.sentences) and list(arm.comparisons) == [("mmft@refined", "mmft")]
    two = told(tmp_path, zs_cap=[0.4, 0.5], zs_cap_at_a=[0.5, 0.5], zs_cap_at_b=[0.4, 0.5])
    assert [headline.partition(":")[0] for headline, _, _ in two] == ["a", "b"]


def test_refined_captions_of_two_contents_are_never_averaged(tmp_path):
    rows = [
        row("mmft", 4, 0, accuracy=0.5),
        row("mmft@refined", 4, 0, accuracy=0.5),
        row("mmft@refined", 4, 1, accuracy=0.5),
    ]
    for i, own in enumerate(rows[1:]):
        own["identity"] = {**own["identity"], "captions": {"refined": str(i)}}
    with pytest.raises(UserError, match=r"rows that differ in captions.refined \(0, 1\)"):
        gather(rows, tmp_path)
    rows[2]["identity"] = rows[1]["identity"] | {"captions": {"other": "1"}}
    assert gather(rows, tmp_path).identity["captions"] == {"refined": "0", "other": "1"}


def test_a_method_that_may_read_captions_is_no_baseline_without_them(tmp_path):
    rows = [row(name, 4, 0, accuracy=0.5) for name in ("mmft", "mmft@refined", "zs+auto", "zs-no-captions+auto", "lp")]
    assert baselines(gather(rows, tmp_path)) == ["zs-no-captions+auto", "lp"]


def test_a_page_of_refined_captions_alone_explains_its_marks(tmp_path):
    rows = [row(name, 4, seed, accuracy=0.5 + seed / 10) for name in ("zs-cap", "zs-cap@refined") for seed in range(3)]
    page = write_report(a_folder(tmp_path / "out", rows)).read_text()
    assert page.count("neither 95 % interval") + page.count("the 95 % interval over seeds") >= 1
    assert "zs-cap@refined − zs-cap" in page
