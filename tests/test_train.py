"""train.py: options, a whole run, several processes, resuming, damage, full disks, signals, divergence.

Equal means equal to the bit, of weights, moments and log, unless a tolerance says otherwise. All runs compute
in float32, unless a test says another dtype.
"""

import argparse
import contextlib
import functools
import io
import json
import math
import multiprocessing.util
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
from runs import finish, rows, start, wait_for

import data
import model
import train

STOPS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")
LOSSES = ("loss", "mlm_loss", "copy_loss", "lm_loss", "scl_loss")
CLOCK = {"seconds", "tokens_per_sec", "tflops"}  # what differs between two equal runs

# ------------------------------------------------------------------------------------------------------------
# Helpers


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """The folder of the corpus `toy`."""
    return runs.make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def options(corpus):
    """The command line of a run of 6 steps, but for its out_dir."""
    return [f"--data_dir={corpus.parent}", "--dataset=toy", "--layers=1", "--width=32", "--ffn_width=64",
            "--heads=2", "--max_len=32", "--dropout=0.1", "--batch_size=12", "--micro_batch_size=12",
            "--max_steps=6", "--warmup_steps=2", "--log_interval=1", "--eval_interval=3", "--eval_batches=1",
            "--checkpoint_interval=2", "--dtype=float32", "--device=cpu"]


@pytest.fixture(scope="session")
def finished(options, tmp_path_factory):
    """out_dir of that run. To be copied, not changed."""
    out = tmp_path_factory.mktemp("finished") / "out"
    run(*options, f"--out_dir={out}")
    return out


@pytest.fixture
def halfway(finished, tmp_path):
    """out_dir of that run, at step 4."""
    return cut_back(finished, tmp_path / "out")


def cut_back(finished, out):
    """A copy of a finished run as it would be, had it been killed two steps earlier."""
    shutil.copytree(finished, out)
    os.replace(out / "ckpt.prev.pt", out / "ckpt.pt")
    return out


@pytest.fixture(autouse=True)
def handlers():
    """A run changes how its process receives signals; this changes it back."""
    before = {number: signal.getsignal(number) for number in (getattr(signal, name) for name in STOPS)}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup pytest would ignore it
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def attempt(*arguments):
    """train.py in this process: (exit status, what it printed)"""
    said, status = io.StringIO(), 0
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            train.main(list(map(str, arguments)))
        except (data.InputError, OSError) as error:
            status, _ = 2, print(error)
        except SystemExit as stop:  # with a status, or with what to say
            status, _ = stop.code if isinstance(stop.code, int) else 1, print(stop)
    return status, said.getvalue()


def run(*arguments):
    """The same for a run that has to succeed: what it printed"""
    status, said = attempt(*arguments)
    assert status == 0, said
    return said


def read(out, name="ckpt.pt"):
    return torch.load(Path(out, name), weights_only=True)


def header(out):
    return json.loads(Path(out, "log.jsonl").read_text().splitlines()[0])


def last_step(out):
    """The last training step in a log, which may just be written; 0 without one"""
    with contextlib.suppress(ValueError):
        return max((row["step"] for row in rows(out, "train")), default=0)
    return 0


def assert_same(one, other):
    """Two finished runs are equal, and the second one has left no files that should not be there."""
    a, b = read(one), read(other)
    assert a["optimizer"]["state"]
    for name in ("step", "skipped", "scaler", "model"):
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=0)
    torch.testing.assert_close(a["optimizer"]["state"], b["optimizer"]["state"], rtol=0, atol=0)
    logs = [[{k: v for k, v in row.items() if k not in CLOCK} for row in rows(out)] for out in (one, other)]
    assert logs[0] == logs[1]
    names = re.compile(r"ckpt(\.prev|\.\d+)?\.pt|ckpt\.damaged|log\.jsonl|\.lock")
    assert [name for name in os.listdir(other) if not names.fullmatch(name)] == []


def assert_close(one, other, names=LOSSES, tolerance=2e-4):
    """The training steps of two runs have the same losses and gradient norms, up to rounding."""
    for a, b in zip(rows(one, "train"), rows(other, "train"), strict=True):
        assert {n: a[n] for n in names} == pytest.approx({n: b[n] for n in names}, rel=tolerance), a["step"]


def at_row(step, action, monkeypatch):
    """Calls action() once, when the row of this training step is written."""
    write, times = train.Log.write, []

    def acting(self, split, number, *more):
        write(self, split, number, *more)
        if (split, number) == ("train", step) and not times:
            times.append(1)
            action()

    monkeypatch.setattr(train.Log, "write", acting)


@contextlib.contextmanager
def each_moment(out):
    """A list of what `out` holds before each step of a run on the way to the disk: what a kill leaves."""
    moments, save = [], torch.save

    def note():
        moment = contents(out) if out.exists() else {}
        if moment not in moments[-1:]:
            moments.append(moment)

    def noted(function):
        def call(*arguments, **more):
            note()
            return function(*arguments, **more)
        return call

    def save_in_two_parts(content, file):
        file.write(b"half a checkpoint")
        file.flush()
        note()
        file.seek(0)
        save(content, file)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "save", save_in_two_parts)
        for owner, name in ((os, "replace"), (os, "fsync"), (Path, "unlink"), (train.Log, "write")):
            patch.setattr(owner, name, noted(getattr(owner, name)))
        yield moments


def contents(out):
    return {file.name: file.read_bytes() for file in out.iterdir()}


def put(moment, out):
    """Makes `out` what it was at that moment."""
    print(sorted(moment))  # pytest shows it for a test that fails
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    for name, content in moment.items():
        (out / name).write_bytes(content)


# ------------------------------------------------------------------------------------------------------------
# Options and the parts of a step


