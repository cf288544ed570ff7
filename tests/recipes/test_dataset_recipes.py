"""The recipe of each benchmark opens data of its schema: splits, class names, prompts. The data here are small fakes."""

import hashlib
import importlib
import io
import json
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from PIL import Image as PILImage

from mmft_hf import cli
from mmft_hf.benchmark.run.methods import METHODS
from mmft_hf.benchmark.run.protocol import parse_shots
from mmft_hf.captioning.arguments import CaptionArguments
from mmft_hf.commands.parser import parse
from mmft_hf.core.arguments import DataArguments
from mmft_hf.core.errors import UserError
from mmft_hf.data.images import original_bytes
from mmft_hf.data.splits import labels_of, load_splits
from mmft_hf.data.texts import DEFAULT_TEMPLATE, class_prompt

RECIPES = Path(__file__).parents[2] / "recipes"
CORRUPTED = "contrast gaussian_noise impulse_noise jpeg_compression motion_blur pixelate spatter".split()
SIGNS = [f"sign {i}" for i in range(43)]
LAND = (
    "AnnualCrop Forest HerbaceousVegetation Highway Industrial Pasture PermanentCrop Residential River SeaLake".split()
)


@dataclass
class Fake:
    """A dataset of a recipe's schema. `more` are ClassLabel columns beside it, with the wrong answers."""

    names: list[str]
    prompts: dict[int, str]  # of some classes, as training and zero-shot see them
    domain: str
    images: dict[str, int] = field(default_factory=lambda: {"train": 10, "test": 3})  # per class
    expected: tuple = (9, 1, 3)  # of each class: train, validation, test
    image: str = "image"
    label: str = "label"
    more: tuple = ()
    unlabelled: tuple = ()
    test: str = "test"


OFFICIAL = {"images": {"train": 6, "validation": 4, "test": 5}, "expected": (6, 4, 5)}
FAKES = {
    "imagenet": Fake(
        ["tench, Tinca tinca", "goldfish, Carassius auratus"],
        {0: "a photo of a tench, Tinca tinca."},
        "general objects",
        images={"train": 10, "validation": 3, "test": 4},
        unlabelled=("test",),
        test="validation",
    ),
    "caltech101": Fake(["Leopards", "car_side", "yin_yang"], {1: "a photo of a car side."}, "general objects"),
    "pets": Fake(["abyssinian", "saint_bernard"], {1: "a photo of a saint bernard."}, "pets", more=("label_cat_dog",)),
    "cars": Fake(
        ["AM General Hummer SUV 2000", "Acura RL Sedan 2012"], {1: "a photo of a Acura RL Sedan 2012."}, "cars"
    ),
    "flowers": Fake(
        ["pink primrose", "hard-leaved pocket orchid"],
        {1: "a photo of a hard leaved pocket orchid."},
        "flowers",
        **OFFICIAL,
    ),
    "food101": Fake(
        ["apple_pie", "baby_back_ribs"],
        {1: "a photo of a baby back ribs."},
        "food",
        images={"train": 10, "validation": 3},
        test="validation",
    ),
    "aircraft": Fake(
        ["707-320", "A321"],
        {0: "a photo of a 707 320."},
        "aircrafts",
        images={"train": 6, "val": 4, "test": 5},
        expected=(6, 4, 5),
        label="variation",
        more=("label", "manufacturer"),
    ),
    "cub": Fake(["Black_footed_Albatross", "Crested_Auklet"], {0: "a photo of a Black footed Albatross."}, "birds"),
    "dtd": Fake(["banded", "polka-dotted"], {1: "a photo of a polka dotted."}, "textures", **OFFICIAL),
    "eurosat": Fake(
        LAND, {0: "a photo of a annual crop land.", 9: "a photo of a sea or lake."}, "satellite", **OFFICIAL
    ),
    "gtsrb": Fake(
        SIGNS,
        {
            0: "a photo of a speed limit 20 sign.",
            8: "a photo of a speed limit 120 sign.",
            14: "a photo of a stop sign, a red octagon.",
            17: "a photo of a no entry sign, a white bar on a red disc.",
            26: "a photo of a warning sign of traffic lights.",
            38: "a photo of a keep right sign, a blue disc with an arrow down to the right.",
            42: "a photo of a end of no overtaking by trucks sign with a grey truck.",
        },
        "traffic signs",
        images={"train": 10, "test": 3} | dict.fromkeys(CORRUPTED, 1),
    ),
    "cifar10": Fake(["airplane", "automobile"], {0: "a photo of a airplane."}, "general objects", image="img"),
    "cifar100": Fake(
        ["apple", "aquarium_fish", "sweet_pepper"],
        {1: "a photo of a aquarium fish."},
        "general objects",
        image="img",
        label="fine_label",
        more=("coarse_label",),
    ),
}


