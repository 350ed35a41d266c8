"""What CUDA runs, on any machine that has it: `pytest tests/test_cuda.py`, under 4 minutes on a recent GPU.

NANOCOCO_TEST_DEVICE=cpu runs on the CPU what makes sense there, to find mistakes in this file.
"""

import functools
import json
import math
import os
import subprocess
import sys
import warnings

import pytest

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts: cuBLAS adds in one order

import numpy as np  # noqa: E402
import runs  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from runs import rows  # noqa: E402
from test_model import ABLATIONS, FIXTURES, close, example, make_batch  # noqa: E402
from test_train import (assert_close, corpus, cut_back, handlers, read, run,  # noqa: E402, F401
                        sample_without_logits, weights)
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

import convert  # noqa: E402
import finetune  # noqa: E402
import model as coco  # noqa: E402
import train  # noqa: E402

DEVICE = os.environ.get("NANOCOCO_TEST_DEVICE", "cuda")
if DEVICE == "cuda" and not torch.cuda.is_available():
    pytest.skip("there is no CUDA here, so nothing that a GPU runs is tested", allow_module_level=True)
ON_A_GPU = pytest.mark.skipif(DEVICE != "cuda", reason="only a GPU has this")
HALF = pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
COMPILE = functools.partial(torch.compile, backend="inductor" if DEVICE == "cuda" else "aot_eager")

# ------------------------------------------------------------------------------------------------------------
# Helpers


@pytest.fixture(scope="module")
def options(corpus):  # noqa: F811
    """The command line of a small run, but for its out_dir."""
    return [f"--data_dir={corpus.parent}", "--dataset=toy", "--layers=2", "--width=64", "--ffn_width=128",
            "--heads=2", "--max_len=64", "--dropout=0.1", "--batch_size=16", "--micro_batch_size=8",
            "--max_steps=6", "--warmup_steps=2", "--log_interval=2", "--eval_interval=3", "--eval_batches=1",
            "--checkpoint_interval=2", "--compile=False", f"--device={DEVICE}"]


def gradients(model, batch, device):
    """(losses, gradients by name) of one step in float32, on the CPU; the model stays on the device."""
    model.to(device).zero_grad()
    losses = model({name: x.to(device) for name, x in batch.items()})[0]
    losses["loss"].backward()
    found = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    return {name: loss.item() for name, loss in losses.items()}, found


def autocast(dtype):
    return torch.autocast(DEVICE, getattr(torch, dtype), enabled=dtype != "float32")


def last_losses(out, count=5):
    return np.mean([row["loss"] for row in rows(out, "train")][-count:])


# ------------------------------------------------------------------------------------------------------------
# The numbers


@pytest.fixture(autouse=True)
def no_tf32(monkeypatch):
    assert not torch.backends.cuda.matmul.allow_tf32  # torch's default


def test_the_authors_outputs(monkeypatch):
    """As tests/test_model.py, on this device: what the authors' own code computed, in float32."""
    groups = {"param": {}, "in": {}, "out": {}}
    for key, values in np.load(FIXTURES / "fairseq_tiny.npz").items():
        group, name = key.split("/")
        groups[group][name] = torch.from_numpy(values)
    weights, inputs, outputs = convert.rename(groups["param"]), groups["in"], groups["out"]  # noqa: F811
    model = convert.make_model(weights, convert.make_config(weights, {"max_rel_pos": 12}))[0].eval()
    tokens, mask, crop = (inputs[name][:1].to(DEVICE) for name in ("tokens", "mask", "crop"))
    sampled, seen, T = inputs["sampled"][:3].view(1, 3).to(DEVICE), [], tokens.shape[1]
    monkeypatch.setattr(coco, "sample", lambda logits, uniforms: seen.append(logits) or sampled)
    _, found = model.to(DEVICE)(dict(tokens=tokens, masked=mask.nonzero()[:, 1].view(1, 3), crop=crop,
                                     uniforms=torch.zeros(1, 3, device=DEVICE)))
    vectors = torch.stack([outputs["seq_emb"][0], outputs["crop_seq_emb"][0]])
    for actual, expected in ((seen[0][0], outputs["auxiliary_logits"][:3]),
                             (found["copy_logits"][0], outputs["copy_logits"][:T]),
                             (found["scl_vectors"][:, 0], vectors)):
        close(actual.cpu(), expected.double().numpy(), tolerance=1e-4)


