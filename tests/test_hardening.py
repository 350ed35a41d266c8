"""What ends a run of a week, each tried once or a few times; tests/stress.py tries the same for as long as one likes.

Equal here means equal to the bit, of weights, optimizer state and log, unless a tolerance says otherwise.
"""

import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import stress
import torch
from stress import ROOT, rows, run_here

import data
import finetune
import train

SEED = 5


@pytest.fixture(scope="session")
def options(tmp_path_factory):
    """The command line of a run of 12 steps, but for its out_dir."""
    return stress.make_corpus(tmp_path_factory.mktemp("stress"))


@pytest.fixture(scope="session")
def corpus(options):
    """The folder of its corpus."""
    return data.Path(options[0].partition("=")[2], "toy")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As all runs in processes of their own have: another number gives other last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def finished(one_thread, options, tmp_path_factory):
    """out_dir of that run. To be copied, not changed."""
    out = tmp_path_factory.mktemp("finished") / "out"
    assert run_here(*options, f"--out_dir={out}")[0] == 0
    return out


@pytest.fixture
def draw(request):
    return random.Random(f"{SEED} {request.node.name}")


@pytest.fixture(scope="module")
def stopped(one_thread, options, tmp_path_factory):
    """out_dir of that run, stopped after 6 of its 12 steps. To be copied, not changed."""
    out, write = tmp_path_factory.mktemp("stopped") / "out", train.Log.write

    def stops(self, row):
        write(self, row)
        if row["split"] == "train" and row["step"] == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Log, "write", stops)
        assert run_here(*options, f"--out_dir={out}")[0] == 128 + signal.SIGTERM
    assert rows(out)[-1]["step"] in (5, 6)
    return out


@pytest.fixture
def halfway(options, stopped, tmp_path):
    """A copy of it; and its command line, resuming."""
    out = shutil.copytree(stopped, tmp_path / "out")
    return out, [*options[:2], f"--out_dir={out}", "--init_from=resume"]


# --- what the other tests rest on


def test_the_comparison_finds_each_difference(finished, tmp_path):
    copy = shutil.copytree(finished, tmp_path / "copy")
    assert stress.differences(finished, copy) == [] and stress.leftovers(copy) == []
    (copy / "ckpt.partial").touch()
    assert stress.leftovers(copy) == ["ckpt.partial is left over"]
    lines = (copy / "log.jsonl").read_text().splitlines()
    (copy / "log.jsonl").write_text("\n".join([*lines[:3], *lines[2:]]))  # one step twice
    assert stress.differences(finished, copy) == ["the log"]
    (copy / "log.jsonl").write_text("\n".join(lines))
    checkpoint = torch.load(finished / "ckpt.pt", weights_only=True)
    checkpoint["model"]["lm_bias"][0] = torch.nextafter(checkpoint["model"]["lm_bias"][0], torch.tensor(1.0))
    checkpoint["optimizer"]["state"][3]["step"] += 1
    torch.save(checkpoint, copy / "ckpt.pt")
    assert stress.differences(finished, copy) == ["weights of lm_bias", "step of 3"]


def test_the_fuzzers_find_tracebacks_and_bad_messages(corpus, tmp_path, draw, monkeypatch):
    assert "ZeroDivisionError" in stress.complaint(lambda: 1 / 0, "x")
    assert "names its input" in stress.complaint(lambda: data.checked("y", 3, bool), "x")
    assert "still at it" in stress.complaint(lambda: time.sleep(5), "x", seconds=1)
    assert stress.complaint(lambda: data.checked("x", 3, bool), "x") is None
    monkeypatch.setattr(data, "check_tokens", lambda *_: None)
    monkeypatch.setattr(data.Tokenizer, "from_state", classmethod(lambda cls, state, path: cls(
        {b: i for i, b in enumerate(state["ranks"].encode())}, state["pattern"], state["lowercase"])))
    assert stress.fuzz_corpora(tmp_path / "copy", corpus, 20, draw)


# --- killed and resumed