def write(fake: Fake, folder: Path) -> dict[str, set[str]]:
    """Writes the fake as the Hub holds it; returns the sha256 of the pictures of each split."""
    rng, written = np.random.default_rng(0), {}
    features = {fake.image: Image(), fake.label: ClassLabel(names=fake.names), "image_id": Value("string")}
    features |= {column: ClassLabel(names=["wrong", "false"]) for column in fake.more}
    for split, per_class in fake.images.items():
        labels = list(range(len(fake.names))) * per_class
        pictures = []
        for _ in labels:
            file = io.BytesIO()
            PILImage.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(file, "PNG")
            pictures.append(file.getvalue())
        columns = {
            fake.image: [{"bytes": content, "path": f"{i}.png"} for i, content in enumerate(pictures)],
            fake.label: [-1] * len(labels) if split in fake.unlabelled else labels,
            "image_id": [f"{split} {i}" for i in range(len(labels))],
        }
        columns |= {column: [label % 2 for label in labels] for column in fake.more}
        data = Dataset.from_dict(columns, features=Features(features))
        data.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
        written[split] = {hashlib.sha256(content).hexdigest() for content in pictures}
    return written


def settings(recipe: str, verb: str, *words: str):
    """The data arguments of a recipe, and all others."""
    command = importlib.import_module(f"mmft_hf.commands.{verb}")
    filled = parse(verb, command, ["--config", str(RECIPES / recipe / f"{verb}.yaml"), *words])
    (data,) = (arguments for arguments in filled if isinstance(arguments, DataArguments))
    return data, filled


def shas(dataset: Dataset) -> list[str]:
    undecoded = dataset.cast_column("image", Image(decode=False))
    return [hashlib.sha256(original_bytes(image)).hexdigest() for image in undecoded["image"]]


def test_every_benchmark_has_its_recipes():
    for recipe in FAKES:
        assert {"caption.yaml", "finetune.yaml", "benchmark.yaml"} == {
            path.name for path in (RECIPES / recipe).iterdir()
        }


@pytest.mark.parametrize("recipe", FAKES)
def test_splits_and_class_names(recipe, tmp_path):
    fake = FAKES[recipe]
    written = write(fake, tmp_path)
    splits = load_splits(settings(recipe, "finetune", "--dataset_name", str(tmp_path))[0])
    got = {"train": splits.train, "validation": splits.validation, "test": splits.test}
    for dataset, per_class in zip(got.values(), fake.expected, strict=True):
        assert np.bincount(labels_of(dataset)).tolist() == [per_class] * len(fake.names)
    # The test split is the published one, whole; nothing of it, and nothing twice, is in the others.
    seen = {name: shas(dataset) for name, dataset in got.items()}
    assert set(seen["test"]) == written[fake.test]
    every = [sha for split in seen.values() for sha in split]
    assert len(every) == len(set(every))
    validation = {"validation", "val"} & (written.keys() - {fake.test})
    assert set(seen["train"]) | set(seen["validation"]) == written["train"].union(*(written[v] for v in validation))
    # Labels mean what the published ones mean.
    assert len(splits.class_names) == len(fake.names)
    for label, text in fake.prompts.items():
        assert class_prompt(DEFAULT_TEMPLATE, splits.class_names[label]) == text


