"""Short trainings of the tiny CLIP in this process, and what they changed."""

import torch
from tiny_clip import colour_dataset
from transformers import TrainerCallback

from mmft_hf import MMFTConfig, MMFTTrainer
from mmft_hf.model.towers import set_towers


def make_trainer(clip, folder, train=None, evaluate=True, **settings) -> MMFTTrainer:
    model, processor = clip
    settings = {"num_train_epochs": 2, "learning_rate": 1e-3, "per_device_train_batch_size": 8} | settings
    return MMFTTrainer(
        model=model,
        args=MMFTConfig(output_dir=str(folder), use_cpu=True, disable_tqdm=True, **settings),
        train_dataset=train or colour_dataset(8),
        eval_dataset=colour_dataset(4, seed=1, captions=False) if evaluate else None,
        processing_class=processor,
    )


def weights(model) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def changed(before: dict, after: dict) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


class StopAfter(TrainerCallback):
    """Ends the training after a step, as an interruption would, with nothing restored or tidied up by the test."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def with_lora(clip, vision="lora", text="lora", seed=0, **settings):
    torch.manual_seed(seed)
    set_towers(clip[0], vision, text, **settings)
    return clip