def test_the_command_line_overrides_an_edited_constant_and_that_the_preset(monkeypatch):
    settings = train.read_settings
    assert settings([]).max_steps == 1300 and settings(["--preset=base"]).max_steps == 125_000
    monkeypatch.setattr(train, "max_steps", 7, raising=False)
    assert settings(["--preset=base"]).max_steps == 7 and settings(["--max_steps=8"]).max_steps == 8
    monkeypatch.setattr(train, "preset", "base")
    assert settings([]).layers == 12
    monkeypatch.setitem(train.PRESETS["base"], "layers", 3)
    monkeypatch.setattr(train.Config, "crop", 0.5)
    assert settings([]).layers == 3 and settings([]).crop == 0.5 and settings(["--crop=0.7"]).crop == 0.7
    monkeypatch.setattr(train.Config, "crop", 2.0)
    with pytest.raises(data.InputError, match="crop"):
        settings([])


@pytest.mark.parametrize("preset, schedule", [
    ("tiny", (16, 1300, 300, 1.5e-3)), ("base", (2048, 125_000, 10_000, 5e-4)),
    ("large++", (2048, 2_000_000, 10_000, 3e-4))])
def test_schedules(preset, schedule):
    args = train.read_settings([f"--preset={preset}"])
    assert schedule == (args.batch_size, args.max_steps, args.warmup_steps, args.learning_rate)


@pytest.mark.parametrize("arguments, named", [
    ("--max_step=3", "max_step"), ("--learning_rate=nan", "learning_rate"), ("--heads=3", "heads"),
    ("--batch_size=9 --micro_batch_size=2", "micro_batch_size"), ("--corruption=frozen", "auxiliary_from"),
    ("--batch_size=1 --micro_batch_size=1", "micro_batch_size"), ("--auxiliary_from=x", "corruption"),
    ("--device=mps", "mps"), ("--dataset=toi", "toi"),
    ("--batch_size=120000 --micro_batch_size=6", "train.bin"),
    ("--batch_size=516 --micro_batch_size=516", "val.bin"), ("--init_from=resume", "no checkpoint"),
    ("--init_from=/nowhere/ckpt.pt", "/nowhere/ckpt.pt"), ("--out_dir=/dev/null/out", "/dev/null")])
def test_bad_input_is_one_sentence_and_leaves_nothing(options, tmp_path, arguments, named):
    status, said = attempt(*options, f"--out_dir={tmp_path}/out", *arguments.split())
    *before, last = said.splitlines()
    assert status == 2 and named in last and os.listdir(tmp_path) == []
    assert not before or named == "/dev/null"  # the folder is made last, after the report


def test_bad_input_of_two_processes_is_said_once(options, tmp_path):
    nodes = [["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", "--nproc_per_node=2"]]
    _, said = finish(start(*options, f"--out_dir={tmp_path}/out", "--dataset=nothing",
                            "--micro_batch_size=6", nodes=nodes))
    assert said.count("nothing; make it") == 1
    assert "exitcode  : 2" in said and not (tmp_path / "out").exists()


def test_learning_rate_schedule():
    args = argparse.Namespace(learning_rate=1.0, warmup_steps=4, max_steps=12)
    rates = [train.learning_rate_at(step, args) for step in range(12)]
    assert [8 * rate for rate in rates] == pytest.approx([2, 4, 6, 8, 8, 7, 6, 5, 4, 3, 2, 1])
    args.warmup_steps = 0
    assert train.learning_rate_at(0, args) == 1
    args.warmup_steps = 100  # longer than the run
    assert [train.learning_rate_at(step, args) for step in (0, 11)] == pytest.approx([1 / 12, 1])


def test_area_under_roc():
    draw = np.random.default_rng(0)
    scores, positive = draw.integers(0, 20, 200).astype(float), draw.random(200) < 0.7  # with ties
    wins = [(a > b) + 0.5 * (a == b) for a in scores[positive] for b in scores[~positive]]
    assert train.area_under_roc(scores, positive) == pytest.approx(np.mean(wins), abs=1e-12)
    assert math.isnan(train.area_under_roc(scores, np.ones(200, bool)))


def test_biases_and_norms_are_not_decayed():
    coco = train.COCOLM(train.Config.from_preset("tiny", vocab_size=300))
    decayed, free = train.make_optimizer(coco, train.read_settings(["--weight_decay=0.1"])).param_groups
    names = {id(p): name for name, p in coco.named_parameters()}
    assert decayed["weight_decay"] == 0.1 and free["weight_decay"] == 0.0
    assert all(re.search(r"bias|norm|scl_head.2|transform.2", names[id(p)]) for p in free["params"])
    assert not any(re.search(r"bias$|norm", names[id(p)]) for p in decayed["params"])
    assert len(decayed["params"]) + len(free["params"]) == len(names)


# ------------------------------------------------------------------------------------------------------------
# A run, and several processes


