"""Pretrains COCO-LM.

    python train.py                                     one process, on whatever this machine has
    torchrun --standalone --nproc_per_node=8 train.py   eight GPUs
    python train.py --init_from=resume                  continues the run in out_dir; give its options again

To change something, edit a constant or give --name=value. What is learned, and with it most ablations, is in
model.py's Config; the presets' sizes are in model.py's PRESETS, their schedules in SCHEDULES below, and all
else in the constants below. The command line overrides them all.
"""

import base64
import contextlib
import ctypes
import json
import math
import os
import platform
import re
import shutil
import signal
import sys
import textwrap
import time
from argparse import Namespace
from datetime import timedelta
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import data
from data import InputError, Parser, Sequences, Tokenizer, batches, run_command
from model import COCOLM, PRESETS, Config, flops, from_release, pair

# ------------------------------------------------------------------------------------------------------------
# Constants

# the run
preset: Literal[tuple(PRESETS)] = "tiny"  # sizes and schedule: tiny | small | base | base++ | large++
dataset: str = "docs"  # the corpus data_dir/dataset, made by data.py; docs is made if it is missing
data_dir: str = "data"            # folder of all corpora
out_dir: str = "out"              # folder of this run: ckpt.pt, ckpt.prev.pt, log.jsonl
init_from: str = "scratch"        # scratch | resume | resume_or_scratch | path of a checkpoint to start from
overwrite: bool = False           # True: replace the run that out_dir holds
seed: int = 0                     # of weights and dropout, and of the order, masks and crops of the text
auxiliary_from: str = ""          # with corruption=frozen: the checkpoint whose auxiliary corrupts the text

# optimization; what has no value here is the preset's, from SCHEDULES, unless one is written here
batch_size: int                   # sequences in a step, over all processes
micro_batch_size: int             # of them in a pass of one process; gradients of the passes are accumulated
max_steps: int                    # optimizer steps
warmup_steps: int                 # steps of linear warm-up; then linear decay to 0 at max_steps
learning_rate: float              # at the end of the warm-up
grad_clip: float = 2.0            # largest norm of the gradient; 0: no clipping
weight_decay: float = 0.01        # of matrices [model]; not of biases and norms [ours]
beta1: float = 0.9                # AdamW: decay of the mean of gradients
beta2: float = 0.98               # AdamW: decay of the mean of squared gradients
epsilon: float = 1e-6             # AdamW: added to the root of the mean of squares

# the machine
device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: cuda, mps or cpu, the first that is here
dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of autocast; auto: bfloat16 in hardware
compile: Literal["auto", "True", "False"] = "auto"  # torch.compile; auto: on CUDA with a C compiler
recompute: bool = False           # activation checkpointing: about a third more time, much less memory

# logging and checkpoints
log_interval: int = 20            # steps between rows of the log
eval_interval: int                # steps between validations
eval_batches: int                 # batches of validation text (batch_size sequences each)
checkpoint_interval: int          # steps between checkpoints
keep_interval: int = 0            # steps between checkpoints that stay, as ckpt.STEP.pt; 0: none

SCHEDULES = {  # batch_size and max_steps of base and above [paper, model]; all else has no source: [ours]
    "tiny": dict(batch_size=16, micro_batch_size=16, max_steps=1300, warmup_steps=300, learning_rate=1.5e-3,
                 eval_interval=650, eval_batches=16, checkpoint_interval=200),
    "base": dict(batch_size=2048, micro_batch_size=32, max_steps=125_000, warmup_steps=10_000,
                 learning_rate=5e-4, eval_interval=1000, eval_batches=8, checkpoint_interval=1000),
}
SCHEDULES["small"] = SCHEDULES["base"] | dict(batch_size=256, max_steps=100_000, warmup_steps=5_000)
SCHEDULES["base++"] = SCHEDULES["base"] | dict(max_steps=2_000_000)
SCHEDULES["large++"] = SCHEDULES["base++"] | dict(micro_batch_size=16, learning_rate=3e-4)

MAY_CHANGE = {  # when a run is resumed
    "data_dir", "out_dir", "init_from", "overwrite", "max_steps", "micro_batch_size", "accumulation",
    "processes", "negatives", "device", "dtype", "compile", "recompute", "log_interval",
    "eval_interval", "eval_batches", "checkpoint_interval", "keep_interval",
}
STARTS = ("scratch", "resume", "resume_or_scratch")  # anything else in init_from is a path
SIZES = {"max_len", "layers", "width", "heads", "ffn_width", "auxiliary_layers", "dropout", "relative_bins",
         "max_distance", "auxiliary_width", "relative_positions"}  # of a checkpoint
