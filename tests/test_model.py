"""model.py against slow, obvious versions of itself in float64, and against what the authors' code computed.

All models here compute in float32, unless a test says bfloat16.
"""

import copy
import json
import math
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import model as coco

FIXTURES = Path(__file__).parent / "fixtures"
SMALL = dict(vocab_size=24, max_len=16, layers=2, width=16, heads=2, ffn_width=24, dropout=0.0,
             relative_bins=16, max_distance=12, auxiliary_layers=1, mask_fraction=0.2)
PAD = 20  # the default for a vocabulary of 24
INF = math.inf
LAST = 1 - 2**-24  # the largest float32 below 1

ABLATIONS = [
    dict(), dict(lm_loss="weighted"), dict(stop_gradient=False),
    dict(lm_loss="weighted", stop_gradient=False), dict(copy_mechanism=False), dict(contrastive=False),
    dict(token_task="rtd"), dict(token_task="rtd", contrastive=False), dict(token_task="all_token_mlm"),
    dict(token_task="mlm"), dict(token_task="mlm", contrastive=False), dict(corruption="random"),
    dict(corruption="frozen"), dict(corruption="random", token_task="rtd"),
    dict(corruption="frozen", token_task="all_token_mlm", contrastive=False),
    dict(relative_positions=False), dict(relative_init="local"), dict(max_distance=6), dict(relative_bins=8),
    dict(auxiliary_layers=2, auxiliary_width=8), dict(crop=0.5), dict(mask_fraction=0.4),
    dict(temperature=0.2), dict(lambda_copy=3.0, lambda_scl=7.0), dict(gather_negatives=False),
]
EACH_ABLATION = pytest.mark.parametrize("changes", ABLATIONS, ids=str)
WITH_DROPOUT = pytest.mark.parametrize("changes", [*ABLATIONS, dict(auxiliary_dropout=0.1)], ids=str)

# ------------------------------------------------------------------------------------------------------------
# Helpers


def example(lengths=(16, 16, 11), seed=0, **changes):
    """A model, its weights so large that every part shows in the output, and a batch of sequences, padded."""
    torch.manual_seed(seed)
    model = coco.COCOLM(coco.Config(**{**SMALL, **changes}))
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    rng, c = np.random.default_rng(seed), model.config
    tokens = rng.integers(1, PAD, (len(lengths), max(lengths)))
    tokens[:, 0] = 0  # [CLS], which is never masked
    for row, length in zip(tokens, lengths):
        row[length:] = PAD
    masked = np.stack([np.sort(rng.choice(np.arange(1, n), c.masked, replace=False)) for n in lengths])
    crop = np.concatenate([tokens[:, :1], tokens[:, 2:2 + c.crop_len]], axis=1)
    uniforms = rng.random(masked.shape, dtype=np.float32)
    uniforms[0, :2] = 0, LAST
    batch = dict(tokens=tokens, masked=masked, crop=crop, uniforms=uniforms)
    return model, {name: torch.from_numpy(x) for name, x in batch.items()}


def array(tensor):
    return tensor.detach().double().numpy()


def close(actual, expected, tolerance=1e-5):
    """A tensor equals what the slow version computed, shape included."""
    expected, actual = np.asarray(expected, dtype=np.float64), array(actual)
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


def same_losses(losses, expected, tolerance=2e-5):
    """Two dictionaries of losses have the same names and numbers."""
    values = {name: loss.item() for name, loss in losses.items()}
    assert values == pytest.approx(expected, rel=tolerance, abs=tolerance)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------------------
# Slow, obvious versions, in float64: numpy arrays and no regard for overflow


def slow_bucket(distance, bins, max_distance):
    half, exact, bucket = bins // 2, bins // 4, abs(distance)
    if bucket >= exact:
        share = math.log(bucket / exact) / math.log((max_distance - 1) / exact)
        bucket = min(exact + math.ceil(share * (half - 1 - exact)), half - 1)
    return (half - 1) + (bucket if distance >= 0 else -bucket)


def slow_linear(x, linear):
    return x @ array(linear.weight).T + array(linear.bias)


def slow_norm(x, norm):
    centred = x - x.mean(-1, keepdims=True)
    variance = (centred**2).mean(-1, keepdims=True)
    return centred / np.sqrt(variance + 1e-5) * array(norm.weight) + array(norm.bias)


def slow_gelu(x):
    return np.vectorize(lambda y: 0.5 * y * (1 + math.erf(y / math.sqrt(2))))(x)


def slow_transform(x, transform):
    return slow_norm(slow_gelu(slow_linear(x, transform[0])), transform[2])


def slow_attention(x, layer, real, relative):
    """x (T, D), real (T,): which keys count, relative (T, T, H): what is added to the logits"""
    d = x.shape[1] // layer.heads
    q, k, v = np.split(slow_linear(x, layer.qkv), 3, axis=1)
    heads = []
    for head in range(layer.heads):
        part = slice(head * d, (head + 1) * d)
        weights = np.exp(q[:, part] @ k[:, part].T / math.sqrt(d) + relative[:, :, head]) * real
        heads.append(weights @ v[:, part] / weights.sum(1, keepdims=True))
    return slow_linear(np.concatenate(heads, axis=1), layer.attention_out)


def slow_encoder(encoder, config, tokens, padding):
    """(B, T) -> (B, T, D)"""
    positions, embeddings = range(tokens.shape[1]), encoder.embeddings
    relative = np.zeros((len(positions), len(positions), encoder.heads))
    if config.relative_positions:
        buckets = [[slow_bucket(j - i, config.relative_bins, config.max_distance) for j in positions]
                   for i in positions]
        relative = array(encoder.relative.weight)[np.array(buckets)]
    sequences = []
    for row, is_padding in zip(np.asarray(tokens), np.asarray(padding)):
        x = array(embeddings.tokens.weight)[row] + array(embeddings.positions.weight)[positions]
        x = slow_norm(x, embeddings.norm)
        if isinstance(encoder.narrow, torch.nn.Linear):
            x = slow_linear(x, encoder.narrow)
        for layer in encoder.layers:
            x = slow_norm(x + slow_attention(x, layer, ~is_padding, relative), layer.attention_norm)
            inner = slow_gelu(slow_linear(x, layer.ffn_in))
            x = slow_norm(x + slow_linear(inner, layer.ffn_out), layer.ffn_norm)
        sequences.append(x)
    return np.stack(sequences)