@pytest.mark.parametrize("changes", ABLATIONS, ids=str)
def test_losses_and_gradients_are_the_cpus(monkeypatch, changes):
    """With the samples of the CPU, as rounding flips one now and then."""
    model, batch = example(**changes)
    original, samples = coco.sample, []
    monkeypatch.setattr(coco, "sample", lambda *a: samples.append(original(*a)) or samples[-1])
    expected, slow = gradients(model, batch, "cpu")
    monkeypatch.setattr(coco, "sample", lambda *a: samples.pop(0).to(DEVICE))
    losses, fast = gradients(model, batch, DEVICE)
    assert losses == pytest.approx(expected, rel=1e-4) and fast.keys() == slow.keys()
    total = torch.stack([x.norm() for x in slow.values()]).norm()
    for name in slow:
        assert (fast[name] - slow[name]).norm() <= 1e-4 * (slow[name].norm() + 1e-3 * total), name


@HALF
def test_fifty_steps_go_down_as_on_the_cpu(options, tmp_path, dtype):
    fifty = [*options, "--max_steps=50", "--eval_interval=50", "--learning_rate=2e-3", "--log_interval=1"]
    run(*fifty, f"--out_dir={tmp_path}/cpu", "--device=cpu", "--dtype=float32")
    run(*fifty, f"--out_dir={tmp_path}/half", f"--dtype={dtype}")
    first = rows(tmp_path / "half", "train")[0]["loss"]
    assert last_losses(tmp_path / "half") < 0.95 * first
    assert last_losses(tmp_path / "half") == pytest.approx(last_losses(tmp_path / "cpu"), rel=0.03)


def test_an_overflow_is_skipped_and_counted(options, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, init_scale=2.0**40))
    run(*options, f"--out_dir={tmp_path}", "--dtype=float16", "--max_steps=50", "--log_interval=1",
        "--eval_interval=50")
    log = rows(tmp_path, "train")
    skipped = [row["grad_norm"] is None for row in log]
    assert skipped[0] and not any(skipped[-10:])
    assert [row["skipped_steps"] for row in log] == np.cumsum(skipped).tolist()
    assert log[-1]["loss"] < log[0]["loss"]


@pytest.mark.parametrize("draws", [10_000_000 if DEVICE == "cuda" else 20_000])
@pytest.mark.parametrize("compiled", [False, True])
def test_no_token_of_probability_zero_is_sampled(compiled, draws):
    """Half of the tokens have none, in random places: where a sum in parallel rounds, it shows."""
    sample, count, wrong, left = COMPILE(coco.sample) if compiled else coco.sample, 2000, 0, draws
    while left > 0:
        if left % (50 * count) == 0 or left == draws:
            logits = torch.randn(count, 32768, device=DEVICE)
            logits.masked_fill_(torch.rand_like(logits) < 0.5, -math.inf)
        tokens = sample(logits, torch.rand(count, device=DEVICE))
        wrong, left = wrong + logits.gather(1, tokens[:, None]).isinf().sum(), left - count
    assert wrong.item() == 0


# ------------------------------------------------------------------------------------------------------------
# Speed and memory


@pytest.mark.parametrize("dtype, recompute, tolerance", [
    ("float32", False, 1e-4), ("bfloat16", False, 2e-2), ("bfloat16", True, 2e-2)])
def test_compiled_equals_eager(options, tmp_path, monkeypatch, dtype, recompute, tolerance):
    """One graph for training, logged or not, and one for validation; no break, and none is made again."""
    monkeypatch.setattr(coco, "sample", coco.sample)  # is put back
    sample_without_logits()
    monkeypatch.setattr(torch, "compile", COMPILE)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    alike = [*options, "--dropout=0.0", f"--dtype={dtype}"]
    run(*alike, f"--out_dir={tmp_path}/eager")
    run(*alike, f"--out_dir={tmp_path}/compiled", "--compile=True", f"--recompute={recompute}")
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]
    assert_close(tmp_path / "eager", tmp_path / "compiled", tolerance=tolerance)


