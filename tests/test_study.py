import json
import math
from types import SimpleNamespace

import pytest
from runs import SERVER, make_corpus, run_program

import study
import train
from data import InputError


def record(name, seed, steps, score, flops=100, part="main"):
    return {"part": part, "name": name, "seed": seed, "steps": steps, "flops": flops, "seconds": 60.0,
            "processor": "P", "failed": None, "scores": {"STS-B": [score - 1, score + 1], "CoLA": [score]},
            "cosines": {"[CLS]": {"similar": [1] * 50, "random": [2] * 50}},
            "log": {"step": [0, steps // 2, steps], "copy_auc": [0.5, 0.6, score / 100]}}


def test_train_takes_the_options_of_all_rows():
    args = SimpleNamespace(preset="base", steps=40, seeds=3, dataset="toy", setup="")
    rows = [row for row in study.plan(args) if row["steps"]]
    configs = {}
    for row in rows:
        frozen = ["--auxiliary_from=ckpt.pt"] if "frozen" in row["options"] else []
        settings = train.read_settings(study.train_options(row, args) + frozen)
        configs[row["part"], row["name"]] = vars(train.make_config(settings, vocab_size=1000))
    base = configs.pop(("main", "COCO-LM"))
    assert base == configs.pop(("ablations", "COCO-LM")) == configs.pop(("efficiency", "COCO-LM"))
    assert configs["ablations", "narrow auxiliary"]["auxiliary_width"] == 252  # 1/3, rounded to 12 heads
    ablations = [config for (part, _), config in configs.items() if part == "ablations"]
    assert len(ablations) == 15 and base not in ablations
    assert len({study.file_name(row) for row in rows}) == len(rows)


def test_paired_differences_are_of_the_same_seed():
    records = [record("COCO-LM", s, 10, x) for s, x in ((1, 5.0), (2, 7.0), (3, 9.0))]
    records += [record("RTD", s, 10, x) for s, x in ((3, 5.0), (1, 4.0), (2, 4.0), (4, 50.0))]
    found = {row[:3]: row[3:] for row in study.paired(study.table(records), 10)}
    mean, sd, n, low, high = found["main", "COCO-LM - RTD", "STS-B"]
    assert (mean, n) == (pytest.approx(8 / 3), 3)  # 1, 3, 4
    assert sd == pytest.approx(math.sqrt((25 + 1 + 16) / 9 / 2))
    assert (low + high) / 2 == pytest.approx(mean) and high - mean == pytest.approx(4.303 * sd / math.sqrt(3))
    assert {row[0] for row in found} == {"main"}  # no run of RTD cost what a run of COCO-LM did


def test_paired_differences_at_equal_compute():
    records = [record("COCO-LM", seed, 10, 5.0) for seed in (1, 2)] + [record("RTD", 1, 10, 1.0)]
    records += [record("RTD", 1, 16, 4.0, part="plateau"), record("RTD", 2, 16, 2.0, part="plateau")]
    records += [record("COCO-LM", 1, 20, 9.0, part="plateau"), record("RTD", 1, 32, 3.0, part="plateau")]
    records += [record("CLM", 1, 20, 8.0, part="plateau")]
    found = {row[1:3]: row[3:6] for row in study.paired(study.table(records), 10) if row[0] == "plateau"}
    assert found.keys() == {(f"COCO-LM {one} - {other}", score) for score in ("STS-B", "CoLA")
                            for one, other in ((10, "RTD 16"), (20, "RTD 32"), (20, "CLM 20"))}
    assert found["COCO-LM 20 - CLM 20", "STS-B"] == (1, None, 1)
    assert found["COCO-LM 10 - RTD 16", "STS-B"] == (2, pytest.approx(math.sqrt(2)), 2)  # 1, 3
    assert found["COCO-LM 20 - RTD 32", "CoLA"] == (6, None, 1)


def test_needed_compute():
    records = []
    for seed, goal in enumerate((2.0, 3.5, 4.5, 0.5), 1):
        records += [record("COCO-LM", seed, steps, score, flops, "main" if steps == 100 else "efficiency")
                    for steps, score, flops in ((100, 4.0, 1600), (25, 1.0, 100), (50, 3.0, 400))]
        records += [record("RTD", seed, 50, 9.0, 400, "efficiency"), record("RTD", seed, 100, goal, 800)]
    records += [record("RTD", 5, 100, 2.0, 800), record("COCO-LM", 5, 100, 4.0, 1600)]  # one run: no line
    expected = [pytest.approx(200 / 800), pytest.approx(800 / 800), "> 2.000", "< 0.125"]
    assert list(study.needed(study.table(records), 100)) == list(enumerate(expected, 1))
    assert list(study.needed(study.table(records), 320)) == []
    records += [record("RTD", 1, 160, 2.5, 1600, "plateau"), record("RTD", 1, 320, 5.0, 3200, "plateau"),
                record("COCO-LM", 1, 200, 6.0, 3200, "plateau")]
    assert list(study.needed(study.table(records), 100)) == list(enumerate(expected, 1))
    assert list(study.needed(study.table(records), 320)) == [(1, pytest.approx(math.sqrt(1 / 2)))]
    computes = [flops for flops, _ in study.against_compute(study.table(records), "RTD").values()]
    assert computes == sorted(computes) and len(computes) == 4


def test_draw_gives_the_same_csvs(tmp_path, monkeypatch):
    (tmp_path / "records" / "tiny").mkdir(parents=True)
    for name, score in (("RTD", 3.0), ("CLM", 4.0), ("COCO-LM", 5.0)):
        for seed in (1, 2):
            row = record(name, seed, 40, score + seed)
            (tmp_path / "records" / "tiny" / f"{study.file_name(row)}.json").write_text(json.dumps(row))
    diverged = record("MLM", 1, 40, 9.0) | {"failed": "not finite"}
    (tmp_path / "records" / "tiny" / "mlm-40-1.json").write_text(json.dumps(diverged))
    drawn = []
    for again in range(2):
        monkeypatch.setattr(study, "ASSETS", tmp_path / str(again))
        if again:
            monkeypatch.setattr(study, "draw_figures", lambda values: None)  # only the CSVs are compared
        study.draw(SimpleNamespace(results_dir=tmp_path / "records", preset="tiny", steps=40, seeds=3))
        drawn.append({file.name: file.read_bytes() for file in (tmp_path / str(again)).glob("*.csv")})
    assert drawn[0] == drawn[1]
    assert b"main,CLM,STS-B,40,5.5,0.70711,2\n" in drawn[0]["scores.csv"]
    assert b"MLM" not in drawn[0]["scores.csv"]


def forked(command, stdout, stderr, env, preexec_fn):
    """subprocess.run for `python program`, from a process that has imported torch."""
    process = SERVER.Process(target=run_program, args=(stdout.name, env, None, *map(str, command[1:])))
    process.start()
    process.join()
    return SimpleNamespace(returncode=process.exitcode)


def test_a_row_is_run_once(tmp_path, monkeypatch):
    make_corpus(tmp_path, val_fraction=0.3)
    lines = {"SST-2": ["sentence\tlabel"] + [f"word {i}\t{i % 2}" for i in range(20)],
             "CoLA": [f"x\t{i % 2}\t*\tword {i}" for i in range(20)],
             "STS-B": ["sentence1\tsentence2\tscore"]
                      + [f"word {i}\tword {i + 1}\t{i % 6}" for i in range(20)]}
    for task, rows in lines.items():
        (tmp_path / task).mkdir()
        for split in ("train", "dev"):
            (tmp_path / task / f"{split}.tsv").write_text("\n".join(rows))
    monkeypatch.setattr(study, "TWICE", ("CoLA",))
    monkeypatch.setattr(study, "ONCE", ())
    monkeypatch.setattr(study.subprocess, "run", forked)
    monkeypatch.setattr(study, "plan", lambda args: [row])
    row = {"part": "ablations", "name": "frozen auxiliary", "options": "--corruption=frozen", "seed": 1,
           "steps": 1}
    args = SimpleNamespace(preset="tiny", steps=40, seeds=1, only="", setup="", dataset="toy",
                           data_dir=tmp_path, glue_dir=tmp_path, work_dir=tmp_path / "work",
                           results_dir=tmp_path / "results")
    study.run(args)
    [file] = (tmp_path / "results" / "tiny").iterdir()
    result = json.loads(file.read_bytes())
    assert len(result["scores"]["CoLA"]) == 2 and sum(result["cosines"]["mean"]["random"]) == 20
    assert result["settings"]["corruption"] == "frozen" and result["log"]["step"] == [0, 1]
    written = file.stat().st_mtime_ns
    study.run(args)
    assert file.stat().st_mtime_ns == written
    monkeypatch.setattr(study, "plan", lambda args: [row, row | {"name": "another"}])
    monkeypatch.setattr(study, "processor", lambda: "another")
    study.run(args)  # a seed stays on one kind of processor
    assert list(file.parent.iterdir()) == [file]
    row["options"] = "--learning_rate=0.1"
    with pytest.raises(InputError, match="is not of this text and"):
        study.run(args)
    row["options"], args.dataset = "--corruption=frozen", "other"
    make_corpus(tmp_path, name="other", seed=2, val_fraction=0.3)
    file.write_text(json.dumps(result | {"options": study.train_options(row, args)}))
    with pytest.raises(InputError, match="is not of this text"):
        study.run(args)