def slow_auxiliary_logits(auxiliary, hidden):
    x = slow_transform(hidden, auxiliary.transform)
    if isinstance(auxiliary.widen, torch.nn.Linear):
        x = slow_linear(x, auxiliary.widen)
    return x @ array(auxiliary.embeddings.tokens.weight).T + array(auxiliary.output_bias)


def slow_lm_logits(model, hidden):
    return hidden @ array(model.main.embeddings.tokens.weight).T + array(model.lm_bias)


def slow_vectors(model, hidden, crop):
    """The SCL vectors of the corrupted and of the cropped sequences, (B, D) each"""
    crop_hidden = slow_encoder(model.main, model.config, crop, crop == model.config.pad_id)
    return [slow_transform(x[:, 0], model.scl_head) for x in (hidden, crop_hidden)]


def slow_sample(logits, uniforms):
    """The first token at which the sum of the probabilities is above the uniform number"""
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return (np.cumsum(probabilities, -1) <= uniforms[..., None]).sum(-1)


def slow_cross_entropy(logits, targets):
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    return -np.log(np.take_along_axis(probabilities, targets[..., None], -1))[..., 0]


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def slow_copy(copy_logits, same):
    return -np.log(np.where(same, sigmoid(copy_logits), sigmoid(-copy_logits)))


def slow_mixture(logits, copy_logits, targets, same):
    p_target = np.exp(-slow_cross_entropy(logits, targets))
    return -np.log(same * sigmoid(copy_logits) + sigmoid(-copy_logits) * p_target)


def slow_weighted(logits, copy_logits, targets):
    return sigmoid(-copy_logits) * slow_cross_entropy(logits, targets)


def slow_cosines(vectors):
    return np.array([[a @ b / math.sqrt((a @ a) * (b @ b)) for b in vectors] for a in vectors])


def slow_scl(corrupted, crop, temperature):
    N, losses = len(corrupted), []
    similarity = np.exp(slow_cosines([*corrupted, *crop]) / temperature)
    for i in range(2 * N):
        twin = (i + N) % (2 * N)
        losses.append(-math.log(similarity[i, twin] / (similarity[i].sum() - similarity[i, i])))
    return np.mean(losses)


def slow_corrupt(model, batch):
    """-> the corrupted tokens (B, T), and the auxiliary's logits (B, T, V), None without an auxiliary"""
    c = model.config
    tokens, masked, uniforms = (batch[name].numpy() for name in ("tokens", "masked", "uniforms"))
    corrupted, logits = tokens.copy(), None
    np.put_along_axis(corrupted, masked, c.mask_id, axis=1)
    if c.token_task != "mlm" and c.corruption == "random":
        np.put_along_axis(corrupted, masked, np.floor(uniforms * c.vocab_size), axis=1)
    elif c.token_task != "mlm":
        hidden = slow_encoder(model.auxiliary, c, corrupted, tokens == c.pad_id)
        logits = slow_auxiliary_logits(model.auxiliary, hidden)
        at_masked = np.take_along_axis(logits, masked[..., None], axis=1)
        np.put_along_axis(corrupted, masked, slow_sample(at_masked, uniforms), axis=1)
    return corrupted, logits


def slow_losses(model, batch, corrupted=None, held=None):
    """All losses of one batch by name, from the weights of the model and the paper's equations.

    corrupted: the corrupted tokens, if they are not to be sampled here.
    held: copy logits for L_LM that stay while the weights change, as in sg(p_copy).
    """
    c, tokens = model.config, batch["tokens"].numpy()
    real, is_masked = tokens != c.pad_id, np.zeros(tokens.shape, dtype=bool)
    np.put_along_axis(is_masked, batch["masked"].numpy(), True, axis=1)
    sampled, auxiliary_logits = slow_corrupt(model, batch)
    corrupted = sampled if corrupted is None else corrupted.numpy()
    same = corrupted == tokens
    hidden = slow_encoder(model.main, c, corrupted, ~real)
    losses = {}
    weights = dict(mlm_loss=1, copy_loss=c.lambda_copy, lm_loss=1, scl_loss=c.lambda_scl)
    if auxiliary_logits is not None:
        losses["mlm_loss"] = slow_cross_entropy(auxiliary_logits, tokens)[is_masked].mean()
        weights["mlm_loss"] = c.corruption != "frozen"
    if c.token_task != "mlm":
        copy_logits = slow_linear(hidden, model.copy_head)[..., 0]
        in_lm = copy_logits if held is None else held
    if c.token_task in ("clm", "rtd"):
        losses["copy_loss"] = slow_copy(copy_logits, same)[real].mean()
    if c.token_task != "rtd":
        lm_logits = slow_lm_logits(model, hidden)
        if c.token_task == "all_token_mlm":
            terms = slow_mixture(lm_logits, copy_logits, tokens, same)[real]
        elif c.token_task == "mlm" or not c.copy_mechanism:
            terms = slow_cross_entropy(lm_logits, tokens)[is_masked]
        elif c.lm_loss == "mixture":
            terms = slow_mixture(lm_logits, in_lm, tokens, same)[is_masked]
        else:
            terms = slow_weighted(lm_logits, in_lm, tokens)[is_masked]
        losses["lm_loss"] = terms.mean()
    if c.contrastive:
        losses["scl_loss"] = slow_scl(*slow_vectors(model, hidden, batch["crop"].numpy()), c.temperature)
    losses["loss"] = sum(weights[name] * value for name, value in losses.items())
    return losses


# ------------------------------------------------------------------------------------------------------------
# Config


