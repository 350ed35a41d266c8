"""finetune.py: metrics, readers, SQuAD's windows and decoding, predictions, runs, interruptions, bad input.

Every file is made here, in the official layouts. Every run is on the CPU, on a model of 2 layers.
"""

import json
import math
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import finetune
import train
from runs import finish, start, wait_for

PATTERN = r" ?[\p{L}\p{M}]+| ?\p{N}{1,3}| ?[^\s\p{L}\p{M}\p{N}]+|\s+"
WORDS = ("river stone garden window letter music winter silver bridge forest candle market paper engine "
         "harbour valley teacher doctor painter farmer sings walks writes builds opens finds").split()


# --- what the tests run on


@pytest.fixture(scope="session")
def tokenizer():
    text = " ".join(WORDS * 3) + ' good bad yes no answer the is "of" 0123456789 é → naïve İstanbul'
    words = Counter(data.regex.findall(PATTERN, data.lower(text)))
    return data.Tokenizer(data.train_bpe(words, 380), PATTERN, True)


@pytest.fixture(scope="session")
def checkpoint(tokenizer, tmp_path_factory):
    """An untrained checkpoint in train.py's format."""
    torch.manual_seed(100)  # no run's seed: a head's seed must not give these weights
    sizes = dict(width=32, heads=2, ffn_width=64, max_len=64, vocab_size=tokenizer.vocab_size)
    model = train.COCOLM(train.Config.from_preset("tiny", **sizes))
    path = tmp_path_factory.mktemp("checkpoint") / "ckpt.pt"
    torch.save({"model": model.state_dict(), "step": 7, "config": vars(model.config),
                "tokenizer": tokenizer.state()}, path)
    return path


@pytest.fixture
def options(checkpoint, tmp_path):
    return [f"--init_from={checkpoint}", f"--data_dir={tmp_path}/data", f"--out_dir={tmp_path}/out",
            "--epochs=1", "--dtype=float32", "--device=cpu"]


HEADERS = {  # of train and dev, and of test, as the official files have them
    "CoLA": (None, "index sentence"), "SST-2": ("sentence label", "index sentence"),
    "MRPC": ("Quality,#1 ID,#2 ID,#1 String,#2 String", "index,#1 ID,#2 ID,#1 String,#2 String"),
    "STS-B": ("index genre filename year old_index source1 source2 sentence1 sentence2 score",
              "index genre filename year old_index source1 source2 sentence1 sentence2"),
    "QQP": ("id qid1 qid2 question1 question2 is_duplicate", "id question1 question2"),
    "MNLI": ("index promptID pairID genre sentence1_parse sentence1 sentence2 label1 gold_label",
             "index promptID pairID genre sentence1_parse sentence1 sentence2"),
    "QNLI": ("index question sentence label", "index question sentence"),
    "RTE": ("index sentence1 sentence2 label", "index sentence1 sentence2"),
    "WNLI": ("index sentence1 sentence2 label", "index sentence1 sentence2"),
}


def glue_rows(name, count, seed):
    """[(texts, label)] that can be learned: which of some words is in the first text, or how often."""
    draw, row, rows = random.Random(f"{name}{seed}"), finetune.TASKS[name], []
    for i in range(count):
        marks, label = ["good"] * (i % 6), f"{i % 6:.3f}"
        if row["labels"]:
            k = i % len(row["labels"])
            marks, label = [["good", "bad", "answer"][k]], row["labels"][k]
        first, second = [*draw.sample(WORDS, 5), *marks], draw.sample(WORDS, 4)
        draw.shuffle(first)
        rows.append(([" ".join(first), " ".join(second)][: len(row["texts"])], label))
    return rows


def write_glue(folder, name, count=40, dev_is_train=False):
    """The official files of a task, with its headers."""
    row, place = finetune.TASKS[name], Path(folder, name)
    place.mkdir(parents=True, exist_ok=True)
    dev = [f"{split}{suffix}" for suffix in row.get("sets", {name: ""}).values() for split in ("dev", "test")]
    for split in ["train", *dev]:
        header = HEADERS[name][split.startswith("test")]
        columns = header.split("," if "," in header else " ") if header else row["no_header"]
        lines = ["\t".join(columns)] if header else []
        for i, (texts, label) in enumerate(glue_rows(name, count, "train" if dev_is_train else split)):
            value = {"index": str(i), "id": str(i), row["label"]: label, **dict(zip(row["texts"], texts))}
            lines.append("\t".join(value.get(column, "x") for column in columns))
        (place / f"{split}.tsv").write_text("\n".join(lines))


def paragraphs_of(count, seed, version, fillers=12):
    """Of a SQuAD file: the answer is the word after "answer is"; in 2.0 every other question has none."""
    draw, paragraphs = random.Random(seed), []
    for i in range(count):
        word, none = draw.choice(WORDS[:16]).capitalize(), version == "2.0" and i % 2
        before, after = (" ".join(draw.choices(WORDS[16:], k=draw.randint(2, fillers))) for _ in range(2))
        context = f"{before.capitalize()} é→ the {'no' if none else 'answer is'} {word}. {after}"
        golds = [] if none else [(word, context.index(word))] * (1 + i % 2)
        paragraphs.append(paragraph(context, golds, f"q{i}", "what is the answer ?"))
    return paragraphs


def paragraph(context, golds, name="q", question="?"):
    answers = [{"text": text, "answer_start": start} for text, start in golds]
    return {"context": context, "qas": [{"id": name, "question": question, "answers": answers}]}


def write_squad(folder, version, count=32, dev_is_train=False):
    folder.mkdir(parents=True, exist_ok=True)
    for split, seed in (("train", 0), ("dev", 0 if dev_is_train else 1)):
        content = {"data": [{"title": "t", "paragraphs": paragraphs_of(count, seed, version)}]}
        (folder / f"{split}-v{version}.json").write_text(json.dumps(content))


def row_of(name):
    return {"name": name, **finetune.TASKS[name]}


def squad_set(tmp_path, tokenizer, max_len, paragraphs, split="dev", version="2.0"):
    (tmp_path / "x.json").write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    return finetune.SquadSet(tmp_path / "x.json", row_of(f"SQuAD-{version}"), f"SQuAD-{version}", split,
                             tokenizer, max_len)


def results(tmp_path, name, out="out"):
    return json.loads((tmp_path / out / name / "results.json").read_text())


def table(path):
    return [line.split("\t") for line in path.read_text().splitlines()]


# --- metrics and readers