def test_a_run_from_start_to_end(options, tmp_path):
    out = tmp_path / "out"
    said = run(*options, f"--out_dir={out}", "--max_steps=4", "--eval_interval=2", "--checkpoint_interval=3")
    for word in ("device", "parameters", "negatives", "correction", "nothing learned", "copy_auc"):
        assert word in said
    assert re.search(r"changed .*layers 1 \(2\)", said) and "crop" not in said.split("step split")[0]
    end = said[said.index("\n\n  validation text") + 1 :].splitlines()
    assert len(end) <= 26 and max(map(len, end[:-1])) <= 104  # the last one has a path

    first = header(out)
    assert {"date", "device", "compiled", "parameters", "config", "constants", "versions"} <= first.keys()
    assert first["nothing_learned"]["copy_auc"] == 0.5 < first["nothing_learned"]["mlm_loss"]
    assert first["constants"]["max_steps"] == 4 and first["dtype"] == "float32"
    assert [row["step"] for row in rows(out, "train")] == [1, 2, 3, 4]
    assert [row["step"] for row in rows(out, "val")] == [0, 2, 4]
    statistics = {"mlm_accuracy", "replaced_fraction", "copy_accuracy_original", "copy_accuracy_replaced",
                  "lm_accuracy_replaced", "scl_accuracy", "alignment", "uniformity", "mean_cosine"}
    for row in rows(out):
        extra = {"copy_auc"} if row["split"] == "val" else {"lr", "grad_norm", "tokens_per_sec", "tflops"}
        assert row.keys() == {"split", "step", "tokens", "seconds", *LOSSES, *statistics, *extra}
        total = row["mlm_loss"] + 50 * row["copy_loss"] + row["lm_loss"] + row["scl_loss"]
        assert row["loss"] == pytest.approx(total, rel=1e-5)
        assert row["tokens"] == row["step"] * 12 * 32
        if row["split"] == "train":
            flops = row["tokens_per_sec"] / 32 * model.flops(train.Config(**first["config"]))
            assert row["tflops"] == pytest.approx(flops / 1e12, rel=1e-2)

    assert (read(out)["step"], read(out, "ckpt.prev.pt")["step"]) == (4, 3)
    coco, tokenizer = train.load_checkpoint(out / "ckpt.pt")
    assert not coco.training and tokenizer.decode(tokenizer.encode("bada")) == "bada"
    torch.testing.assert_close(coco.state_dict(), read(out)["model"], rtol=0, atol=0)
    assert coco.main(torch.tensor([[tokenizer.cls_id, 5, 6]])).shape == (1, 3, 32)


@pytest.mark.parametrize("ablation", [
    "--token_task=rtd", "--token_task=rtd --contrastive=False", "--token_task=mlm --contrastive=False",
    "--token_task=all_token_mlm", "--copy_mechanism=False", "--lm_loss=weighted", "--stop_gradient=False",
    "--relative_positions=False", "--auxiliary_layers=2 --auxiliary_width=16", "--corruption=random",
    "--gather_negatives=False", "--grad_clip=0.0 --dropout=0.0 --crop=0.5", "--dtype=bfloat16"])
def test_each_ablation_trains(options, tmp_path, ablation):
    run(*options, f"--out_dir={tmp_path}", "--max_steps=3", *ablation.split())
    assert [row["step"] for row in rows(tmp_path, "train")] == [1, 2, 3]
    assert all(math.isfinite(row["loss"]) for row in rows(tmp_path))
    for name, value in re.findall(r"--(\w+)=(\S+)", ablation):
        assert str(header(tmp_path)["constants"][name]) == value


def weights(out, part=""):
    return {name: tensor for name, tensor in read(out)["model"].items() if name.startswith(part)}


def test_a_frozen_auxiliary_is_taken_over_and_not_trained(options, finished, tmp_path):
    frozen = [*options, "--corruption=frozen", f"--auxiliary_from={finished}/ckpt.pt"]
    run(*frozen, f"--out_dir={tmp_path}/frozen")
    after, tokens = weights(tmp_path / "frozen"), "embeddings.tokens.weight"
    for name, tensor in weights(finished, "auxiliary.").items():
        assert torch.equal(tensor, after[name]), name
    assert not torch.equal(after[f"main.{tokens}"], after[f"auxiliary.{tokens}"])

    # such a run is resumed, and its main model is the start of another
    cut_back(tmp_path / "frozen", tmp_path / "resumed")
    run(*frozen, f"--out_dir={tmp_path}/resumed", "--init_from=resume")
    assert_same(tmp_path / "frozen", tmp_path / "resumed")
    said = run(*options, f"--out_dir={tmp_path}/next", f"--init_from={tmp_path}/frozen/ckpt.pt",
               "--learning_rate=0")
    [new] = [line for line in said.splitlines() if "newly initialized" in line]
    assert "auxiliary.layers.0.qkv.weight" in new  # as the frozen one had embeddings of its own
    ours = weights(tmp_path / "next", "main.")
    torch.testing.assert_close(ours, weights(tmp_path / "frozen", "main."), rtol=0, atol=0)


def test_start_from_the_weights_of_another_run(options, finished, tmp_path):
    command = [*options, f"--out_dir={tmp_path}/next", f"--init_from={finished}/ckpt.pt", "--learning_rate=0"]
    run(*[option for option in command if option[2:].split("=")[0] not in train.SIZES])  # they are known
    torch.testing.assert_close(weights(finished), weights(tmp_path / "next"), rtol=0, atol=0)
    runs.make_corpus(tmp_path, "other", vocab_size=300)
    for change, named in (("--layers=2", "layers"), (f"--data_dir={tmp_path} --dataset=other", "vocabulary")):
        status, said = attempt(*command, f"--out_dir={tmp_path}/x", *change.split())
        assert status == 2 and named in said and not (tmp_path / "x").exists()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_one_look_at_the_device_a_step(options, tmp_path, monkeypatch, dtype):
    """A step that is not logged moves one thing from the device to the host: its flags."""
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, init_scale=1.0))
    looks, counts = [], []
    for name in ("tolist", "item", "__bool__", "__float__", "cpu", "numpy"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda *a, o=original, n=name: looks.append(n) or o(*a))
    for steps in (3, 8):
        looks.clear()
        run(*options, f"--out_dir={tmp_path}/{steps}", f"--max_steps={steps}", "--log_interval=100",
            "--eval_interval=100", "--checkpoint_interval=100", f"--dtype={dtype}")
        counts.append(len(looks))
    assert counts[1] - counts[0] == 5