@pytest.mark.parametrize("changes", [  # the first name is that of the problem
    dict(vocab_size=7), dict(max_len=7), dict(layers=0), dict(heads=0), dict(dropout=-0.1), dict(dropout=1.0),
    dict(dropout=math.nan), dict(auxiliary_width=-16), dict(auxiliary_dropout=0.95), dict(relative_bins=4),
    dict(lambda_copy=-1.0), dict(lambda_scl=INF), dict(mask_fraction=0.0), dict(crop=1.1),
    dict(temperature=0.0), dict(relative_init="zero"), dict(corruption="uniform"),
    dict(token_task="electra"), dict(lm_loss="both"), dict(pad_id=-1), dict(mask_id=24),
    # sizes that do not go together
    dict(width=18, heads=4), dict(auxiliary_width=32), dict(relative_bins=10),
    dict(max_distance=9, relative_bins=32), dict(max_len=8, mask_fraction=0.01), dict(max_len=8, crop=0.01),
    # settings that would have no effect
    dict(corruption="random", token_task="mlm"), dict(copy_mechanism=False, token_task="rtd"),
    dict(lm_loss="weighted", token_task="all_token_mlm"), dict(lm_loss="weighted", copy_mechanism=False),
    dict(stop_gradient=False, token_task="rtd"), dict(stop_gradient=False, token_task="all_token_mlm"),
    dict(stop_gradient=False, copy_mechanism=False),
], ids=str)
def test_config_refuses(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        coco.Config(**{**SMALL, **changes})


@pytest.mark.parametrize("preset, sizes", [
    # layers, width, FFN width, heads, auxiliary layers, bins, max distance, max_len, dropout, relative_init
    ("tiny", (2, 128, 512, 4, 1, 32, 128, 128, 0.0, "local")),
    ("small", (12, 256, 1024, 4, 2, 32, 128, 512, 0.1, "normal")),
    ("base", (12, 768, 3072, 12, 4, 32, 128, 512, 0.1, "normal")),
    ("base++", (12, 768, 3072, 12, 4, 64, 128, 512, 0.1, "normal")),
    ("large++", (24, 1024, 4096, 16, 6, 128, 256, 512, 0.1, "normal")),
])
def test_presets(preset, sizes):
    c = coco.Config.from_preset(preset, vocab_size=100)
    assert sizes == (c.layers, c.width, c.ffn_width, c.heads, c.auxiliary_layers, c.relative_bins,
                     c.max_distance, c.max_len, c.dropout, c.relative_init)
    assert c.auxiliary_width == c.width


def test_defaults_are_the_papers():
    c = coco.Config(vocab_size=100)
    assert c == coco.Config.from_preset("base", vocab_size=100)
    assert (c.pad_id, c.mask_id, c.masked, c.crop_len) == (96, 99, 77, 460)
    assert (c.token_task, c.lm_loss, c.corruption) == ("clm", "mixture", "auxiliary")
    assert (c.lambda_copy, c.lambda_scl, c.mask_fraction, c.crop, c.temperature) == (50, 1, 0.15, 0.9, 1)
    assert c.copy_mechanism and c.stop_gradient and c.relative_positions
    assert c.contrastive and c.gather_negatives


# ------------------------------------------------------------------------------------------------------------
# The Transformer


@pytest.mark.parametrize("bins, max_distance", [(8, 12), (32, 128), (64, 128), (128, 256)])
def test_bucket_is_the_loops(bins, max_distance):
    distances = range(-600, 601)
    buckets = coco.relative_position_bucket(torch.tensor(distances), bins, max_distance).tolist()
    assert buckets == [slow_bucket(d, bins, max_distance) for d in distances]


def test_local_table_by_hand():
    left, right, around, everywhere = coco.local_relative_table(32, 4, 128)[:31].T
    near = slice(15 - 3, 15 + 4)  # distances -3 .. 3, which have a bin each
    assert left[near].tolist() == [-2, -1, 0, -6, -6, -6, -6]
    assert right[near].tolist() == [-6, -6, -6, -6, 0, -1, -2]
    assert around[near].tolist() == pytest.approx([-0.9, -0.6, -0.3, 0, -0.3, -0.6, -0.9])
    assert around[15 - 10].item() == pytest.approx(-0.3 * 14.5)  # distances -12 to -17 share this one
    assert left[0] == right[30] == around[0] == around[30] == -8  # the floor
    assert (everywhere == 0).all()


@pytest.mark.parametrize("part", ["main", "auxiliary"])
@pytest.mark.parametrize("changes", [
    dict(), dict(layers=1), dict(relative_positions=False), dict(heads=4, width=8),
    dict(auxiliary_layers=2, auxiliary_width=8),
], ids=str)
def test_encoders_are_the_slow_ones(part, changes):
    """All positions, a few of them, and the auxiliary's logits."""
    model, batch = example(**changes)
    encoder, tokens = getattr(model, part), batch["tokens"]
    hidden = slow_encoder(encoder, model.config, tokens, tokens == PAD)
    close(encoder(tokens), hidden)
    rows = torch.tensor([[0, 3, 15], [7, 7, 1], [10, 0, 2]])
    close(encoder(tokens, rows=rows), np.take_along_axis(hidden, rows[..., None].numpy(), axis=1))
    if part == "auxiliary":
        close(encoder.logits(encoder(tokens)), slow_auxiliary_logits(encoder, hidden))


def test_dropout_places(monkeypatch):
    """Embeddings, attention probabilities and both sub-layer outputs of every layer; not inside the FFN."""
    model, batch = example(dropout=0.25)
    wide, square, seen = 3 * 16 * 16, 3 * 2 * 16 * 16, []  # B T D and B H T T
    monkeypatch.setattr(coco, "drop", lambda x, dropout: seen.append((x.numel(), dropout)) or x)
    model.main(batch["tokens"])
    assert seen == [(size, 0.25) for size in [wide] + [square, wide, wide] * 2]
    seen.clear()
    model.main(batch["tokens"], dropout=0.0)
    model.eval().main(batch["tokens"])
    assert {rate for _, rate in seen} == {0.0}


@pytest.mark.parametrize("dropout, byte_values", [(0.1, 26), (0.5, 128), (0.001, 1), (0.9, 230)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_drop(dropout, byte_values, dtype):
    """Dropout in multiples of 1/256. It keeps the mean, in bfloat16 too: the scale itself is not rounded."""
    share = byte_values / 256
    x, upstream = (randn(7, 301, 203, seed=i).to(dtype) for i in range(2))  # no multiple of 8 elements
    x.requires_grad_()
    torch.manual_seed(3)
    y = coco.drop(x, dropout)
    y.backward(upstream)
    kept = y != 0
    assert torch.equal(kept, x.grad != 0)  # the gradient passes the same mask
    for result, source in ((y, x), (x.grad, upstream)):
        scale = (result.double() / source.double())[kept] * (1 - share)
        assert result.dtype == dtype and (scale - 1).abs().max() <= torch.finfo(dtype).eps
        if dtype == torch.float32 or dropout > 0.001:  # 1 + 1/255 is less than one step of bfloat16
            assert scale.mean().item() == pytest.approx(1, rel=1e-4)
    dropped, n = (~kept).flatten(), x.numel()
    assert abs(dropped.sum() - n * share) < 5 * math.sqrt(n * share * (1 - share))
    for byte in range(8):  # of the eight bytes of a draw, each is used alike
        of_byte = dropped[byte::8].float().mean()
        assert abs(of_byte - share) < 5 * math.sqrt(8 / n * share * (1 - share))
    neighbours = (dropped[:-1] & dropped[1:]).float().mean()  # independent
    assert abs(neighbours - share**2) < 5 * math.sqrt(3 / n) * share + 1e-6
    torch.manual_seed(3)
    assert torch.equal(y, coco.drop(x, dropout)) and not torch.equal(y, coco.drop(x, dropout))
    assert torch.equal(coco.drop(x, 0.0), x)


def test_recomputing_changes_nothing():
    """Gradients with dropout are the same to the bit, and fewer tensors are kept for them."""
    model, batch = example(dropout=0.3, layers=4)
    gradients, kept = [], []
    for model.main.recompute in (False, True):
        model.zero_grad()
        torch.manual_seed(1)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            loss = model(batch)[0]["loss"]
        loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        kept.append(sum(sizes))
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
    assert kept[1] < 0.7 * kept[0]


@pytest.mark.parametrize("T", [16, 13])
@pytest.mark.parametrize("autocast", [False, True])
def test_bias_is_what_fused_kernels_take(T, autocast):
    """In the type that attention computes in, rows at multiples of 8 elements, elements side by side."""
    model, _ = example()
    padding = torch.zeros(2, T, dtype=torch.bool)
    padding[1, -2:] = True
    expected = model.main.bias(padding)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        bias = model.main.bias(padding)
    assert bias.dtype == (torch.bfloat16 if autocast else torch.float32) and bias.shape == (2, 2, T, T)
    assert bias.stride(-1) == 1 and all(stride % 8 == 0 for stride in bias.stride()[:-1])
    assert torch.equal(bias, expected.to(bias.dtype))
    assert (bias[1, ..., -2:] == -INF).all() and bias[0].isfinite().all()


# ------------------------------------------------------------------------------------------------------------
# What a GPU needs, seen without one


class OneDevice(TorchDispatchMode):
    """Refuses operations with tensors of another device than `meta`, which would fail on a GPU.

    Looking at a value, as x.item() and x[mask] do, would make a GPU wait for the host. Meta tensors refuse
    that by themselves, since they have shapes but no values.
    """

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        tensors = [x for x in tree_leaves((arguments, options, result)) if isinstance(x, torch.Tensor)]
        assert all(x.is_meta for x in tensors), f"{function} on {[x.device for x in tensors]}"
        return result


@WITH_DROPOUT
def test_every_tensor_is_on_one_device(monkeypatch, changes):
    """Forward and backward on `meta` tensors, which take the same path through attention as a GPU's."""
    model, batch = example(dropout=0.1, **changes)
    model, batch = model.to("meta"), {name: x.to("meta") for name, x in batch.items()}
    monkeypatch.setattr(torch, "tensor", None)  # a copy from the host's memory, for which a GPU would wait
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # meta knows no autocast
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    fused, calls = coco.F.scaled_dot_product_attention, []
    monkeypatch.setattr(coco.F, "scaled_dot_product_attention",
                        lambda *inputs, **options: calls.append(options) or fused(*inputs, **options))
    model.main.recompute = True  # all layers but the last, and no layer of the auxiliary
    with OneDevice():
        model(batch, lambda vectors: vectors)[0]["loss"].backward()
    assert calls and all(p.grad.is_meta for p in model.parameters() if p.requires_grad)


class SaysCuda(torch.Tensor):
    """A CPU tensor that claims to be on a GPU."""
    device, is_cuda = torch.device("cuda"), True


def test_attention_of_a_gpu_is_that_of_the_cpu():
    q, k, v, bias = randn(2, 3, 5, 8), randn(2, 3, 7, 8, seed=1), randn(2, 3, 7, 8, seed=2), randn(2, 3, 5, 7)
    bias[1, ..., -2:] = -INF
    fused = coco.attention(q.as_subclass(SaysCuda), k, v, bias, 0.0).as_subclass(torch.Tensor)
    close(coco.attention(q, k, v, bias, 0.0), array(fused))


def test_autocast():
    """Losses and the copy logits, from which copy_auc is computed, are float32."""
    model, batch = example()
    exact = {name: loss.item() for name, loss in model(batch)[0].items()}
    with torch.autocast("cpu", torch.bfloat16):
        losses, _, predictions = model(batch)
    assert {x.dtype for x in [*losses.values(), predictions["copy_logits"]]} == {torch.float32}
    assert losses["mlm_loss"].item() != exact["mlm_loss"]  # bfloat16 shows
    same_losses(losses, exact, tolerance=0.1)


@WITH_DROPOUT
def test_flops_are_those_that_torch_counts(changes):
    model, batch = example(lengths=(16, 16, 16), **changes)
    with FlopCounterMode(display=False) as counter:
        model(batch, None, False)[0]["loss"].backward()
    cosines = 3 * 2 * (2 * 3) ** 2 * model.config.width if model.config.contrastive else 0
    assert counter.get_total_flops() == 3 * coco.flops(model.config) + cosines


# ------------------------------------------------------------------------------------------------------------
# Equations


@pytest.fixture(params=["float32", "bfloat16", "autocast"])
def dtype(request):
    """The type of an equation's inputs, or float32 inputs under autocast. It computes in float32 with any."""
    with torch.autocast("cpu", torch.bfloat16, enabled=request.param == "autocast"):
        yield torch.bfloat16 if request.param == "bfloat16" else torch.float32


def test_sample_is_the_slow_one(dtype):
    logits, uniforms = 2 * randn(600, 11).to(dtype), (torch.arange(600) + 0.5) / 600
    expected = slow_sample(array(logits), array(uniforms)).tolist()
    assert coco.sample(logits, uniforms).tolist() == expected
    assert set(expected) == set(range(11))


@pytest.mark.parametrize("possible", [
    [3], [0], [29_999], [1, 2, 8], [0, 29_999], range(29_500), range(29_999), range(30_000)], ids=str)
def test_sample_at_the_edges(possible):
    """Never a token of probability 0 or outside of the vocabulary, where the sum's rounding shows as well."""
    logits = torch.full((50, 30_000), -INF)
    logits[:, possible] = randn(50, len(possible))
    uniforms = (0.0, 2**-149, 2**-24, 0.3, LAST)
    sampled = [set(coco.sample(logits, torch.full((50,), uniform)).tolist()) for uniform in uniforms]
    assert set.union(*sampled) <= set(possible)
    assert sampled[0] == {possible[0]} and min(sampled[-1]) > possible[-1] - 100
    assert coco.sample(logits, torch.ones(50)).max() < 30_000  # 1 is not a uniform number in [0, 1)


@pytest.mark.parametrize("function, slow, names", [
    (coco.mlm_loss, slow_cross_entropy, "logits targets"),
    (coco.copy_loss, slow_copy, "copy_logits same"),
    (coco.lm_loss_mixture, slow_mixture, "logits copy_logits targets same"),
    (coco.lm_loss_weighted, slow_weighted, "logits copy_logits targets"),
], ids=["mlm", "copy", "mixture", "weighted"])
def test_losses_of_tokens(function, slow, names, dtype):
    inputs = dict(logits=3 * randn(4, 5, 13).to(dtype), copy_logits=3 * randn(4, 5, seed=1).to(dtype),
                  targets=randn(4, 5, 13, seed=2).argmax(-1), same=randn(4, 5, seed=3) > 0)
    inputs = [inputs[name] for name in names.split()]
    loss = function(*inputs)
    assert loss.dtype == torch.float32
    close(loss, slow(*(array(x) if x.is_floating_point() else x.numpy() for x in inputs)))


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("copy_logit", [-200.0, -30.0, 0.7, 30.0, 200.0])
@pytest.mark.parametrize("target", [0, 1])
def test_lm_losses_at_extremes(copy_logit, same, target):
    """Target 0 is likely, target 1 has a probability of e^-90: 0 in float32, but not in float64."""
    x = torch.tensor([copy_logit, 10, -80, 0.3], requires_grad=True)
    exact = x.detach().double().requires_grad_()
    inputs = x[None, 1:], x[:1], torch.tensor([target])
    p_copy, p_other, p_target = exact[:1].sigmoid(), (-exact[:1]).sigmoid(), exact[1:].softmax(0)[target]
    for loss, expected in (
        (coco.lm_loss_mixture(*inputs, torch.tensor([same])), -(same * p_copy + p_other * p_target).log()),
        (coco.lm_loss_weighted(*inputs), -p_other * p_target.log()),
    ):
        close(loss, array(expected))
        [gradient] = torch.autograd.grad(loss, x, retain_graph=True)
        [expected_gradient] = torch.autograd.grad(expected, exact, retain_graph=True)
        close(gradient, array(expected_gradient))


@pytest.mark.parametrize("temperature", [1.0, 0.05])
@pytest.mark.parametrize("N", [1, 2, 5])
def test_cosines_and_scl_loss(N, temperature, dtype):
    corrupted, crop = randn(N, 7).to(dtype), randn(N, 7, seed=1).to(dtype)
    cosine = coco.cosines(corrupted, crop)
    loss = coco.scl_loss(cosine, temperature)
    assert cosine.dtype == loss.dtype == torch.float32
    close(cosine, slow_cosines([*array(corrupted), *array(crop)]))
    close(loss, slow_scl(array(corrupted), array(crop), temperature))


# ------------------------------------------------------------------------------------------------------------
# Statistics: pairs of a sum and a count


def test_pair():
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert coco.pair(values).tolist() == [10, 4]
    assert coco.pair(values > 1.5, torch.tensor([[1.0, 1.0], [0.0, 1.0]])).tolist() == [2, 3]
    assert coco.pair(values, torch.zeros(2, 2)).tolist() == [0, 0]
    in_bfloat16 = torch.full((601,), 0.5, dtype=torch.bfloat16)
    assert coco.pair(in_bfloat16).tolist() == [300.5, 601]  # summed in float32


@pytest.mark.parametrize("N", [1, 3, 8])
def test_scl_statistics(N):
    corrupted, crop = randn(N, 5), randn(N, 5) + 2 * randn(N, 5, seed=1)
    statistics = {name: x.tolist() for name, x in coco.scl_statistics(coco.cosines(corrupted, crop)).items()}
    squared = 2 - 2 * slow_cosines([*array(corrupted), *array(crop)])  # distances of unit vectors
    twin, itself = np.roll(np.arange(2 * N), N), np.eye(2 * N, dtype=bool)
    hits = (np.where(itself, INF, squared).argmin(1) == twin).sum()
    assert 0 < hits < 16  # of eight sequences, some twins are not the nearest
    assert statistics["scl_accuracy"] == [hits, 2 * N]
    total, count = statistics["alignment"]
    assert total / count == pytest.approx(squared[np.arange(2 * N), twin].mean(), rel=1e-5)
    if N == 1:  # there are no different sequences: nothing is counted, and no NaN gets into a sum
        assert statistics["uniformity"] == [0, 0]
    else:
        different = ~itself[:N, :N]
        means = [np.exp(-2 * view[different]).mean() for view in (squared[:N, :N], squared[N:, N:])]
        assert statistics["uniformity"] == pytest.approx([np.log(means).mean(), 1], rel=1e-5)


@pytest.mark.parametrize("changes", [
    dict(), dict(token_task="rtd"), dict(token_task="all_token_mlm"), dict(token_task="mlm"),
    dict(corruption="random"),
], ids=str)
def test_statistics_and_predictions_of_a_batch(changes):
    model, batch = example(**changes)
    _, statistics, predictions = model(batch)
    tokens, masked = batch["tokens"].numpy(), batch["masked"].numpy()
    real, at_masked = tokens != PAD, lambda x: np.take_along_axis(x, masked, axis=1)
    corrupted, auxiliary_logits = slow_corrupt(model, batch)
    hidden = slow_encoder(model.main, model.config, corrupted, ~real)
    same, expected = corrupted == tokens, {}

    def count(name, hit, where):
        expected[name] = [(hit & where).sum(), where.sum()]

    if auxiliary_logits is not None:
        count("mlm_accuracy", at_masked(auxiliary_logits.argmax(-1) == tokens), at_masked(real))
    if model.config.token_task != "mlm":
        copy_logits = slow_linear(hidden, model.copy_head)[..., 0]
        close(predictions["copy_logits"], copy_logits)
        count("replaced_fraction", ~same, real)
        count("copy_accuracy_original", copy_logits > 0, same & real)
        count("copy_accuracy_replaced", copy_logits < 0, ~same & real)
    if model.config.token_task != "rtd":
        lm_tokens = slow_lm_logits(model, hidden).argmax(-1)
        assert predictions["lm_tokens"].tolist() == at_masked(lm_tokens).tolist()
        count("lm_accuracy_replaced", at_masked(lm_tokens == tokens), at_masked(~same))
    pooled = [hidden[b, real[b]].mean(0) for b in range(3)]
    close(predictions["pooled"], pooled)
    close(statistics["mean_cosine"], [slow_cosines(pooled).sum() - 3, 6])  # not of a text and itself
    assert {name: statistics[name].tolist() for name in expected} == expected
    assert statistics.keys() - expected == {"scl_accuracy", "alignment", "uniformity", "mean_cosine"}


# ------------------------------------------------------------------------------------------------------------
# Every ablation as a whole


@EACH_ABLATION
def test_losses_are_the_slow_ones(changes):
    model, batch = example(**changes)
    losses, _, predictions = model(batch)
    assert predictions["corrupted"].tolist() == slow_corrupt(model, batch)[0].tolist()
    same_losses(losses, slow_losses(model, batch))
    with torch.no_grad():
        evaluated, _, _ = model(batch, with_statistics=False)
    same_losses(evaluated, slow_losses(model, batch))
    assert not any(loss.requires_grad for loss in evaluated.values())


@EACH_ABLATION
def test_gradient_is_the_finite_difference(changes):
    """Along a random direction of all that is trained; the sampled tokens are held, and what sg() stops too.

    Every parameter has a gradient: nothing is built that is not used.
    """
    model, batch = example(**changes)
    c = model.config
    losses, _, predictions = model(batch)
    losses["loss"].backward()
    frozen = "auxiliary." if c.corruption == "frozen" else "nothing"
    trained = {name: p for name, p in model.named_parameters() if not name.startswith(frozen)}
    for name, parameter in trained.items():
        reached = parameter.grad.reshape(len(parameter), -1).any(dim=1)
        sparse = "embeddings" in name or "relative" in name  # rows that do not occur get none
        assert reached.any() if sparse or parameter.ndim == 1 else reached.all(), name
    exact, values = copy.deepcopy(model).double(), []
    stopped = c.token_task == "clm" and c.copy_mechanism and c.stop_gradient
    held = array(predictions["copy_logits"]) if stopped else None
    directions = {name: randn(*p.shape, seed=i).double() for i, (name, p) in enumerate(trained.items())}
    directions["main.embeddings.tokens.weight"][PAD] = 0  # a sampled [PAD] is looked up without a gradient
    for step in (1e-5, -1e-5):
        for name, parameter in trained.items():
            exact.get_parameter(name).data = parameter.data + step * directions[name]
        values.append(slow_losses(exact, batch, predictions["corrupted"], held)["loss"])
    slope = sum((parameter.grad * directions[name]).sum().item() for name, parameter in trained.items())
    assert slope == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-4)


@pytest.mark.parametrize("changes, trains", [
    (dict(), False), (dict(lm_loss="weighted"), False), (dict(stop_gradient=False), True),
    (dict(lm_loss="weighted", stop_gradient=False), True), (dict(token_task="all_token_mlm"), True),
], ids=str)
def test_stop_gradient(changes, trains):
    """Whether the LM loss trains the copy head."""
    model, batch = example(**changes)
    loss, head = model(batch)[0]["lm_loss"], list(model.copy_head.parameters())
    gradients = torch.autograd.grad(loss, head, allow_unused=True)
    assert all((gradient is not None and bool(gradient.any())) == trains for gradient in gradients)


# ------------------------------------------------------------------------------------------------------------
# Corruption and the auxiliary


@pytest.mark.parametrize("lm_loss", ["mixture", "weighted"])
@pytest.mark.parametrize("kept", [0, 1, 3])
def test_what_may_be_sampled(monkeypatch, lm_loss, kept):
    """Some are the original: their copy target is 1, and they are part of the LM loss. The others are [PAD],
    attended to and counted like other tokens: the original decides what is padding."""
    model, batch = example(lm_loss=lm_loss)
    sampled = batch["tokens"].gather(1, batch["masked"])
    sampled[:, kept:] = PAD
    monkeypatch.setattr(coco, "sample", lambda logits, uniforms: sampled)
    losses, statistics, predictions = model(batch)
    assert torch.equal(predictions["corrupted"], batch["tokens"].scatter(1, batch["masked"], sampled))
    same_losses(losses, slow_losses(model, batch, predictions["corrupted"]))
    assert statistics["replaced_fraction"].tolist() == [9 - 3 * kept, 43]
    assert statistics["lm_accuracy_replaced"][1] == 9 - 3 * kept


@pytest.mark.parametrize("rate, different_losses", [(0.0, 1), (0.5, 4)])
def test_sampling_is_free_of_dropout(rate, different_losses):
    """The main model's dropout reaches the auxiliary nowhere, the auxiliary's own only its loss."""
    model, batch = example(dropout=0.5, auxiliary_dropout=rate)
    expected = slow_corrupt(model, batch)[0].tolist()
    passes = [model(batch) for _ in range(4)]
    assert all(predictions["corrupted"].tolist() == expected for _, _, predictions in passes)
    assert len({losses["mlm_loss"].item() for losses, _, _ in passes}) == different_losses
    assert len({losses["copy_loss"].item() for losses, _, _ in passes}) == 4
    same_losses(model.eval()(batch)[0], slow_losses(model, batch))


def test_frozen_auxiliary():
    """It never has dropout or a gradient, and its embeddings are its own."""
    model, batch = example(corruption="frozen", dropout=0.5, auxiliary_dropout=0.5)
    assert model.train() is model and model.main.training
    losses, _, predictions = model(batch)
    assert predictions["corrupted"].tolist() == slow_corrupt(model, batch)[0].tolist()
    assert losses["mlm_loss"].item() == pytest.approx(slow_losses(model, batch)["mlm_loss"], rel=1e-5)
    assert not losses["mlm_loss"].requires_grad
    assert not any(p.requires_grad for p in model.auxiliary.parameters())
    assert all(p.requires_grad for p in model.main.parameters())


@pytest.mark.parametrize("width, heads, auxiliary_width, auxiliary_heads", [
    (768, 12, 256, 4), (768, 12, 768, 12), (1024, 16, 384, 6), (128, 4, 64, 2), (128, 4, 8, 1)])
def test_narrow_auxiliary(width, heads, auxiliary_width, auxiliary_heads):
    """It has fewer heads, a narrower FFN, and shares nothing but the embeddings."""
    model = coco.COCOLM(coco.Config(
        vocab_size=8, max_len=16, width=width, heads=heads, ffn_width=4 * width, layers=1, auxiliary_layers=1,
        auxiliary_width=auxiliary_width))
    assert model.auxiliary.heads == auxiliary_heads
    assert model.auxiliary.layers[0].ffn_in.out_features == 4 * auxiliary_width
    shared = set(model.main.parameters()) & set(model.auxiliary.parameters())
    assert shared == set(model.main.embeddings.parameters()) and len(shared) == 4


# ------------------------------------------------------------------------------------------------------------
# Gathering the vectors of all processes


@pytest.mark.parametrize("changes", [dict(), dict(gather_negatives=False), dict(contrastive=False)], ids=str)
def test_gathered_vectors_are_negatives(changes):
    """The SCL vectors (2, B, D) if wanted, with their gradient; for the statistics mean vectors (1, B, D)."""
    model, batch = example(**changes)
    others, seen = 2 * randn(2, 4, 16, seed=9), {}

    def gather(vectors):
        seen[len(vectors)] = vectors
        return torch.cat([vectors, others[:len(vectors)]], dim=1)

    losses, statistics, predictions = model(batch, gather)
    assert torch.equal(seen[1][0], predictions["pooled"])
    assert statistics["mean_cosine"].tolist()[1] == 7 * 6
    if changes:
        assert seen.keys() == {1}
        same_losses(losses, slow_losses(model, batch))
    else:
        hidden = slow_encoder(model.main, model.config, predictions["corrupted"], batch["tokens"] == PAD)
        vectors = np.stack(slow_vectors(model, hidden, batch["crop"].numpy()))
        close(seen[2], vectors)
        assert seen[2].requires_grad and seen[2].dtype == torch.float32
        close(losses["scl_loss"], slow_scl(*np.concatenate([vectors, array(others)], axis=1), 1.0))
        assert statistics["scl_accuracy"].tolist()[1] == 14
    seen.clear()
    model(batch, gather, with_statistics=False)
    assert seen.keys() == (set() if changes else {2})


# ------------------------------------------------------------------------------------------------------------
# Initialisation


@pytest.mark.parametrize("changes", [
    dict(), dict(auxiliary_width=32), dict(corruption="frozen"), dict(relative_init="local")], ids=str)
def test_initialisation(changes):
    torch.manual_seed(0)
    c = coco.Config(**{**SMALL, "vocab_size": 400, "width": 64, "heads": 4, **changes})
    model = coco.COCOLM(c)
    assert not model.lm_bias.any() and not model.auxiliary.output_bias.any()
    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.LayerNorm)):
            assert not module.bias.any()
        if isinstance(module, torch.nn.LayerNorm):
            assert (module.weight == 1).all()
        if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)):
            weight = module.weight
            if name.endswith("tokens"):
                assert weight.any(dim=1).tolist() == [token != c.pad_id for token in range(400)]
                weight = weight[:c.pad_id]
            if name.endswith("relative") and c.relative_init == "local":
                weight = weight - coco.local_relative_table(c.relative_bins, weight.shape[1], c.max_distance)
            error = 5 / math.sqrt(2 * weight.numel())  # five standard errors of a standard deviation
            assert weight.std().item() == pytest.approx(0.02, rel=error), name
            assert abs(weight.mean()) < 5 * 0.02 / math.sqrt(weight.numel()), name