@pytest.mark.parametrize("recipe", FAKES)
def test_captions_are_asked_of_the_same_data_in_the_words_of_the_method(recipe):
    data, filled = settings(recipe, "caption")
    assert data == settings(recipe, "finetune")[0]
    assert data.dataset_revision is None or (len(data.dataset_revision) == 40 and int(data.dataset_revision, 16))
    (args,) = (arguments for arguments in filled if isinstance(arguments, CaptionArguments))
    prompts = args.to_captioner().prompts
    assert prompts.aspects == ("visual", "shape", "texture")
    assert prompts.prompt("shape", "Some_Class") == (
        f"To differentiate this some class photo from other {FAKES[recipe].domain} photos, describe its primary shape "
        "characteristics based on the photo in 50 words."
    )
    assert args.to_captioner().sampling.spec()["temperature"] == 0.2  # where the model takes one


@pytest.mark.parametrize("recipe", FAKES)
def test_training_is_that_of_the_method(recipe):
    _, filled = settings(recipe, "finetune")
    values = {
        key: value for arguments in filled if hasattr(arguments, "__dict__") for key, value in vars(arguments).items()
    }
    assert values["model_name_or_path"] == "openai/clip-vit-base-patch32"
    wanted = {
        "supcon_weight": 0.1,
        "learning_rate": 1e-5,
        "weight_decay": 1e-4,
        "per_device_train_batch_size": 64,
        "num_train_epochs": 50,
        "warmup_steps": 0,
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "cosine",
        "prototypes": "captions",
        "crop_min_area": 0.9,
        "seed": 42,
    }
    assert {key: values[key] for key in wanted} == wanted


@pytest.mark.parametrize("recipe", [*FAKES, "emoji_mini", "emoji", "openclipart", "quickstart"])
def test_methods_are_compared_on_the_same_data(recipe):
    data, filled = settings(recipe, "benchmark")
    args, model, _, config = filled
    methods = set(args.methods)
    assert methods <= set(METHODS) and {"zs", "zs-cap", "lp", "gda", "flyp", "mmft"} <= methods
    parse_shots(data.shots)
    assert len(set(args.seeds)) == len(args.seeds) >= 3
    assert config.output_dir == f"outputs/{recipe}/benchmark"
    if recipe in FAKES:
        assert data.whole == settings(recipe, "finetune")[0]
        few = [n for n in ("1", "2", "4", "8", "16") if recipe != "flowers" or n != "16"]  # it has 10 of each class
        assert data.shots == few + ["full"] * (recipe != "imagenet") and not args.allow_fewer
        assert args.learning_rates == [3e-6, 1e-5, 3e-5] and {"ce", "ce-frozen", "clip-lora"} < methods
        assert model.model_name_or_path == "openai/clip-vit-base-patch32"


@pytest.mark.slow
def test_caption_plan_then_training(tmp_path, clip_folder, capsys):
    data, run = tmp_path / "data", tmp_path / "run"
    write(FAKES["cifar100"], data)
    model = ["--model_name_or_path", str(clip_folder), "--dataset_name", str(data), "--output_dir"]
    config = ["--config", str(RECIPES / "cifar100" / "caption.yaml")]
    assert cli.main(["caption", *config, *model, str(tmp_path / "captioned"), "--dry_run", "true"]) == 0
    plan = capsys.readouterr().out
    assert "To differentiate this apple photo from other general objects photos" in plan
    assert not (tmp_path / "captioned").exists()

    # Captions without a network: class templates stand in for the written ones.
    words = ["--captioner", "template", "--captioner_model", "none"]
    assert cli.main(["caption", *config, *model, str(tmp_path / "captioned"), *words]) == 0, capsys.readouterr().err
    model[3] = str(tmp_path / "captioned")
    words = "--image_column image --label_column label --max_steps 2 --per_device_train_batch_size 8".split()
    config[1] = str(RECIPES / "cifar100" / "finetune.yaml")
    assert cli.main(["finetune", *config, *model, str(run), *words]) == 0, capsys.readouterr().err
    assert "Test accuracy on 9 images" in capsys.readouterr().out
    assert (run / "head.safetensors").is_file()

    words = (
        "--image_column image --label_column label --methods zs-cap lp mmft --shots 2 --seeds 0 --learning_rates 1e-4"
    )
    words += " --num_train_epochs 1 --per_device_train_batch_size 8"
    config[1], model[-1:] = str(RECIPES / "cifar100" / "benchmark.yaml"), ["--output_dir", str(tmp_path / "compared")]
    assert cli.main(["benchmark", *config, *model, *words.split()]) == 0, capsys.readouterr().err
    rows = [json.loads(line) for line in (tmp_path / "compared" / "results.jsonl").read_text("utf-8").splitlines()]
    assert [(row["method"], row["train_images"], row["test_images"]) for row in rows] == [
        ("zs-cap", 6, 9),
        ("lp", 6, 9),
        ("mmft", 6, 9),
    ]


