import json
import sys

import pytest

import plot

HEADER = {"nothing_learned": {"mlm_loss": 6.5, "copy_auc": 0.5}}
ROWS = [{"split": "val", "step": 0, "mlm_loss": 9.0, "lm_loss": 9.0, "copy_auc": 0.5},
        {"split": "train", "step": 1, "mlm_loss": None},  # null: it was not finite
        {"split": "train", "step": 2, "mlm_loss": 7.0},
        {"split": "val", "step": 2, "mlm_loss": 7.0, "lm_loss": 8.0, "copy_auc": None}]


def write_log(folder, *lines, torn=""):
    folder.mkdir(parents=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + torn)
    return str(folder)


def test_figures_of_one_run_and_of_several(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    image = pytest.importorskip("matplotlib.image")
    one = write_log(tmp_path / "one", HEADER, *ROWS, torn='{"split": "tra')
    mlm = write_log(tmp_path / "mlm", {}, {"split": "val", "step": 5, "lm_loss": 8.0})  # has neither column
    heights = []
    for runs in ([one], [mlm], [mlm, one]):
        plot.main(runs)
        path = tmp_path / runs[0] / "curves.png"
        assert capsys.readouterr().out == f"{path}\n"
        heights.append(len(image.imread(path)))
    assert heights[1] < heights[0] < heights[2]  # 1, 2 and 3 panels


@pytest.mark.parametrize("lines, sentence", [
    (None, "No such file"), (["text"], "is not the log of a run"), ([[]], "is not the log of a run"),
    ([HEADER], "has no rows yet"), ([{}, {"step": 1}], "has none of mlm_loss, "),
    ([{}, {"step": 1, "split": "val", "mlm_loss": "low"}], "could not convert")])
def test_bad_input_is_one_sentence(tmp_path, capsys, lines, sentence):
    pytest.importorskip("matplotlib")
    if lines is not None:
        write_log(tmp_path / "run", *lines)
    with pytest.raises(SystemExit) as exit:
        plot.main([str(tmp_path / "run")])
    error = capsys.readouterr().err
    assert exit.value.code == 2 and sentence in error and error.count("\n") == 1


def test_without_matplotlib(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit) as exit:
        plot.main([str(tmp_path)])
    assert exit.value.code == 2 and "pip install matplotlib" in capsys.readouterr().err