# ------------------------------------------------------------------------------------------------------------
# What the authors' own code computed

NAMES = [  # theirs -> ours; the fairseq names first, then those of the Hugging Face port
    ("encoder.sentence_encoder.", "main."), ("auxiliary.sentence_encoder.", "auxiliary."),
    ("cocolm.encoder.layer.", "main.layers."), ("cocolm.embeddings.", "main.embeddings."),
    ("cocolm.relative", "main.relative"), ("cocolm.scl_head.LayerNorm.", "scl_head.2."),
    ("embed_tokens.", "embeddings.tokens."), ("word_embeddings.", "tokens."),
    ("embed_positions.", "embeddings.positions."), ("position_embeddings.", "positions."),
    ("emb_layer_norm.", "embeddings.norm."), ("embeddings.LayerNorm.", "embeddings.norm."),
    ("self_attn_layer_norm.", "attention_norm."), ("attention.LayerNorm.", "attention_norm."),
    ("self_attn.in_proj.", "qkv."), ("self_attn.out_proj.", "attention_out."),
    ("attention.qkv.", "qkv."), ("attention.attention_out.", "attention_out."),
    ("fc1.", "ffn_in."), ("intermediate.dense.", "ffn_in."),
    ("fc2.", "ffn_out."), ("output.dense.", "ffn_out."),
    ("final_layer_norm.", "ffn_norm."), ("output.LayerNorm.", "ffn_norm."),
    ("relative_attention_bias.", "relative."),
    ("encoder.binary_head.out_proj.", "copy_head."), ("encoder.lm_head.bias", "lm_bias"),
    ("encoder.seq_head.dense.", "scl_head.0."), ("encoder.seq_head.layer_norm.", "scl_head.2."),
    ("cocolm.scl_head.dense.", "scl_head.0."), ("auxiliary.lm_head.bias", "auxiliary.output_bias"),
    ("auxiliary.lm_head.dense.", "auxiliary.transform.0."),
    ("auxiliary.lm_head.layer_norm.", "auxiliary.transform.2."),
]
TIED = ("encoder.lm_head.weight", "auxiliary.lm_head.weight")  # the token embedding once more