# -- what the recipes need of the data layer ---------------------------------------------------------------------------
def test_a_split_without_labels_is_left_out_and_said(tmp_path):
    write(FAKES["imagenet"], tmp_path)
    splits = load_splits(DataArguments(dataset_name=str(tmp_path)))
    assert "Split 'test' has no labels and is left out." in splits.notes
    assert [len(splits.train), len(splits.validation), len(splits.test)] == [16, 6, 4]
    with pytest.raises(UserError, match=r"split 'test', row 0: expected a class, found none; .* have no class"):
        load_splits(DataArguments(dataset_name=str(tmp_path), test_split="test"))


def test_testing_on_validation_holds_another_part_out(tmp_path):
    write(FAKES["food101"], tmp_path)
    splits = load_splits(DataArguments(dataset_name=str(tmp_path), test_split="validation"))
    assert any(note.startswith("There is no validation split") and ": 2 images" in note for note in splits.notes)
    with pytest.raises(UserError, match=r"'validation': expected one role for each split"):
        load_splits(DataArguments(dataset_name=str(tmp_path), test_split="validation", validation_split="validation"))


# -- emoji and openclipart ---------------------------------------------------------------------------------------------
@pytest.fixture
def builder(monkeypatch):
    """`recipes/emoji/build_dataset.py` as a module, with those beside it."""
    monkeypatch.syspath_prepend(str(RECIPES / "emoji"))
    own = ("build_dataset", "concepts", "render", "texts")
    yield importlib.import_module("build_dataset")
    for name in own:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("recipe", ["emoji", "openclipart"])
def test_local_folders_with_texts(recipe, tmp_path, clip_folder, capsys):
    columns = {"label": [0, 1] * 4, "text": [["cat", "an animal"], ["boat"]] * 4}
    features = {"label": ClassLabel(names=["mammal", "boat"]), "text": List(Value("string")), "image": Image()}
    columns["concept"] = columns["series"] = [f"thing {row // 2}" for row in range(8)]
    features |= {"concept": Value("string"), "series": Value("string")}
    for seed, split in enumerate(("train", "validation", "test", "test_new_vendor", "test_monochrome")):
        pictures = [PILImage.new("RGB", (8, 8), (seed, row, 0)) for row in range(8)]
        data = Dataset.from_dict(columns | {"image": pictures}, features=Features(features))
        data.to_parquet(tmp_path / "set" / "data" / f"{split}-00000-of-00001.parquet")
    folder = ["--dataset_name", str(tmp_path / "set")]
    splits = load_splits(settings(recipe, "finetune", *folder)[0])
    assert [len(splits.train), len(splits.validation), len(splits.test)] == [8, 8, 8]
    assert splits.notes == [] and splits.captions_per_image().tolist() == [2, 1] * 4
    assert cli.main(["caption", "--config", str(RECIPES / recipe / "caption.yaml"), *folder, "--dry_run", "true"]) == 0
    words = ["--model_name_or_path", str(clip_folder), "--output_dir", str(tmp_path / "out"), "--methods", "zs"]
    words = ["benchmark", "--config", str(RECIPES / recipe / "benchmark.yaml"), *folder, *words]
    assert cli.main(words) == 0, capsys.readouterr().err
    (row,) = map(json.loads, (tmp_path / "out" / "results.jsonl").read_text("utf-8").splitlines())
    assert row["shift_accuracy"].keys() == ({"test_new_vendor", "test_monochrome"} if recipe == "emoji" else set())
    groups = json.loads((tmp_path / "out" / "data.json").read_text("utf-8"))["groups"]
    assert groups == dict.fromkeys(["test", *row["shift_accuracy"]], columns["concept"])


