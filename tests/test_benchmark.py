"""tests/benchmark.py compares like with like: without an optimization, ours computes the same."""

import benchmark
import pytest
import torch

import model


@pytest.fixture
def own(monkeypatch):
    """Our own functions, which the benchmark replaces, and which come back after the test."""
    functions = {name: getattr(model, name) for name in ("attention", "drop")}
    for name, function in functions.items():
        monkeypatch.setattr(model, name, function)
    return functions


def test_torchs_attention_computes_what_ours_does(own):
    torch.manual_seed(0)
    loss, parameters = benchmark.ours("tiny", "attention")
    q, k, v, bias = torch.randn(4, 2, 4, 9, 9, dtype=torch.float64)
    ours, torchs = (function(q, k, v, bias, 0.0) for function in (own["attention"], model.attention))
    assert model.attention is not own["attention"]
    torch.testing.assert_close(ours, torchs)
    loss().backward()
    assert all(p.grad.isfinite().all() for p in parameters)


def test_torchs_dropout_drops_as_much_as_ours(own):
    torch.manual_seed(0)
    benchmark.ours("tiny", "dropout")
    for function in (own["drop"], model.drop):
        kept = function(torch.ones(100_000), 0.1)
        assert abs(kept.mean() - 1) < 0.01 and abs((kept == 0).float().mean() - 0.1) < 0.01
    assert model.drop is not own["drop"]