def official(name, **changes):
    """-> our model with their weights, their inputs and their outputs"""
    archive = np.load(FIXTURES / f"{name}_tiny.npz")
    sizes = json.loads((FIXTURES / f"{name}_tiny.json").read_text())
    groups = {"param": {}, "in": {}, "out": {}}
    for key in archive.files:
        group, tensor = key.split("/")
        groups[group][tensor] = torch.from_numpy(archive[key])
    weights = {}
    for key, value in groups["param"].items():
        if key in TIED:
            assert torch.equal(value, groups["param"]["encoder.sentence_encoder.embed_tokens.weight"])
        elif not key.startswith("classifier"):
            for theirs, ours in NAMES:
                key = key.replace(theirs, ours)
            weights[key] = value
    c = coco.Config(
        vocab_size=sizes["vocab_size"], pad_id=sizes["pad"], mask_id=sizes["mask"],
        max_len=sizes["max_positions"], layers=sizes["main_layers"], width=sizes["hidden"],
        heads=sizes["heads"], ffn_width=sizes["ffn"], relative_bins=sizes["rel_pos_bins"],
        max_distance=sizes["max_rel_pos"], auxiliary_layers=sizes.get("auxiliary_layers", 1), **changes)
    model = coco.COCOLM(c).eval()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and missing == (["lm_bias"] if name == "huggingface" else [])  # it has no LM head
    for key, weight in weights.items():
        assert torch.equal(model.state_dict()[key], weight)  # what is shared here is equal there
    return model, groups["in"], groups["out"]


