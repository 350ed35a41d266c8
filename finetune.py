"""Fine-tunes a checkpoint on GLUE or SQuAD: edit the constants below or override them on the command line, then

    python finetune.py --task=CoLA --init_from=out/ckpt.pt --data_dir=GLUE        reads GLUE/CoLA/*.tsv
    python finetune.py --task=GLUE --init_from=out/ckpt.pt --data_dir=GLUE        the paper's eight, and their average
    python finetune.py --task=SQuAD-2.0 --init_from=out/ckpt.pt --data_dir=SQUAD  reads SQUAD/*-v2.0.json
    torchrun --standalone --nproc_per_node=8 finetune.py --task=MNLI ...          eight GPUs

What is written to out_dir/TASK/ (metrics of GLUE from 0 to 1, of SQuAD in percent, as its official script has them):

    results.json      scores of every finished seed, their median, minimum and maximum, the baseline, all settings
    predictions/      what the leaderboards take (CoLA.tsv; predictions.json), beside it the dev set's (CoLA.dev.tsv)
    best.pt, last.pt  of the best seed: the state with the best score on dev, and the one after the last step

The last line of the output is one line of JSON. From a fine-tuned checkpoint back to a model: load_finetuned(path).
"""

import collections
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
import shlex
import signal
import string
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

from data import InputError, Progress, Tokenizer, checked, lower, parse_options, read_file, read_meta, run_command
from model import COCOLM, PRESETS, Config
from train import (COUNT, SHARE, choose_device, choose_dtype, join, keep_memory, learning_rate_at, make_optimizer,
                   on_first, rank, read_checkpoint, read_constants, restore, say, seed_pass, sum_over_processes,
                   to_device, together, world)

# --------------------------------------------------------------------------------------------------------------------
# Constants. An option --name=value goes before what is written here, and that before the table of tasks.

# what
task = "CoLA"                   # one of TASKS below, SQuAD-1.1 say, or GLUE: the paper's eight and their average
data_dir = "data/glue"          # GLUE's tasks lie in data_dir/TASK/, SQuAD's files in data_dir itself
init_from = "out/ckpt.pt"       # a checkpoint of train.py; scratch: an untrained model, to see what pretraining brought
preset = None                   # of scratch; default: the sizes of the checkpoint that tokenizer_from names, else tiny
tokenizer_from = "data/docs"    # of scratch: a prepared corpus' folder, or the checkpoint that one compares with
out_dir = "out/finetune"        # everything a task writes lies in out_dir/TASK/
overwrite = False               # True: leave out the finished seeds that out_dir/TASK/ holds
seeds = 1                       # runs, with the seeds seed, seed + 1, ...; finished ones are not run again
seed = 0                        # the first one: of the head's weights, the order of the examples and dropout
# how; the defaults are the authors' [model], those of large++ for models as wide
epochs = None                   # from the table of tasks
batch_size = None               # from the table of tasks; examples a step, over all processes
learning_rate = None            # from the table of tasks; the peak. Small models want more: about 5e-4 for tiny
warmup_fraction = None          # from the table of tasks; share of the steps that warm up linearly; then linear decay
max_len = None                  # tokens; default: the smaller of the task's (512, SQuAD 384) and the model's positions
dropout = 0.1                   # whatever the pretraining had [model]
weight_decay = 0.01             # of weights, not of biases and norms [model]
beta1 = 0.9                     # of AdamW [model]
beta2 = 0.98                    # of AdamW [model]
epsilon = 1e-6                  # of AdamW [model]
# where
device = "auto"                 # auto | cpu | cuda | mps
dtype = "auto"                  # auto | float32 | bfloat16 | float16: of the autocast; float16 brings loss scaling
# --- end of the constants

EVAL_BATCH = 64                 # sequences; predictions do not depend on it
POOL = 50                       # batches that are sorted by length together: little padding, and still a random order
QUESTION, STRIDE, SQUAD_LEN = 64, 128, 384  # tokens of a question, between windows, of a window at the most [model]
LONGEST_ANSWER = 30             # tokens [model]
HIGHEST_SCORE = 5.0             # of STS-B; trained on as a share of it [model]
GLUE_PLACE = "https://dl.fbaipublicfiles.com/glue/data"
SQUAD_PLACE = "https://rajpurkar.github.io/SQuAD-explorer/dataset"


BINARY, ENTAILMENT = ["0", "1"], ["entailment", "not_entailment"]
MATTHEWS, ACCURACY, WITH_F1, EXACT = ["matthews"], ["accuracy"], ["accuracy", "f1"], ["exact_match", "f1"]
TASKS = {  # rows: of the official train, dev, test; base, large: batch, learning rate / 1e-5, epochs, warm-up fraction
    "CoLA": dict(text=["sentence"], label="label", labels=BINARY, metrics=MATTHEWS, rows=(8551, 1043, 1063),
                 base=(16, 2, 10, 1 / 16), large=(16, 1, 10, 1 / 10),
                 no_header=["source", "label", "star", "sentence"]),
    "SST-2": dict(text=["sentence"], label="label", labels=BINARY, metrics=ACCURACY, rows=(67349, 872, 1821),
                  base=(32, 2, 5, 1 / 16), large=(32, 0.5, 2, 1 / 16)),
    "MRPC": dict(text=["#1 String", "#2 String"], label="Quality", labels=BINARY, metrics=WITH_F1,
                 rows=(3668, 408, 1725), base=(16, 4, 10, 1 / 16), large=(16, 2, 5, 1 / 16)),
    "STS-B": dict(text=["sentence1", "sentence2"], label="score", labels=[], metrics=["pearson", "spearman"],
                  rows=(5749, 1500, 1379), base=(16, 4, 10, 1 / 16), large=(16, 2, 10, 1 / 16)),
    "QQP": dict(text=["question1", "question2"], label="is_duplicate", labels=BINARY, metrics=WITH_F1,
                rows=(363846, 40430, 390965), base=(32, 3, 5, 1 / 16), large=(32, 1, 5, 1 / 16), archive="QQP-clean",
                broken_rows=True),
    "MNLI": dict(text=["sentence1", "sentence2"], label="gold_label", labels=["entailment", "neutral", "contradiction"],
                 metrics=ACCURACY, rows=(392702, 0, 0), base=(32, 2, 2, 1 / 16), large=(32, 0.5, 3, 1 / 16),
                 sets={"MNLI-m": ("_matched", 9815, 9796), "MNLI-mm": ("_mismatched", 9832, 9847)}),
    "QNLI": dict(text=["question", "sentence"], label="label", labels=ENTAILMENT, metrics=ACCURACY,
                 rows=(104743, 5463, 5463), base=(32, 1, 5, 1 / 16), large=(32, 0.7, 2, 1 / 16), archive="QNLIv2"),
    "RTE": dict(text=["sentence1", "sentence2"], label="label", labels=ENTAILMENT, metrics=ACCURACY,
                rows=(2490, 277, 3000), base=(16, 2, 10, 1 / 10), large=(32, 2, 5, 1 / 16)),
    "WNLI": dict(text=["sentence1", "sentence2"], label="label", labels=BINARY, metrics=ACCURACY, rows=(635, 71, 146),
                 base=(16, 2, 10, 1 / 10), large=(32, 2, 5, 1 / 16)),  # [ours] as RTE: the paper leaves it out
    "SQuAD-1.1": dict(metrics=EXACT, rows=(87599, 10570), base=(32, 2, 3, 1 / 10), large=(32, 2, 3, 1 / 10)),
    "SQuAD-2.0": dict(metrics=EXACT, rows=(130319, 11873), base=(32, 2, 3, 1 / 10), large=(32, 2, 3, 1 / 10)),
}
SELECTS = {"MRPC": ["accuracy"], "QQP": ["accuracy"], "SQuAD-1.1": ["f1"], "SQuAD-2.0": ["f1"]}  # else all metrics
PAPERS_EIGHT = ["MNLI", "QQP", "QNLI", "SST-2", "CoLA", "RTE", "MRPC", "STS-B"]
DIAGNOSTICS = ["AX/AX.tsv", "AX/test.tsv", "AX/diagnostic.tsv", "AX.tsv", "diagnostic/diagnostic.tsv", "MNLI/AX.tsv",
               "MNLI/diagnostic.tsv"]  # places in data_dir of the diagnostic set, which MNLI's model predicts

