"""model.py against slow, obvious versions of itself in float64, and against what the authors' code computed.

All models here compute in float32, unless a test says bfloat16.
"""

import copy
import math
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo  # here, or the first checkpointed layer imports it in the middle of a test
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import convert
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


def example(sequences=3, seed=0, **changes):
    """A model, its weights so large that every part shows in the output, and a batch."""
    torch.manual_seed(seed)
    model = coco.COCOLM(coco.Config(**{**SMALL, **changes}))
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model, make_batch(model.config, sequences, seed)


def make_batch(config, sequences=3, seed=0):
    """All that a batch holds. A key that a new loss needs is added here."""
    rng, T = np.random.default_rng(seed), config.max_len
    tokens = rng.integers(1, PAD, (sequences, T))
    tokens[:, 0] = 0  # [CLS], which is never masked
    masked = np.stack([np.sort(rng.permutation(np.arange(1, T))[: config.mask_count])
                       for _ in range(sequences)])
    crop = np.concatenate([tokens[:, :1], tokens[:, 1 : 1 + config.crop_len]], axis=1)
    uniforms = rng.random(masked.shape, dtype=np.float32)
    uniforms[0, :2] = 0, LAST
    batch = dict(tokens=tokens, masked=masked, crop=crop, uniforms=uniforms)
    return {name: torch.from_numpy(x) for name, x in batch.items()}


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
        hidden = slow_encoder(model.auxiliary, c, corrupted, np.zeros(tokens.shape, bool))
        x = slow_transform(hidden, model.auxiliary.transform)
        x = slow_linear(x, model.auxiliary.widen) if c.auxiliary_width < c.width else x
        logits = x @ array(model.auxiliary.embeddings.tokens.weight).T + array(model.auxiliary.output_bias)
        at_masked = np.take_along_axis(logits, masked[..., None], axis=1)
        np.put_along_axis(corrupted, masked, slow_sample(at_masked, uniforms), axis=1)
    return corrupted, logits


def slow_forward(model, batch, corrupted=None, held=None):
    """Losses, statistics (without those of SCL) and outputs of one batch by name, as model.forward's.

    corrupted: the corrupted tokens, if they are not to be sampled here.
    held: copy logits for L_LM that stay while the weights change, as in sg(p_copy).
    """
    c, tokens, masked = model.config, batch["tokens"].numpy(), batch["masked"].numpy()
    sampled, auxiliary_logits = slow_corrupt(model, batch)
    corrupted = sampled if corrupted is None else corrupted.numpy()
    same, no_padding = corrupted == tokens, np.zeros(tokens.shape, bool)
    hidden = slow_encoder(model.main, c, corrupted, no_padding)
    losses, statistics, outputs = {}, {}, dict(corrupted=corrupted)
    weights = dict(mlm_loss=1, copy_loss=c.lambda_copy, lm_loss=1, scl_loss=c.lambda_scl)

    def at_masked(x):
        return np.take_along_axis(x, masked, axis=1)

    def count(name, hit, where):
        statistics[name] = [(hit & where).sum(), where.sum()]

    if auxiliary_logits is not None:
        losses["mlm_loss"] = at_masked(slow_cross_entropy(auxiliary_logits, tokens)).mean()
        weights["mlm_loss"] = c.corruption != "frozen"
        outputs["mlm_tokens"] = at_masked(auxiliary_logits.argmax(-1))
        count("mlm_accuracy", outputs["mlm_tokens"] == at_masked(tokens), masked >= 0)
    if c.token_task != "mlm":
        outputs["copy_logits"] = copy_logits = slow_linear(hidden, model.copy_head)[..., 0]
        in_lm = copy_logits if held is None else held
        count("replaced_fraction", ~same, tokens >= 0)
        count("copy_accuracy_original", copy_logits > 0, same)
        count("copy_accuracy_replaced", copy_logits < 0, ~same)
    if c.token_task in ("clm", "rtd"):
        losses["copy_loss"] = slow_copy(copy_logits, same).mean()
    if c.token_task != "rtd":
        lm_logits = hidden @ array(model.main.embeddings.tokens.weight).T + array(model.lm_bias)
        if c.token_task == "all_token_mlm":
            terms = slow_mixture(lm_logits, copy_logits, tokens, same)
        elif c.token_task == "mlm" or not c.copy_mechanism:
            terms = at_masked(slow_cross_entropy(lm_logits, tokens))
        elif c.lm_loss == "mixture":
            terms = at_masked(slow_mixture(lm_logits, in_lm, tokens, same))
        else:
            terms = at_masked(slow_weighted(lm_logits, in_lm, tokens))
        losses["lm_loss"] = terms.mean()
        outputs["lm_tokens"] = at_masked(lm_logits.argmax(-1))
        count("lm_accuracy_replaced", at_masked(lm_logits.argmax(-1) == tokens), at_masked(~same))
    if c.contrastive:
        crop_hidden = slow_encoder(model.main, c, batch["crop"], np.zeros(batch["crop"].shape, bool))
        vectors = [slow_transform(x[:, 0], model.scl_head) for x in (hidden, crop_hidden)]
        outputs["scl_vectors"] = np.stack(vectors)
        losses["scl_loss"] = slow_scl(*vectors, c.temperature)
    losses["loss"] = sum(weights[name] * value for name, value in losses.items())
    outputs["pooled"] = pooled = hidden.mean(1)
    N = len(pooled)
    statistics["mean_cosine"] = [slow_cosines(pooled).sum() - N, N * (N - 1)]  # not of a text and itself
    return losses, statistics, outputs


