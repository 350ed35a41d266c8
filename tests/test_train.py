"""train.py: settings, one process against several, accumulation, resuming, checkpoints, log, ablations, bad input.

What is equal here is equal to the bit, unless a tolerance says otherwise; all runs are on the CPU in float32.
"""

import importlib.util
import json
import math
import os
import platform
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import stress
import torch
from stress import ROOT, rows, untimed

import data
import train

SMALL = ["--width=32", "--ffn_width=64", "--heads=2", "--max_len=32", "--batch_size=8", "--max_steps=3", "--warmup_steps=2",
         "--eval_batches=2", "--log_interval=1", "--eval_interval=100", "--checkpoint_interval=100"]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """data_dir with the corpus `toy`: 400 short documents of made-up but not random words."""
    folder = tmp_path_factory.mktemp("corpus")
    stress.make_corpus(folder)
    return folder


@pytest.fixture
def options(corpus, tmp_path):
    """The command line of a small run, into tmp_path/out."""
    return [f"--data_dir={corpus}", "--dataset=toy", f"--out_dir={tmp_path}/out", *SMALL]


def run(arguments):
    """train.py in this process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    before, sys.argv = sys.argv, ["train.py", *arguments]
    try:
        train.main()
    finally:
        sys.argv = before
        for number, handler in handlers.items():
            signal.signal(number, handler)


def weights(out, name="ckpt.pt"):
    return torch.load(Path(out) / name, weights_only=True)["model"]


def assert_same_weights(a, b, tolerance=0.0):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=tolerance, msg=lambda m: f"{name}: {m}")


# --- settings


def settle(text, arguments=(), monkeypatch=None):
    """The settings of a train.py whose source is `text`."""
    spec = importlib.util.spec_from_loader("edited_train", loader=None)
    module = importlib.util.module_from_spec(spec)
    path = Path(monkeypatch.tmp) / "train.py"
    path.write_text(text)
    module.__file__ = str(path)
    exec(compile(text, str(path), "exec"), module.__dict__)
    return module.settle([f"--out_dir={monkeypatch.tmp}/out", *arguments])[0]


@pytest.fixture
def edited(tmp_path):
    """edited({"max_steps": "7"}, arguments): the settings after editing these constants in train.py."""

    def edit(constants, arguments=()):
        text = (ROOT / "train.py").read_text()
        for name, value in constants.items():
            text, found = re.subn(rf"^{name} = .*$", f"{name} = {value}", text, flags=re.M)
            assert found == 1
        holder = type("Holder", (), {"tmp": tmp_path})
        return settle(text, arguments, holder)

    return edit


def test_command_line_goes_before_edited_constant_before_preset(edited):
    assert edited({})["learning_rate"] == train.TRAINING["tiny"]["learning_rate"]
    assert edited({"learning_rate": "3e-4"})["learning_rate"] == 3e-4
    assert edited({"learning_rate": "3e-4  # mine"}, ["--learning_rate=0.1", "--learning_rate=0.2"])["learning_rate"] == 0.2
    assert edited({"preset": '"base"'})["max_steps"] == 125_000
    assert edited({"preset": '"base"', "max_steps": "10 * 7"}, ["--preset=small"])["max_steps"] == 70
    assert edited({"crop": "0.5", "lm_loss": '"weighted"'})["crop"] == 0.5


@pytest.mark.parametrize("constants", [{"max_steps": "'7'"}, {"max_steps": "0"}, {"crop": "2.0"}, {"contrastive": "3"},
                                       {"preset": "'tony'"}, {"learning_rate": "float('nan')"}, {"layers": "2.5"}])
def test_edited_constants_are_checked(edited, constants):
    if constants == {"max_steps": "'7'"}:
        assert edited(constants)["max_steps"] == 7  # a number all the same
        return
    with pytest.raises(Exception, match=f"{next(iter(constants))}"):
        edited(constants)


def test_a_constant_that_does_not_exist_is_refused(tmp_path):
    text = (ROOT / "train.py").read_text().replace("\nseed = 0", "\nsede = 1\nseed = 0")
    with pytest.raises(Exception, match='no constant sede, did you mean "seed"'):
        settle(text, (), type("Holder", (), {"tmp": tmp_path}))


def test_every_constant_has_a_reason_and_a_check():
    options = train.read_constants(train.__file__, vars(train), train.ALLOWED)
    assert set(options) == set(train.ALLOWED)
    assert all(len(reason) > 5 for _, _, reason in options.values())


def test_presets_are_complete():
    for preset in train.PRESETS:
        settings, _ = train.settle([f"--preset={preset}", "--out_dir=/nonexistent/out"])
        assert all(settings[name] is not None for name in train.ALLOWED)


@pytest.mark.parametrize("argument, message", [
    ("--max_step=3", 'no option --max_step, did you mean "max_steps"'),
    ("--max_steps=many", "--max_steps has to be a whole number"),
    ("--crop=1.5", "--crop has to be a number from 0.01 to 1.0"),
    ("--learning_rate=nan", "--learning_rate has to be a number"),
    ("--contrastive=maybe", "--contrastive has to be True or False"),
    ("--preset=huge", "--preset has to be one of tiny, small"),
    ("--max_steps", "equals sign"),
    ("extra", "unexpected 'extra'"),
    ("--batch_size=9 --micro_batch_size=2", "batch_size=9 cannot be split over 1 processes with micro_batch_size=2"),
    ("--corruption=frozen", "auxiliary_from"),
    ("--auxiliary_from=x", "auxiliary_from"),
    ("--token_task=rtd --lm_loss=weighted", "lm_loss=weighted has no effect"),
    ("--heads=3", "width=32 cannot be split over heads=3"),
    ("--dataset=toi", 'did you mean "toy"'),
    ("--device=mps", "not available"),
    ("--batch_size=100000", "too little text: .*train.bin has"),
    ("--batch_size=512 --micro_batch_size=512", "too little text: .*val.bin has"),
    ("--init_from=resume", "does not exist"),
    ("--init_from=/nowhere/ckpt.pt", "does not exist"),
    ("--out_dir=/dev/null/out", "/dev/null"),
    ("--out_dir=", "out_dir is empty"),
    ("--init_from=", "init_from is empty"),
    ("--init_from=/tmp", "/tmp cannot be read .Is a directory.: name a checkpoint"),
])
def test_bad_input_is_one_sentence_and_leaves_nothing(options, argument, message, tmp_path):
    with pytest.raises(data.InputError, match=message) as error:
        run([*options, *argument.split()])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_exit_status_and_standard_error(options):
    command = [sys.executable, str(ROOT / "train.py"), *options, "--max_step=3"]
    said = subprocess.run(command, capture_output=True, text=True)
    assert said.returncode == 2 and said.stdout == ""
    assert said.stderr == 'train.py: there is no option --max_step, did you mean "max_steps"?\n'


def test_an_error_of_several_processes_is_said_once(options):
    process = stress.torchrun(*options, "--dataset=nothing")
    _, err = process.communicate()
    assert process.returncode != 0
    assert err.count("there is no corpus") == 1


# --- the pieces


def test_learning_rate_schedule():
    settings = {"learning_rate": 1.0, "warmup_steps": 4, "max_steps": 12}
    rates = [train.learning_rate_at(step, settings) for step in range(12)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    np.testing.assert_allclose(rates[5:], [7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])
    assert train.learning_rate_at(0, {**settings, "warmup_steps": 0}) == 1.0


def test_area_under_roc():
    draw = np.random.default_rng(0)
    scores, positive = draw.integers(0, 20, 200).astype(float), draw.random(200) < 0.7  # with ties
    wins = [(a > b) + 0.5 * (a == b) for a in scores[positive] for b in scores[~positive]]
    assert train.area_under_roc(scores, positive) == pytest.approx(np.mean(wins), abs=1e-12)
    assert math.isnan(train.area_under_roc(scores, np.ones(200, bool)))


def test_biases_and_norms_are_not_decayed():
    model = train.COCOLM(train.Config.from_preset("tiny", vocab_size=300))
    decayed, free = train.make_optimizer(model, {"weight_decay": 0.1, "beta1": 0.9, "beta2": 0.98, "epsilon": 1e-6},
                                         torch.device("cpu")).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert decayed["weight_decay"] == 0.1 and free["weight_decay"] == 0.0
    assert all(re.search(r"bias|norm|scl_head.2|transform.2", names[id(p)]) for p in free["params"])
    assert not any(names[id(p)].endswith("bias") for p in decayed["params"])
    assert len(decayed["params"]) + len(free["params"]) == len(names)


# --- a run


def test_a_run_from_start_to_end(options, tmp_path, capsys):
    run([*options, "--max_steps=4", "--eval_interval=2", "--checkpoint_interval=3"])
    printed = capsys.readouterr().out
    for word in ("versions", "device", "parameters", "negatives", "main corrects to", "nothing learned", "copy_auc"):
        assert word in printed
    header = json.loads((tmp_path / "out/log.jsonl").read_text().splitlines()[0])
    assert header["constants"]["max_steps"] == 4 and "torch" in header["versions"] and "split" not in header
    assert [row["step"] for row in rows(tmp_path / "out", "train")] == [1, 2, 3, 4]
    assert [row["step"] for row in rows(tmp_path / "out", "val")] == [0, 2, 4]
    losses = {"loss", "mlm_loss", "copy_loss", "lm_loss", "scl_loss"}
    statistics = {"mlm_accuracy", "replaced_fraction", "copy_accuracy_original", "copy_accuracy_replaced",
                  "lm_accuracy_replaced", "scl_accuracy", "alignment", "uniformity", "mean_cosine"}
    for row in rows(tmp_path / "out"):
        assert losses | statistics | {"tokens", "seconds"} <= set(row)
        assert row["loss"] == pytest.approx(row["mlm_loss"] + 50 * row["copy_loss"] + row["lm_loss"] + row["scl_loss"], rel=1e-5)
        extra = {"copy_auc"} if row["split"] == "val" else {"lr", "grad_norm", "tokens_per_sec", "mfu"}
        assert extra <= set(row)
    assert rows(tmp_path / "out", "train")[-1]["tokens"] == 4 * 8 * 32
    checkpoint = torch.load(tmp_path / "out/ckpt.pt", weights_only=True)
    assert set(checkpoint) == {"model", "optimizer", "step", "config", "constants", "tokenizer", "versions"}
    assert checkpoint["step"] == 4
    assert torch.load(tmp_path / "out/ckpt.prev.pt", weights_only=True)["step"] == 3
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["ckpt.prev.pt", "ckpt.pt", "log.jsonl"]
    model, tokenizer = train.load_checkpoint(tmp_path / "out/ckpt.pt")
    assert not model.training and tokenizer.decode(tokenizer.encode("bada")) == "bada"
    assert_same_weights(dict(model.state_dict()), checkpoint["model"])
    assert model.main(torch.tensor([[tokenizer.cls_id, 5, 6]])).shape == (1, 3, 32)


def test_dropout_and_a_second_pass_of_the_auxiliary_are_repeatable(options, tmp_path):
    for name in "ab":
        run([*options, f"--out_dir={tmp_path}/{name}", "--dropout=0.2", "--auxiliary_dropout=0.1"])
    assert_same_weights(weights(tmp_path / "a"), weights(tmp_path / "b"))
    run([*options, f"--out_dir={tmp_path}/c", "--dropout=0.2", "--auxiliary_dropout=0.1", "--seed=1"])
    assert untimed(tmp_path / "a") != untimed(tmp_path / "c")


@pytest.mark.parametrize("ablation", [
    "--token_task=rtd --contrastive=False", "--contrastive=False", "--token_task=rtd", "--relative_positions=False",
    "--auxiliary_layers=2 --auxiliary_width=16", "--corruption=random", "--token_task=all_token_mlm",
    "--copy_mechanism=False", "--stop_gradient=False", "--crop=0.5", "--token_task=mlm",
    "--token_task=mlm --contrastive=False", "--lm_loss=weighted", "--auxiliary_dropout=0.1", "--dropout=0.1",
    "--temperature=0.2", "--lambda_copy=1", "--lambda_scl=0.5", "--gather_negatives=False", "--relative_init=normal",
    "--mask_fraction=0.3", "--dtype=bfloat16", "--dtype=float16", "--micro_batch_size=2", "--grad_clip=0"])
def test_each_ablation_trains_three_steps(options, tmp_path, ablation, capsys):
    run([*options, *ablation.split()])
    assert all(math.isfinite(row["loss"]) for row in rows(tmp_path / "out"))
    assert len(rows(tmp_path / "out", "train")) == 3
    header = json.loads((tmp_path / "out/log.jsonl").read_text().splitlines()[0])
    for option in ablation.split():
        name, value = option[2:].split("=")
        assert str(header["constants"][name]) in (value, value + ".0")


def test_frozen_auxiliary(options, tmp_path):
    run([*options, f"--out_dir={tmp_path}/first"])
    run([*options, "--corruption=frozen", f"--auxiliary_from={tmp_path}/first/ckpt.pt"])
    first, second = weights(tmp_path / "first"), weights(tmp_path / "out")
    for name in first:
        if name.startswith("auxiliary."):
            assert torch.equal(first[name], second[name])  # taken over, and not trained
    assert not torch.equal(second["main.embeddings.tokens.weight"], second["auxiliary.embeddings.tokens.weight"])
    train.load_checkpoint(tmp_path / "out/ckpt.pt")
    run([*options, f"--out_dir={tmp_path}/random", "--corruption=random"])
    with pytest.raises(data.InputError, match="has no auxiliary"):
        run([*options, "--overwrite=True", "--corruption=frozen", f"--auxiliary_from={tmp_path}/random/ckpt.pt"])


def test_start_from_a_run_with_a_frozen_auxiliary(options, tmp_path):
    run([*options, f"--out_dir={tmp_path}/first"])
    run([*options, "--corruption=frozen", f"--auxiliary_from={tmp_path}/first/ckpt.pt"])
    run([*options, f"--out_dir={tmp_path}/next", f"--init_from={tmp_path}/out/ckpt.pt", "--learning_rate=0.0"])
    theirs, ours = weights(tmp_path / "out"), weights(tmp_path / "next")
    assert_same_weights(*[{n: w for n, w in each.items() if n.startswith("main.")} for each in (theirs, ours)])


# --- several processes, accumulation


def test_accumulation_equals_one_big_batch(options, tmp_path):
    options = [*options, "--dtype=float32"]
    for micro in (8, 2):  # without negatives, which a smaller pass has fewer of
        run([*options, f"--out_dir={tmp_path}/{micro}", f"--micro_batch_size={micro}", "--contrastive=False"])
    assert_same_weights(weights(tmp_path / "8"), weights(tmp_path / "2"), tolerance=2e-6)
    for a, b in zip(rows(tmp_path / "8"), rows(tmp_path / "2")):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


@pytest.mark.parametrize("processes, accumulation", [(2, 2), (4, 1)])
def test_several_processes_equal_one(options, tmp_path, processes, accumulation):
    micro, options = 8 // accumulation, [*options, "--dtype=float32"]
    run([*options, f"--out_dir={tmp_path}/one", f"--micro_batch_size={micro}"])
    started = stress.start(*options, f"--micro_batch_size={micro // processes}", processes=processes)
    statuses, said = stress.finish(started)
    assert set(statuses) == {0}, said
    assert_same_weights(weights(tmp_path / "one"), weights(tmp_path / "out"), tolerance=5e-6)
    for a, b in zip(rows(tmp_path / "one"), rows(tmp_path / "out"), strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - {"seconds", "tokens_per_sec", "mfu", "split"}:
            near_tie = 0.15 if name.endswith("accuracy") else 0  # rounding decides which of two is the nearest
            assert a[name] == pytest.approx(b[name], rel=2e-4, abs=2e-5 + near_tie), name


# --- stopping and resuming


def stop_at(step):
    """A Log that sends this process SIGTERM when the step is logged."""
    original = train.Log.__call__

    def call(self, split, number, *rest, **more):
        original(self, split, number, *rest, **more)
        if split == "train" and number == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return call


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_sigterm_saves_and_says_how_to_go_on(options, tmp_path, monkeypatch, capsys, dtype):
    settings = [*options, "--max_steps=8", "--dropout=0.1", "--micro_batch_size=4", f"--dtype={dtype}"]
    run([*settings, f"--out_dir={tmp_path}/straight"])
    with monkeypatch.context() as patch:
        patch.setattr(train.Log, "__call__", stop_at(3))
        with pytest.raises(SystemExit) as stopped:
            run(settings)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert "--init_from=resume" in capsys.readouterr().out
    assert torch.load(tmp_path / "out/ckpt.pt", weights_only=True)["step"] in (3, 4)
    run([*options[:3], "--init_from=resume"])  # every other setting comes from the checkpoint
    assert_same_weights(weights(tmp_path / "straight"), weights(tmp_path / "out"))
    assert untimed(tmp_path / "straight") == untimed(tmp_path / "out")
    run([*options[:3], "--init_from=resume"])
    assert "is finished" in capsys.readouterr().out


def test_what_a_resumed_run_may_change(options, tmp_path):
    run(options)
    for change in ("--learning_rate=0.5", "--layers=3", "--seed=1", "--batch_size=4", "--preset=small"):
        with pytest.raises(data.InputError, match="cannot be changed in a resumed run"):
            run([*options[:3], "--init_from=resume", change])
    run([*options[:3], "--init_from=resume", "--max_steps=5", "--eval_interval=1", "--micro_batch_size=4"])
    assert [row["step"] for row in rows(tmp_path / "out", "train")] == [1, 2, 3, 4, 5]


def test_the_same_command_again_goes_on(options, tmp_path, capsys):
    command = [*options, "--warmup_steps=10", "--init_from=resume_or_scratch"]
    run(command)
    assert "warmup_steps=10 is longer than the run: shortened to 3" in capsys.readouterr().out
    run(command)
    assert "is finished" in capsys.readouterr().out
    run([*command, "--max_steps=20"])  # the warm-up is now what was asked for
    assert rows(tmp_path / "out", "train")[-1]["step"] == 20
    assert rows(tmp_path / "out", "train")[9]["lr"] == pytest.approx(train.TRAINING["tiny"]["learning_rate"])


def test_a_torn_log_is_mended(options, tmp_path):
    run(options)
    log = tmp_path / "out/log.jsonl"
    log.write_bytes(log.read_bytes()[:-20] + b"\xff\n{")
    run([*options[:3], "--init_from=resume", "--max_steps=5"])
    assert [row["step"] for row in rows(tmp_path / "out", "train")] == [1, 2, 3, 4, 5]


def test_a_checkpoint_is_not_lost_because_only_the_one_before_is_left(options, tmp_path):
    run([*options, "--checkpoint_interval=1"])
    (tmp_path / "out/ckpt.pt").unlink()
    for start in ("scratch", "resume", "resume_or_scratch"):
        with pytest.raises(data.InputError, match="ckpt.prev.pt is there"):
            run([*options, f"--init_from={start}"])
    assert (tmp_path / "out/ckpt.prev.pt").exists()


def test_a_full_disk_does_not_end_the_run(options, tmp_path):
    program = ("-c", "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000)); "
                     "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')", str(ROOT / "train.py"))
    (process,) = stress.start(*options, "--checkpoint_interval=1", program=program)
    out, err = process.communicate()
    assert process.returncode == 2 and "Traceback" not in err
    assert out.count("could not be written") == 2 and err.count("could not be written") == 1
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["log.jsonl"]
    assert len(rows(tmp_path / "out", "train")) == 3


def test_a_folder_with_a_run_is_refused_unless_overwritten(options, tmp_path):
    run(options)
    before = (tmp_path / "out/ckpt.pt").read_bytes()
    with pytest.raises(data.InputError, match="holds a run already"):
        run(options)
    assert (tmp_path / "out/ckpt.pt").read_bytes() == before
    run([*options, "--overwrite=True", "--seed=5"])
    assert len(rows(tmp_path / "out", "train")) == 3


def test_start_from_the_weights_of_another_run(options, tmp_path, corpus, capsys):
    run(options)
    run([*options, f"--out_dir={tmp_path}/next", f"--init_from={tmp_path}/out/ckpt.pt", "--learning_rate=0.0"])
    assert_same_weights(weights(tmp_path / "out"), weights(tmp_path / "next"))
    with pytest.raises(data.InputError, match="has layers=2, this run layers=3"):
        run([*options, f"--out_dir={tmp_path}/x", f"--init_from={tmp_path}/out/ckpt.pt", "--layers=3"])
    data.prepare([corpus / "toy.txt"], name="other", data_dir=str(tmp_path), vocab_size=300, val_fraction=0.1, workers=1)
    with pytest.raises(data.InputError, match="another vocabulary"):
        run([*options, f"--out_dir={tmp_path}/x", f"--init_from={tmp_path}/out/ckpt.pt", f"--data_dir={tmp_path}",
             "--dataset=other"])
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("damage", ["empty", "truncated", "text", "other"])
def test_a_damaged_checkpoint_is_refused(options, tmp_path, damage):
    run(options)
    path = tmp_path / "out/ckpt.pt"
    if damage == "other":
        torch.save({"weights": torch.zeros(3)}, path)
    else:
        content = path.read_bytes()
        path.write_bytes({"empty": b"", "truncated": content[: len(content) // 2], "text": b"hello " * 100}[damage])
    with pytest.raises(data.InputError, match="damaged or no checkpoint|is no checkpoint of train.py"):
        run([*options[:3], "--init_from=resume", "--max_steps=5"])


def test_a_failed_write_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "ckpt.pt"
    train.write_checkpoint(path, {"step": 1})
    train.write_checkpoint(path, {"step": 2})

    def fails(checkpoint, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(data.InputError, match="No space left.*the last checkpoint stands"):
        train.write_checkpoint(path, {"step": 3})
    assert sorted(f.name for f in tmp_path.iterdir()) == ["ckpt.prev.pt", "ckpt.pt"]
    assert torch.load(path)["step"] == 2 and torch.load(tmp_path / "ckpt.prev.pt")["step"] == 1


def test_a_loss_that_is_not_finite_stops_the_run(options, tmp_path, monkeypatch, capsys):
    original, calls = train.COCOLM.forward, []

    def forward(self, *arguments):
        losses, statistics, predictions = original(self, *arguments)
        calls.append(self.training)
        if sum(calls) == 3:
            losses["lm_loss"] = losses["lm_loss"] * math.nan
            losses["loss"] = losses["loss"] * math.nan
        return losses, statistics, predictions

    monkeypatch.setattr(train.COCOLM, "forward", forward)
    with pytest.raises(SystemExit) as stopped:
        run([*options, "--max_steps=5", "--checkpoint_interval=1"])
    assert stopped.value.code == 1
    said = capsys.readouterr().err
    assert "stopped at step 3" in said and "lm_loss" in said and "16 to 23" in said and "copy_loss of" not in said
    assert torch.load(tmp_path / "out/ckpt.pt", weights_only=True)["step"] == 2


@pytest.mark.parametrize("which", [0, 2])
def test_where_compiling_fails_the_run_goes_on(options, tmp_path, monkeypatch, capsys, which):
    """Whichever of the passes it is: training, or evaluation."""
    def stand_in(function, **options):
        def compiled(batch, with_statistics):
            kind = 2 if not torch.is_grad_enabled() else int(with_statistics)
            if kind == which:
                raise RuntimeError("no compiler here")
            return function(batch, with_statistics)
        return compiled

    monkeypatch.setattr(torch, "compile", stand_in)
    run([*options, "--compile=True"])
    assert "torch.compile failed, so the run goes on without it (RuntimeError: no compiler here)" in capsys.readouterr().out
    assert len(rows(tmp_path / "out", "train")) == 3


def assert_compiled_equals_eager(corpus, dtype, recompute):
    torch.manual_seed(0)
    tokenizer = data.Tokenizer.load(corpus / "toy")
    config = train.Config.from_preset("tiny", vocab_size=tokenizer.vocab_size, layers=1 + recompute, width=32,
                                      heads=2, ffn_width=64, max_len=32)
    model = train.COCOLM(config)
    model.main.recompute = recompute
    sequences = data.Sequences(corpus / "toy", "train", 32, config.masked, config.crop_len, 0)
    batches = [train.to_device(sequences.batch(step, range(4), 4), torch.device("cpu")) for step in range(2)]

    def all_kinds():
        losses = []
        for training, with_statistics in ((True, False), (True, True), (False, True)):
            for batch in batches:
                with torch.autocast("cpu", dtype, enabled=dtype != torch.float32), torch.set_grad_enabled(training):
                    losses.append(model.train(training)(batch, None, with_statistics)[0]["loss"])
                if training:
                    losses[-1].backward()
        return torch.stack(losses)

    eager = all_kinds()
    gradient, model.main.embeddings.tokens.weight.grad = model.main.embeddings.tokens.weight.grad, None
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model.passes = torch.compile(model.passes, dynamic=False, fullgraph=True, backend="aot_eager")
    compiled = all_kinds()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(eager, compiled, rtol=tolerance, atol=tolerance)
    if dtype == torch.float32:
        torch.testing.assert_close(gradient, model.main.embeddings.tokens.weight.grad, rtol=1e-4, atol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3
    assert not torch._dynamo.utils.counters["graph_break"]


def test_compiled_passes_are_one_graph_each_and_equal_eager(corpus):
    """A run's three kinds of pass (training, the same with statistics, evaluation) are three graphs without a break."""
    with stress.in_processes(2) as pool:
        for done in [pool.submit(assert_compiled_equals_eager, corpus, *variant)
                     for variant in ((torch.float32, False), (torch.bfloat16, True))]:
            done.result()


