"""The command line of a small benchmark."""


def command(clip_folder, data_folder, out, *more) -> list[str]:
    words = (
        f"benchmark --model_name_or_path {clip_folder} --dataset_name {data_folder} --output_dir {out} --use_cpu true"
    )
    words += " --max_steps 2 --per_device_train_batch_size 6 --learning_rate 1e-3"
    return [*words.split(), *map(str, more)]
