"""The paper's comparisons, at a size that a laptop can train.

    python tests/study.py run --glue_dir=GLUE   trains and evaluates all rows; what is finished is skipped
    python tests/study.py draw                  writes the CSVs and figures in assets/ from assets/study/

`run` needs the corpus data/wiki_books (its command is in tests/README.md) and GLUE's files. A row is one
pretraining run: train.py, finetune.py, and measures of the frozen model. It ends as one small file in
assets/study/PRESET/, by which `run` skips and from which `draw` reads. `run` can be killed at any moment; the
same command goes on. `--only=rtd-10000-2` runs one row, given by its file's name or a part of it.

All rows of a seed see the same batches and run on one kind of processor. On CPUs, a row has one thread, in
float32; on GPUs, torchrun trains one row on all of them. To run a row again, choose another --work_dir and
--results_dir.
"""

import csv
import ctypes
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
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
ASSETS = ROOT / "assets"
sys.path.insert(0, str(ROOT))

import finetune  # noqa: E402
from data import InputError, Parser, Tokenizer, read_meta, run_command, tell  # noqa: E402
from model import PRESETS, Config, flops  # noqa: E402
from plot import STYLE, draw_level, label_ends  # noqa: E402
from train import load_checkpoint, write_file  # noqa: E402

preset: Literal[tuple(PRESETS)] = "tiny"  # sizes and schedule of all rows
steps: int = 10_000  # optimizer steps of a whole row
seeds: int = 3  # pretraining seeds of the main rows: 1, 2, ...
only: str = ""  # run only rows whose file's name contains this
dataset: str = "wiki_books"  # the corpus data_dir/dataset
data_dir: str = "data"  # folder of all corpora
glue_dir: str = "data/glue"  # folder of CoLA/, SST-2/, ...; none: only pretrain
setup: str = ""  # options of train.py for all rows, in place of SETUP's
work_dir: str = "out/study"  # checkpoints and outputs of the rows
results_dir: str = str(ASSETS / "study")  # the rows' results

# Fixed before any comparison (tests/README.md: how). Other presets have their own batch and learning rate,
# and are fine-tuned as the authors do
SETUP = {"tiny": "--max_len=64 --batch_size=32 --micro_batch_size=32 --learning_rate=0.0015 "
                 "--eval_batches=32"}
FINE_TUNING = {"tiny": {task: f"--learning_rate=5e-4 --epochs={2 if task == 'SST-2' else 10}"
                        for task in finetune.TASKS}}
TWICE = ("STS-B", "CoLA")  # fine-tuned with two seeds
ONCE = ("SST-2", "MRPC", "RTE")  # fine-tuned with one seed, and of the first pretraining seed alone
COMPUTE_SCORE = "STS-B"  # against compute: in the main table no other score orders the rows
PLATEAU_SCORES = (*TWICE, "STS-B zero-shot, [CLS]")  # compared at equal compute
EQUAL_COMPUTE = ((10, 16), (20, 32))  # COCO-LM's steps and RTD's that cost as much, in tenths of `steps`
PROBED = 10_000  # training examples of a linear probe, at most
DECAYS = (1e-3, 1e-2, 1e-1, 1)  # weight decays from which a probe chooses
BINS = 50  # of the histograms of cosines, from -1 to 1

MAIN = {"COCO-LM": "", "RTD": "--token_task=rtd --contrastive=False", "CLM": "--contrastive=False",
        "MLM": "--token_task=mlm --contrastive=False"}
SEED_1 = {"RTD + SCL": "--token_task=rtd",
          "all-token MLM": "--token_task=all_token_mlm --contrastive=False"}