MAY_DIFFER = {"dropout", "auxiliary_layers"}  # from those of the checkpoint that a run starts from
PEAK = {  # teraflops a second, 16 bit with float32 sums, dense, from data sheets; the first name that fits
    "B200": 2250, "H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "L40": 181, "L4": 121,
    "RTX 4090": 165, "RTX 3090": 71, "V100": 125, "T4": 65,
}

# torchrun tells each process which one it is
RANK, LOCAL_RANK = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))

# ------------------------------------------------------------------------------------------------------------
# Settings


def read_settings(argv):
    """The constants, overridden by preset, checkpoint (its sizes) and command line, in one namespace."""
    parser = Parser(__doc__, sys.modules[__name__], Config, without=("vocab_size", "pad_id", "mask_id"))
    args, _ = parser.parse_known_args([word for word in argv if word not in ("-h", "--help")])
    may_shrink = args.micro_batch_size is None  # it was not given, so it is made to fit
    preset, values = args.preset, SCHEDULES[args.preset] | PRESETS[args.preset]
    if args.init_from not in STARTS:
        checkpoint = read_checkpoint(args.init_from)
        sizes = {name: checkpoint["config"][name] for name in SIZES}
        alike = [name for name, row in PRESETS.items()
                 if all(row.get(size, getattr(Config, size)) == sizes[size]
                        for size in SIZES - MAY_DIFFER - {"auxiliary_width", "relative_positions"})]
        theirs = checkpoint.get("settings", {}).get("preset", [*alike, preset][0])
        if theirs == preset or not any(word.startswith("--preset") for word in argv):  # or it is refused
            preset, values = theirs, SCHEDULES[theirs] | PRESETS[theirs] | sizes
    defaults = {name: str(globals().get(name, value)) for name, value in values.items()}
    parser.set_defaults(preset=preset, **defaults)
    args = parser.parse_args(argv)

    while may_shrink and args.micro_batch_size > 1 and args.batch_size % (WORLD * args.micro_batch_size):
        args.micro_batch_size -= 1
    if args.batch_size % (WORLD * args.micro_batch_size):
        parser.error(f"batch_size={args.batch_size} is not a multiple of processes x micro_batch_size = "
                     f"{WORLD} x {args.micro_batch_size}")
    args.processes, args.accumulation = WORLD, args.batch_size // (WORLD * args.micro_batch_size)
    args.negatives = 2 * args.micro_batch_size * (WORLD if args.gather_negatives else 1) - 2  # not its twin
    if args.contrastive and not args.negatives:
        parser.error("there are no negatives: choose a larger micro_batch_size or --contrastive=False")
    if (args.corruption == "frozen") != bool(args.auxiliary_from):
        parser.error("corruption=frozen and auxiliary_from=CHECKPOINT need each other: give both or neither")
    make_config(args, vocab_size=2**16)  # raises an error before the text is prepared
    return args


def make_config(args, **vocabulary):
    settings = {name: value for name, value in vars(args).items() if name in Config.__annotations__}
    try:
        return Config(**settings, **vocabulary)
    except ValueError as error:
        raise InputError(str(error)) from None


def choose_hardware(args):
    """Replaces "auto" in device and dtype by what this machine has -> torch.device"""
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if args.device == "auto":
        args.device = next(name for name in here if here[name])
    if not here[args.device] or args.device == "cuda" and LOCAL_RANK >= torch.cuda.device_count():
        raise InputError(f"there is no {args.device} for process {LOCAL_RANK} on this machine: choose another"
                         f" --device or a smaller --nproc_per_node.")
    if args.device == "cuda":
        torch.cuda.set_device(LOCAL_RANK)
    if args.dtype == "auto":
        has = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.9 cannot tell, and takes float32
        bfloat16 = {"cuda": here["cuda"] and torch.cuda.is_bf16_supported(including_emulation=False),
                    "cpu": has.get("avx512_bf16") or has.get("amx_bf16"), "mps": False}[args.device]
        args.dtype = "bfloat16" if bfloat16 else "float16" if args.device == "cuda" else "float32"
    if args.device == "mps" and args.dtype != "float32":
        raise InputError(f"dtype={args.dtype} is not supported on mps: choose --dtype=float32.")
    return torch.device(args.device, LOCAL_RANK if args.device == "cuda" else None)


