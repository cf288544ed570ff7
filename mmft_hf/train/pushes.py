"""Pushes to the Hub with `push_to_hub=True`: during training and at its end."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from huggingface_hub import HfApi
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import HubStrategy
from transformers.utils.hub import PushInProgress

from ..core.errors import UserError
from ..core.files import RUN_FILE, TRUNK_FILES, TRUNK_FOLDER, write_json
from ..core.markdown import without_local_paths
from ..core.reading import read_json
from ..core.seals import sealed
from ..hub.client import check_access, make_repo, push_files
from ..hub.publish import folder_files
from ..model.towers import plain_state

logger = logging.getLogger(__name__)

# Stands for a step: prototypes of a tower that is not trained stay valid.
STAY = "weights that stay"


class TrainingPushes:
    """The part of `MMFTTrainer` that publishes.

    The stock pushes copy a checkpoint's weights over those in the output folder, and publish a pickle of all settings,
    including the token. These publish a plain `CLIPModel` and the head of the same weights, and nothing else.
    """

    def init_hf_repo(self, token=None, private=None) -> None:
        """Creates the repository and the branch to push to. Arguments as in the stock Trainer."""
        if self.is_world_process_zero():
            args = self.args
            token, private = token or args.hub_token, args.hub_private_repo if private is None else private
            self.hub_model_id = check_access(args.hub_model_id or Path(args.output_dir).absolute().name, token)
            make_repo(self.hub_model_id, "model", private, args.hub_revision, token)
            self.push_in_progress = None

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        args = self.args
        if not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if busy and not args.hub_always_push:
            return
        # A separate folder, since checkpoints are deleted during the upload.
        staged = Path(tempfile.mkdtemp(prefix="mmft-push-"))
        self._write_model(staged)
        if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            every = args.hub_strategy == HubStrategy.ALL_CHECKPOINTS
            checkpoint = staged / (Path(checkpoint_folder).name if every else "last-checkpoint")
            shutil.copytree(checkpoint_folder, checkpoint, copy_function=_link_or_copy)
            state = read_json(checkpoint / TRAINER_STATE_NAME)
            write_json(checkpoint / TRAINER_STATE_NAME, without_local_paths(state))  # replaces the hard link
        for name in TRUNK_FILES:  # they name the base model of a caption encoder
            if name.endswith(".json"):
                for path in staged.rglob(f"{TRUNK_FOLDER}/{name}"):
                    write_json(path, without_local_paths(read_json(path)))
        upload = HfApi(token=args.hub_token).upload_folder(
            folder_path=staged,
            repo_id=self.hub_model_id,
            revision=args.hub_revision,
            commit_message=f"Training in progress, step {self.state.global_step}",
            run_as_future=True,
        )
        upload.add_done_callback(lambda done: _after(done, staged))
        if busy:
            self.push_in_progress.jobs.append(upload)
        else:
            self.push_in_progress = PushInProgress([upload])

    def _write_model(self, folder: Path) -> None:
        """Writes the plain model, its processor, the run's record, and the head if it belongs to these weights."""
        model = self.accelerator.unwrap_model(self.model)
        model.save_pretrained(folder, state_dict=plain_state(model))
        self.processing_class.save_pretrained(folder)
        if self.prototypes is not None and self._prototypes_of in (self.state.global_step, STAY):
            self.prototypes.save_pretrained(folder)
        record = {"completed": False}
        with suppress(OSError, UserError):
            record = read_json(Path(self.args.output_dir) / RUN_FILE)
        write_json(folder / RUN_FILE, sealed(without_local_paths(record)))

    def push_to_hub(self, commit_message="End of training", blocking=True, token=None, revision=None, **kwargs):
        """Publishes model, processor and head, and the other files of a finished run in the output folder.

        Args:
            commit_message, token, revision: as in the stock Trainer. The call always waits until the push is done.

        Returns:
            The address of the commit, in the first process.
        """
        self._finish_current_push()
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        folder = Path(self.args.output_dir)
        if not (folder / RUN_FILE).is_file():
            write_json(folder / RUN_FILE, {"completed": False})
        return push_files(
            folder_files(folder),
            self.hub_model_id,
            "model",
            commit_message,
            marker=RUN_FILE,
            private=self.args.hub_private_repo,
            revision=revision or self.args.hub_revision,
            token=token or self.args.hub_token,
        )


def _link_or_copy(source: str, target: str) -> None:
    """Hard-links a file, so that it outlives the original name; copies it where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _after(upload, staged: Path) -> None:
    """Cleans up after a push during training. A failed one is reported, and training continues."""
    shutil.rmtree(staged, ignore_errors=True)
    if not upload.cancelled() and (error := upload.exception()):
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        logger.warning("A push during training failed (%s); the next push includes its content.", reason)