# ------------------------------------------------------------------------------------------------------------
# Config and the Transformer


@pytest.mark.parametrize("changes", [  # the first name is that of the problem
    dict(vocab_size=7), dict(heads=0), dict(dropout=1.0), dict(dropout=math.nan), dict(lambda_scl=INF),
    dict(crop=1.1), dict(token_task="electra"), dict(pad_id=-1), dict(mask_id=24),
    # sizes that do not go together
    dict(width=18, heads=4), dict(auxiliary_width=32), dict(relative_bins=10),
    dict(max_distance=9, relative_bins=32), dict(max_len=8, mask_fraction=0.01), dict(max_len=8, crop=0.01),
    # settings that would have no effect
    dict(corruption="random", token_task="mlm"), dict(copy_mechanism=False, token_task="rtd"),
    dict(lm_loss="weighted", token_task="all_token_mlm"), dict(stop_gradient=False, copy_mechanism=False),
    dict(auxiliary_dropout=0.1, corruption="frozen"),
    # values of another type
    dict(layers="3"), dict(layers=2.5), dict(contrastive="no"), dict(crop="0.9"),
], ids=str)
def test_config_refuses(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        coco.Config(**{**SMALL, **changes})


def test_defaults_are_the_papers():
    c = coco.Config(vocab_size=100)
    assert c == coco.Config.from_preset("base", vocab_size=100)
    assert (c.pad_id, c.mask_id, c.mask_count, c.crop_len) == (96, 99, 77, 460)
    assert (c.token_task, c.lm_loss, c.corruption) == ("clm", "mixture", "auxiliary")
    assert (c.lambda_copy, c.lambda_scl, c.mask_fraction, c.crop, c.temperature) == (50, 1, 0.15, 0.9, 1)
    assert c.copy_mechanism and c.stop_gradient and c.relative_positions
    assert c.contrastive and c.gather_negatives
    for preset in coco.PRESETS:
        coco.Config.from_preset(preset, vocab_size=100)  # refuses none


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


def test_dropout_places(monkeypatch):
    """Embeddings, attention probabilities and both sub-layer outputs of every layer; not inside the FFN."""
    model, batch = example(dropout=0.25)
    wide, square, seen = 3 * 16 * 16, 3 * 2 * 16 * 16, []  # B T D and B H T T
    monkeypatch.setattr(coco, "drop", lambda x, dropout: seen.append((x.numel(), dropout)) or x)
    model.main(batch["tokens"])
    assert seen == [(size, 0.25) for size in [wide] + [square, wide, wide] * 2]


@pytest.mark.parametrize("dropout, byte_values", [(0.1, 26), (0.5, 128), (0.001, 1)])
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
    for byte in range(8):  # of the eight bytes of a draw, each is used alike
        of_byte = dropped[byte::8].float().mean()
        assert abs(of_byte - share) < 5 * math.sqrt(8 / n * share * (1 - share))
    neighbours = (dropped[:-1] & dropped[1:]).float().mean()  # independent
    assert abs(neighbours - share**2) < 5 * math.sqrt(3 / n) * share + 1e-6
    assert not torch.equal(y, coco.drop(x, dropout)) and torch.equal(coco.drop(x, 0.0), x)


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


# ------------------------------------------------------------------------------------------------------------
# What a GPU needs, seen without one


class OneDevice(TorchDispatchMode):
    """Refuses tensors of another device than `meta`, which would fail on a GPU.

    Meta tensors have no values, so they refuse x.item() and x[mask], for which a GPU would wait.
    """

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        tensors = [x for x in tree_leaves((arguments, options, result)) if isinstance(x, torch.Tensor)
                   and x.numel()]  # older versions' checkpoint() makes an empty one
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
    """Losses and the copy logits, from which copy_auc is computed, are float32. The bias is as fused kernels
    take it: in the type of attention, rows at multiples of 8 elements, elements side by side."""
    model, batch = example()
    with torch.autocast("cpu", torch.bfloat16):
        losses, outputs = model(batch)
        tokens = batch["tokens"][:, :13]
        biases = [model.main.bias(tokens, padding) for padding in (False, tokens > 15)]
    assert {x.dtype for x in [*losses.values(), outputs["copy_logits"]]} == {torch.float32}
    same_losses(losses, slow_forward(model, batch, outputs["corrupted"])[0], tolerance=0.1)
    for bias in biases:
        assert bias.dtype == torch.bfloat16 and bias.stride(-1) == 1
        assert all(stride % 8 == 0 for stride in bias.stride()[:-1])


@WITH_DROPOUT
def test_flops_are_those_that_torch_counts(changes):
    model, batch = example(**changes)
    with FlopCounterMode(display=False) as counter:
        model(batch)[0]["loss"].backward()
    cosines = 3 * 2 * (2 * 3) ** 2 * model.config.width if model.config.contrastive else 0
    assert counter.get_total_flops() == 3 * coco.flops(model.config) + cosines


# ------------------------------------------------------------------------------------------------------------
# Must stay green whatever the layer is: these know no architecture. pytest tests/test_model.py -k any_layer

PATHS = pytest.mark.parametrize("encoder", ["main", "auxiliary"])


@PATHS
def test_any_layer_gives_at_positions_what_it_gives_everywhere(encoder):
    model, batch = example(auxiliary_layers=2, auxiliary_width=8)
    encoder, tokens, positions = getattr(model, encoder), batch["tokens"], batch["masked"].flip(1)
    for padding in (False, tokens > 15, None):
        whole = coco.at_positions(encoder(tokens, padding), positions)
        close(encoder(tokens, padding, positions), array(whole))


@PATHS
def test_any_layer_ignores_padding_and_the_rest_of_the_batch(encoder):
    model, batch = example(auxiliary_layers=2)
    encoder, tokens = getattr(model, encoder), batch["tokens"].clone()
    lengths = (16, 5, 9)
    for row, length in zip(tokens, lengths):
        row[length:] = PAD
    together, order = encoder(tokens), torch.tensor([2, 0, 1])
    close(encoder(tokens[order])[order.argsort()][0], array(together[0]))
    for row, length, hidden in zip(tokens, lengths, together):
        close(hidden[:length], array(encoder(row[None, :length])[0]))  # alone, without padding
        close(hidden[:length], array(encoder(row[None, : length + 1][:, :16])[0, :length]))


@EACH_ABLATION
def test_any_layer_calls_every_linear_on_every_path(changes):
    """So that adapters (LoRA), hooks and quantised layers see all that the layer computes."""
    model, batch = example(**changes)
    linear = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    paths = [lambda: model(batch), lambda: model.main(batch["tokens"]), lambda: model.embed(batch["tokens"]),
             lambda: model.main(batch["tokens"], positions=batch["masked"])]
    fired = []
    for name, module in linear.items():
        module.register_forward_hook(lambda module, inputs, output, name=name: fired.append(name))
    for path, wanted in zip(paths, [linear] + [{n for n in linear if n.startswith("main.")}] * 3):
        fired.clear()
        path()
        assert set(fired) == set(wanted)


@EACH_ABLATION
def test_any_layer_sends_a_gradient_to_every_parameter(changes):
    model, batch = example(**changes)
    model(batch)[0]["loss"].backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and not p.grad.any()] == []


