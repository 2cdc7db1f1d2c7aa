"""`efficientsam train` and `efficientsam evaluate`: which script they start, and what they refuse."""

import pytest
from commands import assert_refused, run

from hf_efficientsam.cli.scripts import EVALUATE, TRAIN
from hf_efficientsam.inference.project_files import project_files


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "nonsense"], ("'nonsense'", "masks, sami")),
        (["train", "--nonsense", "masks"], ("--nonsense", "masks, sami")),
        (["evaluate", "--cpu"], ("required: TASK;", "masks, everything")),
    ],
    ids=["no such task", "no option of accelerate's", "no task"],
)
def test_nonsense_gets_one_sentence_that_names_the_tasks(arguments, words):
    assert_refused(run(*arguments), *words)


def test_every_task_has_its_script():
    scripts = {path.stem for path in project_files("training").glob("*.py")}
    assert {*TRAIN.values(), *EVALUATE.values()} <= scripts


def test_accelerate_gets_its_options_and_the_script_all_that_comes_after_the_task(monkeypatch):
    launched = []
    monkeypatch.setattr("accelerate.commands.launch.launch_command", launched.append)
    assert run("train", "--num_processes", "2", "masks", "--steps", "3", "--help").exit_code == 0
    (options,) = launched
    assert options.num_processes == 2 and options.training_script.endswith("training/finetune_masks.py")
    assert options.training_script_args == ["--steps", "3", "--help"]
