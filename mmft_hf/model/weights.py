"""Where the weights of a model are: safetensors, the Hub's own conversion of a pickle, or a pickle that the user allows.

Many older repositories hold only a pickle (`pytorch_model.bin`), and opening one can run any code. The Hub has converted most
of them: its bot opened a pull request with the same weights as safetensors, which nobody has merged.
"""

from __future__ import annotations

import contextlib
import logging
import re
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from transformers import PreTrainedConfig, PreTrainedModel

from ..core.console import is_main
from ..core.errors import UserError
from ..core.files import ADAPTER_FILES, WEIGHTS_INDEX, write_json
from ..core.reading import read_json
from ..core.records import KeptConversion, WeightsIndex
from ..data.cache import cache_folder

logger = logging.getLogger(__name__)

SAFETENSORS = ("model.safetensors", WEIGHTS_INDEX)
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
# The author and the title of the Hub's pull requests, as in `transformers.safetensors_conversion`.
CONVERTER, CONVERSION = "SFconvertbot", "Adding `safetensors` variant of this model"
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Weights:
    """The weights of a model.

    Args:
        path: their file, or the index of their files, which are in the same folder.
        commit: of the Hub repository that was asked for; None: a local folder.
        converted: the commit of the Hub's conversion to safetensors, if the weights are from there.
        reference: of that pull request, e.g. `refs/pr/5`.
        pickled: they are a pickle, read with `weights_only`.
    """

    path: Path
    commit: str | None = None
    converted: str | None = None
    reference: str | None = None
    pickled: bool = False

    def from_pretrained(self, model_class: type, name: str, config: PreTrainedConfig, **options):
        """`model_class.from_pretrained` with exactly these weights; nothing else is fetched, and no code is run.

        Args:
            name: what the user calls the model; it becomes `model.name_or_path`.

        Raises:
            UserError: a pickle that cannot be read.
        """
        options |= {"use_safetensors": self.path.name not in PICKLES, "weights_only": True, "trust_remote_code": False}
        try:
            found = model_class.from_pretrained(str(self.path.parent), config=config, **options)
        except Exception as error:
            if not self.pickled:
                raise
            raise UserError(
                f"model {name!r}: expected a pickle of a model's tensors and nothing else, which torch reads with "
                "weights_only=True; found a damaged file or another content, of which nothing was run. Take another model."
            ) from error
        model: PreTrainedModel = found[0] if isinstance(found, tuple) else found
        model.name_or_path = model.config._name_or_path = name
        model.mmft_weights = self
        return found

    def record(self) -> dict:
        """The fields in values that JSON can hold, without the place on this machine."""
        return {key: value for key, value in asdict(self).items() if key != "path"}


def find_weights(
    name: str, revision: str | None = None, allow_pickle: bool = False, named: str | None = None, **hub
) -> Weights:
    """Finds the weights of a model that has a `config.json`, and downloads them.

    Args:
        name: local folder or Hub id.
        revision: branch, tag or commit on the Hub.
        allow_pickle: take a pickle where there is nothing else.
        named: file of the weights according to `config.json` (`transformers_weights`).
        hub: `token`, `cache_dir`, `local_files_only`, as in huggingface_hub.

    Raises:
        UserError: there are no weights, or only a pickle, which is not allowed.
        OSError: the repository or the folder cannot be read.
    """
    wanted = (named,) if named else SAFETENSORS
    if Path(name).is_dir():
        return _in_folder(name, Path(name), wanted, allow_pickle)
    commit = Path(hf_hub_download(name, "config.json", revision=revision, **hub)).parent.name
    if path := _first(name, wanted, commit, **hub):
        _whole(name, path, commit, allow_pickle, **hub)
        if pickled := _names_pickle(path):
            _say_pickle(name, path.name)
        return Weights(path, commit, pickled=pickled)
    converted, reference, reason = _conversion(name, commit, **hub)
    if converted:
        path = _first(name, wanted, converted, **hub)
        if path and not _names_pickle(path):
            _whole(name, path, converted, False, **hub)
            say_once(
                f"{name}: there are no safetensors at this revision. The weights are those of the Hub's own conversion, "
                f"{reference}, commit {converted}."
            )
            return Weights(path, commit, converted, reference)
        reason = f"its conversion, {reference}, cannot be read"
    if not allow_pickle:
        _refuse(name, " or ".join(PICKLES), reason)
    path = _first(name, PICKLES, commit, **hub)
    if path is None:
        raise UserError(
            f"model {name!r}: expected {wanted[0]}, or {PICKLES[0]} with --allow_pickle true, found neither at commit "
            f"{commit}. Is it the repository of a model for PyTorch?"
        )
    _whole(name, path, commit, allow_pickle, **hub)
    _say_pickle(name, path.name)
    return Weights(path, commit, pickled=True)