def killed_on_the_way(options, folder, variant):
    kills = 1 if variant == "compiled" else 2  # each start compiles three graphs
    with stress.without_a_compiler():
        return stress.resumed_equals_undisturbed([*options, *stress.VARIANTS[variant]], folder / variant, kills,
                                                 random.Random(f"{SEED} {variant}"))


def test_killed_on_the_way_to_the_disk(options, tmp_path):
    with stress.in_processes(2) as pool:
        lost = {variant: pool.submit(killed_on_the_way, options, tmp_path, variant)
                for variant in sorted(stress.VARIANTS, key="compiled".__ne__)}  # the longest one first
        assert {variant: found.result() for variant, found in lost.items()} == dict.fromkeys(stress.VARIANTS, [])


def test_killed_at_each_step_to_the_disk(options, tmp_path):
    """A short run is killed at its first log line, write, sync, rename, then at the second, ..., each time resumed."""
    short = [*options, "--max_steps=4", "--checkpoint_interval=1", "--eval_interval=100", f"--out_dir={tmp_path}/out",
             "--init_from=resume_or_scratch"]
    assert run_here(*short, f"--out_dir={tmp_path}/alone")[0] == 0
    for number in range(1, 14):
        with stress.killed_at(number):
            run_here(*short)
    assert run_here(*short)[0] == 0
    assert stress.differences(tmp_path / "alone", tmp_path / "out") + stress.leftovers(tmp_path / "out") == []


@pytest.mark.parametrize("processes", [1, 2])
def test_sigkilled_at_random_moments(options, tmp_path, draw, processes):
    assert stress.sigkilled_equals_undisturbed(options, tmp_path, 3, draw, processes) == []


def test_three_processes_resume_exactly(options, tmp_path, draw):
    """More than two: here the order of sums matters, which DDP's buckets decide."""
    three = [*options, "--micro_batch_size=4", "--max_steps=6"]
    for out, steps in (("alone", []), ("out", ["--checkpoint_keep=2"])):
        statuses, said = stress.finish(stress.start(*three, f"--out_dir={tmp_path}/{out}", *steps, processes=3))
        assert statuses == [0, 0, 0], said
        if out == "out":
            break
        shutil.copytree(tmp_path / "alone", tmp_path / "out")
        shutil.copy(tmp_path / "out/ckpt.prev.pt", tmp_path / "out/ckpt.pt")
        three += ["--init_from=resume"]
    assert stress.differences(tmp_path / "alone", tmp_path / "out") == []


def test_a_killed_process_is_named_and_torchrun_brings_the_run_back(options, tmp_path, draw):
    assert stress.restarted_by_torchrun(options, tmp_path, draw) == []


def test_a_process_that_hangs_is_named(options, tmp_path):
    assert stress.hanging(options, tmp_path) == []


def test_a_process_that_never_comes_is_missed(options, tmp_path):
    program = "-c", "import data, train; train.JOINING = 1; data.run_command(train.main, quiet=lambda: train.rank() != 0)"
    pairs = [stress.start(*options, f"--out_dir={tmp_path}/out", processes=2, program=program) for _ in range(2)]
    for absent, pair in enumerate(pairs):
        pair[absent].kill()
    for absent, pair in enumerate(pairs):
        statuses, said = stress.finish(pair, seconds=60)
        assert statuses[1 - absent] == 2 and "the processes did not find each other (" in said and "Traceback" not in said, said
    assert not (tmp_path / "out").exists()