@pytest.mark.parametrize("changes", [dict(), dict(relative_positions=False)], ids=str)
def test_any_layer_takes_bfloat16_weights_and_export(changes):
    """Weights of another type, and torch.export with a dynamic batch and length."""
    model, batch = example(**changes)
    model.eval()
    whole = model.main(batch["tokens"])
    half = copy.deepcopy(model).bfloat16().main(batch["tokens"])
    assert half.dtype == torch.bfloat16 and (half.float() - whole).abs().max() < 0.2
    sizes = {"tokens": {0: torch.export.Dim("B", max=64), 1: torch.export.Dim("T", min=2, max=16)}}
    tokens = batch["tokens"][:2, :13].contiguous()  # or its stride would be a size to keep
    exported = torch.export.export(model.main, (tokens,), dynamic_shapes=sizes).module()
    for tokens in (batch["tokens"], batch["tokens"][:2, :7], batch["tokens"][:, :8]):
        close(exported(tokens), array(model.main(tokens)))


# ------------------------------------------------------------------------------------------------------------
# Equations and statistics


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


def parallel_cumsum(x, dim):
    """The sums that a GPU's threads compute together: element i adds i - 1, then i - 2, i - 4, ..."""
    for step in (2**k for k in range(x.shape[dim].bit_length())):
        x = torch.cat([x[..., :step], x[..., step:] + x[..., :-step]], dim=dim)
    return x