@ON_A_GPU
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("T", [128, 512, 77, 205])
def test_attention_takes_a_fused_kernel(T, dtype):
    """Training with dropout, validation, and texts with padding. Without a kernel that fits, torch raises."""
    model = coco.COCOLM(coco.Config(vocab_size=1000, max_len=T, layers=2, width=128, heads=2, ffn_width=256,
                                    auxiliary_layers=2)).to(DEVICE)
    batch = {name: x.to(DEVICE) for name, x in make_batch(model.config).items()}
    padded = batch["tokens"].clone()
    padded[:, T // 2 :] = model.config.pad_id
    fused = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION]
    with sdpa_kernel(fused), autocast(dtype):
        model.train()(batch)[0]["loss"].backward()
        model.eval().main(padded).float().sum().backward()
        with torch.no_grad():
            model(batch)
        assert model.embed(padded).isfinite().all()


def largest_peak(c, B, recompute, parameters):
    """Bytes that a training step of B sequences may take at most, under autocast to 16 bits, not compiled.

    A layer keeps, for each of B T tokens and in units of `width` bytes: its input in 16 bits (2), q, k and v
    (6), attention's output (2), the sums that both norms read in float32 (8), ffn_in's input (2), its output
    and GELU's (8 + 8: ffn_width is 4 width), two masks of dropout (2); together 38. `recompute` keeps the
    input in float32 (4), and 38 of two layers at a time. A logit is kept in 16 bits and as the float32 of log
    softmax: 6 bytes, for both heads; sampling or the backward pass takes 20 more for a while. Parameters,
    their gradients and Adam's moments are 16 bytes each, autocast's copies 2. The gradient of the bias is
    (B, H, T, W) in 16 bits, twice for a while. What torch counted on `meta` tensors was below all of this.
    """
    layer, T, K, V = 38 * B * c.width, c.max_len, c.mask_count, c.vocab_size
    main = T + c.crop_len + 1  # tokens of both passes
    layers = main * ((c.layers - 1) * layer * 4 / 38 + 2 * layer) if recompute else main * c.layers * layer
    auxiliary = T * c.auxiliary_layers * layer
    logits = B * K * V * (6 + 6 + 20)
    bias = 2 * 2 * B * c.heads * T * (T + 8)
    return 1.15 * (layers + auxiliary + logits + bias + 18 * parameters)  # 1.15: the allocator's rounding


@ON_A_GPU
@pytest.mark.parametrize("recompute", [False, True])
def test_peak_memory_of_base(recompute):
    c = coco.Config.from_preset("base", vocab_size=32768)
    if torch.cuda.get_device_properties(0).total_memory < 24e9:
        pytest.skip("base, 32 x 512, needs a GPU of 24 GB")
    model = coco.COCOLM(c).to(DEVICE)
    model.main.recompute = recompute
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    batch = {name: x.to(DEVICE) for name, x in make_batch(c, 32).items()}
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):  # the second one has Adam's moments
        with autocast("bfloat16"):
            losses, outputs = model(batch)
        losses["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    peak, limit = torch.cuda.max_memory_allocated(), largest_peak(
        c, 32, recompute, sum(p.numel() for p in model.parameters()))
    warnings.warn(f"base, 32 x 512, bfloat16, recompute={recompute}: {peak / 1e9:.2f} GB, "
                  f"at most {limit / 1e9:.2f} by the shapes")
    assert peak < limit


@ON_A_GPU
@HALF
@pytest.mark.parametrize("recompute", [False, True])
def test_a_step_waits_for_the_device_once(options, tmp_path, monkeypatch, dtype, recompute):
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, init_scale=1.0))
    waits = []  # of a run; a step that is skipped would look at the scale as well
    for steps in (3, 8):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                run(*options, f"--out_dir={tmp_path}/{steps}", f"--max_steps={steps}", f"--dtype={dtype}",
                    f"--recompute={recompute}", "--log_interval=100", "--eval_interval=100",
                    "--checkpoint_interval=100")
            finally:
                torch.cuda.set_sync_debug_mode("default")
        waits.append(sum("synchronizing" in str(warning.message) for warning in said))
    assert waits[1] - waits[0] == 5


# ------------------------------------------------------------------------------------------------------------
# Runs