def keep_memory():
    """Keeps freed memory. To get it back page by page takes a fifth of a step of preset small on the CPU."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        for option, value in ((-4, 0), (-1, -1)):  # M_MMAP_MAX, M_TRIM_THRESHOLD
            ctypes.CDLL("libc.so.6").mallopt(option, value)


# ------------------------------------------------------------------------------------------------------------
# Processes


def connect(device):
    """Connects the processes that torchrun started."""
    if WORLD > 1:
        # torchrun --max-restarts keeps its store: the prefix hides the addresses of the processes that died
        restart, store = os.environ.get("TORCHELASTIC_RESTART_COUNT", ""), next(dist.rendezvous("env://"))[0]
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, rank=RANK, world_size=WORLD, store=dist.PrefixStore(restart, store))


def print0(*words, **how):
    if RANK == 0:
        data.tell(*words, **how)


def sum_over_processes(tensor):
    if WORLD > 1:
        dist.all_reduce(tensor)
    return tensor


def gather_objects(value):
    """What each process has, in a list that all of them get."""
    everywhere = [value] * WORLD
    if WORLD > 1:
        dist.all_gather_object(everywhere, value)
    return everywhere


def gather(vectors):
    """The sequence vectors (..., B, D) of all processes, (..., N, D), with the gradient of this process' own.

    Every process computes the same loss of all vectors, so it has the whole gradient of its own ones. DDP
    then averages over the processes what should be summed; the factor WORLD makes up for it.
    """
    if WORLD == 1:
        return vectors
    parts = [torch.empty_like(vectors) for _ in range(WORLD)]
    dist.all_gather(parts, vectors.detach().contiguous())
    parts[RANK] = vectors.detach() + WORLD * (vectors - vectors.detach())  # the values are those of `vectors`
    return torch.cat(parts, dim=-2)


def lock(folder):
    """Keeps other runs out of a folder as long as the file that it returns is open."""
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / ".lock", "w")
    with contextlib.suppress(ImportError, OSError):  # Windows and some file systems have no such lock
        import fcntl
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{folder} is in use by another run: choose another --out_dir.") from None
    return file


def catch_signals():
    """The stop signals received so far, [(number, time)]. A second one ends the process at once."""
    received = []
    grace = 1.0 if "TORCHELASTIC_RUN_ID" in os.environ else 0.0  # torchrun repeats a Ctrl-C within it

    def receive(number, frame):
        received.append((number, time.monotonic()))
        if len(received) > 1 and received[-1][1] - received[0][1] >= grace:
            os._exit(128 + number)

    for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"):  # the last two exist on POSIX only
        number = getattr(signal, name, None)
        if number and not (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN):  # as under nohup
            signal.signal(number, receive)
    return received


# ------------------------------------------------------------------------------------------------------------
# Checkpoints: at every moment there is a complete one, and reading one runs no code


def write_file(path, content, before=None):
    """Writes a text, or torch.saves an object, completely or not at all. An older one becomes `before`."""
    partial = path.with_suffix(".partial")
    try:
        with open(partial, "wb") as file:
            if isinstance(content, str):
                file.write(content.encode())
            else:
                torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        if before and path.exists():
            os.replace(path, before)
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch turns a full disk into a RuntimeError
        partial.unlink(missing_ok=True)
        raise InputError(f"{path} cannot be written ({error.__context__ or error}).") from None


def weights_file(path):
    """The file that holds the weights: path, or one in that folder if it is of a released model."""
    names = ("model.pt", "model.safetensors", "pytorch_model.bin")
    file = next((Path(path, name) for name in names if Path(path, name).exists()), Path(path))
    if file.is_dir():
        raise InputError(f"{path} is a folder without {', '.join(names)}: give the path of a checkpoint.")
    return file


def read_checkpoint(path, *more):
    """The dict that was saved, or for a released model such a dict of its files."""
    file = weights_file(path)
    if file.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
            saved = load_file(file)
        except ImportError:
            raise InputError(f"{file} needs a package: pip install safetensors") from None
        except Exception as error:  # safetensors' own, or no such file
            raise InputError(f"{file} cannot be read ({error}).") from None
    else:
        saved = data.read_torch(file)
    if "step" not in saved:
        return read_release(file, saved)
    if missing := [name for name in ("model", "config", "tokenizer", *more) if name not in saved]:
        raise InputError(f"{path} is no checkpoint of this version: it has no {missing[0]!r}.")
    return saved


def read_release(file, saved):
    """A checkpoint of what the authors' model.pt, model.safetensors or pytorch_model.bin holds. [model]"""
    try:
        if "model" in saved:  # fairseq: {"args" or "cfg": Namespace, "model": weights, ...}
            weights, settings = saved["model"], vars(saved.get("args") or saved.get("cfg") or Namespace())
        else:  # Hugging Face
            weights, settings = saved, json.loads((file.parent / "config.json").read_bytes())
        config, weights, differ = from_release(weights, settings)
    except (ValueError, TypeError, AttributeError, KeyError, RuntimeError, OSError) as error:
        raise InputError(f"{file} is neither a checkpoint nor a released model ({error}).") from None
    model, dictionary = file.parent / "sp.model", file.parent / "dict.txt"
    model = base64.b64encode(model.read_bytes()).decode() if model.exists() else None
    dictionary = "".join(line for _, line in data.read_lines(dictionary)) if dictionary.exists() else None
    tokenizer = data.SentencePieceTokenizer(model, dictionary, config.vocab_size, file.parent)
    return {"model": weights, "step": 0, "config": vars(config),
            "tokenizer": tokenizer.state(), "differ": differ}


