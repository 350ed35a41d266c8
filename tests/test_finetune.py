"""finetune.py: readers, metrics, SQuAD's windows and offsets, predictions, runs, interruptions, bad input.

Every file is made here, in the official layouts; every run is on the CPU in float32, on a model of 2 layers.
"""

import json
import math
import random
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import stress
import torch
from stress import ROOT

import data
import finetune
import train

FINETUNE = (str(ROOT / "finetune.py"),)
WORDS = ("river stone garden window letter music winter silver bridge forest candle market paper engine harbour valley "
         "teacher doctor painter farmer sings walks writes builds opens finds quickly slowly never always").split()
FLAT = ["CoLA", "SST-2", "MRPC", "STS-B", "QQP", "QNLI", "RTE", "WNLI"]  # the tasks with one dev set


# --- what the tests run on


@pytest.fixture(scope="session")
def tokenizer():
    text = " ".join(WORDS * 3) + ' good bad yes no answer the is "of" 0123456789 é → naïve İstanbul'
    words = Counter(data.regex.findall(data.PATTERN, data.lower(text)))
    return data.Tokenizer(data.train_bpe(words, 380), data.PATTERN, True)


@pytest.fixture(scope="session")
def checkpoint(tokenizer, tmp_path_factory):
    """An untrained checkpoint of train.py's format: width 32, 64 positions."""
    torch.manual_seed(0)
    model = train.COCOLM(train.Config.from_preset("tiny", vocab_size=tokenizer.vocab_size, width=32, heads=2,
                                                  ffn_width=64, max_len=64))
    path = tmp_path_factory.mktemp("checkpoint") / "ckpt.pt"
    torch.save({"model": model.state_dict(), "optimizer": {}, "step": 7, "config": vars(model.config), "constants": {},
                "tokenizer": tokenizer.state(), "versions": {}}, path)
    return path


def sentence(draw, *extra):
    words = [*draw.sample(WORDS, draw.randint(3, 7)), *extra]
    draw.shuffle(words)
    return " ".join(words)


def glue_rows(name, count, seed):
    """[(texts, label)] that can be learned: which of two words stands in the first text, or how often."""
    draw, labels, rows = random.Random(f"{name}{seed}"), finetune.TASKS[name]["labels"], []
    marks = ["good", "bad", "answer"]
    for i in range(count):
        if labels:
            mark, label = marks[i % len(labels)], labels[i % len(labels)]
        else:
            mark, label = ["good"] * (i % 6), f"{i % 6:.3f}"
        first = sentence(draw, *([mark] if isinstance(mark, str) else mark))
        rows.append(([first, sentence(draw)][: len(finetune.TASKS[name]["text"])], label))
    return rows


HEADERS = {  # of train and dev, and of test, as the official files have them
    "CoLA": (None, "index sentence"), "SST-2": ("sentence label", "index sentence"),
    "MRPC": ("Quality,#1 ID,#2 ID,#1 String,#2 String", "index,#1 ID,#2 ID,#1 String,#2 String"),
    "STS-B": ("index genre filename year old_index source1 source2 sentence1 sentence2 score",
              "index genre filename year old_index source1 source2 sentence1 sentence2"),
    "QQP": ("id qid1 qid2 question1 question2 is_duplicate", "id question1 question2"),
    "MNLI": ("index promptID pairID genre sentence1_parse sentence2_parse sentence1 sentence2 label1 gold_label",
             "index promptID pairID genre sentence1_parse sentence2_parse sentence1 sentence2"),
    "QNLI": ("index question sentence label", "index question sentence"),
    "RTE": ("index sentence1 sentence2 label", "index sentence1 sentence2"),
    "WNLI": ("index sentence1 sentence2 label", "index sentence1 sentence2"),
}


def write_glue(folder, name, count=40, dev_is_train=False):
    """The official files of a task, with its header, byte-order mark, quotation marks and line ends."""
    task, place = finetune.TASKS[name], Path(folder, name)
    place.mkdir(parents=True, exist_ok=True)
    suffixes = [values[0] for values in task.get("sets", {name: ("",)}).values()]
    splits = [("train", 0)] + [(f"{s}{suffix}", i) for suffix in suffixes for i, s in ((1, "dev"), (2, "test"))]
    for split, part in splits:
        header = HEADERS[name][split.startswith("test")]
        columns = header.split("," if "," in header else " ") if header else task["no_header"]
        lines = ["\t".join(columns)] if header else []
        for i, (texts, label) in enumerate(glue_rows(name, count, 0 if dev_is_train else part)):
            value = {**dict(zip(task["text"], texts)), task["label"]: label, "index": str(i), "id": str(i), "star": ""}
            lines.append("\t".join(value.get(column, "x") for column in columns))
        content = "\n".join(lines) + "\n" * (name != "CoLA")
        if name == "MRPC":
            content = "\ufeff" + content.replace("\n", "\r\n")
        (place / f"{split}.tsv").write_bytes(content.encode())


def squad_questions(count, seed, version, fillers=12):
    """A SQuAD file: the answer is the word behind "answer is", in long contexts; in 2.0 every other has none."""
    draw, paragraphs = random.Random(seed), []
    for i in range(count):
        word, none = draw.choice(WORDS[:16]).capitalize(), version == "2.0" and i % 2
        before, after = (" ".join(draw.choices(WORDS[16:], k=draw.randint(2, fillers))) for _ in range(2))
        context = f"{before.capitalize()} é→ the {'no' if none else 'answer is'} {word}. {after}"
        golds = [] if none else [{"text": word, "answer_start": context.index(word)}] * (1 + i % 2)
        qa = {"id": f"q{i}", "question": "what is the answer ?", "answers": golds}
        qa |= {"is_impossible": bool(none)} if version == "2.0" else {}
        paragraphs.append({"context": context, "qas": [qa]})
    return {"version": version, "data": [{"title": "t", "paragraphs": paragraphs}]}


