"""Kills and damages small runs of train.py for as long as one likes, and says whether anything was lost.

    python tests/stress.py --minutes=10

A trial disturbs a run at random, resumes it until it is finished, and compares it with an undisturbed twin:
weights, moments and the log, except for its clock, have to be equal to the bit. The table at the end shows
what was tried, how often, and what was lost; the exit status is 1 if anything was. Needs Linux.
"""

import contextlib
import itertools
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"  # of all runs: another number of threads adds in another order

import runs  # noqa: E402
import torch  # noqa: E402

import data  # noqa: E402

minutes: float = 10.0  # how long; a trial that has begun is finished
seed: int = 0        # of all random choices; the moments of the kills still vary

RUN = ["--dataset=toy", "--layers=1", "--width=32", "--ffn_width=64", "--heads=2", "--max_len=32",
       "--dropout=0.1", "--batch_size=12", "--max_steps=12", "--warmup_steps=2", "--log_interval=1",
       "--eval_interval=5", "--eval_batches=1", "--checkpoint_interval=2"]
VARIANTS = {  # name -> dtype and passes of a step
    "float32": ("float32", 1), "bfloat16": ("bfloat16", 1), "float16": ("float16", 1),
    "2 passes": ("float32", 2),
}
DAMAGE = {  # name -> the bytes of a damaged file; i: a random position
    "truncated": lambda raw, i: raw[:i],
    "zeroed": lambda raw, i: bytes(len(raw)),
    "empty": lambda raw, i: b"",
    "with a bit flipped": lambda raw, i: raw[:i] + bytes([raw[i] ^ 1 << i % 8]) + raw[i + 1 :],
    "with zeros inside": lambda raw, i: raw[:i] + bytes(64) + raw[i + 64 :],
}
MOST_KILLS = 8  # of one run; then it may finish

# ------------------------------------------------------------------------------------------------------------
# Runs


def die_before(fatal):
    """The process that calls this kills itself before its file operation number `fatal`."""
    operations = itertools.count(1)

    def deadly(operation):
        def call(*arguments, **more):
            if next(operations) == fatal:
                if operation is save:
                    arguments[1].write(b"half a checkpoint")
                    arguments[1].flush()
                os.kill(os.getpid(), signal.SIGKILL)
            return operation(*arguments, **more)
        return call

    save, torch.save = torch.save, deadly(torch.save)
    os.fsync, os.replace, os.unlink = deadly(os.fsync), deadly(os.replace), deadly(os.unlink)


def run(options, processes, draw, seconds=300.0, fatal=0):
    """train.py in some processes. All are killed after so many seconds, or when process 0 has killed itself.

    -> exit statuses, everything that was printed
    """
    running = runs.start(*options, processes=processes, before=partial(die_before, fatal))
    running[0].join(seconds)
    if running[0].exitcode is None:
        draw.choice(running).kill()
        time.sleep(draw.uniform(0, 0.05))  # the others may notice, and go on until they do
    return runs.finish(running, 60 if running[0].exitcode == 0 else 0)


def differences(out, twin):
    """What is not the same in two finished runs, and files that should not be there."""
    def same(a, b):
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
        if isinstance(a, (list, tuple)):
            return len(a) == len(b) and all(map(same, a, b))
        return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b

    def log(folder):
        clock = ("seconds", "tokens_per_sec", "tflops")
        return [{name: row[name] for name in row if name not in clock} for row in runs.rows(folder)]

    run, undisturbed = (torch.load(folder / "ckpt.pt", weights_only=True) for folder in (out, twin))
    names = ("step", "model", "optimizer", "scaler", "skipped")
    found = [f"another {name}" for name in names if not same(run[name], undisturbed[name])]
    if log(out) != log(twin):
        found.append("another log")
    known = {"ckpt.pt", "ckpt.prev.pt", "log.jsonl", ".lock"}
    return found + [f"{file.name} was left behind" for file in out.iterdir() if file.name not in known]


# ------------------------------------------------------------------------------------------------------------
# Trials. Each gets a run's options and number of processes, the folder and the seconds of its undisturbed
# twin, and a folder for the disturbed run. It returns the number of kills, and why the run did not finish


def killed_until_finished(options, processes, twin, seconds, out, draw, operations=0):
    """Kills a run at random moments, or before one of so many file operations, and resumes it each time."""
    saved = any(out.glob("ckpt*.pt"))
    for kills in itertools.count():
        moment = {"seconds": draw.uniform(0, seconds)}
        if operations:
            moment = {"fatal": draw.randint(1, operations)}
        if kills == MOST_KILLS:
            moment = {}
        how = "resume" if saved else "resume_or_scratch"  # there always is a checkpoint after the first one
        statuses, said = run([*options, f"--out_dir={out}", f"--init_from={how}"], processes, draw, **moment)
        if not any(statuses):
            return kills, ""
        if -signal.SIGKILL not in statuses or not moment:
            return kills, f"ended with {statuses}: {said}"
        saved = saved or any(out.glob("ckpt*.pt"))