def load_checkpoint(path, device="cpu"):
    """(the COCOLM in evaluation mode, its Tokenizer) of a checkpoint or a released model"""
    checkpoint = read_checkpoint(path)
    tokenizer = Tokenizer.from_state(checkpoint["tokenizer"], path)
    try:
        model = COCOLM(Config(**checkpoint["config"]))
        if "differ" in checkpoint:
            copy_weights(model, checkpoint, path)
        else:
            model.load_state_dict(checkpoint["model"])
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise InputError(f"{path} does not fit model.py: {' '.join(str(error).split())[:300]}.") from None
    tokenizer.max_len = model.config.max_len
    return model.to(device).eval(), tokenizer


def find_checkpoint(args):
    """The newest whole checkpoint of out_dir to resume from, and its path; (None, None) for a new run."""
    out, resume, problems = Path(args.out_dir), args.init_from in ("resume", "resume_or_scratch"), ""
    for path in (out / "ckpt.pt", out / "ckpt.prev.pt"):
        if resume and path.exists():
            try:
                checkpoint = read_checkpoint(path, "optimizer", "settings", "scaler", "skipped")
                print0(f"{problems}resuming from {path}, step {checkpoint['step']:,}")
                return checkpoint, path
            except InputError as error:
                problems += f"{error} "
    if args.init_from == "resume":
        raise InputError(f"{problems}{out} holds no checkpoint to resume from.")
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"  # then they are of this run
    if (resume or restarted or not args.overwrite) and (there := sorted(out.glob("ckpt*.pt"))):
        raise InputError(f"{problems}{there[0]} is of another run: continue with --init_from=resume, replace"
                         f" it with --init_from=scratch --overwrite=True, or choose another --out_dir.")
    return None, None


def take_weights(model, path, tokenizer, part=""):
    """Copies the weights of another run's checkpoint, those whose names begin with `part`, into the model."""
    checkpoint, ours = read_checkpoint(path), vars(model.config)
    if checkpoint["tokenizer"] != tokenizer.state():
        raise InputError(f"{path} has another vocabulary than this corpus, or none; prepare the corpus with "
                         f"its tokenizer: python data.py PATH --encoding={path}")
    for name in sorted(SIZES - ({"dropout", "layers"} if part else MAY_DIFFER)):
        if checkpoint["config"][name] != ours[name]:
            raise InputError(f"{path} has {name}={checkpoint['config'][name]}, this run {name}={ours[name]}.")
    copy_weights(model, checkpoint, path, part)


def copy_weights(model, checkpoint, path, part=""):
    """Copies what a checkpoint has of `part`. Says what starts anew, and what is not used."""
    # only a frozen auxiliary has embeddings of its own; any other uses the main model's
    shared = () if model.config.corruption == "frozen" else "auxiliary.embeddings."
    theirs, ours = checkpoint["model"], model.state_dict()
    names = [name for name in theirs | ours if name.startswith(part) and not name.startswith(shared)]
    found = {name: theirs[name] for name in names
             if name in theirs and name in ours and theirs[name].shape == ours[name].shape}
    new, unused = ([name for name in names if name in side and name not in found] for side in (ours, theirs))
    if lost := [name for name in new if name.startswith(part or "main.")]:
        raise InputError(f"{path} has no {lost[0]}.")
    model.load_state_dict(found, strict=False)
    groups = dict.fromkeys(name.split(".")[0] for name in new)
    anew = [group + " (in part)" * any(name.startswith(group) for name in found) for group in groups]
    print0(f"weights from {path}: {len(found)} tensors")
    for what, names in (("start anew", anew), ("not used", unused),
                        ("its own there, the main Transformer's here", shared and checkpoint.get("differ"))):
        if names:
            print0(f"  {what}: {', '.join(names)}")


# ------------------------------------------------------------------------------------------------------------
# The parts of a step


def learning_rate_at(step, args):
    """Linear from 0 to the peak in warmup_steps, then linear to 0 at max_steps. `step` counts from 0."""
    warmup = min(args.warmup_steps, args.max_steps)
    up, down = (step + 1) / max(warmup, 1), (args.max_steps - step) / max(args.max_steps - warmup, 1)
    return args.learning_rate * min(up, down, 1.0)