def test_sample_where_the_sum_is_parallel(monkeypatch):
    """Rounding lifts the cdf at tokens of probability zero; uniforms that hit just there find another."""
    logits = randn(4, 4096).masked_fill(randn(4, 4096, seed=1) > 0, -INF)
    cdf = parallel_cumsum(logits.softmax(-1), -1)
    row, before = ((cdf[:, 1:] > cdf[:, :-1]) & (logits[:, 1:] == -INF)).nonzero().T
    assert len(row) > 100
    uniforms = (cdf[row, before] + cdf[row, before + 1]) / 2 / cdf[row, -1]
    monkeypatch.setattr(torch.Tensor, "cumsum", parallel_cumsum)
    assert logits[row, coco.sample(logits[row], uniforms)].isfinite().all()


@pytest.mark.parametrize("function, slow, names", [
    (coco.mlm_loss, slow_cross_entropy, "logits targets"),
    (coco.copy_loss, slow_copy, "copy_logits same"),
    (coco.lm_loss_mixture, slow_mixture, "logits copy_logits targets same"),
    (coco.lm_loss_weighted, slow_weighted, "logits copy_logits targets"),
    (coco.cosines, lambda corrupted, crop: slow_cosines([*corrupted, *crop]), "corrupted crop"),
    (lambda *vectors: coco.scl_loss(coco.cosines(*vectors), 0.05),
     lambda *vectors: slow_scl(*vectors, 0.05), "corrupted crop"),
], ids=["mlm", "copy", "mixture", "weighted", "cosines", "scl"])
def test_equations(function, slow, names, dtype):
    inputs = dict(logits=3 * randn(4, 5, 13).to(dtype), copy_logits=3 * randn(4, 5, seed=1).to(dtype),
                  targets=randn(4, 5, 13, seed=2).argmax(-1), same=randn(4, 5, seed=3) > 0,
                  corrupted=randn(5, 7, seed=4).to(dtype), crop=randn(5, 7, seed=5).to(dtype))
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


