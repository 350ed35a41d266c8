"""Pretrains COCO-LM.

    python train.py                                     one process, on whatever this machine has
    torchrun --standalone --nproc_per_node=8 train.py   eight GPUs
    python train.py --init_from=resume                  continues the run in out_dir; give its options again

To change something, edit a constant or give --name=value. What is learned, and with it most ablations, is in
model.py's Config; the presets' sizes are in model.py's PRESETS, their schedules in SCHEDULES below, and all
else in the constants below. The command line overrides them all.
"""

import contextlib
import ctypes
import glob
import inspect
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
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
from data import InputError, Parser, Sequences, Tokenizer, batches, lock, run_command
from model import COCOLM, PRESETS, Config, flops, statistics, sum_and_count

# ------------------------------------------------------------------------------------------------------------
# Constants

# the run
preset: Literal[tuple(PRESETS)] = "tiny"  # sizes and schedule: tiny | small | base | base++ | large++
dataset: str = "docs"             # the corpus data_dir/dataset; docs is made if it is missing
data_dir: str = "data"            # folder of all corpora
out_dir: str = "out"              # folder of this run: ckpt.pt, ckpt.prev.pt, log.jsonl
init_from: str = "scratch"        # scratch | resume | resume_or_scratch | path of a checkpoint to start from
overwrite: bool = False           # True: a new run replaces the one that out_dir holds
seed: int = 0                     # of weights and dropout, and of the order, masks and crops of the text
auxiliary_from: str = ""          # with corruption=frozen: the checkpoint whose auxiliary corrupts the text

# optimization; constants without a value come from SCHEDULES; give one a value here to override it
batch_size: int                   # sequences in a step, over all processes
micro_batch_size: int             # sequences in a pass of one process; gradients add up over a step's passes
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
                 eval_interval=100, eval_batches=16, checkpoint_interval=200),
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
SIZES = {"max_len", "layers", "width", "heads", "ffn_width", "auxiliary_layers", "auxiliary_width", "dropout",
         "relative_positions", "relative_bins", "max_distance"}  # taken from the checkpoint in init_from

# torchrun tells each process which one it is
RANK, LOCAL_RANK = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))

# ------------------------------------------------------------------------------------------------------------
# Settings


def make_parser():
    return Parser(__doc__, sys.modules[__name__], Config, without=("vocab_size", "pad_id", "mask_id"))


def read_settings(argv):
    """The settings in one namespace. The first of these that has a value decides:

    the command line, train.py's constants, the checkpoint's sizes, the preset, Config's defaults.
    """
    parser = make_parser()
    defaults = vars(parser.parse_args([]))  # the constants, as they stand in the files
    given = vars(parser.parse_args(argv, Namespace(**dict.fromkeys(defaults))))  # None: not given
    chosen = {name: value for name, value in given.items() if value is not None}
    constants = {name: value for name, value in defaults.items()
                 if name not in Config.__annotations__ and value is not None}
    init_from, preset, sizes = (constants | chosen)["init_from"], (constants | chosen)["preset"], {}
    if init_from not in STARTS:
        checkpoint = read_checkpoint(init_from)
        sizes = {name: value for name, value in checkpoint["config"].items() if name in SIZES}
        if sizes.get("auxiliary_width") == sizes.get("width"):
            sizes["auxiliary_width"] = 0  # as Config has it: as wide as the main Transformer
        its_preset = checkpoint.get("settings", {}).get("preset")  # a converted release may be like none
        preset = its_preset if its_preset in PRESETS else preset
        if chosen.get("preset", preset) != preset:
            raise InputError(f"{init_from} has preset={preset}, not {chosen['preset']}: leave --preset out.")
        chosen["preset"] = preset
    args = Namespace(**defaults | SCHEDULES[preset] | PRESETS[preset] | sizes | constants | chosen)

    if "micro_batch_size" not in constants | chosen:  # the preset's is made to fit
        while args.micro_batch_size > 1 and args.batch_size % (WORLD * args.micro_batch_size):
            args.micro_batch_size -= 1
    if args.batch_size % (WORLD * args.micro_batch_size):
        raise InputError(f"batch_size={args.batch_size} is not a multiple of processes x micro_batch_size = "
                         f"{WORLD} x {args.micro_batch_size}.")
    args.processes, args.accumulation = WORLD, args.batch_size // (WORLD * args.micro_batch_size)
    contrasted = args.micro_batch_size * (WORLD if args.gather_negatives else 1)
    args.negatives = 2 * contrasted - 2  # all vectors but itself and its twin
    if args.contrastive and not args.negatives:
        raise InputError("there are no negatives: choose a larger micro_batch_size or --contrastive=False.")
    if (args.corruption == "frozen") != bool(args.auxiliary_from):
        raise InputError("corruption=frozen and auxiliary_from=CHECKPOINT have to be given together.")
    for source in {args.init_from, args.auxiliary_from} - {*STARTS, ""}:
        if args.overwrite and checkpoint_path(source).resolve().parent == Path(args.out_dir).resolve():
            raise InputError(f"{source} is in the folder that --overwrite=True replaces: "
                             f"choose another --out_dir.")
    make_config(args, vocab_size=2**16)  # raises an error before the text is prepared
    return args


