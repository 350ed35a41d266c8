"""What ends a run of a week, tried on purpose. tests/test_hardening.py calls these functions with small numbers;

    python tests/stress.py                  calls them with large ones, and prints what was tried and what was lost
    python tests/stress.py --minutes=40     the same, and preset tiny, killed every few minutes for so long
    python tests/stress.py --scale=0.1      a tenth of everything

Every random choice comes from --seed. A function returns a list of what went wrong; an empty one is what is wanted.
"""

import contextlib
import copy
import functools
import gzip
import hashlib
import io
import json
import multiprocessing
import os
import platform
import random
import re
import resource
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"  # of every process we start: another number of threads gives other last bits

import numpy as np  # noqa: E402
import torch  # noqa: E402

import data  # noqa: E402
import finetune  # noqa: E402
import train  # noqa: E402

SMALL = ["--layers=1", "--width=32", "--ffn_width=64", "--heads=2", "--max_len=32", "--batch_size=12",
         "--micro_batch_size=6", "--max_steps=12", "--warmup_steps=2", "--eval_batches=1", "--log_interval=1",
         "--eval_interval=5", "--checkpoint_interval=2", "--dropout=0.1"]
VARIANTS = {"float32": [], "bfloat16": ["--dtype=bfloat16"], "float16 with loss scaling": ["--dtype=float16"],
            "three passes a step": ["--micro_batch_size=4"], "compiled": ["--compile=True"]}


class Killed(BaseException):
    """Stands for SIGKILL where the process has to live on: nothing handles it, and what is on the disk stays so."""


def make_corpus(folder, name="toy", seed=1):
    """data_dir with a corpus of 400 short documents of made-up words."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("aeioubcdfglmnprst", k=draw.randint(2, 7))) for _ in range(300)]
    lines = [" ".join(draw.choices(words, weights=range(1, 301), k=draw.randint(5, 60))) + "." for _ in range(400)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.txt").write_text("\n\n".join(lines))
    with contextlib.redirect_stdout(io.StringIO()):
        data.prepare([folder / f"{name}.txt"], name=name, data_dir=str(folder), vocab_size=400, val_fraction=0.1,
                     workers=1)
    return [f"--data_dir={folder}", f"--dataset={name}", *SMALL]


# --------------------------------------------------------------------------------------------------------------------
# Runs


def run_here(*arguments):
    """train.py in this process: (exit status, what it printed on both outputs)"""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    handlers, before, said = [signal.getsignal(number) for number in numbers], sys.argv, io.StringIO()
    sys.argv = ["train.py", *arguments]
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            train.main()
        status = 0
    except SystemExit as stop:
        status = stop.code
    except data.InputError as error:
        status, _ = 2, said.write(str(error))
    finally:
        sys.argv = before
        for number, handler in zip(numbers, handlers):
            signal.signal(number, handler)
    return status, said.getvalue()


SERVER = multiprocessing.get_context("forkserver")  # processes that begin as forks of one that has imported torch
SERVER.set_forkserver_preload(["torch._dynamo"])  # AdamW imports it, which takes as long as torch itself


def run_program(program, environment, folder, outputs):
    """`python *program` in this process, with its two outputs in files."""
    for number, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY), number)
    os.environ.update(environment)
    os.chdir(folder or ".")
    if program[0] == "-c":
        sys.argv = ["-c", *program[2:]]
        exec(compile(program[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = list(program)
        runpy.run_path(program[0], run_name="__main__")


class Forked:
    """What we need of subprocess.Popen(["python", *program]), 4 s faster: the imports are done, and nothing else is."""

    def __init__(self, program, environment, folder):
        self.outputs = [tempfile.NamedTemporaryFile("r") for _ in range(2)]
        self.process = SERVER.Process(target=run_program, daemon=True, args=(
            program, environment, folder, [file.name for file in self.outputs]))
        self.process.start()
        self.kill = self.process.kill

    def poll(self):
        return self.process.exitcode

    returncode = property(poll)

    def send_signal(self, number):
        os.kill(self.process.pid, number)

    def communicate(self, timeout=None):
        self.process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired("Forked", timeout)
        return [file.read() for file in self.outputs]


def in_processes(number):
    """To run functions of the tests on so many cores."""
    return ProcessPoolExecutor(number, SERVER)


def start(*arguments, processes=1, folders=None, program=(str(ROOT / "train.py"),)):
    """train.py as one or several processes, as a launcher starts them; folders: of nodes with one process each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = []
    for r in range(processes):
        ranks = {"RANK": str(r), "LOCAL_RANK": "0" if folders else str(r), "WORLD_SIZE": str(processes),
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} if processes > 1 else {}
        started.append(Forked((*program, *map(str, arguments)), ranks, folders and str(folders[r])))
    return started


