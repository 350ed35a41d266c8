"""Pretrains COCO-LM: edit the constants below or override them on the command line, then

    python train.py                                         one process, on whatever this machine has
    torchrun --standalone --nproc_per_node=8 train.py       eight GPUs
    python train.py --init_from=resume                      goes on where the run in out_dir was stopped

From a checkpoint back to a model, in a notebook:

    from train import load_checkpoint
    model, tokenizer = load_checkpoint("out/ckpt.pt")
"""

import contextlib
import ctypes
import dataclasses
import json
import math
import os
import platform
import re
import shutil
import signal
import sys
import time
import uuid
import zipfile
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

import data
from data import InputError, Sequences, Tokenizer, checked, nearest, parse_options, run_command, sentence, tell
from model import CHOICES, COCOLM, DEFAULTS, PRESETS, RANGES, Config, flops

# --------------------------------------------------------------------------------------------------------------------
# Constants. An option --name=value goes before what is written here, and that before the preset.

# what
preset = "tiny"                 # tiny | small | base | base++ | large++: sizes in model.py, training in TRAINING below
dataset = "docs"                # the corpus data_dir/dataset, made by data.py; docs is made if it is not there
data_dir = "data"               # folder of the prepared corpora
out_dir = "out"                 # folder of the run: ckpt.pt, ckpt.prev.pt, log.jsonl
init_from = "scratch"           # scratch | resume | resume_or_scratch | a checkpoint's path, to start from its weights
overwrite = False               # True: start from scratch though out_dir holds a run
seed = 0                        # of weights, dropout and the order, masks and crops of the text
# how much, how fast
batch_size = None               # from the preset; sequences a step, over all processes
micro_batch_size = None         # from the preset; sequences a process and pass; the rest is gradient accumulation
max_steps = None                # from the preset; optimizer steps
warmup_steps = None             # from the preset; steps of linear warm-up, then linear decay to 0 at max_steps
learning_rate = None            # from the preset; the peak
weight_decay = 0.01             # of weights, not of biases and norms
beta1 = 0.9                     # of AdamW: decay of the mean of gradients
beta2 = 0.98                    # of AdamW: decay of the mean of squared gradients
epsilon = 1e-6                  # of AdamW
grad_clip = None                # from the preset; largest norm of the gradient, 0 = no clipping
# where
device = "auto"                 # auto | cpu | cuda | mps
dtype = "auto"                  # auto | float32 | bfloat16 | float16: of the autocast; float16 brings loss scaling
compile = "auto"                # auto | True | False: torch.compile; auto: on CUDA
recompute = False               # True: activation checkpointing: about a third more time, much less memory
# what is seen of it
log_interval = 20               # steps between lines of the log
eval_interval = None            # from the preset; steps between validations
eval_batches = None             # from the preset; batches of batch_size validation sequences, fewer if there are fewer
checkpoint_interval = None      # from the preset; steps between checkpoints
checkpoint_keep = 0             # milestones: so many checkpoints, spread over the run, stay as ckpt.STEP.pt
timeout = 600                   # seconds that a process waits for the others before it says which are gone, and ends
debug_step = 0                  # N: only computes step N with the weights of init_from and says all of it
# the model and its objective; what each means stands at Config in model.py
max_len = None                  # from the preset; tokens in a sequence
layers = None                   # from the preset; of the main Transformer
width = None                    # from the preset; of the main Transformer
heads = None                    # from the preset; attention heads
ffn_width = None                # from the preset; inner width of the feed-forward layers
dropout = None                  # from the preset; of the main Transformer
relative_positions = None       # from the preset; False: absolute positions alone
relative_bins = None            # from the preset; entries of the relative-position table
max_distance = None             # from the preset; tokens, the largest relative position told apart
relative_init = None            # from the preset; normal | local: how the relative-position table starts
auxiliary_layers = None         # from the preset; of the auxiliary Transformer
auxiliary_width = None          # from the preset; 0: as wide as the main Transformer
auxiliary_dropout = None        # from the preset; above 0 the auxiliary makes a second pass to sample from
corruption = None               # from the preset; auxiliary | random | frozen
auxiliary_from = ""             # with corruption = "frozen": the checkpoint whose auxiliary corrupts
token_task = None               # from the preset; clm | rtd | all_token_mlm | mlm
lm_loss = None                  # from the preset; mixture | weighted
copy_mechanism = None           # from the preset; False: plain cross-entropy beside the copy loss
stop_gradient = None            # from the preset; False: the LM loss trains the copy head too
lambda_copy = None              # from the preset; weight of the copy loss
mask_fraction = None            # from the preset; of the tokens behind [CLS]
contrastive = None              # from the preset; False: no sequence contrastive learning
lambda_scl = None               # from the preset; weight of the contrastive loss
crop = None                     # from the preset; length of the crop, as a share of the sequence
temperature = None              # from the preset; of the contrastive softmax
gather_negatives = None         # from the preset; False: contrast within a process only
# --- end of the constants

TRAINING = {  # what a preset says about training; learning rate, warm-up and clipping are ours, no source has them
    "tiny": dict(batch_size=16, micro_batch_size=16, max_steps=1300, warmup_steps=300, learning_rate=1.5e-3,
                 grad_clip=2.0, eval_interval=650, eval_batches=16, checkpoint_interval=200),
    "small": dict(batch_size=256, micro_batch_size=32, max_steps=100_000, warmup_steps=5_000, learning_rate=5e-4,
                  grad_clip=2.0, eval_interval=1000, eval_batches=8, checkpoint_interval=1000),
    "base": dict(batch_size=2048, micro_batch_size=32, max_steps=125_000, warmup_steps=10_000, learning_rate=5e-4,
                 grad_clip=2.0, eval_interval=1000, eval_batches=8, checkpoint_interval=1000),
}
TRAINING["base++"] = TRAINING["base"] | dict(max_steps=2_000_000)
TRAINING["large++"] = TRAINING["base++"] | dict(micro_batch_size=16, learning_rate=3e-4)

COUNT, SHARE = (1, 2**40), (0.0, 1.0)
MODEL_DEFAULTS = {n: default for n, default in DEFAULTS.items() if n not in ("vocab_size", "pad_id", "mask_id")}
ALLOWED = {name: list(CHOICES.get(name, ())) or RANGES.get(name, bool) for name in MODEL_DEFAULTS} | {
    "preset": list(PRESETS), "dataset": str, "data_dir": str, "out_dir": str, "init_from": str, "auxiliary_from": str,
    "overwrite": bool, "seed": (0, 2**63), "batch_size": COUNT, "micro_batch_size": COUNT, "max_steps": COUNT,
    "warmup_steps": (0, 2**40), "learning_rate": (0.0, 10.0), "weight_decay": SHARE, "beta1": (0.0, 0.9999999),
    "beta2": (0.0, 0.9999999), "epsilon": (1e-30, 1.0), "grad_clip": (0.0, 1e9), "auxiliary_width": (0, 2**20),
    "device": ["auto", "cpu", "cuda", "mps"], "dtype": ["auto", "float32", "bfloat16", "float16"],
    "compile": ["auto", "True", "False", True, False], "recompute": bool, "log_interval": COUNT,
    "eval_interval": COUNT, "eval_batches": COUNT, "checkpoint_interval": COUNT, "checkpoint_keep": (0, 2**40),
    "timeout": (1, 10**6), "debug_step": (0, 2**40),
}
FREE = {"data_dir", "out_dir", "init_from", "overwrite", "micro_batch_size", "max_steps", "device", "dtype", "compile",
        "recompute", "log_interval", "eval_interval", "eval_batches", "checkpoint_interval", "checkpoint_keep",
        "timeout", "debug_step"}  # what a resumed run may change