def test_fairseq_outputs_and_losses():
    """Hidden states, logits and sequence vectors, and each equation on our own, as theirs are on theirs."""
    model, inputs, outputs = official("fairseq")
    tokens, corrupted, mask = inputs["tokens"], inputs["corrupted"], inputs["mask"]
    real, real_crop, same = tokens != 1, inputs["crop"] != 1, corrupted == tokens
    auxiliary_hidden = model.auxiliary(inputs["masked_tokens"])
    auxiliary_logits = model.auxiliary.logits(auxiliary_hidden[mask])
    hidden, crop_hidden = model.main(corrupted, ~real), model.main(inputs["crop"])
    lm_logits, copy_logits = model.lm_logits(hidden[mask]), model.copy_head(hidden)[..., 0]
    vectors = [model.scl_head(x[:, 0]) for x in (hidden, crop_hidden)]
    close(auxiliary_hidden[real], array(outputs["auxiliary_hidden"][real]))
    close(auxiliary_logits, array(outputs["auxiliary_logits"]))
    close(hidden[real], array(outputs["main_hidden"][real]))
    close(copy_logits[real], array(outputs["copy_logits"]))
    close(lm_logits, array(outputs["lm_logits"]))
    close(vectors[0], array(outputs["seq_emb"]))
    close(crop_hidden[real_crop], array(outputs["crop_hidden"][real_crop]))
    close(vectors[1], array(outputs["crop_seq_emb"]))

    originals, at_masked = tokens[mask], copy_logits[mask]
    assert 0 < same[mask].sum() < len(originals)  # sampled originals and replaced tokens
    losses = dict(
        mlm_loss=coco.mlm_loss(auxiliary_logits, originals).mean(),
        copy_loss=coco.copy_loss(copy_logits, same)[real].mean(),
        lm_loss_weighted=coco.lm_loss_weighted(lm_logits, at_masked, originals).mean(),
        lm_loss_mixture=coco.lm_loss_mixture(lm_logits, at_masked, originals, same[mask]).mean(),
        scl_loss_temperature_1=coco.scl_loss(coco.cosines(*vectors), 1.0),
    )
    same_losses(losses, {name: outputs[name].item() for name in losses}, tolerance=1e-5)