def test_recompute_gives_the_same_run(options, tmp_path, monkeypatch):
    three, times = [*options, "--layers=3", "--max_steps=3"], []
    run(*three, f"--out_dir={tmp_path}/kept")
    original = model.checkpoint
    monkeypatch.setattr(model, "checkpoint", lambda *a, **k: times.append(1) or original(*a, **k))
    run(*three, f"--out_dir={tmp_path}/recomputed", "--recompute=True")
    assert_same(tmp_path / "kept", tmp_path / "recomputed")
    assert times


def test_a_compiled_run_equals_an_eager_one(options, tmp_path, monkeypatch):
    """Its two kinds of pass, training and validation, are a graph each, without a break."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    alike = [*options, "--dropout=0.0", "--log_interval=2"]
    run(*alike, f"--out_dir={tmp_path}/eager")
    run(*alike, f"--out_dir={tmp_path}/compiled", "--compile=True")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert not torch._dynamo.utils.counters["graph_break"]
    assert_close(tmp_path / "eager", tmp_path / "compiled", tolerance=1e-5)


def compile_and_count():
    """In a process of its own: compiles without a backend, and says at the end what was compiled."""
    torch.compile = functools.partial(torch.compile, backend="eager")
    count = torch._dynamo.utils.counters
    multiprocessing.util.Finalize(None, exitpriority=0, callback=lambda: print(
        f"{count['stats']['unique_graphs']} graphs, {len(count['graph_break'])} breaks"))


def test_processes_that_compile(options, tmp_path):
    """`gather` and the backward pass of DistributedDataParallel are in the graphs, and break none."""
    both = start(*options, "--micro_batch_size=3", "--log_interval=2", "--recompute=True", "--layers=2",
                 f"--out_dir={tmp_path}", "--compile=True", processes=2, before=compile_and_count)
    statuses, said = finish(both, 180)
    assert statuses == [0, 0] and said.count("2 graphs, 0 breaks") == 2, said


def test_preset_tiny_on_a_machine_with_gpus(options, tmp_path, monkeypatch):
    report = train.report
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(train, "report", lambda args, *rest: report(
        argparse.Namespace(**vars(args) | {"device": "cuda"}), *rest))
    said = run(*options, f"--out_dir={tmp_path}", "--max_steps=1")
    line = next(line for line in said.splitlines() if "laptop" in line)
    assert "torchrun --standalone --nproc_per_node=8 train.py --preset=base" in line


def test_accumulation_equals_one_big_batch(options, tmp_path):
    alike = [*options, "--contrastive=False", "--dropout=0.0"]  # a smaller pass has fewer negatives
    for micro in (12, 3):
        run(*alike, f"--out_dir={tmp_path}/{micro}", f"--micro_batch_size={micro}")
    assert_close(tmp_path / "12", tmp_path / "3", ("loss", "mlm_loss", "copy_loss", "lm_loss", "grad_norm"))
    torch.testing.assert_close(weights(tmp_path / "12"), weights(tmp_path / "3"), rtol=0, atol=5e-6)


def sample_without_logits():
    """Rounding flips a sampled token now and then, and so all that follows. These samples are exact."""
    model.sample = lambda logits, uniforms: (uniforms * logits.shape[-1]).long()


@pytest.mark.parametrize("processes, micro", [(2, 6), (4, 12)])
def test_several_processes_equal_one(options, tmp_path, monkeypatch, processes, micro):
    monkeypatch.setattr(model, "sample", model.sample)  # is put back
    sample_without_logits()
    alike, one, several = [*options, "--dropout=0.0"], tmp_path / "one", tmp_path / "several"
    started = start(*alike, f"--out_dir={several}", "--micro_batch_size=3", processes=processes,
                    before=sample_without_logits)
    run(*alike, f"--out_dir={one}", f"--micro_batch_size={micro}")
    statuses, said = finish(started)
    assert set(statuses) == {0}, said
    torch.testing.assert_close(weights(one), weights(several), rtol=0, atol=1e-5)
    for a, b in zip(rows(one), rows(several), strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - CLOCK - {"split"}:
            near_tie = 0.15 if "accuracy" in name else 0  # rounding decides which of two is the nearest
            assert a[name] == pytest.approx(b[name], rel=2e-4, abs=2e-5 + near_tie), name


# ------------------------------------------------------------------------------------------------------------
# Resuming, and checkpoints that are damaged or of another run


def test_two_nodes(options, finished, tmp_path):
    """Two torchruns with a process each, which resume at step 4."""
    cut_back(finished, tmp_path / "out")
    options_of_both = ["--nnodes=2", "--master_addr=127.0.0.1", f"--master_port={runs.free_port()}"]
    nodes = [[*options_of_both, f"--node_rank={rank}"] for rank in range(2)]
    statuses, said = finish(start(*options, f"--out_dir={tmp_path}/out", "--init_from=resume",
                                  "--micro_batch_size=6", nodes=nodes))
    assert statuses == [0, 0], said
    assert read(tmp_path / "out")["step"] == 6
    assert_close(finished, tmp_path / "out", ["loss"], 0.1)  # dropout is another one for two processes


@pytest.mark.parametrize("what", ["text", "checkpoints", "options"])
def test_processes_that_read_different_files_are_refused(options, corpus, finished, tmp_path, what):
    outs = [cut_back(finished, tmp_path / "out"), shutil.copytree(finished, tmp_path / "later")]
    runs.make_corpus(tmp_path, seed=2)
    each = [["--init_from=resume", f"--out_dir={out}", "--max_steps=9"] for out in outs]
    if what == "options":
        each = [[f"--out_dir={tmp_path}/new", f"--learning_rate={rate}"] for rate in (0.01, 0.1)]
    if what == "text":
        each = [[f"--out_dir={tmp_path}/new", f"--data_dir={folder}"] for folder in (corpus.parent, tmp_path)]
    first, second = start(*options, "--micro_batch_size=3", processes=2, each=each)
    statuses, said = finish([first])
    finish([second], seconds=0)
    assert statuses == [2] and "all processes need the same" in said
    assert not (tmp_path / "new").exists() and read(outs[0])["step"] == 4 and read(outs[1])["step"] == 6


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_at_random_moments(options, tmp_path, processes):
    draw, out = random.Random(processes), tmp_path / "out"
    alike = [*options, "--max_steps=16", "--eval_interval=10", f"--micro_batch_size={6 // processes}"]
    command = [*alike, f"--out_dir={out}", "--init_from=resume_or_scratch"]
    alone = start(*alike, f"--out_dir={tmp_path}/alone", processes=processes)
    for kill in range(2):
        started, last = start(*command, processes=processes), last_step(out)
        wait_for(lambda: last_step(out) >= last + draw.randint(2, 5), started[0])
        time.sleep(0.02 * draw.random())
        draw.choice(started).kill()
        time.sleep(0.05 * draw.random())
        finish(started, seconds=0)  # torchrun ends the others as well
    for each in (alone, start(*command, processes=processes)):
        statuses, said = finish(each)
        assert set(statuses) == {0}, said
    assert_same(tmp_path / "alone", out)


def test_torchrun_brings_a_killed_process_back(options, finished, tmp_path):
    """It continues the run that it has begun, whatever init_from and overwrite are; no other one."""
    alike = [*options, "--max_steps=40", "--micro_batch_size=6"]
    out = shutil.copytree(finished, tmp_path / "out")
    alone = start(*alike, f"--out_dir={tmp_path}/alone", processes=2)
    torchrun = ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0", "--max_restarts=1"]
    (launcher,) = start(*alike, f"--out_dir={out}", "--overwrite=True",
                        nodes=[[*torchrun, "--nproc_per_node=2"]])
    wait_for(lambda: header(out)["constants"]["max_steps"] == 40 and last_step(out) >= 3, launcher)
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    for each in (alone, [launcher]):
        statuses, said = finish(each)
        assert set(statuses) == {0}, said
    assert "resuming from" in said
    assert_same(tmp_path / "alone", out)

    before = contents(out)
    statuses, said = finish(start(*alike, f"--out_dir={out}", "--max_steps=42",
                                  nodes=[[*torchrun, "--nproc_per_node=1"]]))
    assert statuses[0] and said.count("is there already") == 2 and contents(out) == before


@pytest.mark.parametrize("variant", [
    "--dtype=bfloat16", "--dtype=float16", "--micro_batch_size=4 --auxiliary_dropout=0.1",
    "--batch_size=240 --micro_batch_size=60 --eval_interval=6"])  # the last one: more than an epoch
def test_a_resumed_run_equals_an_undisturbed_one(options, tmp_path, variant):
    alike = [*options, *variant.split()]
    run(*alike, f"--out_dir={tmp_path}/alone")
    out = cut_back(tmp_path / "alone", tmp_path / "out")
    run(*alike, f"--out_dir={out}", "--init_from=resume")
    assert_same(tmp_path / "alone", out)


def test_killed_at_any_moment_on_the_way_to_the_disk(options, tmp_path):
    """A run whose process is killed there is resumed, or begun anew if it has no checkpoint yet."""
    short = [*options, "--max_steps=3", "--checkpoint_interval=1", "--keep_interval=2", "--eval_interval=9"]
    alone, out = tmp_path / "alone", tmp_path / "out"
    with each_moment(alone) as moments:
        run(*short, f"--out_dir={alone}")
    assert any(b"half a checkpoint" in moment.values() for moment in moments)
    for moment in moments:
        put(moment, out)
        run(*short, f"--out_dir={out}", "--init_from=resume_or_scratch")
        assert_same(alone, out)
        assert read(out, "ckpt.2.pt")["step"] == 2 and not (out / "ckpt.3.pt").exists()


@pytest.mark.parametrize("processes, micro, names", [(2, 6, LOSSES), (1, 4, ("mlm_loss", "copy_loss"))])
def test_resumed_with_another_split_of_the_batch(options, tmp_path, monkeypatch, processes, micro, names):
    """The sequences and masks stay. The number of negatives may not: then the run says so."""
    monkeypatch.setattr(model, "sample", model.sample)  # is put back
    sample_without_logits()
    alike, out = [*options, "--dropout=0.0"], tmp_path / "out"
    run(*alike, f"--out_dir={tmp_path}/alone")
    cut_back(tmp_path / "alone", out)
    statuses, said = finish(start(*alike, f"--out_dir={out}", "--init_from=resume",
                                  f"--micro_batch_size={micro}", processes=processes,
                                  before=sample_without_logits))
    assert set(statuses) == {0}, said
    assert ("6 negatives for each sequence vector, not 22" in said) == (micro == 4)
    assert_close(tmp_path / "alone", out, names, tolerance=2e-4 if names == LOSSES else 1e-2)
    (change,) = header(out)["resumed"]
    assert change["step"] == 4 and change["micro_batch_size"] == micro


def test_what_a_resumed_run_may_change(options, halfway):
    command = [*options, f"--out_dir={halfway}", "--init_from=resume"]
    run(*command, "--max_steps=8", "--eval_interval=1", "--micro_batch_size=4", "--dtype=bfloat16",
        "--log_interval=2", "--checkpoint_interval=3", "--keep_interval=4", "--recompute=True")
    assert [row["step"] for row in rows(halfway, "train")] == [1, 2, 3, 4, 6, 8]
    assert [row["step"] for row in rows(halfway, "val")] == [0, 3, 5, 6, 7, 8]
    assert "is finished" in run(*command, "--max_steps=8")
    run(*command, "--max_steps=9")
    resumed = header(halfway)["resumed"]
    assert [change["step"] for change in resumed] == [4, 8] and resumed[0]["dtype"] == "bfloat16"


@pytest.mark.parametrize("change, wanted", [
    ("--learning_rate=0.5", "--learning_rate=0.0015"), ("--layers=3", "--layers=1"),
    ("--preset=small", "--preset=tiny")])
def test_what_a_resumed_run_may_not_change(options, halfway, tmp_path, change, wanted):
    before, command = contents(halfway), [*options, f"--out_dir={halfway}", "--init_from=resume"]
    status, said = attempt(*command, change)
    assert status == 2 and wanted in said and contents(halfway).items() >= before.items()
    given = said[said.index("--"):].strip(" .\n").split()  # what it says, given as well
    run(*command, change, *given)
    runs.make_corpus(tmp_path, seed=2)
    assert "same text" in attempt(*command, f"--data_dir={tmp_path}")[1]


def test_a_torn_log_is_mended(options, finished, halfway):
    log = halfway / "log.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    kept = next(i for i, line in enumerate(lines) if b'"train", "step": 5' in line)
    not_ours = b'1\n[]\n"constants"\n{"split": "train", "step": 1}\n'
    for torn in (b'{"split": "tr\n', b"\0\0\0\0\n{\n", b"\xff\n", not_ours):
        for place in (2, kept):  # behind it, readable rows follow
            log.write_bytes(b"".join([*lines[:place], torn, *lines[place:kept]]))
            shutil.copy(finished / "ckpt.prev.pt", halfway / "ckpt.pt")
            said = run(*options, f"--out_dir={halfway}", "--init_from=resume")
            assert f"{torn.count(10)} lines could not be read" in said
            assert_same(finished, halfway)


def damage(path, kind):
    raw = bytearray(path.read_bytes())
    tensor = max(read(path.parent, path.name)["model"].values(), key=torch.numel).numpy().tobytes()
    raw[raw.index(tensor[:64]) + 99] ^= 4  # torch.load alone would not notice
    path.write_bytes({"truncated": raw[:len(raw) // 2], "zeroed": bytes(len(raw)), "bit flipped": raw}[kind])


@pytest.mark.parametrize("kind", ["truncated", "zeroed", "bit flipped"])
def test_the_checkpoint_before_a_damaged_one_is_used(options, finished, tmp_path, kind):
    out, command = shutil.copytree(finished, tmp_path / "out"), [*options, f"--out_dir={tmp_path}/out"]
    damage(out / "ckpt.pt", kind)
    with pytest.raises(data.InputError, match="ckpt.pt"):
        train.load_checkpoint(out / "ckpt.pt")
    with each_moment(out) as moments:
        said = run(*command, "--init_from=resume_or_scratch")
    assert "ckpt.pt is damaged" in said and f"resuming from {out}/ckpt.prev.pt, step 4" in said
    assert_same(finished, out)
    for moment in moments if kind == "bit flipped" else ():  # a kill loses nothing
        put(moment, out)
        run(*command, "--init_from=resume")
        assert_same(finished, out)


def test_a_run_whose_checkpoints_are_all_damaged_is_refused(options, finished, tmp_path):
    out = shutil.copytree(finished, tmp_path / "out")
    damage(out / "ckpt.pt", "truncated")
    damage(out / "ckpt.prev.pt", "bit flipped")
    before = contents(out)
    for how in ("resume", "resume_or_scratch", "scratch"):
        status, said = attempt(*options, f"--out_dir={out}", f"--init_from={how}")
        assert status == 2 and said.count("\n") == 1 and f"{out}/ckpt" in said
    assert contents(out) == before


def test_a_folder_with_a_checkpoint_is_not_begun_anew(options, finished, tmp_path):
    shutil.copy(finished / "ckpt.pt", tmp_path / "ckpt.4.pt")
    for how in ("scratch", "resume_or_scratch", "resume_or_scratch --overwrite=True"):
        status, said = attempt(*options, f"--out_dir={tmp_path}", *f"--init_from={how}".split())
        assert status == 2 and "ckpt.4.pt" in said and "--overwrite=True" in said
    assert set(os.listdir(tmp_path)) - {".lock"} == {"ckpt.4.pt"}


def test_other_files_are_not_in_the_way(options, finished, tmp_path):
    (tmp_path / "ckpt.best.pt").write_text("mine")
    run(*options, f"--out_dir={tmp_path}")
    assert (tmp_path / "ckpt.best.pt").read_text() == "mine"
    (tmp_path / "ckpt.best.pt").unlink()
    assert_same(finished, tmp_path)


def test_a_checkpoint_of_another_model_is_refused(options, halfway):
    saved = read(halfway)
    saved["model"]["head"] = torch.zeros(1)
    torch.save(saved, halfway / "ckpt.pt")
    status, said = attempt(*options, f"--out_dir={halfway}", "--init_from=resume")
    assert status == 2 and "does not fit model.py" in said and said.count("\n") == 2


@pytest.mark.parametrize("content", [b"a diary", b'{"constants": {"preset": "tiny"}}\n', b""])
def test_a_folder_with_a_log_is_not_begun_anew(options, tmp_path, content):
    (tmp_path / "log.jsonl").write_bytes(content)
    for how in ("scratch", "resume_or_scratch"):
        status, said = attempt(*options, f"--out_dir={tmp_path}", f"--init_from={how}")
        assert status == 2 and "log.jsonl" in said and "--overwrite=True" in said
    assert (tmp_path / "log.jsonl").read_bytes() == content


def test_the_log_of_a_long_run_stays_where_its_checkpoints_are_gone(options, finished, tmp_path):
    out = shutil.copytree(finished, tmp_path / "out")
    for file in out.glob("ckpt*"):
        file.unlink()
    for interval in ((), ["--checkpoint_interval=100"]):  # the log was that of a run with 2
        status, said = attempt(*options, f"--out_dir={out}", "--init_from=resume_or_scratch", *interval)
        assert status == 2 and "log.jsonl" in said
    assert (out / "log.jsonl").read_bytes() == (finished / "log.jsonl").read_bytes()


def test_a_lock_that_is_a_link_is_refused(options, tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".lock").symlink_to(tmp_path / "mine")
    status, said = attempt(*options, f"--out_dir={tmp_path}/out")
    assert status == 2 and ".lock" in said and (tmp_path / "mine").read_text() == "mine"


def test_two_runs_started_at_once_in_a_new_folder(options, finished, tmp_path):
    """One of them goes on, the other one is refused."""
    outs = [finish(each) for each in [start(*options, f"--out_dir={tmp_path}/out") for _ in range(2)]]
    assert sorted(statuses for statuses, _ in outs) == [[0], [2]]
    assert_same(finished, tmp_path / "out")


def test_a_setting_that_an_older_checkpoint_does_not_know_counts_as_its_default(options, finished, halfway):
    saved = read(halfway)
    for name in ("crop", "grad_clip"):
        del saved["settings"][name]
    torch.save(saved, halfway / "ckpt.pt")
    run(*options, f"--out_dir={halfway}", "--init_from=resume")
    assert_same(finished, halfway)


def test_a_rank_that_is_not_of_this_world_is_refused(options, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "RANK", 5)
    status, said = attempt(*options, f"--out_dir={tmp_path}/out")
    assert status == 2 and "RANK=5" in said and not (tmp_path / "out").exists()


def test_overwriting_deletes_the_files_of_a_run_alone(options, finished, tmp_path):
    out = shutil.copytree(finished, tmp_path / "out")
    for name in ("ckpt.4.pt", "ckpt.best.pt", "notes.txt"):
        shutil.copy(out / "ckpt.pt", out / name)
    run(*options, f"--out_dir={out}", "--overwrite=True", "--max_steps=2")
    assert sorted(os.listdir(out)) == [".lock", "ckpt.best.pt", "ckpt.pt", "log.jsonl", "notes.txt"]
    assert (out / "notes.txt").read_bytes() == (finished / "ckpt.pt").read_bytes()


def test_the_source_of_a_run_is_not_overwritten(options, finished, tmp_path):
    out = shutil.copytree(finished, tmp_path / "out")
    for source in (out, out / "ckpt.prev.pt"):
        status, said = attempt(*options, f"--out_dir={out}", f"--init_from={source}", "--overwrite=True")
        assert status == 2 and "choose another --out_dir" in said and contents(out) == contents(finished)


def test_a_run_from_a_checkpoint_is_resumed_by_the_same_sizes(options, finished, tmp_path):
    run(*options, f"--out_dir={tmp_path}", f"--init_from={finished}", "--max_steps=2")
    run(*options, f"--out_dir={tmp_path}", "--init_from=resume", "--max_steps=3")
    assert read(tmp_path)["step"] == 3


def test_the_warning_that_all_texts_look_the_same(options, tmp_path, monkeypatch):
    evaluate = train.evaluate

    def all_alike(*arguments):
        scores, *rest = evaluate(*arguments)
        return scores | {"mean_cosine": 1.0}, *rest

    monkeypatch.setattr(train, "evaluate", all_alike)
    for task in ("clm", "rtd"):
        said = run(*options, f"--out_dir={tmp_path}/{task}", f"--token_task={task}", "--max_steps=2")
        assert ("all texts look the same" in said) == (task == "clm")


def test_a_closed_terminal_does_not_end_a_run(options, finished, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "print", lambda *_, **__: os.write(-1, b""), raising=False)  # OSError
    run(*options, f"--out_dir={tmp_path}")
    assert_same(finished, tmp_path)


def test_an_interrupted_file_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train.write_file(tmp_path / "results.json", "{}")
    assert os.listdir(tmp_path) == []


def test_a_checkpoint_runs_no_code(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    torch.save({"model": Trap()}, tmp_path / "ckpt.pt")
    with pytest.raises(data.InputError):
        train.load_checkpoint(tmp_path / "ckpt.pt")
    assert not (tmp_path / "sprung").exists()


def test_a_second_run_in_the_same_folder_is_refused(options, finished, tmp_path, monkeypatch):
    def second_run():
        before = contents(tmp_path)
        for how in ("--overwrite=True", "--init_from=resume"):
            status, said = attempt(*options, f"--out_dir={tmp_path}", how)
            assert status == 2 and f"{tmp_path} is in use" in said
        assert contents(tmp_path) == before

    at_row(4, second_run, monkeypatch)
    run(*options, f"--out_dir={tmp_path}")
    assert_same(finished, tmp_path)


# ------------------------------------------------------------------------------------------------------------
# Full disks, signals, divergence


@pytest.fixture
def limit():
    """limit(n): no file may become larger than n bytes, as if the disk were full; limit(): as before."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size=before[0]: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_run_survives_a_disk_that_is_full_for_a_while(options, finished, tmp_path, monkeypatch, limit):
    at_row(3, lambda: limit(100_000), monkeypatch)
    at_row(5, limit, monkeypatch)
    said = run(*options, f"--out_dir={tmp_path}")
    assert said.count("warning: ") == said.count("ckpt.pt cannot be written") == 1
    assert_same(finished, tmp_path)
    assert read(tmp_path, "ckpt.prev.pt")["step"] == 2


