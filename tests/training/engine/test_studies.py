import json

import pytest

from hf_efficientsam.training.engine import studies
from hf_efficientsam.training.engine.studies import StudyConfig, run_stage, run_study

SCRIPT = """
import pathlib, sys
output, value = sys.argv[1:]
with open(pathlib.Path(__file__).parent / "started", "a") as file:
    file.write(value + "\\n")
pathlib.Path(output).write_text(str(float(value)))
"""


@pytest.fixture
def scripts(tmp_path):
    folder = tmp_path / "scripts"
    (folder / "results").mkdir(parents=True)
    (folder / "work.py").write_text(SCRIPT)
    (folder / "README.md").write_text("before\n<!-- doubling: begin -->\nold\n<!-- doubling: end -->\nafter\n")
    return folder


def run(folder, scripts, **options) -> None:
    """A study whose scores are the number of the arm plus a tenth of the seed, and twice that; seed 9 fails."""

    def prepare():
        (folder / "prepared").mkdir(exist_ok=True)

    def measure(arm, seed, own):
        value = {"one": 1, "two": "two"}[arm] if seed == 9 else {"one": 1, "two": 2}[arm] + seed / 10
        value = float(run_stage(folder, own / "value", scripts / "work.py", own / "value", value).read_text())
        return {"once": value, "twice": 2 * value}

    titles, config = {"once": "Once", "twice": "Twice"}, StudyConfig(**options)
    run_study("doubling", config, folder, scripts, ["one", "two"], titles, prepare, measure)


def scores_in(path) -> dict:
    """Of all runs in a json of results, without their versions."""
    scores = json.loads(path.read_text())["scores"]
    return {
        arm: {seed: {name: one[name] for name in one if name != "versions"} for seed, one in runs.items()}
        for arm, runs in scores.items()
    }


def test_scores_become_json_table_and_plot(tmp_path, scripts, capsys):
    run(tmp_path / "runs", scripts, seeds=[0, 1], jobs=2)
    table = (scripts / "README.md").read_text()
    assert table.startswith("before\n<!-- doubling: begin -->\n| arm |") and table.endswith("\nafter\n")
    assert "| two | 2 | 2.050 ± 0.071 | 4.100 ± 0.141 |" in table and "old" not in table
    assert "| one | 2 | 1.050 ± 0.071 |" in capsys.readouterr().out
    path = scripts / "results" / "doubling.json"
    kept = json.loads(path.read_text())
    assert kept["command"] == "python training/doubling.py" and "torch" in kept["scores"]["two"]["seed_0"]["versions"]
    assert scores_in(path)["two"] == {"seed_0": {"once": 2, "twice": 4}, "seed_1": {"once": 2.1, "twice": 4.2}}
    assert "different versions" not in table
    assert (scripts / "results" / "doubling.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_finished_is_not_run_again(tmp_path, scripts):
    run(tmp_path / "runs", scripts, seeds=[0], arms=["two"])
    run(tmp_path / "runs", scripts, seeds=[0, 1])
    assert sorted((scripts / "started").read_text().split()) == ["1.0", "1.1", "2.0", "2.1"]


def test_a_fresh_clone_runs_everything_and_numbers_keep_the_versions_that_they_were_measured_with(tmp_path, scripts):
    """Its results have scores of another machine and version, which no run of its own has made."""
    path, old = scripts / "results" / "doubling.json", {"once": 9, "twice": 9, "versions": {"torch": "1.0"}}
    path.write_text(json.dumps({"scores": {"one": {"seed_0": old, "seed_7": old}, "two": {"seed_0": old}}}))
    run(tmp_path / "runs", scripts, seeds=[0], arms=["one"])
    assert (scripts / "started").read_text().split() == ["1.0"]
    scores = json.loads(path.read_text())["scores"]
    assert scores["one"]["seed_0"]["once"] == 1 and scores["one"]["seed_0"]["versions"]["torch"] != "1.0"
    assert scores["one"]["seed_7"] == old and scores["two"] == {"seed_0": old}
    assert "different versions" in (scripts / "README.md").read_text()


@pytest.mark.parametrize("changed", ["versions", "data", "recipes"])
def test_runs_made_from_something_else_are_refused_by_name(tmp_path, scripts, monkeypatch, changed):
    run(tmp_path / "runs", scripts, seeds=[0], arms=["one"])
    options = {"data": "elsewhere"} if changed == "data" else {}
    if changed == "versions":
        monkeypatch.setattr(studies, "versions_of", lambda libraries: {"torch": "99"})
    if changed == "recipes":
        (scripts / "recipes" / "studies").mkdir(parents=True)
        (scripts / "recipes" / "studies" / "one.yaml").write_text("steps: 2")
    name = {"versions": "torch", "data": "data", "recipes": "recipes_sha256"}[changed]
    with pytest.raises(ValueError, match=f"made from another {name}; choose a new --output_dir"):
        run(tmp_path / "runs", scripts, seeds=[1], arms=["one"], **options)
    assert (scripts / "started").read_text().split() == ["1.0"]


def test_a_stage_that_fails_is_named_and_the_finished_ones_are_kept(tmp_path, scripts):
    with pytest.raises(ChildProcessError, match=r"work failed; .*two_seed_9_value\.log says why"):
        run(tmp_path / "runs", scripts, seeds=[9])
    assert "could not convert" in (tmp_path / "runs" / "logs" / "two_seed_9_value.log").read_text()
    assert list(studies.finished_runs(tmp_path / "runs", ["one", "two"])["one"]) == ["seed_9"]


def test_a_stage_that_was_stopped_is_run_again(tmp_path, scripts):
    run(tmp_path / "runs", scripts, arms=["two"], seeds=[0])
    half = tmp_path / "runs" / "one" / "seed_0" / "value"
    half.parent.mkdir(parents=True)
    half.write_text("0.5")  # as a script leaves it that saves its result on the way
    run(tmp_path / "runs", scripts, arms=["one"], seeds=[0])
    assert scores_in(scripts / "results" / "doubling.json")["one"] == {"seed_0": {"once": 1, "twice": 2}}


def test_an_unknown_arm_is_refused(tmp_path, scripts):
    with pytest.raises(ValueError, match="There is no arm three; choose of one, two"):
        run(tmp_path / "runs", scripts, arms=["one", "three"])
