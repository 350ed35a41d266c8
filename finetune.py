"""Fine-tunes a checkpoint on GLUE, SQuAD or own data.

    python finetune.py --task=CoLA --init_from=out/ckpt.pt --data_dir=GLUE        reads GLUE/CoLA/*.tsv
    python finetune.py --task=GLUE --init_from=out/ckpt.pt --data_dir=GLUE        eight tasks, their average
    python finetune.py --task=SQuAD-2.0 --init_from=out/ckpt.pt --data_dir=SQUAD  reads SQUAD/*-v2.0.json
    python finetune.py --task=NAME --init_from=out/ckpt.pt --data_dir=FOLDER      own data: FOLDER/NAME/*
    python finetune.py --predict=FILE --init_from=out/finetune/NAME/best.pt       writes FILE.predictions.tsv
    torchrun --standalone --nproc_per_node=8 finetune.py --task=MNLI ...          eight GPUs

Own data are train.tsv, dev.tsv and, optionally, test.tsv; or .jsonl. The header, or the keys, names the
columns: "label" and one or two others, which are the texts. A column that numbers the rows ("index", "id",
"idx", "guid", "uid") may be there, too. FILE needs no labels.

To change something, edit a constant or pass --name=value. A run writes to out_dir/TASK/:

    results.json   median, minimum and maximum over the finished seeds, baseline, settings
                   (scores are at most 1, those of SQuAD in percent, as in its official script)
    best.pt        the state with the best score on dev, of the best seed
    predictions/   of that state: CoLA.tsv, the test set, as the leaderboard takes it; CoLA.dev.tsv, the dev
                   set, with probabilities and labels
    seedN/         the same of one seed, and result.json: a seed that has it is not run again

The last line of the output is one line of JSON. load_finetuned makes a model of best.pt again.
"""

import contextlib
import hashlib
import json
import math
import re
import string
import sys
import unicodedata
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from data import InputError, Parser, Progress, Tokenizer, checksum, lock, read_lines, run_command
from model import COCOLM, PRESETS, Config
from train import (LOCAL_RANK, RANK, WORLD, checkpoint_path, choose_hardware, connect, disconnect,
                   gather_objects, keep_memory, learning_rate_at, load_checkpoint, make_optimizer,
                   print0, read_checkpoint, require_same, seed_dropout, sum_over_processes, to_device,
                   write_file)

# ------------------------------------------------------------------------------------------------------------
# The tasks: one row says everything about a task.
#
# base, large (as wide as large++ or wider): batch size, learning rate, epochs, warm-up fraction [model]
# labels: the classes; []: a score from low to high, scaled to 0..1 for the model [model]; SQuAD has none
# selects: the metrics whose mean on dev selects the best state; default: all metrics

BINARY, ENTAILMENT = ["0", "1"], ["entailment", "not_entailment"]
TASKS = {
    "CoLA": dict(texts=["sentence"], label="label", labels=BINARY, metrics=["matthews"],
                 base=(16, 2e-5, 10, 1 / 16), large=(16, 1e-5, 10, 1 / 10),
                 no_header=["source", "label", "star", "sentence"]),  # of its train and dev files
    "SST-2": dict(texts=["sentence"], label="label", labels=BINARY, metrics=["accuracy"],
                  base=(32, 2e-5, 5, 1 / 16), large=(32, 5e-6, 2, 1 / 16)),
    "MRPC": dict(texts=["#1 String", "#2 String"], label="Quality", labels=BINARY, metrics=["accuracy", "f1"],
                 selects=["accuracy"], base=(16, 4e-5, 10, 1 / 16), large=(16, 2e-5, 5, 1 / 16)),
    "STS-B": dict(texts=["sentence1", "sentence2"], label="score", labels=[], low=0.0, high=5.0,
                  metrics=["pearson", "spearman"], base=(16, 4e-5, 10, 1 / 16), large=(16, 2e-5, 10, 1 / 16)),
    "QQP": dict(texts=["question1", "question2"], label="is_duplicate", labels=BINARY,
                metrics=["accuracy", "f1"], selects=["accuracy"], skips_broken_rows=True,
                base=(32, 3e-5, 5, 1 / 16), large=(32, 1e-5, 5, 1 / 16)),
    # one run gives m and mm [ours]; the authors ran mm with 1e-5 for base++, 2 epochs for large++ [model]
    "MNLI": dict(texts=["sentence1", "sentence2"], label="gold_label",
                 labels=["entailment", "neutral", "contradiction"], metrics=["accuracy"],
                 base=(32, 2e-5, 2, 1 / 16), large=(32, 5e-6, 3, 1 / 16),
                 sets={"MNLI-m": "_matched", "MNLI-mm": "_mismatched"}),  # dev_matched.tsv, ...
    "QNLI": dict(texts=["question", "sentence"], label="label", labels=ENTAILMENT, metrics=["accuracy"],
                 base=(32, 1e-5, 5, 1 / 16), large=(32, 7e-6, 2, 1 / 16)),
    "RTE": dict(texts=["sentence1", "sentence2"], label="label", labels=ENTAILMENT, metrics=["accuracy"],
                base=(16, 2e-5, 10, 1 / 10), large=(32, 2e-5, 5, 1 / 16)),
    "WNLI": dict(texts=["sentence1", "sentence2"], label="label", labels=BINARY, metrics=["accuracy"],
                 base=(16, 2e-5, 10, 1 / 10), large=(32, 2e-5, 5, 1 / 16)),  # as RTE [ours]: not in the paper
    # the settings of 1.1 are those of 2.0 [ours]: the authors' code has 2.0 alone
    "SQuAD-1.1": dict(metrics=["exact_match", "f1"], selects=["f1"], max_len=384,
                      base=(32, 2e-5, 3, 1 / 10), large=(32, 2e-5, 3, 1 / 10)),
    "SQuAD-2.0": dict(metrics=["exact_match", "f1"], selects=["best_f1"], max_len=384,
                      base=(32, 2e-5, 3, 1 / 10), large=(32, 2e-5, 3, 1 / 10)),
}
INDEX = ("index", "id", "idx", "guid", "uid")  # names of a column that numbers the rows; case is ignored
GLUE_TASKS = ["MNLI", "QQP", "QNLI", "SST-2", "CoLA", "RTE", "MRPC", "STS-B"]
OWN = dict(own=True, label="label", base=(16, 2e-5, 10, 1 / 16), large=(16, 1e-5, 10, 1 / 16))  # [ours]

# ------------------------------------------------------------------------------------------------------------
# Constants

