"""tests/benchmark.py compares like with like: without an optimization, ours computes the same."""

import time
from types import SimpleNamespace

import benchmark
import torch

import model


def test_torchs_attention_computes_what_ours_does(monkeypatch):
    own = model.attention
    monkeypatch.setattr(model, "attention", own)  # the benchmark replaces it; it comes back after the test
    torch.manual_seed(0)
    loss, parameters = benchmark.ours("tiny", "attention")
    assert model.attention is not own
    q, k, v, bias = torch.randn(4, 2, 4, 9, 9, dtype=torch.float64)
    torch.testing.assert_close(own(q, k, v, bias, 0.0), model.attention(q, k, v, bias, 0.0))
    loss().backward()
    assert all(p.grad.isfinite().all() for p in parameters)


def test_torchs_dropout_drops_as_much_as_ours(monkeypatch):
    own = model.drop
    monkeypatch.setattr(model, "drop", own)
    torch.manual_seed(0)
    benchmark.ours("tiny", "dropout")
    assert model.drop is not own
    for function in (own, model.drop):
        kept = function(torch.ones(100_000), 0.1)
        assert abs(kept.mean() - 1) < 0.01 and abs((kept == 0).float().mean() - 0.1) < 0.01


def test_the_table_of_a_gpu(monkeypatch, capsys):
    """Its rows, on the CPU: events that read the clock stand in for those of CUDA."""
    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            self.time = time.perf_counter()

        def elapsed_time(self, other):
            return 1000 * (other.time - self.time)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    for name in ("synchronize", "reset_peak_memory_stats", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 1e9)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(benchmark, "SIZES", {})
    attention = model.attention
    args = SimpleNamespace(device="cpu", dtype="float32", steps=1, product=64)
    benchmark.gpu_table(args, {"tiny": (2, 32, 64)})
    table = capsys.readouterr().out
    assert table.count("| tiny, 2 x 32: ") == 4 and table.count(" | 1.0 |") >= 3, table
    assert model.attention is attention
