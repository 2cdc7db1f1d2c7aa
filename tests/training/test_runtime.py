import json
from dataclasses import dataclass, field

import pytest
import torch
from accelerate import Accelerator

from hf_efficientsam.training.runtime import Checkpoints, Curve, check_same_run, parse_recipe, replaced_folder


@dataclass(frozen=True)
class Recipe:
    train: list[str] = field(default_factory=list)
    scales: list[float] = field(default_factory=lambda: [1.0])
    model: str | None = None
    rate: float = 1.0
    steps: int = 5
    flip: bool = True
    debug: bool = False


def write(folder, text):
    path = folder / "recipe.yaml"
    path.write_text(text)
    return str(path)


# ------------------------------------------------------------------------------------------------ recipes


def test_defaults():
    assert parse_recipe(Recipe, "", []) == Recipe()


def test_every_type_from_a_file(tmp_path):
    text = "train: [a.json, b.json]\nscales: [1, 1e-2]\nmodel: 7\nrate: 1e-4\nsteps: 9\nflip: false\ndebug: true\n"
    recipe = parse_recipe(Recipe, "", ["--config", write(tmp_path, text)])
    assert recipe == Recipe(["a.json", "b.json"], [1.0, 0.01], "7", 1e-4, 9, False, True)
    assert all(isinstance(scale, float) for scale in recipe.scales)


def test_one_value_where_a_list_is_wanted_and_null(tmp_path):
    recipe = parse_recipe(Recipe, "", ["--config", write(tmp_path, "train: a.json\nmodel: null\nrate: -2\n")])
    assert (recipe.train, recipe.model, recipe.rate) == (["a.json"], None, -2.0)


@pytest.mark.parametrize("file_last", [True, False])
def test_the_command_line_has_the_last_word(tmp_path, file_last):
    file = ["--config", write(tmp_path, "steps: 9\nrate: 2\ntrain: [a, b]\nflip: true\n")]
    given = ["--steps", "3", "--train", "c", "--flip", "false"]
    recipe = parse_recipe(Recipe, "", given + file if file_last else file + given)
    assert recipe == Recipe(train=["c"], steps=3, rate=2.0, flip=False)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("step: 9\n", "['step']; the names are debug, flip"),
        ("1: 2\nstep: 9\n", "['1', 'step']"),
        ("- 1\n", "no `name: value` lines"),
        ("", "no `name: value` lines"),
        ("steps: [1\n", "is not YAML"),
        ("steps: many\n", "argument --steps: invalid int value: 'many'"),
        ("scales: [1, wide]\n", "argument --scales: invalid float value: 'wide'"),
        ("steps: [1, 2]\n", "unrecognized arguments: 2"),
    ],
)
def test_a_file_that_does_not_fit(tmp_path, capsys, text, sentence):
    with pytest.raises(SystemExit) as exit:
        parse_recipe(Recipe, "", ["--config", write(tmp_path, text)])
    assert exit.value.code == 2
    assert sentence in capsys.readouterr().err.splitlines()[-1]


def test_a_file_that_cannot_be_read(tmp_path, capsys):
    (tmp_path / "image").write_bytes(b"\x89PNG\xff\xfe\x00")
    for path, sentence in (("absent", "No such file"), ("", "Is a directory"), ("image", "is not YAML")):
        with pytest.raises(SystemExit) as exit:
            parse_recipe(Recipe, "", ["--config", str(tmp_path / path)])
        assert exit.value.code == 2
        assert sentence in capsys.readouterr().err.splitlines()[-1]


def test_an_unknown_option(capsys):
    with pytest.raises(SystemExit) as exit:
        parse_recipe(Recipe, "", ["--stepz", "3"])
    assert exit.value.code == 2
    assert "--stepz" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------- checkpoints


class Run:
    """A run whose model takes one random step at a time."""

    def __init__(self, folder, keep=2):
        accelerator = Accelerator(cpu=True)
        model = torch.nn.Linear(2, 2)
        self.model, self.optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), 0.1))
        self.checkpoints = Checkpoints(accelerator, folder, keep)

    def step(self):
        self.model(torch.randn(3, 2)).sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self.model.weight.detach().clone()