def make_config(args, **vocabulary):
    settings = {name: value for name, value in vars(args).items() if name in Config.__annotations__}
    try:
        return Config(**settings, **vocabulary)
    except ValueError as error:
        raise InputError(str(error)) from None


def usual_settings(preset):
    """The settings of a preset without options, where the constants without a value have none."""
    return vars(make_parser().parse_args([])) | SCHEDULES[preset] | PRESETS[preset]


def choose_hardware(args):
    """Replaces "auto" in device and dtype by what this machine has -> torch.device"""
    here = {"cuda": torch.cuda.is_available(), "cpu": True,
            "mps": torch.backends.mps.is_available() and WORLD == 1}  # gloo has no mps
    if args.device == "auto":
        args.device = next(name for name in ("cuda", "mps", "cpu") if here[name])
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
    """Keeps freed memory: asking the system for it again costs preset small 8 % of a step on the CPU."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        for option, value in ((-4, 0), (-1, -1)):  # M_MMAP_MAX, M_TRIM_THRESHOLD
            ctypes.CDLL("libc.so.6").mallopt(option, value)


# ------------------------------------------------------------------------------------------------------------
# Processes


def connect(device):
    """Connects the processes that torchrun started -> torchrun's store, which outlives its restarts"""
    if not 0 <= RANK < WORLD:
        raise InputError(f"RANK={RANK} has to be from 0 to WORLD_SIZE - 1 = {WORLD - 1}: torchrun sets both.")
    if WORLD == 1 and "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    store = next(dist.rendezvous("env://"))[0]
    if WORLD > 1:
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "")  # hides the addresses of dead processes
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, rank=RANK, world_size=WORLD, store=dist.PrefixStore(restart, store))
    return store


def disconnect():
    if WORLD > 1:
        dist.barrier()  # torchrun ends all processes once one has failed, and process 0 may still be writing
        dist.destroy_process_group()


def print0(*words, **how):
    """print, on process 0 alone"""
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


def require_same(what, value):
    """Refuses to go on if a process has another value than process 0."""
    for rank, other in enumerate(everywhere := gather_objects(value)):
        if other != everywhere[0]:
            raise InputError(f"all processes need the same {what}, but process 0 has {everywhere[0]} and "
                             f"process {rank} {other}.")


def gather(vectors):
    """The sequence vectors (..., B, D) of all processes, (..., N, D), with the gradient of this process' own.

    Every process computes the same loss of all vectors, so it has the whole gradient of its own ones. DDP
    then averages over the processes what should be summed; the factor WORLD makes up for it.
    """
    if WORLD == 1:
        return vectors
    parts = [torch.empty_like(vectors) for _ in range(WORLD)]
    dist.all_gather(parts, vectors.detach().contiguous())
    parts[RANK] = vectors.detach() + WORLD * (vectors - vectors.detach())  # vectors, its gradient times WORLD
    return torch.cat(parts, dim=-2)


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
    """Writes text or bytes, or torch.saves an object, atomically. before: the path that an older file gets"""
    for unfinished in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        unfinished.unlink(missing_ok=True)  # of a process that was killed
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            if isinstance(content, str | bytes):
                file.write(content.encode() if isinstance(content, str) else content)
            else:
                torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        if before and path.exists():
            os.replace(path, before)
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch turns a full disk into a RuntimeError
        raise InputError(f"{path} cannot be written ({error.__context__ or error}).") from None
    finally:
        partial.unlink(missing_ok=True)


def checkpoint_path(path):
    """The path of a checkpoint, or of the ckpt.pt in a run's folder"""
    return Path(path, "ckpt.pt") if Path(path).is_dir() else Path(path)