def test_the_number_of_threads_decides_the_last_bits(options, tmp_path):
    """The same number: the same bits. Another one: the same up to rounding."""
    wide, before = [*options, "--width=64", "--ffn_width=256", "--max_len=64", "--max_steps=2"], torch.get_num_threads()
    try:
        for name, threads in (("two", 2), ("again", 2), ("one", 1)):
            torch.set_num_threads(threads)
            assert run_here(*wide, f"--out_dir={tmp_path}/{name}")[0] == 0
    finally:
        torch.set_num_threads(before)
    assert stress.differences(tmp_path / "two", tmp_path / "again") == []
    for a, b in zip(rows(tmp_path / "two"), rows(tmp_path / "one"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


# --- another number of processes


@pytest.mark.parametrize("micro, processes", [([], 2), (["--micro_batch_size=4"], 1)])
def test_one_process_continues_with_another_split_of_the_batch(options, tmp_path, micro, processes):
    plain = [*options, "--dropout=0.0", "--dtype=float32"]
    assert run_here(*plain, f"--out_dir={tmp_path}/alone")[0] == 0
    with stress.killed_at(14):
        run_here(*plain, f"--out_dir={tmp_path}/out")
    before = train.read_checkpoint(tmp_path / "out/ckpt.pt")["step"]
    assert 0 < before < 8
    resume = [*options[:2], *micro, f"--out_dir={tmp_path}/out", "--init_from=resume"]
    statuses, said = stress.finish(stress.start(*resume, processes=processes))
    assert set(statuses) == {0}, said
    assert ("warning: each sequence vector has 6 negatives in a pass, no longer 10" in said) == bool(micro)
    alone, out = rows(tmp_path / "alone", "train"), rows(tmp_path / "out", "train")
    assert [row["step"] for row in out] == list(range(1, 13))
    for a, b in zip(alone, out):
        for name in () if micro else ("loss", "mlm_loss", "copy_loss", "lm_loss", "scl_loss", "grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=2e-4), (a["step"], name)
    (change,) = json.loads((tmp_path / "out/log.jsonl").read_text().splitlines()[0])["resumed"]
    split = {"micro_batch_size": 4} if micro else {"micro_batch_size": 3, "processes": 2}
    assert change == {"step": before, **split}


# --- checkpoints


@pytest.mark.parametrize("kind", stress.DAMAGE)
def test_a_damaged_checkpoint_is_found_and_the_one_before_is_used(options, finished, tmp_path, kind, draw):
    assert stress.damaged_checkpoint(options, finished, tmp_path / "out", kind, draw) == []


def test_a_damaged_checkpoint_is_said_in_a_sentence(options, finished, tmp_path, draw):
    out = shutil.copytree(finished, tmp_path / "out")
    stress.damage(out / "ckpt.pt", "a bit flipped", draw)
    status, said = run_here(*options, f"--out_dir={out}", "--init_from=resume")
    assert status == 0
    assert (f"warning: {out}/ckpt.pt is damaged or no checkpoint (BadZipFile), so the run goes on from "
            f"{out}/ckpt.prev.pt, step 10.\n") in said
    for name in ("ckpt.pt", "ckpt.prev.pt"):
        stress.damage(out / name, "truncated", draw)
    status, said = run_here(*options, f"--out_dir={out}", "--init_from=resume")
    assert status == 2 and f"{out}/ckpt.pt is damaged" in said and f"and {out}/ckpt.prev.pt is damaged" in said
    with pytest.raises(data.InputError, match="is damaged"):
        train.load_checkpoint(out / "ckpt.pt")


def cut(state):
    state[0]["exp_avg"] = torch.zeros(3)


def text(state):
    state[0]["exp_avg_sq"] = "many"


@pytest.mark.parametrize("change", [
    cut, text, dict.clear, dict.popitem, lambda state: state[1].pop("step"), lambda state: state.update({0: 7}),
    lambda state: state[2].update(step=torch.ones(2))])
def test_moments_that_do_not_fit_are_refused(options, halfway, change):
    """Their checksums are right; fused AdamW would write beyond the end of one that is too short."""
    out, resume = halfway
    checkpoint = torch.load(out / "ckpt.pt", weights_only=True)
    change(checkpoint["optimizer"]["state"])
    torch.save(checkpoint, out / "ckpt.pt")
    before = (out / "ckpt.pt").read_bytes()
    status, said = run_here(*resume)
    assert status == 2 and f"{out}/ckpt.pt has no optimizer that fits this model" in said
    assert (out / "ckpt.pt").read_bytes() == before


def test_rates_of_a_checkpoint_do_not_replace_the_settings(finished, halfway):
    out, resume = halfway
    checkpoint = torch.load(out / "ckpt.pt", weights_only=True)
    checkpoint["optimizer"]["param_groups"][0].update(betas=(0.5, 0.5), weight_decay=0.9)
    torch.save(checkpoint, out / "ckpt.pt")
    assert run_here(*resume)[0] == 0
    assert stress.differences(finished, out) == []


@pytest.mark.parametrize("left", ["ckpt.4.pt", "ckpt.prev.pt"])
def test_a_run_whose_last_checkpoint_is_gone_is_not_begun_anew(options, finished, tmp_path, left):
    shutil.copy(finished / "ckpt.pt", tmp_path / left)
    for start in ("scratch", "resume", "resume_or_scratch"):
        status, said = run_here(*options, f"--out_dir={tmp_path}", f"--init_from={start}")
        assert status == 2 and f"{tmp_path}/ckpt.pt is gone but {tmp_path}/{left} is there" in said
    assert [file.name for file in tmp_path.iterdir()] == [left]


def test_a_link_to_a_disk_that_is_not_there_is_not_replaced(options, tmp_path):
    (tmp_path / "ckpt.pt").symlink_to("/nonexistent/ckpt.pt")
    for start in ("scratch", "resume_or_scratch"):
        status, said = run_here(*options, f"--out_dir={tmp_path}", f"--init_from={start}")
        assert status == 2 and "is a link to /nonexistent/ckpt.pt, which is not there" in said
    assert (tmp_path / "ckpt.pt").is_symlink()


def test_a_damaged_checkpoint_is_not_kept_as_the_one_before(tmp_path, draw):
    path = tmp_path / "ckpt.pt"
    for step in (1, 2):
        train.write_checkpoint(path, {"model": {"w": torch.arange(1000.0)}, "step": step})
    stress.damage(path, "a bit flipped", draw)
    train.write_checkpoint(path, {"model": {"w": torch.arange(1000.0)}, "step": 3})
    assert [torch.load(tmp_path / name)["step"] for name in ("ckpt.pt", "ckpt.prev.pt")] == [3, 1]


@pytest.mark.parametrize("keep, steps", [
    (0, []), (1, [12]), (3, [4, 8, 12]), (5, [4, 6, 8, 10, 12]), (100, [2, 4, 6, 8, 10, 12])])
def test_milestones_are_spread_over_the_run(options, finished, tmp_path, keep, steps):
    assert run_here(*options, f"--out_dir={tmp_path}", f"--checkpoint_keep={keep}")[0] == 0
    kept = {int(file.name.split(".")[1]): file for file in tmp_path.glob("ckpt.*.pt") if file.name != "ckpt.prev.pt"}
    assert sorted(kept) == steps
    assert [train.read_checkpoint(kept[step])["step"] for step in steps] == steps
    assert stress.differences(finished, tmp_path) + stress.leftovers(tmp_path) == []
    assert run_here(*options, f"--out_dir={tmp_path}", "--overwrite=True", "--max_steps=2")[0] == 0
    assert not list(tmp_path.glob("ckpt.[0-9]*.pt"))  # they were of the run that was overwritten


def test_a_full_disk_loses_nothing(options, finished, tmp_path, draw):
    for number in range(3):
        assert stress.full_disk(options, finished, tmp_path / str(number), draw) == []


def test_lines_that_wait_for_the_disk_are_written_before_the_checkpoint(options, finished, tmp_path, monkeypatch):
    """One line finds the disk full; the run is stopped before the next one is due, and resumed."""
    class Full:
        def write(self, raw):
            raise OSError(28, "No space left on device")

    write = train.Log.write

    def once_full(self, row):
        file = self.file
        if (row["split"], row["step"]) == ("train", 7):
            self.file = Full()
            os.kill(os.getpid(), signal.SIGTERM)
        write(self, row)
        self.file = file

    with monkeypatch.context() as patch:
        patch.setattr(train.Log, "write", once_full)
        status, said = run_here(*options, f"--out_dir={tmp_path}/out")
    assert status == 128 + signal.SIGTERM and "its lines wait in memory" in said
    assert run_here(*options[:2], f"--out_dir={tmp_path}/out", "--init_from=resume")[0] == 0
    assert stress.differences(finished, tmp_path / "out") == []


def test_a_disk_that_stays_full_ends_all_processes_with_one_sentence(options, tmp_path):
    program = ("-c", "import resource, data, train; resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000)); "
                     "data.run_command(train.main, quiet=lambda: train.rank() != 0)")
    statuses, said = stress.finish(stress.start(*options, f"--out_dir={tmp_path}/out", "--max_steps=3", processes=2,
                                                program=program))
    assert statuses == [2, 2] and "Traceback" not in said
    assert said.count("ckpt.pt could not be written") == 2 and said.count("there is no checkpoint yet") == 2  # steps 2, 3
    assert os.listdir(tmp_path / "out") == ["log.jsonl"]


@pytest.mark.parametrize("resumed", [5, [{"a": 1}], [{"step": "x"}], {"step": 1}])
def test_a_log_whose_first_line_is_damaged_goes_on(finished, halfway, resumed):
    out, resume = halfway
    first, *lines = (out / "log.jsonl").read_text().splitlines()
    (out / "log.jsonl").write_text("\n".join([json.dumps({**json.loads(first), "resumed": resumed}), *lines]) + "\n")
    assert run_here(*resume)[0] == 0
    assert stress.differences(finished, out) == []


def test_a_log_that_is_gone_is_said(halfway):
    out, resume = halfway
    (out / "log.jsonl").unlink()
    status, said = run_here(*resume)
    assert status == 0 and f"warning: {out}/log.jsonl was cut: its last line is of step 0" in said


# --- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_one_process_stops_all_at_the_same_step(options, tmp_path, number):
    assert stress.signalled(options, tmp_path, number) == []


def test_a_second_signal_stops_at_once(options, tmp_path):
    assert stress.second_signal(options, tmp_path) == []


def test_a_closed_pipe_does_not_end_the_run(options, finished, tmp_path):
    command = " ".join([sys.executable, str(ROOT / "train.py"), *options, f"--out_dir={tmp_path}/out"])
    shell = subprocess.run(["bash", "-c", f"set -o pipefail; {command} | head -3"], capture_output=True, text=True)
    assert (shell.returncode, shell.stdout.count("\n"), shell.stderr) == (0, 3, "")
    assert stress.differences(finished, tmp_path / "out") == []


# --- two nodes


def test_two_nodes(options, corpus, finished, tmp_path):
    """Two launchers, each in a folder of its own with its own corpus; only the first one has checkpoints."""
    nodes = [tmp_path / "first", tmp_path / "second"]
    for node in nodes:
        shutil.copytree(corpus, node / "data/toy")
    shutil.copytree(finished, nodes[0] / "out")
    shutil.copy(nodes[0] / "out/ckpt.prev.pt", nodes[0] / "out/ckpt.pt")  # resumed at step 10
    common = ["--data_dir=data", "--out_dir=out", "--init_from=resume"]
    with stress.socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launchers = [stress.torchrun(*common, cwd=node, options=(
        "--nnodes=2", "--nproc_per_node=1", f"--node_rank={r}", "--master_addr=127.0.0.1", f"--master_port={port}"))
        for r, node in enumerate(nodes)]
    statuses, said = stress.finish(launchers)
    assert statuses == [0, 0], said
    assert sorted(os.listdir(nodes[1])) == ["data"]
    assert train.read_checkpoint(nodes[0] / "out/ckpt.pt")["step"] == 12
    for a, b in zip(rows(finished, "train"), rows(nodes[0] / "out", "train"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.05)  # dropout is another one for two processes


def test_nodes_with_other_text_are_refused(options, corpus, tmp_path):
    nodes = [tmp_path / "first", tmp_path / "second"]
    for node in nodes:
        shutil.copytree(corpus, node / "data/toy")
    path, meta = nodes[1] / "data/toy/train.bin", json.loads((corpus / "meta.json").read_text())
    tokens = np.fromfile(path, np.uint16)
    tokens[7] ^= 1
    tokens.tofile(path)
    ours, theirs = meta["sha256"]["train"], data.hashlib.sha256(tokens).hexdigest()
    meta["sha256"]["train"] = theirs
    (nodes[1] / "data/toy/meta.json").write_text(json.dumps(meta))
    running = stress.start(*options, "--data_dir=data", "--out_dir=out", processes=2, folders=nodes)
    statuses, said = stress.finish(running)
    assert statuses == [2, 2] and said.count("differs between machines") == 1
    assert ours in said and theirs in said and "Traceback" not in said
    assert [sorted(os.listdir(node)) for node in nodes] == [["data"], ["data"]]


# --- data


@pytest.mark.parametrize("name", ["train", "val", "tokenizer"])
def test_text_without_its_checksum_is_refused(options, corpus, tmp_path, name):
    folder = shutil.copytree(corpus, tmp_path / "data/toy")
    meta = json.loads((folder / "meta.json").read_text())
    del meta["sha256"][name]
    (folder / "meta.json").write_text(json.dumps(meta))
    status, said = run_here(*options, f"--data_dir={tmp_path}/data", f"--out_dir={tmp_path}/out")
    assert status == 2 and re.search(r"meta.json is damaged|not as meta.json says", said)


def test_text_that_changed_since_the_checkpoint_is_refused(options, corpus, halfway, tmp_path):
    out, resume = halfway
    folder = shutil.copytree(corpus, tmp_path / "data/toy")
    here = [*resume, f"--data_dir={tmp_path}/data"]
    raw, meta = (folder / "train.bin").read_bytes(), (folder / "meta.json").read_text()
    before = (out / "ckpt.pt").read_bytes()
    for damaged in (raw[:-2], raw + b"\0\0", raw[:100] + bytes([raw[100] ^ 1]) + raw[101:]):
        (folder / "train.bin").write_bytes(damaged)
        status, said = run_here(*here)
        assert status == 2 and "train.bin is not as meta.json says" in said
        new = json.loads(meta)  # as if it had been prepared anew
        new["sha256"]["train"], new["tokens"]["train"] = data.hashlib.sha256(damaged).hexdigest(), len(damaged) // 2
        (folder / "meta.json").write_text(json.dumps(new))
        status, said = run_here(*here)
        assert status == 2 and "is not the text that" in said and new["sha256"]["train"] in said
        (folder / "meta.json").write_text(meta)
    assert (out / "ckpt.pt").read_bytes() == before
    (folder / "train.bin").write_bytes(raw)
    assert run_here(*here)[0] == 0


@pytest.fixture
def edited(corpus, tmp_path):
    """edited(split, place, token): the corpus in tmp_path/data with other tokens there, and the checksum made to fit."""
    def edit(split, place, token):
        folder = shutil.copytree(corpus, tmp_path / "data/toy")
        tokens = np.fromfile(folder / f"{split}.bin", np.uint16)
        tokens[place] = token
        tokens.tofile(folder / f"{split}.bin")
        meta = json.loads((folder / "meta.json").read_text())
        meta["sha256"][split] = data.hashlib.sha256(tokens).hexdigest()
        (folder / "meta.json").write_text(json.dumps(meta))
        return tokens
    return edit


@pytest.mark.parametrize("split", ["train", "val"])
def test_text_without_words_is_refused(options, corpus, edited, tmp_path, split):
    edited(split, slice(None), data.Tokenizer.load(corpus).sep_id)
    status, said = run_here(*options, f"--data_dir={tmp_path}/data", f"--out_dir={tmp_path}/out")
    assert status == 2 and f"{split}.bin has only 0 tokens but [CLS] and [SEP] at place" in said
    assert not list(tmp_path.glob("out/ckpt*"))


@pytest.mark.parametrize("split", ["train", "val"])
def test_ids_beyond_the_vocabulary_are_found_when_the_data_is_opened(options, edited, tmp_path, split):
    tokens = edited(split, -3, 400)
    status, said = run_here(*options, f"--data_dir={tmp_path}/data", f"--out_dir={tmp_path}/out")
    assert status == 2 and f"{split}.bin has the token 400 at place {len(tokens) - 3:,}, beyond its voc" in said
    assert not (tmp_path / "out").exists()


def test_what_a_resumed_run_changed_stands_in_its_log(halfway):
    out, resume = halfway
    assert run_here(*resume, "--max_steps=14", "--eval_interval=7")[0] == 0
    assert run_here(*resume, "--max_steps=15")[0] == 0
    header = json.loads((out / "log.jsonl").read_text().splitlines()[0])
    assert header["constants"]["max_steps"] == 12
    first, second = header["resumed"]
    assert first.pop("step") in (5, 6) and first == {"out_dir": str(out), "max_steps": 14, "eval_interval": 7}
    assert second == {"step": 14, "max_steps": 15}


# --- divergence


@pytest.fixture
def poisoned(monkeypatch):
    """poisoned(step, factor): the gradient of one weight is multiplied by factor from that step (counted from 1) on."""
    def poison(step, factor, name="main.layers.0.ffn_in.weight"):
        make, seed_pass, now = train.make_optimizer, train.seed_pass, {}

        def made(model, *arguments):
            weight = dict(model.named_parameters())[name]
            weight.register_hook(lambda gradient: gradient * factor if now["step"] >= step else gradient)
            return make(model, *arguments)

        def noted(seed, step, *more):
            now["step"] = step + 1
            seed_pass(seed, step, *more)

        monkeypatch.setattr(train, "seed_pass", noted)
        monkeypatch.setattr(train, "make_optimizer", made)
    return poison


def test_a_divergence_is_described_and_its_batch_can_be_run_alone(options, corpus, tmp_path, monkeypatch, poisoned):
    command = [*options, f"--out_dir={tmp_path}/out"]
    with monkeypatch.context() as patch:
        poisoned(5, math.inf)
        status, said = run_here(*command)
        patch.undo()
    assert status == 1 and "stopped at step 5: gradient norm is" in said and "48 to 59" in said
    assert re.search(r"losses of process 0: .*mlm_loss [\d.]+, copy_loss [\d.]+, lm_loss [\d.]+, scl_loss [\d.]+", said)
    norms = dict(re.findall(r"(\w+) ([\w.+-]+)", re.search("gradient norms: (.*)", said)[1]))
    assert set(norms) == {"total", "embeddings", "auxiliary", "main", "heads"}
    assert not math.isfinite(float(norms["main"])) and math.isfinite(float(norms["heads"]))
    tokenizer, sequences = data.Tokenizer.load(corpus), data.Sequences(corpus, "train", 32, 5, 28, 0)
    for index in range(12):
        text = tokenizer.decode(sequences.sequence(4, index, 12)["tokens"][1:17])
        assert f"sequence {48 + index}: {text!r}" in said
    assert train.read_checkpoint(tmp_path / "out/ckpt.pt")["step"] == 4

    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert "--init_from=resume --debug_step=5" in said
    monkeypatch.undo()
    status, alone = run_here(*command, "--init_from=resume", "--debug_step=5")
    assert status == 0 and "step 5 alone, with the weights of step 4" in alone
    assert re.findall("losses of .*", alone) == re.findall("losses of .*", said)
    assert re.findall("sequence .*", alone) == re.findall("sequence .*", said)
    norms = re.findall(r" \w+ ([\d.]+|nan|inf)", re.search("norms(: .*)", alone)[1])
    assert len(norms) == 5 and all(math.isfinite(float(norm)) for norm in norms)
    assert run_here(*command, "--debug_step=1")[0] == 0  # with the first weights
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before


def test_a_divergence_stops_all_processes(options, tmp_path):
    """The loss of process 1 alone is not finite."""
    program = """
import math, os, sys
import torch, train
from data import run_command
forward, calls = train.COCOLM.forward, [0]
def poisoned(self, *arguments):
    losses, statistics, predictions = forward(self, *arguments)
    calls[0] += self.training
    if calls[0] == 4 and train.rank() == 1:  # the first one is the idle pass
        losses["lm_loss"] = losses["lm_loss"] * math.nan
    return losses, statistics, predictions
train.COCOLM.forward = poisoned
sys.argv = ["train.py", *sys.argv[1:]]
run_command(train.main, quiet=lambda: train.rank() != 0)
"""
    running = stress.start(*options, f"--out_dir={tmp_path}/out", processes=2, program=("-c", program))
    statuses, said = stress.finish(running)
    assert statuses == [1, 1], said
    assert said.count("stopped at step 3: lm_loss of process 1 is nan") == 1
    assert re.findall(r"sequence (\d+):", said) == [str(i) for i in range(30, 36)]  # those of process 1
    assert train.read_checkpoint(tmp_path / "out/ckpt.pt")["step"] == 2


def test_float16_counts_skipped_steps_and_50_in_a_row_stop_the_run(options, tmp_path, poisoned):
    half = [*options, "--dtype=float16", "--max_steps=80", "--eval_interval=100", "--checkpoint_interval=10"]
    poisoned(7, math.inf)
    status, said = run_here(*half, f"--out_dir={tmp_path}/out")
    assert status == 1 and "stopped at step 56" in said and "50th step in a row" in said
    log = rows(tmp_path / "out", "train")
    at_first = log[5]["skipped_steps"]  # the scale begins too high
    assert [row["skipped_steps"] for row in log[6:]] == [at_first + n for n in range(1, 50)]
    assert at_first == sum(row["grad_norm"] is None for row in log[:6]) < 6 and f" {at_first + 49} skipped" in said
    status, said = run_here(*half, f"--out_dir={tmp_path}/out", "--init_from=resume")  # the counts go on
    assert status == 1 and "stopped at step 56" in said


def test_one_look_at_the_device_a_step(options, tmp_path, monkeypatch):
    """Steps that are not logged move one thing from the device to the host: their flags."""
    looks = []
    monkeypatch.setattr(train, "peak_flops", lambda *_: 1e12)  # looks at its products for 0.1 s, before the first step
    for name in ("tolist", "item", "__bool__", "__float__", "cpu", "numpy"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, *a, o=original, n=name: (looks.append(n), o(self, *a))[1])
    counts = []
    for steps in (3, 8):
        looks.clear()
        run_here(*options, f"--out_dir={tmp_path}/{steps}", f"--max_steps={steps}", "--log_interval=100",
                 "--eval_interval=100", "--checkpoint_interval=100")
        counts.append(len(looks))
    assert counts[1] - counts[0] == 5


# --- fuzz


def test_fuzzed_texts(tmp_path, draw):
    assert stress.fuzz_texts(tmp_path, 300, draw) == []


def test_fuzzed_corpora(corpus, tmp_path, draw):
    assert stress.fuzz_corpora(tmp_path / "copy", corpus, 300, draw) == []


def test_fuzzed_options(tmp_path, draw):
    assert stress.fuzz_options(tmp_path, 300, draw) == []


def test_fuzzed_glue_files(corpus, tmp_path, draw):
    assert stress.fuzz_glue(tmp_path, data.Tokenizer.load(corpus), 300, draw) == []


def test_fuzzed_squad_files(corpus, tmp_path, draw):
    assert stress.fuzz_squad(tmp_path, data.Tokenizer.load(corpus), 300, draw) == []


def test_fuzzed_checkpoints(options, finished, tmp_path, draw):
    assert stress.fuzz_checkpoints(tmp_path, options, finished / "ckpt.pt", 300, draw) == []


# --- safety


def test_nothing_is_executed():
    """No file of ours evaluates, executes or unpickles with code what it reads."""
    for name in ("data.py", "model.py", "train.py", "finetune.py"):
        source = (ROOT / name).read_text()
        assert not re.search(r"(?<![\w.])(eval|exec|compile|__import__)\(|import pickle|pickle\.|weights_only=False|"
                             r"shell=True|os\.system|allow_pickle", source), name
        assert all("weights_only=True" in line for line in re.findall(r"torch\.load\(.*\)", source)), name


def test_a_checkpoint_with_code_is_refused_and_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    torch.save({"model": Trap()}, tmp_path / "ckpt.pt")
    for load in (train.load_checkpoint, train.read_checkpoint, finetune.load_finetuned):
        with pytest.raises(Exception):
            load(tmp_path / "ckpt.pt")
    assert not (tmp_path / "sprung").exists()