# the run
task: str = "CoLA"                # a row of TASKS, or own data; GLUE: the paper's eight that data_dir holds
data_dir: str = "data/glue"       # tasks are in data_dir/TASK/, but SQuAD's files in data_dir itself
regression: bool = False          # own data: labels are numbers
predict: str = ""                 # a .tsv or .jsonl for which a fine-tuned init_from gives the labels
init_from: str = "out/ckpt.pt"    # a checkpoint; scratch: an untrained model, to compare with
tokenizer_from: str = "out/ckpt.pt"  # for scratch: the checkpoint that gives the tokenizer and the sizes
out_dir: str = "out/finetune"     # results are in out_dir/TASK/
seeds: int = 1                    # runs, with the seeds seed, seed + 1, ...
seed: int = 0                     # of the first run: its head, the order of its examples, its dropout

# hyperparameters; constants without a value come from TASKS; give one a value here to override all rows
epochs: int                       # passes over the training examples
batch_size: int                   # examples in a step, over all processes
learning_rate: float              # at the end of the warm-up; small models want more: tiny 5e-4
warmup_fraction: float            # share of the steps with linear warm-up; then linear decay to 0
max_len: int                      # tokens; 512, SQuAD 384, or fewer if the model has fewer positions
dropout: float = 0.1              # not that of pretraining [model]
weight_decay: float = 0.01        # of matrices, not of biases and norms [Hugging Face port]
beta1: float = 0.9                # AdamW: decay of the mean of gradients [model]
beta2: float = 0.98               # AdamW: decay of the mean of squared gradients [model]
epsilon: float = 1e-6             # AdamW: added to the root of the mean of squares [model]

# the machine
device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: cuda, mps or cpu, the first that is here
dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of autocast; auto: bfloat16 in hardware

DECISIVE = ["epochs", "batch_size", "learning_rate", "warmup_fraction", "max_len", "dropout", "weight_decay",
            "beta1", "beta2", "epsilon", "dtype", "regression"]  # all seeds in out_dir/TASK/ agree in these
EVAL_BATCH = 64  # sequences; predictions do not depend on it
POOL = 50        # batches that are sorted by length together: little padding, and still a random order
QUESTION, STRIDE = 64, 128        # SQuAD: tokens of a question, tokens from one window to the next [model]
N_BEST, LONGEST_ANSWER = 20, 30   # SQuAD: starts and ends that are combined, tokens of an answer [model]

# ------------------------------------------------------------------------------------------------------------
# Metrics, as in scikit-learn, scipy (but 0 where those give nan) and the official SQuAD script
#
# gold, predicted: arrays (n,) of scores, or of classes as the numbers 0, 1, ...


def accuracy(gold, predicted):
    return float(np.mean(gold == predicted))


def f1(gold, predicted):
    """Harmonic mean of precision and recall of class 1; 0 if neither side has it."""
    total = (gold == 1).sum() + (predicted == 1).sum()
    return float(2 * ((gold == 1) & (predicted == 1)).sum() / total) if total else 0.0


def macro_f1(gold, predicted):
    """Mean of the F1 of each class that occurs in gold or predicted"""
    total = np.bincount(np.concatenate([gold, predicted]))  # (classes,)
    hits = np.bincount(gold[gold == predicted], minlength=len(total))
    return float(np.mean(2 * hits[total > 0] / total[total > 0]))


def pearson(gold, predicted):
    """Linear correlation; 0 if either is constant. Of the classes 0 and 1 it is Matthews' correlation."""
    units = []
    for values in (gold, predicted):
        values = np.asarray(values, float)
        if (values == values[0]).all():
            return 0.0
        values = np.ldexp(values, -np.frexp(np.abs(values).max())[1])  # at most 1: no square can overflow
        values = values - values.mean()
        units.append(values / np.linalg.norm(values))
    return float(np.clip(units[0] @ units[1], -1, 1))


def spearman(gold, predicted):
    """Correlation of the ranks; equal values share the mean of their ranks: [3, 1, 3] -> [2.5, 1, 2.5]"""
    ranks = []
    for values in (gold, predicted):
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((counts.cumsum() - (counts - 1) / 2)[inverse])
    return pearson(*ranks)


METRICS = {f.__name__: f for f in (accuracy, f1, macro_f1, pearson, spearman)} | {"matthews": pearson}


def words_of(text):
    """Lowercase words, without punctuation and articles. [official SQuAD script]"""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def squad_scores(golds, predicted, version):
    """(exact match, F1) of an answer, 0 to 1: the best over its gold answers. In 2.0 none means no answer."""
    words, golds = words_of(predicted), [words_of(gold) for gold in golds]
    if version == "2.0":
        golds = [gold for gold in golds if gold] or [[]]  # a question without an answer: only "" is right
    exact = float(words in golds)
    best = max(2 * (Counter(words) & Counter(g)).total() / max(len(words) + len(g), 1) for g in golds)
    return exact, best if version == "1.1" else max(best, exact)


def best_threshold(scores, has_answer, odds):
    """(mean score, threshold) of the best rule "answer if the no-answer odds are at most the threshold".

    scores (n,): of the answers, if all are given; has_answer (n,); odds (n,): high for no answer. A question
    that is not answered scores 1 if it has no answer. [official SQuAD script, but for ties of the odds]
    """
    order = np.argsort(odds, kind="stable")
    gain = np.cumsum(np.where(has_answer, scores, scores - 1)[order])  # of answering the first ones, not none
    ends = np.append(np.diff(np.asarray(odds)[order]) > 0, True)  # no threshold separates equal odds
    best = int(np.argmax(np.where(ends, gain, -math.inf)))
    if gain[best] <= 0:  # best to answer nothing
        return float(np.mean(~has_answer)), float(min(odds) - 1)
    return float((gain[best] + (~has_answer).sum()) / len(order)), float(odds[order[best]])


# ------------------------------------------------------------------------------------------------------------
# GLUE and own data: a class or a score for a text or a pair of texts


def table(header, rows):
    """The text of a .tsv. Tabs and line breaks in a field become spaces, lone surrogates "?"."""
    lines = ("\t".join(re.sub(r"[\t\r\n]", " ", field) for field in row) for row in [header, *rows])
    return "".join(line + "\n" for line in lines).encode(errors="replace").decode()


def without_repetition(pairs):
    """The dict of a JSON object. Python itself would take the last one of two equal keys."""
    if len(row := dict(pairs)) < len(pairs):
        raise ValueError("a key twice")
    return row