def read_checkpoint(path, *more):
    """The dict that was saved in a checkpoint or a run's folder. more: further names that it has to have."""
    file = checkpoint_path(path)
    hint = f"a released model becomes a checkpoint by: python convert.py {path} out/released.pt"
    if file.suffix == ".safetensors" or Path(path).is_dir() and not file.exists():
        raise InputError(f"{path} is no checkpoint and no folder that holds ckpt.pt; {hint}")
    saved = data.read_torch(file)
    if missing := [name for name in ("model", "config", "tokenizer", "step", *more) if name not in saved]:
        raise InputError(f"{file} is no checkpoint of this version: it has no {missing[0]!r}; {hint}")
    return saved


@contextlib.contextmanager
def must_fit(path):
    """What goes wrong while a checkpoint is loaded into a model becomes an InputError."""
    try:
        yield
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise InputError(f"{path} does not fit model.py: {' '.join(str(error).split())[:300]}") from None


def load_checkpoint(path, device="cpu"):
    """(the COCOLM in evaluation mode, its Tokenizer) of a checkpoint or of a run's folder"""
    checkpoint = read_checkpoint(path)
    if "task" in checkpoint:
        raise InputError(f"{path} is fine-tuned: load it with finetune.load_finetuned.")
    tokenizer = Tokenizer.from_state(checkpoint["tokenizer"], path)
    with must_fit(path):
        model = COCOLM(Config(**checkpoint["config"]))
        model.load_state_dict(checkpoint["model"])
    tokenizer.max_len = model.config.max_len
    return model.to(device).eval(), tokenizer


def is_checkpoint(file):
    """Whether a file has the name of a checkpoint that a run saves."""
    return re.fullmatch(r"ckpt(\.prev|\.\d+)?\.pt", file.name) is not None


def find_checkpoint(args, settings, restarted):
    """The newest whole checkpoint of out_dir to resume from, and its path; (None, None) for a new run.

    restarted: whether torchrun has restarted this run, which then continues, whatever init_from is.
    A new run is refused where there are checkpoints or a log, unless it is told to overwrite them. A run that
    was killed before its first checkpoint begins again: its log is short and has the same settings.
    """
    out, problems = Path(args.out_dir), ""
    if args.init_from in ("resume", "resume_or_scratch") or restarted:
        for path in (out / "ckpt.pt", out / "ckpt.prev.pt"):
            if path.exists():
                try:
                    checkpoint = read_checkpoint(path, "optimizer", "settings", "scaler", "skipped")
                    print0(f"{problems}resuming from {path}, step {checkpoint['step']:,}")
                    return checkpoint, path
                except InputError as error:
                    problems += f"{error} "
    if args.init_from == "resume":
        raise InputError(f"{problems}{out} holds no checkpoint to resume from.")
    in_the_way = sorted(file for file in out.glob("*") if is_checkpoint(file) or file.name == "log.jsonl")
    repeated = restarted or args.init_from == "resume_or_scratch"  # what is there can be of this run
    may_overwrite = args.overwrite and not repeated
    if repeated and in_the_way == [out / "log.jsonl"]:
        header, rows, _ = read_log(in_the_way[0], math.inf)
        changes = changes_since(header["constants"], settings) if header else {}
        first = min([args.checkpoint_interval, *changes.get("checkpoint_interval", ())])
        may_overwrite = (header and all(row["step"] <= first for row in rows)
                         and not changes.keys() - MAY_CHANGE)
    if in_the_way and not may_overwrite:
        raise InputError(f"{problems}{in_the_way[0]} is there already: continue with --init_from=resume, or "
                         f"replace it with --init_from=scratch --overwrite=True, or use another --out_dir.")
    return None, None


def changes_since(before, settings):
    """name -> (value then, value now) of the settings that differ from those of an earlier run.

    A setting that it does not know counts as its default.
    """
    before = usual_settings(settings["preset"]) | before
    return {name: (before.get(name), now) for name, now in settings.items() if before.get(name) != now}


def clean_folder(out, start, resumed_from):
    """Keeps a damaged checkpoint. Removes the checkpoints of a run that is replaced."""
    if resumed_from == out / "ckpt.prev.pt" and (out / "ckpt.pt").exists():
        os.replace(out / "ckpt.pt", out / "ckpt.damaged")  # or the next save would make it ckpt.prev.pt
    for file in out.iterdir():
        if start == 0 and is_checkpoint(file):
            file.unlink()