def test_a_row_that_cannot_be_written_is_said_and_left_out(options, finished, tmp_path, monkeypatch, limit):
    at_row(2, lambda: limit((tmp_path / "log.jsonl").stat().st_size + 50), monkeypatch)
    at_row(3, limit, monkeypatch)  # a checkpoint is too large as well
    said = run(*options, f"--out_dir={tmp_path}")
    assert said.count("log.jsonl cannot be written") == said.count("ckpt.pt cannot be written") == 1
    assert [row["step"] for row in rows(tmp_path, "train")] == [1, 2, 4, 5, 6]  # and no half row
    torch.testing.assert_close(weights(finished), weights(tmp_path), rtol=0, atol=0)


def test_the_last_checkpoint_has_to_be_written(options, finished, tmp_path, monkeypatch, limit):
    at_row(3, lambda: limit(100_000), monkeypatch)
    status, said = attempt(*options, f"--out_dir={tmp_path}")
    assert status == 2 and said.splitlines()[-1].startswith(f"{tmp_path}/ckpt.pt cannot be written")
    assert sorted(os.listdir(tmp_path)) == [".lock", "ckpt.pt", "log.jsonl"] and read(tmp_path)["step"] == 2
    limit()
    run(*options, f"--out_dir={tmp_path}", "--init_from=resume")
    assert_same(finished, tmp_path)