def read_fields(path):
    """(line number, fields) of a .tsv or a .jsonl. The first fields are the names of the columns.

    Only tabs separate the fields of a .tsv: quotation marks are text. The names of a .jsonl are the keys of
    its first line. Numbers, true and false become their text; lists, dicts and null stay as they are:

        {"text": "A cat.", "label": 1}  ->  (1, ["text", "label"]), (1, ["A cat.", "1"])
    """
    names = []
    for number, line in read_lines(path):
        if not line.strip(" \r\n"):
            continue
        if path.suffix.lower() != ".jsonl":
            yield number, line.rstrip("\r\n").split("\t")
            continue
        try:
            row = json.loads(line, object_pairs_hook=without_repetition)
            as_text = json.loads(line, parse_int=str, parse_float=str)
            keys = list(dict.fromkeys([*names, *row.keys()]))  # first those of the first line
            fields = [as_text[key] if isinstance(as_text[key], str) else row[key] for key in keys]
            fields = [json.dumps(field) if isinstance(field, bool) else field for field in fields]
        except (ValueError, AttributeError, KeyError, RecursionError) as error:
            raise InputError(f"{path}, line {number} has to be a JSON object with the keys of the first one "
                             f"({error!r:.200}).") from None
        if not names:
            names = keys
            yield number, names
        yield number, fields


def number_of(text):
    """The number that a text spells, else None. "1_000" and what sums could overflow are no numbers."""
    with contextlib.suppress(ValueError):
        return float(text) if "_" not in text and abs(float(text)) <= 1e300 else None


def shown(labels):
    """Labels for a message, at most 200 characters; a character that cannot be seen is escaped."""
    return f"{', '.join(label if label.isprintable() else repr(label) for label in labels):.200}"


def look(label):
    """A key that labels share if they are the same number (0, 0.0) or look the same (pos, pos + U+200B)."""
    visible = re.sub(r"\s", " ", unicodedata.normalize("NFC", label))
    visible = "".join(c for c in visible if c.isprintable())
    number = number_of(visible)
    return visible if number is None else number


def wanted_label(task, classes, label):
    """None if the label can be used; else what it has to be. classes: the set of a task's labels"""
    if task["labels"] is None:  # the classes are what the training file has
        return None if label else "a text"
    if classes:
        return None if label in classes else f"one of {shown(task['labels'])}"
    number = number_of(label)  # own scores on dev may leave the range of train
    low, high = (-1e300, 1e300) if "own" in task else (task["low"], task["high"])
    return None if number is not None and low <= number <= high else f"a number from {low:g} to {high:g}"


def read_glue(path, task, split):
    """[(index, texts, label or None)] of a file; split: train, dev, test, or new for one of --predict.

    index: from that column, else the row's number. Rows of own files have as many fields as the header.
    """
    labelled = split in ("train", "dev")
    strict = "own" in task or split == "new"
    wanted = [*task["texts"], task["label"]] if labelled else task["texts"]
    lines, classes = list(read_fields(path)), {*(task["labels"] or [])}
    rows, broken, seen = [], 0, {}  # seen: of own labels, the first (label, line) that looks so
    header = lines[0][1] if lines else []
    if labelled and "no_header" in task and wanted[0] not in header:
        header = task["no_header"]
    else:
        lines = lines[1:]
    for column in wanted:
        if header.count(column) != 1:
            raise InputError(f'{path} needs one column "{column}": its first line is {header!r:.200}.')
    if strict and len({*header}) < len(header):
        raise InputError(f"{path}: each column needs its own name, but they are {header!r:.200}.")
    if added := {"prediction", "probability"} & {*header} if strict else ():
        raise InputError(f'{path} has a column "{min(added)}": rename it; the predictions get this name.')
    for number, fields in lines:
        row, complete = dict(zip(header, fields)), len(fields) == len(header)
        if labelled and "skips_broken_rows" in task and not complete:
            broken += 1
            continue
        if strict and not complete or not row.keys() >= {*wanted}:
            raise InputError(f"{path}, line {number} has {len(fields)} fields, not {len(header)}.")
        for column in wanted:
            if not isinstance(value := row[column], str):
                raise InputError(f'{path}, line {number}: "{column}" has to be a text, not {value!r:.200}.')
        texts = [row[column].strip() for column in task["texts"]]
        label = row[task["label"]].strip() if labelled else None
        if labelled and (what := wanted_label(task, classes, label)):
            raise InputError(f"{path}, line {number}: the label has to be {what}, not {label!r:.200}.")
        if labelled and task["labels"] is None:
            other, line = seen.setdefault(look(label), (label, number))
            if other != label:
                raise InputError(f"{path} has the labels {other!a:.200} in line {line} and {label!a:.200} in "
                                 f"line {number}: use one spelling, or clearly different names.")
        index = next((row[column] for column in row if column.casefold() in INDEX), len(rows))
        rows.append((str(index).strip(), texts, label))
    if not rows:
        raise InputError(f"{path} has no rows: it is empty, or has a header alone.")
    if broken:
        print0(f"{path}: {broken} broken rows were left out.")
    return rows


