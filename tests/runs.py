"""What the tests of train.py and finetune.py share: a small corpus, and runs in processes of their own."""

import json
import multiprocessing
import os
import random
import runpy
import socket
import sys
import tempfile
import time
from pathlib import Path

from torch.distributed import run as torchrun
from torch.distributed.launcher.api import elastic_launch

import data

ROOT = Path(__file__).resolve().parent.parent

# Processes are forked from one that has imported torch, so a run takes 1 s and not 6
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["torch._dynamo", "model", "runs"])  # the first optimizer imports torch._dynamo


def make_corpus(folder, name="toy", seed=1, **options):
    """Prepares folder/name: 400 short documents of made-up words."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("aeioubcdfglmnprst", k=draw.randint(2, 7))) for _ in range(300)]
    documents = [" ".join(draw.choices(words, range(1, 301), k=draw.randint(5, 60))) for _ in range(400)]
    (folder / f"{name}.txt").write_text("\n\n".join(documents))
    return data.prepare([folder / f"{name}.txt"], name=name, data_dir=str(folder), workers=1,
                        **{"vocab_size": 400, "val_fraction": 0.1, **options})


def print_to(output):
    for stream in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_APPEND), stream)


def run_program(output, environment, before, *program):
    """`python program` in this process. before: a function that it calls first"""
    print_to(output)
    os.environ.update(environment)
    if before:
        before()
    sys.argv = list(program)
    runpy.run_path(program[0], run_name="__main__")


def run_torchrun(output, options, *program):
    """`torchrun options program` in this process, but that its processes are forked."""
    print_to(output)
    arguments = torchrun.parse_args([*options, "--start_method=fork", *program])
    elastic_launch(torchrun.config_from_args(arguments)[0], run_program)(output, {}, None, *program)


def start(*arguments, program="train.py", processes=1, each=None, before=None, nodes=None):
    """Starts a program in some processes, with the variables that torchrun would set.

    each: further arguments, a list for each process; nodes: start these torchruns, given by their options
    """
    port, started = free_port(), []
    for rank in range(len(nodes or range(processes))):
        command = list(map(str, [ROOT / program, *arguments, *(each[rank] if each else ())]))
        output = tempfile.NamedTemporaryFile("r", prefix="said.")
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes,
                     "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        how = (nodes[rank],) if nodes else ({name: str(v) for name, v in variables.items()}, before)
        process = SERVER.Process(target=run_torchrun if nodes else run_program,
                                 args=(output.name, *how, *command))
        process.start()
        process.output = output
        started.append(process)
    return started


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def finish(processes, seconds=60):
    """(exit statuses, everything that was printed). A process that takes longer is killed: status -9."""
    for process in processes:
        process.join(seconds)
        process.kill()
        process.join()
    return [process.exitcode for process in processes], "".join(p.output.read() for p in processes)


def wait_for(condition, process):
    """Waits until condition() holds."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end and (process.is_alive() or condition()), process.output.read()
        time.sleep(0.005)


def rows(out, split=None):
    """The rows of a run's log, all but the header."""
    path = Path(out, "log.jsonl")
    lines = map(json.loads, path.read_text().splitlines()[1:] if path.exists() else ())
    return [row for row in lines if split in (None, row["split"])]