@pytest.mark.parametrize("name", STOPS)
def test_a_signal_saves_and_stops(options, finished, tmp_path, monkeypatch, name):
    number = getattr(signal, name)
    at_row(2, lambda: os.kill(os.getpid(), number), monkeypatch)
    status, said = attempt(*options, f"--out_dir={tmp_path}")
    assert status == 128 + number and name in said and "--init_from=resume" in said
    assert read(tmp_path)["step"] == 3 == rows(tmp_path)[-1]["step"]
    run(*options, f"--out_dir={tmp_path}", "--init_from=resume")
    assert_same(finished, tmp_path)


def test_a_signal_that_is_ignored_stays_ignored(options, finished, tmp_path, monkeypatch):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    at_row(2, lambda: os.kill(os.getpid(), signal.SIGHUP), monkeypatch)
    run(*options, f"--out_dir={tmp_path}")
    assert_same(finished, tmp_path)


def test_a_signal_to_one_of_two_processes_stops_both_after_the_same_step(options, tmp_path):
    never = ["--max_steps=100000", "--eval_interval=100000", "--checkpoint_interval=100000"]
    both = start(*options, *never, f"--out_dir={tmp_path}", "--micro_batch_size=3", processes=2)
    wait_for(lambda: last_step(tmp_path) >= 3, both[0])
    os.kill(both[1].pid, signal.SIGHUP)
    statuses, said = finish(both)
    assert statuses == [128 + signal.SIGHUP] * 2, said
    assert read(tmp_path)["step"] == rows(tmp_path)[-1]["step"]