ALLOWED = {
    "task": [*TASKS, "GLUE"], "data_dir": str, "init_from": str, "preset": list(PRESETS), "tokenizer_from": str,
    "out_dir": str, "overwrite": bool, "seeds": (1, 10**6), "seed": (0, 2**62), "epochs": (1, 10**6),
    "batch_size": COUNT, "learning_rate": (0.0, 10.0), "warmup_fraction": SHARE, "max_len": (8, 2**20),
    "dropout": (0.0, 0.9), "weight_decay": SHARE, "beta1": (0.0, 0.9999999), "beta2": (0.0, 0.9999999),
    "epsilon": (1e-30, 1.0), "device": ["auto", "cpu", "cuda", "mps"],
    "dtype": ["auto", "float32", "bfloat16", "float16"],
}
FROM_TABLE = ["epochs", "batch_size", "learning_rate", "warmup_fraction", "max_len", "preset"]  # None is a default
DECISIVE = [*FROM_TABLE[:5], "dropout", "weight_decay", "beta1", "beta2", "epsilon", "dtype"]  # results: never mixed

# --------------------------------------------------------------------------------------------------------------------
# Metrics, equal to scikit-learn's, scipy's and the official SQuAD script's. gold and predicted: sequences of length n.


def accuracy(gold, predicted):
    return float(np.mean(np.asarray(gold) == np.asarray(predicted)))


def f1_score(gold, predicted, positive):
    """Harmonic mean of precision and recall of the class `positive`; 0 if nobody ever says it."""
    gold, predicted = np.asarray(gold) == positive, np.asarray(predicted) == positive
    said = gold.sum() + predicted.sum()
    return float(2 * (gold & predicted).sum() / said) if said else 0.0


def matthews(gold, predicted):
    """Correlation of the classes, any number of them; 0 if either side is constant, as scikit-learn has it."""
    gold, predicted = np.asarray(gold), np.asarray(predicted)
    classes = np.union1d(gold, predicted)
    g = np.array([(gold == c).sum() for c in classes], float)
    p = np.array([(predicted == c).sum() for c in classes], float)
    n = float(len(gold))
    spread = (n * n - g @ g) * (n * n - p @ p)
    return float((n * (gold == predicted).sum() - g @ p) / math.sqrt(spread)) if spread > 0 else 0.0


def pearson(gold, predicted):
    """Linear correlation; nan if either side is constant, as scipy has it."""
    x, y = np.asarray(gold, float), np.asarray(predicted, float)
    if len(x) < 2 or (x == x[0]).all() or (y == y[0]).all():
        return math.nan
    x, y = x - x.mean(), y - y.mean()
    return float(np.clip((x / np.linalg.norm(x)) @ (y / np.linalg.norm(y)), -1, 1))