def restore(checkpoint, path, model, optimizer, scaler, settings):
    """Puts a run's checkpoint into model, optimizer and scaler -> the settings that have changed since."""
    changes = changes_since(checkpoint["settings"], settings)
    if fixed := changes.keys() - MAY_CHANGE:
        again = [f"--{name}={changes[name][0]}" for name in sorted(fixed - {"text"})]
        raise InputError(f"{path} was made with other settings. To resume it give "
                         f"{' '.join(again) or 'the same text: the checksums of the corpus differ'}.")
    if settings["contrastive"] and "negatives" in changes:
        then, now = changes["negatives"]
        print0(f"warning: {now} negatives for each sequence vector, not {then}")
    with must_fit(path):
        model.load_state_dict(checkpoint["model"])
        # restore Adam's moments only; keep our own parameter groups
        optimizer.load_state_dict(optimizer.state_dict() | {"state": checkpoint["optimizer"]["state"]})
    scaler.load_state_dict(checkpoint["scaler"] or scaler.state_dict())  # {} of a run that was not float16
    return {name: now for name, (_, now) in changes.items()}


def take_weights(model, path, tokenizer, part=""):
    """Copies a checkpoint's weights whose names begin with `part`. Says what is new or not used."""
    checkpoint = read_checkpoint(path)
    if checkpoint["tokenizer"] != tokenizer.state():
        raise InputError(f"{path} has another vocabulary than this corpus; prepare the corpus with its "
                         f"tokenizer: python data.py PATH --encoding={path}")
    for name in sorted(SIZES - {"dropout", "layers" if part else "auxiliary_layers"}):
        here = getattr(model.config, name)
        if (there := checkpoint["config"].get(name, here)) != here:
            raise InputError(f"{path} has {name}={there}, this run {name}={here}.")
    saved, state = ({name: tensor for name, tensor in weights.items() if name.startswith(part)}
                    for weights in (checkpoint["model"], model.state_dict()))
    if model.config.corruption != "frozen":  # only a frozen auxiliary has embeddings of its own
        saved, state = ({name: tensor for name, tensor in weights.items()
                         if not name.startswith("auxiliary.embeddings.")} for weights in (saved, state))
        if checkpoint["config"].get("corruption") == "frozen":  # its auxiliary does not fit shared embeddings
            saved = {name: tensor for name, tensor in saved.items() if not name.startswith("auxiliary.")}
    taken = {name: tensor for name, tensor in saved.items()
             if name in state and tensor.shape == state[name].shape}
    if lost := [name for name in state if name.startswith(part or "main.") and name not in taken]:
        raise InputError(f"{path} has no {lost[0]}.")
    model.load_state_dict(taken, strict=False)
    print0(f"weights from {path}: {len(taken)} tensors")
    for what, weights in (("newly initialized", state), ("not used", saved)):
        if names := [name for name in weights if name not in taken]:
            print0(f"  {what}: {', '.join(names)}")


# ------------------------------------------------------------------------------------------------------------
# The parts of a step


def learning_rate_at(step, args):
    """Linear warm-up to the peak in warmup_steps, then linear decay to 0 at max_steps; step counts from 0."""
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


def accumulate(totals, losses, found):
    """Adds the losses and statistics of a pass to name -> (sum, count)."""
    terms = {name: sum_and_count(loss.detach()) for name, loss in losses.items()}
    for name, sums in (terms | found).items():
        totals[name] = totals.get(name, 0) + sums


def average(totals):
    """name -> mean over all passes of all processes"""
    table = sum_over_processes(torch.stack(list(totals.values())).cpu().double()).tolist()
    return {name: total / count if count else math.nan for name, (total, count) in zip(totals, table)}


def forward_backward(ddp, upcoming, step, args, device, autocast, scaler, logged):
    """Accumulates a step's gradients -> {name: (sum, count)} of its losses and, if logged, statistics."""
    totals = {}
    for part in range(args.accumulation):
        batch = to_device(next(upcoming), device)
        seed_dropout(args.seed, step, RANK, part)
        ddp.require_backward_grad_sync = part == args.accumulation - 1  # DDP reduces once a step
        with autocast:
            losses, outputs = ddp(batch, gather)
        scaler.scale(losses["loss"] / args.accumulation).backward()
        accumulate(totals, losses, statistics(batch, outputs, gather) if logged else {})
    return totals