class GlueSet:
    """A file of a GLUE task or of own data.

    examples: dicts of tokens (T,) = [CLS] A [SEP] or [CLS] A [SEP] [SEP] B [SEP], and label (): the number of
    a class, or a score, scaled so that low to high is 0 to 1. gold (n,): classes or scores.

    Predictions are (values like gold, the probability of each; None for scores).
    """

    def __init__(self, path, task, set_name, split, tokenizer, max_len):
        self.task, self.labels, self.name, self.split = task, task["labels"], set_name, split
        self.low, self.high = task.get("low"), task.get("high")  # of scores
        self.index, texts, labels = zip(*read_glue(path, task, split))
        if split in ("test", "new") and path.suffix.lower() != ".jsonl":
            if blank := sum(not line.strip(" \r\n") for _, line in read_lines(path)):
                print0(f"warning: {path} has {blank} blank line(s), which get no prediction.")
        quoted = any(len(text) > 3 and text[0] == text[-1] == '"' and '""' in text[1:-1]  # as pandas does
                     for row in texts for text in row)
        if quoted and ("own" in task or split == "new") and path.suffix.lower() == ".tsv":
            print0(f'{path}: quotation marks are read as text. If pandas wrote them, write a .jsonl instead: '
                   f'df.to_json("train.jsonl", orient="records", lines=True)')
        self.examples = [{"tokens": np.array(tokenizer.encode_pair(*row, max_len=max_len))} for row in texts]
        if split in ("train", "dev"):
            classes = {label: number for number, label in enumerate(self.labels)}
            self.gold = np.array([classes[label] if self.labels else float(label) for label in labels])
        if split == "train":
            targets = self.gold
            if not self.labels:
                targets = np.float32((self.gold - self.low) / (self.high - self.low))
            for example, target in zip(self.examples, targets):
                example["label"] = target

    def __len__(self):
        return len(self.examples)

    def decode(self, outputs):
        """(n, classes) or (n, 1) -> predictions (n,) and their probabilities"""
        if self.labels:
            return outputs.argmax(1), torch.from_numpy(outputs).softmax(1).numpy().max(1)
        return self.low + (self.high - self.low) * outputs[:, 0], None

    def constant(self, train):
        """The predictions of always saying the most frequent class, or the mean score, of train."""
        value = np.bincount(train.gold).argmax() if self.labels else train.gold.mean()
        return np.full(len(self), value), None

    def scores(self, predicted):
        """name of metric -> score"""
        return {metric: METRICS[metric](self.gold, predicted[0]) for metric in self.task["metrics"]}

    def text(self, values):
        return [self.labels[value] if self.labels else str(float(value)) for value in values]

    def columns(self, predicted):
        """name -> fields: the predictions and, of classes, their probabilities"""
        values, probability = predicted
        columns = {"prediction": self.text(values)}
        if self.labels:
            columns["probability"] = [f"{p:.6f}" for p in probability]
        return columns

    def files(self, predicted):
        """name of file -> text: predictions and labels of a dev set, predictions of a test set"""
        columns = {"index": self.index, **self.columns(predicted)}
        if self.split == "dev":
            columns["gold"] = self.text(self.gold)
        elif "own" not in self.task:  # what the GLUE server takes
            columns.pop("probability", None)
            if not self.labels:
                columns["prediction"] = [f"{score:.3f}" for score in predicted[0].clip(self.low, self.high)]
        file = f"{self.name}.dev.tsv" if self.split == "dev" else f"{self.name}.tsv"
        return {file: table(columns, zip(*columns.values()))}


# ------------------------------------------------------------------------------------------------------------
# SQuAD: the answer to a question is a span of its context, or in 2.0 that there is none


def read_squad(path, version):
    """[question]: dicts of id, question, context (one str a paragraph), golds: [(text, start)]"""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        questions = [
            {"id": str(qa["id"]), "question": str(qa["question"]).strip(), "context": str(part["context"]),
             "golds": [] if qa.get("is_impossible") in (True, "true", "True") else
                      [(str(answer["text"]), answer.get("answer_start")) for answer in qa["answers"]]}
            for article in content["data"] for part in article["paragraphs"] for qa in part["qas"]]
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is not JSON in SQuAD's format ({error!r:.200}): fetch it again.") from None
    if version == "1.1" and not all(question["golds"] for question in questions):
        raise InputError(f"{path} has questions without an answer, which only 2.0 allows.")
    return questions


def gold_tokens(question, spans):
    """First and last token of the first gold answer that stands at its offset; None if there is none."""
    for text, start in question["golds"]:
        whole = type(start) in (int, float) and start >= 0 and start % 1 == 0  # 29.0 is a whole number
        if whole and text.strip() and question["context"].startswith(text, int(start)):
            start, end = start + len(text) - len(text.lstrip()), start + len(text.rstrip())
            return (int(np.searchsorted(spans[:, 1], start, "right")),
                    int(np.searchsorted(spans[:, 0], end, "left")) - 1)
    return None


def windows(length, room, stride):
    """begin, end (W,) of the windows over a context; (length,) the window of each token's maximum context.

    Of all windows that hold a token, this is the one in which the smaller of its left and right context is
    largest; longer windows get a little more. [official BERT script]

        length 7, room 4, stride 2:  windows 0-4, 2-6, 4-7 (the end is outside)
                                     tokens 0 1 2 are best seen in window 0, 3 4 in window 1, 5 6 in window 2
    """
    begin = np.arange(0, max(length - room, 0) + stride, stride)
    end = np.minimum(begin + room, length)
    token = np.arange(length)
    context = np.minimum(token - begin[:, None], end[:, None] - 1 - token)  # (W, length)
    score = np.where(context < 0, -math.inf, context + 0.01 * (end - begin)[:, None])
    return begin, end, score.argmax(0)  # the first of equal ones


