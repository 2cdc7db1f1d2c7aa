import json

import pytest

from hf_efficientsam.training.engine.studies import StudyConfig, finished_runs, run_stage, run_study

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
        (folder / "prepared").mkdir(parents=True)

    def measure(arm, seed, own):
        value = {"one": 1, "two": "two"}[arm] if seed == 9 else {"one": 1, "two": 2}[arm] + seed / 10
        value = float(run_stage(folder, own / "value", scripts / "work.py", own / "value", value).read_text())
        return {"once": value, "twice": 2 * value}

    titles, config = {"once": "Once", "twice": "Twice"}, StudyConfig(**options)
    run_study("doubling", config, folder, scripts, ["one", "two"], titles, prepare, measure)


def runs(folder, scripts) -> dict:
    return finished_runs(scripts / "results" / "doubling.json", folder, ["one", "two"])


def test_scores_become_json_table_and_plot(tmp_path, scripts, capsys):
    run(tmp_path / "runs", scripts, seeds=[0, 1], jobs=2)
    table = (scripts / "README.md").read_text()
    assert table.startswith("before\n<!-- doubling: begin -->\n| arm |") and table.endswith("\nafter\n")
    assert "| two | 2 | 2.050 ± 0.071 | 4.100 ± 0.141 |" in table and "old" not in table
    assert "| one | 2 | 1.050 ± 0.071 |" in capsys.readouterr().out
    kept = json.loads((scripts / "results" / "doubling.json").read_text())
    assert kept["command"] == "python training/doubling.py" and "torch" in kept["versions"]
    assert kept["scores"]["two"] == {"seed_0": {"once": 2, "twice": 4}, "seed_1": {"once": 2.1, "twice": 4.2}}
    assert (scripts / "results" / "doubling.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_finished_is_not_run_again(tmp_path, scripts):
    run(tmp_path / "runs", scripts, seeds=[0], arms=["two"])
    run(tmp_path / "another_machine", scripts, seeds=[0, 1])  # which has the scores beside the scripts
    assert sorted((scripts / "started").read_text().split()) == ["1.0", "1.1", "2.0", "2.1"]
    run(tmp_path / "a_third", scripts, seeds=[0, 1])
    assert not (tmp_path / "a_third").exists()


def test_a_stage_that_fails_is_named_and_the_finished_ones_are_kept(tmp_path, scripts):
    with pytest.raises(ChildProcessError, match=r"work failed; .*two_seed_9_value\.log says why"):
        run(tmp_path / "runs", scripts, seeds=[9])
    assert "could not convert" in (tmp_path / "runs" / "logs" / "two_seed_9_value.log").read_text()
    assert list(runs(tmp_path / "runs", scripts)["one"]) == ["seed_9"]


def test_a_stage_that_was_stopped_is_run_again(tmp_path, scripts):
    half = tmp_path / "runs" / "one" / "seed_0" / "value"
    half.parent.mkdir(parents=True)
    half.write_text("0.5")  # as a script leaves it that saves its result on the way
    run(tmp_path / "runs", scripts, arms=["one"], seeds=[0])
    assert runs(tmp_path / "runs", scripts)["one"] == {"seed_0": {"once": 1, "twice": 2}}


def test_an_unknown_arm_is_refused(tmp_path, scripts):
    with pytest.raises(ValueError, match="There is no arm three; the arms are one, two"):
        run(tmp_path / "runs", scripts, arms=["one", "three"])
