"""The comparisons of the paper, at a size that a laptop can train.

    python tests/study.py run --glue_dir=GLUE   trains and evaluates all rows; what is finished is skipped
    python tests/study.py draw                  CSVs and figures in assets/, from assets/study/ alone

`run` needs the corpus data/wiki_books, which data.py makes (command in tests/README.md), and GLUE's files. A
row is one pretraining run: train.py, finetune.py, and measures of the frozen model. It ends as one small file
in assets/study/PRESET/ with options, log and scores, which `run` skips by and `draw` reads. `run` can be
killed at any moment; the same command goes on. All rows of a seed see the same batches, and run on one kind
of processor. On CPUs, each row has one thread, in float32; on GPUs, torchrun trains one row on all of them.
"""

import csv
import ctypes
import functools
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import finetune  # noqa: E402
from data import InputError, Parser, Tokenizer, run_command, tell  # noqa: E402
from model import COCOLM, PRESETS, Config, flops  # noqa: E402
from train import load_checkpoint, write_file  # noqa: E402

preset: Literal[tuple(PRESETS)] = "tiny"  # sizes and schedule of all rows
steps: Annotated[int, 40, 10**9] = 10_000  # optimizer steps of a whole row
seeds: Annotated[int, 1, 10] = 3  # pretraining seeds of the main rows: 1, 2, ...
parts: str = "main,efficiency,small,ablations"  # what to run, in this order
dataset: str = "wiki_books"  # the corpus data_dir/dataset
data_dir: str = "data"  # folder of all corpora
glue_dir: str = "data/glue"  # folder of CoLA/, SST-2/, ...
work_dir: str = "out/study"  # checkpoints and outputs of the rows
results_dir: str = str(ROOT / "assets" / "study")  # records of the finished rows

# What was fixed before any comparison (tests/README.md: how). Other presets have their own schedule, and the
# authors' fine-tuning
SETUP = {"tiny": dict(max_len=64, batch_size=32, micro_batch_size=32, learning_rate=1.5e-3, eval_batches=32)}
FINE_TUNING = {"tiny": {"all": dict(learning_rate=5e-4, epochs=10),
                        "SST-2": dict(learning_rate=5e-4, epochs=2)}}
TWICE, ONCE_EACH = ("STS-B", "CoLA"), ("SST-2", "MRPC", "RTE")  # fine-tuning seeds; the latter for seed 1
PROBED = 10_000  # training examples of a linear probe, at most
DECAYS = (1e-3, 1e-2, 1e-1, 1)  # from which a probe chooses
BINS = 50  # of the histograms of cosines, from -1 to 1

MAIN = {"COCO-LM": "", "RTD": "--token_task=rtd --contrastive=False", "CLM": "--contrastive=False",
        "MLM": "--token_task=mlm --contrastive=False"}
ONE_SEED = {"RTD + SCL": "--token_task=rtd",
            "all-token MLM": "--token_task=all_token_mlm --contrastive=False"}
ABLATIONS = {
    "no relative positions": "--relative_positions=False", "random replacements": "--corruption=random",
    "frozen auxiliary": "--corruption=frozen --auxiliary_from={auxiliary}",
    "narrow auxiliary": "--auxiliary_layers={layers} --auxiliary_width={narrow}",
    "deeper auxiliary": "--auxiliary_layers={deeper}", "no copy mechanism": "--copy_mechanism=False",
    "no stop-gradient": "--stop_gradient=False", "weighted LM loss": "--lm_loss=weighted",
} | {f"{name} {value}": f"--{name}={value}" for name, values in {
    "crop": (0.5, 0.7, 1.0), "temperature": (0.05, 0.1), "lambda_copy": (1, 10)}.items() for value in values}
ASSETS = ROOT / "assets"
LOGGED = ["mlm_loss", "copy_loss", "lm_loss", "scl_loss", "copy_auc", "copy_accuracy_original",
          "copy_accuracy_replaced", "lm_accuracy_replaced", "alignment", "uniformity", "mean_cosine"]