def make_optimizer(model, args):
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.dim() >= 2], "weight_decay": args.weight_decay},
              {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0}]  # biases and norms
    return torch.optim.AdamW(groups, lr=0.0, betas=(args.beta1, args.beta2), eps=args.epsilon,
                             fused=args.device in ("cuda", "cpu"))


def seed_dropout(*numbers):
    """Dropout depends on these numbers alone, so a resumed run needs no generator's state."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]))


def to_device(batch, device):
    pin = device.type == "cuda"  # such copies run beside the computation
    tensors = {name: torch.from_numpy(array) for name, array in batch.items()}
    return {name: (t.pin_memory() if pin else t).to(device, non_blocking=pin) for name, t in tensors.items()}


def add(totals, losses, statistics):
    """Adds the results of a pass to name -> (sum, count)."""
    pairs = {name: pair(loss.detach()) for name, loss in losses.items()}
    for name, sum_and_count in (pairs | (statistics or {})).items():
        totals[name] = totals.get(name, 0) + sum_and_count


def means(totals):
    """name -> mean over all passes of all processes"""
    table = sum_over_processes(torch.stack(list(totals.values())).cpu().double()).tolist()
    return {name: total / count if count else math.nan for name, (total, count) in zip(totals, table)}


def area_under_roc(scores, positive):
    """The probability that a positive has a higher score than a negative; ties count half."""
    high, low = scores[positive], np.sort(scores[~positive])
    if not len(high) or not len(low):
        return math.nan
    below = np.searchsorted(low, high, "left") + np.searchsorted(low, high, "right")
    return float(below.sum() / 2 / len(high) / len(low))


@torch.no_grad()
def evaluate(model, sequences, args, device, autocast):
    """Means over validation text, with the same masks every time; the last batch and its predictions."""
    model.eval()
    totals, scores, micro = {}, [], args.micro_batch_size
    for part in range(min(args.eval_batches * args.accumulation, len(sequences) // (WORLD * micro))):
        rows = (part * WORLD + RANK) * micro + np.arange(micro)
        batch = to_device(sequences.batch(step=0, indices=rows, batch_size=len(sequences)), device)
        with autocast:
            losses, statistics, predictions = model(batch, gather)
        add(totals, losses, statistics)
        if "copy_logits" in predictions:
            same = (predictions["corrupted"] == batch["tokens"]).float()
            pairs = torch.stack([predictions["copy_logits"], same], dim=-1)  # (B, T, 2)
            scores.append(pairs[:, 1:].flatten(0, 1))  # [CLS] is never replaced
    model.train()
    result = means(totals)
    if scores:
        score, same = gather(torch.cat(scores)).cpu().numpy().T
        result["copy_auc"] = area_under_roc(score, same > 0)
    return result, batch, predictions


# ------------------------------------------------------------------------------------------------------------
# Output


class Log:
    """out_dir/log.jsonl: a header, then a row for each logged step and validation. The console shows some."""

    columns = {"loss": "loss", "mlm_loss": "mlm", "copy_loss": "copy", "lm_loss": "lm", "scl_loss": "scl",
               "copy_auc": "auc", "scl_accuracy": "scl acc", "grad_norm": "norm"}

    def __init__(self, path, header, start, changes):
        """start: the step to which the log of a resumed run is cut back; changes: of its settings"""
        rows = []
        with contextlib.suppress(FileNotFoundError, ValueError):  # a crash may have torn the last line
            for line in path.read_bytes().splitlines() if start else ():
                rows.append(json.loads(line))
        rows = [row for row in rows if row.get("step", 0) <= start] or [header]
        if changes:
            rows[0].setdefault("resumed", []).append({"step": start, **changes})
        write_file(path, "".join(json.dumps(row) + "\n" for row in rows))
        self.path, self.file = path, open(path, "a")
        self.began = time.monotonic() - rows[-1].get("seconds", 0.0)
        print0("\n    step split" + "".join(f"{t:>8}" for t in self.columns.values()) + "  tokens/s  time left")

    def write(self, split, step, values, left=None):
        """Adds a row. left: the seconds that the run still takes"""
        row = {"split": split, "step": step, "seconds": round(time.monotonic() - self.began, 3)}
        row |= {n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in values.items()}
        try:
            print(json.dumps(row), file=self.file, flush=True)
        except OSError as error:
            raise InputError(f"{self.path} cannot be written ({error.strerror}).") from None
        cells = [" " * 8 if row.get(name) is None else f" {row[name]:7.4g}" for name in self.columns]
        line = f"{step:8,} {split:5}" + "".join(cells)
        if split == "train":
            line += f"{row['tokens_per_sec']:10,}  {timedelta(seconds=round(left))}"
            line += f"  MFU {row['mfu']:.0%}" if row["mfu"] else ""
        print0(line.rstrip())


def show_what_was_learned(batch, predictions, tokenizer, text, final, args):
    """Validation text, what the auxiliary made of it, and what the main model says to that; the scores."""
    print0("\n  validation text, with [original: what the auxiliary put, p(original) > main model's correction]")
    for row, tokens in enumerate(batch["tokens"][:2]):
        words, corrupted = tokenizer.pieces(tokens), predictions["corrupted"][row]
        for k, i in enumerate(batch["masked"][row].tolist()):
            if corrupted[i] != tokens[i]:
                put = tokenizer.pieces(corrupted[i : i + 1])[0].strip()
                if "copy_logits" in predictions:
                    put += f" {predictions['copy_logits'][row, i].sigmoid():.2f}"
                if "lm_tokens" in predictions:
                    put += f" > {tokenizer.pieces(predictions['lm_tokens'][row, k : k + 1])[0].strip()}"
                words[i] = " " * words[i].startswith(" ") + f"[{words[i].strip()}: {put}]"
        lines = textwrap.wrap("".join(words[1:]), 96)[:5]
        print0("", *(f"  {line}" for line in lines), sep="\n")

    counts = np.bincount(text[text != tokenizer.sep_id])  # [SEP] is never masked
    share = counts[counts > 0] / counts.sum()
    nothing_learned = {  # token frequencies alone, "all is original", chance, all texts look the same
        "mlm_loss": ("↓", -(share * np.log(share)).sum()), "copy_accuracy_replaced": ("↑", 0.0),
        "copy_auc": ("↑", 0.5), "lm_accuracy_replaced": ("↑", share.max()),
        "scl_accuracy": ("↑", 1 / (args.negatives + 1)), "mean_cosine": ("↓", 1.0),
    }
    print0(f"\n  {'on validation text':26}{'this model':>12}{'nothing learned':>17}")
    for name, (better, floor) in nothing_learned.items():
        if name in final:
            print0(f"  {better} {name:24}{final[name]:12.4f}{floor:17.4f}")
    print0("  Good are a low p and the original as correction; and scores that go the way of their arrow.")


# ------------------------------------------------------------------------------------------------------------
# The run


def open_text(args):
    """Tokenizer, Config, training and validation Sequences. The default text is prepared if it is missing."""
    folder = Path(args.data_dir, args.dataset)
    if RANK == 0 and args.dataset == "docs" and not folder.exists():
        data.prepare(data_dir=args.data_dir)
    if WORLD > 1:
        dist.barrier()
    if not folder.exists():
        raise InputError(f"there is no {folder}; make it: python data.py PATH --name={args.dataset}")
    tokenizer = Tokenizer.load(folder)
    c = make_config(args, vocab_size=tokenizer.vocab_size, pad_id=tokenizer.pad_id, mask_id=tokenizer.mask_id)
    train, val = (Sequences(folder, split, c.max_len, c.masked, c.crop_len, seed)
                  for split, seed in (("train", args.seed), ("val", 0)))  # the same validation for all seeds
    for split, least in ((train, args.batch_size), (val, WORLD * args.micro_batch_size)):
        if len(split) < least:
            raise InputError(f"too little text: {split.path} has {len(split)} sequences, and a batch {least};"
                             f" use more text, a smaller batch or a larger --val_fraction.")
    return tokenizer, c, train, val


def main(argv):
    keep_memory()
    args = read_settings(argv)
    device = choose_hardware(args)
    can_compile = args.device == "cuda" and any(map(shutil.which, ("cc", "gcc", "clang", "cl")))
    args.compile = args.compile == "True" or args.compile == "auto" and can_compile
    autocast = torch.autocast(device.type, getattr(torch, args.dtype), enabled=args.dtype != "float32")
    connect(device)

    # the text
    out = Path(args.out_dir)
    held = lock(out) if RANK == 0 and out.exists() else None
    checkpoint, resumed_from = find_checkpoint(args)
    start = checkpoint["step"] if checkpoint else 0
    tokenizer, config, train, val = open_text(args)
    settings = vars(args) | {"text": data.read_meta(train.path.parent)["sha256"]}
    everywhere = gather_objects({"step": start, **settings["text"]})
    for rank, theirs in enumerate(everywhere):
        if theirs != everywhere[0]:
            raise InputError(f"all processes need the same checkpoint and text, but process 0 has "
                             f"{everywhere[0]} and process {rank} {theirs}.")

    # the model
    torch.manual_seed(args.seed)
    model, changes, skipped = COCOLM(config), {}, 0  # skipped: steps that float16's scaler skipped
    model.main.recompute = args.recompute
    model.to(device).train()
    optimizer = make_optimizer(model, args)
    scaler = torch.amp.GradScaler(device.type, enabled=args.dtype == "float16")
    if checkpoint:
        before = checkpoint["settings"]
        changes = {name: value for name, value in settings.items() if before.get(name) != value}
        if fixed := changes.keys() - MAY_CHANGE:
            again = [f"--{name}={before.get(name)}" for name in sorted(fixed - {"text"})]
            raise InputError(f"{resumed_from} was made with other settings. To resume it give "
                             f"{' '.join(again) or 'the same text: the checksums of the corpus differ'}.")
        if args.contrastive and "negatives" in changes:
            print0(f"warning: {args.negatives} negatives for each sequence vector, not {before['negatives']}")
        model.load_state_dict(checkpoint["model"])
        # the groups stay those of these settings and this device, and a scaler may be new
        optimizer.load_state_dict(optimizer.state_dict() | {"state": checkpoint["optimizer"]["state"]})
        scaler.load_state_dict(checkpoint["scaler"] or scaler.state_dict())
        skipped, checkpoint = checkpoint["skipped"], None  # None frees its memory
    elif args.init_from not in STARTS:
        take_weights(model, args.init_from, tokenizer)
    if args.auxiliary_from and not start:
        take_weights(model, args.auxiliary_from, tokenizer, "auxiliary.")
    if start >= args.max_steps:
        return print0(f"{out} is finished: step {start:,} of max_steps={args.max_steps:,}.")
    if args.compile:
        model.passes = torch.compile(model.passes, dynamic=False)  # all but what crosses processes
    ddp = model
    if WORLD > 1:  # the buffers are constants
        ddp = DistributedDataParallel(model, broadcast_buffers=False, gradient_as_bucket_view=True)
    # Three unused passes. After the first one, DDP sorts its buckets, and with them the order of sums: then a
    # resumed run adds in the order of an undisturbed one. The others tell how long the run will take.
    example, trials = to_device(train.batch(0, range(args.micro_batch_size), args.batch_size), device), []
    for _ in range(3):
        began = time.perf_counter()
        with autocast:
            losses, _, _ = ddp(example, gather, False)
        losses["loss"].backward()
        model.zero_grad()
        losses["loss"].item()  # waits for the device
        trials.append(time.perf_counter() - began)
    step_seconds = min(trials) * args.accumulation

    # the report and the log
    step_tokens, step_flops = args.batch_size * args.max_len, args.batch_size * flops(config)
    counts = {name: sum(p.numel() for p in part.parameters())  # both Transformers count what they share
              for name, part in (("all", model), *model.named_children())}
    hardware = torch.cuda.get_device_name() if args.device == "cuda" else platform.machine()
    known = [rate for gpu, rate in PEAK.items() if gpu in hardware and args.dtype != "float32"]
    peak = 1e12 * WORLD * known[0] if known else math.nan
    epochs = args.max_steps * args.batch_size / len(train)
    left = timedelta(seconds=round((args.max_steps - start) * step_seconds))
    print0(f"device      {WORLD} x {args.device} ({hardware}), {args.dtype}{', compiled' * args.compile}\n"
        f"parameters  {', '.join(f'{name} {n:,}' for name, n in counts.items())}\n"
        f"text        {train.path.parent}: {len(train.tokens):,} tokens, {len(val.tokens):,} for validation\n"
        f"step        {step_tokens:,} tokens = {WORLD} processes x {args.accumulation} passes x "
        f"{args.micro_batch_size} sequences x {args.max_len}\n"
        + f"negatives   {args.negatives} for each sequence vector\n" * args.contrastive +
        f"run         preset {args.preset}, steps {start:,} to {args.max_steps:,}, {epochs:,.1f} epochs, "
        f"to {out}\n"
        f"time        about {left}, at {step_seconds:.3g} s a step")
    if epochs > 100:
        print0(f"warning: {epochs:,.0f} epochs of this text: use more text or a smaller --max_steps.")
    if RANK == 0:
        held = held or lock(out)
        if resumed_from == out / "ckpt.prev.pt" and (out / "ckpt.pt").exists():
            os.replace(out / "ckpt.pt", out / "ckpt.damaged")  # or the next save would make it ckpt.prev.pt
        for file in out.iterdir():  # unfinished files, and those of a run that is replaced
            if re.fullmatch(r"ckpt(\.prev|\.\d+)?\." + ("partial" if start else "(pt|partial)"), file.name):
                file.unlink()
        header = {"date": time.strftime("%Y-%m-%d %H:%M:%S"), "device": hardware, "dtype": args.dtype,
                  "compiled": args.compile, "parameters": counts, "config": vars(config),
                  "constants": settings, "versions": {
                      "python": platform.python_version(), "torch": str(torch.__version__),
                      "numpy": np.__version__, "tiktoken": data.tiktoken.__version__}}
        log = Log(out / "log.jsonl", header, start, changes)

    # the loop; `step` is the number of steps done
    received, stop, bad, times = catch_signals(), 0, False, []  # times: of the steps since the last row
    upcoming = batches(train, args.batch_size, args.micro_batch_size, RANK, WORLD, start)
    for step in range(start, args.max_steps + 1):
        last = step == args.max_steps

        # validate, save, leave (a resumed run has validated before it saved)
        if last or step % args.eval_interval == 0 and (step > start or start == 0):
            final, batch, predictions = evaluate(model, val, args, device, autocast)
            if RANK == 0:
                log.write("val", step, {"tokens": step * step_tokens, **final})
            if step > args.warmup_steps and final["mean_cosine"] > 0.99:
                print0("warning: mean_cosine is near 1: all texts look the same to the model; see README.md")
        due = step > start and (last or stop or step % args.checkpoint_interval == 0)
        keep = step and args.keep_interval and step % args.keep_interval == 0
        if RANK == 0 and (due or keep):
            checkpoint = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step,
                          "config": vars(config), "settings": settings, "skipped": skipped,
                          "scaler": scaler.state_dict(), "tokenizer": tokenizer.state()}
            try:
                os.fsync(log.file.fileno())
                write_file(out / "ckpt.pt", checkpoint, before=out / "ckpt.prev.pt")
                if keep:
                    write_file(out / f"ckpt.{step}.pt", checkpoint)
            except (InputError, OSError) as error:  # a full disk, say
                if last or stop:
                    raise
                print0(f"warning: {error} The run goes on, and tries again at the next interval.")
        if last or stop:
            break

        # forward and backward
        began, totals = time.perf_counter(), {}
        logged = step == 0 or (step + 1) % args.log_interval == 0 or step + 1 == args.max_steps
        for part in range(args.accumulation):
            seed_dropout(args.seed, step, RANK, part)
            ddp.require_backward_grad_sync = part == args.accumulation - 1  # once a step, as no_sync() does
            with autocast:
                losses, statistics, _ = ddp(to_device(next(upcoming), device), gather, logged)
            scaler.scale(losses["loss"] / args.accumulation).backward()
            add(totals, losses, statistics)
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip or math.inf)

        # mostly the only wait for the device: is all finite, and was a signal received, on any process?
        finite = totals["loss"][0].isfinite()  # and with it all terms
        signalled = torch.full_like(norm, received[0][0] if received else 0)
        flags = torch.stack([1 - finite.float(), signalled, norm])
        if WORLD > 1:
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        bad, stop, grad_norm = flags.tolist()
        if not math.isfinite(grad_norm):  # float16 skips such a step and halves its scale, but not for ever
            skipped += 1
            bad = bad or not scaler.is_enabled() or scaler.get_scale() < 2**-20
        if bad:
            terms = ", ".join(f"{name} {totals[name][0] / args.accumulation:.5g}" for name in losses)
            print(f"process {RANK}, step {step + 1}: {terms}, gradient norm {grad_norm:.5g}", file=sys.stderr)
            break

        # update
        lr = learning_rate_at(step, args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

        # log
        times.append(time.perf_counter() - began)
        if logged:
            step_seconds, times = sum(times) / len(times), []
            row = {"tokens": (step + 1) * step_tokens, "tokens_per_sec": round(step_tokens / step_seconds),
                   "lr": lr, "mfu": step_flops / step_seconds / peak, "grad_norm": grad_norm, **means(totals)}
            if scaler.is_enabled():
                row["skipped_steps"] = skipped
            if RANK == 0:
                log.write("train", step + 1, row, (args.max_steps - step - 1) * step_seconds)

    if WORLD > 1:
        dist.barrier()  # torchrun ends all processes once one has failed, and process 0 may still be writing
        ddp = None  # as the last owner of the group it could wait for gloo's threads forever
        dist.destroy_process_group()
    if bad:
        sys.exit(1 if RANK else f"train.py: stopped before step {step + 1}: a loss or gradient is not finite;"
                 f" a smaller learning rate or a longer warm-up may help.")
    if stop and not last:
        print0(f"stopped by {signal.Signals(stop).name} after step {step:,}; --init_from=resume continues")
        sys.exit(128 + int(stop))
    if RANK == 0:
        show_what_was_learned(batch, predictions, tokenizer, val.tokens, final, args)
        print0(f"\nthe checkpoint is {out}/ckpt.pt, the log {out}/log.jsonl")


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