def torchrun(*arguments, options=("--standalone", "--nproc_per_node=2"), cwd=None):
    launcher = [sys.executable, "-m", "torch.distributed.run", *options, str(ROOT / "train.py")]
    return subprocess.Popen([*launcher, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd)


def finish(processes, seconds=300):
    """(exit statuses, everything they printed)"""
    said = [process.communicate(timeout=seconds) for process in processes]
    return [process.returncode for process in processes], "".join(out + err for out, err in said)


def children(process):
    """Process ids of the children of a process, the oldest first."""
    return list(map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()))


def rows(out, split=None):
    lines = [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]
    return [line for line in lines[1:] if split in (None, line["split"])]


def untimed(out):
    """The log but for the clock."""
    return [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_sec", "mfu")} for row in rows(out)]


def wait_for(condition, process, seconds=120):
    """True as soon as condition() holds, False if the process ends before."""
    end = time.time() + seconds
    while process.poll() is None:
        with contextlib.suppress(OSError, ValueError):
            if condition():
                return True
        if time.time() > end:
            raise TimeoutError("what is waited for does not come")
        time.sleep(0.002)
    return False


def reached(out, step):
    return lambda: max((row["step"] for row in rows(out, "train")), default=0) >= step


def differences(one, other, name="ckpt.pt"):
    """What is not the same to the bit in two runs: weights, moments, step, log (but for the clock)."""
    a, b = (torch.load(Path(out, name), weights_only=True) for out in (one, other))
    found = [f"step {a['step']} and {b['step']}"] * (a["step"] != b["step"])
    found += [f"weights of {n}" for n in a["model"] if not torch.equal(a["model"][n], b["model"][n])]
    for i, state in a["optimizer"]["state"].items():
        found += [f"{n} of {i}" for n in state if not torch.equal(state[n], b["optimizer"]["state"][i][n])]
    found += ["loss scale"] * (a["optimizer"]["scaler"] != b["optimizer"]["scaler"])
    return found + ["the log"] * (untimed(one) != untimed(other))


def leftovers(out):
    """Files that do not belong to a finished run."""
    known = r"ckpt\.pt|ckpt\.prev\.pt|ckpt\.\d+\.pt|log\.jsonl"
    return [f"{file.name} is left over" for file in Path(out).iterdir() if not re.fullmatch(known, file.name)]


# --------------------------------------------------------------------------------------------------------------------
# Killed and resumed


@contextlib.contextmanager
def killed_at(number):
    """Within it, the number-th step on the way to the disk is the last one: a line of the log, a write, a rename."""
    passed, held = [0], [(os, "replace"), (os, "link"), (os, "fsync"), (torch, "save"), (train.Log, "write")]

    def counted(function):
        @functools.wraps(function)
        def call(*arguments, **more):
            passed[0] += 1
            if passed[0] == number:
                if function is held[3][2]:
                    arguments[1].write(b"half a checkpoint")
                raise Killed
            return function(*arguments, **more)
        return call

    held = [(place, name, getattr(place, name)) for place, name in held]
    for place, name, function in held:
        setattr(place, name, counted(function))
    try:
        yield passed
    except Killed:
        pass
    finally:
        for place, name, function in held:
            setattr(place, name, function)


def resumed_equals_undisturbed(options, folder, kills, draw):
    """A run that dies `kills` times on its way to the disk, and is resumed each time, against one left alone."""
    with killed_at(0) as passed:
        status, said = run_here(*options, f"--out_dir={folder}/alone")
    if status or "torch.compile failed" in said:
        return [said]
    for _ in range(kills):
        with killed_at(draw.randint(1, passed[0] * 2 // 3)):
            run_here(*options, f"--out_dir={folder}/killed", "--init_from=resume_or_scratch")
    run_here(*options, f"--out_dir={folder}/killed", "--init_from=resume_or_scratch")
    return differences(folder / "alone", folder / "killed") + leftovers(folder / "killed")


@contextlib.contextmanager
def without_a_compiler():
    """torch.compile by aot_eager, which needs none."""
    compile_ = torch.compile
    torch.compile = functools.partial(compile_, backend="aot_eager")
    try:
        yield
    finally:
        torch.compile = compile_
        torch._dynamo.reset()


PAUSE = """
import os, runpy, sys, time
replace = os.replace
def slow(source, target):
    if str(target).endswith("ckpt.pt"):
        time.sleep({seconds})  # a checkpoint is written and not yet in place
    replace(source, target)
os.replace = slow
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def sigkilled_equals_undisturbed(options, folder, kills, draw, processes=1):
    """As above with SIGKILL at random moments, every second time while a checkpoint waits to be put in place."""
    out, lost, options = folder / "killed", [], [*options, "--max_steps=24"]  # enough to kill it before it is done
    command = [*options, "--init_from=resume_or_scratch", f"--out_dir={out}"]
    statuses, said = finish(start(*options, f"--out_dir={folder}/alone", processes=processes))
    lost += [said] * any(statuses)
    last = rows(folder / "alone")[-1]["step"]
    for kill in range(kills):
        waiting, began = kill % 2, time.time()
        program = ("-c", PAUSE.format(seconds=0.5)) * waiting + (str(ROOT / "train.py"),)
        running = start(*command, processes=processes, program=program)
        if waiting:
            there = wait_for(lambda: (out / "ckpt.partial").stat().st_mtime > began, running[0])
            time.sleep(draw.random() * 0.5)
        else:
            there = wait_for(reached(out, draw.randint(1, max(last * 2 // 3, 1))), running[0])
            time.sleep(draw.random() * 0.02)
        lost += ["a run ended before it was killed"] * (not there)
        draw.choice(running).kill()
        time.sleep(0.05 * draw.random())
        for process in running:  # what torchrun does when one has died
            process.kill()
        finish(running)
    statuses, said = finish(start(*command, processes=processes))
    lost += [said] * any(statuses)
    return lost + differences(folder / "alone", out) + leftovers(out)


def restarted_by_torchrun(options, folder, draw):
    """One of two processes is killed; torchrun --max-restarts brings the run back without a hand on it."""
    options = [*options, "--max_steps=24"]
    statuses, said = finish(start(*options, f"--out_dir={folder}/alone", processes=2))
    lost = [said] * any(statuses)
    launcher = torchrun(*options, f"--out_dir={folder}/killed", "--init_from=resume_or_scratch", "--timeout=60",
                        options=("--standalone", "--nproc_per_node=2", "--max-restarts=3"))
    wait_for(reached(folder / "killed", draw.randint(3, 7)), launcher)
    victim = draw.randrange(2)
    os.kill(children(launcher)[victim], signal.SIGKILL)
    (status,), said = finish([launcher])
    lost += [f"torchrun ended with {status}: {said}"] * bool(status)
    lost += [f"not said who died: {said}"] * (f"no answer from process {victim} (on {platform.node()}" not in said)
    return lost + differences(folder / "alone", folder / "killed") + leftovers(folder / "killed")


def tiny_killed_for_minutes(folder, minutes, draw):
    """Preset tiny on the default corpus, killed about ten times at random, beside its twin that is left alone."""
    base = [f"--data_dir={folder}", "--log_interval=1", "--eval_interval=100", "--checkpoint_interval=50"]
    run_here(*base, f"--out_dir={folder}/probe", "--max_steps=40", "--eval_batches=1")
    speed = np.median([row["tokens_per_sec"] for row in rows(folder / "probe", "train")]) / (16 * 128)  # steps a second
    steps = max(60, int(0.8 * minutes * 60 * speed))
    base += [f"--max_steps={steps}", f"--warmup_steps={min(300, steps)}"]
    alone = ThreadPoolExecutor(1).submit(finish, start(*base, f"--out_dir={folder}/alone"), 3600 * 24)
    out, kills = folder / "killed", 0
    while True:
        (running,) = start(*base, f"--out_dir={out}", "--init_from=resume_or_scratch")
        with contextlib.suppress(subprocess.TimeoutExpired):
            said = running.communicate(timeout=draw.uniform(0.4, 1.6) * max(60 * minutes / 10, 30))
            break
        running.kill()
        running.communicate()
        kills += 1
    lost = [said] * bool(running.returncode)
    statuses, said = alone.result()
    lost += [said] * any(statuses)
    return f"{steps} steps, {kills} kills", lost + differences(folder / "alone", out) + leftovers(out)


# --------------------------------------------------------------------------------------------------------------------
# Damage, full disks, signals


DAMAGE = {"truncated": lambda raw, draw: raw[: draw.randrange(len(raw))], "zeroed": lambda raw, draw: bytes(len(raw)),
          "empty": lambda raw, draw: b"", "a bit flipped": None, "zeros inside": None}


def damage(path, kind, draw):
    """Damages a checkpoint; the last two kinds do it inside its largest tensor, where torch.load would not notice."""
    raw = bytearray(path.read_bytes())
    if DAMAGE[kind]:
        raw = DAMAGE[kind](raw, draw)
    else:
        tensor = max(torch.load(path, weights_only=True)["model"].values(), key=lambda t: t.numel()).numpy().tobytes()
        at = raw.index(tensor[:64]) + draw.randrange(64, len(tensor) - 64)
        if kind == "a bit flipped":
            raw[at] ^= 1 << draw.randrange(8)
        else:
            raw[at : at + 64] = bytes(64)
    path.unlink()  # ckpt.prev.pt may be the same file
    path.write_bytes(raw)


def damaged_checkpoint(options, finished, folder, kind, draw):
    """A run whose last checkpoint is damaged goes on from the one before, which stays till there is a new one."""
    shutil.copytree(finished, folder)
    path, before_it = folder / "ckpt.pt", folder / "ckpt.prev.pt"
    good = before_it.read_bytes()
    damage(path, kind, draw)
    try:
        train.read_checkpoint(path)
        return ["the damage was not found"]
    except data.InputError:
        pass
    lost = []
    with killed_at(draw.randint(4, 7)):  # about the first checkpoint of the resumed run
        run_here(*options, f"--out_dir={folder}", "--init_from=resume")
    if before_it.read_bytes() != good and not train.is_whole(path):
        lost += ["the damaged checkpoint took the place of the good one"]
    status, said = run_here(*options, f"--out_dir={folder}", "--init_from=resume")
    lost += [said] * bool(status)
    return lost + differences(finished, folder) + leftovers(folder)


def full_disk(options, alone, folder, draw):
    """The disk is full from some line of the log on, and has room again some lines later."""
    line, size = train.Log.write, resource.getrlimit(resource.RLIMIT_FSIZE)
    full, again, count, lost = draw.randint(2, 5), draw.randint(6, 9), [0], []

    def write(self, row):
        count[0] += 1
        if count[0] == full:
            where = Path(self.path).stat().st_size + draw.randrange(300)
            resource.setrlimit(resource.RLIMIT_FSIZE, (where, size[1]))
        if count[0] == again:
            lost.extend(f"{file.name} was left behind" for file in Path(self.path).parent.glob("*.partial"))
            resource.setrlimit(resource.RLIMIT_FSIZE, size)
        line(self, row)

    train.Log.write = write
    try:
        status, said = run_here(*options, f"--out_dir={folder}")
    finally:
        train.Log.write = line
        resource.setrlimit(resource.RLIMIT_FSIZE, size)
    lost += [f"status {status}: {said}"] * bool(status) + ["no warning"] * ("could not be written" not in said)
    return lost + differences(alone, folder) + leftovers(folder)


def signalled(options, folder, number, processes=2):
    """One process gets the signal; all stop at the same step with one checkpoint, and go on from there."""
    out, never = folder / "out", 100_000
    long = [*options, f"--max_steps={never}", f"--eval_interval={never}", f"--checkpoint_interval={never}"]
    running = start(*long, f"--out_dir={out}", processes=processes)
    wait_for(reached(out, 3), running[0])
    running[-1].send_signal(number)
    statuses, said = finish(running)
    lost = [f"statuses {statuses}: {said}"] * (statuses != [128 + number] * processes)
    step = torch.load(out / "ckpt.pt", weights_only=True)["step"]
    lost += [f"the last line is of {rows(out)[-1]['step']}, the checkpoint of {step}"] * (rows(out)[-1]["step"] != step)
    lost += [f"not said: {said}"] * (f"stopped by {signal.Signals(number).name} after step {step}" not in said)
    return lost + ["two checkpoints"] * (out / "ckpt.prev.pt").exists() + leftovers(out)


def second_signal(options, folder, number=signal.SIGTERM):
    """A run that is busy with its last checkpoint for long ends at once at the second signal."""
    (running,) = start(*options, f"--out_dir={folder}", "--max_steps=100000", "--checkpoint_interval=100000",
                       program=("-c", PAUSE.format(seconds=60), str(ROOT / "train.py")))
    wait_for(reached(folder, 2), running)
    running.send_signal(number)
    wait_for((folder / "ckpt.partial").exists, running)
    began = time.time()
    running.send_signal(number)
    status, said = finish([running])
    took = time.time() - began
    return [f"{status} after {took:.0f} s: {said}"] * (status != [128 + number] or took > 20)


def hanging(options, folder, seconds=5):
    """One of two processes is stopped; the other one says which, and ends, within the timeout."""
    running = start(*options, f"--out_dir={folder}", "--max_steps=100000", f"--timeout={seconds}", processes=2)
    wait_for(reached(folder, 2), running[0])
    running[1].send_signal(signal.SIGSTOP)
    began = time.time()
    try:
        (status,), said = finish(running[:1], seconds=seconds + 60)
    finally:
        running[1].kill()  # nothing else ends a process that is stopped
    took = time.time() - began
    lost = [f"status {status} after {took:.0f} s: {said}"] * (status != 1 or took > seconds + 30)
    return lost + [f"not said: {said}"] * ("no answer from process 1" not in said)


# --------------------------------------------------------------------------------------------------------------------
# Fuzz

NASTY = [b"\t", b"\n", b"\r\n", b"\x00", b"\xff\xfe", b'"', b"\\", b"\xef\xbb\xbf", b"NaN", b"1e999", b"-1", b"null",
         b"{}", b"[", b"\\ud800", b"\xed\xa0\x80", b"9" * 400, b"[" * 3000, b"'", "\u2028\u0130".encode(), b" " * 50]
NONSENSE = [None, -1, 2**70, 1e308, float("nan"), "", "x" * 300, "\ud800", [], {}, [[]], {"a": 1}, True, b"\xff",
            torch.zeros(2)]


def mutated(raw, draw):
    """The bytes after one to four accidents."""
    raw = bytearray(raw)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(raw) + 1)
        to = min(len(raw), at + draw.choice((1, 2, 10, 100, 10_000)))
        accident = draw.randrange(6)
        if accident == 0 and at < len(raw):
            raw[at] ^= 1 << draw.randrange(8)
        elif accident == 1:
            del raw[at:to]
        elif accident == 2:
            raw[at:at] = draw.choice(NASTY)
        elif accident == 3:
            raw[at:at] = raw[draw.randrange(len(raw) + 1) :][: to - at]
        elif accident == 4:
            raw[at:to] = bytes(to - at)
        else:
            raw[at:to] = draw.randbytes(to - at)
    return bytes(raw)


def distorted(tree, draw):
    """A nest of dicts and lists in which one place holds something else, or nothing."""
    tree = copy.copy(tree)
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree))) if isinstance(tree, list) else []
    if not keys or draw.random() < 0.1:
        return draw.choice(NONSENSE)
    key = draw.choice(keys)
    if draw.random() < 0.15:
        del tree[key]
    else:
        tree[key] = distorted(tree[key], draw)
    return tree


def complaint(work, *names, seconds=20):
    """None if the work is done, or refused in one sentence that has one of the names; else what is wrong."""
    def too_long(*_):
        raise TimeoutError(f"still at it after {seconds} s")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(seconds)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            work()
    except data.InputError as error:
        text = str(error)
        if "\n" in text or not text.endswith((".", "?")) or not any(name in text for name in names):
            return f"not a sentence that names its input: {text[:500]!r}"
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # tiktoken's panics are no Exceptions
        return f"{type(error).__name__}: {str(error)[:300]}"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return None


def fuzz_texts(folder, count, draw):
    """data.py's readers of .txt, .jsonl and .gz; every 25th input is prepared, completely or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    documents = ["The cat sat on the mat.\n", "Zwölf Boxkämpfer jagen Viktor.\n\n", "漢字 \U0001f600 e\u0301\n",
                 "a " * 500 + "\n"]
    text = "".join(documents * 3).encode()
    lines = "".join(json.dumps({"text": t, "id": i}) + "\n" for i, t in enumerate(documents * 3)).encode()
    lost = []
    for number in range(count):
        ending = draw.choice((".txt", ".jsonl", ".txt.gz", ".jsonl.gz"))
        raw = mutated(text if "txt" in ending else lines, draw)
        if ending.endswith(".gz"):
            raw = gzip.compress(raw)
            raw = raw if draw.random() < 0.5 else mutated(raw, draw)
        path = folder / f"in{ending}"
        path.write_bytes(raw)
        as_one = draw.random() < 0.5
        wrong = complaint(lambda: list(data.pieces(data.read_file(path, "text", as_one))), path.name)
        if number % 25 == 0:
            wrong = wrong or complaint(lambda: data.prepare(
                [path], name="new", data_dir=f"{folder}/data", workers=1, vocab_size=270), path.name, "too little text")
            there = [file.name for file in (folder / "data").iterdir()]
            wrong = wrong or (f"left behind: {there}" if there not in ([], ["new"]) else None)
            wrong = wrong or (complaint(lambda: open_corpus(folder / "data/new")) if there else None)
            shutil.rmtree(folder / "data")
        lost += [f"input {number} {raw[:80]!r}: {wrong}"] if wrong else []
    return lost


def open_corpus(folder):
    data.Tokenizer.load(folder)
    for split in ("train", "val"):
        sequences = data.Sequences(folder, split, 32, 4, 28, 0)
        if len(sequences):
            sequences.batch(0, range(min(4, len(sequences))), 4)


def fuzz_corpora(folder, corpus, count, draw):
    """The files of a prepared corpus, damaged; every second time with checksums made to fit."""
    shutil.copytree(corpus, folder)
    lost, names = [], ["meta.json", "tokenizer.tiktoken", "train.bin", "val.bin"]
    meta = json.loads((corpus / "meta.json").read_text())
    for number in range(count):
        name, fit = draw.choice(names), draw.random() < 0.5
        raw = (corpus / name).read_bytes()
        raw = mutated(raw, draw)
        if name == "meta.json" and fit:
            raw = json.dumps(distorted(meta, draw), default=repr).encode()
        (folder / name).write_bytes(raw)
        if fit and name != "meta.json":
            new = copy.deepcopy(meta)
            key = name.split(".")[0]
            new["sha256"][key] = hashlib.sha256(raw).hexdigest()
            if key in new["tokens"]:
                new["tokens"][key] = len(raw) // 2
            (folder / "meta.json").write_text(json.dumps(new))
        wrong = complaint(lambda: open_corpus(folder), str(folder))
        lost += [f"input {number} ({name}, {fit}): {wrong}"] if wrong else []
        for back in {name, "meta.json"}:
            shutil.copy(corpus / back, folder / back)
    return lost


def fuzz_options(folder, count, draw):
    """The option parser of all three commands, and what train.py makes of the values."""
    tables = [train.ALLOWED, {name: allowed for name, (_, allowed, _) in data.OPTIONS.items()}, finetune.ALLOWED]
    values = ["0", "-1", "1e3", "1e999", "nan", "inf", "True", "false", "None", "", " 7", "7 ", "0x10", "1_0", "٣",
              "9" * 5000, "²", "\ud800", "a\nb", "tiny", "large++", "../x", "\x00", "0.5", "1", "2", "128", "resume"]
    lost = []
    for number in range(count):
        which = draw.randrange(3)
        names = [*tables[which], "max_step", "", "-", "a b", "\n", "sede"]
        arguments = []
        for _ in range(draw.randint(1, 4)):
            name, value = draw.choice(names), draw.choice([*values, *map(str, tables[which].values())])
            right = f"--{name}={value}"
            argument = draw.choice((right, right, right, f"--{name}", right[1:], value, right[2:], f"--{name}=={value}",
                                    f"-{right}"))
            arguments.append(draw.choice((argument, argument, argument[: draw.randrange(len(argument) + 1)])))
        arguments = [a for a in arguments if a not in ("-h", "--help")]

        def work():
            if which == 0:
                train.settle([*arguments, f"--out_dir={folder}/none"])
            elif which == 1:
                data.parse_options(arguments, data.OPTIONS, "")
            else:
                finetune.settle(arguments)

        named = [part for a in arguments for part in a.lstrip("-").partition("=") if part != "="]
        wrong = complaint(work, "option", "unexpected", *named, *tables[which])
        lost += [f"input {number} {arguments!r:.300}: {wrong}"] if wrong else []
    return lost


GLUE_ROWS = {"CoLA": "gj04\t1\t\tThe sailors rode the breeze clear of the rocks.\n",
             "SST-2": "sentence\tlabel\nit 's a charming journey \t1\nhide new secretions \t0\n",
             "MRPC": "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t70\t72\tPCCW \"s chief.\tThe chief, Alex.\n",
             "STS-B": "index\tsentence1\tsentence2\tscore\n0\tA plane.\tAn air plane.\t5.000\n1\tA man.\tA boy.\t1.5\n",
             "QQP": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n13\t2\t3\tHow?\tWhy?\t0\n",
             "MNLI": "index\tsentence1\tsentence2\tgold_label\n0\tHe said.\tShe said.\tneutral\n",
             "RTE": "index\tsentence1\tsentence2\tlabel\n0\tDana Reeve died.\tChristopher fell.\tnot_entailment\n"}


def fuzz_glue(folder, tokenizer, count, draw):
    folder.mkdir(parents=True, exist_ok=True)
    path, lost = folder / "train.tsv", []
    for number in range(count):
        name = draw.choice(list(GLUE_ROWS))
        raw = mutated(GLUE_ROWS[name].encode() * draw.randint(1, 3), draw)
        path.write_bytes(raw)

        def work():
            found, _ = finetune.read_glue(path, finetune.TASKS[name], draw.random() < 0.7)
            finetune.glue_set(found, finetune.TASKS[name], tokenizer, 32)

        wrong = complaint(work, str(path))
        lost += [f"input {number} ({name}) {raw[:80]!r}: {wrong}"] if wrong else []
    return lost


SQUAD = {"version": "v2.0", "data": [{"title": "Normans", "paragraphs": [{
    "context": "The Normans (Norman: Nourmands) gave their name to Normandy, a region in France. " * 3,
    "qas": [{"question": "In what country is Normandy?", "id": "56dd", "is_impossible": False,
             "answers": [{"text": "France", "answer_start": 73}]},
            {"question": "Who?", "id": "5ad3", "is_impossible": True, "answers": []}]}]}]}


def fuzz_squad(folder, tokenizer, count, draw):
    folder.mkdir(parents=True, exist_ok=True)
    path, lost = folder / "train-v2.0.json", []
    for number in range(count):
        if draw.random() < 0.5:
            raw = mutated(json.dumps(SQUAD).encode(), draw)
        else:
            raw = json.dumps(distorted(SQUAD, draw), default=repr).encode()
        path.write_bytes(raw)
        training = draw.random() < 0.5

        def work():
            questions = finetune.read_squad(path, draw.choice(("1.1", "2.0")))
            finetune.squad_set(questions, tokenizer, 48, training)

        wrong = complaint(work, str(path))
        lost += [f"input {number} {raw[:80]!r}: {wrong}"] if wrong else []
    return lost


def fuzz_checkpoints(folder, options, path, count, draw):
    """Damaged bytes have to be refused, or to be what was saved to the bit; well-formed nonsense has to be refused."""
    folder.mkdir(parents=True, exist_ok=True)
    raw, whole, copied, lost = path.read_bytes(), train.read_checkpoint(path), folder / "ckpt.pt", []

    def same():
        found = train.read_checkpoint(copied)
        if not same_tree(found, whole):
            raise AssertionError("another checkpoint than was saved, and nobody noticed")

    for number in range(count):
        if draw.random() < 0.7:
            copied.write_bytes(mutated(raw, draw))
            wrong = complaint(same, str(copied))
        else:
            torch.save(distorted(whole, draw), copied)
            wrong = complaint(lambda: train.load_checkpoint(copied), str(copied))
            if number % 10 == 0:  # all of a resume, which has nothing to do: the run is finished
                sys.argv = ["train.py", *options, f"--out_dir={folder}", "--init_from=resume"]
                wrong = wrong or complaint(train.main, str(folder), "--")
        lost += [f"input {number}: {wrong}"] if wrong else []
    return lost


def same_tree(a, b):
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same_tree(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same_tree, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b or a is b


# --------------------------------------------------------------------------------------------------------------------
# The table


def pause(folder, preset="small", vocab_size=32768, times=3):
    """What a checkpoint of a preset costs: (seconds that training waits, bytes); a former one is there already."""
    model = train.COCOLM(train.Config.from_preset(preset, vocab_size=vocab_size))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    folder.mkdir(parents=True, exist_ok=True)
    seconds = []
    for _ in range(times + 1):
        began = time.time()
        train.write_checkpoint(folder / "ckpt.pt", {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
        seconds.append(time.time() - began)
    return float(np.median(seconds[1:])), (folder / "ckpt.pt").stat().st_size


OPTIONS = {"scale": (1.0, (0.0, 1e3), "how much of everything: 0.1 is a tenth"),
           "minutes": (0.0, (0.0, 1e5), "of preset tiny, killed about ten times; 0: not at all"),
           "seed": (0, (0, 2**32), "of all random choices"),
           "only": ("", str, "the rows that have this word in their name")}


def main():
    given, _ = data.parse_options(sys.argv[1:], OPTIONS, __doc__)
    settings = {name: default for name, (default, _, _) in OPTIONS.items()} | given
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder, failed = Path(name), 0
        options = make_corpus(folder / "data")
        tokenizer = data.Tokenizer.load(folder / "data/toy")
        run_here(*options, f"--out_dir={folder}/finished")

        def times(number):
            return range(max(1, round(number * settings["scale"])))

        def many(number, work, unit="runs"):
            """A row of the table: work(a fresh folder, draw) so many times."""
            def row(draw):
                lost = []
                for i in times(number):
                    lost += work(folder / f"{draw.random()}", draw)
                return f"{len(times(number))} {unit}", lost
            return row

        def fuzz(number, work):
            def row(draw):
                return f"{len(times(number)):,} inputs", work(folder / f"{draw.random()}", len(times(number)), draw)
            return row

        table = {f"killed 3 times on the way to the disk, {variant}": many(
            5, lambda f, d, more=more: resumed_equals_undisturbed([*options, *more], f, 3, d))
            for variant, more in VARIANTS.items()}
        table |= {
            "SIGKILL, 6 times, 1 process": many(3, lambda f, d: sigkilled_equals_undisturbed(options, f, 6, d)),
            "SIGKILL, 4 times, 2 processes": many(2, lambda f, d: sigkilled_equals_undisturbed(options, f, 4, d, 2)),
            "SIGKILL, 3 times, 3 processes": many(1, lambda f, d: sigkilled_equals_undisturbed(
                [*options, "--micro_batch_size=4"], f, 3, d, 3)),
            "a process killed, torchrun --max-restarts": many(3, lambda f, d: restarted_by_torchrun(options, f, d)),
            "a process that hangs": many(1, lambda f, d: hanging(options, f)),
            "SIGTERM, SIGINT, SIGUSR1 to one of 2 processes": many(1, lambda f, d: [
                problem for n in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
                for problem in signalled(options, f / str(n), n)]),
            "a second signal": many(1, lambda f, d: second_signal(options, f)),
            **{f"ckpt.pt {kind}": many(10, lambda f, d, kind=kind: damaged_checkpoint(
                options, folder / "finished", f, kind, d)) for kind in DAMAGE},
            "a full disk": many(20, lambda f, d: full_disk(options, folder / "finished", f, d)),
            "fuzzed text files": fuzz(10_000, fuzz_texts),
            "fuzzed corpora": fuzz(5_000, lambda f, n, d: fuzz_corpora(f, folder / "data/toy", n, d)),
            "fuzzed options": fuzz(20_000, fuzz_options),
            "fuzzed GLUE files": fuzz(10_000, lambda f, n, d: fuzz_glue(f, tokenizer, n, d)),
            "fuzzed SQuAD files": fuzz(10_000, lambda f, n, d: fuzz_squad(f, tokenizer, n, d)),
            "fuzzed checkpoints": fuzz(2_000, lambda f, n, d: fuzz_checkpoints(
                f, options, folder / "finished/ckpt.pt", n, d)),
        }
        if settings["minutes"]:
            table["preset tiny beside its undisturbed twin"] = lambda draw: tiny_killed_for_minutes(
                folder / "tiny", settings["minutes"], draw)
        print(f"{'tried':64} {'how often':24} {'lost':8} seconds")
        for name, row in table.items():
            if settings["only"] in name:
                began = time.time()
                with without_a_compiler():
                    tried, lost = row(random.Random(f"{settings['seed']} {name}"))
                print(f"{name:64} {tried:24} {len(lost) or 'nothing':<8} {time.time() - began:7.0f}", flush=True)
                for problem in lost[:5]:
                    print(f"    {problem}")
                failed += len(lost)
        seconds, size = pause(folder / "pause")
        print(f"a checkpoint of preset small, {size / 1e6:.0f} MB, keeps the run waiting for {seconds:.2f} s on this "
              f"machine ({platform.machine()}, {os.cpu_count()} cores)")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    data.run_command(main)