ABLATION_SEED = 6  # none of the main rows', so that the ablations can run on another kind of processor
ABLATIONS = {  # each is compared with the first
    "COCO-LM": "",
    "no relative positions": "--relative_positions=False", "random replacements": "--corruption=random",
    "frozen auxiliary": "--corruption=frozen",
    "narrow auxiliary": "--auxiliary_layers={layers} --auxiliary_width={narrow}",
    "deeper auxiliary": "--auxiliary_layers={deeper}", "no copy mechanism": "--copy_mechanism=False",
    "no stop-gradient": "--stop_gradient=False", "weighted LM loss": "--lm_loss=weighted",
    **{f"crop {value}": f"--crop={value}" for value in (0.5, 0.7, 1.0)},
    **{f"temperature {value}": f"--temperature={value}" for value in (0.05, 0.1)},
    **{f"lambda_copy {value}": f"--lambda_copy={value}" for value in (1, 10)}}
LOGGED = ["mlm_loss", "copy_loss", "lm_loss", "scl_loss", "copy_auc", "copy_accuracy_original",
          "copy_accuracy_replaced", "lm_accuracy_replaced", "alignment", "uniformity", "mean_cosine"]

# ------------------------------------------------------------------------------------------------------------
# run


def plan(args):
    """All rows in their order; the main part goes seed by seed, so that a stopped study has whole seeds."""
    rows, all_seeds = [("main", "bag of words", "", 0, 0)], range(1, args.seeds + 1)
    for seed in all_seeds:
        rows.append(("main", "untrained", "--learning_rate=0", seed, 1))
        rows += [("main", *row, seed, args.steps) for row in (MAIN | (SEED_1 if seed == 1 else {})).items()]
    rows += [("efficiency", name, MAIN[name], seed, args.steps // part)
             for seed in all_seeds for part in (2, 4) for name in ("COCO-LM", "RTD")]
    rows += [("plateau", name, MAIN[name], seed, args.steps * tenths // 10)
             for name, tenths in (("RTD", 16), ("COCO-LM", 20), ("RTD", 32), ("CLM", 20))
             for seed in all_seeds]
    rows += [("small", f"relative_init {init}", f"--relative_init={init}", seed, args.steps // 3)
             for seed in all_seeds[:2] for init in ("normal", "local")]
    rows += [("ablations", *row, ABLATION_SEED, args.steps // 2) for row in ABLATIONS.items()]
    return [dict(zip(("part", "name", "options", "seed", "steps"), row)) for row in rows]


def file_name(row):
    return f"{re.sub('[^a-z0-9.]+', '-', row['name'].lower())}-{row['steps']}-{row['seed']}"


def train_options(row, args):
    """The options of train.py that decide what a row learns."""
    every = max(row["steps"] // 20, 1)  # 20 points of each curve
    c = vars(Config.from_preset(args.preset, vocab_size=2**15))
    narrow = round(c["width"] / c["heads"] / 3) * c["heads"]
    changes = row["options"].format(layers=c["layers"], narrow=narrow, deeper=c["auxiliary_layers"] + 1)
    return [f"--preset={args.preset}", f"--dataset={args.dataset}", f"--seed={row['seed']}",
            f"--max_steps={row['steps']}", f"--warmup_steps={row['steps'] // 10}", f"--eval_interval={every}",
            *(args.setup or SETUP.get(args.preset, "")).split(), *changes.split()]


def processor():
    """The kind of processor or GPU. On another kind the last bits differ."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    lines = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    found = re.search(r"model name\s*: (.*)", lines)
    return f"{found[1] if found else platform.processor()}, {torch.backends.cpu.get_cpu_capability()}"


def die_with_parent(libc=ctypes.CDLL(None) if sys.platform == "linux" else None):
    if libc:
        libc.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def call(folder, program, *options):
    """Runs train.py or finetune.py; its output goes to folder/output.txt. -> True if a loss was not finite"""
    gpus = torch.cuda.device_count()
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"] if gpus else []
    options = [*options, *([] if gpus else ["--device=cpu", "--dtype=float32"])]
    output = folder / "output.txt"
    with open(output, "a", encoding="utf-8") as file:
        print("$ python", program, *options, file=file, flush=True)
        status = subprocess.run([sys.executable, *start, ROOT / program, *options], stdout=file, stderr=file,
                                env=os.environ | ({} if gpus else {"OMP_NUM_THREADS": "1"}),
                                preexec_fn=die_with_parent).returncode
    if status and "not finite" not in output.read_text(encoding="utf-8"):
        raise InputError(f"{program} failed with exit status {status}: see the end of {output}.")
    return status != 0


def pretrain(row, folder, args):
    """Runs train.py -> settings, log, compute and time. A loss that is not finite is a result as well."""
    folder.mkdir(parents=True, exist_ok=True)
    every = min(max(row["steps"] // 20, 1), 1000)
    options = [*train_options(row, args), f"--data_dir={args.data_dir}", f"--out_dir={folder}",
               "--init_from=resume_or_scratch", f"--checkpoint_interval={every}"]
    if "--corruption=frozen" in options:  # the auxiliary of a run of COCO-LM as long as this one
        pretrain(row | {"options": ""}, folder / "converged", args)
        options.append(f"--auxiliary_from={folder / 'converged' / 'ckpt.pt'}")
    failed = call(folder, "train.py", *options)
    header, *lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    val = [line for line in lines if line["split"] == "val"]
    log = {key: [math.nan if line[key] is None else float(f"{line[key]:.4g}") for line in val]
           for key in LOGGED if key in val[-1]}
    sequences = row["steps"] * header["constants"]["batch_size"]
    return {"failed": failed, "settings": header["constants"], "versions": header["versions"],
            "date": header["date"], "seconds": lines[-1]["seconds"],
            "flops": flops(Config(**header["config"])) * sequences,
            "log": {"step": [line["step"] for line in val], **log}}


def fine_tune(task, count, folder, args):
    """Runs finetune.py -> the task's first metric on dev, one of each fine-tuning seed"""
    call(folder, "finetune.py", f"--task={task}", f"--init_from={folder / 'ckpt.pt'}", f"--seeds={count}",
         f"--data_dir={args.glue_dir}", f"--out_dir={folder / 'finetune'}",
         *FINE_TUNING.get(args.preset, {}).get(task, "").split())
    runs = json.loads((folder / "finetune" / task / "results.json").read_bytes())["runs"]
    return [round(run["metrics"][finetune.TASKS[task]["metrics"][0]], 5) for run in runs]


def run_row(row, args):
    """Trains, fine-tunes and measures a row, and writes its results -> its file's name"""
    name, folder, vectors = file_name(row), Path(args.work_dir, file_name(row)), {}
    result = row | {"options": train_options(row, args), "processor": processor(), "log": {}, "seconds": 0,
                    "flops": 0, "fine_tuning": FINE_TUNING.get(args.preset, {}), "failed": False}
    tasks = {"small": {}, "efficiency": {COMPUTE_SCORE: 2}}.get(row["part"], dict.fromkeys(TWICE, 2))
    if row["part"] == "main" and row["seed"] == 1:
        tasks |= dict.fromkeys(ONCE, 1)
    if args.glue_dir == "none":
        tasks = {}
    if row["name"] == "bag of words":
        tokenizer, tasks = Tokenizer.load(Path(args.data_dir, args.dataset)), {}
        vectors = {"bag": lambda texts: bag_vectors(tokenizer, texts)}
    else:
        result |= pretrain(row, folder, args)
        if result["failed"]:
            tasks = {}
        elif args.glue_dir != "none" and row["part"] in ("main", "plateau", "ablations"):
            device = "cuda" if torch.cuda.is_available() else "cpu"
            model, tokenizer = load_checkpoint(folder / "ckpt.pt", device)
            vectors = {"[CLS]": lambda texts: cls_vectors(model, tokenizer, texts, device),
                       "mean": lambda texts: model.embed(tokenizer.batch(texts))}
    scores = {task: fine_tune(task, count, folder, args) for task, count in tasks.items()}
    for kind, function in vectors.items():
        scores |= {f"{score}, {kind}": value for score, value in frozen_scores(function, args).items()}
    cosines = {kind: histograms(function, args) for kind, function in vectors.items()}
    write_file(Path(args.results_dir, args.preset, f"{name}.json"),
               json.dumps(result | {"scores": scores, "cosines": cosines}) + "\n")
    return name


def read_results(args):
    """The results that are there, in the order of the plan"""
    files = [Path(args.results_dir, args.preset, f"{file_name(row)}.json") for row in plan(args)]
    return [json.loads(file.read_bytes()) for file in files if file.exists()]


def run(args):
    """Runs what has no results yet, one row a core."""
    Path(args.results_dir, args.preset).mkdir(parents=True, exist_ok=True)
    results, here = {file_name(result): result for result in read_results(args)}, processor()
    text = read_meta(Path(args.data_dir, args.dataset))["sha256"]
    text = {split: text[split] for split in ("train", "val")}
    began_on, rows = {result["seed"]: result["processor"] for result in results.values()}, plan(args)
    for row in rows:
        options, result = train_options(row, args), results.get(file_name(row))
        before = (result or {}).get("settings", {}).get("text") or text  # the first rows do not know it
        if result and (result["options"] != options or not before.items() >= text.items()):
            raise InputError(f"{args.results_dir}: {file_name(row)}.json is not of this text and "
                             f"{' '.join(options)}: choose another --results_dir.")
    names = [file_name(row) for row in rows]
    wanted = [args.only] if args.only in names else [name for name in names if args.only in name]
    missing = [row for row in rows if file_name(row) in wanted and file_name(row) not in results]
    jobs = [row for row in missing if began_on.get(row["seed"], here) == here]
    tell(f"{here}: {len(results)} rows are finished, {len(jobs)} to run, "
         f"{len(missing) - len(jobs)} wait for the processor on which their seed began")
    torch.set_num_threads(1)
    work = [row["steps"] + args.steps // 4 for row in jobs]  # a quarter: fine-tuning and measures, about
    began = time.monotonic()
    with ThreadPoolExecutor(1 if torch.cuda.device_count() else os.cpu_count()) as pool:
        for done, name in enumerate(pool.map(lambda row: run_row(row, args), jobs), 1):
            left = (time.monotonic() - began) / sum(work[:done]) * sum(work[done:])
            tell(f"{name} is finished; {done} of {len(jobs)}, about {timedelta(seconds=round(left))} left")


# ------------------------------------------------------------------------------------------------------------
# Measures of vectors: a function from a list of texts to (n, D), of length 1


@torch.no_grad()
def cls_vectors(model, tokenizer, texts, device):
    """The hidden states of [CLS]"""
    batches = [tokenizer.batch(texts[i : i + 64]).to(device) for i in range(0, len(texts), 64)]
    return F.normalize(torch.cat([model.main(tokens)[:, 0] for tokens in batches]), dim=-1).cpu()


def bag_vectors(tokenizer, texts):
    """How often each token occurs"""
    ids = [torch.tensor(tokenizer.encode(text)) for text in texts]
    return F.normalize(torch.stack([torch.bincount(i, minlength=tokenizer.vocab_size) for i in ids]).float())


def glue(task, split, args):
    """The texts of a split of GLUE, a list for each column, and the labels as numbers"""
    rows = finetune.read_glue(Path(args.glue_dir, task, f"{split}.tsv"), finetune.TASKS[task], split)
    _, texts, labels = zip(*rows)
    return list(zip(*texts)), np.array([float(label) for label in labels])


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


def frozen_scores(vectors, args):
    """Zero-shot: cosines of STS-B's pairs against human scores; and probes"""
    (a, b), gold = glue("STS-B", "dev", args)
    scores = {"STS-B zero-shot": finetune.spearman(gold, (vectors(a) * vectors(b)).sum(1).numpy())}
    for task in ("SST-2", "CoLA"):
        ((train,), labels), ((dev,), wanted) = glue(task, "train", args), glue(task, "dev", args)
        found = probe(vectors(train[:PROBED]), labels[:PROBED], vectors(dev))
        scores[f"{task} probe"] = finetune.METRICS[finetune.TASKS[task]["metrics"][0]](wanted, found)
    return {name: round(score, 5) for name, score in scores.items()}


def histograms(vectors, args):
    """Cosines of STS-B's training pairs: of those that humans scored 4.8 or more, and of random ones

    Random is the second sentence of the row before, so mostly of the same genre: captions, forums or news.
    """
    (a, b), gold = glue("STS-B", "train", args)
    a, b = vectors(a), vectors(b)
    cosines = {"similar": (a * b).sum(1)[gold >= 4.8], "random": (a * b.roll(1, 0)).sum(1)}
    return {pairs: torch.histc(x.clamp(-1, 1), BINS, -1, 1).int().tolist() for pairs, x in cosines.items()}


# ------------------------------------------------------------------------------------------------------------
# draw

# Student's t: the mean of n values is known to t sd / root n
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
CONTRASTS = [("main", *rows) for rows in (
    ("CLM", "MLM"), ("CLM", "RTD"), ("COCO-LM", "CLM"), ("COCO-LM", "RTD"), ("COCO-LM", "MLM"),
    ("CLM", "all-token MLM"), ("COCO-LM", "RTD + SCL"), ("COCO-LM", "untrained"))]
CONTRASTS += [("ablations", name, "COCO-LM") for name in ABLATIONS if name != "COCO-LM"]
COLOURS = {"COCO-LM": "#3d85c6", "CLM": "#3f9b5b", "RTD": "#d9822b", "MLM": "#9b6bbf", "RTD + SCL": "#b8860b",
           "all-token MLM": "#cc4b4b", "relative_init local": "#3d85c6", "relative_init normal": "#d9822b"}


def points(result):
    """(CSV, measure, x, value) of everything that the results of a row hold"""
    log, steps = dict(result["log"]), result["steps"]
    logged_steps = log.pop("step", [])
    last = {name: values[-1] for name, values in log.items()}
    last |= {f"minutes, {result['processor']}": result["seconds"] / 60, "petaflop": result["flops"] / 1e15}
    for score, value in (result["scores"] | last).items():
        yield "scores", score, steps, float(np.mean(value))  # over fine-tuning seeds
    if result["part"] in ("main", "small"):
        for name, values in log.items():
            yield from (("curves", name, int(step), value) for step, value in zip(logged_steps, values))
    for vector, of_pairs in result["cosines"].items():
        for pairs, counts in of_pairs.items():
            cosines, shares = (np.arange(BINS) + 0.5) * 2 / BINS - 1, np.array(counts) / sum(counts)
            yield "scores", f"cosine of {pairs} pairs, {vector}", steps, float(cosines @ shares)
            if result["part"] == "main":
                yield from (("space", f"{vector}, {pairs}", *point) for point in zip(cosines, shares))


def table(results):
    """(CSV, part, row, measure, x) -> {seed: value}, sorted"""
    values = {}
    for r in results:
        for name, measure, x, value in points(r):
            values.setdefault((name, r["part"], r["name"], measure, x), {})[r["seed"]] = value
    return {key: dict(sorted(values[key].items())) for key in sorted(values)}


def statistics(by_seed):
    """{seed: value} -> mean, standard deviation (None of one value) and number of values"""
    values = list(by_seed.values())
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None, len(values)


def paired(values, steps):
    """(part, rows, measure; of their differences the mean, sd, seeds, and the 95 % interval of the mean)

    In the part plateau, which compares with RTD at equal compute, a row's name has its steps.
    """
    scores, contrasts = {}, list(CONTRASTS)
    for one, other in EQUAL_COMPUTE:
        contrasts.append(("plateau", f"COCO-LM {steps * one // 10}", f"RTD {steps * other // 10}"))
    contrasts.append(("plateau", f"COCO-LM {steps * 2}", f"CLM {steps * 2}"))
    for (table, part, row, measure, x), by_seed in values.items():
        if table == "scores" and part != "plateau":
            scores[part, row, measure] = by_seed
        if table == "scores" and part in ("main", "plateau") and measure in PLATEAU_SCORES:
            scores["plateau", f"{row} {x}", measure] = by_seed
    for part, one, other in contrasts:
        for measure in [key[2] for key in scores if key[:2] == (part, one)]:
            a, b = scores[part, one, measure], scores.get((part, other, measure), {})
            if both := a.keys() & b.keys():
                mean, sd, n = statistics({seed: a[seed] - b[seed] for seed in both})
                half = T95[n] * sd / math.sqrt(n) if n > 1 else math.inf
                yield part, f"{one} - {other}", measure, mean, sd, n, mean - half, mean + half


def against_compute(values, name):
    """steps -> (PFLOP, {seed: score}) of the runs with this name, the shortest first"""
    runs = {steps: (statistics(values["scores", part, name, "petaflop", steps])[0], by_seed)
            for (table, part, row, measure, steps), by_seed in values.items()
            if (table, row, measure) == ("scores", name, COMPUTE_SCORE) and part != "ablations"}
    return dict(sorted(runs.items()))


def needed(values, steps):
    """(seed, share of the FLOPs of RTD's run of so many steps with which COCO-LM has its score)

    Straight lines over the logarithm of FLOPs join COCO-LM's runs of at most as many steps. "< 0.4": the
    shortest one, with 0.4 of the FLOPs, has a higher score; "> 1.6": the longest one has a lower score.
    """
    runs = [run for length, run in against_compute(values, "COCO-LM").items() if length <= steps]
    rtd_flops, goals = against_compute(values, "RTD").get(steps, (0, {}))
    for seed, goal in goals.items():
        curve = [(flops, scores[seed]) for flops, scores in runs if seed in scores]
        if len(curve) > 1:
            shares = [x / rtd_flops * (x1 / x) ** ((goal - y) / (y1 - y))
                      for (x, y), (x1, y1) in zip(curve, curve[1:]) if y <= goal <= y1 and y < y1]
            (least, first), (most, _) = curve[0], curve[-1]
            bound = f"< {least / rtd_flops:.3f}" if first > goal else f"> {most / rtd_flops:.3f}"
            yield seed, shares[0] if shares else bound


def write_csv(name, header, rows):
    with open(ASSETS / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header.split())
        writer.writerows([f"{x:.5g}" if isinstance(x, float) else x for x in row] for row in rows)


def line(by_x):
    """{x: {seed: value}} -> x, mean and standard deviation: three arrays"""
    return np.array([(x, *statistics(by_seed)[:2]) for x, by_seed in by_x.items()], float).reshape(-1, 3).T


def figure(name, xlabel, *panels, across=False, levels=(), **scale):
    """Panels (title, [(label, row, style, line)]) below each other, which suits narrow screens, or across.

    A band is one standard deviation. A label stands at the end of its line. levels: arguments of draw_level;
    scale: properties of the axes, which all panels share
    """
    from matplotlib import pyplot as plt, ticker
    plt.rcParams.update(STYLE)
    rows, columns, size = (1, len(panels), (9, 2.6)) if across else (len(panels), 1, (5.2, 2.4 * len(panels)))
    _, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, sharey=across)
    for ax, (title, lines) in zip(axes.flat, panels):
        ax.set_title(title)
        for _, row, style, (x, y, sd) in lines:
            ax.plot(x, y, style, color=COLOURS[row], lw=2)
            ax.fill_between(x, y - sd, y + sd, color=COLOURS[row], alpha=0.3, lw=0)
        for level in levels:
            draw_level(ax, *level)
        ax.locator_params(axis="x", nbins=6)
        ax.set(**scale)
        if ax.get_xscale() == "log":
            ax.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            ax.xaxis.set_major_formatter("{x:g}")
            ax.minorticks_off()
    for ax, (_, lines) in zip(axes.flat, panels):  # now that the panels' common scale is known
        label_ends(ax, [(label, x[-1], y[-1], COLOURS[row]) for label, row, _, (x, y, _) in lines if len(x)])
    axes[-1, columns // 2].set_xlabel(xlabel)
    plt.savefig(ASSETS / f"{name}.png", dpi=160)
    plt.close()


def draw_figures(values):
    def measured(name, row, measure):
        return line({key[4]: by_seed for key, by_seed in values.items()
                     if (key[0], *key[2:4]) == (name, row, measure)})

    def curves(measure, *rows):
        return [(row, row, "-", measured("curves", row, measure)) for row in rows]

    copying = ("CLM", "all-token MLM")
    figure("copy", "steps",
           ("copy head: accuracy at original tokens", curves("copy_accuracy_original", *copying)),
           ("copy head: accuracy at replaced tokens", curves("copy_accuracy_replaced", *copying)),
           ("copy head: area under the ROC curve", curves("copy_auc", *copying)),
           ("LM head: accuracy at replaced tokens", curves("lm_accuracy_replaced", *copying)))
    figure("space", "cosine of the [CLS] vectors of two sentences of STS-B", *(
        (f"{row}: share of the pairs", [
            (pairs, row, style, measured("space", row, f"[CLS], {pairs}")[:, 42:])  # cosines from 0.7
            for pairs, style in (("random", ":"), ("similar", "-"))])
        for row in ("COCO-LM", "CLM", "RTD")), across=True, xlim=(0.7, 1))
    figure("uniformity", "steps",
           ("alignment: mean squared distance of a text and its crop",
            curves("alignment", "COCO-LM", "RTD + SCL")),
           ("uniformity", curves("uniformity", "COCO-LM", "RTD + SCL")),
           ("mean cosine of the hidden states of two texts", curves("mean_cosine", *MAIN)))
    figure("small", "steps", *((measure, curves(measure, "relative_init local", "relative_init normal"))
                               for measure in ("mlm_loss", "copy_auc", "mean_cosine")))
    runs = {row: dict(against_compute(values, row).values()) for row in ("COCO-LM", "RTD")}
    if computes := [*runs["COCO-LM"], *runs["RTD"]]:
        levels = ((("untrained", COMPUTE_SCORE, 1), "untrained"),
                  (("bag of words", "STS-B zero-shot, bag", 0), "bag of words, zero-shot", 0, "left"))
        levels = [(statistics(values["scores", "main", *key])[0], *text)
                  for key, *text in levels if ("scores", "main", *key) in values]
        lines = [(row, row, "o-", line(by_compute)) for row, by_compute in runs.items()]
        figure("efficiency", "compute of pretraining, PFLOP",
               (f"fine-tuned {COMPUTE_SCORE} (Pearson) against compute of pretraining", lines),
               levels=levels, xscale="log", xlim=(0.9 * min(computes), 1.02 * max(computes)))


def draw(args):
    """Writes the CSVs, and the figures if matplotlib is there. Rows that diverged are said and left out."""
    results = read_results(args)
    for result in results:
        if result["failed"]:
            tell(f"{file_name(result)}: a loss was not finite")
    if not (results := [result for result in results if not result["failed"]]):
        raise InputError(f"{args.results_dir}/{args.preset} has no results: first python tests/study.py run")
    values = table(results)
    ASSETS.mkdir(exist_ok=True)
    for name, x in (("scores", "steps"), ("curves", "step"), ("space", "cosine")):
        write_csv(name, f"part row measure {x} mean sd seeds", [
            (*key[1:], *statistics(by_seed)) for key, by_seed in values.items() if key[0] == name])
    write_csv("paired", "part difference measure mean sd seeds low high", paired(values, args.steps))
    write_csv("needed", "seed share", needed(values, args.steps))
    if shares := list(needed(values, args.steps * EQUAL_COMPUTE[-1][1] // 10)):
        write_csv("needed_plateau", "seed share", shares)
    try:
        draw_figures(values)
    except ImportError:
        tell("The CSVs are written. The figures need a package: pip install matplotlib")


def main(argv):
    parser = Parser(__doc__, sys.modules[__name__])
    parser.add_argument("command", choices=("run", "draw"))
    args = parser.parse_args(argv)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)  # ends this process at once, and with it those of the rows
    (run if args.command == "run" else draw)(args)


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