def write_squad(folder, version, count=32, dev_is_train=False):
    folder.mkdir(parents=True, exist_ok=True)
    for split, seed in (("train", 0), ("dev", 0 if dev_is_train else 1)):
        (folder / f"{split}-v{version}.json").write_text(json.dumps(squad_questions(count, seed, version)))


def run(arguments):
    """finetune.py in this process."""
    handler = signal.getsignal(signal.SIGTERM)
    before, sys.argv = sys.argv, ["finetune.py", *map(str, arguments)]
    try:
        finetune.main()
    finally:
        sys.argv = before
        signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def options(checkpoint, tmp_path):
    return [f"--init_from={checkpoint}", f"--data_dir={tmp_path}/data", f"--out_dir={tmp_path}/out", "--epochs=1"]


def results(tmp_path, name, out="out"):
    return json.loads((tmp_path / out / name / "results.json").read_text())


def table(path):
    return [line.split("\t") for line in path.read_text().splitlines()]


# --- metrics; the expected values are scikit-learn's and scipy's


def test_metrics_equal_the_libraries():
    gold, predicted = [0, 1, 1, 0, 1, 1, 0, 1], [0, 1, 0, 0, 1, 1, 1, 1]
    assert finetune.accuracy(gold, predicted) == 0.75
    assert finetune.f1_score(gold, predicted, 1) == pytest.approx(0.8, abs=1e-12)
    assert finetune.matthews(gold, predicted) == pytest.approx(0.4666666666666667, abs=1e-12)
    assert finetune.matthews(list("abccb"), list("acccb")) == pytest.approx(0.7349684152591671, abs=1e-12)
    x, y = [1, 2, 2, 3, 5, 0], [2.5, 1.0, 2.5, 4, 4, 0.5]
    assert finetune.pearson(x, y) == pytest.approx(0.8000622981033496, abs=1e-12)
    assert finetune.spearman(x, y) == pytest.approx(0.8508410434878082, abs=1e-12)


def test_metrics_at_the_edges():
    assert finetune.f1_score([0, 0], [0, 0], 1) == finetune.f1_score([1, 1], [0, 0], 1) == 0.0
    for gold, predicted in (([1, 1], [0, 1]), ([1, 1], [1, 1]), ([0, 1], [1, 1])):
        assert finetune.matthews(gold, predicted) == 0.0
    for correlation in (finetune.pearson, finetune.spearman):
        assert math.isnan(correlation([1, 2, 3], [0.1] * 3)) and math.isnan(correlation([0.1] * 3, [1, 2, 3]))
        assert correlation([1, 2, 3], [10, 20, 30]) == pytest.approx(1)
        assert correlation([1, 2], [5, 3]) == pytest.approx(-1)
    assert finetune.ranks([3, 1, 3, 2]).tolist() == [3.5, 1, 3.5, 2]


def test_metrics_against_obvious_versions():
    draw = np.random.default_rng(0)
    for _ in range(20):
        gold, predicted = draw.integers(0, 2, (2, 50))
        tp, tn = (gold & predicted).sum(), (1 - gold & 1 - predicted).sum()
        fp, fn = predicted.sum() - tp, gold.sum() - tp
        mcc = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
        assert finetune.matthews(gold, predicted) == pytest.approx(mcc, abs=1e-9)
        assert finetune.f1_score(gold, predicted, 1) == pytest.approx(2 * tp / (2 * tp + fp + fn), abs=1e-9)
        x, y = draw.normal(size=(2, 30))
        assert finetune.pearson(x, y) == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-9)
        rank = [[sum(a > b for b in v) for a in v] for v in (x, y)]
        assert finetune.spearman(x, y) == pytest.approx(np.corrcoef(*rank)[0, 1], abs=1e-9)


@pytest.mark.parametrize("golds, predicted, version, expected", [
    (["Denver Broncos"], "the Denver  Broncos!", "1.1", (1, 1)), (["a cat"], "An cat.", "1.1", (1, 1)),
    (["Saint Bernadette"], "Bernadette Soubirous", "1.1", (0, 0.5)), (["x y", "y z w"], "y z", "1.1", (0, 0.8)),
    (["2,000"], "2000", "1.1", (1, 1)), (["the"], "a", "1.1", (1, 0)), (["the"], "a", "2.0", (1, 1)),
    (["b b c"], "b c c", "1.1", (0, 2 / 3)), ([], "", "2.0", (1, 1)), ([], "x", "2.0", (0, 0)),
    (["x"], "", "2.0", (0, 0)),
    (["a", "x"], "x", "2.0", (1, 1)), (["anthem"], "them", "1.1", (0, 0)), (["x"], "", "1.1", (0, 0))])
def test_squad_scores(golds, predicted, version, expected):
    assert finetune.squad_scores(golds, predicted, version) == pytest.approx(expected, abs=1e-12)