def ranks(values):
    """1 for the smallest; equal values share the mean of their ranks: [3, 1, 3] -> [2.5, 1, 2.5]"""
    _, inverse, counts = np.unique(np.asarray(values, float), return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[inverse]


def spearman(gold, predicted):
    """Correlation of the ranks; nan if either side is constant."""
    return pearson(ranks(gold), ranks(predicted))


def normalized(text):
    """Lowercase, without punctuation, articles and superfluous white space. [official SQuAD script]"""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def squad_scores(golds, predicted, version):
    """(exact match, F1) of one answer, 0 to 1: the best over its gold answers, none of which means no answer."""
    if version == "2.0":
        golds = [gold for gold in golds if normalized(gold)] or [""]
    exact, best = 0.0, 0.0
    words = normalized(predicted).split()
    for gold in golds:
        gold_words = normalized(gold).split()
        exact = max(exact, float(words == gold_words))
        common = (collections.Counter(words) & collections.Counter(gold_words)).total()
        if version == "2.0" and not (words and gold_words):
            best = max(best, float(words == gold_words))
        elif common:
            best = max(best, 2 * common / (len(words) + len(gold_words)))
    return exact, best


def best_threshold(scores, has_answer, odds):
    """(mean score, threshold) if exactly the questions whose no-answer odds are at most the threshold are answered.

    scores (n,) of the answers, without regard to the threshold; has_answer (n,); odds (n,), high for no answer.
    Those that are not answered score 1 if there is no answer. Equal odds stay together. [official SQuAD script]
    """
    order = np.argsort(odds, kind="stable")
    gain = np.cumsum(np.where(has_answer, scores, -1.0)[order])
    ends = np.append(np.diff(np.asarray(odds)[order]) > 0, True)  # only between different odds can one cut
    best = int(np.argmax(np.where(ends, gain, -math.inf)))
    if gain[best] <= 0:  # best to answer nothing
        return float(np.mean(~has_answer)), float(min(odds) - 1)
    return float((gain[best] + (~has_answer).sum()) / len(order)), float(odds[order[best]])


# --------------------------------------------------------------------------------------------------------------------
# GLUE's files


def how_to_get(name, folder):
    """Where a task's official files are, and the two shell lines that fetch and unpack them."""
    here = shlex.quote(str(folder))
    if name.startswith("SQuAD"):
        version = name[6:]
        files = " ".join(f"-LO {SQUAD_PLACE}/{split}-v{version}.json" for split in ("train", "dev"))
        return f"its official files are at {SQUAD_PLACE}:\n  mkdir -p {here} && cd {here}\n  curl {files}"
    if name == "MRPC":  # is given out as two files and a list of the pairs that belong to dev
        place = GLUE_PLACE.removesuffix("/glue/data")
        urls = " ".join(f"-LO {place}/{part}" for part in ("senteval/senteval_data/msr_paraphrase_train.txt",
                        "senteval/senteval_data/msr_paraphrase_test.txt", "glue/data/mrpc_dev_ids.tsv"))
        split = ("""awk -F'\\t' '{sub(/\\r$/, "")} NR == FNR {dev[$1, $2]; next} FNR == 1 {print > "dev.tsv"} """
                 """FNR == 1 || !(($2, $3) in dev) {print > "train.tsv"; next} {print > "dev.tsv"}' """
                 "mrpc_dev_ids.tsv msr_paraphrase_train.txt && cp msr_paraphrase_test.txt test.tsv")
        return f"its official files are at {place}:\n  mkdir -p {here}/MRPC && cd {here}/MRPC && curl {urls}\n  {split}"
    archive = f"{TASKS[name].get('archive', name)}.zip"
    return (f"its official files are at {GLUE_PLACE}/{archive}:\n  curl -L --create-dirs -o {here}/{archive} "
            f"{GLUE_PLACE}/{archive}\n  unzip {here}/{archive} -d {here}")


def read_glue(path, task, labelled):
    """[(index, texts, label or None)] of a file, and how many broken rows were left out.

    Fields are split at tabs and nothing else: quotation marks are text. index: what the file's column says, else the
    row's number. InputError for a missing column or a label outside the task's set, with file, line and value.
    """
    lines = [(number, line.rstrip("\r\n").split("\t")) for number, line in enumerate(read_file(path, "", True), 1)
             if line and line.strip("\r\n")]
    header, wanted = lines[0][1] if lines else [], [*task["text"], *([task["label"]] if labelled else [])]
    if lines and not set(task["text"]) & set(header):
        header, lines = task.get("no_header", header), [(0, []), *lines]  # CoLA's train and dev have none
    missing = [name for name in wanted if name not in header]
    if lines and missing:
        raise InputError(f'{path} has no column "{missing[0]}": its first line reads {" | ".join(header)[:200]}.')
    index = next((header.index(name) for name in ("index", "id") if name in header), None)
    columns, rows, broken = [header.index(name) for name in wanted if lines], [], 0
    for number, fields in lines[1:]:
        if labelled and task.get("broken_rows") and len(fields) != len(header):
            broken += 1
            continue
        if len(fields) <= max(columns):
            absent = next(name for name, column in zip(wanted, columns) if column >= len(fields))
            raise InputError(f'{path}, line {number}: there is no column "{absent}", only {len(fields)} fields, where '
                             f"{len(header)} belong.")
        label = fields[columns[-1]].strip() if labelled else None
        if labelled and task["labels"] and label not in task["labels"]:
            raise InputError(f"{path}, line {number}: the label {label!r} is none of {', '.join(task['labels'])}.")
        if labelled and not task["labels"] and not re.fullmatch(r"[0-4](\.\d*)?|5(\.0*)?", label):
            raise InputError(f"{path}, line {number}: the score {label!r} is no number from 0 to {HIGHEST_SCORE:.0f}.")
        texts = [fields[column].strip() for column in columns[: len(task["text"])]]
        rows.append((str(len(rows)) if index is None else fields[index].strip(), texts, label))
    if not rows:
        raise InputError(f"{path} is empty: it has no rows; fetch it again.")
    return rows, broken


def glue_set(rows, task, tokenizer, max_len):
    """Examples: tokens (T,) = [CLS] A [SEP] or [CLS] A [SEP] [SEP] B [SEP], and label (); index and gold beside."""
    def target(label):
        if not task["labels"]:
            return np.float32(float(label or 0) / HIGHEST_SCORE)
        return np.int64(task["labels"].index(label) if label else 0)

    examples = [{"tokens": np.array(tokenizer.encode_pair(*texts, max_len=max_len), np.int32), "label": target(label)}
                for _, texts, label in rows]
    gold = [label if task["labels"] or label is None else float(label) for _, _, label in rows]
    return {"examples": examples, "index": [row[0] for row in rows], "gold": gold}


# --------------------------------------------------------------------------------------------------------------------
# SQuAD's files


def read_squad(path, version):
    """[question], each with id, question, context (one str for all of a paragraph), golds: [(text, start)]."""
    try:
        articles = json.loads(Path(path).read_text(encoding="utf-8-sig"))["data"]
        questions = [{"id": str(qa["id"]), "question": str(qa["question"]), "context": str(paragraph["context"]),
                      "golds": [(str(answer["text"]), answer.get("answer_start")) for answer in qa["answers"]]}
                     for article in articles for paragraph in article["paragraphs"] for qa in paragraph["qas"]]
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON in UTF-8 ({error}); fetch the file again.") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is not in SQuAD's format ({type(error).__name__}: {error}): get it anew.") from None
    if not questions:
        raise InputError(f"{path} is empty: it has no questions; fetch it again.")
    for question in questions:
        if version == "1.1" and not question["golds"]:
            raise InputError(f"{path}: question {question['id']} has no answer, which only SQuAD-2.0 allows.")
    return questions