def agree(loss, norm, received):
    """One reduction a step: is the loss finite everywhere, the largest norm, did anyone get a stop signal?

    The one wait for the device in a step.
    """
    signalled = torch.full_like(norm, received[0][0] if received else 0)
    flags = torch.stack([1 - loss.isfinite().float(), norm, signalled])
    if WORLD > 1:
        dist.all_reduce(flags, dist.ReduceOp.MAX)
    broken, norm, stop = flags.tolist()
    return broken == 0, norm, int(stop)


def area_under_roc(scores, positive):
    """The probability that a positive has a higher score than a negative; ties count half."""
    high, low = scores[positive], np.sort(scores[~positive])
    if not len(high) or not len(low):
        return math.nan
    below = np.searchsorted(low, high, "left") + np.searchsorted(low, high, "right")
    return float(below.sum() / 2 / len(high) / len(low))


@torch.no_grad()
def evaluate(model, sequences, args, device, autocast):
    """Means over validation text, with the same masks every time; the last batch and its outputs."""
    model.eval()
    totals, scores, micro = {}, [], args.micro_batch_size
    for part in range(min(args.eval_batches * args.accumulation, len(sequences) // (WORLD * micro))):
        rows = (part * WORLD + RANK) * micro + np.arange(micro)
        # always step 0: text and masks depend on the index alone
        batch = to_device(sequences.batch(step=0, indices=rows, batch_size=len(sequences)), device)
        with autocast:
            losses, outputs = model(batch, gather)
        accumulate(totals, losses, statistics(batch, outputs, gather))
        if "copy_logits" in outputs:
            pairs = torch.stack([outputs["copy_logits"], outputs["corrupted"] == batch["tokens"]], dim=-1)
            scores.append(pairs[:, 1:].flatten(0, 1))  # (B * (T - 1), 2): [CLS] is never replaced
    model.train()
    means = average(totals)
    if scores:
        score, same = gather(torch.cat(scores)).cpu().numpy().T
        means["copy_auc"] = area_under_roc(score, same > 0)
    return means, batch, outputs


# ------------------------------------------------------------------------------------------------------------
# Output


def git_state():
    """The commit of this code, and whether its files were modified since; {} where git is not there."""
    command = "git describe --always --dirty --abbrev=40 --exclude=*".split()
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, check=True).stdout
        return {"commit": found[:40].decode(), "modified": b"dirty" in found}
    return {}


def nothing_learned(text, tokenizer, args):
    """The scores of a model that has learned nothing, on a text of token ids."""
    counts = np.bincount(text[text != tokenizer.sep_id])  # [SEP] is never masked
    share = counts[counts > 0] / counts.sum()
    return {"mlm_loss": float(-(share * np.log(share)).sum()),  # token frequencies alone
            "copy_accuracy_replaced": 0.0, "copy_auc": 0.5,  # it calls every token original; chance
            "lm_accuracy_replaced": float(share.max()),
            "scl_accuracy": 1 / (args.negatives + 1), "mean_cosine": 1.0}  # chance; all texts look the same


def report(args, config, model, train, val, start, baselines):
    """Prints what the run will do -> the log's header"""
    hardware = torch.cuda.get_device_name() if args.device == "cuda" else platform.machine()
    counts = {name: sum(p.numel() for p in part.parameters())  # both Transformers count what they share
              for name, part in (("all", model), *model.named_children())}
    usual, settings = usual_settings(args.preset), vars(args)
    changed = [f"{name} {settings[name]} ({usual[name]})" for name in usual
               if usual[name] not in ("auto", settings[name])]
    epochs = args.max_steps * args.batch_size / len(train)
    compiled = ", compiled" if args.compile else ""
    print0(f"device      {WORLD} x {args.device} ({hardware}), {args.dtype}{compiled}")
    print0(f"parameters  {', '.join(f'{name} {n:,}' for name, n in counts.items())}")
    print0(f"text        {train.path.parent}: {len(train.tokens):,} tokens, {len(val.tokens):,} for "
           f"validation")
    print0(f"step        {args.batch_size * args.max_len:,} tokens = {WORLD} processes x {args.accumulation} "
           f"passes x {args.micro_batch_size} sequences x {args.max_len}")
    if args.contrastive:
        print0(f"negatives   {args.negatives} for each sequence vector")
    print0(f"run         preset {args.preset}, steps {start:,} to {args.max_steps:,}, {epochs:,.1f} epochs, "
           f"to {args.out_dir}")
    print0(f"changed     {', '.join(changed) or 'nothing'}")
    if args.device == "cuda" and args.preset == "tiny":
        print0(f"warning: preset tiny is for a laptop; for this machine: torchrun --standalone "
               f"--nproc_per_node={torch.cuda.device_count()} train.py --preset=base --dataset=NAME")
    if epochs > 100:
        print0(f"warning: {epochs:,.0f} epochs of this text: use more text or a smaller --max_steps.")
    return {"date": time.strftime("%Y-%m-%d %H:%M:%S"), "device": hardware, "dtype": args.dtype,
            "compiled": args.compile, "parameters": counts, "config": vars(config), "code": git_state(),
            "nothing_learned": baselines, "versions": {
                "python": platform.python_version(), "torch": str(torch.__version__),
                "numpy": np.__version__, "tiktoken": data.tiktoken.__version__}}


def read_log(path, last_step):
    """The header of a log (None if it is lost), its rows up to last_step, the number of unreadable lines"""
    header, rows, unreadable = None, [], 0
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
            if isinstance(row.get("constants"), dict):
                header = row
            elif row["split"] in ("train", "val") and row["seconds"] >= 0 and row["step"] <= last_step:
                rows.append(row)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):  # torn, or not ours
            unreadable += 1
    return header, rows, unreadable