def test_best_threshold_is_that_of_trying_all():
    draw = np.random.default_rng(0)
    for _ in range(50):
        scores, has, odds = draw.random(12), draw.random(12) < 0.6, draw.integers(-3, 4, 12).astype(float)
        scores *= has

        def total(threshold):
            return np.where(odds <= threshold, scores, ~has).mean()

        value, threshold = finetune.best_threshold(scores, has, odds)
        assert value == pytest.approx(max(map(total, [*odds, -99])), abs=1e-12)
        assert total(threshold) == pytest.approx(value, abs=1e-12)


# --- readers


@pytest.mark.parametrize("name", list(HEADERS))
def test_reader_of_each_task(name, tmp_path):
    write_glue(tmp_path, name, 7)
    task = finetune.TASKS[name]
    expected = glue_rows(name, 7, 0)
    rows, broken = finetune.read_glue(tmp_path / name / "train.tsv", task, True)
    assert [(texts, label) for _, texts, label in rows] == expected and not broken
    test = next((tmp_path / name).glob("test*.tsv"))
    rows, _ = finetune.read_glue(test, task, False)
    assert [(i, texts, label) for i, texts, label in rows] == [
        (str(i), texts, None) for i, (texts, _) in enumerate(glue_rows(name, 7, 2))]


def test_quirks_of_the_official_files(tmp_path):
    def read(name, text, labelled=True):
        (tmp_path / "x.tsv").write_bytes(text.encode())
        return finetune.read_glue(tmp_path / "x.tsv", finetune.TASKS[name], labelled)

    # neither quotation marks nor other line separators mean anything
    rows, _ = read("CoLA", 'gj04\t1\t\t"What, he said.\ngj04\t0\t*\tA\u2028b \x85c"\n\n')
    assert rows == [("0", ['"What, he said.'], "1"), ("1", ["A\u2028b \x85c\""], "0")]
    rows, _ = read("MRPC", '\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n1\t7\t8\t" a\tb "" c\r\n')
    assert rows == [("0", ['" a', 'b "" c'], "1")]
    rows, broken = read("QQP", "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n5\t1\t2\ta\tb\t1\n"
                        "6\t1\t2\tcut\n off\t0\n7\t1\t2\t\tb\t0\n")
    assert rows == [("5", ["a", "b"], "1"), ("7", ["", "b"], "0")] and broken == 2
    rows, _ = read("QQP", "id\tquestion1\tquestion2\n9\ta\tb\n", False)
    assert rows == [("9", ["a", "b"], None)]
    rows, _ = read("MNLI", "gold_label\tsentence2\tsentence1\nneutral\tb\ta\n")  # columns are found by name
    assert rows == [("0", ["a", "b"], "neutral")]


@pytest.mark.parametrize("name, text, message", [
    ("SST-2", "sentence\tlabel\nfine\t1\nbad\t2\n", r"x.tsv, line 3: the label '2' is none of 0, 1"),
    ("STS-B", "sentence1\tsentence2\tscore\na\tb\t5.1\n", "line 2: the score '5.1' is no number from 0 to 5"),
    ("STS-B", "sentence1\tsentence2\tscore\na\tb\tnan\n", "line 2: the score 'nan'"),
    ("RTE", "index\tsentence1\tlabel\n0\ta\tentailment\n", 'x.tsv has no column "sentence2": its first line reads'),
    ("RTE", "index\tsentence1\tsentence2\tlabel\n0\ta\tb\n", 'line 2: there is no column "label", only 3 fields'),
    ("CoLA", "gj04\t1\t\n", 'line 1: there is no column "sentence"'),
    ("SST-2", "1\tthis has no header\n", 'no column "sentence"'), ("SST-2", "sentence\tlabel\n", "is empty"),
    ("CoLA", "", "is empty"), ("MNLI", "sentence1\tsentence2\tgold_label\na\tb\t-\n", "the label '-' is none of"),
])
def test_bad_rows_are_named(name, text, message, tmp_path):
    (tmp_path / "x.tsv").write_text(text)
    with pytest.raises(data.InputError, match=message) as error:
        finetune.read_glue(tmp_path / "x.tsv", finetune.TASKS[name], True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text, message", [
    ("{", "is not JSON"), ("[]", "not in SQuAD's format"), ('{"data": []}', "is empty"),
    ("caf\xe9", "is not JSON in UTF-8"),
    ('{"data": [{"paragraphs": [{"context": "a"}]}]}', "KeyError: 'qas'"),
    ('{"data": [{"paragraphs": [{"context": "a", "qas": [{"id": "q7", "question": "b", "answers": []}]}]}]}',
     "question q7 has no answer")])