def test_recompute_gives_the_same_run(options, tmp_path):
    """The constant reaches the model, and no loss of the run changes."""
    logs = []
    for recompute in (False, True):
        run([*options, "--layers=3", "--dropout=0.1", f"--recompute={recompute}", "--overwrite=True"])
        logs.append([row["loss"] for row in rows(tmp_path / "out", "train")])
    assert logs[0] == logs[1] and len(logs[0]) == 3
    assert train.read_log(tmp_path / "out/log.jsonl")[0]["constants"]["recompute"] is True


@pytest.mark.parametrize("name, teraflops", [
    ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA L40S", 362),
    ("NVIDIA L40", 181), ("NVIDIA L4", 121), ("Tesla T4", 65)])
def test_peak_of_a_known_gpu(monkeypatch, name, teraflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert train.peak_flops(torch.device("cuda"), torch.bfloat16) == teraflops * 1e12


def test_peak_of_a_cpu_is_measured():
    n = 1024
    x, start = torch.randn(n, n), time.perf_counter()
    x @ x @ x @ x
    at_least = 3 * 2 * n**3 / (time.perf_counter() - start)
    assert 0.2 * at_least < train.peak_flops(torch.device("cpu"), torch.float32) < 1e14


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_is_kept():
    """Large blocks that are freed and taken again are not asked of the system, page by page."""
    source = """
import resource, sys, torch, train
if sys.argv[1] == "keep":
    train.keep_memory()
for _ in range(3):
    torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    pair = [stress.start(how, program=("-c", source))[0] for how in ("keep", "give back")]
    kept, given_back = (int(process.communicate()[0]) for process in pair)
    assert kept < 0.1 * given_back