class Log:
    """out_dir/log.jsonl: a header, then a row for each logged step and validation. The console shows some."""

    columns = {"loss": "loss", "mlm_loss": "mlm", "copy_loss": "copy", "lm_loss": "lm", "scl_loss": "scl",
               "copy_auc": "auc", "scl_accuracy": "scl acc", "grad_norm": "norm"}

    def __init__(self, path, header, start, changes):
        """start: the step to which the log of a resumed run is cut back; changes: of its settings"""
        before, rows, unreadable = read_log(path, start) if start else (None, [], 0)
        if unreadable:
            print0(f"{path}: {unreadable} lines could not be read and were dropped.")
        header = before or header
        if changes:
            header.setdefault("resumed", []).append({"step": start, **changes})
        write_file(path, "".join(json.dumps(row) + "\n" for row in [header, *rows]))
        self.path, self.file = path, open(path, "ab", buffering=0)
        self.began = time.monotonic() - (rows[-1]["seconds"] if rows else 0.0)
        titles = "".join(f"{title:>8}" for title in self.columns.values())
        print0(f"\n    step split{titles}  tokens/s  time left")

    def write(self, split, step, values, left=None):
        """Adds a row. left: the seconds that the run still takes"""
        row = {"split": split, "step": step, "seconds": round(time.monotonic() - self.began, 3)}
        row |= {n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in values.items()}
        line, size = (json.dumps(row) + "\n").encode(), os.fstat(self.file.fileno()).st_size
        try:
            if self.file.write(line) < len(line):
                raise OSError("the disk is full")
        except OSError as error:
            self.file.truncate(size)  # no half row
            print0(f"warning: {self.path} cannot be written ({error}). The run goes on without this row.")
        cells = [" " * 8 if row.get(name) is None else f" {row[name]:7.4g}" for name in self.columns]
        line = f"{step:8,} {split:5}" + "".join(cells)
        if split == "train":
            line += f"{row['tokens_per_sec']:10,}  {timedelta(seconds=round(left))}"
        print0(line.rstrip())


def save(out, log, checkpoint, keep, required):
    """Writes ckpt.pt and, if `keep`, ckpt.STEP.pt. A failed write ends the run only if it is required."""
    try:
        with contextlib.suppress(OSError):
            os.fsync(log.file.fileno())
        write_file(out / "ckpt.pt", checkpoint, before=out / "ckpt.prev.pt")
        required = False  # the run can be resumed without the copy
        if keep:
            write_file(out / f"ckpt.{checkpoint['step']}.pt", checkpoint)
    except InputError as error:  # a full disk, say
        if required:
            raise
        print0(f"warning: {error} The run goes on, and tries again at the next interval.")