def test_emoji_variants_of_a_concept_share_a_split(builder):
    labels = [f"{colour} thing {i}" for i in range(20) for colour in ("red", "green", "")]
    concepts = {str(i): {"label": label, "subgroup": "tool"} for i, label in enumerate(labels)}
    part = builder.split_concepts(concepts)
    for i in range(0, 60, 3):
        assert part[str(i)] == part[str(i + 1)] == part[str(i + 2)]
    assert Counter(part.values()) == {"train": 36, "validation": 12, "test": 12}
    assert builder.split_concepts(concepts) == part
    # Two hearts differ by their colour alone, so it counts.
    assert builder.family({"label": "red heart", "subgroup": "heart"}) == "heart|red heart"


def test_emoji_styles_of_the_shift_are_seen_in_the_test_alone(builder):
    splits = {
        vendor: {builder.split_of(vendor, s) for s in ("train", "validation", "test")} for vendor in builder.VENDORS
    }
    for vendor in builder.NEW_VENDORS:
        assert splits.pop(vendor) == {None, "test_new_vendor"}
    for vendor in builder.MONOCHROME:
        assert splits.pop(vendor) == {None, "test_monochrome"}
    assert len(splits) == 4 and all(found == {"train", "validation", "test"} for found in splits.values())
    assert len(set(builder.CLASSES.values())) == 43


def test_emoji_pictures_are_square_on_white(builder, tmp_path):
    picture = PILImage.new("RGBA", (40, 20), (0, 0, 0, 0))
    picture.paste((200, 0, 0, 255), (10, 5, 30, 15))
    picture.save(tmp_path / "1F600.webp", lossless=True)
    drawn = PILImage.open(io.BytesIO(builder.draw(tmp_path / "1F600.webp")))
    assert (drawn.size, drawn.mode) == ((128, 128), "RGB")
    assert drawn.getpixel((0, 0)) == (255, 255, 255) and drawn.getpixel((64, 64)) == (200, 0, 0)
    PILImage.new("RGBA", (40, 20), (0, 0, 0, 0)).save(tmp_path / "blank.webp", lossless=True)
    assert builder.draw(tmp_path / "blank.webp") is None


# -- CoOp's split files ------------------------------------------------------------------------------------------------
@pytest.fixture
def coop(tmp_path):
    """`split_zhou_X.json` with pictures in a folder beside it, and its rows. Numbers and names are in different orders."""
    names = ["Sea or Lake", "Annual Crop Land"]
    rows = [[f"class_{c}/{i}.png", c, names[c]] for c in (1, 0) for i in range(6)]
    for i, (path, _, _) in enumerate(rows):
        (tmp_path / "pictures" / path).parent.mkdir(parents=True, exist_ok=True)
        PILImage.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / "pictures" / path)
    (tmp_path / "annotations").mkdir()
    parts = {"train": rows[0::3], "val": rows[1::3], "test": rows[2::3]}
    (tmp_path / "split_zhou_X.json").write_text(json.dumps(parts))
    return tmp_path / "split_zhou_X.json", parts


def paths(dataset: Dataset) -> list[str]:
    return [row["path"] for row in dataset.cast_column("image", Image(decode=False))["image"]]


@pytest.mark.parametrize("typed", [False, True])
def test_split_file_of_coop(coop, typed):
    file, parts = coop
    root = file.parent / "pictures"
    if typed:
        root = root.rename(file.parent.parent / f"{file.parent.name} elsewhere")
    splits = load_splits(DataArguments(str(file), image_root=str(root) if typed else None))
    assert splits.class_names == ["Sea or Lake", "Annual Crop Land"] and not splits.has_captions
    for dataset, part in ((splits.train, "train"), (splits.validation, "val"), (splits.test, "test")):
        found = zip(paths(dataset), labels_of(dataset).tolist(), strict=True)
        assert list(found) == [(str(root / path), number) for path, number, _ in parts[part]]


