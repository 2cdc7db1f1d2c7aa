import dataclasses
import re
from dataclasses import dataclass, field
from typing import Literal

import pytest

from hf_efficientsam.training.engine.config import (
    EpochsConfig,
    NotNegativeInt,
    PositiveInt,
    PositiveRatio,
    Ratio,
    RatioBelowOne,
    RunConfig,
    StepsConfig,
    check_ranges,
    parse_config,
)


@dataclass(frozen=True)
class Config:
    train: list[str] = field(default_factory=list)
    scales: list[float] = field(default_factory=lambda: [1.0])
    model: str | None = None
    rate: float = 1.0
    steps: int = 5
    flip: bool = True
    debug: bool = False
    order: str = field(default="given", metadata={"choices": ["given", "random"]})
    loss: Literal["mse", "cosine"] = "mse"


def write(folder, text):
    path = folder / "config.yaml"
    path.write_text(text)
    return str(path)


def test_defaults():
    assert parse_config(Config, "", []) == Config()


def test_every_type_from_a_file(tmp_path):
    text = "train: [a.json, b.json]\nscales: [1, 1e-2]\nmodel: 7\nrate: 1e-4\nsteps: 9\nflip: false\ndebug: true\n"
    config = parse_config(Config, "", ["--config", write(tmp_path, text)])
    assert config == Config(["a.json", "b.json"], [1.0, 0.01], "7", 1e-4, 9, False, True)
    assert all(isinstance(scale, float) for scale in config.scales)


def test_one_value_where_a_list_is_wanted_and_null(tmp_path):
    config = parse_config(Config, "", ["--config", write(tmp_path, "train: a.json\nmodel: null\nrate: -2\n")])
    assert (config.train, config.model, config.rate) == (["a.json"], None, -2.0)


@pytest.mark.parametrize("file_last", [True, False])
def test_the_command_line_has_the_last_word(tmp_path, file_last):
    file = ["--config", write(tmp_path, "steps: 9\nrate: 2\ntrain: [a, b]\nflip: true\n")]
    given = ["--steps", "3", "--train", "c", "--flip", "false"]
    config = parse_config(Config, "", given + file if file_last else file + given)
    assert config == Config(train=["c"], steps=3, rate=2.0, flip=False)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("step: 9\n", "there is no option step (did you mean steps?)"),
        ("1: 2\nstep: 9\n", "there is no option 1, step (did you mean steps?)"),
        ("- 1\n", "no `name: value` lines"),
        ("", "no `name: value` lines"),
        ("steps: [1\n", "is not YAML"),
        ("steps: many\n", "--steps: invalid int value: 'many'"),
        ("scales: [1, wide]\n", "--scales: invalid float value: 'wide'"),
        ("steps: [1, 2]\n", "2 belongs to no option"),
    ],
)
def test_a_file_that_does_not_fit(tmp_path, text, sentence):
    file = write(tmp_path, text)
    with pytest.raises(ValueError, match=re.escape(sentence)) as raised:
        parse_config(Config, "", ["--config", file])
    assert str(raised.value).startswith(f"{file}: ") and "\n" not in str(raised.value)


def test_a_file_that_cannot_be_read(tmp_path):
    (tmp_path / "image").write_bytes(b"\x89PNG\xff\xfe\x00")
    for path, sentence in (("absent", "No such file"), ("", "Is a directory"), ("image", "is not YAML")):
        with pytest.raises(ValueError, match=sentence):
            parse_config(Config, "", ["--config", str(tmp_path / path)])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--stepz", "3"], "there is no option --stepz (did you mean --steps?); --help lists the options."),
        (["--max-q=3", "--flipp"], "there is no option --max-q, --flipp (did you mean --flip?); --help lists"),
        (["a.json", "3"], "a.json 3 belongs to no option; --help lists the options."),
        (["--steps", "few"], "--steps: invalid int value: 'few'."),
        (["--train"], "--train: expected at least one argument."),
        (["--config"], "--config: expected one argument."),
        (["--order", "up"], "--order: invalid choice: 'up' (choose from "),
        (["--loss", "l1"], "--loss: invalid choice: 'l1' (choose from "),
    ],
)
def test_an_argument_that_does_not_fit_is_named_in_one_sentence(arguments, sentence, capsys):
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}") as raised:
        parse_config(Config, "", arguments)
    assert "\n" not in str(raised.value) and capsys.readouterr() == ("", "")


def test_an_option_is_named_by_one_of_its_spellings():
    for name in ("--batch_size", "--batch-size"):
        with pytest.raises(ValueError, match=r"^--batch_size: invalid int value: 'few'\.$"):
            parse_config(RunConfig, "", [name, "few"])


def test_without_arguments_the_default_file_is_read(tmp_path, monkeypatch):
    default = write(tmp_path, "steps: 9\n")
    monkeypatch.setattr("sys.argv", ["script.py"])
    assert parse_config(Config, "", default=default) == Config(steps=9)
    assert parse_config(Config, "", ["--rate", "2"], default=default) == Config(rate=2.0)


def test_a_field_that_is_declared_again_for_its_default_keeps_its_help(capsys):
    @dataclass(frozen=True)
    class Other(RunConfig):
        save_steps: PositiveInt = 7

    assert parse_config(Other, "", []).save_steps == 7
    with pytest.raises(SystemExit):
        parse_config(Other, "", ["--help"])
    assert "SAVE_STEPS a checkpoint every so many steps" in " ".join(capsys.readouterr().out.split())


@dataclass(frozen=True)
class Ranged:
    steps: PositiveInt = 1
    batch_size: PositiveInt | None = None
    seed: NotNegativeInt = 0
    erasing: Ratio = 1.0
    crop_scale: PositiveRatio = 1.0
    ema_decay: RatioBelowOne = 0.0
    sizes: list[PositiveInt] = field(default_factory=lambda: [1])


def test_options_out_of_range_are_named():
    check_ranges(Ranged())
    check_ranges(parse_config(Ranged, "", ["--batch_size", "3"]))
    for name, value, words in (
        ("steps", 0, "--steps is 0; it must be more than 0."),
        ("batch_size", -1, "--batch_size is -1; it must be more than 0."),
        ("seed", -1, "--seed is -1; it must be 0 or more."),
        ("erasing", 1.1, "--erasing is 1.1; it must be between 0 and 1."),
        ("crop_scale", 0, "--crop_scale is 0; it must be more than 0."),
        ("crop_scale", 1.5, "--crop_scale is 1.5; it must be between 0 and 1."),
        ("ema_decay", 1.0, "--ema_decay is 1.0; it must be at least 0 and less than 1."),
        ("erasing", float("nan"), "--erasing is nan; it must be between 0 and 1."),
        ("sizes", [3, 0], "--sizes is 0; it must be more than 0."),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            check_ranges(dataclasses.replace(Ranged(), **{name: value}))


def test_a_warm_up_takes_a_third_of_the_steps_at_most():
    config = StepsConfig(warmup_steps=10)
    assert [config.warmup_of(steps) for steps in (100, 31, 20, 2)] == [10, 10, 6, 0]


def test_epochs_are_whole_steps():
    assert EpochsConfig(epochs=2.5, warmup_epochs=0.5).in_steps(10) == (25, 5)
    with pytest.raises(ValueError, match="--warmup_epochs 4 must be less than --epochs 3"):
        check_ranges(EpochsConfig(epochs=3, warmup_epochs=4))
    with pytest.raises(ValueError, match=r"--epochs 0\.1 is less than one step of 2 an epoch; give more"):
        EpochsConfig(epochs=0.1, warmup_epochs=0).in_steps(2)