def show_what_was_learned(batch, outputs, tokenizer, baselines, scores):
    """Validation text, what the auxiliary made of it, and what the main model says to that; the scores."""
    print0("\n  validation text, with [original: auxiliary's token, p(original) > main model's correction]")
    for row, tokens in enumerate(batch["tokens"][:2]):
        words, corrupted = tokenizer.pieces(tokens), outputs["corrupted"][row]
        for k, i in enumerate(batch["masked"][row].tolist()):
            if corrupted[i] != tokens[i]:
                put = tokenizer.pieces(corrupted[i : i + 1])[0].strip()
                if "copy_logits" in outputs:
                    put += f" {outputs['copy_logits'][row, i].sigmoid():.2f}"
                if "lm_tokens" in outputs:
                    put += f" > {tokenizer.pieces(outputs['lm_tokens'][row, k : k + 1])[0].strip()}"
                space = " " if words[i].startswith(" ") else ""
                words[i] = f"{space}[{words[i].strip()}: {put}]"
        lines = textwrap.wrap("".join(words[1:]), 96)[:5]
        print0("", *(f"  {line}" for line in lines), sep="\n")

    print0(f"\n  {'on validation text':26}{'this model':>12}{'nothing learned':>17}")
    for name, baseline in baselines.items():
        if name in scores:
            better = "↓" if name in ("mlm_loss", "mean_cosine") else "↑"
            print0(f"  {better} {name:24}{scores[name]:12.4f}{baseline:17.4f}")
    print0("  A good model gives replaced tokens a low p and proposes the original.\n"
           "  Compare copy_auc only at equal mlm_loss: a weak auxiliary's replacements are easy to detect.")


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
    train, val = (Sequences(folder, split, c.max_len, c.mask_count, c.crop_len, seed)
                  for split, seed in (("train", args.seed), ("val", 0)))  # the same validation for all seeds
    for split, least in ((train, args.batch_size), (val, WORLD * args.micro_batch_size)):
        if len(split) < least:
            raise InputError(f"too little text: {split.path} has {len(split)} sequences, and a batch {least};"
                             f" use more text, a smaller batch or a larger --val_fraction.")
    return tokenizer, c, train, val


def make_model(config, tokenizer, args, device):
    """The model with the weights that the run begins with. (A resumed run then replaces them.)"""
    torch.manual_seed(args.seed)
    model = COCOLM(config)
    if args.init_from not in STARTS:
        take_weights(model, args.init_from, tokenizer)
    if args.auxiliary_from and args.init_from != "resume":
        take_weights(model, args.auxiliary_from, tokenizer, "auxiliary.")
    model.main.recompute = args.recompute
    return model.to(device).train()


def wrap(model, train, args, device, autocast):
    """The model in DistributedDataParallel, if there are several processes. Its buffers are constants.

    DDP reorders its buckets after the first pass, and with them the order of sums. A discarded pass comes
    first, so that a resumed run sums in the order of an undisturbed one.
    """
    if WORLD == 1:
        return model
    names = inspect.signature(DistributedDataParallel).parameters  # torch 2.13 has a new one
    sync = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True, **{sync: False})
    example = to_device(train.batch(0, range(args.micro_batch_size), args.batch_size), device)
    with autocast:
        losses, _ = ddp(example, gather)
    losses["loss"].backward()
    model.zero_grad()
    return ddp