def test_split_file_of_coop_in_caption_and_finetune(coop, clip_folder, capsys):
    file, _ = coop
    captioned, run = str(file.parent / "captioned"), str(file.parent / "run")
    model = ["--model_name_or_path", str(clip_folder), "--output_dir"]
    words = ["--captioner", "template", "--captioner_model", "none", *model, captioned]
    assert cli.main(["caption", "--dataset_name", str(file), *words]) == 0, capsys.readouterr().err
    # The captioned dataset is that of the file, pictures included.
    before, after = (load_splits(DataArguments(name)) for name in (str(file), captioned))
    assert shas(before.train) == shas(after.train) and after.captions_per_image().tolist() == [1] * 4
    assert [len(after.validation), len(after.test)] == [4, 4] and after.class_names == before.class_names
    words = [*model, run, "--max_steps", "1", "--image_root", str(file.parent / "pictures")]
    assert cli.main(["finetune", "--dataset_name", str(file), *words]) == 0, capsys.readouterr().err
    assert "Test accuracy on 4 images" in capsys.readouterr().out
    assert "image_root" not in (Path(run) / "README.md").read_text("utf-8")  # nobody's business


def test_what_is_wrong_with_a_split_file_is_said(coop, tmp_path):
    file, parts = coop
    first = parts["train"][0]
    wrong = {
        "expected each image once, found 1 repeated, for example class_1/0.png": {"test": [first]},
        r"found 8 of 9; missing is for example none\.png\. Type image_root": {"val": [["none.png", 0, "Sea or Lake"]]},
        r"one name for each class number, found \(0, 'Annual Crop Land'\)": {"val": [["x", 0, "Annual Crop Land"]]},
        r"expected \[path, class number, class name\].*, found \[\"x\", \"0\"": {"val": [["x", "0", "Sea or Lake"]]},
        r"found \[\] \(split 'val', row 0\)": {"val": []},
        "expected the splits train, val, test, found train, val, test, all": {"all": []},
    }
    for message, part in wrong.items():
        file.write_text(json.dumps(parts | part))
        with pytest.raises(UserError, match=message):
            load_splits(DataArguments(str(file)))
    file.write_text(json.dumps(parts))
    (tmp_path / "copy" / "class_1").mkdir(parents=True)
    (tmp_path / "copy" / first[0]).write_bytes((tmp_path / "pictures" / first[0]).read_bytes())
    with pytest.raises(UserError, match=r"found it in copy and pictures\. Type image_root"):
        load_splits(DataArguments(str(file)))
    pickle = tmp_path / "shot_16-seed_1.pkl"
    pickle.write_bytes(b"")
    with pytest.raises(UserError, match="A pickle can run any code when it is opened"):
        load_splits(DataArguments(str(pickle)))


@pytest.mark.usefixtures("coop")
def test_image_root_is_for_paths(tmp_path, clip_folder, capsys):
    (tmp_path / "tables").mkdir()
    rows = ["image,label", *(f"class_{c}/{i}.png,{'ab'[c]}" for c in (0, 1) for i in range(6))]
    (tmp_path / "tables" / "train.csv").write_text("\n".join(rows))
    table, run = str(tmp_path / "tables" / "train.csv"), str(tmp_path / "run")
    splits = load_splits(DataArguments(table, image_root=str(tmp_path / "pictures")))
    assert all(Path(path).is_file() for path in paths(splits.train))
    # The held-out test images are found again where the pictures are now.
    words = ["--model_name_or_path", str(clip_folder), "--output_dir", run, "--max_steps", "1"]
    words += ["--dataset_name", table, "--image_root", str(tmp_path / "pictures")]
    assert cli.main(["finetune", *words]) == 0, capsys.readouterr().err
    (tmp_path / "pictures").rename(tmp_path / "elsewhere")
    words = ["--model_name_or_path", run, "--dataset_name", table, "--image_root", str(tmp_path / "elsewhere")]
    assert cli.main(["evaluate", *words]) == 0, capsys.readouterr().err
    with pytest.raises(UserError, match="image_root: expected paths of images in column 'image', found Image"):
        load_splits(DataArguments("builtin/emoji-mini", image_root=str(tmp_path)))