def test_metrics_against_obvious_versions():
    draw = np.random.default_rng(0)
    for _ in range(20):
        gold, predicted = draw.integers(0, 2, (2, 50))
        tp, tn = (gold & predicted).sum(), (1 - gold & 1 - predicted).sum()
        fp, fn = predicted.sum() - tp, gold.sum() - tp
        mcc = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
        assert finetune.METRICS["accuracy"](gold, predicted) == pytest.approx((tp + tn) / 50, abs=1e-12)
        assert finetune.METRICS["f1"](gold, predicted) == pytest.approx(2 * tp / (2 * tp + fp + fn), abs=1e-9)
        assert finetune.METRICS["matthews"](gold, predicted) == pytest.approx(mcc, abs=1e-9)
        x, y = draw.normal(size=(2, 30)).round(1)  # with ties
        rank = [[sum(a > b for b in v) + sum(a == b for b in v) / 2 for a in v] for v in (x, y)]
        assert finetune.METRICS["pearson"](x, y) == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-9)
        assert finetune.METRICS["spearman"](x, y) == pytest.approx(np.corrcoef(*rank)[0, 1], abs=1e-9)
        gold, predicted = draw.integers(0, 7, (2, 12))  # some classes are on one side alone
        each, pairs = [], list(zip(gold.tolist(), predicted.tolist()))
        for k in {label for pair in pairs for label in pair}:
            wrong = sum((a == k) != (b == k) for a, b in pairs)
            each.append(2 * pairs.count((k, k)) / (2 * pairs.count((k, k)) + wrong))
        assert finetune.METRICS["macro_f1"](gold, predicted) == pytest.approx(np.mean(each), abs=1e-9)
    zeros, ones, both = np.array([[0, 0], [1, 1], [0, 1]])
    assert finetune.METRICS["f1"](zeros, zeros) == finetune.METRICS["f1"](ones, zeros) == 0.0
    for metric in ("matthews", "pearson", "spearman"):  # a constant correlates with nothing
        for gold, predicted in ((ones, both), (ones, ones), (both * 0.1, ones * 0.1)):
            assert finetune.METRICS[metric](gold, predicted) == 0.0


def test_correlations_do_not_depend_on_the_scale():
    x, y = np.random.default_rng(0).normal(size=(2, 30)).round(1)
    for scale in (1e300, 1e-310):  # squares of which are infinite, or 0
        assert finetune.pearson(x * scale, y) == pytest.approx(finetune.pearson(x, y), abs=1e-9)
        assert finetune.spearman(x, y * scale) == finetune.spearman(x, y)


def test_many_classes_are_not_searched(tokenizer, tmp_path):
    class Classes(list):
        __contains__ = index = None  # a search through all of them, for each row

    labels = Classes(f"c{number}" for number in range(1000))
    (tmp_path / "x.tsv").write_text("text\tlabel\n" + "".join(f"a\t{label}\n" for label in reversed(labels)))
    task = {"name": "mine", "texts": ["text"], "labels": labels, **finetune.OWN}
    a_set = finetune.GlueSet(tmp_path / "x.tsv", task, "mine", "train", tokenizer, 64)
    assert a_set.gold.tolist() == [*reversed(range(1000))]


@pytest.mark.parametrize("golds, predicted, version, expected", [
    (["Denver Broncos"], "the Denver  Broncos!", "1.1", (1, 1)), (["2,000"], "2000", "1.1", (1, 1)),
    (["anthem"], "them", "1.1", (0, 0)), (["b b c"], "b c c", "1.1", (0, 2 / 3)),
    (["x y", "y z w"], "y z", "1.1", (0, 0.8)), (["the"], "a", "1.1", (1, 0)), (["the"], "a", "2.0", (1, 1)),
    ([], "", "2.0", (1, 1)), ([], "x", "2.0", (0, 0)), (["x"], "", "2.0", (0, 0))])
def test_squad_scores(golds, predicted, version, expected):
    assert finetune.squad_scores(golds, predicted, version) == pytest.approx(expected, abs=1e-12)


def test_best_threshold_is_that_of_trying_all():
    draw = np.random.default_rng(0)
    for _ in range(50):
        scores, has, odds = draw.random(12), draw.random(12) < 0.6, draw.integers(-3, 4, 12).astype(float)
        scores *= has
        scores[draw.random(12) < 0.1 * ~has] = 1.0  # the answer given is empty
        totals = [np.where(odds <= t, scores, ~has).mean() for t in [*odds, -99]]
        value, threshold = finetune.best_threshold(scores, has, odds)
        assert value == pytest.approx(max(totals), abs=1e-12)
        assert np.where(odds <= threshold, scores, ~has).mean() == pytest.approx(value, abs=1e-12)


def test_quirks_of_files(tmp_path, capsys):
    def read(name, text):
        (tmp_path / "x.tsv").write_bytes(text.encode())
        return finetune.read_glue(tmp_path / "x.tsv", row_of(name), "train")

    # neither quotation marks nor other line separators mean anything
    rows = read("CoLA", 'gj04\t1\t\t"What, he said.\ngj04\t0\t*\tA\u2028b \x85c"\n\n')
    assert rows == [("0", ['"What, he said.'], "1"), ("1", ["A\u2028b \x85c\""], "0")]
    rows = read("MRPC", '\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n1\t7\t8\t" a\tb "" c\r\n')
    assert rows == [("0", ['" a', 'b "" c'], "1")]
    rows = read("QQP", "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
                "5\t1\t2\ta\tb\t1\n6\t1\t2\tcut\n off\t0\n7\t1\t2\t\tb\t0\n")
    assert rows == [("5", ["a", "b"], "1"), ("7", ["", "b"], "0")]
    assert "2 broken rows were left out" in capsys.readouterr().out
    (tmp_path / "x.jsonl").write_text('{"text": "a", "label": true, "n": [1]}')
    assert list(finetune.read_fields(tmp_path / "x.jsonl"))[1] == (1, ["a", "true", [1]])


# --- SQuAD: offsets, windows, decoding


def test_offsets_are_characters_of_the_original(tokenizer):
    for text in ("The ANSWER is İstanbul, naïve → é.", "  a\n\tB ", "", "日本語 River", "Ⱥ River"):
        ids, spans = tokenizer.offsets(text)
        assert spans.shape == (len(ids), 2)
        covered = np.zeros(len(text), int)
        for (begin, end), token in zip(spans, ids):
            covered[begin:end] += 1
            piece = tokenizer.decode([token])
            if "\ufffd" not in piece:
                assert data.lower(text[begin:end]) == piece
        assert (covered > 0).all() and (np.diff(spans, axis=0) >= 0).all()


