"""model.py against slow, obvious versions of itself (loops, float64) and against what the authors' code computed."""

import copy
import json
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import model as coco

FIXTURES = Path(__file__).parent / "fixtures"
SMALL = dict(vocab_size=24, max_len=16, layers=2, width=16, heads=2, ffn_width=24, dropout=0.0, relative_bins=16,
             max_distance=12, auxiliary_layers=1, mask_fraction=0.2)
PAD, MASK = 20, 23  # where a vocabulary of 24 has them: fourth from the end, and last
INF = math.inf

# --------------------------------------------------------------------------------------------------------------------
# Helpers


def build(seed=0, **changes):
    """A small model whose weights are so large that every part of it shows in the output."""
    torch.manual_seed(seed)
    model = coco.COCOLM(coco.Config(**{**SMALL, **changes}))
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def make_batch(config, lengths=(16, 16, 11), seed=1):
    """Sequences of these lengths, padded; position 0 is never masked, padding neither."""
    rng, T = np.random.default_rng(seed), max(lengths)
    tokens = rng.integers(1, PAD, (len(lengths), T))
    tokens[:, 0] = 0
    for row, length in zip(tokens, lengths):
        row[length:] = config.pad_id
    masked = np.stack([np.sort(rng.choice(np.arange(1, n), config.masked, replace=False)) for n in lengths])
    crop = np.concatenate([tokens[:, :1], tokens[:, 2:2 + config.crop_len]], axis=1)
    uniforms = rng.random(masked.shape, dtype=np.float32)
    batch = dict(tokens=tokens, masked=masked, crop=crop, uniforms=uniforms)
    return {name: torch.from_numpy(array) for name, array in batch.items()}


def array(tensor):
    return tensor.detach().double().numpy()


def close(actual, expected, tolerance=1e-5):
    """Whether a tensor is what the slow version says, relative to the size of the numbers."""
    expected = np.asarray(expected, dtype=np.float64)
    actual = array(actual)
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --------------------------------------------------------------------------------------------------------------------
# Slow, obvious versions


def slow_bucket(distance, bins, max_distance):
    half, exact, size = bins // 2, bins // 4, abs(distance)
    bucket = size
    if size >= exact:
        bucket = exact + math.ceil(math.log(size / exact) / math.log((max_distance - 1) / exact) * (half - 1 - exact))
    bucket = min(bucket, half - 1)
    return (half - 1) + (bucket if distance >= 0 else -bucket)


def slow_linear(x, linear):
    return x @ array(linear.weight).T + array(linear.bias)


def slow_norm(x, norm):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * array(norm.weight) + array(norm.bias)


def slow_gelu(x):
    return np.vectorize(lambda y: 0.5 * y * (1 + math.erf(y / math.sqrt(2))))(x)


def slow_transform(x, transform):
    return slow_norm(slow_gelu(slow_linear(x, transform[0])), transform[2])


def slow_attention(x, layer, real, relative):
    """x (T, D), real: which keys count; relative(distance, head) -> what is added to the logit"""
    T, D = x.shape
    d = D // layer.heads
    weight, bias = array(layer.qkv.weight), array(layer.qkv.bias)
    q, k, v = (x @ weight[i * D:(i + 1) * D].T + bias[i * D:(i + 1) * D] for i in range(3))
    result = np.zeros((T, D))
    for head in range(layer.heads):
        part = slice(head * d, (head + 1) * d)
        for i in range(T):
            keys = [j for j in range(T) if real[j]]
            weights = [math.exp(q[i, part] @ k[j, part] / math.sqrt(d) + relative(j - i, head)) for j in keys]
            result[i, part] = sum(w * v[j, part] for w, j in zip(weights, keys)) / sum(weights)
    return slow_linear(result, layer.attention_out)


def slow_encoder(encoder, config, tokens, padding):
    """(B, T) -> (B, T, D)"""
    table = array(encoder.relative.weight) if config.relative_positions else None

    def relative(distance, head):
        return 0.0 if table is None else table[slow_bucket(distance, config.relative_bins, config.max_distance), head]

    token_table, position_table = (array(x.weight) for x in (encoder.embeddings.tokens, encoder.embeddings.positions))
    sequences = []
    for row, is_padding in zip(np.asarray(tokens), np.asarray(padding)):
        x = np.stack([token_table[token] + position_table[i] for i, token in enumerate(row)])
        x = slow_norm(x, encoder.embeddings.norm)
        if isinstance(encoder.narrow, torch.nn.Linear):
            x = slow_linear(x, encoder.narrow)
        for layer in encoder.layers:
            x = slow_norm(x + slow_attention(x, layer, ~is_padding, relative), layer.attention_norm)
            x = slow_norm(x + slow_linear(slow_gelu(slow_linear(x, layer.ffn_in)), layer.ffn_out), layer.ffn_norm)
        sequences.append(x)
    return np.stack(sequences)


def slow_auxiliary_logits(auxiliary, hidden):
    x = slow_transform(hidden, auxiliary.transform)
    if isinstance(auxiliary.widen, torch.nn.Linear):
        x = slow_linear(x, auxiliary.widen)
    return x @ array(auxiliary.embeddings.tokens.weight).T + array(auxiliary.output_bias)


def slow_sample(logits, uniform):
    largest, total = max(logits), 0.0
    weights = [math.exp(x - largest) for x in logits]
    for token, weight in enumerate(weights):
        total += weight / sum(weights)
        if uniform < total:
            return token
    raise AssertionError("a uniform below 1 always finds a token")


def slow_cross_entropy(logits, target):
    largest = max(logits)
    return largest + math.log(sum(math.exp(x - largest) for x in logits)) - logits[target]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))  # float64 holds this up to 700


def slow_copy(logit, same):
    return -math.log(sigmoid(logit) if same else sigmoid(-logit))


def slow_mixture(logits, copy_logit, target, same):
    p_target = math.exp(-slow_cross_entropy(logits, target))
    return -math.log((sigmoid(copy_logit) if same else 0.0) + sigmoid(-copy_logit) * p_target)


def slow_weighted(logits, copy_logit, target):
    return (1 - sigmoid(copy_logit)) * slow_cross_entropy(logits, target)


def slow_cosine(a, b):
    return float(sum(x * y for x, y in zip(a, b)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b)))


def slow_scl(corrupted, crop, temperature):
    vectors, N, total = [*corrupted, *crop], len(corrupted), 0.0
    for i in range(2 * N):
        twin = i + N if i < N else i - N
        others = [math.exp(slow_cosine(vectors[i], vectors[j]) / temperature) for j in range(2 * N) if j != i]
        total -= math.log(math.exp(slow_cosine(vectors[i], vectors[twin]) / temperature) / sum(others))
    return total / (2 * N)


def slow_corrupt(model, batch):
    """-> the corrupted tokens, and the auxiliary's loss if there is one"""
    c, tokens, masked = model.config, batch["tokens"].numpy(), batch["masked"].numpy()
    places = [(b, i, u) for b in range(len(tokens)) for i, u in zip(masked[b], batch["uniforms"][b].tolist())]
    corrupted = tokens.copy()
    for b, i, _ in places:
        corrupted[b, i] = c.mask_id
    if c.token_task == "mlm":
        return corrupted, None
    if c.corruption == "random":
        for b, i, uniform in places:
            corrupted[b, i] = math.floor(uniform * c.vocab_size)
        return corrupted, None
    logits = slow_auxiliary_logits(model.auxiliary, slow_encoder(model.auxiliary, c, corrupted, tokens == c.pad_id))
    for b, i, uniform in places:
        corrupted[b, i] = slow_sample(logits[b, i], uniform)
    return corrupted, np.mean([slow_cross_entropy(logits[b, i], tokens[b, i]) for b, i, _ in places])


def slow_losses(model, batch, corrupted=None, held=None):
    """All losses of one batch by name, from the weights of the model and the paper's equations.

    corrupted: given, or sampled here. held: copy logits for L_LM that stay as they are, as in sg(p_copy).
    """
    c, tokens, masked = model.config, batch["tokens"].numpy(), batch["masked"].numpy()
    real = tokens != c.pad_id
    losses = {}
    slow, mlm = slow_corrupt(model, batch)
    corrupted = slow if corrupted is None else corrupted.numpy()
    if mlm is not None:
        losses["mlm_loss"] = mlm
    hidden = slow_encoder(model.main, c, corrupted, ~real)
    same = corrupted == tokens
    everywhere = [(b, i) for b in range(len(tokens)) for i in range(len(tokens[b])) if real[b, i]]
    at_masked = [(b, i) for b in range(len(tokens)) for i in masked[b]]

    if c.token_task != "mlm":
        logit = slow_linear(hidden, model.copy_head)[..., 0]
        in_lm = logit if held is None else held
    if c.token_task != "rtd":
        lm = hidden @ array(model.main.embeddings.tokens.weight).T + array(model.lm_bias)
    if c.token_task in ("clm", "rtd"):
        losses["copy_loss"] = np.mean([slow_copy(logit[p], same[p]) for p in everywhere])
    if c.token_task == "all_token_mlm":
        losses["lm_loss"] = np.mean([slow_mixture(lm[p], logit[p], tokens[p], same[p]) for p in everywhere])
    elif c.token_task == "mlm" or c.token_task == "clm" and not c.copy_mechanism:
        losses["lm_loss"] = np.mean([slow_cross_entropy(lm[p], tokens[p]) for p in at_masked])
    elif c.token_task == "clm" and c.lm_loss == "mixture":
        losses["lm_loss"] = np.mean([slow_mixture(lm[p], in_lm[p], tokens[p], same[p]) for p in at_masked])
    elif c.token_task == "clm":
        losses["lm_loss"] = np.mean([slow_weighted(lm[p], in_lm[p], tokens[p]) for p in at_masked])
    if c.contrastive:
        losses["scl_loss"] = slow_scl(*slow_vectors(model, hidden, batch["crop"].numpy()), c.temperature)
    weights = dict(mlm_loss=0 if c.corruption == "frozen" else 1, copy_loss=c.lambda_copy, lm_loss=1,
                   scl_loss=c.lambda_scl)
    losses["loss"] = sum(weights[name] * value for name, value in losses.items())
    return losses