@pytest.mark.parametrize("N", [1, 3, 8])
def test_scl_statistics(N):
    corrupted, crop = randn(N, 5), randn(N, 5) + 2 * randn(N, 5, seed=1)
    statistics = {name: x.tolist() for name, x in coco.scl_statistics(coco.cosines(corrupted, crop)).items()}
    squared = 2 - 2 * slow_cosines([*array(corrupted), *array(crop)])  # distances of unit vectors
    twin, itself = np.roll(np.arange(2 * N), N), np.eye(2 * N, dtype=bool)
    hits = (np.where(itself, INF, squared).argmin(1) == twin).sum()
    assert 0 < hits < 16  # of eight sequences, some twins are not the nearest
    assert statistics["scl_accuracy"] == [hits, 2 * N]
    distance = squared[np.arange(2 * N), twin].sum()
    assert statistics["alignment"] == pytest.approx([distance, 2 * N], rel=1e-5)
    if N == 1:  # there are no different sequences: nothing is counted, and no NaN gets into a sum
        assert statistics["uniformity"] == [0, 0]
    else:
        different = ~itself[:N, :N]
        means = [np.exp(-2 * view[different]).mean() for view in (squared[:N, :N], squared[N:, N:])]
        assert statistics["uniformity"] == pytest.approx([np.log(means).mean(), 1], rel=1e-5)


# ------------------------------------------------------------------------------------------------------------
# The whole model


@EACH_ABLATION
def test_a_batch_is_the_slow_one(changes):
    model, batch = example(**changes)
    losses, outputs = model(batch)
    statistics, expected = coco.statistics(batch, outputs), slow_forward(model, batch)
    same_losses(losses, expected[0])
    scl = {"scl_accuracy", "alignment", "uniformity"} if model.config.contrastive else set()
    assert statistics.keys() == expected[1].keys() | scl and outputs.keys() == expected[2].keys()
    for name, value in expected[1].items():
        close(statistics[name], value)
    for name, value in expected[2].items():
        close(outputs[name], value)
    assert not any(x.requires_grad for x in [*outputs.values(), *statistics.values()])
    assert all(x.ndim < 3 or x.shape[-1] != model.config.vocab_size for x in outputs.values())  # small
    with torch.no_grad():
        evaluated, _ = model(batch)
    same_losses(evaluated, expected[0])
    assert not any(loss.requires_grad for loss in evaluated.values())


@EACH_ABLATION
def test_gradient_is_the_finite_difference(changes):
    """Along a random direction of all that is trained; the sampled tokens are held, and what sg() stops too.

    Every parameter has a gradient: nothing is built that is not used. The auxiliary shares the embeddings,
    and nothing else; a frozen one shares nothing.
    """
    model, batch = example(**changes)
    c = model.config
    losses, outputs = model(batch)
    losses["loss"].backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    frozen = model.state_dict().keys() - trained
    assert frozen == {name for name in model.state_dict() if name.startswith(
        "auxiliary." if c.corruption == "frozen" else "auxiliary.embeddings.")}
    for name, parameter in trained.items():
        reached = parameter.grad.reshape(len(parameter), -1).any(dim=1)
        sparse = "embeddings" in name or "relative" in name  # rows that do not occur get none
        assert reached.any() if sparse or parameter.ndim == 1 else reached.all(), name
    exact, values = copy.deepcopy(model).double(), []
    stopped = c.token_task == "clm" and c.copy_mechanism and c.stop_gradient
    held = array(outputs["copy_logits"]) if stopped else None
    directions = {name: randn(*p.shape, seed=i).double() for i, (name, p) in enumerate(trained.items())}
    directions["main.embeddings.tokens.weight"][PAD] = 0  # a sampled [PAD] is looked up without a gradient
    for step in (1e-5, -1e-5):
        for name, parameter in trained.items():
            exact.get_parameter(name).data = parameter.data + step * directions[name]
        values.append(slow_forward(exact, batch, outputs["corrupted"], held)[0]["loss"])
    slope = sum((parameter.grad * directions[name]).sum().item() for name, parameter in trained.items())
    assert slope == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-4)


@pytest.mark.parametrize("lm_loss", ["mixture", "weighted"])
@pytest.mark.parametrize("kept", [0, 1, 3])
def test_what_may_be_sampled(monkeypatch, lm_loss, kept):
    """Some are the original: their copy target is 1, and they are part of the LM loss. The others are [PAD],
    attended to and counted like other tokens: packed text has no padding."""
    model, batch = example(lm_loss=lm_loss)
    sampled = batch["tokens"].gather(1, batch["masked"])
    sampled[:, kept:] = PAD
    monkeypatch.setattr(coco, "sample", lambda logits, uniforms: sampled)
    losses, outputs = model(batch)
    statistics = coco.statistics(batch, outputs)
    assert torch.equal(outputs["corrupted"], batch["tokens"].scatter(1, batch["masked"], sampled))
    same_losses(losses, slow_forward(model, batch, outputs["corrupted"])[0])
    assert statistics["replaced_fraction"].tolist() == [9 - 3 * kept, 48]
    assert statistics["lm_accuracy_replaced"][1] == 9 - 3 * kept