def offsets(tokenizer, text):
    """Token ids of a text, and the characters (n, 2) of the original text that each covers, from start to before end.

    The tokenizer lowercases character by character, so characters agree; their number of bytes need not. A token may
    be a part of a character; it then covers all of it: "é" in two tokens -> (0, 1), (0, 1).
    """
    ids = tokenizer.encode(text)
    plain = lower(text) if tokenizer.lowercase else text
    character = np.repeat(np.arange(len(plain)), [len(c.encode("utf-8", "surrogatepass")) for c in plain])
    ends = np.cumsum([len(tokenizer.encoding.decode_single_token_bytes(i)) for i in ids], dtype=np.int64)
    assert len(character) == (ends[-1] if ids else 0), "the tokens are not the bytes of the text"
    starts = np.append(0, ends[:-1])[: len(ids)].astype(np.int64)
    return ids, np.stack([character[starts], character[ends - 1] + 1], axis=1).reshape(-1, 2)


def covering(spans, start, end):
    """First and last token (inclusive) of those with these spans (n, 2) that cover the characters start to end."""
    return int(np.searchsorted(spans[:, 1], start, "right")), int(np.searchsorted(spans[:, 0], end, "left")) - 1


def gold_characters(question):
    """(start, end) of the first gold answer that stands where its offset says, without white space around; or None."""
    for text, start in question["golds"]:
        if type(start) is int and start >= 0 and text.strip() and question["context"].startswith(text, start):
            start += len(text) - len(text.lstrip())
            return start, start + len(text.strip())
    return None