def slow_vectors(model, hidden, crop):
    """The SCL vectors of the corrupted and of the cropped sequences, (B, D) each"""
    crop_hidden = slow_encoder(model.main, model.config, crop, crop == model.config.pad_id)
    return [slow_transform(x[:, 0], model.scl_head) for x in (hidden, crop_hidden)]


def same_losses(losses, expected, tolerance=2e-5):
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(expected, rel=tolerance, abs=tolerance)


# --------------------------------------------------------------------------------------------------------------------
# Config


@pytest.mark.parametrize("changes", [
    dict(vocab_size=7), dict(max_len=7), dict(layers=0), dict(width=0), dict(heads=0), dict(ffn_width=0),
    dict(dropout=-0.1), dict(dropout=1.0), dict(dropout=math.nan), dict(auxiliary_layers=0), dict(auxiliary_width=-16),
    dict(auxiliary_dropout=0.95), dict(relative_bins=4), dict(max_distance=2), dict(lambda_copy=-1.0),
    dict(lambda_scl=INF), dict(mask_fraction=0.0), dict(mask_fraction=1.0), dict(crop=0.0), dict(crop=1.1),
    dict(temperature=0.0), dict(relative_init="zero"), dict(corruption="uniform"), dict(token_task="electra"),
    dict(lm_loss="both"), dict(pad_id=-1), dict(pad_id=24), dict(mask_id=24), dict(mask_id=-1),
], ids=str)
def test_config_refuses_a_value(changes):
    [name] = changes
    with pytest.raises(ValueError, match=name) as error:
        coco.Config(**{**SMALL, **changes})
    one_sentence(error)


@pytest.mark.parametrize("changes", [
    dict(width=18, heads=4), dict(relative_bins=10), dict(relative_bins=32, max_distance=9),
    dict(max_len=8, mask_fraction=0.01), dict(max_len=8, crop=0.01),
    dict(token_task="mlm", corruption="random"), dict(token_task="mlm", corruption="frozen"),
    dict(token_task="rtd", lm_loss="weighted"), dict(token_task="all_token_mlm", lm_loss="weighted"),
    dict(token_task="mlm", lm_loss="weighted"), dict(token_task="rtd", copy_mechanism=False),
    dict(token_task="all_token_mlm", copy_mechanism=False), dict(token_task="mlm", copy_mechanism=False),
    dict(token_task="rtd", stop_gradient=False), dict(token_task="mlm", stop_gradient=False),
    dict(copy_mechanism=False, lm_loss="weighted"), dict(copy_mechanism=False, stop_gradient=False),
], ids=str)
def test_config_refuses_a_combination(changes):
    with pytest.raises(ValueError) as error:
        coco.Config(**{**SMALL, **changes})
    one_sentence(error)


def one_sentence(error):
    message = str(error.value)
    assert "\n" not in message and message.endswith(".") and ". " not in message


@pytest.mark.parametrize("preset, sizes", [  # layers, width, FFN, heads, auxiliary layers, bins, max distance, max_len
    ("tiny", (2, 128, 512, 4, 1, 32, 128, 128)),
    ("small", (12, 256, 1024, 4, 2, 32, 128, 512)),
    ("base", (12, 768, 3072, 12, 4, 32, 128, 512)),
    ("base++", (12, 768, 3072, 12, 4, 64, 128, 512)),
    ("large++", (24, 1024, 4096, 16, 6, 128, 256, 512)),
])
def test_presets(preset, sizes):
    c = coco.Config.from_preset(preset, vocab_size=100)
    assert sizes == (c.layers, c.width, c.ffn_width, c.heads, c.auxiliary_layers, c.relative_bins, c.max_distance,
                     c.max_len)
    assert (c.dropout, c.relative_init) == ((0.0, "local") if preset == "tiny" else (0.1, "normal"))
    assert c.auxiliary_width == c.width
    assert set(coco.PRESETS) == {"tiny", "small", "base", "base++", "large++"}


def test_defaults_are_the_papers():
    c = coco.Config(vocab_size=100)
    assert (c.pad_id, c.mask_id) == (96, 99)
    assert (c.token_task, c.lm_loss, c.corruption, c.copy_mechanism, c.stop_gradient) == (
        "clm", "mixture", "auxiliary", True, True)
    assert (c.lambda_copy, c.lambda_scl, c.mask_fraction, c.crop, c.temperature) == (50, 1, 0.15, 0.9, 1)
    assert c.contrastive and c.gather_negatives and c.relative_positions


@pytest.mark.parametrize("max_len, masked, crop_len", [(512, 77, 460), (128, 19, 114), (64, 9, 57), (8, 1, 6)])
def test_masked_and_crop_len(max_len, masked, crop_len):
    c = coco.Config(vocab_size=100, max_len=max_len)
    assert c.masked == masked == round(0.15 * (max_len - 1))
    assert c.crop_len == crop_len


def test_fractions_are_read():
    assert coco.Config(vocab_size=100, max_len=101, mask_fraction=0.3).masked == 30
    assert coco.Config(vocab_size=100, max_len=101, crop=0.5).crop_len == 50


def test_config_survives_a_checkpoint():
    c = coco.Config.from_preset("tiny", vocab_size=100, pad_id=1, auxiliary_width=64, crop=0.8)
    assert coco.Config(**json.loads(json.dumps(asdict(c)))) == c
    assert (c.pad_id, c.auxiliary_width, c.crop) == (1, 64, 0.8)


# --------------------------------------------------------------------------------------------------------------------
# Relative positions


def test_bucket_by_hand():
    """bins=8: half 4, exact 2. 0 and 1 have their own bin, 2 is 2 + ceil(0), 3 to 11 are 2 + ceil(0 < x <= 1) = 3."""
    expected = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6]
    assert coco.relative_position_bucket(torch.arange(-12, 13), 8, 12).tolist() == expected


@pytest.mark.parametrize("bins, max_distance", [(8, 12), (32, 128), (64, 128), (128, 256)])
def test_bucket_is_the_loops(bins, max_distance):
    distances = range(-600, 601)
    buckets = coco.relative_position_bucket(torch.tensor(distances), bins, max_distance).tolist()
    assert buckets == [slow_bucket(d, bins, max_distance) for d in distances]
    assert set(buckets) <= set(range(bins - 1))  # bin bins-1 is never used ...
    assert (min(buckets), max(buckets)) == (0, bins - 2)
    centre = bins // 2 - 1
    assert [b - centre for b in buckets] == [centre - b for b in reversed(buckets)]  # antisymmetric around half-1
    assert buckets == sorted(buckets)


def test_bucket_cap():
    """32 / 128: all distances from 86 on share the outermost bin, the one of 85 is another."""
    buckets = coco.relative_position_bucket(torch.tensor([85, 86, 127, 128, 511, -85, -86, -511]), 32, 128).tolist()
    assert buckets == [29, 30, 30, 30, 30, 1, 0, 0]


def test_bucket_keeps_the_shape():
    distance = torch.arange(12).view(3, 4)
    assert coco.relative_position_bucket(distance, 32, 128).shape == (3, 4)
    assert coco.relative_position_bucket(distance, 32, 128).dtype == torch.int64


def slow_local_table(bins, heads, max_distance):
    table = np.zeros((bins, heads))
    for b in range(bins - 1):
        inside = [x for x in range(-max_distance, max_distance + 1) if slow_bucket(x, bins, max_distance) == b]
        d = sum(inside) / len(inside)
        patterns = [d + 1 if d < 0 else -6, 1 - d if d > 0 else -6, -0.3 * abs(d), 0]
        for head in range(heads):
            table[b, head] = max(patterns[head % 4], -8)
    return table


@pytest.mark.parametrize("bins, heads, max_distance", [(32, 4, 128), (64, 12, 128), (8, 2, 12), (128, 6, 256)])
def test_local_table_is_the_loops(bins, heads, max_distance):
    table = coco.local_relative_table(bins, heads, max_distance)
    assert table.shape == (bins, heads)
    close(table[:-1], slow_local_table(bins, heads, max_distance)[:-1])  # the last bin is never used
    assert table.isfinite().all() and table.min() >= -8


def test_local_table_by_hand():
    left, right, around, everywhere = coco.local_relative_table(32, 4, 128)[:31].T
    near = slice(15 - 3, 15 + 4)  # distances -3 .. 3, which have a bin each
    assert left[near].tolist() == [-2, -1, 0, -6, -6, -6, -6]
    assert right[near].tolist() == [-6, -6, -6, -6, 0, -1, -2]
    assert around[near].tolist() == pytest.approx([-0.9, -0.6, -0.3, 0, -0.3, -0.6, -0.9])
    assert everywhere.abs().max() == 0
    assert left[0] == right[30] == around[0] == around[30] == -8  # the floor


# --------------------------------------------------------------------------------------------------------------------
# The Transformer


@pytest.mark.parametrize("changes", [
    dict(), dict(relative_positions=False), dict(heads=4, width=8), dict(relative_bins=32, max_distance=128),
    dict(layers=1),
], ids=str)
def test_encoder_is_the_slow_one(changes):
    model = build(**changes)
    tokens = make_batch(model.config)["tokens"]
    close(model.main(tokens), slow_encoder(model.main, model.config, tokens, tokens == PAD))