@pytest.mark.parametrize("corruption, rate, different_losses", [
    ("auxiliary", 0.0, 1), ("auxiliary", 0.5, 4), ("frozen", 0.0, 1)])
def test_sampling_is_free_of_dropout(corruption, rate, different_losses):
    """The main model's dropout reaches the auxiliary nowhere, the auxiliary's own only a loss that trains."""
    model, batch = example(corruption=corruption, dropout=0.5, auxiliary_dropout=rate)
    model.train()
    expected = slow_corrupt(model, batch)[0].tolist()
    passes = [model(batch) for _ in range(4)]
    assert all(outputs["corrupted"].tolist() == expected for _, outputs in passes)
    assert len({losses["mlm_loss"].item() for losses, _ in passes}) == different_losses
    assert len({losses["copy_loss"].item() for losses, _ in passes}) == 4
    same_losses(model.eval()(batch)[0], slow_forward(model, batch)[0])


@pytest.mark.parametrize("width, heads, auxiliary_width, auxiliary_heads", [
    (768, 12, 256, 4), (1024, 16, 384, 6), (128, 4, 8, 1)])
def test_heads_of_a_narrow_auxiliary(width, heads, auxiliary_width, auxiliary_heads):
    c = coco.Config(**{**SMALL, "width": width, "heads": heads, "auxiliary_width": auxiliary_width})
    assert coco.COCOLM(c).auxiliary.heads == auxiliary_heads


@pytest.mark.parametrize("changes", [dict(), dict(gather_negatives=False), dict(contrastive=False)], ids=str)
def test_gathered_vectors_are_negatives(changes):
    """The SCL vectors (2, B, D) if wanted, with their gradient; for the statistics mean vectors (B, D)."""
    model, batch = example(**changes)
    others, seen = 2 * randn(2, 4, 16, seed=9), {}

    def gather(vectors):
        seen[vectors.ndim] = vectors
        return torch.cat([vectors, others if vectors.ndim == 3 else others[0]], dim=-2)

    losses, outputs = model(batch, gather)
    assert seen.keys() == (set() if changes else {3})
    statistics = coco.statistics(batch, outputs, gather)
    assert torch.equal(seen[2], outputs["pooled"])
    assert statistics["mean_cosine"].tolist()[1] == 7 * 6
    if changes:
        assert seen.keys() == {2}
        same_losses(losses, slow_forward(model, batch)[0])
    else:
        assert seen[3].shape == (2, 3, 16) and seen[3].requires_grad and seen[3].dtype == torch.float32
        close(losses["scl_loss"], slow_scl(*array(torch.cat([seen[3], others], dim=1)), 1.0))
        assert statistics["scl_accuracy"].tolist()[1] == 14


@pytest.mark.parametrize("changes", [
    dict(), dict(auxiliary_width=32), dict(corruption="frozen"), dict(relative_init="local")], ids=str)
def test_initialisation(changes):
    torch.manual_seed(0)
    c = coco.Config(**{**SMALL, "vocab_size": 400, "width": 64, "heads": 4, **changes})
    for name, weight in coco.COCOLM(c).state_dict().items():
        if "bias" in name:
            assert not weight.any(), name
        elif weight.ndim == 1:
            assert (weight == 1).all(), name  # of a LayerNorm
        else:
            if name.endswith("tokens.weight"):
                assert weight.any(dim=1).tolist() == [token != c.pad_id for token in range(400)]
                weight = weight[:c.pad_id]
            if "relative" in name and c.relative_init == "local":
                weight = weight - coco.local_relative_table(c.relative_bins, weight.shape[1], c.max_distance)
            error = 5 / math.sqrt(2 * weight.numel())  # five standard errors of a standard deviation
            assert weight.std().item() == pytest.approx(0.02, rel=error), name
            assert abs(weight.mean()) < 5 * 0.02 / math.sqrt(weight.numel()), name