def test_bad_squad_files(text, message, tmp_path):
    (tmp_path / "x.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(data.InputError, match=message):
        finetune.read_squad(tmp_path / "x.json", "1.1")


# --- SQuAD: offsets, windows, answers


def test_offsets_are_characters_of_the_original(tokenizer):
    for text in ("The ANSWER is İstanbul, naïve → é.", "  a\n\tB ", "", "日本語 River", "broken \ud800 half",
                 "Ⱥ River"):
        ids, spans = finetune.offsets(tokenizer, text)
        assert spans.shape == (len(ids), 2)
        covered = np.zeros(len(text), int)
        for (start, end), token in zip(spans, ids):
            covered[start:end] += 1
            piece = tokenizer.decode([token])
            if "\ufffd" not in piece and "\ud800" not in text:
                assert data.lower(text[start:end]) == piece
        assert (covered > 0).all() and (np.diff(spans, axis=0) >= 0).all()


@pytest.mark.parametrize("max_len", [64, 40, 24, 16])
def test_every_gold_span_comes_back_from_the_tokens_that_cover_it(tokenizer, max_len):
    questions = [q for fillers in (5, 60) for q in read(squad_questions(10, fillers, "1.1", fillers))]
    questions += [dict(id="x", question="?", context="İn→ rivers, Stone", golds=[("iver", 5), ]),
                  dict(id="y", question="?", context="a stone ", golds=[("stone ", 2)]),
                  dict(id="z", question="?", context="caf\u00e9\u2192", golds=[("\u00e9", 3)])]
    a_set, misplaced = finetune.squad_set(questions, tokenizer, max_len, True)
    assert misplaced == 0 and len(a_set["questions"]) == len(questions)
    seen = set()
    for example in a_set["examples"]:
        assert len(example["tokens"]) <= max_len and len(example["allowed"]) == len(example["tokens"])
        first, last = example["span"]
        assert example["allowed"][first] and example["allowed"][last]
        if first:
            q = a_set["questions"][example["question"]]
            first, last = first + example["shift"], last + example["shift"]
            gold, text = q["golds"][0][0].strip(), finetune.span_text(q, first, last)
            start, end = q["spans"][first, 0], q["spans"][last, 1]
            assert gold in text and start <= q["golds"][0][1] and end >= q["golds"][0][1] + len(gold)
            if q["id"].startswith("q"):
                assert text == gold  # the answer stands on token borders, and keeps its capital letter
            seen.add(example["question"])
    assert seen == set(range(len(questions)))


def read(squad):
    return [dict(id=qa["id"], question=qa["question"], context=p["context"],
                 golds=[(a["text"], a["answer_start"]) for a in qa["answers"]])
            for article in squad["data"] for p in article["paragraphs"] for qa in p["qas"]]


def test_windows_overlap_and_hold_every_token(tokenizer):
    question = dict(id="q", question=" ".join(WORDS * 4), context=" ".join(WORDS * 9), golds=[("river", 0)])
    a_set, _ = finetune.squad_set([question], tokenizer, 64, True)
    held = Counter()
    for example in a_set["examples"]:
        tokens, (first, second, last) = example["tokens"], np.flatnonzero(example["tokens"] == tokenizer.sep_id)
        assert tokens[0] == tokenizer.cls_id and second == first + 1 and last == len(tokens) - 1
        assert first - 1 == 64 // 2 - 2  # the question is cut
        assert example["allowed"][0] and not example["allowed"][1 : second + 1].any() and not example["allowed"][-1]
        held.update(range(second + 1 + example["shift"], last + example["shift"]))
    ids, _ = finetune.offsets(tokenizer, question["context"])
    assert set(held) == set(range(len(ids))) and min(Counter(held).values()) >= 1 and max(held.values()) >= 2


def test_misplaced_answers_are_counted_and_left_out_of_training(tokenizer):
    contexts = "the river and the stone"
    golds = [[("river", 4)], [("river", 5)], [("stone", 4), ("stone", 18)], [("river", -19)], [("river", None)],
             [("", 0)], [("stone", 99)]]
    questions = [dict(id=str(i), question="?", context=contexts, golds=g) for i, g in enumerate(golds)]
    kept, misplaced = finetune.squad_set(questions, tokenizer, 64, True)
    assert misplaced == 5 and [q["id"] for q in kept["questions"]] == ["0", "2"]
    kept, misplaced = finetune.squad_set(questions, tokenizer, 64, False)
    assert len(kept["questions"]) == 7


def test_best_spans_are_those_of_trying_all():
    torch.manual_seed(0)
    logits = torch.randn(5, 12, 2)
    logits[:, [1, 2, 7]] = -math.inf
    for longest in (1, 3, 30):
        found = finetune.best_spans(logits, longest)
        for row, (score, first, last, nothing) in zip(logits, found.tolist()):
            all_spans = {(i, j): (row[i, 0] + row[j, 1]).item()
                         for i in range(1, 12) for j in range(i, min(i + longest, 12))}
            assert (first, last) == max(all_spans, key=all_spans.get) and score == max(all_spans.values())
            assert nothing == (row[0, 0] + row[0, 1]).item()


def test_best_answer_over_all_windows():
    spans = np.array([[0, 3], [3, 7], [7, 8], [8, 14]])
    a_set = {"questions": [{"context": "The CAT\n stones", "spans": spans}, {"context": "x", "spans": spans}],
             "examples": [{"question": 0, "shift": -4}, {"question": 0, "shift": -3}, {"question": 1, "shift": 0}]}
    texts, odds = finetune.answers(a_set, np.array([[1.0, 4, 5, 3.0], [2.0, 4, 6, 2.5], [-math.inf, 0, 0, 1.0]]))
    assert texts == ["CAT\n stone", "x"]  # the higher score, in the original letters; never empty
    assert odds[0] == 0.5 and odds[1] > 1e6


# --- predictions


def test_submission_files_are_byte_exact(tmp_path):
    sets = {"test": {"RTE": {"index": ["0", "1"]}, "STS-B": {"index": ["0", "1", "2", "3"]}},
            "dev": {"STS-B": {"index": ["0"], "gold": [2.75], "examples": []}}}
    finetune.write_predictions(tmp_path, sets, {"STS-B": [1 / 3]},
                               {"RTE": ["entailment", "not_entailment"], "STS-B": [-0.2, 5.3, 2.00049, 3.1415926]})
    assert (tmp_path / "RTE.tsv").read_bytes() == b"index\tprediction\n0\tentailment\n1\tnot_entailment\n"
    assert (tmp_path / "STS-B.tsv").read_bytes() == b"index\tprediction\n0\t0.000\n1\t5.000\n2\t2.000\n3\t3.142\n"
    assert (tmp_path / "STS-B.dev.tsv").read_bytes() == b"index\tprediction\tgold\n0\t0.3333333333333333\t2.75\n"
    questions = [{"id": "a", "golds": [("Naïve", 0)]}, {"id": "b", "golds": []}]
    finetune.write_predictions(tmp_path, {"test": {}, "dev": {"SQuAD-2.0": {"questions": questions}}},
                               {"SQuAD-2.0": (["Na\nï", "x"], np.array([-1.5, 2.0]))}, {})
    assert (tmp_path / "predictions.json").read_bytes() == b'{\n "a": "Na\\n\\u00ef",\n "b": ""\n}\n'
    assert json.loads((tmp_path / "null_odds.json").read_text()) == {"a": -1.5, "b": 2.0}
    assert table(tmp_path / "SQuAD-2.0.dev.tsv")[1:] == [["a", "Na ï", '["Na\\u00efve"]'], ["b", "", "[]"]]


@pytest.mark.parametrize("name", list(HEADERS))
def test_each_glue_task_on_an_extract(name, options, tmp_path, capsys):
    write_glue(tmp_path / "data", name)
    if name == "MNLI":
        (tmp_path / "data/AX").mkdir()
        (tmp_path / "data/AX/AX.tsv").write_text("index\tsentence1\tsentence2\n0\ta\tb\n1\tc\td\n")
    run([*options, f"--task={name}"])
    out = capsys.readouterr().out
    line, kept = json.loads(out.splitlines()[-1]), results(tmp_path, name)
    assert "40 rows, where the official file has" in out
    assert {**line, "settings": kept["settings"], "runs": kept["runs"]} == kept
    assert line["task"] == name and line["seeds"] == 1 and line["examples"] == 40 and line["step"] == 7
    assert len(line["checksum"]) == 64 and line["seconds"] > 0 and line["examples_per_second"] > 0
    task, folder = finetune.TASKS[name], tmp_path / "out" / name
    extra = {"accuracy_mismatched"} if name == "MNLI" else set()
    assert set(line["metrics"]) == set(line["baseline"]) == {*task["metrics"], *extra}
    names = {"MNLI": ["MNLI-m", "MNLI-mm"]}.get(name, [name])
    files = {f"{n}{end}" for n in names for end in (".tsv", ".dev.tsv")} | ({"AX.tsv"} if name == "MNLI" else set())
    assert {f.name for f in (folder / "predictions").iterdir()} == files
    assert {f.name for f in folder.iterdir()} == {"results.json", "predictions", "best.pt", "last.pt"}
    for n in names:
        rows = table(folder / "predictions" / f"{n}.tsv")
        assert rows[0] == ["index", "prediction"] and [row[0] for row in rows[1:]] == [str(i) for i in range(40)]
        assert all(p in task["labels"] if task["labels"] else 0 <= float(p) <= 5 and len(p) == 5 for _, p in rows[1:])
    # anyone can recompute the scores from the dev files
    rows = table(folder / "predictions" / f"{names[0]}.dev.tsv")
    assert rows[0] == ["index", "prediction", "gold"]
    as_read = (lambda v: v) if task["labels"] else float
    predicted, gold = ([as_read(row[i]) for row in rows[1:]] for i in (1, 2))
    a_set = {"gold": gold}
    for metric, value in finetune.scores_of(name, a_set, predicted).items():
        assert line["metrics"][metric] == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("version", ["1.1", "2.0"])
def test_squad_on_an_extract(version, options, tmp_path, capsys):
    write_squad(tmp_path / "data", version)
    name = f"SQuAD-{version}"
    run([*options, f"--task={name}", "--max_len=32"])
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    folder = tmp_path / "out" / name / "predictions"
    said = json.loads((folder / "predictions.json").read_text())
    dev = read(squad_questions(32, 1, version))
    assert list(said) == [q["id"] for q in dev]
    assert version == "2.0" or all(text and text == text.strip() for text in said.values())
    scores = np.array([finetune.squad_scores([g for g, _ in q["golds"]], said[q["id"]], version) for q in dev])
    assert [line["metrics"]["exact_match"], line["metrics"]["f1"]] == pytest.approx(100 * scores.mean(0), abs=1e-9)
    for q in dev:
        assert said[q["id"]] in q["context"]
    if version == "2.0":
        assert line["metrics"]["best_f1"] >= line["metrics"]["f1"] and "best_f1_threshold" in line["metrics"]
        assert line["baseline"]["f1"] == 50.0  # no answer is the most frequent one
        assert list(json.loads((folder / "null_odds.json").read_text())) == list(said)


def test_the_same_predictions_whatever_the_batch_and_the_padding(checkpoint, tokenizer, tmp_path):
    start = finetune.open_start({"init_from": str(checkpoint)})
    where, pad = (torch.device("cpu"), finetune.contextlib.nullcontext), tokenizer.pad_id
    rows = [(str(i), texts, label) for i, (texts, label) in enumerate(glue_rows("RTE", 20, 0))]
    sets = {"RTE": finetune.glue_set(rows, finetune.TASKS["RTE"], tokenizer, 64),
            "SQuAD-1.1": finetune.squad_set(read(squad_questions(12, 0, "1.1", 40)), tokenizer, 48, False)[0]}
    for name, a_set in sets.items():
        model = finetune.build(name, start["config"], 0.1, 0, start["weights"])
        expected = finetune.predict(model, a_set["examples"], pad, where)
        for batch_size in (1, 3, 7):
            found = finetune.predict(model, a_set["examples"], pad, where, batch_size)
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
            if name == "SQuAD-1.1":
                assert (found[:, 1:3] == expected[:, 1:3]).all()
        longer = finetune.collate(a_set["examples"], pad)
        padded = {k: torch.from_numpy(np.pad(v, ((0, 0), (0, 9)), constant_values=pad if k == "tokens" else 0)
                                      if k in ("tokens", "allowed") else v) for k, v in longer.items()}
        with torch.no_grad():
            logits = model(padded)
        if name == "SQuAD-1.1":
            logits = finetune.best_spans(logits, finetune.LONGEST_ANSWER)
        np.testing.assert_allclose(logits.numpy(), expected, rtol=1e-4, atol=1e-5)


def test_batches_are_every_example_once_of_similar_length_and_seeded():
    lengths = np.random.default_rng(0).integers(5, 100, 1003)
    found = finetune.batches(lengths, 8, 3, 1)
    assert sorted(np.concatenate(found).tolist()) == list(range(1003))
    assert np.mean([np.ptp(lengths[part]) for part in found]) < 5  # of a random batch: about 75
    assert [part.tolist() for part in found] == [part.tolist() for part in finetune.batches(lengths, 8, 3, 1)]
    assert [part.tolist() for part in found] != [part.tolist() for part in finetune.batches(lengths, 8, 3, 2)]
    assert np.abs(np.corrcoef([lengths[part].mean() for part in found], range(len(found)))[0, 1]) < 0.3


# --- it learns


@pytest.mark.parametrize("name, epochs, rate", [
    ("SST-2", 12, 3e-3), ("MRPC", 12, 3e-3), ("STS-B", 40, 5e-3), ("SQuAD-1.1", 40, 5e-3)])
def test_32_examples_are_overfitted(name, epochs, rate, options, tmp_path):
    if name.startswith("SQuAD"):
        write_squad(tmp_path / "data", "1.1", 32, dev_is_train=True)
    else:
        write_glue(tmp_path / "data", name, 32, dev_is_train=True)
    run([*options, f"--task={name}", f"--epochs={epochs}", f"--learning_rate={rate}", "--batch_size=8", "--dropout=0"])
    metrics = results(tmp_path, name)["metrics"]
    assert min(metrics.values()) > (95 if name.startswith("SQuAD") else 0.95), metrics
    model, tokenizer, task = finetune.load_finetuned(tmp_path / "out" / name / "best.pt")
    assert task == name and not model.training
    last = torch.load(tmp_path / "out" / name / "last.pt", weights_only=True)
    assert last["scores"] == results(tmp_path, name)["runs"][0]["last"]


def test_dropout_is_that_of_fine_tuning(checkpoint):
    start = finetune.open_start({"init_from": str(checkpoint)})
    assert start["config"].dropout == 0
    model = finetune.build("CoLA", start["config"], 0.1, 0, start["weights"]).train()
    assert model.encoder.dropout == 0.1
    batch = {"tokens": torch.arange(4, 12)[None]}
    assert not torch.equal(model(batch), model(batch))
    weights = torch.load(checkpoint, weights_only=True)["model"]
    assert torch.equal(model.encoder.layers[1].ffn_out.weight, weights["main.layers.1.ffn_out.weight"])


def test_scratch_has_the_shape_and_vocabulary_of_a_checkpoint(checkpoint, tmp_path, options, capsys):
    write_glue(tmp_path / "data", "SST-2")
    run([*options, "--task=SST-2", "--init_from=scratch", f"--tokenizer_from={checkpoint}"])
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["init_from"] == "scratch" and line["step"] == 0 and line["checksum"] is None
    start = finetune.open_start({"init_from": "scratch", "tokenizer_from": str(checkpoint), "preset": None})
    assert start["config"] == finetune.open_start({"init_from": str(checkpoint)})["config"] and start["weights"] is None
    larger = finetune.open_start({"init_from": "scratch", "tokenizer_from": str(checkpoint), "preset": "small"})
    assert larger["config"].width == 256 and larger["config"].vocab_size == start["config"].vocab_size


def test_a_run_that_learns_nothing_is_called_so(options, tmp_path, capsys):
    write_glue(tmp_path / "data", "SST-2")
    run([*options, "--task=SST-2", "--learning_rate=0.0"])
    out = capsys.readouterr().out
    assert out.count("warning: SST-2, seed 0 ends at the baseline") == 1
    assert "accuracy 0.5000 (0.5000)" in out


# --- settings


def test_tables_of_the_design_are_the_defaults():
    asked = finetune.settle([])
    small, large = (finetune.Config.from_preset(p, vocab_size=100) for p in ("base", "large++"))
    rte = finetune.settings_of("RTE", asked, small, "float32")
    assert [rte[k] for k in ("batch_size", "learning_rate", "epochs", "warmup_fraction")] == [16, 2e-5, 10, 0.1]
    assert rte["max_len"] == 512
    rte = finetune.settings_of("RTE", asked, large, "float32")
    assert [rte[k] for k in ("batch_size", "learning_rate", "epochs", "warmup_fraction")] == [32, 2e-5, 5, 1 / 16]
    assert finetune.settings_of("SQuAD-2.0", asked, small, "float32")["max_len"] == 384
    mine = finetune.settings_of("QNLI", finetune.settle(["--epochs=1", "--learning_rate=1e-3"]), small, "float32")
    assert [mine[k] for k in ("epochs", "learning_rate", "batch_size")] == [1, 1e-3, 32]


def test_every_constant_has_a_reason_and_a_check():
    options = train.read_constants(finetune.__file__, vars(finetune), finetune.ALLOWED)
    assert set(options) == set(finetune.ALLOWED)
    assert all(len(reason) > 5 for _, _, reason in options.values())


def test_an_edited_constant_goes_before_the_table_and_behind_the_command_line(monkeypatch):
    config = finetune.Config.from_preset("base", vocab_size=100)
    monkeypatch.setattr(finetune, "epochs", 7)
    assert finetune.settings_of("CoLA", finetune.settle([]), config, "float32")["epochs"] == 7
    assert finetune.settings_of("CoLA", finetune.settle(["--epochs=2"]), config, "float32")["epochs"] == 2
    monkeypatch.setattr(finetune, "epochs", "many")
    with pytest.raises(data.InputError, match="--epochs has to be a whole number"):
        finetune.settle([])


# --- seeds


def test_an_interrupted_run_keeps_its_finished_seeds(options, tmp_path, monkeypatch, capsys):
    write_glue(tmp_path / "data", "SST-2")
    options = [*options, "--task=SST-2", "--seeds=3"]
    run([*options, f"--out_dir={tmp_path}/straight"])
    original, ran = finetune.fine_tune, []

    def interrupted(*arguments):
        ran.append(arguments[5])
        if len(ran) == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(finetune, "fine_tune", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(options)
    assert results(tmp_path, "SST-2")["seeds"] == 1
    capsys.readouterr()
    run(options)
    assert ran == [0, 1, 1, 2] and "seed 0  finished before" in capsys.readouterr().out
    a, b = results(tmp_path, "SST-2"), results(tmp_path, "SST-2", "straight")
    for key in ("metrics", "minimum", "maximum", "baseline", "seeds", "settings", "checksum"):
        assert a[key] == b[key]
    assert [r["metrics"] for r in a["runs"]] == [r["metrics"] for r in b["runs"]]
    values = [r["metrics"]["accuracy"] for r in a["runs"]]
    assert a["metrics"]["accuracy"] == sorted(values)[1] and a["maximum"]["accuracy"] == max(values)
    for file in (tmp_path / "out/SST-2/predictions").iterdir():
        assert file.read_bytes() == (tmp_path / "straight/SST-2/predictions" / file.name).read_bytes()
    best = torch.load(tmp_path / "out/SST-2/best.pt", weights_only=True)
    assert best["scores"]["accuracy"] == max(values) and best["seed"] == a["runs"][int(np.argmax(values))]["seed"]
    run(options)
    assert len(ran) == 4  # nothing is run again


def test_results_of_other_settings_are_never_mixed(options, tmp_path):
    write_glue(tmp_path / "data", "SST-2")
    run([*options, "--task=SST-2"])
    for change in ("--epochs=2", "--learning_rate=0.1", "--max_len=32", "--dropout=0", "--init_from=scratch"):
        with pytest.raises(data.InputError, match="holds results of other settings"):
            run([*options, "--task=SST-2", f"--tokenizer_from={options[0][12:]}", change])
    run([*options, "--task=SST-2", "--epochs=2", "--overwrite=True", "--seed=4"])
    assert [r["seed"] for r in results(tmp_path, "SST-2")["runs"]] == [4]
    write_glue(tmp_path / "data", "SST-2", 39)
    with pytest.raises(data.InputError, match="other settings .data="):
        run([*options, "--task=SST-2", "--epochs=2"])


def test_all_of_glue_that_is_there(options, tmp_path, capsys):
    for name in ("RTE", "STS-B", "WNLI"):
        write_glue(tmp_path / "data", name)
    run([*options, "--task=GLUE"])
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    rte, sts = results(tmp_path, "RTE")["metrics"], results(tmp_path, "STS-B")["metrics"]
    expected = (rte["accuracy"] + (sts["pearson"] + sts["spearman"]) / 2) / 2
    assert line["task"] == "GLUE" and line["metrics"]["average"] == pytest.approx(expected)
    assert set(line["metrics"]) == {"average", "RTE", "STS-B"}  # WNLI is not one of the eight
    assert results(tmp_path, "GLUE") == line


# --- several processes, exit status


def test_two_processes_equal_one(options, tmp_path):
    write_glue(tmp_path / "data", "STS-B", 41)  # the last batch has one example: the second process has none
    options = [*options, "--task=STS-B", "--dropout=0", "--epochs=3", "--batch_size=8", "--learning_rate=1e-3",
               "--dtype=float32"]
    run([*options, f"--out_dir={tmp_path}/one"])
    first, second = stress.start(*options, processes=2, program=FINETUNE)
    (said, err), _ = first.communicate(), second.communicate()
    assert first.returncode == second.returncode == 0, err
    one, two = results(tmp_path, "STS-B", "one"), results(tmp_path, "STS-B")
    assert json.loads(said.splitlines()[-1])["metrics"] == two["metrics"]
    assert two["settings"] == one["settings"]
    for a, b in zip(*(table(tmp_path / out / "STS-B/predictions/STS-B.dev.tsv")[1:] for out in ("one", "out"))):
        assert float(a[1]) == pytest.approx(float(b[1]), abs=1e-4) and a[2] == b[2]


def test_exit_status_and_standard_error(options):
    (process,) = stress.start(*options, "--task=COLX", program=FINETUNE)
    out, err = process.communicate()
    assert process.returncode == 2 and out == ""
    assert err.startswith("finetune.py: --task has to be one of CoLA") and err.count("\n") == 1


# --- bad input


@pytest.mark.parametrize("argument, message", [
    ("--task=MRCP", "--task has to be one of"), ("--max_len=65", "max_len=65 is more than the model's 64 positions"),
    ("--epoch=3", 'no option --epoch, did you mean "epochs"'), ("--epochs=0", "--epochs has to be a whole number"),
    ("--init_from=/nowhere/x.pt", "does not exist"), ("extra", "unexpected 'extra'"), ("--device=mps", "not available"),
    ("--init_from=scratch --tokenizer_from=/nowhere", "is no prepared corpus"),
])
def test_bad_options(options, tmp_path, argument, message):
    write_glue(tmp_path / "data", "CoLA", 4)
    with pytest.raises(data.InputError, match=message) as error:
        run([*options, *argument.split()])
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("change, message", [
    (lambda c: c.pop("tokenizer"), "has no tokenizer"), (lambda c: c.update(tokenizer=None), "has no tokenizer"),
    (lambda c: c["tokenizer"].update(ranks="".join(c["tokenizer"]["ranks"].splitlines(True)[:300])), "do not belong"),
    (lambda c: c["config"].update(colour="red"), "does not fit this"),
    (lambda c: c["model"].popitem(), "does not fit this"),
])
def test_checkpoints_that_cannot_be_used(options, checkpoint, tmp_path, change, message):
    write_glue(tmp_path / "data", "CoLA", 4)
    content = torch.load(checkpoint, weights_only=True)
    change(content)
    torch.save(content, tmp_path / "bad.pt")
    with pytest.raises(data.InputError, match=message):
        run([*options, f"--init_from={tmp_path}/bad.pt"])


@pytest.mark.parametrize("name", [*HEADERS, "SQuAD-1.1", "SQuAD-2.0", "GLUE"])
def test_a_missing_task_says_how_to_get_it(options, name, tmp_path):
    with pytest.raises(data.InputError) as error:
        run([*options, f"--task={name}"])
    first, *commands = str(error.value).split("\n")
    assert "https://" in first and len(commands) == 2 and any("curl" in c and "https://" in c for c in commands)
    for command in commands:
        assert subprocess.run(["bash", "-nc", command]).returncode == 0


def test_the_lines_for_mrpc_split_its_file(tmp_path):
    place = tmp_path / "MRPC"
    place.mkdir()
    header = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n"
    (place / "msr_paraphrase_train.txt").write_text(header + "1\t10\t11\ta\tb\r\n0\t20\t21\tc\td\r\n", newline="")
    (place / "msr_paraphrase_test.txt").write_text(header + "1\t30\t31\te\tf\r\n", newline="")
    (place / "mrpc_dev_ids.tsv").write_text("20\t21\n")
    command = finetune.how_to_get("MRPC", tmp_path).split("\n")[-1]
    subprocess.run(command, shell=True, check=True, cwd=place)
    for split, expected in {"train": ["a", "b"], "dev": ["c", "d"], "test": ["e", "f"]}.items():
        rows, _ = finetune.read_glue(place / f"{split}.tsv", finetune.TASKS["MRPC"], True)
        assert [texts for _, texts, _ in rows] == [expected]


def test_a_missing_file_of_a_later_task_is_known_before_the_first_one_runs(options, tmp_path):
    for name in ("RTE", "STS-B"):
        write_glue(tmp_path / "data", name, 8)
    (tmp_path / "data/STS-B/dev.tsv").unlink()
    with pytest.raises(data.InputError, match="STS-B/dev.tsv is not there"):
        run([*options, "--task=GLUE"])
    assert not (tmp_path / "out").exists()


def test_a_missing_test_file_only_means_no_submission(options, tmp_path, capsys):
    write_glue(tmp_path / "data", "RTE", 8)
    (tmp_path / "data/RTE/test.tsv").unlink()
    run([*options, "--task=RTE"])
    assert "no predictions for the leaderboard" in capsys.readouterr().out
    assert [f.name for f in (tmp_path / "out/RTE/predictions").iterdir()] == ["RTE.dev.tsv"]


def test_a_loss_that_is_not_finite_is_said(options, tmp_path, monkeypatch):
    write_glue(tmp_path / "data", "RTE", 8)
    monkeypatch.setattr(finetune, "losses_of", lambda logits, batch: logits[:, 0] * math.nan)
    with pytest.raises(data.InputError, match="the loss is nan at step 1: lower the --learning_rate"):
        run([*options, "--task=RTE"])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_autocast_types(options, tmp_path, dtype):
    write_glue(tmp_path / "data", "RTE")
    write_squad(tmp_path / "data", "2.0", 8)
    for name in ("RTE", "SQuAD-2.0"):
        run([*options, f"--task={name}", f"--dtype={dtype}"])
        assert results(tmp_path, name)["settings"]["dtype"] == dtype
