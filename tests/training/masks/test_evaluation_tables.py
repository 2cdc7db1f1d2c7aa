from hf_efficientsam.training.masks.evaluation_tables import model_table, peers_table


def groups(value, key="miou"):
    return {"all": {key: value, "count": 2}, "small": {key: value / 2, "count": 2}}


BASELINE = {"filled_box": groups(0.6), "ellipse": groups(0.64)}
RESULTS = {"box": {"confident": groups(0.7)}, "click1": {"confident": groups(0.3)}, "baseline": BASELINE}
BOUNDARY = {name: groups(0.5, "mean") for name in ("box", "click1", "filled_box", "ellipse")}
CLICKS = {target: {"all": {"mean": 11.5, "failed": 0.25, "count": 2}} for target in ("85", "90")}


def test_a_models_table_has_all_numbers_by_size():
    lines = model_table(RESULTS, {"other": RESULTS}, {"box": 0.125}, BOUNDARY, CLICKS).splitlines()
    assert lines[0].split() == ["mIoU", "all", "small"]
    assert lines[1].split() == ["box,", "confident", "0.7000", "0.3500"]
    assert lines[2].split() == ["other", "0.7000", "0.3500"]
    assert "boundary IoU, box                   0.5000    0.2500" in lines
    assert "NoC@90                               11.50         -" in lines
    assert lines[-1].split() == ["calibration", "error,", "box", "0.1250"]


def test_peers_are_rows_of_markdown_with_the_baselines_last():
    by_model = {
        name: dict.fromkeys(("a", "b"), one)
        for name, one in {"results": RESULTS, "boundary_iou": BOUNDARY, "clicks": CLICKS}.items()
    }
    sizes = {name: {"height": 64, "width": 32} for name in ("a", "b")}
    lines = peers_table(by_model, sizes).splitlines()
    assert lines[0] == "| model | input | box | click1 | box, small | box, boundary | NoC@85 | NoC@90 |"
    assert lines[2] == "| a | 64 x 32 | 0.700 | 0.300 | 0.350 | 0.500 | 11.50 | 11.50 |"
    assert lines[4] == "| filled box | - | 0.600 | - | 0.300 | 0.500 | - | - |"
    assert all(line.count("|") == 9 for line in lines) and len(lines) == 6
    del by_model["clicks"]
    assert "NoC" not in peers_table(by_model, sizes)