def restarted_by_torchrun(options, processes, twin, _, out, draw):
    """Kills one process after a random row of the log; torchrun starts all of them again."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
               "--max-restarts=3", ROOT / "train.py", *options, f"--out_dir={out}",
               "--init_from=resume_or_scratch"]
    row, kills, end = draw.randint(1, 10), 0, time.monotonic() + 300
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        torchrun = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        while torchrun.poll() is None and time.monotonic() < end:
            log = out / "log.jsonl"
            if not kills and log.exists() and log.read_text().count("\n") > row:
                workers = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
                os.kill(int(draw.choice(workers)), signal.SIGKILL)
                kills = 1
            time.sleep(0.002)
        torchrun.kill()
        output.seek(0)
        return kills, f"torchrun ended with {torchrun.returncode}: {output.read()}" if torchrun.wait() else ""


def damaged(options, processes, twin, seconds, out, draw, damage):
    """Damages the last checkpoint of a finished run, and kills the run while it repeats what was lost."""
    shutil.copytree(twin, out)
    raw = (out / "ckpt.pt").read_bytes()
    (out / "ckpt.pt").write_bytes(damage(raw, draw.randrange(len(raw))))
    result = killed_until_finished(options, processes, twin, seconds, out, draw, operations=12)
    (out / "ckpt.damaged").unlink(missing_ok=True)  # kept for its owner, in no other trial
    return result


in_a_save = partial(killed_until_finished, operations=30)  # a run of 12 steps has about so many
TRIALS = {  # name -> number of processes, trial
    "SIGKILL at any moment, 1 process": (1, killed_until_finished),
    "SIGKILL at any moment, 2 processes": (2, killed_until_finished),
    "SIGKILL at any moment, 3 processes": (3, killed_until_finished),
    "SIGKILL between file operations, 1 process": (1, in_a_save),
    "SIGKILL between file operations, 2 processes": (2, in_a_save),
    "SIGKILL of one of 2, torchrun --max-restarts": (2, restarted_by_torchrun),
    **{f"SIGKILL and ckpt.pt {name}": (1, partial(damaged, damage=DAMAGE[name])) for name in DAMAGE},
}


def main():
    args = data.Parser(__doc__, sys.modules[__name__]).parse_args()
    draw, end, twins = random.Random(args.seed), time.monotonic() + 60 * args.minutes, {}
    trials, kills, lost = Counter(), Counter(), Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with contextlib.redirect_stdout(None):
            runs.make_corpus(folder)
        run(["--help"], 1, draw)  # the server imports torch: no twin is measured with that
        todo = list(itertools.product(TRIALS, VARIANTS))
        draw.shuffle(todo)
        for kind, variant in itertools.cycle(todo):
            if time.monotonic() > end:
                break
            (processes, trial), (dtype, passes) = TRIALS[kind], VARIANTS[variant]
            options = [*RUN, f"--data_dir={folder}", f"--dtype={dtype}",
                       f"--micro_batch_size={12 // processes // passes}"]
            if (variant, processes) not in twins:
                twin, began = folder / f"{variant}, {processes}", time.monotonic()
                statuses, said = run([*options, f"--out_dir={twin}"], processes, draw)
                if any(statuses):
                    raise data.InputError(f"an undisturbed run ended with {statuses}: {said}")
                twins[variant, processes] = twin, time.monotonic() - began
            out = folder / f"trial {trials.total()}"
            killed, problem = trial(options, processes, *twins[variant, processes], out, draw)
            problem = problem or "; ".join(differences(out, twins[variant, processes][0]))
            shutil.rmtree(out)
            trials[kind, variant] += 1
            kills[kind] += killed
            lost[kind] += bool(problem)
            if problem:
                print(f"lost: {kind}, {variant}: {problem}\n", flush=True)
    print(f"{time.strftime('%Y-%m-%d')}, torch {torch.__version__}, {platform.platform()}, "
          f"{args.minutes:g} minutes\n")
    heads = "".join(f"{variant:>10}" for variant in VARIANTS)
    print(f"{'trials':46}{heads}{'kills':>8}{'lost':>6}")
    for kind in TRIALS:
        cells = "".join(f"{trials[kind, variant]:10,}" for variant in VARIANTS)
        print(f"{kind:46}{cells}{kills[kind]:8,}{lost[kind]:6,}")
    print(f"{trials.total():,} trials, {kills.total():,} kills, {lost.total():,} lost")
    sys.exit(1 if lost.total() else 0)


if __name__ == "__main__":
    data.run_command(main)