# ------------------------------------------------------------------------------------------------------------
# run. A row is a dict of part, name, options, seed and steps.


def plan(args):
    """All rows in the order in which they run: seed by seed, so that a stopped study has whole seeds."""
    rows, all_seeds = [], range(1, args.seeds + 1)
    for seed in all_seeds:
        rows.append(("main", "untrained", "--learning_rate=0", seed, 1))
        rows += [("main", *row, seed, args.steps) for row in (MAIN | (ONE_SEED if seed == 1 else {})).items()]
    rows += [("efficiency", name, MAIN[name], seed, args.steps // part)
             for seed in all_seeds for part in (2, 4) for name in ("RTD", "COCO-LM")]
    rows += [("small", f"relative_init {init}", f"--relative_init={init}", seed, args.steps // 3)
             for seed in all_seeds[:2] for init in ("normal", "local")]
    rows += [("ablations", *row, 1, args.steps // 2) for row in ABLATIONS.items()]
    return [dict(zip(("part", "name", "options", "seed", "steps"), row)) for row in rows]


def file_name(name, steps, seed):
    return f"{re.sub('[^a-z0-9.]+', '-', name.lower())}-{steps}-{seed}"


def processor():
    """The kind of processor or GPU; on another kind the last bits differ."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    found = re.search(r"model name\s*: (.*)", lines)
    return f"{found[1] if found else platform.processor()}, {torch.backends.cpu.get_cpu_capability()}"


def die_with_parent():
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def call(folder, program, *options):
    """Runs train.py or finetune.py; its output goes to folder/said.txt. -> its last line if it failed"""
    gpus = torch.cuda.device_count()
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"] if gpus else []
    one_thread = {} if gpus else {"OMP_NUM_THREADS": "1"}
    options = [*options, *([] if gpus else ["--dtype=float32"])]
    with open(folder / "said.txt", "a+", encoding="utf-8") as said:
        print("$ python", program, *options, file=said, flush=True)
        done = subprocess.run([sys.executable, *start, ROOT / program, *options], stdout=said, stderr=said,
                              env=os.environ | one_thread, preexec_fn=die_with_parent)
        said.seek(0)
        return said.read().strip().splitlines()[-1] if done.returncode else ""


def train_options(row, args):
    """The options of train.py that decide what a row learns."""
    every, c = max(row["steps"] // 20, 1), PRESETS[args.preset]  # 20 points of each curve
    auxiliary = Path(args.work_dir, file_name("COCO-LM", args.steps, 1), "ckpt.pt")
    changes = row["options"].format(auxiliary=auxiliary, layers=c["layers"], deeper=c["auxiliary_layers"] + 1,
                                    narrow=round(c["width"] / c["heads"] / 3) * c["heads"]).split()
    common = {"preset": args.preset, "dataset": args.dataset, "seed": row["seed"], "max_steps": row["steps"],
              "warmup_steps": row["steps"] // 10, "eval_interval": every, **SETUP.get(args.preset, {})}
    return [f"--{name}={value}" for name, value in common.items()] + changes


def run_row(row, args):
    """Trains, fine-tunes and measures a row, and writes its record -> a sentence"""
    name, options = file_name(row["name"], row["steps"], row["seed"]), train_options(row, args)
    folder, record = Path(args.work_dir, name), Path(args.results_dir, args.preset, f"{name}.json")
    folder.mkdir(parents=True, exist_ok=True)
    problem = call(folder, "train.py", *options, f"--data_dir={args.data_dir}", f"--out_dir={folder}",
                   "--init_from=resume_or_scratch", f"--checkpoint_interval={max(row['steps'] // 20, 1)}")
    if problem and "not finite" not in problem:
        return f"{name} failed: {problem}"
    header, *lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    val = [line for line in lines if line["split"] == "val"]
    c, sequences = Config(**header["config"]), row["steps"] * header["constants"]["batch_size"]
    result = row | {"options": options, "processor": processor(), "versions": header["versions"],
                    "date": header["date"], "seconds": lines[-1]["seconds"], "flops": flops(c) * sequences,
                    "failed": problem, "fine_tuning": FINE_TUNING.get(args.preset, {}), "scores": {},
                    "log": {key: [float(f"{line[key] or 0:.4g}") for line in val]
                            for key in ["step", *LOGGED] if key in val[-1]}}
    tasks = {} if row["part"] == "small" or problem else dict.fromkeys(TWICE, 2)
    if row["part"] == "main" and row["seed"] == 1:
        tasks |= dict.fromkeys(ONCE_EACH, 1)
    for task, count in tasks.items():
        tuning = result["fine_tuning"].get(task, result["fine_tuning"].get("all", {}))
        if problem := call(folder, "finetune.py", f"--task={task}", f"--init_from={folder / 'ckpt.pt'}",
                           f"--data_dir={args.glue_dir}", f"--out_dir={folder / 'finetune'}",
                           f"--seeds={count}", *(f"--{name}={value}" for name, value in tuning.items())):
            return f"{name} failed in {task}: {problem}"
        runs = json.loads((folder / "finetune" / task / "results.json").read_bytes())["runs"]
        metric = finetune.TASKS[task]["metrics"][0]
        result["scores"][task] = [round(run["metrics"][metric], 5) for run in runs]
    if tasks:
        model, tokenizer = load_checkpoint(folder / "ckpt.pt")
        result["cosines"] = {}
        for kind, of in {"[CLS]": cls_vectors, "mean": COCOLM.embed}.items():
            found, result["cosines"][kind] = measure(lambda texts: of(model, tokenizer.batch(texts)), args)
            result["scores"] |= {f"{score}, {kind}": value for score, value in found.items()}
    write_file(record, json.dumps(result) + "\n")
    return f"{name} is finished"


def run(args):
    """Runs what has no record yet, one row a core."""
    folder, jobs, elsewhere = Path(args.results_dir, args.preset), [], set()
    folder.mkdir(parents=True, exist_ok=True)
    records = {file_name(r["name"], r["steps"], r["seed"]): r for r in read_records(args)}
    for row in (row for row in plan(args) if row["part"] in args.parts.split(",")):
        done = records.get(file_name(row["name"], row["steps"], row["seed"]))
        others = {r["processor"] for r in records.values() if r["seed"] == row["seed"]} - {processor()}
        if done and done["options"] != train_options(row, args):
            raise InputError(f"{folder} has {row['name']}, seed {row['seed']}, of other options "
                             f"({' '.join(done['options'])}): choose another --results_dir.")
        elif not done and others:
            elsewhere.add(f"{row['seed']} on {', '.join(others)}")
        elif not done:
            jobs.append(row)
    tell(f"{processor()}: {len(jobs)} rows to run", *(f"; seeds of another processor are left out: {seed}"
                                                      for seed in sorted(elsewhere)))
    if file_name("bag of words", 0, 0) not in records:
        write_bag(folder, args)
    torch.set_num_threads(1)
    began, progress = time.monotonic(), 0
    with ThreadPoolExecutor(1 if torch.cuda.device_count() else os.cpu_count()) as pool:
        for sentence in pool.map(lambda row: run_row(row, args), jobs):
            progress += 1
            left = (time.monotonic() - began) / progress * (len(jobs) - progress)
            tell(f"{sentence}; {progress} of {len(jobs)}, about {timedelta(seconds=round(left))} left")


# ------------------------------------------------------------------------------------------------------------
# Measures of vectors: a function from a list of texts to (n, D), of length 1


def cls_vectors(model, tokens):
    """The hidden states of [CLS]. Sorted by length, in batches."""
    lengths = (tokens != model.config.pad_id).sum(1)
    vectors = torch.empty(len(tokens), model.config.width)
    for rows in lengths.argsort().split(64):
        part = tokens[rows, : lengths[rows].max()]
        vectors[rows] = model.main(part, rows=torch.zeros(len(part), 1, dtype=torch.long))[:, 0]
    return F.normalize(vectors, dim=-1)


def bag_vectors(tokenizer, texts):
    """How often each token occurs."""
    ids = [torch.tensor(tokenizer.encode(text)) for text in texts]
    return F.normalize(torch.stack([torch.bincount(i, minlength=tokenizer.vocab_size) for i in ids]).float())


def glue(task, split, args):
    """The texts of a split of GLUE, a list for each column, and the labels as numbers."""
    row = {"name": task, **finetune.TASKS[task]}
    rows = finetune.read_glue(Path(args.glue_dir, task, f"{split}.tsv"), row, split)
    number = row["labels"].index if row["labels"] else float
    return [list(column) for column in zip(*(t for _, t, _ in rows))], np.array([number(y) for *_, y in rows])


def probe(train, labels, dev):
    """Classes of dev by logistic regression; the last tenth of train chooses its weight decay."""
    mean = train.mean(0)
    scale = (train - mean).square().mean().sqrt() + 1e-6
    train, dev, labels = (train - mean) / scale, (dev - mean) / scale, torch.from_numpy(labels).float()

    def logits(x, y, wanted, decay):
        weight, bias = torch.zeros(x.shape[1], requires_grad=True), torch.zeros(1, requires_grad=True)
        optimizer = torch.optim.LBFGS([weight, bias], max_iter=50, line_search_fn="strong_wolfe")

        def loss():
            optimizer.zero_grad()
            value = F.binary_cross_entropy_with_logits(x @ weight + bias, y) + decay * weight.square().sum()
            value.backward()
            return value

        optimizer.step(loss)
        return (wanted @ weight + bias).detach()

    kept = len(train) * 9 // 10
    losses = {decay: F.binary_cross_entropy_with_logits(
        logits(train[:kept], labels[:kept], train[kept:], decay), labels[kept:]) for decay in DECAYS}
    return (logits(train, labels, dev, min(losses, key=losses.get)) > 0).long().numpy()


@torch.no_grad()
def measure(vectors, args):
    """Scores, and histograms of the cosines of STS-B's training pairs: those of human scores from 4.8, and
    random ones."""
    (a, b), gold = glue("STS-B", "dev", args)
    cosine = (vectors(a) * vectors(b)).sum(1).numpy()
    scores = {"STS-B zero-shot": finetune.spearman(gold, cosine)}
    for task in ("SST-2", "CoLA"):
        (texts,), labels = glue(task, "train", args)
        (dev,), wanted = glue(task, "dev", args)
        train, dev = vectors(texts[:PROBED]), vectors(dev)
        with torch.enable_grad():
            found = probe(train, labels[:PROBED], dev)
        scores[f"{task} probe"] = finetune.METRICS[finetune.TASKS[task]["metrics"][0]](wanted, found)
    (a, b), gold = glue("STS-B", "train", args)
    a, b = vectors(a), vectors(b)
    each = {"similar": (a * b).sum(1)[gold >= 4.8], "random": (a * b.roll(1, 0)).sum(1)}
    return ({name: round(score, 5) for name, score in scores.items()},
            {name: torch.histc(x.clamp(-1, 1), BINS, -1, 1).int().tolist() for name, x in each.items()})


def write_bag(folder, args):
    """The record of a bag of words: what a pair's cosine, and logistic regression, give without a model."""
    tokenizer = Tokenizer.load(Path(args.data_dir, args.dataset))
    vectors = functools.partial(bag_vectors, tokenizer)
    scores, cosines = measure(vectors, args)
    found = {f"{name}, bag": score for name, score in scores.items()}
    found |= {task: [scores[f"{task} probe"]] for task in ("SST-2", "CoLA")}
    (a, b), gold = glue("STS-B", "dev", args)
    found["STS-B"] = [round(finetune.pearson(gold, (vectors(a) * vectors(b)).sum(1).numpy()), 5)]
    for task in ("MRPC", "RTE"):
        sets = {}
        for split in ("train", "dev"):
            (a, b), labels = glue(task, split, args)
            a, b = vectors(a), vectors(b)
            sets[split] = torch.cat([a * b, (a - b).abs(), (a * b).sum(1, keepdim=True)], 1), labels
        predicted = probe(*sets["train"], sets["dev"][0])
        found[task] = [round(finetune.accuracy(sets["dev"][1], predicted), 5)]
    write_file(folder / f"{file_name('bag of words', 0, 0)}.json", json.dumps(
        {"part": "main", "name": "bag of words", "seed": 0, "steps": 0, "flops": 0, "seconds": 0, "log": {},
         "processor": processor(), "scores": found, "cosines": {"bag": cosines}}) + "\n")


def read_records(args):
    files = sorted(Path(args.results_dir, args.preset).glob("*.json"))
    return [json.loads(path.read_bytes()) for path in files]


# ------------------------------------------------------------------------------------------------------------
# draw

T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t: the mean of n values is known to t sd / root n
CONTRASTS = [("CLM", "MLM"), ("CLM", "RTD"), ("COCO-LM", "CLM"), ("COCO-LM", "RTD"), ("COCO-LM", "MLM"),
             ("CLM", "all-token MLM"), ("COCO-LM", "RTD + SCL"), ("COCO-LM", "untrained")]
COLOURS = {"COCO-LM": "#3d85c6", "CLM": "#3f9b5b", "RTD": "#d9822b", "MLM": "#9b6bbf",
           "all-token MLM": "#cc4b4b", "relative_init local": "#3d85c6", "relative_init normal": "#d9822b"}


def scores_of(record):
    """score -> value: the mean over fine-tuning seeds; the last value of each curve"""
    last = {name: values[-1] for name, values in record["log"].items() if record["steps"] > 1}
    return {name: float(np.mean(value)) for name, value in (record["scores"] | last).items()}


def statistics(values):
    """Mean, standard deviation (None for one value) and number of values, one a pretraining seed"""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None, len(values)


def grouped(records, *keys):
    """values of the keys -> the records that have them"""
    groups = {}
    for record in records:
        groups.setdefault(tuple(record[key] for key in keys), []).append(record)
    return groups


def summary(records, *keys):
    """(*values of the keys, score, mean, sd, seeds)"""
    for group, runs in grouped(records, *keys).items():
        for score in scores_of(runs[0]):
            yield *group, score, *statistics([each[score] for each in map(scores_of, runs) if score in each])


def paired(records):
    """(difference of two rows, score, mean, sd, seeds, ends of the mean's 95 % interval), seed by seed"""
    scores = {(record["name"], record["seed"]): scores_of(record) for record in records}
    for one, other in CONTRASTS:
        both = [(a, scores[other, seed]) for (name, seed), a in scores.items()
                if name == one and (other, seed) in scores]
        for score in both[0][0].keys() & both[0][1].keys() if both else ():
            mean, sd, n = statistics([a[score] - b[score] for a, b in both if score in a and score in b])
            reach = T95[n] * sd / math.sqrt(n) if n > 1 else math.nan
            yield f"{one} - {other}", score, mean, sd, n, mean - reach, mean + reach


def needed(records, total):
    """(score, seed, share of RTD's FLOPs with which COCO-LM has the score of the whole RTD run)

    Straight lines over the logarithm of FLOPs join COCO-LM's scores; "outside": they do not reach RTD's, or
    the shortest run is above it.
    """
    for (seed,), runs in grouped(records, "seed").items():
        coco = sorted((r for r in runs if r["name"] == "COCO-LM"), key=lambda r: r["steps"])
        for rtd in (r for r in runs if r["name"] == "RTD" and r["steps"] == total and len(coco) > 1):
            for score in TWICE:
                points = [(math.log(r["flops"]), scores_of(r)[score]) for r in coco]
                goal = scores_of(rtd)[score]
                shares = [math.exp(x + (x1 - x) * (goal - y) / (y1 - y)) / rtd["flops"]
                          for (x, y), (x1, y1) in zip(points, points[1:]) if y <= goal <= y1 and y < y1]
                yield score, seed, *(shares[:1] or ["outside"])


def curve(records, name, measure):
    """Steps, mean, standard deviation (0 for one seed), seeds; or [] if the logs do not have it"""
    logs = [r["log"] for r in records if r["name"] == name and measure in r["log"] and r["steps"] > 1]
    values = np.array([log[measure] for log in logs])
    return logs and (logs[0]["step"], values.mean(0), values.std(0, ddof=len(logs) > 1), len(logs))


def histogram(records, name, vector, pairs):
    """Share of the pairs in each bin of cosines: mean, standard deviation, seeds"""
    counts = np.array([r["cosines"][vector][pairs] for r in records if r["name"] == name], float)
    shares = counts / counts.sum(1, keepdims=True)
    return shares.mean(0), shares.std(0, ddof=len(shares) > 1), len(shares)


def write_csv(name, header, rows):
    with open(ASSETS / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header.split())
        writer.writerows([f"{x:.5g}" if isinstance(x, float) else x for x in row] for row in rows)


def figure(plt, name, xlabel, *panels, at=lambda y: -1):
    """Writes assets/NAME.png: panels (title, lines) below each other, for narrow screens.

    lines: (label, row, style, x, y, sd). A band is one standard deviation; a label stands at the point at(y).
    """
    size = (5.2, 2.4 * len(panels))
    fig, axes = plt.subplots(len(panels), figsize=size, layout="constrained", squeeze=False)
    for ax, (title, lines) in zip(axes[:, 0], panels):
        ax.set_title(title)
        for _, row, style, x, y, sd in lines:
            ax.plot(x, y, style, color=COLOURS[row], lw=2)
            ax.fill_between(x, y - sd, y + sd, color=COLOURS[row], alpha=0.3, lw=0)
        low, high = ax.get_ylim()
        place = -math.inf
        for label, row, _, x, y, _ in sorted(lines, key=lambda line: line[4][at(line[4])]):
            place = max(y[at(y)], place + (high - low) / 8)  # labels do not overlap
            ax.annotate(label, (x[at(y)], place), (4, 0), textcoords="offset points", color=COLOURS[row],
                        va="center", annotation_clip=False)
        ax.locator_params(axis="x", nbins=6)
    axes[-1, 0].set_xlabel(xlabel)
    fig.savefig(ASSETS / f"{name}.png", dpi=160)
    plt.close(fig)


def draw(args):
    """Writes the CSVs, and the figures if matplotlib is there."""
    parts = {"main": [], "efficiency": [], "small": [], "ablations": []}
    for r in sorted(read_records(args), key=lambda r: (r["seed"], r["steps"])):
        parts[r["part"]].append(r | {"petaflop": r["flops"] / 1e15})
    main, efficiency, small, _ = parts.values()
    if not main:
        raise InputError(f"{args.results_dir}/{args.preset} has no results: first python tests/study.py run")
    total, names = max(r["steps"] for r in main), list(dict.fromkeys(r["name"] for r in main))
    efficiency += [r for r in main if r["name"] in ("RTD", "COCO-LM")]
    ASSETS.mkdir(exist_ok=True)
    write_csv("scores", "part row steps petaflop score mean sd seeds", [
        row for records in parts.values() for row in summary(records, "part", "name", "steps", "petaflop")])
    write_csv("minutes", "row steps processor mean sd seeds", [
        (*key, *statistics([r["seconds"] / 60 for r in runs]))
        for key, runs in grouped(main + efficiency, "name", "steps", "processor").items()])
    write_csv("paired", "difference score mean sd seeds low high", sorted(paired(main)))
    write_csv("needed", "score seed share", needed(efficiency, total))
    write_csv("curves", "row measure step mean sd seeds", [
        (name, measure, step, float(mean), float(sd) if found[3] > 1 else None, found[3])
        for name in dict.fromkeys(r["name"] for r in main + small) for measure in LOGGED
        if (found := curve(main + small, name, measure)) for step, mean, sd in zip(*found[:3])])
    write_csv("space", "row vector pairs from mean sd seeds", [
        (name, vector, pairs, 2 * i / BINS - 1, float(mean[i]), float(sd[i]) if n > 1 else None, n)
        for name in names for vector in next(r for r in main if r["name"] == name)["cosines"]
        for pairs in ("similar", "random") for mean, sd, n in [histogram(main, name, vector, pairs)]
        for i in range(BINS)])
    try:
        from matplotlib import pyplot as plt
    except ImportError:
        return tell("The CSVs are written. The figures need a package: pip install matplotlib")
    grey = "text.color axes.labelcolor axes.edgecolor xtick.color ytick.color".split()
    plt.rcParams.update({"savefig.transparent": True, "axes.spines.top": False, "axes.spines.right": False,
                         "font.size": 11, "axes.titlesize": 11, "axes.titlelocation": "left"}
                        | dict.fromkeys(grey, "#808080"))


    def lines(records, measure, names, label="{}", style="-"):
        found = {name: curve(records, name, measure) for name in names}
        return [(label.format(name), name, style, *found[name][:3]) for name in names if found[name]]

    copying, known = ("CLM", "all-token MLM"), [name for name in COLOURS if name in names]
    figure(plt, "copy", "steps",
           ("copy head: share judged rightly", lines(main, "copy_accuracy_original", copying, "{}, original")
            + lines(main, "copy_accuracy_replaced", copying, "{}, replaced", "--")),
           ("copy head: area under the ROC curve", lines(main, "copy_auc", known)),
           ("LM head: accuracy at replaced tokens", lines(main, "lm_accuracy_replaced", known)))
    middle = (np.arange(BINS) + 0.5) * 2 / BINS - 1
    figure(plt, "space", "cosine of two [CLS] vectors, pairs of STS-B", *(
        (f"{name}: share of the pairs", [
            (pairs, name, style, middle, *histogram(main, name, "[CLS]", pairs)[:2])
            for pairs, style in (("random", ":"), ("similar", "-"))])
        for name in ("COCO-LM", "CLM", "RTD") if name in names), at=np.argmax)
    points = list(summary(efficiency, "name", "petaflop"))
    figure(plt, "efficiency", "compute of pretraining, PFLOP", *(
        (f"{score}, {finetune.TASKS[score]['metrics'][0]}", [
            (name, name, "o-", *np.array([(x, y, sd or 0) for row, x, s, y, sd, _ in points
                                          if (row, s) == (name, score)]).T) for name in ("RTD", "COCO-LM")])
        for score in TWICE))
    if small:
        figure(plt, "small", "steps", *((measure, lines(small, measure, [n for n in COLOURS if "init" in n]))
                                        for measure in ("mlm_loss", "copy_auc", "mean_cosine")))


def main(argv):
    if argv[:1] not in (["run"], ["draw"]):
        raise InputError("give a command: python tests/study.py run, or python tests/study.py draw")
    args = Parser(__doc__, sys.modules[__name__]).parse_args(argv[1:])
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)  # ends this process at once, and with it those of the rows
    (run if argv[0] == "run" else draw)(args)


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