JOINING = 600  # seconds that the processes have to find each other; `timeout` is not read yet
SKIPS = 50  # steps in a row that float16 may skip: the scale has then been halved as often, so it is not the scale
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's mallopt
PEAK = {  # teraflops a second, 16 bit with float32 sums, dense, from the makers' data sheets; the first name that fits
    "B200": 2250, "H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "L40": 181, "L4": 121,
    "RTX 4090": 165, "RTX 3090": 71, "V100": 125, "T4": 65,
}

# --------------------------------------------------------------------------------------------------------------------
# Settings


def read_constants(path, values, allowed):
    """name -> (value, what it may be, reason) of the constants at the top of a file, for parse_options."""
    source = Path(path).read_text(encoding="utf-8").split("# --- end of the constants")[0]
    reasons = dict(re.findall(r"^(\w+) *=.*?(?:  # (.*))?$", source, re.M))
    for name in reasons:
        if name not in allowed:
            raise InputError(f"{path}: there is no constant {name}{nearest(name, allowed)}")
    return {name: (values[name], allowed[name], reason) for name, reason in reasons.items()}


def settle(argv):
    """All settings of this run, the configuration fields among them, and the checkpoint it goes on from or None. That
    has to lie on the first process' disk alone: the others get all but its weights, see `share`."""
    in_file, given = together(read_options, argv)
    asked = {name: value for name, value in {**in_file, **given}.items() if value is not None}
    checkpoint = together(lambda: find_checkpoint(asked) if rank() == 0 else None)
    light = on_first(lambda: checkpoint and {**checkpoint, "model": {}, "optimizer": {
        "scaler": checkpoint["optimizer"].get("scaler", {})}})
    try:
        settings = together(choose, in_file, given, light)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if not light:
            raise
        raise InputError(f"{asked['out_dir']}/ckpt.pt has constants that cannot be used ({error!r}).") from None
    for path in () if light else (settings["init_from"], settings["auxiliary_from"]):
        if path not in ("scratch", "resume_or_scratch", ""):
            on_first(lambda: read_checkpoint(path) and None)  # found now if it is missing or damaged
    return settings, checkpoint or light


def read_options(argv):
    """The constants in this file (None: the preset's), and the options on the command line."""
    options = read_constants(__file__, globals(), ALLOWED)
    given, others = parse_options(argv, options, __doc__)
    if others:
        raise InputError(f"unexpected {others[0]!r}: options are written --name=value.")
    for name in ("dataset", "data_dir", "out_dir", "init_from"):
        if not given.get(name, globals()[name]):
            raise InputError(f"{name} is empty: leave it out or give it a value.")
    from_preset = {**MODEL_DEFAULTS, **TRAINING["tiny"]}
    return {name: None if value is None and name in from_preset else checked(name, value, allowed)
            for name, (value, allowed, _) in options.items()}, given


def find_checkpoint(asked):
    """What is resumed from: out_dir/ckpt.pt or, where that is damaged, the one before it; None for a new run."""
    path, start = Path(asked["out_dir"], "ckpt.pt"), asked["init_from"]
    before_it = path.with_name("ckpt.prev.pt")
    others = [file for file in (before_it, *milestones(path.parent)) if file.exists()]
    if not path.exists() and (others or path.is_symlink()) and not asked["overwrite"]:
        raise InputError(f"{path} is gone but {others[0]} is there: rename it to ckpt.pt to go on, or say "
                         f"--overwrite=True." if others else
                         f"{path} is a link to {os.readlink(path)}, which is not there: is a disk missing? To start "
                         f"from scratch say --overwrite=True.")
    parent = next(p for p in [path.parent.absolute(), *path.parent.absolute().parents] if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"out_dir={path.parent} cannot be used: {parent} is no folder that one can write to.")
    if start == "resume" or (start == "resume_or_scratch" and path.exists()):
        try:
            return read_checkpoint(path)
        except InputError as error:
            if not before_it.exists():
                raise
            first = str(error).rstrip(".")
        try:
            checkpoint = read_checkpoint(before_it)
        except InputError as error:
            raise InputError(f"{first}, and {error}") from None
        say(f"warning: {first}, so the run goes on from {before_it}, step {checkpoint['step']}.")
        return checkpoint
    if start != "resume_or_scratch" and not asked["overwrite"] and not asked["debug_step"]:
        for name in ("ckpt.pt", "log.jsonl"):
            if (path.parent / name).exists():
                raise InputError(f"{path.parent} holds a run already: go on with it by --init_from=resume, "
                                 f"choose another --out_dir, or say --overwrite=True.")
    return None