# ------------------------------------------------------------------------------------------------------------
# What the authors' own code computed; test_release.py has more of it


def test_fairseq_forward(monkeypatch):
    """Our forward as a whole on the row without padding, given what was sampled there."""
    groups = {"param": {}, "in": {}, "out": {}}
    for key, values in np.load(FIXTURES / "fairseq_tiny.npz").items():
        group, name = key.split("/")
        groups[group][name] = torch.from_numpy(values)
    weights, inputs, outputs = convert.rename(groups["param"]), groups["in"], groups["out"]
    model = convert.make_model(weights, convert.make_config(weights, {"max_rel_pos": 12}))[0].eval()
    tokens, corrupted, mask, crop = (inputs[name][:1] for name in ("tokens", "corrupted", "mask", "crop"))
    sampled, seen, T = inputs["sampled"][:3].view(1, 3), [], tokens.shape[1]
    monkeypatch.setattr(coco, "sample", lambda logits, uniforms: seen.append(logits) or sampled)
    batch = dict(tokens=tokens, masked=mask.nonzero()[:, 1].view(1, 3), uniforms=torch.zeros(1, 3), crop=crop)
    losses, found = model(batch)
    close(seen[0][0], array(outputs["auxiliary_logits"][:3]))
    close(found["copy_logits"][0], array(outputs["copy_logits"][:T]))
    close(found["scl_vectors"][:, 0], array(torch.stack([outputs["seq_emb"][0], outputs["crop_seq_emb"][0]])))
    assert torch.equal(found["corrupted"], corrupted)
    assert torch.equal(found["lm_tokens"][0], outputs["lm_logits"][:3].argmax(-1))
    same_losses(losses, slow_forward(model, batch, corrupted)[0])


# ------------------------------------------------------------------------------------------------------------
# Vectors of texts


@pytest.mark.parametrize("changes", [dict(), dict(contrastive=False), dict(token_task="mlm")], ids=str)
def test_embed(changes):
    """Equal to one text at a time without padding, in more than one batch, with dropout and without order."""
    model, _ = example(dropout=0.5, **changes)
    lengths = torch.randint(1, 17, (70,))
    tokens = torch.randint(0, PAD, (70, 16)).masked_fill(torch.arange(16) >= lengths[:, None], PAD)
    slow = [model.eval().main(row[None, :n])[0].detach().double().mean(0) for row, n in zip(tokens, lengths)]
    slow = torch.stack([(vector / vector.square().sum().sqrt()).float() for vector in slow])
    model.train()
    for batch_size in (64, 7):
        vectors = model.embed(tokens, batch_size)
        close(vectors, slow)
        assert vectors.dtype == torch.float32 and not vectors.requires_grad and model.training
    with torch.autocast("cpu", torch.bfloat16):
        vectors = model.embed(tokens)
    assert vectors.dtype == torch.float32 and (vectors - slow).abs().max() < 0.05


def test_embed_of_nothing():
    """Rows of nothing but padding give zeros, alone and beside others; no rows give no vectors."""
    model, batch = example()
    nothing = torch.full((2, 16), PAD)
    assert torch.equal(model.embed(nothing), torch.zeros(2, 16))
    mixed = model.embed(torch.cat([nothing, batch["tokens"]]))
    assert torch.equal(mixed[:2], torch.zeros(2, 16))
    close(mixed[2:], array(model.embed(batch["tokens"])))
    assert model.main(nothing).isfinite().all()
    assert model.embed(torch.zeros(0, 0, dtype=torch.long)).shape == (0, 16)
    assert torch.equal(model.embed(torch.zeros(3, 0, dtype=torch.long)), torch.zeros(3, 16))


@pytest.mark.parametrize("texts", ["hello", ["hello"]], ids=str)
def test_texts_are_not_token_ids(texts):
    model, batch = example()
    with pytest.raises(TypeError, match="tokenizer.batch"):
        model.embed(texts)
    with pytest.raises(TypeError, match="embed"):
        model(batch["tokens"])
    with pytest.raises(ValueError, match="17 tokens"):
        model.main(torch.ones(1, 17, dtype=torch.long))