def _in_folder(name: str, folder: Path, wanted: tuple[str, ...], allow_pickle: bool) -> Weights:
    path = next((folder / file for file in (*wanted, *PICKLES) if (folder / file).is_file()), None)
    if path is None:
        if (folder / ADAPTER_FILES[0]).is_file():
            raise UserError(
                f"model {name!r}: expected {wanted[0]} next to config.json, found a LoRA adapter alone. Type the --output_dir of its run, "
                "which has the merged model."
            )
        raise UserError(f"model {name!r}: expected {wanted[0]} next to config.json, found no weights.")
    pickled = path.name in PICKLES or _names_pickle(path)
    if pickled and not allow_pickle:
        _refuse(name, path.name)
    for file in shards_of(path):
        if not (folder / file).is_file():
            raise UserError(f"model {name!r}: expected {file}, which {path.name} names, found no such file.")
    if pickled:
        _say_pickle(name, path.name)
    return Weights(path, pickled=pickled)


def _first(name: str, files: tuple[str, ...], revision: str, **hub) -> Path | None:
    """The first of these files that a repository, or the cache, has."""
    for file in files:
        with contextlib.suppress(EntryNotFoundError):
            return Path(hf_hub_download(name, file, revision=revision, **hub))
    return None


def _whole(name: str, path: Path, revision: str, allow_pickle: bool, **hub) -> None:
    """Downloads all files that an index names, unless it names a pickle that is not allowed."""
    shards = shards_of(path)
    if _names_pickle(path) and not allow_pickle:
        _refuse(name, path.name)
    for shard in shards:
        hf_hub_download(name, shard, revision=revision, **hub)


def shards_of(path: Path) -> list[str]:
    """The files that an index of weights names; none for a file of weights.

    Raises:
        UserError: it is no index, or it names files outside of its folder.
    """
    if path.suffix != ".json":
        return []
    shards = read_json(path, WeightsIndex)["weight_map"]
    if not shards:
        raise UserError(f"{path}, field weight_map: expected the files of the weights, found none.")
    names = sorted(set(shards.values()))
    if outside := [shard for shard in names if Path(shard).name != shard or "\\" in shard]:
        raise UserError(f"{path}: expected file names in the same folder, found {outside[0]!r}.")
    return names


def _names_pickle(path: Path) -> bool:
    """Whether weights are not all safetensors: by the names in their index, or their own name."""
    return any(not shard.endswith(".safetensors") for shard in shards_of(path) or [path.name])


def _conversion(name: str, commit: str, **hub) -> tuple[str | None, str | None, str]:
    """The Hub's conversion of the pickle at a commit: its own commit and its reference, or why there is none.

    It counts if the Hub's bot opened it (in a private repository, anybody who may) and its pickle is the very file that the
    commit has. The answer is kept, so that the weights stay the same, and are found without a network.
    """
    path = cache_folder("conversions") / f"{name.replace('/', '--')}.json"
    known: dict = {}
    with contextlib.suppress(UserError, FileNotFoundError):  # damaged: it is only a cache
        known = read_json(path, dict[str, KeptConversion])
    if commit in known and COMMIT.fullmatch(known[commit]["commit"]):
        return known[commit]["commit"], known[commit]["reference"], ""
    if hub.get("local_files_only"):
        return None, None, "the Hub was not asked for a conversion"
    api = HfApi(token=hub.get("token"))
    try:
        info = api.model_info(name, revision=commit, files_metadata=True)
        pickles = _pickles(info)
        author = None if info.private else CONVERTER
        opened = api.get_repo_discussions(name, author=author, discussion_type="pull_request", discussion_status="open")
        for found in sorted((one for one in opened if one.title == CONVERSION), key=lambda one: -one.num):
            proposed = api.model_info(name, revision=found.git_reference, files_metadata=True)
            files = {sibling.rfilename for sibling in proposed.siblings}
            if pickles and files & set(SAFETENSORS) and _pickles(proposed) == pickles:
                with contextlib.suppress(OSError):  # a cache that cannot be written costs the question again
                    write_json(path, {**known, commit: {"commit": proposed.sha, "reference": found.git_reference}})
                return proposed.sha, found.git_reference, ""
    except (OfflineModeIsEnabled, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        said = str(error).strip().splitlines()
        return None, None, f"the Hub could not be asked for a conversion ({said[0] if said else type(error).__name__})"
    return None, None, "the Hub has no conversion of it to safetensors"


def _pickles(info) -> dict[str, str]:
    """The hash of each pickle of a repository, by its name."""
    files = (one for one in info.siblings if re.fullmatch(r"pytorch_model.*\.bin", one.rfilename))
    return {one.rfilename: one.lfs.sha256 if one.lfs else one.blob_id for one in files}


def _refuse(name: str, file: str, reason: str = ""):
    raise UserError(
        f"model {name!r}: expected weights as {SAFETENSORS[0]}, found only a pickle ({file}), which can run any code when it is "
        f"opened{f'; {reason}' if reason else ''}. If you trust it, type --allow_pickle true: it is then read with torch's "
        "weights_only=True, which runs no code of the file."
    )


def _say_pickle(name: str, file: str) -> None:
    say_once(f"{name}: the weights are a pickle, {file}, read with weights_only=True, since allow_pickle is true.")


@cache
def say_once(text: str) -> None:
    """Says something once, although a run opens its model several times."""
    if is_main():
        logger.warning(text)