def choose(in_file, given, checkpoint):
    """The settings: of the command line, else an edited constant, else the resumed checkpoint, else the preset."""
    asked = {name: value for name, value in {**in_file, **given}.items() if value is not None}
    before, explicit = checkpoint and checkpoint["constants"], "micro_batch_size" in asked
    if checkpoint:
        before = before | {n: checked(n, value, ALLOWED[n]) for n, value in before.items() if n in ALLOWED}
        changed = {name: value for name, value in in_file.items() if value != before["in_file"].get(name, value)}
        path = Path(asked["out_dir"])
        asked = {name: value for name, value in {**changed, **given}.items() if value is not None}
        for name, value in asked.items():
            if name not in FREE and value != before.get(name, value):
                raise InputError(f"{name}={value} cannot be changed in a resumed run, which has {name}={before[name]}; "
                                 f"start another run with --init_from={path}/ckpt.pt and another --out_dir.")
        explicit, asked = "micro_batch_size" in asked, {**before, "out_dir": str(path), **asked}
        if not explicit:  # keep the number of negatives if the processes changed
            asked["micro_batch_size"] = max(1, before["micro_batch_size"] * before["processes"] // world())

    of_preset = {**MODEL_DEFAULTS, **TRAINING[asked["preset"]], **PRESETS[asked["preset"]]}
    chosen = {**of_preset, **asked, "in_file": in_file}
    chosen["changed"] = "".join(f" {n}={v}" for n, v in asked.items() if n in of_preset and v != of_preset[n])
    split_batch(chosen, explicit)
    if checkpoint:
        chosen["resumed_with"] = {name: chosen[name] for name in [*ALLOWED, "processes"] if name in before
                                  and chosen[name] != before[name] and name not in ("init_from", "overwrite")}
        if chosen["contrastive"] and negatives(chosen) != negatives(before):
            say(f"warning: each sequence vector has {negatives(chosen)} negatives in a pass, no longer "
                f"{negatives(before)}: the sequences stay the same, the contrastive loss does not; processes x "
                f"micro_batch_size decides.")
    if chosen["warmup_steps"] > chosen["max_steps"]:
        say(f"warmup_steps={chosen['warmup_steps']} is longer than the run: shortened to {chosen['max_steps']} steps.")
    if (chosen["corruption"] == "frozen") != bool(chosen["auxiliary_from"]):
        raise InputError("corruption=frozen and auxiliary_from=CHECKPOINT go together: give both or neither.")
    make_config(chosen, vocab_size=2**16)  # a value out of range is found now, not after the text is prepared
    return chosen


def negatives(settings):
    """How many others each sequence vector is contrasted with in a pass."""
    return 2 * settings["micro_batch_size"] * (settings["processes"] if settings["gather_negatives"] else 1) - 2


def split_batch(settings, explicit):
    """batch_size = processes x micro_batch_size x accumulation"""
    batch, micro, W = settings["batch_size"], settings["micro_batch_size"], world()
    if not explicit and batch % W == 0:
        micro = max(m for m in range(1, min(micro, batch // W) + 1) if batch // W % m == 0)
    if batch % (W * micro):
        raise InputError(f"batch_size={batch} cannot be split over {W} processes with micro_batch_size={micro}: "
                         f"it has to be a multiple of {W} x {micro} = {W * micro}.")
    settings |= {"micro_batch_size": micro, "processes": W, "accumulation": batch // (W * micro)}


def make_config(settings, **vocabulary):
    try:
        return Config(**{name: settings[name] for name in MODEL_DEFAULTS}, **vocabulary)
    except ValueError as error:
        raise InputError(str(error)) from None


# --------------------------------------------------------------------------------------------------------------------
# Processes and devices


def join():
    """Connects the processes that torchrun started.

    Its store outlives a restart, and with it the addresses of the processes before. So each start has a prefix of its
    own in it, which process 0 tells to those that ask with a number that no process had before.
    """
    end = time.time() + JOINING
    try:
        store, number, processes = next(rendezvous("env://", timeout=timedelta(seconds=JOINING)))
        mine = start = uuid.uuid4().hex
        if number > 0:
            store.set(f"asks {number}", mine)
            start = store.get(f"start for {mine}").decode()  # waits for it
            store.set(f"{start} {number}", "joined")
        missing = set(range(1, processes)) if number == 0 else set()
        while missing:
            for other in list(missing):
                if store.check([f"asks {other}"]):  # perhaps still the one of the start before
                    store.set(f"start for {store.get(f'asks {other}').decode()}", start)
                if store.check([f"{start} {other}"]):
                    missing.remove(other)
            if time.time() > end:
                raise RuntimeError(f"after {JOINING} s process {', '.join(map(str, sorted(missing)))} is not there")
            time.sleep(0.02)
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", rank=number,
                                world_size=processes, store=dist.PrefixStore(start, store))
    except (RuntimeError, ValueError) as error:  # torch's own errors, and what is missing in the environment
        raise InputError(f"the processes did not find each other ({str(error).splitlines()[0]}): start them with "
                         f"torchrun, and look at what the others say.") from None


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def say(*words):
    if rank() == 0:
        tell(*words)


def together(work, *arguments):
    """work(*arguments), at the end of which all processes wait for each other. If one has an error all raise it, so
    that it is printed once and nobody is left waiting."""
    result, problem = None, None
    try:
        result = work(*arguments)
    except (InputError, OSError) as error:
        problem = sentence(error)
    problem = next((p for p in everyones(problem) if p), None)
    if problem:
        raise InputError(problem)
    return result


def on_first(work, *arguments):
    """What the first process' work(*arguments) returns, on all of them."""
    result = [together(lambda: work(*arguments) if rank() == 0 else None)]
    if world() > 1:
        dist.broadcast_object_list(result)
    return result[0]


def everyones(value):
    """The values of all processes, in a list."""
    values = [value]
    if world() > 1:
        values = [None] * world()
        dist.all_gather_object(values, value)
    return values


def gather_vectors(vectors):
    """The sequence vectors (..., B, D) of all processes, (..., N, D), with the gradient of this process' own.

    All processes compute the same loss of all vectors, so each has the full gradient of its own ones; DDP then
    averages over processes what should be summed, which the factor `world` makes good.
    """
    W = world()
    parts = [torch.empty_like(vectors) for _ in range(W)]
    dist.all_gather(parts, vectors.detach().contiguous())
    parts[rank()] = vectors.detach() + W * (vectors - vectors.detach())  # the value is exactly that of `vectors`
    return torch.cat(parts, dim=-2)


def sum_over_processes(tensor):
    if world() > 1:
        dist.all_reduce(tensor)
    return tensor


def choose_device(settings):
    name = settings["device"]
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(n for n in ("cuda", "mps", "cpu") if here[n])
    if not here[name]:
        raise InputError(f"device={name} is not available here; use --device=auto.")
    if name != "cuda":
        return torch.device(name)
    local = int(os.environ.get("LOCAL_RANK", 0))
    if local >= torch.cuda.device_count():
        raise InputError(f"process {local} has no GPU of its own: {torch.cuda.device_count()} are here; "
                         f"lower --nproc_per_node.")
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def choose_dtype(settings, device):
    """The autocast type: bfloat16 where the device has it in hardware, else float16 on CUDA, else float32."""
    name = settings["dtype"]
    if device.type == "mps" and name not in ("auto", "float32"):
        raise InputError(f"dtype={name} is not supported on mps: use --dtype=float32.")
    if name == "auto" and device.type == "cuda":
        name = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    elif name == "auto":
        features = torch.cpu.get_capabilities() if device.type == "cpu" else {}
        name = "bfloat16" if features.get("avx512_bf16") or features.get("amx_bf16") else "float32"
    return getattr(torch, name)


def keep_memory():
    """Lets the process keep the memory that it frees. glibc gives large blocks back to the system and gets them anew,
    page by page: a fifth of a step of preset small on the CPU."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def peak_flops(device, dtype):
    """Floating-point operations a second that the device can do: from PEAK, else of a matrix product, measured."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" and dtype != torch.float32 else ""
    for gpu, rate in PEAK.items():
        if gpu in name:
            return rate * 1e12
    n = 512 if device.type == "cpu" else 8192
    x, fastest, began = torch.randn(n, n, device=device, dtype=dtype), math.inf, time.time()
    while time.time() - began < 0.1:
        start = time.perf_counter()
        (x @ x)[0, 0].item()  # waits for the device
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * n**3 / fastest


# --------------------------------------------------------------------------------------------------------------------
# Checkpoints


def load_whole(path, **how):
    """torch.load behind a look at all checksums, 2 GB/s: by itself it takes a tensor with a flipped bit as it is."""
    with zipfile.ZipFile(path) as archive:  # with an attribute's bit for a folder torch would read unset memory
        if archive.testzip() or any(record.external_attr for record in archive.infolist()):
            raise zipfile.BadZipFile("a checksum differs")
    return torch.load(path, map_location="cpu", weights_only=True, **how)


def is_whole(path):
    try:
        return bool(load_whole(path, mmap=True))
    except Exception:  # zipfile's, pickle's and torch's own kinds of damage
        return False


def put_also(path, other):
    """Makes `other` the same file as `path`, at no moment an incomplete one."""
    spare = path.with_suffix(".spare")
    spare.unlink(missing_ok=True)
    try:
        os.link(path, spare)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, spare)
    os.replace(spare, other)
    spare.unlink(missing_ok=True)  # os.replace leaves it if both are the same file already


def write_checkpoint(path, checkpoint):
    """Puts a checkpoint in place so that at no moment there is none. The one before stays as ckpt.prev.pt, unless it
    was damaged meanwhile: then the one before that does."""
    path = Path(path)
    partial = path.with_suffix(".partial")
    try:
        with open(partial, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        if is_whole(path):
            put_also(path, path.with_suffix(".prev.pt"))
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch turns a full disk into a RuntimeError
        for unfinished in (partial, path.with_suffix(".spare")):
            unfinished.unlink(missing_ok=True)
        reason = error if isinstance(error, OSError) else error.__context__ or error
        last = "the last checkpoint stands" if path.exists() else "there is no checkpoint yet"
        raise InputError(f"{path} could not be written ({reason}); {last}.") from None


def milestones(out):
    return [file for file in out.glob("ckpt.*.pt") if re.fullmatch(r"ckpt\.\d+\.pt", file.name)]


def keep_milestone(path, step, settings):
    """The first checkpoint at or behind each checkpoint_keep-th part of the run stays as ckpt.STEP.pt."""
    mark = step * settings["checkpoint_keep"] // settings["max_steps"]
    there = [int(file.name.split(".")[1]) for file in milestones(path.parent)]
    if mark and all(other * settings["checkpoint_keep"] // settings["max_steps"] != mark for other in there):
        put_also(path, path.with_name(f"ckpt.{step}.pt"))


PARTS = {"model": dict, "optimizer": dict, "step": int, "config": dict, "constants": dict, "tokenizer": dict,
         "versions": dict}


def read_checkpoint(path, parts=PARTS, of="train.py"):
    """The dict that was saved; InputError if there is none, or not one of ours."""
    try:
        checkpoint = load_whole(path)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: there is no checkpoint to start from.") from None
    except (IsADirectoryError, PermissionError) as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): name a checkpoint's file.") from None
    except Exception as error:  # zipfile's, pickle's and torch's own kinds of damage
        raise InputError(f"{path} is damaged or no checkpoint ({type(error).__name__}).") from None
    if not isinstance(checkpoint, dict):
        checkpoint = {}
    for name, kind in parts.items():
        if not isinstance(checkpoint.get(name), kind):
            raise InputError(f"{path} is no checkpoint of {of}: it has no {name} that can be used.")
    if checkpoint["step"] < 0:
        raise InputError(f"{path} is no checkpoint of {of}: its step is {checkpoint['step']}.")
    return checkpoint


def restore(checkpoint, path):
    """The COCOLM of a checkpoint."""
    try:
        model = COCOLM(Config(**checkpoint["config"]))
        model.load_state_dict(checkpoint["model"])
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise InputError(f"{path} does not fit this model.py: {' '.join(str(error).split())[:300]}.") from None
    return model


def restore_optimizer(optimizer, scaler, checkpoint, path):
    """Takes over a checkpoint's moments and loss scale; returns how many steps float16 skipped so far, and in a row.

    The moments have to fit: fused AdamW writes beyond the end of one that is too short. Rates and betas are those of
    the settings. Without weights it is the light copy of a process that gets the moments from the first one.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    try:
        scale = checkpoint["optimizer"].get("scaler", {})
        if checkpoint["model"]:
            moments = checkpoint["optimizer"]["state"]
            if not moments and not scale.get("skipped"):
                raise ValueError("no moments")
            for i, p in enumerate(parameters if moments else ()):
                shapes = [moments[i][name].shape for name in ("step", "exp_avg", "exp_avg_sq")]
                if shapes != [torch.Size(()), p.shape, p.shape]:
                    raise ValueError("moments of another shape")
            optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
        if scaler.is_enabled() and "scale" in scale:
            scaler.load_state_dict(scale)
        return scale.get("skipped", 0), scale.get("in_a_row", 0)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        raise InputError(f"{path} has no optimizer that fits this model ({type(error).__name__}).") from None


def share(optimizer):
    """The first process' moments to all others, one tensor at a time: none of them holds a checkpoint in memory."""
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        state = optimizer.state[p]
        for name, like in (("step", p.new_zeros((), dtype=torch.float32)), ("exp_avg", p), ("exp_avg_sq", p)):
            state.setdefault(name, torch.zeros_like(like, memory_format=torch.preserve_format))
            dist.broadcast(state[name], 0)


def load_checkpoint(path, device="cpu"):
    """(the COCOLM in evaluation mode, its Tokenizer) of a checkpoint of ours."""
    checkpoint = read_checkpoint(path)
    return restore(checkpoint, path).to(device).eval(), Tokenizer.from_state(checkpoint["tokenizer"], path)


def start_from(model, path, tokenizer, part=""):
    """Copies the weights of another run's checkpoint (only those under `part`) into the model."""
    checkpoint = read_checkpoint(path)
    if checkpoint["tokenizer"] != tokenizer.state():
        raise InputError(f"{path} was trained with another vocabulary than this corpus; prepare the corpus with its "
                         f"tokenizer: python data.py PATH --encoding=FOLDER_OF_ITS_CORPUS")
    theirs, ours = checkpoint["config"], dataclasses.asdict(model.config)
    shape = ["layers", "width", "heads", "ffn_width", "max_len", "relative_positions", "relative_bins", "max_distance"]
    if part:
        shape = shape[1:] + ["auxiliary_layers", "auxiliary_width"]
    for name in shape:
        if theirs[name] != ours[name]:
            raise InputError(f"{path} has {name}={theirs[name]}, this run {name}={ours[name]}: use the same.")
    weights = {name: value for name, value in checkpoint["model"].items() if name.startswith(part)}
    if model.config.corruption != "frozen":  # a frozen auxiliary's own embeddings are not those that both share
        weights = {name: value for name, value in weights.items() if not name.startswith("auxiliary.embeddings.")}
    if not weights:
        raise InputError(f"{path} has no auxiliary: its run was token_task={theirs['token_task']}, "
                         f"corruption={theirs['corruption']}.")
    try:
        fresh, unused = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise InputError(f"{path} does not fit: {' '.join(str(error).split())[:300]}.") from None
    fresh = [name for name in fresh if name.startswith(part) and not name.startswith("auxiliary.embeddings.")]
    for words, names in (("not in it, so started anew", fresh), ("in it but not used", unused)):
        if names:
            say(f"weights from {path}; {words}: {', '.join(names[:6])}{' ...' * (len(names) > 6)}")


# --------------------------------------------------------------------------------------------------------------------
# The steps of training


def learning_rate_at(step, settings):
    """Linear from 0 to the peak in warmup_steps, then linear to 0 at max_steps. `step` counts from 0."""
    peak, total = settings["learning_rate"], settings["max_steps"]
    warmup = min(settings["warmup_steps"], total)
    return peak * min((step + 1) / max(warmup, 1), (total - step) / max(total - warmup, 1), 1.0)


def make_optimizer(model, settings, device):
    """AdamW; biases and norms, which are the vectors, are not decayed."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.dim() >= 2], "weight_decay": settings["weight_decay"]},
              {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(settings["beta1"], settings["beta2"]), eps=settings["epsilon"],
                             fused=device.type in ("cuda", "cpu"))


def seed_pass(*numbers):
    """Dropout depends on (seed, step, rank, pass) and on nothing else, so a resumed run needs no generator's state."""
    torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]))


def to_device(batch, device):
    if device.type != "cuda":
        return {name: torch.from_numpy(array).to(device) for name, array in batch.items()}
    return {name: torch.from_numpy(array).pin_memory().to(device, non_blocking=True) for name, array in batch.items()}


def area_under_roc(scores, positive):
    """The probability that a positive has a higher score than a negative; ties count half."""
    high, low = scores[positive], np.sort(scores[~positive])
    if not len(high) or not len(low):
        return math.nan
    below = np.searchsorted(low, high, "left") + np.searchsorted(low, high, "right")
    return float(below.sum() / 2 / len(high) / len(low))


def as_pair(value):
    """A statistic as it is, (sum, count), and a loss as (loss, 1)."""
    return value.detach() if value.dim() else torch.stack([value.detach().float(), torch.ones_like(value).float()])


def means(pairs):
    """name -> (sum, count) of this process to name -> mean over all processes."""
    table = sum_over_processes(torch.stack([p.double() if p.device.type != "mps" else p for p in pairs.values()]))
    return {name: total / count if count else math.nan for name, (total, count) in zip(pairs, table.tolist())}


@torch.no_grad()
def evaluate(model, sequences, settings, device, autocast):
    """Losses and statistics on validation sequences, the same ones every time, spread over all processes."""
    model.eval()
    micro, W = settings["micro_batch_size"], world()
    totals, scores, same = {}, [], []
    for number in range(min(settings["eval_batches"] * settings["accumulation"], len(sequences) // (W * micro))):
        first = (number * W + rank()) * micro
        batch = to_device(sequences.batch(0, range(first, first + micro), len(sequences)), device)
        with autocast:
            losses, statistics, predictions = model(batch, gather_vectors if W > 1 else None)
        for name, value in {**losses, **statistics}.items():
            totals[name] = totals.get(name, 0) + as_pair(value)
        if "copy_logits" in predictions:
            scores.append(predictions["copy_logits"].flatten())
            same.append((predictions["corrupted"] == batch["tokens"]).flatten())
    model.train()
    result = means(totals)
    if scores:
        both = torch.stack([torch.cat(scores), torch.cat(same).float()])
        parts = [both]
        if W > 1:
            parts = [torch.empty_like(both) for _ in range(W)]
            dist.all_gather(parts, both)
        scores, same = torch.cat(parts, 1).cpu().numpy()
        result["copy_auc"] = area_under_roc(scores, same > 0)
    return result


# --------------------------------------------------------------------------------------------------------------------
# What is seen of a run

COLUMNS = {"loss": 8, "mlm_loss": 8, "copy_loss": 9, "lm_loss": 7, "scl_loss": 8, "copy_auc": 8, "scl_accuracy": 12}


def read_log(path):
    """The rows of a log.jsonl; a line that was torn by a crash is left out."""
    rows = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError, TypeError, AttributeError, RecursionError):
            row = json.loads(line)
            rows += [row] * (row.get("step", 0) >= 0 and row.get("seconds", 0.0) >= 0)
    return rows


class Log:
    """The console and out_dir/log.jsonl, on the first process alone."""

    def __init__(self, path, header, step):
        self.path, self.seconds, self.unwritten, rows = path, 0.0, b"", []
        if step is not None:  # resumed: cut back to the checkpoint's step
            rows = [row for row in read_log(path) if row.get("step", 0) <= step]
            self.seconds = max((row.get("seconds", 0.0) for row in rows), default=0.0)
            changes = header["constants"]["resumed_with"]
            header = header if not rows or "split" in rows[0] else rows.pop(0)  # torn off, or the run's first one
            before = header["resumed"] if isinstance(header.get("resumed"), list) else []
            before = [c for c in before if isinstance(c, dict) and isinstance(c.get("step"), int) and c["step"] < step]
            header["resumed"] = before + [{"step": step, **changes}] * bool(changes)
        partial = path.with_suffix(".partial")
        try:
            partial.write_text("".join(json.dumps(row) + "\n" for row in [header, *rows]))
            os.replace(partial, path)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise InputError(f"{path} could not be written ({error.strerror}): make room, or choose another "
                             f"--out_dir.") from None
        last = max((row.get("step", 0) for row in rows), default=0)
        if step is not None and last + header["constants"]["log_interval"] < step:
            say(f"warning: {path} was cut: its last line is of step {last:,}, the checkpoint of {step:,}.")
        self.file = open(path, "ab", buffering=0)
        self.start = time.time() - self.seconds
        say("\n" + "step".rjust(8) + " split" + "".join(n.rjust(w + 1) for n, w in COLUMNS.items())
            + "     lr  grad norm  tokens/s   MFU  time left")

    def write(self, row):
        """A full disk does not end the run: what could not be written is kept, and tried again with the next line."""
        waiting, self.unwritten = bool(self.unwritten), self.unwritten + (json.dumps(row) + "\n").encode()
        try:
            self.flush()
        except OSError as error:
            if not waiting:
                say(f"warning: {self.path} could not be written ({error.strerror}); its lines wait in memory.")

    def flush(self):
        try:
            while self.unwritten:
                self.unwritten = self.unwritten[self.file.write(self.unwritten) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from None

    def __call__(self, split, step, values, left=None):
        row = {"split": split, "step": step, "seconds": round(time.time() - self.start, 3)}
        row |= {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in values.items()}
        self.write(row)
        cells = [f"{row[n]:.4f}".rjust(w + 1) if row.get(n) is not None else " " * (w + 1) for n, w in COLUMNS.items()]
        tail = ""
        if split == "train":
            norm = "skipped" if row["grad_norm"] is None else f"{row['grad_norm']:.2f}"  # a float16 overflow
            tail = f"{row['lr']:8.1e} {norm:>9} {row['tokens_per_sec']:10,.0f} {row['mfu']:5.0%}  {clock(left)}"
            tail += f"  {row['skipped_steps']} skipped" if row.get("skipped_steps") else ""
        say(f"{step:8,} {split:5}" + "".join(cells) + tail)


def clock(seconds):
    hours, seconds = divmod(int(seconds), 3600)
    return f"{hours}:{seconds // 60:02}:{seconds % 60:02}"


def count_parameters(model):
    """Trained or frozen, each tensor once: main, auxiliary, shared by both, heads."""
    counts = {"main": 0, "auxiliary": 0, "shared": 0, "heads": 0}
    auxiliary = {id(p) for p in model.auxiliary.parameters()} if hasattr(model, "auxiliary") else set()
    main = {id(p) for p in model.main.parameters()}
    for p in model.parameters():
        where = "shared" if id(p) in main & auxiliary else "main" if id(p) in main else "auxiliary"
        counts[where if id(p) in main | auxiliary else "heads"] += p.numel()
    return counts


@torch.no_grad()
def show_what_was_learned(model, tokenizer, sequences, final, settings, device):
    """A few validation passages as the auxiliary corrupted them and the main model sees them, and a table of scores."""
    model.eval()
    colour = sys.stdout.isatty()

    def paint(text, code):
        return f"\033[{code}m{text}\033[0m" if colour else text

    def piece(token):
        return repr(tokenizer.decode([int(token)]))[1:-1]

    batch = to_device(sequences.batch(0, range(settings["micro_batch_size"]), len(sequences)), device)
    _, _, predictions = model(batch)
    say("\nCorrupted validation text. p: how sure the main model is that the token is the original one.")
    for row in range(min(3, len(batch["tokens"]))):
        tokens, masked = batch["tokens"][row].tolist(), batch["masked"][row].tolist()
        corrupted = predictions["corrupted"][row].tolist()
        marks = {i for i in masked if corrupted[i] != tokens[i]}
        text = "".join(paint(piece(t), 31) if i in marks and colour else f"[{piece(t)}]" if i in marks else piece(t)
                       for i, t in enumerate(corrupted) if i)
        say(f"\n  {text}\n")
        say(f"    {'original':>16}  {'auxiliary put':>16}  {'p(original)':>11}  {'main corrects to':>16}")
        for k, i in enumerate(masked):
            if i not in marks:
                continue
            p = torch.sigmoid(predictions["copy_logits"][row, i]).item() if "copy_logits" in predictions else math.nan
            correction = predictions["lm_tokens"][row, k].item() if "lm_tokens" in predictions else None
            right = correction == tokens[i]
            shown = "-" if correction is None else piece(correction)
            say(f"    {piece(tokens[i]):>16}  {paint(f'{piece(corrupted[i]):>16}', 31)}  {p:11.2f}  "
                f"{paint(f'{shown:>16}', 32 if right else 0)}{'  right' if right else ''}")

    counts = np.bincount(sequences.tokens, minlength=tokenizer.vocab_size)
    counts[tokenizer.sep_id] = 0  # never masked
    share = counts[counts > 0] / counts.sum()
    entropy, frequent = -(share * np.log(share)).sum(), share.max()
    chance = 1 / (negatives(settings) + 1)
    nothing = {  # what a model scores that has learned nothing
        "mlm_loss": (entropy, "entropy of the token frequencies"),
        "lm_loss": (entropy if settings["token_task"] == "mlm" else math.nan, "entropy of the token frequencies"),
        "mlm_accuracy": (frequent, "the most frequent token"),
        "copy_accuracy_original": (1.0, 'always "original"'), "copy_accuracy_replaced": (0.0, 'always "original"'),
        "copy_auc": (0.5, "chance"), "lm_accuracy_replaced": (frequent, "the most frequent token"),
        "scl_accuracy": (chance, "chance"), "mean_cosine": (1.0, "all texts look the same"),
        "replaced_fraction": (math.nan, ""),
    }
    say(f"\n  {'on validation text':24}{'this model':>12}{'nothing learned':>17}")
    for name, (floor, why) in nothing.items():
        if name in final:
            say(f"  {name:24}{final[name]:12.4f}" + ("" if math.isnan(floor) else f"{floor:17.4f}  {why}"))
    say()


# --------------------------------------------------------------------------------------------------------------------
# The run


def find_corpus(settings, folder):
    """Sees to it that the corpus is there; the default one is made, by one process of each machine."""
    if folder.exists():
        return
    if settings["dataset"] != "docs":
        prepared = [p.parent.name for p in Path(settings["data_dir"]).glob("*/meta.json")] + ["docs"]
        raise InputError(f"there is no corpus {folder}; make it with: python data.py PATH --name={settings['dataset']}"
                         f"{nearest(settings['dataset'], prepared)}")
    if os.environ.get("LOCAL_RANK", "0") == "0":
        try:
            data.prepare(data_dir=settings["data_dir"])
        except (InputError, OSError):
            if not (folder / "meta.json").exists():  # else another machine was faster, on a file system of both
                raise


def open_split(folder, split, config, seed, batch):
    first = os.environ.get("LOCAL_RANK", "0") == "0"  # one process of each machine reads all of it, to check it
    sequences = Sequences(folder, split, config.max_len, config.masked, config.crop_len, seed, check=first)
    if len(sequences) < batch:
        raise InputError(f"too little text: {folder}/{split}.bin has {len(sequences.tokens):,} tokens, which are "
                         f"{len(sequences)} sequences of max_len={config.max_len}, but a batch takes {batch}; use more "
                         f"text, a smaller batch or, for val.bin, a larger --val_fraction in data.py.")
    return sequences


def compare_corpora(folder, sums, checkpoint, out):
    """The text has to be the same on all machines, and that of the run that goes on; sums: name -> sha256."""
    nodes = everyones((platform.node(), sums))
    before = checkpoint and checkpoint["constants"].get("sha256")
    for name in sums:
        for r, (node, theirs) in enumerate(nodes):
            if theirs.get(name) != nodes[0][1].get(name):
                raise InputError(f"{folder} differs between machines: the sha256 of {name} is {nodes[0][1].get(name)} "
                                 f"for process 0 on {nodes[0][0]} and {theirs.get(name)} for process {r} on {node}; "
                                 f"copy one to the other.")
        if before and sums[name] != before.get(name):
            raise InputError(f"{folder} is not the text that {out}/ckpt.pt was trained on: the sha256 of {name} was "
                             f"{before.get(name)} and is {sums[name]}; put it back, or start another run.")


def try_to_compile(model, batch, autocast):
    """torch.compile on the passes (not on the gathering), tried on one batch; eager mode where it fails."""
    eager, problem = model.passes, None
    model.passes = torch.compile(eager, dynamic=False)
    say("compiling ...")
    try:
        for training, with_statistics in ((True, False), (True, True), (False, True)):  # all that a run does
            with autocast, torch.set_grad_enabled(training):
                losses, _, _ = model.train(training)(batch, None, with_statistics)
            if training:
                losses["loss"].backward()
    except Exception as error:  # no compiler, an unsupported device, ...
        problem = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
    model.train().zero_grad(set_to_none=True)
    if sum_over_processes(torch.tensor(float(problem is not None))) > 0:
        model.passes = eager
        say(f"torch.compile failed, so the run goes on without it ({problem or 'on another process'}).")
        return "no"
    return "yes"


def describe(step, model, norm, losses, sequences, tokenizer, settings):
    """What a step was made of, on all processes: loss terms, gradient norms, the sequences and how they begin."""
    parts, W, micro = {}, world(), settings["micro_batch_size"]
    for name, p in model.named_parameters():
        part = name.split(".")[0] if name.startswith(("main.", "auxiliary.")) else "heads"
        if p.grad is not None:
            parts.setdefault("embeddings" if "embeddings." in name else part, []).append(p.grad)
    norms = {"total": norm} | {part: torch.nn.utils.get_total_norm(grads).item() for part, grads in parts.items()}
    terms = everyones(losses)
    named = [(f"  losses of process {r}", each) for r, each in enumerate(terms)] + [("  gradient norms", norms)]
    lines = [f"{what}: {', '.join(f'{name} {value:.6g}' for name, value in values.items())}" for what, values in named]
    guilty = [r for r, each in enumerate(terms) if not all(map(math.isfinite, each.values()))] or range(W)
    firsts = [(part * W + r) * micro for part in range(settings["accumulation"]) for r in guilty]
    indices = [first + i for first in firsts for i in range(micro)]
    for index in indices[:64]:
        text = tokenizer.decode(sequences.sequence(step, index, settings["batch_size"])["tokens"][1:17])
        lines += [f"  sequence {step * settings['batch_size'] + index}: {text!r} ..."]
    lines += [f"  and {len(indices) - 64} sequences more"] * (len(indices) > 64)
    bad = {f"{name} of process {r}": value for r, each in enumerate(terms) for name, value in each.items()
           if not math.isfinite(value)} or {"gradient norm": norm}
    return ", ".join(f"{n} is {v}" for n, v in bad.items()), "\n".join(lines)


def who_is_gone():
    """After a collective failed: the processes that do not answer within 5 seconds, said by the first that does."""
    store = dist.distributed_c10d._get_default_store()  # it is torchrun's, so it outlives all processes of train.py
    try:
        store.set(f"here {rank()}", "")
        time.sleep(5)
        gone = [r for r in range(world()) if not store.check([f"here {r}"])]
        if rank() == min(set(range(world())) - set(gone)):
            return ", ".join(f"process {r} ({store.get(f'process {r}').decode()})" for r in gone) or "the network"
    except RuntimeError:  # without torchrun it is in process 0
        return "process 0"


class Stop:
    """SIGTERM, Ctrl-C, and SIGUSR1, a scheduler's warning: finish the step, save, and stop. Another one stops at once;
    under torchrun only after a second, as it passes on the Ctrl-C that its processes have already had themselves."""

    signal, time = 0, math.inf
    grace = 1 if "TORCHELASTIC_RUN_ID" in os.environ else 0

    def __init__(self):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self)

    def __call__(self, number, frame):
        if time.time() - self.time > self.grace:
            os._exit(128 + number)
        self.signal, self.time = number, min(self.time, time.time())


def run(settings, checkpoint, device, dtype):
    """Pretrains as the settings say, from scratch or from a checkpoint of this run."""
    W, micro, accumulation = world(), settings["micro_batch_size"], settings["accumulation"]
    max_steps, step_tokens = settings["max_steps"], settings["batch_size"] * settings["max_len"]

    # --- the text
    folder, out = Path(settings["data_dir"], settings["dataset"]), Path(settings["out_dir"])
    together(find_corpus, settings, folder)
    tokenizer = together(Tokenizer.load, folder)
    config = make_config(settings, vocab_size=tokenizer.vocab_size, pad_id=tokenizer.pad_id, mask_id=tokenizer.mask_id)
    train = together(open_split, folder, "train", config, settings["seed"], settings["batch_size"])
    val = together(open_split, folder, "val", config, 0, W * micro)  # the same for every seed
    settings["sha256"] = data.read_meta(folder)["sha256"]
    compare_corpora(folder, settings["sha256"], checkpoint, out)

    # --- the model
    torch.manual_seed(settings["seed"])
    model = COCOLM(config)
    start = 0
    if checkpoint:
        if checkpoint["tokenizer"] != tokenizer.state() or checkpoint["config"] != dataclasses.asdict(config):
            raise InputError(f"{out}/ckpt.pt was trained with another vocabulary than {folder} has.")
        start = checkpoint["step"]
        model = together(lambda: restore(checkpoint, out / "ckpt.pt") if checkpoint["model"] else model)
    elif settings["init_from"] not in ("scratch", "resume_or_scratch"):
        on_first(start_from, model, settings["init_from"], tokenizer)
    if settings["auxiliary_from"] and not checkpoint:
        on_first(start_from, model, settings["auxiliary_from"], tokenizer, "auxiliary.")
    model.main.recompute = settings["recompute"]
    model.to(device).train()
    optimizer = make_optimizer(model, settings, device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    skipped = in_a_row = 0  # steps whose gradients were too large for float16
    if checkpoint:
        skipped, in_a_row = together(restore_optimizer, optimizer, scaler, checkpoint, out / "ckpt.pt")
        if W > 1:
            share(optimizer)  # as DistributedDataParallel does with the weights
        del checkpoint
    debug = settings["debug_step"]
    if debug:
        say(f"step {debug} alone, with the weights of step {start}; nothing is written")
        start, max_steps = debug - 1, debug
    if start >= max_steps:
        say(f"{out} is finished: step {start} of max_steps={max_steps}.")
        return
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    parameters = [p for p in model.parameters() if p.requires_grad]
    together(lambda: rank() == 0 and not debug and out.mkdir(parents=True, exist_ok=True))

    def fetch(step, part):
        """The part of a step's batch that this process works on in one pass."""
        first = (part * W + rank()) * micro
        return train.batch(step, range(first, first + micro), settings["batch_size"])

    compiled = "no"
    if str(settings["compile"]) == "True" or (settings["compile"] == "auto" and device.type == "cuda"):
        compiled = try_to_compile(model, to_device(fetch(0, 0), device), autocast)
    ddp = model
    if W > 1:
        ddp = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None,
                                      gradient_as_bucket_view=True, forward_sync_buffers=False)
        # DDP sorts its buckets anew after the first backward, and with them the sums over more than two processes. An
        # idle pass has that behind it at every start, so a resumed run adds in the order of one left alone.
        with autocast:
            losses, _, _ = ddp(to_device(fetch(0, 0), device), gather_vectors, False)
        losses["loss"].backward()
        model.zero_grad(set_to_none=True)

    # --- what will happen
    versions = {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__,
                "tiktoken": data.tiktoken.__version__}
    name = f"{platform.machine()}, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    counts = count_parameters(model)
    sequence_flops, peak = flops(config), sum_over_processes(torch.tensor(peak_flops(device, dtype))).item()
    say(f"versions    {', '.join(f'{k} {v}' for k, v in versions.items())}\n"
        f"device      {device.type} ({name}), {str(dtype)[6:]}, compiled: {compiled}, {W} process{'es' * (W > 1)}\n"
        f"parameters  {', '.join(f'{k} {v:,}' for k, v in counts.items())}\n"
        f"speed       {sequence_flops / 1e9:,.1f} GFLOP a sequence, at most {peak / 1e12:,.2f} TFLOP/s "
        f"(MFU: the share of that)\n"
        f"step        {step_tokens:,} tokens = {W} processes x {accumulation} passes x {micro} sequences x "
        f"{config.max_len} tokens, {config.masked} of them masked\n"
        f"negatives   {negatives(settings)} for each sequence vector in a pass\n"
        f"corpus      {folder}: {len(train.tokens):,} tokens, {len(val.tokens):,} for validation, "
        f"vocabulary {config.vocab_size:,}\n"
        f"run         preset {settings['preset']}{settings['changed']}, steps {start:,} to {max_steps:,} = "
        f"{max_steps * settings['batch_size'] / len(train):.1f} epochs, to {out}")

    def open_log():
        if rank() != 0 or debug:
            return None
        if start == 0:
            for old in (out / "ckpt.pt", out / "ckpt.prev.pt", *milestones(out)):
                old.unlink(missing_ok=True)
        header = {"date": time.strftime("%Y-%m-%d %H:%M:%S"), "versions": versions, "device": name,
                  "dtype": str(dtype)[6:], "compiled": compiled, "parameters": counts,
                  "config": dataclasses.asdict(config), "constants": settings}
        return Log(out / "log.jsonl", header, start if start else None)

    log = together(open_log)
    warned = []

    def validate(step):
        result = evaluate(model, val, settings, device, autocast)
        if rank() == 0:
            log("val", step, {"tokens": step * step_tokens, **result})
        if step > settings["warmup_steps"] and result["mean_cosine"] > 0.99 and not warned:
            warned.append(step)
            say(f"warning: mean_cosine is {result['mean_cosine']:.4f}: the model sees hardly a difference between "
                f"texts; try relative_init=local, a longer warm-up or a smaller learning rate.")
        return result

    def write(step):
        log.flush()  # no checkpoint without the lines up to it
        os.fsync(log.file.fileno())
        write_checkpoint(out / "ckpt.pt", {
            "model": model.state_dict(), "step": step, "optimizer": {**optimizer.state_dict(), "scaler": {
                **scaler.state_dict(), "skipped": skipped, "in_a_row": in_a_row}},
            "config": dataclasses.asdict(config), "constants": settings,
            "tokenizer": tokenizer.state(), "versions": versions})
        keep_milestone(out / "ckpt.pt", step, settings)

    def save(step, final):
        if final:  # a failure ends all processes
            return together(lambda: rank() == 0 and write(step))
        try:
            if rank() == 0:
                write(step)
        except (InputError, OSError) as error:  # a full disk, say: the run goes on and tries again
            say(f"warning: {sentence(error)}")

    # --- the loop
    stop = Stop()
    loader = ThreadPoolExecutor(1)  # prepares the next batch meanwhile
    upcoming = loader.submit(fetch, start, 0)
    final = validate(0) if start == 0 and not debug else None
    since, steps_since = time.time(), 0
    for step in range(start, max_steps):
        last = step + 1 == max_steps
        logged = (step + 1) % settings["log_interval"] == 0 or last
        lr = learning_rate_at(step, settings)
        for group in optimizer.param_groups:
            group["lr"] = lr
        totals = {}
        for part in range(accumulation):
            indices = (step, part + 1) if part + 1 < accumulation else (step + 1, 0)
            batch, upcoming = upcoming.result(), loader.submit(fetch, *indices)
            seed_pass(settings["seed"], step, rank(), part)
            synchronise = contextlib.nullcontext() if W == 1 or part + 1 == accumulation else ddp.no_sync()
            with synchronise:
                with autocast:
                    losses, statistics, _ = ddp(to_device(batch, device), gather_vectors if W > 1 else None, logged)
                scaler.scale(losses["loss"] / accumulation).backward()
            for key, value in {**losses, **(statistics or {})}.items():
                totals[key] = totals.get(key, 0) + as_pair(value)
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])

        # one look at the device a step: is all of it finite, on every process, and does anyone want to stop?
        sums = torch.stack([totals[key][0] for key in losses])
        bad = ~torch.isfinite(sums).all() | (~torch.isfinite(norm) & (dtype != torch.float16))
        flags = torch.stack([bad.float(), torch.full((), float(stop.signal), device=device), norm])
        if W > 1:
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        bad, signalled, length = flags.tolist()
        overflow = dtype == torch.float16 and not math.isfinite(length)
        skipped, in_a_row = skipped + overflow, (in_a_row + 1) * overflow
        if bad or debug or in_a_row == SKIPS:
            terms = dict(zip(losses, (sums / accumulation).tolist()))
            what, details = describe(step, model, length, terms, train, tokenizer, settings)
            if debug:
                say(details + f"\n  {what}" * bool(bad))
                return
            if rank() == 0:
                what += f" for the {SKIPS}th step in a row, at whatever loss scale" * (not bad)
                first, again = step * settings["batch_size"], "resume" if (out / "ckpt.pt").exists() else "scratch"
                print(f"{details}\ntrain.py: stopped at step {step + 1}: {what}; its sequences are {first} to "
                      f"{first + settings['batch_size'] - 1} of the run (seed {settings['seed']}); what {out} holds "
                      f"stays as it is; --init_from={again} --debug_step={step + 1} shows that batch alone; a "
                      f"new run, from an earlier checkpoint say, may have a smaller learning_rate or a longer warm-up.",
                      file=sys.stderr, flush=True)
            sys.exit(1)
        torch.nn.utils.clip_grads_with_norm_(parameters, settings["grad_clip"] or math.inf, norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

        done, steps_since = step + 1, steps_since + 1
        if logged:
            result = means(totals)
            if rank() == 0:
                speed = steps_since * step_tokens / (time.time() - since)
                mfu = speed / config.max_len * sequence_flops / peak
                log("train", done, {"tokens": done * step_tokens, "tokens_per_sec": round(speed), "mfu": round(mfu, 4),
                                    "lr": lr, "grad_norm": length, **result,
                                    **({"skipped_steps": skipped} if scaler.is_enabled() else {})},
                    left=(max_steps - done) * step_tokens / speed)
        if done % settings["eval_interval"] == 0 or last:
            final = validate(done)
        if done % settings["checkpoint_interval"] == 0 or last or signalled:
            save(done, last or signalled)
        if logged:
            since, steps_since = time.time(), 0
        if signalled and not last:
            say(f"stopped by {signal.Signals(int(signalled)).name} after step {done}; it goes on with "
                f"--init_from=resume --out_dir={out}")
            sys.exit(128 + int(signalled))
    loader.shutdown()
    if rank() == 0:
        with autocast:
            show_what_was_learned(model, tokenizer, val, final, settings, device)
        say(f"the checkpoint is {out}/ckpt.pt, the log {out}/log.jsonl")


def main():
    keep_memory()
    if "RANK" in os.environ and not dist.is_initialized():
        join()
        store = dist.distributed_c10d._get_default_store()
        store.set(f"process {rank()}", f"on {platform.node()}, process id {os.getpid()}")
    for number in (signal.SIGTERM, signal.SIGUSR1):  # until the loop begins
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    settings = {"micro_batch_size": 1}
    try:
        settings, checkpoint = settle(sys.argv[1:])
        if world() > 1:
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=settings["timeout"]))
        device = together(choose_device, settings)
        run(settings, checkpoint, device, together(choose_dtype, settings, device))
    except RuntimeError as error:
        if "out of memory" in str(error) or "allocate memory" in str(error):
            micro = settings["micro_batch_size"]
            smaller = f"--micro_batch_size={micro // 2}" if micro > 1 else "a smaller --max_len or --preset"
            print(f"train.py: process {rank()} is out of memory with micro_batch_size={micro}; try {smaller}.",
                  file=sys.stderr)
            sys.exit(1)
        if world() == 1 or not re.search("gloo|NCCL|[Cc]onnection|[Tt]imed out|[Bb]roken pipe", str(error)):
            raise
        if gone := who_is_gone():
            print(f"train.py: no answer from {gone}: it died or hangs, so all stop; the last checkpoint stands, go on "
                  f"with --init_from=resume.", file=sys.stderr, flush=True)
        os._exit(1)  # at once: a regular exit would wait for those that are gone


if __name__ == "__main__":
    run_command(main, quiet=lambda: rank() != 0)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