def main(argv):
    # settings, text, model
    keep_memory()
    args = read_settings(argv)
    device = choose_hardware(args)
    can_compile = args.device == "cuda" and any(map(shutil.which, ("cc", "gcc", "clang", "cl")))
    args.compile = args.compile == "True" or args.compile == "auto" and can_compile
    autocast = torch.autocast(device.type, getattr(torch, args.dtype), enabled=args.dtype != "float32")
    store = connect(device)
    tokenizer, config, train, val = open_text(args)
    settings = vars(args) | {"text": data.read_meta(train.path.parent)["sha256"]}
    for name in sorted(settings.keys() - {"data_dir", "out_dir"}):  # which may differ from node to node
        require_same(name, settings[name])
    model = make_model(config, tokenizer, args, device)
    optimizer = make_optimizer(model, args)
    scaler = torch.amp.GradScaler(device.type, enabled=args.dtype == "float16")

    # out_dir is locked before anything is looked for in it
    out, start, changes, skipped = Path(args.out_dir), 0, {}, 0  # skipped: steps, by float16's scaler
    if args.init_from == "resume" and not out.exists():
        raise InputError(f"{out} does not exist, so there is no checkpoint to resume from.")
    lock_file = lock(out) if RANK == 0 else None  # locked as long as it is open
    restarted = store is not None and store.check(["begun"])
    checkpoint, resumed_from = find_checkpoint(args, settings, restarted)
    if checkpoint:
        changes = restore(checkpoint, resumed_from, model, optimizer, scaler, settings)
        start, skipped = checkpoint["step"], checkpoint["skipped"]
    del checkpoint
    require_same("step of the checkpoint in out_dir", start)
    if start >= args.max_steps:
        print0(f"{out} is finished: step {start:,} of max_steps={args.max_steps:,}.")
        return disconnect()

    # report
    baselines = nothing_learned(val.tokens[: 2**24], tokenizer, args)
    header = report(args, config, model, train, val, start, baselines) | {"constants": settings}
    if RANK == 0:
        clean_folder(out, start, resumed_from)
        log = Log(out / "log.jsonl", header, start, changes)
        if store is not None:
            store.set("begun", "")
    if args.compile:
        model.compile(dynamic=False)
    ddp = wrap(model, train, args, device, autocast)

    # the loop: `step` steps are done; validate and save that state, then take the next step
    received, times = catch_signals(), []  # times: of the steps since the last row of the log
    upcoming = batches(train, args.batch_size, args.micro_batch_size, RANK, WORLD, start)
    step_tokens, finite, stop = args.batch_size * args.max_len, True, 0
    for step in range(start, args.max_steps + 1):
        last = step == args.max_steps

        # validate, save, leave
        validated = step == start > 0  # by the run that saved the checkpoint
        if last or step % args.eval_interval == 0 and not validated:
            scores, batch, outputs = evaluate(model, val, args, device, autocast)
            if RANK == 0:
                log.write("val", step, {"tokens": step * step_tokens, **scores})
            # RTD learns although mean_cosine stays near 1
            if args.token_task != "rtd" and 2 * step > args.max_steps and scores["mean_cosine"] > 0.99:
                print0("warning: mean_cosine is near 1: all texts look the same; see tests/README.md")
        due = step > start and (last or stop > 0 or step % args.checkpoint_interval == 0)
        keep = step > 0 and args.keep_interval > 0 and step % args.keep_interval == 0
        if RANK == 0 and (due or keep and (step > start or not (out / f"ckpt.{step}.pt").exists())):
            save(out, log, {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step,
                            "config": vars(config), "settings": settings, "skipped": skipped,
                            "scaler": scaler.state_dict(), "tokenizer": tokenizer.state()},
                 keep, required=last or stop > 0)
        if last or stop:
            break

        # forward and backward, clip, agree
        began = time.perf_counter()
        logged = step == 0 or (step + 1) % args.log_interval == 0 or step + 1 == args.max_steps
        totals = forward_backward(ddp, upcoming, step, args, device, autocast, scaler, logged)
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.grad_clip or math.inf)
        finite, grad_norm, stop = agree(totals["loss"][0], norm, received)
        if not math.isfinite(grad_norm):  # only float16 may skip a step, until its scale is below 2**-20
            skipped += 1
            finite = finite and scaler.is_enabled() and scaler.get_scale() >= 2**-20
        if not finite:
            break

        # learning rate, optimizer
        lr = learning_rate_at(step, args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

        # log
        times.append(time.perf_counter() - began)
        if logged:
            seconds, times = sum(times) / len(times), []
            row = {"tokens": (step + 1) * step_tokens, "tokens_per_sec": round(step_tokens / seconds),
                   "tflops": args.batch_size * flops(config) / seconds / WORLD / 1e12, "lr": lr,
                   "grad_norm": grad_norm, **average(totals)}
            if scaler.is_enabled():
                row["skipped_steps"] = skipped
            if RANK == 0:
                log.write("train", step + 1, row, (args.max_steps - step - 1) * seconds)

    if not finite:
        terms = ", ".join(f"{name} {sums[0] / args.accumulation:.5g}" for name, sums in totals.items()
                          if "loss" in name)
        print(f"process {RANK}, step {step + 1}: {terms}, gradient norm {grad_norm:.5g}", file=sys.stderr)
    del ddp  # after its group it could wait for gloo's threads forever
    disconnect()
    if not finite:
        sys.exit(1 if RANK else f"train.py: stopped before step {step + 1}: a loss or gradient is not finite."
                 f" Start a new run in another --out_dir, with a lower learning rate or more warm-up.")
    if stop and not last:
        print0(f"stopped by {signal.Signals(stop).name} after step {step:,}; --init_from=resume continues")
        sys.exit(128 + stop)
    if RANK == 0:
        show_what_was_learned(batch, outputs, tokenizer, baselines, scores)
        print0(f"\nthe checkpoint is {out}/ckpt.pt, the log {out}/log.jsonl")


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