@pytest.mark.parametrize("deterministic", [True, False])
def test_killed_and_resumed(options, tmp_path, deterministic):
    torch.use_deterministic_algorithms(deterministic)
    try:
        run(*options, f"--out_dir={tmp_path}/whole")
        cut_back(tmp_path / "whole", tmp_path / "resumed")
        run(*options, f"--out_dir={tmp_path}/resumed", "--init_from=resume")
    finally:
        torch.use_deterministic_algorithms(False)
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "resumed")
    apart = max((one[name] - other[name]).abs().max().item() for name in one)
    warnings.warn(f"resumed on {DEVICE}, deterministic={deterministic}: the weights are {apart:.1e} apart")
    assert read(tmp_path / "resumed")["step"] == 6 and apart <= (0 if deterministic else 1e-2)


@ON_A_GPU
def test_nccl_with_one_process(tmp_path):
    dist.init_process_group("cpu:gloo,cuda:nccl", rank=0, world_size=1,
                            store=dist.FileStore(str(tmp_path / "store"), 1))
    try:
        model, batch = example()
        ddp = torch.nn.parallel.DistributedDataParallel(model.to(DEVICE), gradient_as_bucket_view=True)
        flags = ddp({name: x.to(DEVICE) for name, x in batch.items()})[0]["loss"]
        flags.backward()
        flags = flags.detach()[None].clone()
        gathered = [torch.empty_like(flags)]
        dist.all_gather(gathered, flags)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        dist.barrier()
        assert gathered[0].item() == flags.item() == train.gather_objects(flags.item())[0]
        del ddp
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("processes", [1, 2])
def test_torchrun(options, tmp_path, processes):
    if DEVICE == "cuda" and torch.cuda.device_count() < processes:
        pytest.skip(f"needs {processes} GPUs")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               f"--nproc_per_node={processes}", runs.ROOT / "train.py", *options,
               f"--compile={DEVICE == 'cuda'}"]
    out = subprocess.run([*command, f"--out_dir={tmp_path}/several"], capture_output=True, text=True)
    assert out.returncode == 0, out.stdout + out.stderr
    run(*options, f"--out_dir={tmp_path}/one", f"--micro_batch_size={8 * processes}")
    one, several = rows(tmp_path / "one", "train"), rows(tmp_path / "several", "train")
    assert several[0]["loss"] == pytest.approx(one[0]["loss"], rel=0.02)  # dropout and some samples differ


def test_embed_fine_tune_and_convert(options, tmp_path):
    run(*options, f"--out_dir={tmp_path}/out")
    model, tokenizer = train.load_checkpoint(tmp_path / "out", DEVICE)
    texts = ["one two three", "a b", "three " * 5]
    vectors = model.embed(tokenizer.batch(texts))  # the ids are on the CPU, as a user's are
    torch.testing.assert_close(vectors.cpu(), model.cpu().embed(tokenizer.batch(texts)), rtol=0, atol=1e-4)

    (tmp_path / "own").mkdir()
    for split in ("train", "dev"):
        lines = [json.dumps({"text": f"word {i} and more", "label": "ab"[i % 2]}) for i in range(6)]
        (tmp_path / "own" / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    finetune.main([f"--data_dir={tmp_path}", "--task=own", f"--init_from={tmp_path}/out/ckpt.pt",
                   f"--out_dir={tmp_path}/tuned", "--batch_size=2", "--epochs=1", f"--device={DEVICE}"])
    results = json.loads((tmp_path / "tuned" / "own" / "results.json").read_bytes())
    assert results["runs"][0]["last"].keys() >= {"accuracy"}

    transformers = pytest.importorskip("transformers")
    convert.main([str(tmp_path / "out" / "ckpt.pt"), str(tmp_path / "hf")])
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "hf").to(DEVICE).eval()
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    ids = their_tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = theirs(**{name: ids[name].to(DEVICE) for name in ("input_ids", "attention_mask")})[0]
    means = (hidden * ids["attention_mask"].to(DEVICE)[..., None]).sum(1)
    torch.testing.assert_close(torch.nn.functional.normalize(means, dim=-1), vectors.to(DEVICE), rtol=0,
                               atol=1e-3)