def test_a_second_signal_stops_at_once(options, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "_exit", sys.exit)
    at_row(3, lambda: [os.kill(os.getpid(), signal.SIGTERM) for _ in range(2)], monkeypatch)
    status, _ = attempt(*options, f"--out_dir={tmp_path}")
    assert status == 128 + signal.SIGTERM and last_step(tmp_path) == 3 and read(tmp_path)["step"] == 2


def test_many_epochs_are_said(options, tmp_path, monkeypatch):
    at_row(1, lambda: os.kill(os.getpid(), signal.SIGTERM), monkeypatch)
    _, said = attempt(*options, f"--out_dir={tmp_path}", "--max_steps=30000")
    assert re.search(r"warning: \d+ epochs", said) and re.search(r"1 train .* \d:\d\d:\d\d\n", said)


def poison(kind, first_pass):
    """From this pass of training on, the copy loss is nan, or only its gradient is."""
    original, passes = model.copy_loss, []

    def poisoned(logits, same):
        passes.extend([1] * torch.is_grad_enabled())
        if not torch.is_grad_enabled() or len(passes) < first_pass:
            return original(logits, same)
        zero = 0 * logits.float().sum()
        return original(logits, same) + (zero * math.nan if kind == "loss" else zero.sqrt())  # inf times 0

    model.copy_loss = poisoned


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_what_is_not_finite_stops_the_run_before_the_step(options, finished, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(model, "copy_loss", model.copy_loss)  # is put back
    poison(kind, first_pass=3)
    status, said = attempt(*options, f"--out_dir={tmp_path}")
    assert status == 1 and "stopped before step 3" in said
    assert ("copy_loss nan" in said) == (kind == "loss") and "gradient norm nan" in said
    assert last_step(tmp_path) == read(tmp_path)["step"] == 2
    monkeypatch.undo()
    run(*options, f"--out_dir={tmp_path}", "--init_from=resume")
    assert_same(finished, tmp_path)


def poison_process_1():
    if os.environ["RANK"] == "1":
        poison("loss", first_pass=6)  # one pass comes before the first step, which has two


def test_what_is_not_finite_on_one_process_stops_both(options, tmp_path):
    statuses, said = finish(start(*options, f"--out_dir={tmp_path}", "--micro_batch_size=3", processes=2,
                                  before=poison_process_1))
    assert statuses == [1, 1] and said.count("stopped before step 3") == 1
    assert re.search(r"process 0, step 3: .*copy_loss \d", said)
    assert re.search(r"process 1, step 3: .*copy_loss nan", said)
    assert read(tmp_path)["step"] == 2


def test_float16_counts_skipped_steps_and_stops_if_it_skips_all(options, tmp_path, monkeypatch):
    half = [*options, "--dtype=float16", "--max_steps=80", "--eval_interval=100", "--checkpoint_interval=10"]
    monkeypatch.setattr(model, "copy_loss", model.copy_loss)
    poison("gradient", first_pass=4)
    status, said = attempt(*half, f"--out_dir={tmp_path}/out")
    assert status == 1 and "copy_loss 0." in said
    log = rows(tmp_path / "out", "train")
    assert 20 < len(log) < 60
    skipped = [row["grad_norm"] is None for row in log]
    assert [row["skipped_steps"] for row in log] == np.cumsum(skipped).tolist() and all(skipped[6:])
    assert read(tmp_path / "out")["skipped"] == log[read(tmp_path / "out")["step"] - 1]["skipped_steps"]