@pytest.mark.parametrize("lm_loss", ["mixture", "weighted"])
def test_fairseq_forward(monkeypatch, lm_loss):
    """Our forward as a whole on the two rows with three masked positions, given what was sampled there."""
    model, inputs, outputs = official("fairseq", lm_loss=lm_loss)
    tokens, corrupted, mask, crop = (inputs[name][:2] for name in ("tokens", "corrupted", "mask", "crop"))
    masked, real, seen = mask.nonzero()[:, 1].view(2, 3), tokens != 1, []
    sampled = inputs["sampled"][:6].view(2, 3)
    monkeypatch.setattr(coco, "sample", lambda logits, uniforms: seen.append(logits) or sampled)
    batch = dict(tokens=tokens, masked=masked, uniforms=torch.zeros(2, 3), crop=crop)
    losses, _, predictions = model(batch)

    auxiliary_logits, lm_logits = (outputs[name][:6] for name in ("auxiliary_logits", "lm_logits"))
    close(seen[0].flatten(0, 1), array(auxiliary_logits))
    close(predictions["copy_logits"][real], array(outputs["copy_logits"][:real.sum()]))
    assert torch.equal(predictions["corrupted"], corrupted)
    assert torch.equal(predictions["lm_tokens"].flatten(), lm_logits.argmax(-1))
    same_losses(losses, slow_losses(model, batch, corrupted))


def test_huggingface():
    model, inputs, outputs = official("huggingface", token_task="mlm")
    real = inputs["tokens"] != 1
    hidden = model.main(inputs["tokens"])
    close(hidden[real], array(outputs["main_hidden"][real]))
    close(model.scl_head(hidden[:, 0]), array(outputs["seq_emb"]))