class SquadSet:
    """A file of SQuAD: questions, and examples, each of which is a window of a question's context.

        tokens (T,)   [CLS] question [SEP] [SEP] part of the context [SEP]
        allowed (T,)  where an answer can start or end: in the context, but not at white space; and at [CLS],
                      which means no answer
        starts (T,)   where an answer can start: of `allowed`, the tokens with their maximum context here
        span (2,)     first and last token of the answer; 0 0 if the window does not hold it
        question      its number
        shift         position p holds the context's token p + shift

    Predictions are (the best answer to each question, the odds that it has none).
    """

    def __init__(self, path, task, set_name, split, tokenizer, max_len):
        self.name, self.version, self.questions, self.examples = set_name, task["name"][6:], [], []
        questions, context = read_squad(path, self.version), None
        for question in questions:
            if question["context"] is not context:  # the questions of a paragraph follow each other
                context = question["context"]
                ids, spans = tokenizer.offsets(context)
                visible = np.array([bool(context[start:end].strip()) for start, end in spans], bool)
            question |= {"spans": spans, "tokens": gold_tokens(question, spans)}
            if split == "dev" or question["tokens"] or not question["golds"]:
                self.add_windows(question, ids, visible, tokenizer, max_len)
        if left_out := len(questions) - len(self):
            print0(f"{path}: {left_out:,} questions were left out: no answer is where its offset says.")
        if not self.questions:
            raise InputError(f"{path} has no questions that can be used: fetch it again.")

    def __len__(self):
        return len(self.questions)

    def add_windows(self, question, ids, visible, tokenizer, max_len):
        head = tokenizer.encode(question["question"])[: min(QUESTION, max_len // 2 - 2)]
        head = [tokenizer.cls_id, *head, tokenizer.sep_id, tokenizer.sep_id]
        room = max_len - len(head) - 1
        stride = min(STRIDE, max(1, STRIDE * max_len // 384), max(1, room // 2))
        first, last = question["tokens"] or (-1, -1)
        begins, ends, best_window = windows(len(ids), room, stride)
        for number, (begin, end) in enumerate(zip(begins.tolist(), ends.tolist())):
            tokens = np.array([*head, *ids[begin:end], tokenizer.sep_id])
            allowed, starts = np.zeros((2, len(tokens)), bool)
            allowed[len(head) : -1] = visible[begin:end]
            starts[len(head) : -1] = visible[begin:end] & (best_window[begin:end] == number)
            allowed[0] = True
            shift = begin - len(head)
            span = [first - shift, last - shift] if begin <= first and last < end else [0, 0]
            self.examples.append({"tokens": tokens, "allowed": allowed, "starts": starts,
                                  "span": np.array(span), "question": len(self.questions), "shift": shift})
        self.questions.append(question)

    def answer(self, question, first, last):
        """The characters of the context that these tokens cover; "" if there are none."""
        spans = question["spans"][first : last + 1]  # (tokens, 2)
        return question["context"][spans[0, 0] : spans[-1, 1]].strip() if len(spans) else ""

    def decode(self, outputs):
        """best_spans (windows, 4) -> each question's best answer over its windows, and its no-answer odds:
        the lowest no-answer score minus the score of that answer; "" and 1e9 where no span is possible."""
        best = [(-math.inf, 0, -1)] * len(self)
        null = np.full(len(self), math.inf)
        for example, (score, first, last, nothing) in zip(self.examples, outputs.tolist()):
            q, shift = example["question"], example["shift"]
            null[q] = min(null[q], nothing)
            if score > best[q][0]:
                best[q] = score, int(first) + shift, int(last) + shift
        texts = [self.answer(question, *span) for question, (_, *span) in zip(self.questions, best)]
        return texts, np.array([min(nothing - score, 1e9) for nothing, (score, _, _) in zip(null, best)])

    def scores(self, predicted):
        """name of metric -> score in percent; of 2.0 also the best that a threshold of the odds gives"""
        texts, odds = predicted
        golds = [[gold for gold, _ in question["golds"]] for question in self.questions]
        given = scores = np.array([squad_scores(g, text, self.version) for g, text in zip(golds, texts)])
        best = {}
        if self.version == "2.0":
            has_answer = np.array([bool(g) for g in golds])
            given = np.where((odds > 0)[:, None], ~has_answer[:, None], scores)  # no answer is likelier
            (em, _), (f1, threshold) = (best_threshold(column, has_answer, odds) for column in scores.T)
            best = {"best_exact_match": 100 * em, "best_f1": 100 * f1, "best_f1_threshold": threshold}
        return dict(zip(("exact_match", "f1"), (100 * given.mean(0)).tolist())) | best

    def files(self, predicted):
        """file name -> text. predictions.json, which answers every question, and null_odds.json are for the
        official script; submission.json is for the leaderboard of 2.0."""
        (texts, odds), index = predicted, [question["id"] for question in self.questions]
        given, found = texts, {"predictions.json": texts}
        if self.version == "2.0":
            given = ["" if o > 0 else text for text, o in zip(texts, odds)]
            found |= {"null_odds.json": odds.tolist(), "submission.json": given}
        found = {file: json.dumps(dict(zip(index, each)), indent=1) + "\n" for file, each in found.items()}
        golds = (json.dumps([gold for gold, _ in question["golds"]]) for question in self.questions)
        rows = zip(index, (" ".join(text.split()) for text in given), golds)
        return found | {f"{self.name}.dev.tsv": table(["index", "prediction", "gold"], rows)}


def best_spans(logits, starts):
    """The best span of each window, from its 20 best starts and its 20 best ends. [official BERT script]

    logits (B, T, 2), starts (B, T) -> (B, 4): score, first and last position, and the score of no answer,
    which is position 0. A score is a start logit + an end logit; -inf if no span is possible.
    """
    start, end = logits.unbind(-1)  # (B, T)
    first = start.argsort(dim=1, descending=True, stable=True)[:, :N_BEST]  # (B, 20)
    last = end.argsort(dim=1, descending=True, stable=True)[:, :N_BEST]
    scores = start.gather(1, first)[:, :, None] + end.gather(1, last)[:, None, :]  # (B, 20, 20)
    length = last[:, None, :] - first[:, :, None] + 1
    possible = starts.gather(1, first)[:, :, None] & (length >= 1) & (length <= LONGEST_ANSWER)
    score, place = scores.masked_fill(~possible, -math.inf).flatten(1).max(1, keepdim=True)  # (B, 1)
    first, last = first.gather(1, place // last.shape[1]), last.gather(1, place % last.shape[1])
    return torch.cat([score, first, last, start[:, :1] + end[:, :1]], 1)


# ------------------------------------------------------------------------------------------------------------
# All tasks: files, scores, batches, the model


def files_of(task, data_dir):
    """[(train | dev | test, name of the set, path)] of a task's files. Only test files may be missing."""
    name, folder, endings, files = task["name"], Path(data_dir, task["name"]), [".tsv", ".jsonl"], []
    stems = [("train", name, "train")]
    for set_name, suffix in task.get("sets", {name: ""}).items():
        stems += [(split, set_name, split + suffix) for split in ("dev", "test")]
    if "labels" not in task:
        folder, endings = Path(data_dir), [".json"]
        stems = [(split, name, f"{split}-v{name[6:]}") for split in ("train", "dev")]
    for split, set_name, stem in stems:
        found = [stem + ending for ending in endings if Path(folder, stem + ending).exists()]
        if len(found) > 1:
            raise InputError(f"{folder} has both {' and '.join(found)}: remove one of them.")
        if not found and split != "test":
            advice = f"See README, Fine-tuning. Tasks: {', '.join(TASKS)}, GLUE and folders of your own."
            if any(Path(data_dir, stem + ending).exists() for ending in endings):
                advice = f"{data_dir} is the folder of one task: give the folder above it as --data_dir."
            raise InputError(f"{folder} has no file {stem}{endings[0]}. {advice}")
        files += [(split, set_name, folder / file) for file in found]
    return files


def find_task(name, args):
    """The row of a task, with its name: from TASKS, or made of the training file of own data."""
    if name in TASKS:
        if args.regression:
            raise InputError(f"--regression=True is for own data: TASKS says what the labels of {name} are.")
        return {"name": name, **TASKS[name]}
    if not re.fullmatch(r"\w[\w.+-]*", name):
        raise InputError(f"--task={name!r} has to be a plain name: letters, digits, _ . + -")
    path = files_of({"name": name, "labels": None}, args.data_dir)[0][2]
    header = next((fields for _, fields in read_fields(path)), [])
    texts = [column for column in header if column != "label" and column.casefold() not in INDEX]
    if "label" not in header or len(texts) not in (1, 2) or len({*header} - {""}) < len(header):
        raise InputError(f'{path} needs a column "label" and one or two others, the texts, each with its own '
                         f'name ({", ".join(INDEX)} may be there, too), but its columns are {header!r:.200}.')
    task = {"name": name, "texts": texts, "labels": [] if args.regression else None, **OWN}
    rows = read_glue(path, task, "train")
    for column, values in zip(texts, zip(*(row for _, row, _ in rows))):
        if all(number_of(value) is not None for value in values):
            raise InputError(f'{path}: "{column}" holds nothing but numbers. If it numbers the rows, call it '
                             f'{" or ".join(INDEX)}; if it is the label, "label"; else leave it out.')
    values = {label for _, _, label in rows}
    values = sorted(map(float, values) if args.regression else values)
    if values[0] == values[-1]:
        raise InputError(f"{path} has the label {values[0]!r} alone: there is nothing to learn.")
    if args.regression:
        return task | {"low": values[0], "high": values[-1], "metrics": ["pearson", "spearman"]}
    return task | {"labels": values, "metrics": ["accuracy", "macro_f1"], "selects": ["accuracy"]}


def read_task(task, data_dir, tokenizer, max_len):
    """({"train": [set], "dev": [...], "test": [...]} of a task, one checksum of all its files)"""
    sets, digest = {"train": [], "dev": [], "test": []}, hashlib.sha256()
    kind = GlueSet if "labels" in task else SquadSet
    for split, set_name, path in files_of(task, data_dir):
        sets[split].append(kind(path, task, set_name, split, tokenizer, max_len))
        digest.update(checksum(path).encode())
    return sets, digest.hexdigest()


def dev_scores(dev, predicted):
    """The scores on dev. MNLI has a second dev set, whose score is named accuracy_mismatched."""
    return {metric + suffix: score for a_set, each, suffix in zip(dev, predicted, ("", "_mismatched"))
            for metric, score in a_set.scores(each).items()}


def selecting(task, scores):
    """The score that selects the best state: the mean of the metrics in task["selects"], or of all."""
    return float(np.mean([scores[metric] for metric in task.get("selects", task["metrics"])]))


def batches(lengths, batch_size, epochs, seed):
    """Indices of all examples, once an epoch, in batches of similar lengths, in an order set by the seed."""
    for epoch in range(epochs):
        random = np.random.default_rng((seed, epoch))
        order, pool, found = random.permutation(len(lengths)), batch_size * POOL, []
        for begin in range(0, len(order), pool):
            part = order[begin : begin + pool]
            part = part[np.argsort(lengths[part], kind="stable")]
            found += [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
        yield from (found[i] for i in random.permutation(len(found)))


def collate(examples, pad_id):
    """A batch, padded to the longest example: tokens, allowed, starts (B, T); label (B,); span (B, 2)"""
    batch = {}
    for name in examples[0]:
        values, padding = [torch.as_tensor(e[name]) for e in examples], pad_id if name == "tokens" else 0
        padded = nn.utils.rnn.pad_sequence(values, True, padding) if values[0].dim() else torch.stack(values)
        batch[name] = padded.numpy()
    return batch


class Model(nn.Module):
    """The main Transformer with a task's head, whose weights start at normal(0, 0.02). [Hugging Face port]

    Texts: on [CLS], dropout -> dense -> tanh -> dropout -> linear. [fairseq; the port has GELU]
    SQuAD: at each token one logit for start and one for end. [model]
    """

    def __init__(self, task, config, dropout):
        super().__init__()
        self.finds_spans, self.dropout = "labels" not in task, dropout
        self.encoder = COCOLM(config).main
        self.encoder.dropout = dropout
        if not self.finds_spans:
            self.dense = nn.Linear(config.width, config.width)
        self.out = nn.Linear(config.width, 2 if self.finds_spans else len(task["labels"]) or 1)
        for linear in [self.out] if self.finds_spans else [self.dense, self.out]:
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, tokens, allowed=None):
        """tokens (B, T) -> logits (B, classes), or scores (B, 1), scaled so that low to high is 0 to 1.

        SQuAD: -> (B, T, 2), -inf where allowed (B, T), which is as in SquadSet, says that no answer can be.
        """
        if self.finds_spans:
            logits = self.out(self.encoder(tokens)).float()
            return logits if allowed is None else logits.masked_fill(~allowed[..., None], -math.inf)
        x = self.encoder(tokens, positions=torch.zeros_like(tokens[:, :1]))[:, 0]  # (B, D)
        x = torch.tanh(self.dense(F.dropout(x, self.dropout, self.training)))
        return self.out(F.dropout(x, self.dropout, self.training)).float()

    def losses(self, logits, batch):
        """(B,): cross-entropy, of SQuAD the mean over start and end; the squared error of a score. [model]"""
        if self.finds_spans:
            return sum(F.cross_entropy(logits[..., side], batch["span"][:, side], reduction="none")
                       for side in (0, 1)) / 2
        if batch["label"].is_floating_point():
            return (logits[:, 0] - batch["label"]).square()
        return F.cross_entropy(logits, batch["label"], reduction="none")


def load_finetuned(path, device="cpu"):
    """(the Model in evaluation mode, its Tokenizer, the row of its task) of a best.pt"""
    saved = read_checkpoint(path)
    if "task" not in saved:
        raise InputError(f"{path} is not fine-tuned: give a best.pt of finetune.py.")
    tokenizer, task = Tokenizer.from_state(saved["tokenizer"], path), saved["task"]
    try:
        names = [task["name"]]
        if "labels" in task:
            names += task["texts"] + task["labels"] + [task["label"]]
        "".join(names)  # raises TypeError if one is no text
        sum(task[end] for end in ("low", "high") if task.get("labels") == [])  # the same for a number
        config = Config(**saved["config"] | {"dropout": saved["settings"]["dropout"]})
        model = Model(task, config, config.dropout)
        model.load_state_dict(saved["model"])
        tokenizer.max_len = int(saved["settings"]["max_len"])
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise InputError(f"{path} is damaged, or not made by this version ({error!r:.200}).") from None
    return model.to(device).requires_grad_(False).eval(), tokenizer, task


# ------------------------------------------------------------------------------------------------------------
# One run, and what it writes: out_dir/TASK/ and its seedN/


@torch.no_grad()
def predict_set(model, a_set, autocast, batch_size=EVAL_BATCH):
    """The predictions for a set. Each process computes a part, and all get all."""
    model.eval()
    examples, found = a_set.examples, []
    order = np.argsort([len(example["tokens"]) for example in examples], kind="stable")
    for part in [order[i : i + batch_size] for i in range(0, len(order), batch_size)][RANK::WORLD]:
        batch = to_device(collate([examples[i] for i in part], model.encoder.pad_id), model.out.weight.device)
        with autocast:
            values = model(batch["tokens"], batch.get("allowed")).cpu().double()
        if "starts" in batch:
            values = best_spans(values, batch["starts"].cpu())
        found.append((part, values.numpy()))
    parts, values = zip(*sum(gather_objects(found), []))
    outputs = np.concatenate(values)[np.argsort(np.concatenate(parts))]  # in the order of the examples
    if np.isnan(outputs).any():
        raise InputError("the model's outputs are NaN: choose --dtype=float32 or a smaller --learning_rate.")
    return a_set.decode(outputs)


def show(scores):
    """Scores in words, for a line on the console"""
    return "  ".join(f"{name} {value:.4f}" for name, value in scores.items() if "threshold" not in name)


def fine_tune(task, args, start, sets, seed, device, autocast):
    """One run -> (the best state, its predictions for dev and test)"""
    examples = sets["train"][0].examples
    torch.manual_seed(seed)
    model = Model(task, start.config, args.dropout)
    if start.weights:
        model.encoder.load_state_dict(start.weights)
    model = ddp = model.to(device)
    if WORLD > 1:
        ddp = nn.parallel.DistributedDataParallel(model, [LOCAL_RANK] if args.device == "cuda" else None)
    optimizer = make_optimizer(model, args)
    scaler = torch.amp.GradScaler(args.device, enabled=args.dtype == "float16")
    progress = Progress(f"{task['name']}, seed {seed}", args.max_steps, "steps", 1)
    lengths = np.array([len(example["tokens"]) for example in examples])
    upcoming = batches(lengths, args.batch_size, args.epochs, seed)
    best, losses, steps_per_epoch = None, [], args.max_steps // args.epochs
    for step, indices in enumerate(upcoming):  # `step` is the number of steps done
        # forward, backward, update
        part = indices[RANK::WORLD]  # empty if the batch has fewer examples than there are processes
        batch = collate([examples[i] for i in (part if len(part) else indices[:1])], start.config.pad_id)
        batch = to_device(batch, device)
        seed_dropout(seed, step, RANK, 0)
        ddp.train()
        with autocast:
            logits = ddp(batch["tokens"], batch.get("allowed"))
        loss = model.losses(logits, batch)[: len(part)].sum() / len(indices)  # its share of the mean, or 0
        scaler.scale(loss * WORLD).backward()  # DDP takes the mean over processes
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, args)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.detach())

        # validate and log, twice an epoch
        done = step + 1
        if RANK == 0:
            progress(done)
        if 2 * done // steps_per_epoch == 2 * step // steps_per_epoch:
            continue
        mean, losses = sum_over_processes(sum(losses)).item() / len(losses), []
        if not math.isfinite(mean):
            raise InputError(f"seed {seed}: the loss is {mean} at step {done}; choose a lower learning_rate.")
        scores = dev_scores(sets["dev"], [predict_set(model, dev, autocast) for dev in sets["dev"]])
        print0(f"  seed {seed}  step {done:,}/{args.max_steps:,}  loss {mean:.4f}  {show(scores)}")
        if best is None or selecting(task, scores) > selecting(task, best["scores"]):
            best = {"seed": seed, "step": done, "scores": scores,
                    "model": {name: value.cpu().clone() for name, value in model.state_dict().items()}}

    model.load_state_dict(best["model"])
    predicted = [predict_set(model, a_set, autocast) for a_set in sets["dev"] + sets["test"]]
    return best | {"last": scores}, predicted


def finished_runs(folder, task, settings):
    """seed -> content of result.json, of the finished seeds. InputError if their settings were different."""
    runs, paths = {}, list(folder.glob("seed*/result.json"))
    for name in ("results.json", "best.pt", "predictions"):
        if not paths and (folder / name).exists():
            raise InputError(f"{folder} holds {name}, but no finished seed: choose another --out_dir.")
    for path in paths:
        try:
            record = json.loads(path.read_bytes())
            before, seed = {**record.pop("settings")}, int(record["seed"])
            selecting(task, record["metrics"])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue  # damaged: the seed is run again
        if other := [f"{name} was {before.get(name)} and is {now}" for name, now in settings.items()
                     if before.get(name) != now]:
            raise InputError(f"{path} has results of other settings ({'; '.join(other)}): choose another "
                             f"--out_dir, or remove the folder {folder} first.")
        if path.with_name("best.pt").exists():
            runs[seed] = record
    return runs


def save_run(folder, sets, best, predicted, about):
    """Writes seedN/ and returns result.json's content. It is written last: it marks the seed as finished."""
    (folder / "predictions").mkdir(parents=True, exist_ok=True)
    for a_set, each in zip(sets["dev"] + sets["test"], predicted, strict=True):
        for file, text in a_set.files(each).items():
            write_file(folder / "predictions" / file, text)
    write_file(folder / "best.pt", about | best)
    record = {"seed": best["seed"], "metrics": best["scores"], "best_step": best["step"],
              "last": best["last"], "processes": WORLD, "torch": torch.__version__}
    write_file(folder / "result.json", json.dumps(record | {"settings": about["settings"]}, indent=1) + "\n")
    return record


def write_summary(folder, task, runs, facts):
    """Copies the best seed's files and writes results.json; returns its content. Its metrics are medians."""
    runs = [runs[seed] for seed in sorted(runs)]
    best = folder / f"seed{max(runs, key=lambda run: selecting(task, run['metrics']))['seed']}"
    (folder / "predictions").mkdir(exist_ok=True)
    for pattern in (f"{task['name']}*.tsv", "[!.]*.json"):  # a desktop may have left files of its own
        for file in (best / "predictions").glob(pattern):
            write_file(folder / "predictions" / file.name, file.read_bytes())
    write_file(folder / "best.pt", read_checkpoint(best / "best.pt"))
    results = {"task": task["name"]}
    for key, summary in (("metrics", np.median), ("minimum", min), ("maximum", max)):
        results[key] = {metric: float(summary([run["metrics"][metric] for run in runs]))
                        for metric in runs[0]["metrics"]}
    results |= {"seeds": len(runs), **facts, "runs": runs}
    write_file(folder / "results.json", json.dumps(results, indent=1) + "\n")
    return results


# ------------------------------------------------------------------------------------------------------------
# The command


def open_start(args):
    """What fine-tuning starts from. With scratch, only the checkpoint's tokenizer and sizes are used."""
    scratch = args.init_from == "scratch"
    path = checkpoint_path(args.tokenizer_from if scratch else args.init_from)
    saved = read_checkpoint(path)
    if "task" in saved:
        raise InputError(f"{path} is fine-tuned already: use --predict=FILE, or another --init_from.")
    model, tokenizer = load_checkpoint(path)
    return SimpleNamespace(config=model.config, tokenizer=tokenizer,
                           weights=None if scratch else model.main.state_dict(),
                           step=0 if scratch else saved["step"],
                           checksum=f"untrained {checksum(path)}" if scratch else checksum(path))


def settings_of(task, args, config):
    """The settings of one task. An option comes first, then a constant with a value, then the task's row."""
    values = {"max_len": min(task.get("max_len", 512), config.max_len)}
    values |= zip(("batch_size", "learning_rate", "epochs", "warmup_fraction"),
                  task["large" if config.width >= PRESETS["large++"]["width"] else "base"])
    args = SimpleNamespace(**values | {key: value for key, value in vars(args).items() if value is not None})
    if args.max_len > config.max_len:
        raise InputError(f"max_len={args.max_len} has to be at most the model's {config.max_len} positions.")
    return args


def run_task(task, args, start, device, autocast):
    """All seeds of one task -> on process 0 the content of results.json."""
    args, folder, results = settings_of(task, args, start.config), Path(args.out_dir, task["name"]), None
    sets, digest = read_task(task, args.data_dir, start.tokenizer, args.max_len)
    train, dev = sets["train"][0], sets["dev"]
    args.max_steps = math.ceil(len(train.examples) / args.batch_size) * args.epochs
    args.warmup_steps = round(args.warmup_fraction * args.max_steps)
    baseline = dev_scores(dev, [a_set.constant(train) for a_set in dev]) if "labels" in task else None
    print0(f"\n{task['name']} from {args.init_from}, step {start.step:,}\n"
           f"  {args.device}, {args.dtype}, processes {WORLD}; {len(train.examples):,} training sequences\n"
           f"  {', '.join(f'{key} {getattr(args, key):.4g}' for key in DECISIVE[:5])}")
    if "labels" in task:
        labels = shown(task["labels"]) or f"numbers from {task['low']:g} to {task['high']:g}"
        print0(f"  texts: {', '.join(task['texts'])}; labels: {labels}")
    settings = {key: getattr(args, key) for key in DECISIVE} | {"model": start.checksum, "data": digest}
    about = {"config": vars(start.config), "tokenizer": start.tokenizer.state(), "task": task,
             "settings": settings}  # of best.pt
    facts = {"baseline": baseline, "examples": len(train), "step": start.step, "checksum": start.checksum,
             "init_from": args.init_from, "settings": settings}  # of results.json
    with lock(folder) if RANK == 0 else contextlib.nullcontext():
        require_same("checkpoint and data", [start.checksum, digest])
        runs = gather_objects(finished_runs(folder, task, settings) if RANK == 0 else None)[0]
        for seed in range(args.seed, args.seed + args.seeds):
            if seed in runs:
                print0(f"  seed {seed}  finished before  {show(runs[seed]['metrics'])}")
            else:
                best, predicted = fine_tune(task, args, start, sets, seed, device, autocast)
                if baseline and selecting(task, best["scores"]) <= selecting(task, baseline) + 1e-9:
                    print0(f"warning: {task['name']}, seed {seed} is not better than the baseline. Try a "
                           f"larger --learning_rate or more --epochs; small models want both.")
                if RANK == 0:
                    runs[seed] = save_run(folder / f"seed{seed}", sets, best, predicted, about)
            if RANK == 0:
                results = write_summary(folder, task, runs, facts)
        print0(f"  {folder} has the results; the best state was chosen by its score on dev")
    return results


def fine_tune_all(args, device, autocast):
    """The task, or all of GLUE, and at the end the line of JSON."""
    start, names, average = open_start(args), [args.task], Path(args.out_dir, "GLUE", "results.json")
    if args.task == "GLUE":
        names = [name for name in GLUE_TASKS if Path(args.data_dir, name).exists()] or GLUE_TASKS
        print0(f"{len(names)} of the paper's eight tasks: {', '.join(names)}")
        if average.exists() and b'"task": "GLUE"' not in average.read_bytes():
            raise InputError(f"{average} is not a summary of this program: choose another --out_dir.")
    tasks = [find_task(name, args) for name in names]
    for task in tasks:  # a missing file is known now, not after hours of other tasks
        files_of(task, args.data_dir)
    results = [run_task(task, args, start, device, autocast) for task in tasks]
    if RANK == 0:
        last = {key: value for key, value in results[-1].items() if key not in ("settings", "runs")}
        if args.task == "GLUE":  # the selecting score of each task, from its median metrics
            scores = {task["name"]: selecting(task, each["metrics"]) for task, each in zip(tasks, results)}
            last = {"task": "GLUE", "seeds": min(each["seeds"] for each in results),
                    "metrics": {"average": float(np.mean(list(scores.values()))), **scores}}
            average.parent.mkdir(exist_ok=True)
            write_file(average, json.dumps(last, indent=1) + "\n")
        print0(json.dumps(last))


def predict_file(args, device, autocast):
    """Writes FILE.predictions.tsv: FILE's columns, the predictions and the probabilities of classes."""
    path, out = Path(args.predict), Path(f"{args.predict}.predictions.tsv")
    model, tokenizer, task = load_finetuned(args.init_from, device)
    if "labels" not in task:
        raise InputError(f"--predict does not support {task['name']}: it reads rows of texts.")
    a_set = GlueSet(path, task, task["name"], "new", tokenizer, tokenizer.max_len)
    columns = a_set.columns(predict_set(model, a_set, autocast))
    if RANK == 0:
        header, *rows = ([field if isinstance(field, str) else json.dumps(field) for field in fields]
                         for _, fields in read_fields(path))
        rows = [[*row, *added] for row, added in zip(rows, zip(*columns.values()), strict=True)]
        write_file(out, table([*header, *columns], rows))
        print0(f"{out} has the predictions of {args.init_from} ({task['name']}) for {len(rows):,} rows.")


def main(argv):
    keep_memory()
    args = Parser(__doc__, sys.modules[__name__]).parse_args(argv)
    device = choose_hardware(args)
    autocast = torch.autocast(device.type, getattr(torch, args.dtype), enabled=args.dtype != "float32")
    connect(device)
    if args.predict:
        predict_file(args, device, autocast)
    else:
        fine_tune_all(args, device, autocast)
    disconnect()


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