def test_resuming_goes_on_as_if_nothing_had_happened(tmp_path):
    run = Run(tmp_path / "a")
    assert run.checkpoints.resume() == 0 and run.checkpoints.steps() == []
    run.step()
    run.checkpoints.save(1)
    expected = run.step()

    torch.randn(7)  # another state of the random numbers
    resumed = Run(tmp_path / "a")
    assert resumed.checkpoints.resume() == 1
    assert torch.equal(resumed.step(), expected)  # weights, moments and random numbers are all restored


def test_the_newest_are_kept_and_resumed(tmp_path):
    run = Run(tmp_path, keep=2)
    weights = {}
    for step in (9, 100, 20_000):  # of different lengths: sorted as numbers
        weights[step] = run.step()
        run.checkpoints.save(step)
    assert run.checkpoints.steps() == [100, 20_000]
    resumed = Run(tmp_path)
    assert resumed.checkpoints.resume() == 20_000
    assert torch.equal(resumed.model.weight, weights[20_000])


def test_a_killed_save_is_no_checkpoint(tmp_path, monkeypatch):
    run = Run(tmp_path)
    weight = run.step()
    run.checkpoints.save(1)
    run.step()

    def killed(folder):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half of")
        (folder / "model_1.safetensors").write_bytes(b"of another kind of run")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run.checkpoints.accelerator, "save_state", killed)
        with pytest.raises(KeyboardInterrupt):
            run.checkpoints.save(2)
    resumed = Run(tmp_path)
    assert resumed.checkpoints.resume() == 1
    assert torch.equal(resumed.model.weight, weight)
    resumed.checkpoints.save(2)  # and the next save is not in its way
    assert resumed.checkpoints.steps() == [1, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000001", "step_00000002"]
    assert not (tmp_path / "step_00000002" / "model_1.safetensors").exists()


# -------------------------------------------------------------------------------------------------- curve


def test_curve_drops_what_came_after_the_checkpoint(tmp_path):
    path = tmp_path / "run" / "curve.jsonl"
    curve = Curve(path, 0)
    for step in (2, 4, 6):
        curve.add(step=step, loss=1 / step)
    resumed = Curve(path, 4)
    resumed.add(step=6, loss=9.0)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == resumed.rows == [{"step": 2, "loss": 0.5}, {"step": 4, "loss": 0.25}, {"step": 6, "loss": 9.0}]
    assert Curve(path, 0).rows == [] and path.read_text() == ""  # a new run in an old place


def test_curve_is_drawn(tmp_path):
    curve = Curve(tmp_path / "curve.jsonl", 0)
    curve.add(step=1, loss=2.0, lr=0.1)
    curve.add(step=2, loss=1.0, lr=0.2)
    curve.plot(["loss", "lr"])
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(KeyError):
        curve.plot(["accuracy"])


def test_a_torn_last_line_of_the_curve_is_dropped(tmp_path):
    path = tmp_path / "curve.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert Curve(path, 2).rows == [{"step": 1, "loss": 2.0}]
    assert path.read_text() == '{"step": 1, "loss": 2.0}\n'


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "weights").write_text("old")
    with pytest.raises(KeyboardInterrupt), replaced_folder(folder) as writing:
        (writing / "weights").write_text("half")
        raise KeyboardInterrupt
    assert (folder / "weights").read_text() == "old"
    with replaced_folder(folder) as writing:
        (writing / "weights").write_text("new")
    assert (folder / "weights").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    folder.rename(tmp_path / "model.old")  # where a kill between the two renames leaves it
    with pytest.raises(KeyboardInterrupt), replaced_folder(folder):
        raise KeyboardInterrupt
    assert (folder / "weights").read_text() == "new"


def test_another_recipe_in_the_same_folder_is_refused(tmp_path):
    @dataclass(frozen=True)
    class Recipe:
        steps: int = 3
        save_steps: int = 1

    check_same_run(Recipe(), tmp_path)
    check_same_run(Recipe(save_steps=2), tmp_path)
    with pytest.raises(ValueError, match="another steps; choose a new --output_dir"):
        check_same_run(Recipe(steps=4), tmp_path)