@pytest.mark.parametrize("max_len", [64, 40, 24, 16])
def test_windows_hold_question_and_context_and_the_gold_spans_come_back(tokenizer, max_len, tmp_path):
    paragraphs = paragraphs_of(10, 5, "1.1", 5) + paragraphs_of(10, 60, "1.1", 60)
    paragraphs += [paragraph("İn→ rivers, Stone", [("iver", 5)]), paragraph("a stone ", [("stone ", 2)]),
                   paragraph("caf\u00e9\u2192", [("\u00e9", 3)]),
                   paragraph("the river", [("river", 4)], question=" ".join(WORDS * 4))]
    a_set, seen = squad_set(tmp_path, tokenizer, max_len, paragraphs, "train", "1.1"), set()
    for example in a_set.examples:
        question, allowed = a_set.questions[example["question"]], example["allowed"]
        text, head = (tokenizer.encode(question[key]) for key in ("context", "question"))
        head = [tokenizer.cls_id, *head[: max_len // 2 - 2], tokenizer.sep_id, tokenizer.sep_id]
        part = text[example["shift"] + len(head) :][: max_len - len(head) - 1]
        assert example["tokens"].tolist() == [*head, *part, tokenizer.sep_id]
        assert len(allowed) == len(example["starts"]) == len(example["tokens"])
        assert allowed[0] and not allowed[1 : len(head)].any() and not allowed[-1]
        assert allowed[example["span"]].all() and not (example["starts"] & ~allowed).any()
        if example["span"][0]:
            answer = a_set.answer(question, *(example["span"] + example["shift"]))
            assert question["golds"][0][0].strip() in answer
            if question["id"] != "q":  # the answer is whole tokens; it keeps its capital letter
                assert answer == question["golds"][0][0]
            seen.add(example["question"])
    assert seen == set(range(len(paragraphs)))


def test_misplaced_answers_are_left_out_of_training(tokenizer, tmp_path, capsys):
    golds = [[("river", 4)], [("river", 5)], [("stone", 4), ("stone", 18)], [("river", -19)],
             [("river", None)], [("", 0)], [("river", 4.0)], [("river", 4)], [("river", 4)]]
    paragraphs = [paragraph("the river and the stone", g, str(i)) for i, g in enumerate(golds)]
    paragraphs[7]["qas"][0]["is_impossible"], paragraphs[8]["qas"][0]["is_impossible"] = True, "true"
    kept = squad_set(tmp_path, tokenizer, 64, paragraphs, "train")
    spans = {kept.questions[example["question"]]["id"]: any(example["span"]) for example in kept.examples}
    assert spans == {"0": True, "2": True, "6": True, "7": False, "8": False}
    assert kept.questions[-1]["golds"] == []
    assert "4 questions were left out" in capsys.readouterr().out
    assert len(squad_set(tmp_path, tokenizer, 64, paragraphs, "dev")) == 9


def slow_windows(length, room, stride):
    """[(begin, length)] and the window of each token's maximum context, as the official script has them."""
    spans, owner = [(0, min(room, length))], []
    while sum(spans[-1]) < length:
        begin = spans[-1][0] + stride
        spans.append((begin, min(room, length - begin)))
    for position in range(length):
        scores = [min(position - begin, begin + size - 1 - position) + 0.01 * size
                  if begin <= position < begin + size else -math.inf for begin, size in spans]
        owner.append(scores.index(max(scores)))
    return spans, owner


def test_windows_equal_the_official_script():
    draw = random.Random(0)
    for case in range(100):  # also where the last window is so short that its length counts
        room = draw.randint(2, 60) if case % 2 else draw.randint(260, 380)
        stride = draw.randint(1, room // 2) if case % 2 else draw.randint(110, room // 2)
        length = draw.randint(0, 3 * room)
        begin, end, owner = finetune.windows(length, room, stride)
        doc_spans, slow_owner = slow_windows(length, room, stride)
        assert list(zip(begin, end - begin)) == doc_spans and owner.tolist() == slow_owner


def slow_answer(context, spans, room, stride, logits, n_best, longest):
    """The official script in plain Python. logits: of each window, [start, end] of [CLS] and its tokens."""
    doc_spans, owner = slow_windows(len(spans), room, stride)
    assert len(doc_spans) == len(logits)
    candidates, null = [], math.inf
    for index, (window, (begin, length)) in enumerate(zip(logits, doc_spans)):
        null = min(null, window[0][0] + window[0][1])
        order = [sorted(range(len(window)), key=lambda i: -window[i][side])[:n_best] for side in (0, 1)]
        for i in order[0]:
            for j in order[1]:
                if 1 <= i <= j < i + longest and owner[begin + i - 1] == index:
                    candidates.append((window[i][0] + window[j][1], begin + i - 1, begin + j - 1))
    candidates = [c for c in candidates if c[0] > -math.inf]
    if not candidates:
        return "", 1e9
    score, first, last = max(candidates, key=lambda c: c[0])
    return context[spans[first][0] : spans[last][1]].strip(), null - score


def test_decoding_equals_the_official_script(tokenizer, tmp_path, monkeypatch):
    draw, several = np.random.default_rng(0), 0
    for case in range(60):
        n_best, longest, max_len = (int(draw.choice(c)) for c in ([2, 5, 20], [1, 4, 30], range(14, 40)))
        monkeypatch.setattr(finetune, "N_BEST", n_best)
        monkeypatch.setattr(finetune, "LONGEST_ANSWER", longest)
        contexts = [" ".join(draw.choice([*WORDS, "  "], draw.integers(0, 60))) for _ in range(3)]
        a_set = squad_set(tmp_path, tokenizer, max_len, [paragraph(c, []) for c in contexts])
        padded = finetune.collate(a_set.examples, tokenizer.pad_id)
        logits = torch.from_numpy(draw.normal(size=(*padded["tokens"].shape, 2)).round(1))  # with ties
        logits[~torch.from_numpy(padded["allowed"])] = -math.inf
        texts, odds = a_set.decode(finetune.best_spans(logits, torch.from_numpy(padded["starts"])).numpy())
        for number, context in enumerate(contexts):
            rows = [i for i, e in enumerate(a_set.examples) if e["question"] == number]
            head = -a_set.examples[rows[0]]["shift"]
            room = max_len - head - 1
            stride = min(128, max(1, 128 * max_len // 384), max(1, room // 2))
            spans = tokenizer.offsets(context)[1].tolist()
            ends = {i: len(a_set.examples[i]["tokens"]) - 1 for i in rows}
            windows = [[logits[i, 0].tolist(), *logits[i, head : ends[i]].tolist()] for i in rows]
            expected, expected_odds = slow_answer(context, spans, room, stride, windows, n_best, longest)
            assert texts[number] == expected and odds[number] == pytest.approx(expected_odds, abs=1e-9)
            several += len(rows) > 1
    assert several > 100


# --- predictions


def test_submission_files_are_byte_exact(tokenizer, tmp_path):
    def files(name, split, text, predicted):
        (tmp_path / "x.tsv").write_text(text)
        a_set = finetune.GlueSet(tmp_path / "x.tsv", row_of(name), name, split, tokenizer, 64)
        return a_set.files((np.array(predicted), np.full(len(predicted), 0.75)))

    assert files("RTE", "test", "index\tsentence1\tsentence2\n4\ta\tb\n7\tc\td\n", [0, 1]) == {
        "RTE.tsv": "index\tprediction\n4\tentailment\n7\tnot_entailment\n"}
    assert files("RTE", "dev", "sentence1\tsentence2\tlabel\na\tb\tentailment\n", [1]) == {
        "RTE.dev.tsv": "index\tprediction\tprobability\tgold\n0\tnot_entailment\t0.750000\tentailment\n"}
    text = "sentence1\tsentence2\n" + "a\tb\n" * 4
    assert files("STS-B", "test", text, [-0.2, 5.3, 2.00049, 3.1415926]) == {
        "STS-B.tsv": "index\tprediction\n0\t0.000\n1\t5.000\n2\t2.000\n3\t3.142\n"}
    assert files("STS-B", "dev", "sentence1\tsentence2\tscore\na\tb\t2.75\n", [1 / 3]) == {
        "STS-B.dev.tsv": "index\tprediction\tgold\n0\t0.3333333333333333\t2.75\n"}
    paragraphs = [paragraph("Naïve", [("Naïve", 0)], "a"), paragraph("x", [], "b")]
    a_set = squad_set(tmp_path, tokenizer, 64, paragraphs)
    assert a_set.files((["Na\nï", "x"], np.array([-1.5, 1.0]))) == {
        "predictions.json": '{\n "a": "Na\\n\\u00ef",\n "b": "x"\n}\n',
        "null_odds.json": '{\n "a": -1.5,\n "b": 1.0\n}\n',
        "submission.json": '{\n "a": "Na\\n\\u00ef",\n "b": ""\n}\n',
        "SQuAD-2.0.dev.tsv": 'index\tprediction\tgold\na\tNa ï\t["Na\\u00efve"]\nb\t\t[]\n'}


@pytest.mark.parametrize("name", list(HEADERS))
def test_each_glue_task_on_an_extract(name, options, tmp_path, capsys):
    write_glue(tmp_path / "data", name)
    rows = finetune.read_glue(tmp_path / "data" / name / "train.tsv", row_of(name), "train")
    assert [(texts, label) for _, texts, label in rows] == glue_rows(name, 40, "train")
    finetune.main([*options, f"--task={name}"])
    line, kept = json.loads(capsys.readouterr().out.splitlines()[-1]), results(tmp_path, name)
    assert {**line, "settings": kept["settings"], "runs": kept["runs"]} == kept
    assert line["task"] == name and line["seeds"] == 1 and line["examples"] == 40 and line["step"] == 7
    row, folder = finetune.TASKS[name], tmp_path / "out" / name
    extra = {"accuracy_mismatched"} if name == "MNLI" else set()
    assert set(line["metrics"]) == set(line["baseline"]) == {*row["metrics"], *extra}
    names = {"MNLI": ["MNLI-m", "MNLI-mm"]}.get(name, [name])
    files = {f"{n}{end}" for n in names for end in (".tsv", ".dev.tsv")}
    written = {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file() and f.name != ".lock"}
    assert written == {"results.json", "best.pt", "seed0/result.json", "seed0/best.pt"} | {
        f"{place}predictions/{file}" for place in ("", "seed0/") for file in files}
    for n in names:
        rows = table(folder / f"predictions/{n}.tsv")
        assert [index for index, _ in rows] == ["index", *map(str, range(40))]
        # anyone can recompute the scores from the dev files
        rows = table(folder / f"predictions/{n}.dev.tsv")
        number = row["labels"].index if row["labels"] else float
        predicted, gold = (np.array([number(r[i]) for r in rows[1:]]) for i in (1, -1))
        for metric in row["metrics"]:
            value = line["metrics"][f"{metric}_mismatched" if n == "MNLI-mm" else metric]
            assert value == pytest.approx(finetune.METRICS[metric](gold, predicted), abs=1e-12)


@pytest.mark.parametrize("version, dtype", [("1.1", "float16"), ("2.0", "bfloat16")])
def test_squad_on_an_extract(version, dtype, options, tmp_path, capsys):
    write_squad(tmp_path / "data", version)
    name = f"SQuAD-{version}"
    finetune.main([*options, f"--task={name}", "--max_len=32", f"--dtype={dtype}"])
    metrics = json.loads(capsys.readouterr().out.splitlines()[-1])["metrics"]
    assert results(tmp_path, name)["settings"]["dtype"] == dtype
    folder = tmp_path / "out" / name / "predictions"
    read = {f.stem: json.loads(f.read_text()) for f in folder.glob("*.json")}
    paragraphs = paragraphs_of(32, 1, version)
    ids = [p["qas"][0]["id"] for p in paragraphs]
    golds = [[answer["text"] for answer in p["qas"][0]["answers"]] for p in paragraphs]
    assert all(list(content) == ids for content in read.values())
    best = list(read["predictions"].values())
    assert all(text and text in p["context"] for text, p in zip(best, paragraphs))  # never blanked
    given = list(read["submission" if version == "2.0" else "predictions"].values())
    scores = np.array([finetune.squad_scores(g, text, version) for g, text in zip(golds, given)])
    assert [metrics["exact_match"], metrics["f1"]] == pytest.approx(100 * scores.mean(0), abs=1e-9)
    if version == "2.0":
        odds = np.array(list(read["null_odds"].values()))
        assert given == ["" if o > 0 else text for o, text in zip(odds, best)]
        f1 = np.array([finetune.squad_scores(g, text, version)[1] for g, text in zip(golds, best)])
        value, threshold = finetune.best_threshold(f1, np.array([bool(g) for g in golds]), odds)
        assert 100 * value == pytest.approx(metrics["best_f1"]) and threshold == metrics["best_f1_threshold"]


@pytest.mark.parametrize("name", ["RTE", "SQuAD-1.1"])
def test_the_same_predictions_whatever_the_batch_and_the_padding(name, checkpoint, tokenizer, tmp_path):
    write_glue(tmp_path, "RTE", 20)
    a_set = (squad_set(tmp_path, tokenizer, 48, paragraphs_of(12, 0, "1.1", 40)) if name == "SQuAD-1.1" else
             finetune.GlueSet(tmp_path / "RTE/train.tsv", row_of("RTE"), "RTE", "train", tokenizer, 64))
    a_set.decode = lambda outputs: outputs
    torch.manual_seed(0)
    model = finetune.Model(row_of(name), train.load_checkpoint(checkpoint)[0].config, 0.1)
    expected = finetune.predict_set(model, a_set, torch.autocast("cpu", enabled=False), 1)  # without padding
    assert len(expected) == len(a_set.examples)
    for batch_size in (3, 7, 64):
        found = finetune.predict_set(model, a_set, torch.autocast("cpu", enabled=False), batch_size)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_batches_are_every_example_once_of_similar_length_and_seeded():
    lengths = np.random.default_rng(0).integers(5, 100, 1003)
    both, again, other = (list(finetune.batches(lengths, 8, epochs, seed))
                          for epochs, seed in ((2, 3), (1, 3), (1, 4)))
    found, second = both[:126], both[126:]
    for epoch in (found, second):
        assert sorted(np.concatenate(epoch).tolist()) == list(range(1003))
    orders = [np.concatenate(epoch).tolist() for epoch in (found, again, second, other)]
    assert orders[0] == orders[1] != orders[2] and orders[0] != orders[3]
    assert np.mean([np.ptp(lengths[part]) for part in found]) < 5  # of a random batch: about 75
    assert np.abs(np.corrcoef([lengths[part].mean() for part in found], range(len(found)))[0, 1]) < 0.3


# --- learning and settings


@pytest.mark.parametrize("name, epochs, rate", [
    ("SST-2", 8, 5e-3), ("MRPC", 8, 5e-3), ("STS-B", 30, 5e-3), ("SQuAD-1.1", 20, 1e-2)])
def test_32_examples_are_overfitted(name, epochs, rate, options, tmp_path):
    if name.startswith("SQuAD"):
        write_squad(tmp_path / "data", "1.1", 32, dev_is_train=True)
    else:
        write_glue(tmp_path / "data", name, 32, dev_is_train=True)
    finetune.main([*options, f"--task={name}", f"--epochs={epochs}", f"--learning_rate={rate}",
                   "--batch_size=8", "--dropout=0"])
    kept = results(tmp_path, name)
    assert min(kept["metrics"].values()) > (95 if name.startswith("SQuAD") else 0.95), kept["metrics"]
    model, _, task = finetune.load_finetuned(tmp_path / "out" / name / "best.pt")
    assert task == row_of(name) and not model.training


def test_the_best_state_predicts_the_test_set(options, tmp_path, monkeypatch):
    monkeypatch.setattr(finetune, "selecting", lambda name, scores: 0.0)  # so the first state stays the best
    write_glue(tmp_path / "data", "STS-B")
    finetune.main([*options, "--task=STS-B", "--learning_rate=5e-3", "--epochs=2"])
    model, tokenizer, _ = finetune.load_finetuned(tmp_path / "out/STS-B/best.pt")
    row = row_of("STS-B")
    test = finetune.GlueSet(tmp_path / "data/STS-B/test.tsv", row, "STS-B", "test", tokenizer, 64)
    predicted = finetune.predict_set(model, test, torch.autocast("cpu", enabled=False))
    assert test.files(predicted) == {"STS-B.tsv": (tmp_path / "out/STS-B/predictions/STS-B.tsv").read_text()}
    assert results(tmp_path, "STS-B")["runs"][0]["best_step"] == 2  # of 6


@pytest.mark.parametrize("init_from", ["the checkpoint", "scratch"])
def test_without_learning_the_weights_stay(init_from, options, checkpoint, tmp_path, capsys):
    write_glue(tmp_path / "data", "SST-2", 8)
    init_from = checkpoint.parent if init_from != "scratch" else init_from
    finetune.main([*options, "--task=SST-2", "--learning_rate=0", f"--init_from={init_from}",
                   f"--tokenizer_from={checkpoint}"])
    assert "warning: SST-2, seed 0 is not better than the baseline" in capsys.readouterr().out
    kept, pretrained = results(tmp_path, "SST-2"), torch.load(checkpoint, weights_only=True)
    assert kept["baseline"] == {"accuracy": 0.5} and kept["step"] == (0 if init_from == "scratch" else 7)
    assert kept["checksum"].startswith("untrained") == (init_from == "scratch")
    model, tokenizer, _ = finetune.load_finetuned(tmp_path / "out/SST-2/best.pt")
    assert tokenizer.state() == pretrained["tokenizer"]
    for name, value in model.encoder.state_dict().items():  # of the same shape, too
        if value.std() > 0:  # no bias or LayerNorm: they start alike
            assert torch.equal(value, pretrained["model"][f"main.{name}"]) == (init_from != "scratch")
    tokens = torch.arange(4, 12)[None]
    assert torch.equal(model(tokens), model(tokens)) and model.encoder.dropout == 0.1
    assert not torch.equal(model.train()(tokens), model(tokens))


def test_settings_are_the_authors_unless_a_constant_or_the_command_line_says_otherwise(monkeypatch):
    def settings(name, preset, *argv):
        args = data.Parser("", finetune).parse_args(argv)
        args = finetune.settings_of(row_of(name), args, finetune.Config.from_preset(preset, vocab_size=100))
        assert (args.dropout, args.weight_decay) == (0.1, 0.01)
        assert (args.beta1, args.beta2, args.epsilon) == (0.9, 0.98, 1e-6)
        return args.batch_size, args.learning_rate, args.epochs, args.warmup_fraction, args.max_len

    assert settings("MNLI", "base++") == (32, 2e-5, 2, 1 / 16, 512)
    assert settings("RTE", "base++") == (16, 2e-5, 10, 1 / 10, 512)
    assert settings("CoLA", "large++") == (16, 1e-5, 10, 1 / 10, 512)
    assert settings("SQuAD-2.0", "large++") == (32, 2e-5, 3, 1 / 10, 384)
    monkeypatch.setattr(finetune, "epochs", 7, raising=False)
    assert settings("CoLA", "base++") == (16, 2e-5, 7, 1 / 16, 512)
    assert settings("CoLA", "base++", "--epochs=2") == (16, 2e-5, 2, 1 / 16, 512)


def test_the_metrics_that_select_the_best_state():
    scores = {"accuracy": 1, "f1": 2, "accuracy_mismatched": 4, "best_f1": 8, "exact_match": 16,
              "best_exact_match": 32, "pearson": 64, "spearman": 128, "matthews": 256}
    expected = {"MRPC": 1, "QQP": 1, "MNLI": 1, "STS-B": 96, "SQuAD-1.1": 2, "SQuAD-2.0": 8}
    assert {name: finetune.selecting(row_of(name), scores) for name in expected} == expected


# --- own data


def write_own(path, rows):
    """Dicts as a .jsonl, or as a .tsv with all that an editor may leave in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row) for row in rows]
    if path.suffix == ".tsv":
        lines = ["\t".join(map(str, row)) for row in (rows[0], *(row.values() for row in rows))]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join([*lines[:2], "", *lines[2:], ""]).encode())


@pytest.mark.parametrize("name, ending", [("SST-2", "tsv"), ("RTE", "jsonl"), ("STS-B", "jsonl")])
def test_own_data_give_what_the_same_data_give_as_a_glue_task(name, ending, options, tmp_path, capsys):
    write_glue(tmp_path / "data", name)
    row, names = finetune.TASKS[name], ("first text", "b")[: len(finetune.TASKS[name]["texts"])]
    for split in ("train", "dev", "test"):
        rows = [{"label": label if row["labels"] else float(label), **dict(zip(names, texts)), "more": i}
                for i, (texts, label) in enumerate(glue_rows(name, 40, split))]
        left_out = {"train": ["more"], "dev": [], "test": ["label"]}[split]
        rows = [{key: value for key, value in r.items() if key not in left_out} for r in rows]
        write_own(tmp_path / f"data/mine/{split}.{ending}", rows[::-1] if split == "test" else rows)
    options += ["--epochs=2", "--batch_size=8", "--learning_rate=2e-3", "--warmup_fraction=0.1"]
    finetune.main([*options, f"--task={name}"])
    finetune.main([*options, "--task=mine", f"--regression={not row['labels']}"])
    assert f"texts: {', '.join(names)}; labels: " in capsys.readouterr().out
    glue, own = results(tmp_path, name), results(tmp_path, "mine")
    for metric in row["metrics"]:
        assert own["metrics"][metric] == pytest.approx(glue["metrics"][metric], abs=1e-6)
    assert set(own["metrics"]) == {*row["metrics"], *(["macro_f1"] if row["labels"] else [])}
    dev, own_dev, test, own_test = (table(tmp_path / f"out/{task}/predictions/{task}{end}.tsv")
                                    for end in (".dev", "") for task in (name, "mine"))
    added = ["probability"] if row["labels"] else []
    assert own_dev[0] == ["index", "prediction", *added, "gold"] == dev[0]
    assert own_test[0] == ["index", "prediction", *added]
    assert [r[0] for r in own_test[1:]] == [str(i) for i in range(40)]  # there is no column index
    if row["labels"]:
        assert own_dev == dev and [r[1] for r in own_test[:0:-1]] == [r[1] for r in test[1:]]
    else:
        for a, b in zip(own_dev[1:] + own_test[:0:-1], dev[1:] + test[1:], strict=True):
            assert float(a[1]) == pytest.approx(float(b[1]), abs=1e-3)

    # what README shows
    model, tokenizer, task = finetune.load_finetuned(tmp_path / "out/mine/best.pt")
    pairs = list(zip(*[texts for texts, _ in glue_rows(name, 40, "dev")]))
    logits = model(tokenizer.batch(*pairs))
    assert tokenizer.max_len == 64 and not model.training and not logits.requires_grad
    if row["labels"]:
        probabilities = logits.softmax(-1)
        assert [task["labels"][p.argmax()] for p in probabilities] == [r[1] for r in dev[1:]]
        found = [float(r[2]) for r in dev[1:]]
        assert probabilities.max(1).values.tolist() == pytest.approx(found, abs=1e-4)
    else:
        assert (task["low"], task["high"]) == (0, 5)
        assert (5 * logits[:, 0]).tolist() == pytest.approx([float(r[1]) for r in dev[1:]], abs=1e-4)


def test_columns_that_number_the_rows_are_no_texts(options, tmp_path, capsys):
    for split in ("train", "dev"):
        rows = [{"sentence": f"{label} river", "label": label, "Idx": 7 + label} for label in (0, 1)]
        write_own(tmp_path / f"data/mine/{split}.jsonl", rows)
    finetune.main([*options, "--task=mine"])
    assert [row[0] for row in table(tmp_path / "out/mine/predictions/mine.dev.tsv")] == ["index", "7", "8"]
    best = f"--init_from={tmp_path}/out/mine/best.pt"
    assert "quotation" not in capsys.readouterr().out
    (tmp_path / "new.tsv").write_text('sentence\tn\n"this ""film"" was fine"\t1\n\n"a"\t2\n')
    finetune.main([*options, best, f"--predict={tmp_path}/new.tsv"])  # without Idx, with marks of a .csv
    said = capsys.readouterr().out
    assert said.count("to_json(") == 1 and "1 blank line" in said
    assert table(tmp_path / "new.tsv.predictions.tsv")[1][:2] == ['"this ""film"" was fine"', "1"]
    (tmp_path / "data/mine/test.tsv").write_text("sentence\none\n\nthree\n")
    finetune.main([*options, "--task=mine", f"--out_dir={tmp_path}/more"])
    assert "test.tsv has 1 blank line" in capsys.readouterr().out


def test_own_scores_may_leave_the_range_of_train(options, tmp_path):
    rows = [{"label": label, "text": "good river"} for label in (-7, "1e1", 2.5)]
    write_own(tmp_path / "data/mine/train.jsonl", rows)
    write_own(tmp_path / "data/mine/dev.tsv", [{"text": "river", "label": -50}, {"text": "a", "label": 1e3}])
    finetune.main([*options, "--task=mine", "--regression=True"])
    _, tokenizer, task = finetune.load_finetuned(tmp_path / "out/mine/best.pt")
    assert (task["low"], task["high"], task["labels"]) == (-7, 10, [])
    trained, dev = (finetune.GlueSet(tmp_path / f"data/mine/{file}", task, "mine", split, tokenizer, 64)
                    for split, file in (("train", "train.jsonl"), ("dev", "dev.tsv")))
    assert [example["label"] for example in trained.examples] == pytest.approx([0, 1, 9.5 / 17])
    assert dev.gold.tolist() == [-50, 1000]
    assert dev.decode(np.array([[-1.0], [0.5], [2.0]]))[0].tolist() == [-24, 1.5, 27]


def test_predict_keeps_the_file_and_adds_what_the_model_says(options, tmp_path, capsys):
    write_glue(tmp_path / "data", "MRPC")
    finetune.main([*options, "--task=MRPC", "--learning_rate=2e-3"])
    rows = [{"n": 0.10, "#2 String": "good\triver", "meta": {"a": [1.5, None]}, "#1 String": "a\n\ud83d "},
            {"#1 String": "", "#2 String": "é", "meta": True, "n": 3}]
    (tmp_path / "new.jsonl").write_text("\n\n".join(map(json.dumps, rows)).replace("0.1", "0.10"))
    finetune.main([*options, f"--predict={tmp_path}/new.jsonl", f"--init_from={tmp_path}/out/MRPC/best.pt"])
    out = tmp_path / "new.jsonl.predictions.tsv"
    assert str(out) in capsys.readouterr().out.splitlines()[-1]
    model, tokenizer, task = finetune.load_finetuned(tmp_path / "out/MRPC/best.pt")
    chances, labels = model(tokenizer.batch(["a\n\ud83d", ""], ["good\triver", "é"])).softmax(-1).max(1)
    kept = [["0.10", "good river", '{"a": [1.5, null]}', "a ? "], ["3", "é", "true", ""]]
    assert [r[:5] for r in table(out)] == [["n", "#2 String", "meta", "#1 String", "prediction"], *(
        [*r, task["labels"][label]] for r, label in zip(kept, labels))]
    assert [float(r[5]) for r in table(out)[1:]] == pytest.approx(chances.tolist(), abs=1e-5)

    write_own(tmp_path / "x.tsv", [{"#1 String": "a ", "#2 String": '"b', "Quality": 7}])
    finetune.main([*options, f"--predict={tmp_path}/x.tsv", f"--init_from={tmp_path}/out/MRPC/seed0/best.pt"])
    assert table(tmp_path / "x.tsv.predictions.tsv")[1][:3] == ["a ", '"b', "7"]


def test_a_fine_tuned_model_predicts_files_of_its_own_columns_alone(options, tmp_path):
    write_glue(tmp_path / "data", "CoLA", 8)
    write_squad(tmp_path / "data", "1.1", 4)
    for name in ("CoLA", "SQuAD-1.1"):
        finetune.main([*options, f"--task={name}"])
    cola, squad = (f"--init_from={tmp_path}/out/{name}/best.pt" for name in ("CoLA", "SQuAD-1.1"))
    new = tmp_path / "new.tsv"
    for start_from, text, message in (
            (squad, "sentence\na\n", "does not support SQuAD-1.1"), (cola, None, "new.tsv"),
            (cola, "gj04\t1\t\tno header\n", "one column \"sentence\""), (cola, "sentence\n", "no rows"),
            (cola, "n\tsentence\n1\ta\n2\ta\tb\n", "line 3 has 3 fields")):
        if text:
            new.write_text(text)
        with pytest.raises((data.InputError, FileNotFoundError), match=message):
            finetune.main([*options, f"--predict={new}", start_from])
        new.unlink(missing_ok=True)
    assert not list(tmp_path.glob("*.predictions*"))
    with pytest.raises(data.InputError, match="fine-tuned already.*--predict"):
        finetune.main([*options, "--task=CoLA", cola])
    with pytest.raises(data.InputError, match="load it with finetune.load_finetuned"):
        train.load_checkpoint(cola.removeprefix("--init_from="))


# --- seeds, folders, processes


def test_a_killed_run_keeps_its_seeds_and_a_second_run_is_refused(options, tmp_path, capsys):
    write_glue(tmp_path / "data", "STS-B")
    options, folder = [*options, "--task=STS-B", "--learning_rate=1e-3"], tmp_path / "out/STS-B"
    [process] = start(*options, "--seeds=100000", program="finetune.py")
    wait_for((folder / "seed1/result.json").exists, process)
    with pytest.raises(data.InputError, match="in use"):
        finetune.main(options)
    process.kill()
    finish([process])
    finished = {int(path.parent.name[4:]) for path in folder.glob("seed*/result.json")}
    assert {0, 1} <= finished == set(range(len(finished)))
    capsys.readouterr()
    count = len(finished) + 1
    finetune.main([*options, f"--seeds={count}"])
    assert capsys.readouterr().out.count("finished before") == len(finished)

    finetune.main([*options, f"--seeds={count}", f"--out_dir={tmp_path}/straight"])
    a, b = results(tmp_path, "STS-B"), results(tmp_path, "STS-B", "straight")
    assert [run["metrics"] for run in a["runs"]] == [run["metrics"] for run in b["runs"]]
    values = [run["metrics"]["pearson"] for run in a["runs"]]
    assert a["metrics"]["pearson"] == np.median(values) and len(set(values)) == count
    assert (a["minimum"]["pearson"], a["maximum"]["pearson"]) == (min(values), max(values))
    for file in (folder / "predictions").iterdir():
        assert file.read_bytes() == (tmp_path / "straight/STS-B/predictions" / file.name).read_bytes()
    best = torch.load(folder / "best.pt", weights_only=True)
    assert best["seed"] == int(np.argmax([np.mean(list(run["metrics"].values())) for run in a["runs"]]))
    assert best["scores"] == a["runs"][best["seed"]]["metrics"]

    # the summary is missing, as after a kill just before it; a desktop and a full disk left their traces
    (folder / "results.json").unlink()
    (folder / "seed0/result.json").write_text('{"seed": 0, "metr')
    (folder / "seed1/result.json").write_text(json.dumps({"seed": 1, "settings": a["settings"]}))
    (folder / f"seed{best['seed']}/predictions/.DS_Store").write_bytes(b"\xff\x00")
    (folder / f"seed{best['seed']}/predictions/Thumbs.db").write_bytes(b"\xff\x00")
    (folder / f"seed{best['seed']}/predictions/STS-B.old.tsv").write_bytes(b"\xff\x00")
    finetune.main([*options, f"--seeds={count}"])
    assert results(tmp_path, "STS-B") == a and not (folder / "predictions/.DS_Store").exists()


def test_results_of_other_settings_stay_as_they_are(options, tmp_path):
    write_glue(tmp_path / "data", "SST-2", 8)
    options, folder = [*options, "--task=SST-2"], tmp_path / "out/SST-2"
    finetune.main([*options, "--seeds=2"])
    before = (folder / "results.json").read_bytes()
    scratch = ["--init_from=scratch", f"--tokenizer_from={options[0][12:]}"]
    for name, change in (("epochs", ["--epochs=2"]), ("dropout", ["--dropout=0"]), ("model", scratch)):
        with pytest.raises(data.InputError, match=f"other settings .{name} was.* remove the folder"):
            finetune.main([*options, *change])
    with open(tmp_path / "data/SST-2/test.tsv", "a") as test:
        test.write("8\tmore\n")
    with pytest.raises(data.InputError, match="other settings .data"):
        finetune.main(options)
    assert (folder / "results.json").read_bytes() == before

    for task, name, message in (("SST-2", "results.json", "holds results.json, but no finished seed"),
                                ("SST-2", "best.pt", "holds best.pt, but no finished seed"),
                                ("SST-2", "predictions", "holds predictions, but no finished seed"),
                                ("GLUE", "results.json", "GLUE/results.json is not a summary")):
        path = tmp_path / f"{task} {name}" / task / name  # of somebody else
        path.parent.mkdir(parents=True)
        path.write_text("mine")
        with pytest.raises(data.InputError, match=message):
            finetune.main([*options, f"--out_dir={path.parent.parent}", f"--task={task}"])
        assert path.read_text() == "mine"


def test_all_of_glue_that_is_there(options, tmp_path, capsys):
    for name in ("RTE", "STS-B", "WNLI"):
        write_glue(tmp_path / "data", name)
    (tmp_path / "data/RTE/test.tsv").unlink()  # this only means that there is no submission
    finetune.main([*options, "--task=GLUE"])
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    rte, sts = results(tmp_path, "RTE")["metrics"], results(tmp_path, "STS-B")["metrics"]
    expected = (rte["accuracy"] + (sts["pearson"] + sts["spearman"]) / 2) / 2
    assert line["task"] == "GLUE" and line["metrics"]["average"] == pytest.approx(expected)
    assert set(line["metrics"]) == {"average", "RTE", "STS-B"}  # WNLI is not one of the eight
    assert results(tmp_path, "GLUE") == line
    assert [f.name for f in (tmp_path / "out/RTE/predictions").iterdir()] == ["RTE.dev.tsv"]


def test_two_processes_equal_one(options, tmp_path):
    write_glue(tmp_path / "data", "STS-B", 41)  # the last batch has one example: the second process has none
    options += ["--task=STS-B", "--dropout=0", "--epochs=3", "--batch_size=8", "--learning_rate=1e-3"]
    both = start(*options, program="finetune.py", processes=2)
    finetune.main([*options, f"--out_dir={tmp_path}/one"])
    statuses, said = finish(both)
    assert statuses == [0, 0], said
    one, two = results(tmp_path, "STS-B", "one"), results(tmp_path, "STS-B")
    [line] = [line for line in said.splitlines() if "metrics" in line]  # of process 0 alone
    assert json.loads(line)["metrics"] == two["metrics"]
    assert two["settings"] == one["settings"]
    rows = [table(tmp_path / out / "STS-B/predictions/STS-B.dev.tsv")[1:] for out in ("one", "out")]
    for a, b in zip(*rows, strict=True):
        assert float(a[1]) == pytest.approx(float(b[1]), abs=1e-4) and a[2] == b[2]


# --- bad input


@pytest.mark.parametrize("arguments, file, content, message", [
    ("--task=CoLA --max_len=65", "", "", "max_len=65 .* 64 positions"),
    ("--task=SST-2", "SST-2/train.tsv", "sentence\tlabel\nfine\t1\nbad\t2\n", "line 3: .*one of 0, 1"),
    ("--task=STS-B", "STS-B/dev.tsv", "sentence1\tsentence2\tscore\na\tb\t5.1\n", "line 2: .* '5.1'"),
    ("--task=SST-2", "SST-2/dev.tsv", "1\tthis has no header\n", 'one column "sentence"'),
    ("--task=CoLA", "CoLA/dev.tsv", "", "no rows"),
    ("--task=CoLA", "CoLA/dev.tsv", None, 'data/CoLA has no file dev.tsv. See README'),
    ("--task=GLUE", "STS-B/dev.tsv", None, "data/STS-B has no file dev.tsv"),
    ("--task=SQuAD-2.0", "", "", "data has no file train-v2.0.json. See README"),
    ("--task=SQuAD-1.1", "dev-v1.1.json", "{", "not JSON"),
    ("--task=SQuAD-1.1", "dev-v1.1.json", '{"data": [{"paragraphs": [{"context": "a"}]}]}', "'qas'"),
    ("--task=SQuAD-1.1", "dev-v1.1.json", json.dumps({"data": [{"paragraphs": [paragraph("", [])]}]}), "2.0"),
    ("--task=SST-2 --data_dir=DATA/SST-2", "", "", "SST-2 is the folder of one task: give the folder above"),
    # own data
    ("", "mine/train.tsv", "text\tlabel\na\tx\nb\n", "train.tsv, line 3 has 1 fields, not 2"),
    ("", "mine/train.tsv", "text\tlabel\na\tx\nb\t \n", "train.tsv, line 3: .* not ''"),
    ("", "mine/train.tsv", "text\tlabel\na\tx\nb\tx\n", "train.tsv has the label 'x' alone"),
    ("", "mine/train.tsv", "text\tLabel\na\tx\n", "train.tsv needs a column \"label\" .*'Label'"),
    ("", "mine/dev.tsv", "text\tlabel\tlabel\na\tx\ty\n", "dev.tsv needs one column \"label\""),
    ("", "mine/test.tsv", "text\ttext\na\tb\n", "test.tsv needs one column \"text\""),
    ("", "mine/train.tsv", "probability\tlabel\na\tx\nb\ty\n", "\"probability\": rename it"),
    ("", "mine/train.tsv", "nr\ttext\tlabel\n1\ta\tx\n2\tb\ty\n", '"nr" holds nothing but numbers.*index or'),
    ("", "mine/train.tsv", "text\tlabel\na\t0\nb\t1\nc\t0.0\n", "labels '0' in line 2 and '0.0' in line 4"),
    ("", "mine/train.tsv", "text\tlabel\na\tpos\nb\tneg\nc\tpos\u200b\n", 
     r"labels 'pos' in line 2 and 'pos\\u200b' in line 4"),
    ("", "mine/train.tsv", "text\tlabel\na\té\nb\te\u0301\n", r"labels '\\xe9' in line 2 and 'e\\u0301' in"),
    ("", "mine/dev.tsv", "text\tlabel\tn\tn\na\tx\ty\tz\n", "dev.tsv: each column needs its own name"),
    ("", "mine/test.jsonl", '{"text": "a", "text": "b"}', "test.jsonl, line 1 .*a key twice"),
    ("--regression=True", "mine/train.tsv", "text\tlabel\na\t1\nb\t1_000\n", "line 3: .* not '1_000'"),
    ("", "mine/train.tsv", "a\ta\tlabel\nb\tb\tx\n", "train.tsv needs .* own name"),
    ("", "mine/train.tsv", "a\tb\tc\tlabel\nb\tb\tb\tx\n", "train.tsv needs .* one or two"),
    ("", "mine/dev.tsv", "text\tlabel\na\tx\nb\tz\n", "dev.tsv, line 3: .* one of x, y, not 'z'"),
    ("", "mine/dev.tsv", "texts\tlabel\na\tx\n", "dev.tsv needs one column \"text\".*'texts'"),
    ("", "mine/train.tsv", None, "data/mine has no file train.tsv.* CoLA, .*GLUE"),
    ("", "mine/train.jsonl", "{}", "both train.tsv and train.jsonl"),
    ("", "mine/test.jsonl", "[1]", "test.jsonl, line 1 .* JSON object"),
    ("", "mine/test.jsonl", '{"text": "a"}\n{"a": "b"}', "test.jsonl, line 2 .* JSON object .*'text'"),
    ("", "mine/test.jsonl", '\n{"text": null}', 'test.jsonl, line 2: "text" .* not None'),
    ("--regression=True", "", "", "train.tsv, line 2: .* a number .*, not 'x'"),
    ("--regression=True", "mine/train.tsv", "text\tlabel\na\t1\nb\tnan\n", "line 3: .* not 'nan'"),
    ("--regression=True", "mine/train.tsv", "text\tlabel\na\t1\nb\t1e301\n", "line 3: .* not '1e301'"),
    ("--regression=True", "mine/train.tsv", "text\tlabel\na\t1\nb\t1.0\n", "label 1.0 alone"),
    ("--task=cola", "", "", "data/cola .* CoLA, .*GLUE"), ("--task=a/b", "", "", "'a/b' .* plain name"),
    ("--task=CoLA --regression=True", "", "", "regression=True is for own data"),
    ("--predict=x.txt", "", "", "ckpt.pt is not fine-tuned"),
])
def test_bad_input_is_one_sentence(options, tmp_path, arguments, file, content, message):
    for name in ("CoLA", "SST-2", "STS-B", "RTE"):
        write_glue(tmp_path / "data", name, 4)
    write_squad(tmp_path / "data", "1.1", 4)
    for split in ("train", "dev"):
        write_own(tmp_path / f"data/mine/{split}.tsv", [{"text": c, "label": c} for c in "xy"])
    if content is None:
        (tmp_path / "data" / file).unlink()
    elif file:
        (tmp_path / "data" / file).write_text(content)
    with pytest.raises(data.InputError, match=message) as error:
        finetune.main([*options, "--task=mine", *arguments.replace("DATA", f"{tmp_path}/data").split()])
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", [
    lambda state: state["task"].pop("texts"), lambda state: state["task"].pop("name"),
    lambda state: state["task"].update(labels="01"), lambda state: state["task"].update(label=3),
    lambda state: state["task"].update(labels=[]), lambda state: state["settings"].update(dropout="x"),
    lambda state: [state["task"].update(labels=[], low=0.0, high="x"), state["model"].update(
        {name: state["model"][name][:1] for name in ("out.weight", "out.bias")})],
    lambda state: state["settings"].pop("dropout"),
    lambda state: state["model"].popitem(), lambda state: state["config"].update(colour="red")])
def test_a_damaged_fine_tuned_state(checkpoint, tmp_path, change):
    state, task = torch.load(checkpoint, weights_only=True), row_of("CoLA")
    model = finetune.Model(task, finetune.Config(**state["config"]), 0.1)
    state |= {"task": task, "settings": {"dropout": 0.1, "max_len": 64}, "model": model.state_dict()}
    torch.save(state, tmp_path / "best.pt")
    assert finetune.load_finetuned(tmp_path / "best.pt")[2] == task
    change(state)
    torch.save(state, tmp_path / "best.pt")
    with pytest.raises(data.InputError, match="best.pt is damaged, or not made by this version"):
        finetune.load_finetuned(tmp_path / "best.pt")


def test_a_loss_that_is_not_finite_ends_the_run(options, tmp_path, monkeypatch):
    write_glue(tmp_path / "data", "RTE", 8)
    monkeypatch.setattr(finetune.Model, "losses", lambda self, logits, batch: logits[:, 0] * math.nan)
    with pytest.raises(data.InputError, match="the loss is nan at step 1"):
        finetune.main([*options, "--task=RTE"])
    assert not list((tmp_path / "out").rglob("*.pt"))