def test_auxiliary_logits_are_the_slow_ones():
    model = build(auxiliary_layers=2)
    batch = make_batch(model.config)
    padding = batch["tokens"] == PAD
    hidden = slow_encoder(model.auxiliary, model.config, batch["tokens"], padding)
    logits = model.auxiliary.logits(model.auxiliary(batch["tokens"], padding))
    close(logits, slow_auxiliary_logits(model.auxiliary, hidden))


def test_a_sequence_that_is_too_long_is_refused():
    model = build()
    assert model.main(torch.zeros(1, 16, dtype=torch.long)).shape == (1, 16, 16)
    with pytest.raises(AssertionError, match="17.*16"):
        model.main(torch.zeros(1, 17, dtype=torch.long))


def test_padding_comes_from_the_padding_id():
    model = build()
    tokens = make_batch(model.config, lengths=(16, 9))["tokens"]
    hidden = model.main(tokens)
    assert torch.equal(hidden, model.main(tokens, tokens == PAD))
    unmasked = model.main(tokens, torch.zeros_like(tokens, dtype=torch.bool))
    assert torch.equal(hidden[0], unmasked[0])  # no padding there
    assert (hidden - unmasked)[1, :9].abs().amax(-1).min() > 1e-3


def test_padding_has_no_influence():
    model = build()
    tokens = make_batch(model.config, lengths=(16, 9))["tokens"]
    padding, other = tokens == PAD, tokens.clone()
    other[1, 9:] = torch.arange(1, 8)
    hidden = model.main(tokens)
    close(model.main(other, padding)[~padding], array(hidden[~padding]), 1e-6)
    close(model.main(tokens[1:, :9])[0], array(hidden[1, :9]), 1e-5)  # as if the padding were not there at all
    other[1, 8] = 5 if tokens[1, 8] != 5 else 6  # a real token does have influence
    assert (model.main(other, padding) - hidden)[1, :8].abs().amax(-1).min() > 1e-4


@pytest.mark.parametrize("part", ["main", "auxiliary"])
@pytest.mark.parametrize("changes", [dict(), dict(layers=1), dict(relative_positions=False), dict(auxiliary_layers=3)],
                         ids=str)
def test_rows_are_those_of_the_full_output(part, changes):
    model = build(**changes)
    tokens = make_batch(model.config)["tokens"]
    rows = torch.tensor([[0, 3, 15], [7, 7, 1], [10, 0, 2]])
    full = getattr(model, part)(tokens)
    expected = np.stack([array(full[b, rows[b]]) for b in range(3)])
    close(getattr(model, part)(tokens, rows=rows), expected, 1e-6)


def test_dropout_is_a_matter_of_training():
    model = build(dropout=0.3)
    tokens = make_batch(model.config)["tokens"]
    without = model.main(tokens, dropout=0.0)
    assert (model.main(tokens) - model.main(tokens)).abs().max() > 0.1
    assert torch.equal(without, model.main(tokens, dropout=0.0))
    assert torch.equal(without, model.eval().main(tokens))


def test_dropout_places(monkeypatch):
    """Embeddings, then attention probabilities and both sub-layer outputs in every layer; none inside the FFN."""
    sizes, model = [], build(dropout=0.25)
    tokens = make_batch(model.config)["tokens"]
    monkeypatch.setattr(coco, "drop", lambda x, dropout: sizes.append((x.numel(), dropout)) or x)
    model.main(tokens)
    wide, square = (3 * 16 * 16, 0.25), (3 * 2 * 16 * 16, 0.25)  # B T D and B H T T
    assert sizes == [wide] + [square, wide, wide] * 2


