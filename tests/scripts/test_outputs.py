"""What a script is to write is refused at the start where a file is in the way, and not after hours of work."""

import pytest
from script_runs import refuse

OUTPUTS = {
    "average_models": ["output_dir"],
    "cache_features": ["output_dir"],
    "distill": ["output_dir"],
    "evaluate_everything": ["output", "masks"],
    "evaluate_masks": ["output", "cases", "write_masks"],
    "evaluate_saliency": ["output", "cases"],
    "filter_annotations": ["output"],
    "finetune_classification": ["output_dir"],
    "finetune_detection": ["output_dir"],
    "finetune_masks": ["output_dir", "cache_dir"],
    "finetune_semantic": ["output_dir"],
    "pack_masks": ["output_dir"],
    "probe_encoder": ["output"],
    "sami": ["output_dir"],
    "sami_study": ["output_dir"],
    "train_in_memory": ["output_dir"],
    "train_saliency": ["output_dir"],
}


@pytest.mark.parametrize(("script", "option"), [(script, one) for script, all_ in OUTPUTS.items() for one in all_])
def test_nothing_can_be_written_below_a_file(script, option, tmp_path):
    file = tmp_path / "file.txt"
    file.touch()
    given = ["--annotations", "any.json"] if script == "filter_annotations" else []
    said = refuse(script, *given, f"--{option}", file / "out")
    assert said.startswith(f"{script}: --{option} is {file / 'out'}; it must be a f")


@pytest.mark.parametrize(("option", "taken"), [("masks", "file"), ("output", "folder")])
def test_a_file_is_no_folder_and_a_folder_no_file(option, taken, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    said = refuse("evaluate_everything", f"--{option}", tmp_path / taken)
    assert f"--{option} is {tmp_path / taken}; it must be" in said