def squad_set(questions, tokenizer, max_len, training):
    """Examples, each one window of a question, with the questions beside; and how many answers were misplaced.

    [CLS] question [SEP] [SEP] part of the context [SEP]. tokens (T,); allowed (T,): [CLS], which means no answer, and
    what can begin or end an answer, which white space cannot; span (2,): first and last token of the answer, 0 0 if
    the window does not hold it. Position p is the context's token p + shift. Answers that do not stand where their
    offset says are left out of training.
    """
    examples, kept, misplaced, paragraph = [], [], 0, (None,)
    limit = min(QUESTION, max_len // 2 - 2)
    for question in questions:
        context, span = question["context"], gold_characters(question)
        if training and question["golds"] and span is None:
            misplaced += 1
            continue
        if paragraph[0] is not context:  # questions of a paragraph follow each other
            ids, spans = offsets(tokenizer, context)
            paragraph = context, ids, spans, np.array([not context[s:e].isspace() for s, e in spans], bool)
        _, ids, spans, visible = paragraph
        question |= {"spans": spans, "tokens": covering(spans, *span) if span else None}
        head = tokenizer.encode(question["question"].strip())[:limit]
        head = [tokenizer.cls_id, *head, tokenizer.sep_id, tokenizer.sep_id]
        room = max_len - len(head) - 1
        stride = min(STRIDE, max(1, STRIDE * max_len // SQUAD_LEN), max(1, room // 2))
        for begin in range(0, max(len(ids) - room, 0) + stride, stride):
            part = ids[begin : begin + room]
            allowed = np.zeros(len(head) + len(part) + 1, bool)
            allowed[0] = True
            allowed[len(head) : -1] = visible[begin : begin + room]
            first, last = question["tokens"] or (-1, -1)
            inside = begin <= first and last < begin + len(part)
            examples.append({
                "tokens": np.array([*head, *part, tokenizer.sep_id], np.int32), "allowed": allowed,
                "span": np.array([first, last]) - begin + len(head) if inside else np.zeros(2, np.int64),
                "question": len(kept), "shift": begin - len(head)})
        kept.append(question)
    return {"examples": examples, "questions": kept}, misplaced


def answers(a_set, outputs):
    """The best span over all windows of each question, as text of the original context, and its no-answer odds.

    outputs (windows, 4): best span's score, its first and last position, score of no answer, as best_spans gives them.
    Odds: the smallest score of no answer over the windows - the best span's; above 0 there rather is none.
    """
    best = [(-math.inf, 0, 0)] * len(a_set["questions"])
    null = np.full(len(best), math.inf)
    for example, (score, first, last, nothing) in zip(a_set["examples"], outputs.tolist()):
        q = example["question"]
        null[q] = min(null[q], nothing)
        if score > best[q][0]:
            best[q] = score, int(first) + example["shift"], int(last) + example["shift"]
    texts = [span_text(q, first, last) if score > -math.inf else q["context"].strip()  # a context of white space
             for q, (score, first, last) in zip(a_set["questions"], best)]
    return texts, np.array([min(nothing - score, 1e9) for nothing, (score, _, _) in zip(null, best)])


def span_text(question, first, last):
    return question["context"][question["spans"][first, 0] : question["spans"][last, 1]].strip()


# --------------------------------------------------------------------------------------------------------------------
# All sets of a task


def files_of(name, data_dir):
    """[(train | dev | test, name of the set, path, official rows)] of a task's files; only tests may be missing."""
    task, folder = TASKS[name], Path(data_dir)
    if name.startswith("SQuAD"):
        files = [(split, name, folder / f"{split}-v{name[6:]}.json", n)
                 for split, n in zip(["train", "dev"], task["rows"])]
    else:
        files = [("train", name, folder / name / "train.tsv", task["rows"][0])]
        for set_name, (suffix, *n) in task.get("sets", {name: ("", *task["rows"][1:])}).items():
            files += [("dev", set_name, folder / name / f"dev{suffix}.tsv", n[0]),
                      ("test", set_name, folder / name / f"test{suffix}.tsv", n[1])]
    if name == "MNLI":
        files += [("test", "AX", folder / place, 1104) for place in DIAGNOSTICS if (folder / place).exists()][:1]
    for split, _, path, _ in files:
        if split != "test" and not path.exists():
            raise InputError(f"{path} is not there; {how_to_get(name, folder)}")
    return files


def read_task(name, data_dir, tokenizer, max_len):
    """({"train": {name: set}, "dev": ..., "test": ...} of a task, a checksum of its train and dev files)"""
    task, digest, sets = TASKS[name], hashlib.sha256(), {"train": {}, "dev": {}, "test": {}}
    for split, set_name, path, official in files_of(name, data_dir):
        if not path.exists():
            say(f"{path} is not there: no predictions for the leaderboard.")
            continue
        if name.startswith("SQuAD"):
            questions = read_squad(path, name[6:])
            count = len(questions)
            sets[split][set_name], misplaced = squad_set(questions, tokenizer, max_len, split == "train")
            if misplaced:
                say(f"{path}: {misplaced} of {count:,} questions have no answer that stands where its offset says, so "
                    f"they are left out of training.")
            if misplaced == count:
                raise InputError(f"{path} is empty: none of its answers stands where its offset says.")
        else:
            rows, broken = read_glue(path, task, split != "test")
            count, sets[split][set_name] = len(rows), glue_set(rows, task, tokenizer, max_len)
            if broken:
                say(f"{path}: {broken} broken rows were left out.")
        if count != official:
            say(f"{path}: {count:,} rows, where the official file has {official:,}: scores are not the official ones.")
        if split != "test":
            digest.update(path.read_bytes())
    return sets, digest.hexdigest()


def predictions_of(task, a_set, outputs):
    """What is predicted for a set, from outputs (n, k): label strings, scores, or SQuAD's (texts, odds)."""
    if "questions" in a_set:
        return answers(a_set, outputs)
    return [task["labels"][i] for i in outputs.argmax(1)] if task["labels"] else outputs[:, 0].tolist()


def scores_of(name, a_set, predicted):
    """metric -> score of a set. A constant prediction, which has no correlation, counts as 0."""
    task, gold = TASKS[name], a_set.get("gold")
    if "questions" in a_set:
        version, (texts, odds) = name[6:], predicted
        golds = [[text for text, _ in q["golds"]] for q in a_set["questions"]]
        plain = np.array([squad_scores(g, text, version) for g, text in zip(golds, texts)])
        if version == "1.1":
            return dict(zip(task["metrics"], (100 * plain.mean(0)).tolist()))
        has_answer = np.array([bool(g) for g in golds])
        given = np.where((odds > 0)[:, None], ~has_answer[:, None] * 1.0, plain)  # no answer where that is likelier
        (best_exact, _), (best_f1, threshold) = (best_threshold(column, has_answer, odds) for column in plain.T)
        return dict(zip(task["metrics"], (100 * given.mean(0)).tolist())) | {  # with the threshold that is best on dev
            "best_exact_match": 100 * best_exact, "best_f1": 100 * best_f1, "best_f1_threshold": threshold}
    functions = {"accuracy": accuracy, "matthews": matthews, "pearson": pearson, "spearman": spearman,
                 "f1": lambda gold, predicted: f1_score(gold, predicted, task["labels"][1])}
    scores = {name: functions[name](gold, predicted) for name in task["metrics"]}
    return {name: 0.0 if math.isnan(value) else value for name, value in scores.items()}


def dev_scores(name, sets, predicted):
    """Scores of all dev sets together; of the second one with a suffix: accuracy, accuracy_mismatched."""
    return {metric + ("_mismatched" if set_name == "MNLI-mm" else ""): value for set_name, a_set in sets["dev"].items()
            for metric, value in scores_of(name, a_set, predicted[set_name]).items()}


def selecting(name, scores):
    """The one number that says which state is the best: the mean of the task's selecting metrics."""
    return float(np.mean([scores[metric] for metric in SELECTS.get(name, TASKS[name]["metrics"])]))


def baseline_of(name, sets):
    """Scores on dev of the most frequent answer of train: its class, its mean, its span (or no answer) of SQuAD."""
    labels, train, predicted = TASKS[name].get("labels"), sets["train"][name], {}
    for set_name, dev in sets["dev"].items():
        if "questions" in train:
            span = collections.Counter(q["tokens"] for q in train["questions"]).most_common(1)[0][0]
            texts = [span_text(q, *(min(i, len(q["spans"]) - 1) for i in span or (0, 0))) if len(q["spans"]) else ""
                     for q in dev["questions"]]
            predicted[set_name] = texts, np.full(len(texts), -1.0 if span else 1.0)
        else:
            constant = max(labels, key=train["gold"].count) if labels else float(np.mean(train["gold"]))
            predicted[set_name] = [constant] * len(dev["gold"])
    return dev_scores(name, sets, predicted)


# --------------------------------------------------------------------------------------------------------------------
# Models


class Classifier(nn.Module):
    """Head on [CLS]: dropout -> dense -> tanh -> dropout -> linear. [model; fairseq's has tanh]"""

    def __init__(self, encoder, outputs, dropout):
        super().__init__()
        width = encoder.embeddings.tokens.embedding_dim
        self.encoder, self.dropout = encoder, dropout
        self.dense, self.out = nn.Linear(width, width), nn.Linear(width, outputs)

    def forward(self, batch):
        """tokens (B, T) -> logits (B, outputs)"""
        tokens = batch["tokens"]
        x = self.encoder(tokens, rows=torch.zeros_like(tokens[:, :1]))[:, 0]  # (B, D)
        x = torch.tanh(self.dense(F.dropout(x, self.dropout, self.training)))
        return self.out(F.dropout(x, self.dropout, self.training)).float()


class SpanFinder(nn.Module):
    """SQuAD's head: one logit for start, one for end, at every token that is allowed. [model]"""

    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.out = encoder, nn.Linear(encoder.embeddings.tokens.embedding_dim, 2)

    def forward(self, batch):
        """tokens, allowed (B, T) -> logits (B, T, 2), -inf where it is not allowed"""
        logits = self.out(self.encoder(batch["tokens"])).float()
        return logits.masked_fill(~batch["allowed"][..., None], -math.inf)


def build(name, config, dropout, seed, weights=None):
    """The model of a task: the main Transformer, with these weights or untrained, under the task's head."""
    torch.manual_seed(seed)
    encoder = COCOLM(config).main
    if weights:
        encoder.load_state_dict(weights)
    encoder.dropout = dropout
    if name.startswith("SQuAD"):
        model, heads = SpanFinder(encoder), ("out",)
    else:
        model, heads = Classifier(encoder, len(TASKS[name]["labels"]) or 1, dropout), ("dense", "out")
    for head in heads:
        nn.init.normal_(getattr(model, head).weight, std=0.02)
        nn.init.zeros_(getattr(model, head).bias)
    return model


def load_finetuned(path, device="cpu"):
    """(the model in evaluation mode, its Tokenizer, the name of its task) of a best.pt or last.pt."""
    parts = {"model": dict, "config": dict, "settings": dict, "task": str, "step": int, "tokenizer": dict}
    saved = read_checkpoint(path, parts, "finetune.py")
    try:
        model = build(saved["task"], Config(**saved["config"]), saved["settings"]["dropout"], 0)
        model.load_state_dict(saved["model"])
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise InputError(f"{path} does not fit this finetune.py: {' '.join(str(error).split())[:300]}.") from None
    return model.to(device).eval(), Tokenizer.from_state(saved["tokenizer"], path), saved["task"]


def losses_of(logits, batch):
    """Loss of each example, (B,): cross-entropy, squared error, or (start + end) / 2 of SQuAD. [model]"""
    if "span" in batch:
        start, end = (F.cross_entropy(logits[..., i], batch["span"][:, i], reduction="none") for i in (0, 1))
        return (start + end) / 2
    if batch["label"].is_floating_point():
        return (logits[:, 0] - batch["label"]).square()
    return F.cross_entropy(logits, batch["label"], reduction="none")


def best_spans(logits, longest):
    """(B, T, 2) -> (B, 4): score, first and last position of the best span of at most `longest` tokens, and the score
    of no answer, which is position 0. A span's score is its start logit + its end logit."""
    start, end = logits.unbind(-1)  # (B, T)
    T = start.shape[1]
    sums = start[:, :, None] + end[:, None, :]  # (B, T, T)
    length = torch.arange(T, device=logits.device)[None, :] - torch.arange(T, device=logits.device)[:, None] + 1
    banned = (length < 1) | (length > longest)
    banned[0] = True
    score, place = sums.masked_fill(banned, -math.inf).flatten(1).max(1)
    return torch.stack([score, place // T, place % T, start[:, 0] + end[:, 0]], 1)  # float32: exact up to 2**24


# --------------------------------------------------------------------------------------------------------------------
# Batches


def batches(lengths, batch_size, *seeds):
    """Indices of all examples once, in batches of similar lengths, in a random order that the seeds decide."""
    random = np.random.default_rng(seeds)
    order, pool, found = random.permutation(len(lengths)), batch_size * POOL, []
    for begin in range(0, len(order), pool):
        part = order[begin : begin + pool]
        part = part[np.argsort(lengths[part], kind="stable")]
        found += [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
    return [found[i] for i in random.permutation(len(found))]


def collate(examples, pad_id):
    """Examples as one batch, padded to the longest: tokens and allowed (B, T), label (B,), span (B, 2)."""
    T = max(len(example["tokens"]) for example in examples)
    batch = {"tokens": np.full((len(examples), T), pad_id, np.int64)}
    for row, example in enumerate(examples):
        batch["tokens"][row, : len(example["tokens"])] = example["tokens"]
    if "allowed" in examples[0]:
        batch["allowed"] = np.stack([np.pad(e["allowed"], (0, T - len(e["allowed"]))) for e in examples])
    return batch | {name: np.stack([e[name] for e in examples]) for name in ("label", "span") if name in examples[0]}


@torch.no_grad()
def predict(model, examples, pad_id, where, batch_size=EVAL_BATCH):
    """Outputs of all examples, (n, k) on every process: logits, a score from 0 to 5, or best_spans of SQuAD."""
    device, autocast = where
    model.eval()
    order = np.argsort([len(example["tokens"]) for example in examples], kind="stable")
    parts = [order[i : i + batch_size] for i in range(0, len(order), batch_size)][rank() :: world()]
    found = []
    for part in parts:
        batch = to_device(collate([examples[i] for i in part], pad_id), device)
        with autocast():
            logits = model(batch)
        if "allowed" in batch:
            logits = best_spans(logits, LONGEST_ANSWER)
        elif batch["label"].is_floating_point():
            logits = logits * HIGHEST_SCORE
        found.append((part, logits.cpu().double().numpy()))
    if world() > 1:
        everyones = [None] * world()
        dist.all_gather_object(everyones, found)
        found = [pair for each in everyones for pair in each]
    outputs = np.empty((len(examples), found[0][1].shape[1]))
    for part, values in found:
        outputs[part] = values
    return outputs


# --------------------------------------------------------------------------------------------------------------------
# One run


def shown(scores, baseline):
    return "  ".join(f"{name} {value:.4f}" + (f" ({baseline[name]:.4f})" if "threshold" not in name else "")
                     for name, value in scores.items())


def fine_tune(name, settings, start, sets, baseline, seed, where):
    """One run. -> its record for results.json, the model, and best and last: states with scores and dev predictions."""
    began, device, autocast = time.time(), *where
    examples, pad_id = sets["train"][name]["examples"], start["config"].pad_id
    model = build(name, start["config"], settings["dropout"], seed, start["weights"]).to(device)
    optimizer = make_optimizer(model, settings, device)
    scaler = torch.amp.GradScaler(device.type, enabled=settings["dtype"] == "float16")
    ddp = model
    if world() > 1:
        ddp = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)
    lengths, size = np.array([len(example["tokens"]) for example in examples]), settings["batch_size"]
    per_epoch = math.ceil(len(examples) / size)
    total = per_epoch * settings["epochs"]
    schedule = {"learning_rate": settings["learning_rate"], "max_steps": total,
                "warmup_steps": round(settings["warmup_fraction"] * total)}
    progress = Progress(f"{name}, seed {seed}", settings["epochs"] * len(examples), "examples", 1)
    best, step, done, training = None, 0, 0, 0.0
    running, steps_since, since = torch.zeros((), device=device), 0, time.time()
    for epoch in range(settings["epochs"]):
        for indices in batches(lengths, size, seed, epoch):
            mine = indices[rank() :: world()]  # none, if the batch is smaller than the number of processes
            batch = to_device(collate([examples[i] for i in (mine if len(mine) else indices[:1])], pad_id), device)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(step, schedule)
            seed_pass(seed, step, rank(), 0)
            ddp.train()
            with autocast():
                logits = ddp(batch)
            loss = losses_of(logits, batch).sum() * (len(mine) > 0) / len(indices)  # a share of the batch's mean
            scaler.scale(loss * world()).backward()  # DDP takes the mean over processes
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            running, steps_since, step, done = running + loss.detach(), steps_since + 1, step + 1, done + len(indices)
            if rank() == 0:
                progress(done)
            if 2 * step // per_epoch == 2 * (step - 1) // per_epoch:
                continue
            mean = sum_over_processes(running).item() / steps_since
            training += time.time() - since
            if not math.isfinite(mean):
                raise InputError(f"{name}, seed {seed}: the loss is {mean} at step {step}: lower the --learning_rate.")
            predicted = {n: predictions_of(TASKS[name], dev, predict(model, dev["examples"], pad_id, where))
                         for n, dev in sets["dev"].items()}
            last = {"scores": dev_scores(name, sets, predicted), "predicted": predicted, "step": step}
            better = best is None or selecting(name, last["scores"]) > selecting(name, best["scores"])
            if better:
                best = {**last, "model": {n: value.cpu().clone() for n, value in model.state_dict().items()}}
            if rank() == 0:
                progress.end()
            say(f"  seed {seed}  epoch {step / per_epoch:5.2f}  step {step:,}/{total:,}  loss {mean:.4f}  "
                f"{shown(last['scores'], baseline)}{'  best' * better}")
            running, steps_since, since = torch.zeros((), device=device), 0, time.time()
    last["model"] = {n: value.cpu().clone() for n, value in model.state_dict().items()}
    record = {"seed": seed, "metrics": best["scores"], "best_step": best["step"], "last": last["scores"],
              "steps": total, "seconds": round(time.time() - began, 3),
              "examples_per_second": round(done / training, 2)}
    return record, model, best, last


# --------------------------------------------------------------------------------------------------------------------
# What is written


def put(path, content):
    """Writes a text, or an object by torch.save, so that the file is there completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        if isinstance(content, str):
            file.write(content.encode("utf-8", "surrogatepass"))
        else:
            torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def table(header, rows):
    return "".join("\t".join(row) + "\n" for row in [header, *rows])


def write_predictions(folder, sets, dev, test):
    """The leaderboard's files from `test`, set name -> predictions, and beside them the dev sets' at full precision."""
    for name, values in test.items():  # as the GLUE server takes them
        said = [v if isinstance(v, str) else f"{min(max(v, 0.0), HIGHEST_SCORE):.3f}" for v in values]
        put(folder / f"{name}.tsv", table(["index", "prediction"], zip(sets["test"][name]["index"], said)))
    for name, values in dev.items():
        a_set = sets["dev"][name]
        if "questions" in a_set:
            (values, odds), index = values, [q["id"] for q in a_set["questions"]]
            if name == "SQuAD-2.0":  # no answer where that is likelier; the odds are for the official script
                values = ["" if o > 0 else text for text, o in zip(values, odds)]
                put(folder / "null_odds.json", json.dumps(dict(zip(index, odds.tolist())), indent=1) + "\n")
            put(folder / "predictions.json", json.dumps(dict(zip(index, values)), indent=1) + "\n")
            golds = [json.dumps([text for text, _ in q["golds"]]) for q in a_set["questions"]]
            rows = zip(index, (" ".join(v.split()) for v in values), golds)
        else:
            rows = zip(a_set["index"], map(str, values), map(str, a_set["gold"]))
        put(folder / f"{name}.dev.tsv", table(["index", "prediction", "gold"], rows))


def finished_runs(folder, decisive, overwrite):
    """Records of the seeds that results.json has; refuses to mix those of other settings with ours."""
    path = folder / "results.json"
    if overwrite or not path.exists():
        return []
    try:
        before = json.loads(path.read_text())
        runs, settings = before["runs"], before["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error}); choose another --out_dir, or say --overwrite=True.") from None
    other = [f"{name}={settings.get(name)}, now {now}" for name, now in decisive.items() if settings.get(name) != now]
    if other:
        raise InputError(f"{path} holds results of other settings ({'; '.join(other)}): choose another --out_dir, or "
                         f"say --overwrite=True.")
    return runs


def best_run(runs, name):
    """The first of those with the highest score on dev: its model and predictions are kept."""
    return max(runs, key=lambda run: selecting(name, run["metrics"]))


def summary(name, runs, baseline, settings, sets, start):
    """results.json of the finished runs: metrics are their medians."""
    columns = {metric: [run["metrics"][metric] for run in runs] for metric in runs[0]["metrics"]}
    seconds = sum(run["seconds"] for run in runs)
    speed = len(runs) / sum(1 / run["examples_per_second"] for run in runs)
    train = sets["train"][name]
    return {"task": name, "metrics": {metric: float(np.median(values)) for metric, values in columns.items()},
            "minimum": {metric: min(values) for metric, values in columns.items()},
            "maximum": {metric: max(values) for metric, values in columns.items()},
            "seeds": len(runs), "baseline": baseline, "examples": len(train.get("questions", train["examples"])),
            "seconds": round(seconds, 3), "examples_per_second": round(speed, 2), "step": start["step"],
            "checksum": start["checksum"], "init_from": start["path"], "settings": settings, "runs": runs}


# --------------------------------------------------------------------------------------------------------------------
# The command


def settle(argv):
    """All settings; None where the table of tasks decides."""
    options = read_constants(__file__, globals(), ALLOWED)
    given, others = parse_options(argv, options, __doc__)
    if others:
        raise InputError(f"unexpected {others[0]!r}: options are written --name=value.")
    in_file = {name: None if value is None and name in FROM_TABLE else checked(name, value, allowed)
               for name, (value, allowed, _) in options.items()}
    return {**in_file, **given}


def open_start(asked):
    """What fine-tuning starts from: config and tokenizer, weights of the main Transformer (None: untrained), its path,
    step and checksum, and a fingerprint, so that results of another start are never mixed in."""
    path, step, checksum, weights = asked["init_from"], 0, None, None
    source = asked["tokenizer_from"] if path == "scratch" else path
    if path == "scratch" and not Path(source).is_file():
        read_meta(source)
        tokenizer, config = Tokenizer.load(source), None
    else:
        checkpoint = read_checkpoint(source)
        tokenizer = Tokenizer.from_state(checkpoint["tokenizer"], source)
        model = restore(checkpoint, source)
        config = model.config
        if (config.vocab_size, config.pad_id) != (tokenizer.vocab_size, tokenizer.pad_id):
            raise InputError(f"{source}: its model has a vocabulary of {config.vocab_size} tokens, its tokenizer of "
                             f"{tokenizer.vocab_size}: they do not belong together.")
    if path != "scratch":
        step, weights = checkpoint["step"], model.main.state_dict()
        with open(path, "rb") as file:
            fingerprint = checksum = hashlib.file_digest(file, "sha256").hexdigest()
    else:
        if config is None or asked["preset"]:
            config = Config.from_preset(asked["preset"] or "tiny", vocab_size=tokenizer.vocab_size,
                                        pad_id=tokenizer.pad_id, mask_id=tokenizer.mask_id)
        shape = json.dumps([dataclasses.asdict(config), tokenizer.state()], sort_keys=True)
        fingerprint = f"untrained {hashlib.sha256(shape.encode()).hexdigest()}"
    return {"config": config, "tokenizer": tokenizer, "weights": weights, "path": path, "step": step,
            "checksum": checksum, "fingerprint": fingerprint}


def settings_of(name, asked, config, dtype):
    """The settings of one task: what was asked for, the table's values for the rest."""
    batch, rate, epochs, warmup = TASKS[name]["large" if config.width >= PRESETS["large++"]["width"] else "base"]
    longest = SQUAD_LEN if name.startswith("SQuAD") else 512
    table = {"batch_size": batch, "learning_rate": rate * 1e-5, "epochs": epochs, "warmup_fraction": warmup,
             "max_len": min(longest, config.max_len)}
    settings = {**asked, **{key: value for key, value in table.items() if asked[key] is None}, "dtype": dtype}
    if settings["max_len"] > config.max_len:
        raise InputError(f"max_len={settings['max_len']} is more than the model's {config.max_len} positions: choose a "
                         f"smaller --max_len.")
    return settings


def run_task(name, asked, start, where, dtype):
    """All seeds of one task; returns its results."""
    folder, pad_id = Path(asked["out_dir"], name), start["config"].pad_id
    settings = together(settings_of, name, asked, start["config"], dtype)
    sets, data_sum = together(read_task, name, asked["data_dir"], start["tokenizer"], settings["max_len"])
    decisive = {key: settings[key] for key in DECISIVE} | {"model": start["fingerprint"], "data": data_sum}
    runs = on_first(finished_runs, folder, decisive, asked["overwrite"])
    on_first(lambda: folder.mkdir(parents=True, exist_ok=True))  # if it cannot be written to, that is known now
    baseline, train = baseline_of(name, sets), sets["train"][name]["examples"]
    full = sum(len(example["tokens"]) == settings["max_len"] for example in train)
    say(f"\n{name} from {start['path']}, step {start['step']:,}: {len(train):,} training sequences, {full:,} of them "
        f"as long as max_len {settings['max_len']}\n  "
        + ", ".join(f"{key} {settings[key]:.4g}" for key in DECISIVE[:5]) + f"; {where[0].type}, {dtype}, "
        f"processes {world()}\n  in brackets: the baseline, what always saying the "
        f"{'mean' if name == 'STS-B' else 'most frequent answer'} of train scores on dev")
    for seed in range(asked["seed"], asked["seed"] + asked["seeds"]):
        before = next((run for run in runs if run["seed"] == seed), None)
        if before:
            say(f"  seed {seed}  finished before  {shown(before['metrics'], baseline)}")
            continue
        record, model, best, last = fine_tune(name, settings, start, sets, baseline, seed, where)
        runs, test = sorted([*runs, record], key=lambda run: run["seed"]), {}
        if best_run(runs, name) is record:
            model.load_state_dict(best["model"])
            test = {n: predictions_of(TASKS[name], s, predict(model, s["examples"], pad_id, where))
                    for n, s in sets["test"].items()}
        results = summary(name, runs, baseline, decisive, sets, start)

        def write():
            if best_run(runs, name) is record:
                write_predictions(folder / "predictions", sets, best["predicted"], test)
                common = {"config": dataclasses.asdict(start["config"]), "tokenizer": start["tokenizer"].state(),
                          "task": name, "settings": decisive, "seed": seed}
                for file_name, state in (("best.pt", best), ("last.pt", last)):
                    put(folder / file_name, {**common, **{key: state[key] for key in ("model", "step", "scores")}})
            put(folder / "results.json", json.dumps(results, indent=1) + "\n")  # at last: its seeds are finished

        on_first(write)
        if selecting(name, record["metrics"]) <= selecting(name, baseline) + 1e-9:
            say(f"warning: {name}, seed {seed} ends at the baseline, so it learned nothing that shows; try a larger "
                f"--learning_rate or more --epochs: small models want both.")
    results = summary(name, runs, baseline, decisive, sets, start)
    for metric, median in results["metrics"].items():
        spread = f", from {results['minimum'][metric]:.4f} to {results['maximum'][metric]:.4f} over {len(runs)} seeds"
        say(f"{name}  {shown({metric: median}, baseline)}{spread * (len(runs) > 1)}")
    best = best_run(runs, name)
    say(f"{folder}/best.pt and predictions/: seed {best['seed']}, step {best['best_step']:,} of {best['steps']:,}, "
        f"chosen by its score on dev, as all scores above are; last.pt: the same seed at its end")
    return results


def main():
    keep_memory()
    if "RANK" in os.environ and not dist.is_initialized():
        join()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    asked = together(settle, sys.argv[1:])
    device = together(choose_device, asked)
    dtype = together(choose_dtype, asked, device)
    start = together(open_start, asked)

    def autocast():
        return torch.autocast(device.type, dtype) if dtype != torch.float32 else contextlib.nullcontext()

    names = [asked["task"]]
    if asked["task"] == "GLUE":
        names = [name for name in PAPERS_EIGHT if Path(asked["data_dir"], name).exists()]
        if not names:
            raise InputError(f"{asked['data_dir']} holds none of {', '.join(PAPERS_EIGHT)}; CoLA, for one: "
                             f"{how_to_get('CoLA', asked['data_dir'])}")
        say(f"of the paper's eight tasks, {asked['data_dir']} holds {len(names)}: {', '.join(names)}")
        for name in names:  # a file that is missing is known now, not after hours of other tasks
            together(files_of, name, asked["data_dir"])
    results = {name: run_task(name, asked, start, (device, autocast), str(dtype)[6:]) for name in names}
    line = {key: value for key, value in results[names[-1]].items() if key not in ("settings", "runs")}
    if asked["task"] == "GLUE":
        average = {"metrics": {}, "baseline": {}}
        for key in average:
            each = {name: selecting(name, result[key]) for name, result in results.items()}
            average[key] = {"average": float(np.mean(list(each.values()))), **each}
        line = {key: line[key] for key in ("seeds", "step", "checksum", "init_from")} | {"task": "GLUE", **average}
        line |= {key: sum(result[key] for result in results.values()) for key in ("examples", "seconds")}
        line["examples_per_second"] = round(len(names) / sum(1 / r["examples_per_second"] for r in results.values()), 2)
        say("\n" + "\n".join(f"  {name:8} {value:.4f} ({average['baseline'][name]:.4f})"
                             for name, value in average["metrics"].items()))
        on_first(put, Path(asked["out_dir"], "GLUE", "results.json"), json.dumps(line, indent=1) + "\n")
    say(json.dumps(line))


if __name__ == "__main__":
    try:
        run_command(main, quiet=lambda: rank() != 0)
    except RuntimeError as error:
        if "out of memory" not in str(error) and "allocate memory" not in str(error):
            raise
        print(f"finetune.py: process {rank()} is out of memory: lower --batch_size or --max_len.", file=sys.stderr)
        sys.exit(1)