@pytest.mark.parametrize("probability, byte_values", [(0.1, 26), (0.5, 128), (0.001, 1), (0.9, 230)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_drop_is_dropout_in_multiples_of_a_256th(probability, byte_values, dtype):
    torch.manual_seed(3)
    x = torch.full((7, 301, 203), 2.0, dtype=dtype, requires_grad=True)  # no multiple of 8 elements
    y = coco.drop(x, probability)
    y.sum().backward()
    kept, share = (y != 0), byte_values / 256
    assert torch.equal(y[kept], torch.full_like(y[kept], 2 / (1 - share))) and y.dtype == dtype
    assert torch.equal(x.grad, y.detach() / 2)  # the gradient meets the same mask
    n = x.numel()
    assert abs((~kept).sum().item() - n * share) < 5 * math.sqrt(n * share * (1 - share))
    for bit in range(8):  # the elements that share a draw are independent, each byte of the draw is used alike
        of_byte = (~kept).flatten()[bit::8].float().mean().item()
        assert abs(of_byte - share) < 5 * math.sqrt(8 / n * share * (1 - share))
    pairs = ((~kept).flatten()[:-1] & (~kept).flatten()[1:]).float().mean().item()
    assert abs(pairs - share**2) < 5 * math.sqrt(3 / n) * share + 1e-6
    torch.manual_seed(3)
    assert torch.equal(y, coco.drop(x, probability)) and not torch.equal(y, coco.drop(x, probability))
    assert torch.equal(coco.drop(x, 0.0), x)


def test_recomputing_changes_nothing():
    """Gradients with dropout are the same to the bit, and fewer tensors are kept for them."""
    model, gradients, kept = build(dropout=0.3, layers=4), [], []
    batch = make_batch(model.config)
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


def test_attention_keeps_no_large_probabilities_and_has_the_same_gradients(monkeypatch):
    """On the CPU they are computed once more for the gradient, dropout too."""
    inputs = [randn(2, 2, 24, 8) for _ in "qkv"] + [randn(2, 2, 24, 24)]
    kept, gradients = [], []
    for large in (inputs[3].numel(), inputs[3].numel() + 1):
        monkeypatch.setattr(coco, "LARGE", large)
        leaves, sizes = [x.clone().requires_grad_() for x in inputs], []
        torch.manual_seed(3)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            result = coco.attention(*leaves, 0.3)
        result.square().sum().backward()
        kept.append(sum(sizes))
        gradients.append([result, *(leaf.grad for leaf in leaves)])
    assert kept[0] <= sum(x.numel() for x in inputs) < kept[1]
    assert all(map(torch.equal, *gradients))


class LookingBack(TorchDispatchMode):
    """Notes the operations whose result, or its shape, the host has to wait for; on a GPU each one empties its queue."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = function.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(i is not None and i.dtype == torch.bool for i in arguments[1])
        if by_mask or name in ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "lift_fresh"):
            self.seen.append(name)  # lift_fresh: a constant from the host's memory
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("changes", [dict(), dict(corruption="random"), dict(token_task="all_token_mlm"),
                                     dict(token_task="mlm"), dict(auxiliary_dropout=0.1, dropout=0.1)], ids=str)
def test_the_model_never_waits_for_the_device(changes):
    model = build(**changes).train()
    batch = make_batch(model.config)
    with LookingBack() as host:
        losses, _, _ = model(batch)
        losses["loss"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert host.seen == []
    with LookingBack() as host:  # and it would be seen
        losses["loss"].item(), batch["tokens"][batch["tokens"] > 3], torch.tensor(1.0)
    assert host.seen == ["_local_scalar_dense", "index", "lift_fresh"]


@pytest.mark.parametrize("T", [16, 13])
@pytest.mark.parametrize("autocast", [False, True])
def test_bias_is_what_fused_kernels_take(T, autocast):
    """In the type that attention computes in, rows at multiples of 8 elements, elements side by side."""
    model = build()
    padding = torch.zeros(2, T, dtype=torch.bool)
    padding[1, -2:] = True
    expected = model.main.bias(padding)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        bias = model.main.bias(padding)
    assert bias.dtype == (torch.bfloat16 if autocast else torch.float32) and bias.shape == (2, 2, T, T)
    assert bias.stride(-1) == 1 and all(stride % 8 == 0 for stride in bias.stride()[:-1])
    assert torch.equal(bias, expected.to(bias.dtype)) and (bias[1, ..., -2:] == -INF).all() and bias[0].isfinite().all()


@pytest.mark.parametrize("changes", [
    dict(), dict(auxiliary_width=8), dict(auxiliary_dropout=0.1), dict(corruption="random"), dict(corruption="frozen"),
    dict(token_task="rtd"), dict(token_task="all_token_mlm"), dict(token_task="mlm"), dict(contrastive=False),
    dict(relative_positions=False), dict(copy_mechanism=False), dict(crop=0.5, mask_fraction=0.3, layers=1)], ids=str)
def test_flops_are_those_that_torch_counts(changes):
    model = build(**changes).train()
    batch = make_batch(model.config, (16, 16, 16))
    with FlopCounterMode(display=False) as counter:
        model(batch, None, False)[0]["loss"].backward()
    cosines = 3 * 2 * (2 * 3) ** 2 * model.config.width if model.config.contrastive else 0
    assert counter.get_total_flops() == 3 * coco.flops(model.config) + cosines


# --------------------------------------------------------------------------------------------------------------------
# Sampling

LAST = 1 - 2**-24  # the largest float32 below 1


def test_sample_by_hand():
    logits = torch.tensor([0.2, 0.0, 0.5, 0.3]).log().repeat(5, 1)
    uniforms = torch.tensor([0.0, 0.19, 0.21, 0.69, 0.71])
    assert coco.sample(logits, uniforms).tolist() == [0, 0, 2, 2, 3]


def test_sample_is_the_loops():
    logits, uniforms = 2 * randn(20, 30, 11), torch.rand(20, 30, generator=torch.Generator().manual_seed(1))
    sampled = coco.sample(logits, uniforms)
    assert sampled.dtype == torch.int64
    expected = [[slow_sample(row, u) for row, u in zip(*block)] for block in zip(logits.tolist(), uniforms.tolist())]
    assert sampled.tolist() == expected
    assert len(set(sampled.flatten().tolist())) == 11


@pytest.mark.parametrize("possible", [[3], [0], [9], [1, 2, 8], [0, 9], [4, 5], [0, 1, 2], [7, 8]], ids=str)
def test_sample_never_gives_the_impossible(possible):
    logits = torch.full((10,), -INF)
    logits[possible] = 3 * randn(len(possible))
    uniforms = torch.tensor([0.0, 2**-149, 2**-24, *torch.linspace(0.001, 0.999, 99), LAST])
    sampled = coco.sample(logits.repeat(len(uniforms), 1), uniforms).tolist()
    assert set(sampled) <= set(possible)
    assert (sampled[0], sampled[-1]) == (possible[0], possible[-1])


@pytest.mark.parametrize("trailing", [0, 1, 500])
def test_sample_stays_in_a_large_vocabulary(trailing):
    """Where the rounding of a cumulative sum over 30,000 tokens shows."""
    logits = randn(50, 30_000)
    logits[:, 30_000 - trailing:] = -INF
    sampled = coco.sample(logits, torch.full((50,), LAST))
    assert sampled.max() < 30_000 - trailing and sampled.min() > 29_900 - trailing
    assert coco.sample(logits, torch.zeros(50)).tolist() == [0] * 50
    assert coco.sample(logits, torch.ones(50)).max() < 30_000  # outside of its contract, and still a token


def test_sample_frequencies():
    """Uniforms spread evenly hit every token as often as its probability says, up to one."""
    n, logits = 20_000, 2 * randn(12, seed=3)
    uniforms = (torch.arange(n) + 0.5) / n
    counts = np.bincount(coco.sample(logits.expand(n, -1), uniforms).numpy(), minlength=12)
    weights = [math.exp(x) for x in logits.tolist()]
    assert counts == pytest.approx([n * w / sum(weights) for w in weights], abs=1.1)


def test_sample_in_float32():
    """1000 equal probabilities: in bfloat16 both the probabilities and their sums would be far off."""
    logits = torch.zeros(1000, 1000, dtype=torch.bfloat16)
    assert coco.sample(logits, (torch.arange(1000) + 0.5) / 1000).tolist() == list(range(1000))


# --------------------------------------------------------------------------------------------------------------------
# Losses

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def places(dtype, B=4, K=5, V=13):
    """logits, copy logits, targets, same: random, and rounded to dtype"""
    logits, copy_logits = (3 * randn(B, K, V)).to(dtype), (3 * randn(B, K, seed=1)).to(dtype)
    return logits, copy_logits, randn(B, K, V, seed=2).argmax(-1), randn(B, K, seed=3) > 0


def loop(function, *arguments):
    """function at every (b, k) of its arguments"""
    lists = [argument.tolist() for argument in arguments]
    return [[function(*x) for x in zip(*rows)] for rows in zip(*lists)]


@DTYPES
def test_mlm_loss(dtype):
    logits, _, targets, _ = places(dtype)
    loss = coco.mlm_loss(logits, targets)
    assert loss.dtype == torch.float32
    close(loss, loop(slow_cross_entropy, logits, targets))


@DTYPES
def test_copy_loss(dtype):
    _, copy_logits, _, same = places(dtype)
    loss = coco.copy_loss(copy_logits, same)
    assert loss.dtype == torch.float32
    close(loss, loop(slow_copy, copy_logits, same))


@DTYPES
def test_lm_loss_mixture(dtype):
    logits, copy_logits, targets, same = places(dtype)
    loss = coco.lm_loss_mixture(logits, copy_logits, targets, same)
    assert loss.dtype == torch.float32
    close(loss, loop(slow_mixture, logits, copy_logits, targets, same))


@DTYPES
def test_lm_loss_weighted(dtype):
    logits, copy_logits, targets, _ = places(dtype)
    loss = coco.lm_loss_weighted(logits, copy_logits, targets)
    assert loss.dtype == torch.float32
    close(loss, loop(slow_weighted, logits, copy_logits, targets))


def slow_mixture_gradients(logits, copy_logit, target, same):
    """By the chain rule: of the copy logit, and of the LM logits"""
    p_copy, p_other = sigmoid(copy_logit), sigmoid(-copy_logit)
    probability = [math.exp(-slow_cross_entropy(logits, v)) for v in range(len(logits))]
    p_target = probability[target]
    inside = (p_copy if same else 0.0) + p_other * p_target
    of_copy = -((1.0 if same else 0.0) - p_target) * p_copy * p_other / inside
    weight = p_other * p_target / inside
    return of_copy, [weight * (p - (v == target)) for v, p in enumerate(probability)]


@pytest.mark.parametrize("same", [True, False])
@pytest.mark.parametrize("copy_logit", [-200.0, -30.0, 0.7, 30.0, 200.0])
@pytest.mark.parametrize("target", [0, 1])
def test_mixture_at_extremes(copy_logit, same, target):
    """Target 0 is likely, target 1 has a probability of e^-90: 0 in float32."""
    values = [10.0, -80.0, 0.3]
    logits = torch.tensor([values], requires_grad=True)
    at = torch.tensor([copy_logit], requires_grad=True)
    loss = coco.lm_loss_mixture(logits, at, torch.tensor([target]), torch.tensor([same]))
    loss.sum().backward()
    of_copy, of_logits = slow_mixture_gradients(values, copy_logit, target, same)
    close(loss, [slow_mixture(values, copy_logit, target, same)])
    close(at.grad, [of_copy])
    close(logits.grad, [of_logits])


def test_weighted_at_extremes():
    copy_logits, logits = torch.tensor([-200.0, 200.0]), torch.tensor([[1.0, 2.0]]).repeat(2, 1)
    loss = coco.lm_loss_weighted(logits, copy_logits, torch.tensor([0, 0]))
    close(loss, [slow_cross_entropy([1.0, 2.0], 0), 0.0])


@DTYPES
def test_cosines(dtype):
    corrupted, crop = randn(3, 7).to(dtype), randn(3, 7, seed=1).to(dtype)
    vectors = [*corrupted.tolist(), *crop.tolist()]
    cosine = coco.cosines(corrupted, crop)
    assert cosine.dtype == torch.float32
    close(cosine, [[slow_cosine(a, b) for b in vectors] for a in vectors])


@DTYPES
@pytest.mark.parametrize("temperature", [1.0, 0.05])
@pytest.mark.parametrize("N", [1, 2, 5])
def test_scl_loss(N, temperature, dtype):
    corrupted, crop = randn(N, 7).to(dtype), randn(N, 7, seed=1).to(dtype)
    loss = coco.scl_loss(coco.cosines(corrupted, crop), temperature)
    assert loss.dtype == torch.float32
    close(loss, slow_scl(corrupted.tolist(), crop.tolist(), temperature))


# --------------------------------------------------------------------------------------------------------------------
# Statistics


def test_pair():
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert coco.pair(values).tolist() == [10, 4]
    assert coco.pair(values, torch.tensor([[True, False], [False, True]])).tolist() == [5, 2]
    assert coco.pair(values > 1.5, torch.tensor([[1.0, 1.0], [0.0, 1.0]])).tolist() == [2, 3]
    assert coco.pair(values, torch.zeros(2, 2)).tolist() == [0, 0]
    assert coco.pair(torch.full((600,), 0.5, dtype=torch.bfloat16)).dtype == torch.float32
    assert coco.pair(torch.full((601,), 0.5, dtype=torch.bfloat16)).tolist() == [300.5, 601]


def slow_scl_statistics(corrupted, crop):
    vectors, N = [*corrupted, *crop], len(corrupted)
    unit = [np.array(v) / math.sqrt(sum(x * x for x in v)) for v in vectors]
    squared = [[sum((a - b)**2) for b in unit] for a in unit]
    hits = 0
    for i in range(2 * N):
        nearest = min((j for j in range(2 * N) if j != i), key=lambda j: squared[i][j])
        hits += nearest == (i + N if i < N else i - N)
    twins = sum(squared[i][i + N] for i in range(N)) / N
    uniformity = []
    for view in (range(N), range(N, 2 * N)):
        kernel = [math.exp(-2 * squared[i][j]) for i in view for j in view if i != j]
        uniformity.append(math.log(sum(kernel) / len(kernel)))
    return hits, twins, sum(uniformity) / 2


@pytest.mark.parametrize("N", [2, 3, 8])
def test_scl_statistics(N):
    corrupted = randn(N, 5)
    crop = corrupted + 2 * randn(N, 5, seed=1)
    statistics = coco.scl_statistics(coco.cosines(corrupted, crop))
    hits, twins, uniformity = slow_scl_statistics(corrupted.tolist(), crop.tolist())
    assert statistics["scl_accuracy"].tolist() == [hits, 2 * N]
    assert statistics["alignment"][1] > 0 and statistics["uniformity"].tolist()[1] == 1
    close(statistics["alignment"][0] / statistics["alignment"][1], twins)
    close(statistics["uniformity"][0], uniformity)


def test_scl_accuracy_between_none_and_all():
    """The oracle above has to see both hits and misses."""
    corrupted = randn(8, 5)
    hits, _, _ = slow_scl_statistics(corrupted.tolist(), (corrupted + 2 * randn(8, 5, seed=1)).tolist())
    assert 0 < hits < 16


def test_scl_statistics_of_one_sequence():
    """There are no different sequences, so uniformity has nothing to count, and must not poison a sum with NaN."""
    statistics = coco.scl_statistics(coco.cosines(randn(1, 5), randn(1, 5, seed=1)))
    assert statistics["uniformity"].tolist() == [0, 0]
    assert statistics["scl_accuracy"].tolist() == [2, 2]


@DTYPES
def test_mean_cosine(dtype):
    pooled = (randn(4, 6) + 0.5).to(dtype)
    vectors = pooled.tolist()
    total = sum(slow_cosine(vectors[i], vectors[j]) for i in range(4) for j in range(4) if i != j)
    close(coco.mean_cosine(pooled), [total, 12.0])
    close(coco.mean_cosine(pooled[:1]), [0.0, 0.0])


def test_mean_cosine_of_a_batch():
    """Mean-pooled over the real tokens, between different sequences."""
    model = build()
    batch = make_batch(model.config, lengths=(16, 7, 11))
    _, statistics, predictions = model(batch)
    hidden = slow_encoder(model.main, model.config, predictions["corrupted"], batch["tokens"] == PAD)
    pooled = [sum(hidden[b, i] for i in range(n)) / n for b, n in enumerate((16, 7, 11))]
    close(predictions["pooled"], pooled)
    total = sum(slow_cosine(pooled[i], pooled[j]) for i in range(3) for j in range(3) if i != j)
    close(statistics["mean_cosine"], [total, 6.0])


@pytest.mark.parametrize("changes", [dict(), dict(token_task="all_token_mlm"), dict(corruption="random")], ids=str)
def test_statistics_of_a_batch(changes):
    model = build(**changes)
    batch = make_batch(model.config)
    _, statistics, predictions = model(batch)
    tokens, corrupted = batch["tokens"].tolist(), predictions["corrupted"].tolist()
    counts = dict(replaced_fraction=[0, 0], copy_accuracy_original=[0, 0], copy_accuracy_replaced=[0, 0],
                  lm_accuracy_replaced=[0, 0])

    def count(name, hit):
        counts[name] = [counts[name][0] + hit, counts[name][1] + 1]

    for b in range(3):
        for i in range(16):
            if tokens[b][i] != PAD:
                replaced, says_original = corrupted[b][i] != tokens[b][i], predictions["copy_logits"][b, i] > 0
                count("replaced_fraction", replaced)
                count("copy_accuracy_" + ("replaced" if replaced else "original"), replaced != says_original)
        for i, predicted in zip(batch["masked"][b].tolist(), predictions["lm_tokens"][b].tolist()):
            if corrupted[b][i] != tokens[b][i]:
                count("lm_accuracy_replaced", predicted == tokens[b][i])
    assert {name: statistics[name].tolist() for name in counts} == counts
    assert counts["replaced_fraction"][1] == 43


def test_predictions_and_auxiliary_accuracy():
    model = build()
    batch = make_batch(model.config)
    tokens, masked = batch["tokens"].numpy(), batch["masked"].numpy()
    _, statistics, predictions = model(batch)
    masked_tokens = tokens.copy()
    np.put_along_axis(masked_tokens, masked, MASK, 1)
    hidden = slow_encoder(model.auxiliary, model.config, masked_tokens, tokens == PAD)
    guesses = np.take_along_axis(slow_auxiliary_logits(model.auxiliary, hidden).argmax(-1), masked, 1)
    hits = (guesses == np.take_along_axis(tokens, masked, 1)).sum()
    assert statistics["mlm_accuracy"].tolist() == [hits, masked.size]
    hidden = slow_encoder(model.main, model.config, predictions["corrupted"], tokens == PAD)
    lm = hidden @ array(model.main.embeddings.tokens.weight).T + array(model.lm_bias)
    assert predictions["lm_tokens"].tolist() == np.take_along_axis(lm.argmax(-1), masked, 1).tolist()
    close(predictions["copy_logits"], slow_linear(hidden, model.copy_head)[..., 0])
    assert not any(prediction.requires_grad for prediction in predictions.values())


def test_losses_without_statistics():
    model = build()
    batch = make_batch(model.config)
    losses, statistics, _ = model(batch, with_statistics=False)
    assert statistics == {} or statistics is None
    assert {k: v.item() for k, v in losses.items()} == {k: v.item() for k, v in model(batch)[0].items()}


# --------------------------------------------------------------------------------------------------------------------
# The whole model against the slow one

ABLATIONS = [
    dict(), dict(lm_loss="weighted"), dict(stop_gradient=False), dict(lm_loss="weighted", stop_gradient=False),
    dict(copy_mechanism=False), dict(contrastive=False),
    dict(token_task="rtd"), dict(token_task="rtd", contrastive=False), dict(token_task="all_token_mlm"),
    dict(token_task="mlm"), dict(token_task="mlm", contrastive=False), dict(corruption="random"),
    dict(corruption="frozen"), dict(corruption="random", token_task="rtd"), dict(corruption="frozen", token_task="rtd"),
    dict(corruption="frozen", token_task="all_token_mlm", contrastive=False),
    dict(relative_positions=False), dict(auxiliary_layers=2, auxiliary_width=8), dict(crop=0.5), dict(temperature=0.2),
    dict(lambda_copy=3.0, lambda_scl=7.0), dict(mask_fraction=0.4), dict(gather_negatives=False),
    dict(relative_init="local"), dict(max_distance=6), dict(relative_bins=8),
]
EACH_ABLATION = pytest.mark.parametrize("changes", ABLATIONS, ids=str)


@EACH_ABLATION
def test_losses_are_the_slow_ones(changes):
    model = build(**changes)
    batch = make_batch(model.config)
    losses, _, predictions = model(batch)
    assert predictions["corrupted"].tolist() == slow_corrupt(model, batch)[0].tolist()
    assert all(loss.dtype == torch.float32 and loss.shape == () for loss in losses.values())
    same_losses(losses, slow_losses(model, batch))


@EACH_ABLATION
def test_three_steps(changes):
    """Finite losses, a gradient and a change for all that is trained, and for nothing else."""
    model = build(**changes)
    batch = make_batch(model.config)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    not_trained = "auxiliary." if changes.get("corruption") == "frozen" else "nothing"
    trained = {name: p for name, p in model.named_parameters() if not name.startswith(not_trained)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(3):
        losses, _, _ = model(batch)
        assert losses["loss"].isfinite()
        optimizer.zero_grad()
        losses["loss"].backward()
        for name, parameter in trained.items():
            reached = parameter.grad.reshape(len(parameter), -1).abs().sum(1) > 0
            sparse = "embeddings" in name or "relative" in name  # rows that do not occur get none
            assert reached.any() if sparse or parameter.ndim == 1 else reached.all(), name
        optimizer.step()
    assert trained.keys() == {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def test_unused_bin_gets_no_gradient():
    model = build()
    model(make_batch(model.config))[0]["loss"].backward()
    for encoder in (model.main, model.auxiliary):
        used = encoder.relative.weight.grad.abs().sum(1) > 0
        assert used.tolist() == [True] * 15 + [False]


@pytest.mark.parametrize("changes, changed", [
    (dict(lm_loss="weighted"), {"lm_loss", "loss"}),
    (dict(copy_mechanism=False), {"lm_loss", "loss"}),
    (dict(temperature=0.5), {"scl_loss", "loss"}),
    (dict(lambda_copy=5.0), {"loss"}),
    (dict(lambda_scl=5.0), {"loss"}),
    (dict(contrastive=False), {"loss"}),
    (dict(token_task="rtd"), {"loss"}),
    (dict(token_task="all_token_mlm"), {"lm_loss", "loss"}),
    (dict(corruption="random"), {"copy_loss", "lm_loss", "scl_loss", "loss"}),
    (dict(relative_positions=False), {"mlm_loss", "copy_loss", "lm_loss", "scl_loss", "loss"}),
    (dict(max_distance=6), {"mlm_loss", "copy_loss", "lm_loss", "scl_loss", "loss"}),
    (dict(stop_gradient=False), set()),  # gradients only
    (dict(gather_negatives=False), set()),  # of one process there is nothing to gather
], ids=str)
def test_constant_changes_only_its_terms(changes, changed):
    default, model = build(), build(seed=1, **changes)
    missing, _ = model.load_state_dict(default.state_dict(), strict=False)
    batch = make_batch(default.config)
    before, after = default(batch)[0], model(batch)[0]
    assert missing == []
    assert {name for name in after if before[name] != after[name]} == changed


@pytest.mark.parametrize("changes, parts, terms", [
    (dict(), "auxiliary copy_head lm_bias scl_head", "mlm copy lm scl"),
    (dict(contrastive=False), "auxiliary copy_head lm_bias", "mlm copy lm"),
    (dict(copy_mechanism=False), "auxiliary copy_head lm_bias scl_head", "mlm copy lm scl"),
    (dict(copy_mechanism=False, contrastive=False), "auxiliary copy_head lm_bias", "mlm copy lm"),
    (dict(copy_mechanism=False, corruption="random"), "copy_head lm_bias scl_head", "copy lm scl"),
    (dict(corruption="random"), "copy_head lm_bias scl_head", "copy lm scl"),
    (dict(corruption="random", contrastive=False), "copy_head lm_bias", "copy lm"),
    (dict(corruption="frozen"), "auxiliary copy_head lm_bias scl_head", "mlm copy lm scl"),
    (dict(corruption="frozen", contrastive=False), "auxiliary copy_head lm_bias", "mlm copy lm"),
    (dict(token_task="rtd"), "auxiliary copy_head scl_head", "mlm copy scl"),
    (dict(token_task="rtd", contrastive=False), "auxiliary copy_head", "mlm copy"),
    (dict(token_task="rtd", corruption="random"), "copy_head scl_head", "copy scl"),
    (dict(token_task="rtd", corruption="frozen", contrastive=False), "auxiliary copy_head", "mlm copy"),
    (dict(token_task="all_token_mlm"), "auxiliary copy_head lm_bias scl_head", "mlm lm scl"),
    (dict(token_task="all_token_mlm", contrastive=False), "auxiliary copy_head lm_bias", "mlm lm"),
    (dict(token_task="all_token_mlm", corruption="random"), "copy_head lm_bias scl_head", "lm scl"),
    (dict(token_task="all_token_mlm", corruption="frozen"), "auxiliary copy_head lm_bias scl_head", "mlm lm scl"),
    (dict(token_task="mlm"), "lm_bias scl_head", "lm scl"),
    (dict(token_task="mlm", contrastive=False), "lm_bias", "lm"),
], ids=str)
def test_only_what_is_used_is_built(changes, parts, terms):
    model = build(**changes, lambda_copy=7.0, lambda_scl=3.0)
    assert {name.split(".")[0] for name in model.state_dict()} == {"main", *parts.split()}
    losses, _, predictions = model(make_batch(model.config))
    assert set(losses) == {"loss", *(f"{term}_loss" for term in terms.split())}
    weight_of_mlm = 0.0 if changes.get("corruption") == "frozen" else 1.0
    weights = dict(mlm_loss=weight_of_mlm, copy_loss=7.0, lm_loss=1.0, scl_loss=3.0)
    total = sum(weights[name] * loss.item() for name, loss in losses.items() if name != "loss")
    assert losses["loss"].item() == pytest.approx(total, rel=1e-6)
    assert ("copy_logits" in predictions) == ("copy_head" in parts)
    assert ("lm_tokens" in predictions) == ("lm_bias" in parts)


def test_autocast_losses_are_float32():
    model = build()
    batch = make_batch(model.config)
    exact = {name: loss.item() for name, loss in model(batch)[0].items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses, _, predictions = model(batch)
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    assert predictions["copy_logits"].dtype == torch.float32
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(exact, rel=0.1)
    assert losses["mlm_loss"].item() != exact["mlm_loss"]


def test_autocast_equations_are_exact():
    """The equations compute in float32 whatever the autocast type."""
    logits, copy_logits, targets, same = places(torch.float32)
    corrupted, crop = randn(5, 7), randn(5, 7, seed=1)
    vectors = [*corrupted.tolist(), *crop.tolist()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cosine = coco.cosines(corrupted, crop)
        scl, mixture = coco.scl_loss(cosine, 0.1), coco.lm_loss_mixture(logits, copy_logits, targets, same)
    close(cosine, [[slow_cosine(a, b) for b in vectors] for a in vectors])
    close(scl, slow_scl(corrupted.tolist(), crop.tolist(), 0.1))
    close(mixture, loop(slow_mixture, logits, copy_logits, targets, same))


def test_nothing_is_recorded_without_gradients():
    model = build()
    with torch.no_grad():
        losses, _, _ = model(make_batch(model.config))
    assert not any(loss.requires_grad for loss in losses.values())


# --------------------------------------------------------------------------------------------------------------------
# Corruption


def test_a_sampled_padding_token_is_a_token():
    """Padding is decided on the original: a [PAD] that the auxiliary samples is attended to and counted."""
    model = build()
    model.auxiliary.output_bias.data[PAD] = 1e4
    batch = make_batch(model.config)
    losses, statistics, predictions = model(batch)
    corrupted, padding = predictions["corrupted"], batch["tokens"] == PAD
    assert (corrupted.gather(1, batch["masked"]) == PAD).all()
    attended = slow_linear(slow_encoder(model.main, model.config, corrupted, padding), model.copy_head)[..., 0]
    ignored = slow_linear(slow_encoder(model.main, model.config, corrupted, corrupted == PAD), model.copy_head)[..., 0]
    close(predictions["copy_logits"][~padding], attended[~padding.numpy()])
    assert np.abs(attended - ignored)[~padding.numpy()].max() > 0.01  # it would show
    same_losses(losses, slow_losses(model, batch), tolerance=1e-4)  # the auxiliary's loss is near 1e4
    assert statistics["replaced_fraction"].tolist() == [9, 43]


@pytest.mark.parametrize("lm_loss", ["mixture", "weighted"])
def test_a_sampled_original_counts(monkeypatch, lm_loss):
    """Its copy target is 1, and it is in the mean of the LM loss."""
    model = build(lm_loss=lm_loss)
    batch = make_batch(model.config)
    originals = batch["tokens"].gather(1, batch["masked"])
    sampled = (originals + 1) % PAD
    sampled[:, 0] = originals[:, 0]
    monkeypatch.setattr(coco, "sample", lambda logits, uniforms: sampled)
    losses, statistics, predictions = model(batch)
    corrupted = predictions["corrupted"]
    assert torch.equal(corrupted, batch["tokens"].scatter(1, batch["masked"], sampled))
    same_losses(losses, slow_losses(model, batch, corrupted))
    assert statistics["replaced_fraction"].tolist() == [6, 43]
    assert statistics["lm_accuracy_replaced"][1] == 6
    without = slow_losses(model, {**batch, "masked": batch["masked"][:, 1:]}, corrupted)
    assert abs(without["lm_loss"] - losses["lm_loss"].item()) > 0.01  # leaving them out would show


def test_all_sampled_are_original(monkeypatch):
    """Nothing is replaced: every copy target is 1."""
    model = build()
    batch = make_batch(model.config)
    originals = batch["tokens"].gather(1, batch["masked"])
    monkeypatch.setattr(coco, "sample", lambda logits, uniforms: originals)
    losses, _, predictions = model(batch)
    logits = predictions["copy_logits"][batch["tokens"] != PAD].tolist()
    assert losses["copy_loss"].item() == pytest.approx(np.mean([slow_copy(x, True) for x in logits]), rel=1e-5)


def test_only_masked_tokens_are_replaced():
    model = build()
    batch = make_batch(model.config)
    corrupted = model(batch)[2]["corrupted"]
    untouched = torch.ones_like(corrupted).scatter(1, batch["masked"], 0).bool()
    assert torch.equal(corrupted[untouched], batch["tokens"][untouched])


def test_random_corruption_covers_the_vocabulary():
    model = build(corruption="random")
    batch = make_batch(model.config, lengths=(16,) * 8)
    batch["uniforms"] = ((torch.arange(24) + 0.5) / 24).view(8, 3)
    assert model(batch)[2]["corrupted"].gather(1, batch["masked"]).flatten().tolist() == list(range(24))
    batch["uniforms"] = torch.full((8, 3), LAST)
    assert (model(batch)[2]["corrupted"].gather(1, batch["masked"]) == 23).all()


def test_auxiliary_reads_the_masked_text():
    """What stands at a masked position in the original has no influence on what is sampled there."""
    model = build()
    batch = make_batch(model.config)
    other = {**batch, "tokens": batch["tokens"].scatter(1, batch["masked"], 7)}
    assert not torch.equal(batch["tokens"], other["tokens"])
    assert torch.equal(model(batch)[2]["corrupted"], model(other)[2]["corrupted"])


def test_sampling_is_free_of_dropout():
    model = build(auxiliary_dropout=0.5)
    batch = make_batch(model.config)
    expected = slow_corrupt(model, batch)[0].tolist()
    passes = [model.train()(batch) for _ in range(5)]
    assert all(predictions["corrupted"].tolist() == expected for _, _, predictions in passes)
    assert len({losses["mlm_loss"].item() for losses, _, _ in passes}) == 5  # the loss does have dropout
    assert model.eval()(batch)[0]["mlm_loss"].item() == pytest.approx(slow_losses(model, batch)["mlm_loss"], rel=1e-5)


@pytest.mark.parametrize("auxiliary_dropout", [0.0, 0.5])
def test_sampling_records_no_graph(monkeypatch, auxiliary_dropout):
    model, seen = build(auxiliary_dropout=auxiliary_dropout), []
    batch = make_batch(model.config)
    monkeypatch.setattr(coco, "sample", lambda logits, _: seen.append(torch.is_grad_enabled()) or batch["masked"])
    model(batch)
    assert seen == [False]


def test_no_auxiliary_dropout_by_default():
    model = build(dropout=0.5)
    batch = make_batch(model.config)
    losses, again = model(batch)[0], model(batch)[0]
    assert losses["mlm_loss"] == again["mlm_loss"]
    assert losses["copy_loss"] != again["copy_loss"]


# --------------------------------------------------------------------------------------------------------------------
# Auxiliary and sharing

SHARED = ["tokens.weight", "positions.weight", "norm.weight", "norm.bias"]


@pytest.mark.parametrize("changes", [dict(), dict(auxiliary_width=8), dict(auxiliary_dropout=0.3)], ids=str)
def test_embeddings_are_shared(changes):
    model = build(**changes)
    main, auxiliary = (dict(encoder.embeddings.named_parameters()) for encoder in (model.main, model.auxiliary))
    assert sorted(main) == sorted(auxiliary) == sorted(SHARED)
    assert all(main[name] is auxiliary[name] for name in SHARED)
    assert model.main.relative is not model.auxiliary.relative


def test_embeddings_get_gradients_from_both():
    model = build()
    losses, _, _ = model(make_batch(model.config))
    for name in ("mlm_loss", "lm_loss"):
        gradients = torch.autograd.grad(losses[name], list(model.main.embeddings.parameters()), retain_graph=True)
        assert all(gradient.abs().sum() > 0 for gradient in gradients)


@pytest.mark.parametrize("width, heads, auxiliary_width, auxiliary_heads", [
    (768, 12, 256, 4), (768, 12, 768, 12), (1024, 16, 384, 6), (128, 4, 64, 2), (128, 4, 8, 1)])
def test_narrow_auxiliary_has_fewer_heads(width, heads, auxiliary_width, auxiliary_heads):
    c = coco.Config(vocab_size=8, max_len=16, width=width, heads=heads, ffn_width=4 * width, auxiliary_layers=1,
                    auxiliary_width=auxiliary_width)
    auxiliary = coco.Auxiliary(c, coco.Embeddings(c))
    assert auxiliary.heads == auxiliary_heads
    assert auxiliary.layers[0].ffn_in.out_features == 4 * auxiliary_width
    tokens = torch.arange(16)[None] % 4
    hidden = auxiliary(tokens)
    assert hidden.shape == (1, 16, auxiliary_width)
    assert auxiliary.logits(hidden).shape == (1, 16, 8)


def test_frozen_auxiliary():
    model = build(corruption="frozen", dropout=0.5, auxiliary_dropout=0.5)
    assert model.train() is model
    assert model.main.training and not any(module.training for module in model.auxiliary.modules())
    batch = make_batch(model.config)
    losses, _, predictions = model(batch)
    losses["loss"].backward()
    assert not losses["mlm_loss"].requires_grad
    assert all(p.grad is None and not p.requires_grad for p in model.auxiliary.parameters())
    assert predictions["corrupted"].tolist() == slow_corrupt(model, batch)[0].tolist()  # no dropout
    assert losses["mlm_loss"].item() == pytest.approx(slow_corrupt(model, batch)[1], rel=1e-5)
    assert all(p.grad is not None for p in model.main.parameters())


def test_frozen_auxiliary_has_its_own_embeddings():
    model = build(corruption="frozen")
    main, auxiliary = ({p.data_ptr() for p in encoder.parameters()} for encoder in (model.main, model.auxiliary))
    assert not main & auxiliary
    assert not torch.equal(model.main.embeddings.tokens.weight, model.auxiliary.embeddings.tokens.weight)


# --------------------------------------------------------------------------------------------------------------------
# Gradients


@pytest.mark.parametrize("changes, reaches", [
    (dict(), False), (dict(lm_loss="weighted"), False), (dict(copy_mechanism=False), False),
    (dict(stop_gradient=False), True), (dict(stop_gradient=False, lm_loss="weighted"), True),
    (dict(token_task="all_token_mlm"), True),
], ids=str)
def test_lm_loss_trains_the_copy_head(changes, reaches):
    model = build(**changes, lambda_copy=0.0, contrastive=False)
    model(make_batch(model.config))[0]["loss"].backward()
    for parameter in model.copy_head.parameters():
        gradient = torch.zeros(1) if parameter.grad is None else parameter.grad
        assert (gradient.abs().sum() > 1e-6) if reaches else (gradient == 0).all()
    assert model.lm_bias.grad.abs().sum() > 0


def own(module, name):
    """The parameters of an encoder that it does not share"""
    return [p for n, p in getattr(module, name).named_parameters() if not n.startswith("embeddings")]


@pytest.mark.parametrize("changes", [
    dict(), dict(auxiliary_width=8), dict(auxiliary_dropout=0.2), dict(token_task="rtd"), dict(stop_gradient=False),
    dict(token_task="all_token_mlm"),
], ids=str)
def test_no_gradient_from_main_to_auxiliary(changes):
    model = build(**changes)
    losses, _, _ = model(make_batch(model.config))
    of_main = sum(losses[name] for name in losses if name not in ("loss", "mlm_loss"))
    heads = [p for n, p in model.named_parameters() if n.startswith(("copy_head", "lm_bias", "scl_head"))]
    for loss, others in [(of_main, own(model, "auxiliary")), (losses["mlm_loss"], own(model, "main") + heads)]:
        gradients = torch.autograd.grad(loss, others, retain_graph=True, allow_unused=True)
        assert all(gradient is None or not gradient.any() for gradient in gradients)
    of_mlm = torch.autograd.grad(losses["mlm_loss"], own(model, "auxiliary"), retain_graph=True)
    losses["loss"].backward()
    for parameter, gradient in zip(own(model, "auxiliary"), of_mlm):
        assert gradient.abs().sum() > 0
        close(parameter.grad, array(gradient), 1e-6)


def uses_stop_gradient(config):
    return config.token_task == "clm" and config.copy_mechanism and config.stop_gradient


@pytest.mark.parametrize("changes", [
    dict(), dict(lm_loss="weighted"), dict(stop_gradient=False), dict(stop_gradient=False, lm_loss="weighted"),
    dict(copy_mechanism=False), dict(token_task="rtd"), dict(token_task="all_token_mlm"), dict(token_task="mlm"),
    dict(corruption="random"), dict(corruption="frozen"), dict(relative_positions=False), dict(auxiliary_width=8),
], ids=str)
def test_gradient_is_the_finite_difference(changes):
    """Along one random direction of all that is trained, with the sampled tokens fixed, and what sg() holds as well."""
    model = build(**changes, lambda_copy=2.0, temperature=0.3)
    batch = make_batch(model.config)
    losses, _, predictions = model(batch)
    losses["loss"].backward()
    exact = copy.deepcopy(model).double()
    held = array(predictions["copy_logits"]) if uses_stop_gradient(model.config) else None
    directions = {name: randn(*p.shape, seed=i).double() for i, (name, p) in enumerate(model.named_parameters())}
    directions["main.embeddings.tokens.weight"][PAD] = 0  # a [PAD] that was sampled is looked up without a gradient
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    values = []
    for step in (1e-5, -1e-5):
        for name, parameter in trained.items():
            exact.get_parameter(name).data = parameter.data + step * directions[name]
        values.append(slow_losses(exact, batch, predictions["corrupted"], held)["loss"])
    slope = sum((parameter.grad * directions[name]).sum().item() for name, parameter in trained.items())
    assert slope == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-4)


# --------------------------------------------------------------------------------------------------------------------
# Gathering


def test_gathered_vectors_are_negatives():
    model = build()
    batch = make_batch(model.config)
    others, seen = 2 * randn(2, 4, 16, seed=9), {}

    def gather(vectors):
        seen[len(vectors)] = vectors
        return torch.cat([vectors, others[:len(vectors)]], dim=1)

    losses, statistics, predictions = model(batch, gather)
    hidden = slow_encoder(model.main, model.config, predictions["corrupted"], batch["tokens"] == PAD)
    vectors = slow_vectors(model, hidden, batch["crop"].numpy())
    close(seen[2], np.stack(vectors))
    assert seen[2].requires_grad and seen[2].dtype == torch.float32
    gathered = [np.concatenate([own_vectors, array(other)]) for own_vectors, other in zip(vectors, others)]
    close(losses["scl_loss"], slow_scl(*gathered, 1.0))
    assert statistics["scl_accuracy"].tolist()[1] == 14
    assert statistics["mean_cosine"].tolist()[1] == 7 * 6


@pytest.mark.parametrize("changes", [dict(gather_negatives=False), dict(contrastive=False)], ids=str)
def test_negatives_are_not_gathered_if_not_wanted(changes):
    """For the statistics mean vectors are gathered all the same, (1, B, D); without statistics nothing is."""
    model, seen = build(**changes), []
    batch = make_batch(model.config)
    losses, _, _ = model(batch, lambda vectors: seen.append(vectors) or vectors)
    same_losses(losses, slow_losses(model, batch))
    assert all(vectors.shape == (1, 3, 16) and not vectors.requires_grad for vectors in seen)
    seen.clear()
    model(batch, lambda vectors: seen.append(vectors) or vectors, with_statistics=False)
    assert seen == []


# --------------------------------------------------------------------------------------------------------------------
# Initialisation


def initialised(**changes):
    torch.manual_seed(0)
    return coco.COCOLM(coco.Config(**{**dict(vocab_size=400, max_len=64, layers=2, width=64, heads=4, ffn_width=128,
                                             auxiliary_layers=1), **changes}))


@pytest.mark.parametrize("changes", [dict(), dict(auxiliary_width=32), dict(corruption="frozen")], ids=str)
def test_initialisation(changes):
    model, weights = initialised(**changes), 0
    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)):
            weight = module.weight if getattr(module, "padding_idx", None) is None else module.weight[:396]
            error = 5 / math.sqrt(2 * weight.numel())  # five standard errors of a standard deviation
            assert weight.std().item() == pytest.approx(0.02, rel=error), name
            assert abs(weight.mean()) < 5 * 0.02 / math.sqrt(weight.numel()), name
            weights += 1
        if isinstance(module, torch.nn.LayerNorm):
            assert (module.weight == 1).all()
        if getattr(module, "bias", None) is not None and not callable(module.bias):
            assert (module.bias == 0).all()
    assert weights >= 4 + 12
    assert (model.lm_bias == 0).all() and (model.auxiliary.output_bias == 0).all()
    for encoder in (model.main, model.auxiliary):
        assert (encoder.embeddings.tokens.weight[396] == 0).all()
        assert (encoder.embeddings.tokens.weight.abs().sum(1) > 0).sum() == 399


@pytest.mark.parametrize("part", ["main", "auxiliary"])
def test_relative_init(part):
    normal = getattr(initialised(), part).relative.weight
    local = getattr(initialised(relative_init="local"), part).relative.weight
    assert normal.std().item() == pytest.approx(0.02, rel=0.3)
    noise = array(local)[:-1] - slow_local_table(32, 4, 128)[:-1]
    assert noise.std() == pytest.approx(0.02, rel=0.3) and np.abs(noise).max() < 0.1


# --------------------------------------------------------------------------------------------------------------------
# What the authors' own code computed

NAMES = [  # theirs -> ours; the fairseq names first, then those of the Hugging Face port
    ("encoder.sentence_encoder.", "main."), ("auxiliary.sentence_encoder.", "auxiliary."),
    ("cocolm.encoder.layer.", "main.layers."), ("cocolm.embeddings.", "main.embeddings."),
    ("cocolm.relative", "main.relative"), ("cocolm.scl_head.LayerNorm.", "scl_head.2."),
    ("embed_tokens.", "embeddings.tokens."), ("word_embeddings.", "tokens."),
    ("embed_positions.", "embeddings.positions."), ("position_embeddings.", "positions."),
    ("emb_layer_norm.", "embeddings.norm."), ("embeddings.LayerNorm.", "embeddings.norm."),
    ("self_attn_layer_norm.", "attention_norm."), ("attention.LayerNorm.", "attention_norm."),
    ("self_attn.in_proj.", "qkv."), ("self_attn.out_proj.", "attention_out."), ("attention.qkv.", "qkv."),
    ("attention.attention_out.", "attention_out."),
    ("fc1.", "ffn_in."), ("intermediate.dense.", "ffn_in."), ("fc2.", "ffn_out."), ("output.dense.", "ffn_out."),
    ("final_layer_norm.", "ffn_norm."), ("output.LayerNorm.", "ffn_norm."), ("relative_attention_bias.", "relative."),
    ("encoder.binary_head.out_proj.", "copy_head."), ("encoder.lm_head.bias", "lm_bias"),
    ("encoder.seq_head.dense.", "scl_head.0."), ("encoder.seq_head.layer_norm.", "scl_head.2."),
    ("cocolm.scl_head.dense.", "scl_head.0."), ("auxiliary.lm_head.bias", "auxiliary.output_bias"),
    ("auxiliary.lm_head.dense.", "auxiliary.transform.0."), ("auxiliary.lm_head.layer_norm.", "auxiliary.transform.2."),
]
TIED = ("encoder.lm_head.weight", "auxiliary.lm_head.weight")  # the token embedding once more


def read(name):
    """-> sizes, inputs, outputs, weights by our names, tied weights"""
    archive = np.load(FIXTURES / f"{name}_tiny.npz")
    sizes = json.loads((FIXTURES / f"{name}_tiny.json").read_text())
    groups = dict(param={}, out={})
    groups["in"] = {}
    for key in archive.files:
        group, name = key.split("/")
        groups[group][name] = torch.from_numpy(archive[key])
    weights, tied = {}, {}
    for name, value in groups["param"].items():
        if name in TIED:
            tied[name] = value
        elif not name.startswith("classifier"):
            for theirs, ours in NAMES:
                name = name.replace(theirs, ours)
            weights[name] = value
    return sizes, groups["in"], groups["out"], weights, tied


def official(sizes, weights, **changes):
    config = coco.Config(
        vocab_size=sizes["vocab_size"], pad_id=sizes["pad"], mask_id=sizes["mask"], max_len=sizes["max_positions"],
        layers=sizes["main_layers"], width=sizes["hidden"], heads=sizes["heads"], ffn_width=sizes["ffn"],
        relative_bins=sizes["rel_pos_bins"], max_distance=sizes["max_rel_pos"],
        auxiliary_layers=sizes.get("auxiliary_layers", 1), **changes)
    model = coco.COCOLM(config).eval()
    assert set(model.state_dict()) - set(weights) <= {"lm_bias"}  # the port has no LM head
    model.load_state_dict(weights, strict=False)
    assert set(weights) == {name for name in model.state_dict() if name in weights}
    return model


@pytest.fixture(scope="module")
def fairseq():
    sizes, inputs, outputs, weights, tied = read("fairseq")
    for value in tied.values():
        assert torch.equal(value, weights["main.embeddings.tokens.weight"])
    for name in SHARED:
        assert torch.equal(weights[f"main.embeddings.{name}"], weights[f"auxiliary.embeddings.{name}"])
    model = official(sizes, weights)
    assert set(model.state_dict()) == set(weights)
    return model, inputs, outputs


def test_fairseq_auxiliary(fairseq):
    model, inputs, outputs = fairseq
    real = inputs["tokens"] != 1
    hidden = model.auxiliary(inputs["masked_tokens"])
    close(hidden[real], array(outputs["auxiliary_hidden"][real]))
    close(model.auxiliary.logits(hidden[inputs["mask"]]), array(outputs["auxiliary_logits"]))


def test_fairseq_main(fairseq):
    model, inputs, outputs = fairseq
    real = inputs["tokens"] != 1
    hidden = model.main(inputs["corrupted"], ~real)
    close(hidden[real], array(outputs["main_hidden"][real]))
    close(model.copy_head(hidden)[..., 0][real], array(outputs["copy_logits"]))
    close(model.lm_logits(hidden[inputs["mask"]]), array(outputs["lm_logits"]))
    close(model.scl_head(hidden[:, 0]), array(outputs["seq_emb"]))


def test_fairseq_crop(fairseq):
    model, inputs, outputs = fairseq
    real = inputs["crop"] != 1
    hidden = model.main(inputs["crop"])
    close(hidden[real], array(outputs["crop_hidden"][real]))
    close(model.scl_head(hidden[:, 0]), array(outputs["crop_seq_emb"]))


def test_fairseq_losses(fairseq):
    """From our own hidden states, as the authors' losses are from theirs."""
    model, inputs, outputs = fairseq
    tokens, corrupted, mask, real = inputs["tokens"], inputs["corrupted"], inputs["mask"], inputs["tokens"] != 1
    originals, same = tokens[mask], corrupted == tokens
    assert 0 < same[mask].sum() < len(originals)  # both kinds are there
    auxiliary_logits = model.auxiliary.logits(model.auxiliary(inputs["masked_tokens"])[mask])
    hidden = model.main(corrupted, ~real)
    lm_logits, copy_logits = model.lm_logits(hidden[mask]), model.copy_head(hidden)[..., 0]
    vectors = [model.scl_head(x[:, 0]) for x in (hidden, model.main(inputs["crop"]))]
    losses = dict(
        mlm_loss=coco.mlm_loss(auxiliary_logits, originals).mean(),
        copy_loss=coco.copy_loss(copy_logits, same)[real].mean(),
        lm_loss_weighted=coco.lm_loss_weighted(lm_logits, copy_logits[mask], originals).mean(),
        lm_loss_mixture=coco.lm_loss_mixture(lm_logits, copy_logits[mask], originals, same[mask]).mean(),
        scl_loss_temperature_1=coco.scl_loss(coco.cosines(*vectors), 1.0),
    )
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(outputs[name].item(), abs=1e-5), name


@pytest.mark.parametrize("lm_loss", ["mixture", "weighted"])
def test_fairseq_forward(monkeypatch, lm_loss):
    """Our forward as a whole on the two rows with three masked positions, given what was sampled there."""
    sizes, inputs, outputs, weights, _ = read("fairseq")
    model, seen = official(sizes, weights, lm_loss=lm_loss), []
    tokens, corrupted = inputs["tokens"][:2], inputs["corrupted"][:2]
    masked = inputs["mask"][:2].nonzero()[:, 1].view(2, 3)
    monkeypatch.setattr(coco, "sample", lambda logits, u: seen.append(logits) or inputs["sampled"][:6].view(2, 3))
    batch = dict(tokens=tokens, masked=masked, uniforms=torch.zeros(2, 3), crop=inputs["crop"][:2])
    losses, _, predictions = model(batch)

    close(seen[0].flatten(0, 1), array(outputs["auxiliary_logits"][:6]))
    assert torch.equal(predictions["corrupted"], corrupted)
    real, copy_logits = tokens != 1, outputs["copy_logits"][:24 + 19].tolist()
    close(predictions["copy_logits"][real], copy_logits)
    assert predictions["lm_tokens"].flatten().tolist() == outputs["lm_logits"][:6].argmax(-1).tolist()

    originals, same = (x.gather(1, masked).flatten().tolist() for x in (tokens, corrupted == tokens))
    at_masked = np.zeros((2, 24))
    at_masked[real.numpy()] = copy_logits
    at_masked = np.take_along_axis(at_masked, masked.numpy(), 1).flatten()
    rows = list(zip(outputs["lm_logits"].tolist(), at_masked, originals, same))
    lm = [slow_mixture(*row) if lm_loss == "mixture" else slow_weighted(*row[:3]) for row in rows]
    scl = slow_scl(outputs["seq_emb"][:2].tolist(), outputs["crop_seq_emb"][:2].tolist(), 1.0)
    expected = dict(
        mlm_loss=np.mean([slow_cross_entropy(*row) for row in zip(outputs["auxiliary_logits"].tolist(), originals)]),
        copy_loss=np.mean([slow_copy(*row) for row in zip(copy_logits, (corrupted == tokens)[real].tolist())]),
        lm_loss=np.mean(lm), scl_loss=scl)
    expected["loss"] = expected["mlm_loss"] + 50 * expected["copy_loss"] + expected["lm_loss"] + expected["scl_loss"]
    same_losses(losses, expected, tolerance=1e-5)


def test_huggingface():
    sizes, inputs, outputs, weights, _ = read("huggingface")
    model = official(sizes, weights, token_task="mlm")
    real = inputs["tokens"] != 1
    hidden = model.main(inputs["tokens"])
    close(hidden[real], array(outputs["main_hidden"][real]))
    close(model.scl_head(hidden[:, 0]), array(outputs["seq_emb"]))
