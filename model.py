"""COCO-LM in one file: the two Transformers, their heads and their losses.

    X  original      [CLS] the cat sat on the mat ...
    X' masked        [CLS] the [M] sat on the [M] ...     15 % of the tokens, all of them replaced by [MASK]
          |  auxiliary Transformer: predicts the masked tokens, and one token is sampled at each of them
    X^MLM corrupted  [CLS] the dog sat on the mat ...     a sampled token can happen to be the original one
          |  main Transformer
          +--> copy head: at every token, is this token the original one?
          +--> LM head: at the masked positions, which token was it?
          +--> [CLS] vector, contrasted with the [CLS] vector of
    X^crop           [CLS] sat on the ...                 a random contiguous 90 % of X, through the main too

Read from the top: everything is introduced before it is used. Files and processes are train.py's.

Sources of the facts, as the docstrings cite them:
  [paper]  Meng et al., "COCO-LM: Correcting and Contrasting Text Sequences for Language Model Pretraining",
           NeurIPS 2021, arXiv 2102.08473
  [model]  the authors' model and fine-tuning code, github.com/microsoft/COCO-LM
  [loss]   the loss skeleton that the first author published in issue 2 of that repository
  [ours]   a decision of this project

Shapes: B sequences, T tokens, K masked positions a sequence, H heads, d = head width, D width, V vocabulary,
N sequences of all processes together.
"""

import math
import re
from dataclasses import dataclass, fields
from typing import Literal, get_args

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# ------------------------------------------------------------------------------------------------------------
# Configuration


@dataclass
class Config:
    """All that decides what the model is and what it learns; stored in every checkpoint.

    Without a preset, the sizes are those of base. A value that a type or RANGES does not allow, and a setting
    that has no effect beside another one, raises ValueError.
    """

    vocab_size: int
    pad_id: int = None   # default: the fourth token from the end, as in data.py's tokenizers
    mask_id: int = None  # default: the last token

    # Sizes [paper, model]; a preset changes some of them
    max_len: int = 512         # tokens in a sequence, [CLS] included
    layers: int = 12           # of the main Transformer
    width: int = 768           # of the hidden states
    heads: int = 12            # of the attention
    ffn_width: int = 3072      # inner width of the feed-forward layers
    auxiliary_layers: int = 4  # of the auxiliary Transformer
    dropout: float = 0.1       # on embeddings, attention and sub-layer outputs
    relative_bins: int = 32    # entries of the relative-position table
    max_distance: int = 128    # tokens; all distances beyond share the last bin
    relative_init: Literal["normal", "local"] = "normal"  # start of the relative-position table

    # The objective
    mask_fraction: float = 0.15   # masked share of the tokens after [CLS] [paper]
    crop: float = 0.9             # length of the crop, share of the tokens after [CLS] [paper]
    temperature: float = 1.0      # of the contrastive softmax [paper, loss]
    lambda_copy: float = 50.0     # weight of the copy loss [paper, model]
    lambda_scl: float = 1.0       # weight of the contrastive loss [paper, model]

    # Ablations
    token_task: Literal["clm", "rtd", "all_token_mlm", "mlm"] = "clm"  # rtd: detect only; mlm: BERT's task
    lm_loss: Literal["mixture", "weighted"] = "mixture"  # mixture [paper] | weighted [loss]
    copy_mechanism: bool = True    # False: plain cross-entropy at the masked positions, beside the copy loss
    stop_gradient: bool = True     # False: the LM loss trains the copy head, too
    contrastive: bool = True       # False: no sequence contrastive learning
    gather_negatives: bool = True  # False: contrast only with the sequences of the same process
    relative_positions: bool = True  # False: absolute positions only
    corruption: Literal["auxiliary", "random", "frozen"] = "auxiliary"  # frozen: the auxiliary does not learn
    auxiliary_width: int = 0       # 0: as wide as the main Transformer
    auxiliary_dropout: float = 0.0  # above 0: samples from a second pass, without dropout

    def __post_init__(self):
        c = self
        c.pad_id = c.vocab_size - 4 if c.pad_id is None else c.pad_id
        c.mask_id = c.vocab_size - 1 if c.mask_id is None else c.mask_id
        c.auxiliary_width = c.auxiliary_width or c.width
        for field in fields(c):
            value, choices = getattr(c, field.name), get_args(field.type)
            if choices and value not in choices:
                raise ValueError(f"{field.name}={value!r} has to be one of {', '.join(map(str, choices))}.")
            low, high = RANGES.get(field.name, (0, math.inf))
            if field.type in (int, float) and not (low <= value <= high and math.isfinite(value)):
                raise ValueError(f"{field.name}={value} has to be finite, and from {low} to {high}.")
        mixes = c.token_task == "clm" and c.copy_mechanism  # in all_token_mlm the LM loss trains that head
        for name, has_effect in {"corruption": c.token_task != "mlm", "copy_mechanism": c.token_task == "clm",
                                 "lm_loss": mixes, "stop_gradient": mixes}.items():
            if not has_effect and getattr(c, name) != getattr(Config, name):
                raise ValueError(f"{name}={getattr(c, name)} has no effect with token_task={c.token_task}, "
                                 f"copy_mechanism={c.copy_mechanism}.")
        for wrong, problem in (
            (not 0 <= c.pad_id < c.vocab_size, f"pad_id={c.pad_id} is not in the vocabulary"),
            (not 0 <= c.mask_id < c.vocab_size, f"mask_id={c.mask_id} is not in the vocabulary"),
            (c.width % c.heads, f"width={c.width} is not a multiple of heads={c.heads}"),
            (c.auxiliary_width > c.width, f"auxiliary_width={c.auxiliary_width} is above width={c.width}"),
            (c.relative_bins % 4, f"relative_bins={c.relative_bins} is not a multiple of 4"),
            (c.max_distance <= c.relative_bins // 4 + 1, f"max_distance={c.max_distance} is too small"),
            (not c.masked or not c.crop_len, f"max_len={c.max_len} is too short to mask and to crop"),
        ):
            if wrong:
                raise ValueError(problem + ".")

    @classmethod
    def from_preset(cls, preset, **changes):
        """`Config.from_preset("base", vocab_size=32768, crop=0.8)`"""
        return cls(**{**PRESETS[preset], **changes})

    @property
    def masked(self):
        """Masked positions of every sequence: all shapes are static, and means of means are means. [ours]"""
        return round(self.mask_fraction * (self.max_len - 1))

    @property
    def crop_len(self):
        """Tokens of the crop, without its own [CLS]."""
        return round(self.crop * (self.max_len - 1))


RANGES = {  # a number is finite and not negative; these have a tighter range, both ends included
    **dict.fromkeys(("layers", "width", "heads", "ffn_width", "auxiliary_layers"), (1, 2**22)),
    "vocab_size": (8, 2**31 - 1), "max_len": (8, 2**20), "relative_bins": (8, 4096),
    "max_distance": (4, 2**20), "dropout": (0, 0.9), "auxiliary_dropout": (0, 0.9), "mask_fraction": (0.01, 0.4),
    "crop": (0.01, 1), "temperature": (1e-3, math.inf),
}

PRESETS = {  # what differs from Config's sizes, which are those of base
    # [ours] learns something in minutes on two CPU cores, thanks to relative_init="local"
    "tiny": dict(max_len=128, layers=2, width=128, heads=4, ffn_width=512, auxiliary_layers=1, dropout=0.0,
                 relative_init="local"),
    "small": dict(width=256, heads=4, ffn_width=1024, auxiliary_layers=2),  # [model]
    "base": dict(),  # [paper, model]
    "base++": dict(relative_bins=64),  # [model]
    "large++": dict(layers=24, width=1024, heads=16, ffn_width=4096, auxiliary_layers=6, relative_bins=128,
                    max_distance=256),  # [paper, model]
}


# ------------------------------------------------------------------------------------------------------------
# The Transformer


def relative_position_bucket(distance, bins, max_distance):
    """Bins (0 .. bins-2) of signed distances = key position - query position, an integer tensor. [model]

    Near distances have a bin each, far ones share bins that widen with the logarithm; the sign is kept.
    (T5's formula is another one.) With bins=8, max_distance=12, for distance -12 .. 12:

        -12 -11 -10 -9 -8 -7 -6 -5 -4 -3 -2 -1  0  1  2  3  4  5  6  7  8  9 10 11 12
          0   0   0  0  0  0  0  0  0  0  1  2  3  4  5  6  6  6  6  6  6  6  6  6  6
    """
    half, exact = bins // 2, bins // 4
    size = distance.abs()
    log_ratio = torch.log(size.clamp(min=exact) / exact) / math.log((max_distance - 1) / exact)
    far = exact + torch.ceil(log_ratio * (half - 1 - exact)).long()
    bucket = torch.where(size < exact, size, far).clamp(max=half - 1)
    return bucket * distance.sign() + half - 1


def local_relative_table(bins, heads, max_distance):
    """A start for the relative-position table, (bins, heads), from which small models learn. [ours, measured]

    Of every four heads one looks left, one right, one around and one everywhere. From normal(0, 0.02) all
    hidden states of a small model become equal, and it never learns more than how frequent each token is.
    """
    distance = torch.arange(-max_distance, max_distance + 1)
    bucket = relative_position_bucket(distance, bins, max_distance)
    inside = F.one_hot(bucket, bins).float()
    d = (inside.T @ distance.float()) / inside.sum(0).clamp(min=1)  # (bins,) the mean distance in a bin
    left = torch.where(d < 0, d + 1, -6.0)
    right = torch.where(d > 0, 1 - d, -6.0)
    patterns = torch.stack([left, right, -0.3 * d.abs(), torch.zeros(bins)], dim=1).clamp(min=-8)  # (bins, 4)
    return patterns[:, torch.arange(heads) % 4]


def drop(x, dropout):
    """Dropout: zeros with this probability, and the rest scaled so that the mean stays.

    On the CPU torch's own costs as much as the matrix product before it. There the mask is made of random
    bytes, eight from one draw, so the probability is a multiple of 1/256: 0.1 is 26/256 = 0.1016.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling() or not dropout:
        return F.dropout(x, dropout)
    dropped = max(1, round(dropout * 256))  # of the 256 values of a byte
    draws = torch.empty((x.numel() + 7) // 8, dtype=torch.int64).random_(-(2**63), None)  # all 64 bits
    kept = draws.view(torch.uint8)[: x.numel()].view(x.shape).ge_(dropped)  # 1 or 0; in place, or it is slow
    return (x * kept.to(x.dtype)).mul_(256 / (256 - dropped))


def attention(q, k, v, bias, dropout):
    """softmax(q k^T / sqrt(d) + bias) v, with q (B, H, Q, d), k and v (B, H, T, d), bias (B, H, Q, T).

    CUDA's fused kernels take the bias, in the type of q, and the dropout. On the CPU both send
    scaled_dot_product_attention to its slow path, so there it is written out.
    """
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
    B, H, Q, d = q.shape
    q, k, v, bias = (x.reshape(B * H, *x.shape[2:]) for x in (q, k, v, bias))
    logits = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=d**-0.5)  # (B * H, Q, T)
    return (drop(logits.softmax(-1), dropout) @ v).view(B, H, Q, d)


def at_positions(x, positions):
    """What stands at positions (B, K) of x (B, T, D): (B, K, D)"""
    return x.gather(1, positions[..., None].expand(-1, -1, x.shape[-1]))


class Layer(nn.Module):
    """One post-LN Transformer layer: attention, add, norm, feed-forward, add, norm. [model]"""

    def __init__(self, width, heads, ffn_width):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)  # rows: all of q, then k, then v
        self.attention_out = nn.Linear(width, width)
        self.attention_norm = nn.LayerNorm(width, eps=1e-5)
        self.ffn_in = nn.Linear(width, ffn_width)
        self.ffn_out = nn.Linear(ffn_width, width)
        self.ffn_norm = nn.LayerNorm(width, eps=1e-5)

    def forward(self, x, bias, dropout, positions=None):
        """x (B, T, D), bias (B, H, T, T) -> (B, T, D); with positions (B, K), bias (B, H, K, T) -> (B, K, D)"""
        D = x.shape[-1]
        if positions is None:
            q, k, v = self.qkv(x).chunk(3, dim=-1)
        else:  # keys and values of all positions, queries of a few
            k, v = F.linear(x, self.qkv.weight[D:], self.qkv.bias[D:]).chunk(2, dim=-1)
            x = at_positions(x, positions)
            q = F.linear(x, self.qkv.weight[:D], self.qkv.bias[:D])
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))  # (B, H, T, d)
        y = attention(q, k, v, bias, dropout).transpose(1, 2).flatten(2)  # (B, T, D)
        x = self.attention_norm(x + drop(self.attention_out(y), dropout))
        y = self.ffn_out(F.gelu(self.ffn_in(x)))
        return self.ffn_norm(x + drop(y, dropout))


class Embeddings(nn.Module):
    """Token + learned absolute position embedding, then LayerNorm [model]. Both Transformers share one.

    The authors' auxiliary without dropout shares the token embedding alone; here it always shares all. [ours]
    """

    def __init__(self, config):
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.width, padding_idx=config.pad_id)
        self.positions = nn.Embedding(config.max_len, config.width)
        self.norm = nn.LayerNorm(config.width, eps=1e-5)

    def forward(self, tokens):
        """(B, T) -> (B, T, D)"""
        T, longest = tokens.shape[1], self.positions.num_embeddings
        assert T <= longest, f"a sequence of {T} tokens is longer than the model's {longest} positions"
        return self.norm(self.tokens(tokens) + self.positions.weight[:T])


class Encoder(nn.Module):
    """A stack of layers on the embeddings; both the main and the auxiliary Transformer are one."""

    recompute = False  # True: keep the layers' inputs alone, and compute the rest once more for the gradient

    def __init__(self, config, embeddings, layers, width, dropout):
        super().__init__()
        self.pad_id, self.dropout, self.embeddings = config.pad_id, dropout, embeddings
        scale = width / config.width  # a narrow auxiliary has fewer heads, of about the same width
        divisors = (h for h in range(1, config.heads + 1) if width % h == 0)
        heads = min(divisors, key=lambda h: abs(h - config.heads * scale))
        self.narrow = nn.Linear(config.width, width) if width != config.width else nn.Identity()
        ffn_width = round(config.ffn_width * scale)
        self.layers = nn.ModuleList(Layer(width, heads, ffn_width) for _ in range(layers))
        self.heads = heads
        if config.relative_positions:
            self.relative = nn.Embedding(config.relative_bins, heads)  # one table for all layers
            position = torch.arange(config.max_len)
            distance = position[None, :] - position[:, None]  # (T, T) key - query
            bucket = relative_position_bucket(distance, config.relative_bins, config.max_distance)
            self.register_buffer("bucket", bucket, persistent=False)  # (T, T)
        else:
            self.relative = None

    def bias(self, padding):
        """What is added to the attention logits: relative positions, and -inf at padding keys. (B, H, T, T)

        In the type that attention computes in, and with rows that start at multiples of 8 elements: CUDA's
        fused kernels want both, and would make a copy in every layer otherwise.
        """
        B, T = padding.shape
        if self.relative is None:
            bias = torch.zeros(1, self.heads, T, T, device=padding.device)
        else:
            bias = self.relative(self.bucket[:T, :T]).permute(2, 0, 1)[None]  # (1, H, T, T)
        if torch.is_autocast_enabled(padding.device.type):
            bias = bias.to(torch.get_autocast_dtype(padding.device.type))
        padding = F.pad(padding, (0, -T % 8))[:, None, None, :]
        return F.pad(bias, (0, -T % 8)).masked_fill(padding, -math.inf)[..., :T]

    def forward(self, tokens, padding=None, positions=None, dropout=None):
        """Hidden states (B, T, D) of tokens (B, T).

        padding: (B, T), True where there is no token; default: at [PAD]. Corrupted text needs the padding of
            the original text, since the auxiliary may well sample [PAD].
        positions: (B, K), if the output is wanted only there: (B, K, D). The last layer skips the rest.
        dropout: the rate; default: the model's in training, 0 in evaluation.
        """
        if padding is None:
            padding = tokens == self.pad_id
        if dropout is None:
            dropout = self.dropout if self.training else 0.0
        x = self.narrow(drop(self.embeddings(tokens), dropout))
        bias = self.bias(padding)
        for layer in self.layers[:-1]:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, x, bias, dropout, use_reentrant=False)
            else:
                x = layer(x, bias, dropout)
        if positions is not None:
            index = positions[:, None, :, None].expand(-1, bias.shape[1], -1, bias.shape[3])
            bias = bias.gather(2, index)  # (B, H, K, T)
        return self.layers[-1](x, bias, dropout, positions)


# ------------------------------------------------------------------------------------------------------------
# Heads


class Transform(nn.Sequential):
    """dense -> GELU -> LayerNorm: the SCL head, and the first half of the auxiliary's MLM head. [model]"""

    def __init__(self, width):
        super().__init__(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width, eps=1e-5))


class Auxiliary(Encoder):
    """The shallow Transformer that corrupts the text: an encoder with an MLM head on tied embeddings."""

    def __init__(self, config, embeddings):
        width = config.auxiliary_width
        super().__init__(config, embeddings, config.auxiliary_layers, width, config.auxiliary_dropout)
        self.transform = Transform(width)
        self.widen = nn.Linear(width, config.width) if width != config.width else nn.Identity()  # [ours]
        self.output_bias = nn.Parameter(torch.zeros(config.vocab_size))

    def logits(self, hidden):
        """(..., D) -> (..., V)"""
        return F.linear(self.widen(self.transform(hidden)), self.embeddings.tokens.weight, self.output_bias)


# ------------------------------------------------------------------------------------------------------------
# Equations. All of them compute in float32, whatever the autocast type.


def sample(logits, uniforms):
    """One token per row of logits (..., V), by inverse CDF at uniforms (...) in [0, 1). [ours]

        probabilities .2 .0 .5 .3  ->  cdf .2 .2 .7 1.  ->  uniform .1 gives 0, .2 and .69 give 2, .7 gives 3

    right=True never gives a token of probability zero; without its last column the cdf never gives V.
    """
    cdf = logits.float().softmax(-1).cumsum(-1)
    thresholds = uniforms[..., None] * cdf[..., -1:]
    return torch.searchsorted(cdf[..., :-1].contiguous(), thresholds, right=True)[..., 0]


def mlm_loss(logits, targets):
    """-log p(x_i) at each masked position. [paper]  (..., V), (...) -> (...)"""
    losses = F.cross_entropy(logits.float().flatten(0, -2), targets.flatten(), reduction="none")
    return losses.view(targets.shape)


def copy_loss(copy_logits, same):
    """Binary cross-entropy of p_copy = sigmoid(w.h + c) with 1[x^MLM_i = x_i] at each token [paper, model]"""
    return F.binary_cross_entropy_with_logits(copy_logits.float(), same.float(), reduction="none")


def lm_loss_mixture(lm_logits, copy_logits, targets, same):
    """-log( 1[same] p_copy + (1 - p_copy) softmax(lm_logits)[target] ) at each position. [paper, its L_LM]

    In the log domain: p_copy reaches 0 and 1 in float32 long before its logit stops meaning something.
    """
    copy_logits = copy_logits.float()
    log_copy = F.logsigmoid(copy_logits).masked_fill(~same, -math.inf)
    log_correct = F.logsigmoid(-copy_logits) - mlm_loss(lm_logits, targets)
    return -torch.logaddexp(log_copy, log_correct)


def lm_loss_weighted(lm_logits, copy_logits, targets):
    """(1 - p_copy) * -log softmax(lm_logits)[target] at each position. [loss]"""
    return torch.sigmoid(-copy_logits.float()) * mlm_loss(lm_logits, targets)


def cosines(corrupted, crop):
    """Cosines between all 2N sequence vectors, (2N, 2N), from corrupted and crop (N, D)."""
    vectors = F.normalize(torch.cat([corrupted, crop]).float(), dim=-1)
    with torch.autocast(vectors.device.type, enabled=False):
        return vectors @ vectors.T


def scl_loss(cosine, temperature):
    """-log softmax of each vector's twin among the 2N - 1 others, mean over the 2N. [paper, loss]

    (2N, 2N) -> (). The twin of vector i is i + N, the crop of the same sequence, and the other way round.
    """
    N = len(cosine) // 2
    itself = torch.eye(2 * N, dtype=torch.bool, device=cosine.device)
    logits = (cosine / temperature).masked_fill(itself, -math.inf)
    return F.cross_entropy(logits, torch.arange(2 * N, device=cosine.device).roll(N))


# ------------------------------------------------------------------------------------------------------------
# Statistics that tell whether it works. Each is a pair (sum, count), so that batches and processes add up.


def pair(values, where=None):
    """Sum and count of the values where `where` is true (everywhere if None), (2,) in float32."""
    where = torch.ones_like(values, dtype=torch.float32) if where is None else where.float()
    return torch.stack([(values.float() * where).sum(), where.sum()])


def scl_statistics(cosine):
    """How well the sequence vectors tell sequences apart, from their cosines (2N, 2N).

    scl_accuracy: how often the twin is the nearest (chance: 1 / (2N - 1)). alignment: mean squared distance
    of twins. uniformity: log mean exp(-2 squared distance) of different sequences, averaged over corrupted
    and cropped ones [Wang & Isola, 2020]. The squared distance of unit vectors is 2 - 2 cosine.
    """
    N = len(cosine) // 2
    twin = torch.arange(2 * N, device=cosine.device).roll(N)
    itself = torch.eye(2 * N, dtype=torch.bool, device=cosine.device)
    kernel = torch.exp(4 * cosine - 4).masked_fill(itself, 0.0)
    means = torch.stack([kernel[:N, :N].sum(), kernel[N:, N:].sum()]) / max(N * (N - 1), 1)
    return {
        "scl_accuracy": pair(cosine.masked_fill(itself, -math.inf).argmax(-1) == twin),
        "alignment": pair(2 - 2 * cosine.gather(1, twin[:, None])),
        "uniformity": pair(means.clamp(min=1e-9).log().mean(), torch.full((), N > 1, device=cosine.device)),
    }


def mean_cosine(pooled):
    """Cosines of the mean-pooled hidden states of different sequences: near 1, all texts look the same to the
    model.  (N, D) -> (2,)"""
    unit = F.normalize(pooled.float(), dim=-1)
    N = len(unit)
    return torch.stack([unit.sum(0).square().sum() - N, torch.full((), N * (N - 1.0), device=unit.device)])


# ------------------------------------------------------------------------------------------------------------
# COCO-LM


class COCOLM(nn.Module):
    """The auxiliary and the main Transformer with their heads. Only what the configuration uses is built.

    >>> model = COCOLM(Config.from_preset("tiny", vocab_size=8192))
    >>> hidden = model.main(tokens)                         # (B, T) -> (B, T, D)
    >>> vectors = model.embed(tokens)                       # (B, T) -> (B, D), of length 1
    >>> losses, statistics, predictions = model(batch)      # one pretraining step's losses
    """

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        embeddings = Embeddings(c)
        self.main = Encoder(c, embeddings, c.layers, c.width, c.dropout)
        if c.token_task != "mlm" and c.corruption != "random":
            self.auxiliary = Auxiliary(c, Embeddings(c) if c.corruption == "frozen" else embeddings)
        if c.token_task != "mlm":
            self.copy_head = nn.Linear(c.width, 1)
        if c.token_task != "rtd":
            self.lm_bias = nn.Parameter(torch.zeros(c.vocab_size))  # LM head: tied embedding + bias
        if c.contrastive:
            self.scl_head = Transform(c.width)
        self.apply(self.initialize)
        if c.corruption == "frozen":
            self.auxiliary.requires_grad_(False)

    def initialize(self, module):
        """normal(0, 0.02) for every linear and embedding weight, zero biases, zero padding row. [model]"""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            nn.init.zeros_(module.weight[module.padding_idx].detach())
        c = self.config
        if isinstance(module, Encoder) and module.relative is not None and c.relative_init == "local":
            table = local_relative_table(c.relative_bins, module.heads, c.max_distance)
            module.relative.weight.data.add_(table)  # children come first: the small noise is there already

    def train(self, mode=True):
        super().train(mode)
        if self.config.corruption == "frozen":
            self.auxiliary.eval()
        return self

    def lm_logits(self, hidden):
        """The main model's LM head: E h + b.  (..., D) -> (..., V)"""
        return F.linear(hidden, self.main.embeddings.tokens.weight, self.lm_bias)

    @torch.no_grad()
    def embed(self, tokens, batch_size=64):
        """Vectors of texts: the mean of the main Transformer's hidden states, scaled to length 1.

        tokens (B, T), padded -> (B, D), float32. Sorted by length, so that a batch has little padding. Of
        [CLS], the SCL head and this mean, the mean was closest to human scores of similarity. [ours]
        """
        place = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)  # (T,)
        lengths = ((tokens != self.config.pad_id) * place).amax(1)  # (B,)
        vectors = torch.empty(len(tokens), self.config.width)
        for rows in lengths.argsort().split(batch_size):
            part = tokens[rows, : lengths[rows].max()].to(self.main.embeddings.tokens.weight.device)
            hidden = self.main(part, dropout=0.0).float()  # (rows, T, D)
            counted = (part != self.config.pad_id)[..., None]  # (rows, T, 1)
            vectors[rows] = F.normalize((hidden * counted).sum(1), dim=-1).to(vectors.device)
        return vectors

    def corrupt(self, batch, padding, losses, statistics):
        """The corrupted text X^MLM (B, T): the masked positions hold what the auxiliary samples."""
        c, tokens, masked = self.config, batch["tokens"], batch["masked"]
        originals = tokens.gather(1, masked)  # (B, K)
        if c.corruption == "random":
            sampled = (batch["uniforms"] * c.vocab_size).long().clamp(max=c.vocab_size - 1)
            return tokens.scatter(1, masked, sampled)
        masked_tokens = tokens.scatter(1, masked, c.mask_id)
        with torch.set_grad_enabled(torch.is_grad_enabled() and c.corruption != "frozen"):
            logits = self.auxiliary.logits(self.auxiliary(masked_tokens, padding, masked))  # (B, K, V)
            losses["mlm_loss"] = mlm_loss(logits, originals).mean()
        with torch.no_grad():  # no gradient flows back through the choice of a token
            if self.auxiliary.training and c.auxiliary_dropout > 0:
                logits = self.auxiliary.logits(self.auxiliary(masked_tokens, padding, masked, dropout=0.0))
            sampled = sample(logits, batch["uniforms"])
            if statistics is not None:
                statistics["mlm_accuracy"] = pair(logits.argmax(-1) == originals)
        return tokens.scatter(1, masked, sampled)

    def passes(self, batch, with_statistics=True):
        """All within one process -> losses, statistics, predictions and the SCL vectors (2, B, D) or None."""
        c, tokens, masked = self.config, batch["tokens"], batch["masked"]
        losses, statistics, predictions, vectors = {}, {} if with_statistics else None, {}, None
        padding = tokens == c.pad_id  # (B, T)
        real = (~padding).float()
        originals = tokens.gather(1, masked)  # (B, K)
        if c.token_task == "mlm":
            corrupted = tokens.scatter(1, masked, c.mask_id)
        else:
            corrupted = self.corrupt(batch, padding, losses, statistics)
        same = corrupted == tokens  # (B, T)
        same_masked = same.gather(1, masked)  # (B, K)
        hidden = self.main(corrupted, padding)  # (B, T, D)

        if c.token_task != "mlm":
            copy_logits = self.copy_head(hidden)[..., 0].float()  # (B, T)
        if c.token_task in ("clm", "rtd"):
            losses["copy_loss"] = (copy_loss(copy_logits, same) * real).sum() / real.sum()

        if c.token_task == "all_token_mlm":  # the mixture at every token: its one loss trains both heads
            lm_logits = self.lm_logits(hidden)  # (B, T, V)
            each = lm_loss_mixture(lm_logits, copy_logits, tokens, same)  # (B, T)
            losses["lm_loss"] = (each * real).sum() / real.sum()
            lm_logits = at_positions(lm_logits.detach(), masked)  # (B, K, V)
        elif c.token_task != "rtd":
            lm_logits = self.lm_logits(at_positions(hidden, masked))  # (B, K, V)
            if c.token_task == "mlm" or not c.copy_mechanism:
                each = mlm_loss(lm_logits, originals)  # (B, K)
            else:
                at_masked = copy_logits.gather(1, masked)  # (B, K)
                at_masked = at_masked.detach() if c.stop_gradient else at_masked
                if c.lm_loss == "mixture":
                    each = lm_loss_mixture(lm_logits, at_masked, originals, same_masked)
                else:
                    each = lm_loss_weighted(lm_logits, at_masked, originals)
            losses["lm_loss"] = each.mean()

        if c.contrastive:  # the crop goes through the main model alone, and only its [CLS] is wanted
            crop_hidden = self.main(batch["crop"], positions=torch.zeros_like(masked[:, :1]))  # (B, 1, D)
            vectors = torch.stack([self.scl_head(hidden[:, 0]), self.scl_head(crop_hidden[:, 0])]).float()

        if with_statistics:
            predictions["corrupted"] = corrupted
            if c.token_task != "mlm":
                predictions["copy_logits"] = copy_logits.detach()
                says_original = predictions["copy_logits"] > 0
                statistics["replaced_fraction"] = pair(~same, real)
                statistics["copy_accuracy_original"] = pair(says_original, same * real)
                statistics["copy_accuracy_replaced"] = pair(~says_original, ~same * real)
            if c.token_task != "rtd":
                predictions["lm_tokens"] = lm_logits.detach().argmax(-1)  # (B, K)
                statistics["lm_accuracy_replaced"] = pair(predictions["lm_tokens"] == originals, ~same_masked)
            total = (hidden.detach().float() * real[..., None]).sum(1)
            predictions["pooled"] = total / real.sum(1, keepdim=True)  # (B, D)
        return losses, statistics, predictions, vectors

    def forward(self, batch, gather=None, with_statistics=True):
        """Losses, statistics and predictions of one batch:

            tokens    (B, T)  the original text, [CLS] first
            masked    (B, K)  positions that are masked
            uniforms  (B, K)  in [0, 1): the randomness of the auxiliary's sampling
            crop      (B, C)  [CLS] and a contiguous part of the original

        gather: a function from a process' sequence vectors (..., B, D) to those of all processes (..., N, D).
        -> losses: `loss`, which is trained, and its terms `mlm_loss`, `copy_loss`, `lm_loss`, `scl_loss`: ();
           statistics: name -> (sum, count); predictions: `corrupted` and `copy_logits` (B, T), `lm_tokens`
           (B, K), `pooled` (B, D), the mean hidden states. Without statistics the last two are empty.
        """
        c = self.config
        assert isinstance(batch, dict), "a batch is a dict; for token ids call model.embed or model.main"
        losses, statistics, predictions, vectors = self.passes(batch, with_statistics)
        if with_statistics:
            pooled = predictions["pooled"][None]
            statistics["mean_cosine"] = mean_cosine((pooled if gather is None else gather(pooled))[0])
        if vectors is not None:
            if gather is not None and c.gather_negatives:
                vectors = gather(vectors)
            cosine = cosines(*vectors)
            losses["scl_loss"] = scl_loss(cosine, c.temperature)
            if with_statistics:
                statistics.update(scl_statistics(cosine.detach()))
        weights = {"mlm_loss": 0.0 if c.corruption == "frozen" else 1.0, "copy_loss": c.lambda_copy,
                   "lm_loss": 1.0, "scl_loss": c.lambda_scl}
        losses["loss"] = sum(weights[name] * loss for name, loss in losses.items())
        return losses, statistics, predictions


def flops(c):
    """Floating-point operations of training on one sequence: all matrix products of both Transformers, of the
    crop's pass and of the heads, forward and backward. The 2N x 2N cosines are left out.

    Counts what is needed: the last layer only where it is read, and nothing for recomputing. A product of
    (n, k) and (k, m) is 2 n k m operations; the backward pass takes twice the forward's.

    >>> flops(Config.from_preset("base", vocab_size=32768)) / 1e9     # of 512 tokens: 632.8
    """
    def encoder(layers, width, T, rows):
        """Multiply-adds of a pass over T tokens whose last layer is wanted at `rows` of them."""
        ffn_width = round(c.ffn_width * width / c.width)
        keys_values = 2 * width * width
        rest = width * (2 * width + 2 * ffn_width + 2 * T)  # of a token: q, output, feed-forward, attention
        narrow = T * width * c.width * (width != c.width)
        return layers * T * keys_values + ((layers - 1) * T + rows) * rest + narrow

    T, K, A, vocabulary = c.max_len, c.masked, c.auxiliary_width, c.width * c.vocab_size
    forward = encoder(c.layers, c.width, T, T)
    if c.token_task != "mlm":
        forward += T * c.width  # the copy head
    if c.token_task != "rtd":
        forward += (T if c.token_task == "all_token_mlm" else K) * vocabulary
    if c.contrastive:
        forward += encoder(c.layers, c.width, c.crop_len + 1, 1) + 2 * c.width**2
    auxiliary = passes = 0
    if c.token_task != "mlm" and c.corruption != "random":
        head = A * A + A * c.width * (A != c.width) + vocabulary
        auxiliary = encoder(c.auxiliary_layers, A, T, K) + K * head
        passes = 1 if c.corruption == "frozen" else 4 if c.auxiliary_dropout else 3
    return 2 * (3 * forward + passes * auxiliary)  # 3: a forward and, as two, a backward pass


# ------------------------------------------------------------------------------------------------------------
# The authors' released weights

RELEASED = [  # their names, as regular expressions, and ours; the Hugging Face port's come last [model]
    ("^encoder.sentence_encoder", "main"), ("^auxiliary.sentence_encoder", "auxiliary"),
    ("embed_tokens", "embeddings.tokens"), ("embed_positions", "embeddings.positions"),
    ("emb_layer_norm", "embeddings.norm"), ("self_attn_layer_norm", "attention_norm"),
    ("(attention.)?self_attn.in_proj", "qkv"), ("(attention.)?self_attn.out_proj", "attention_out"),
    ("fc1", "ffn_in"), ("fc2", "ffn_out"), ("final_layer_norm", "ffn_norm"),
    ("^encoder.binary_head.out_proj", "copy_head"), ("^encoder.lm_head.bias", "lm_bias"),
    ("^encoder.seq_head.dense", "scl_head.0"), ("^encoder.seq_head.layer_norm", "scl_head.2"),
    ("^auxiliary.lm_head.dense", "auxiliary.transform.0"),
    ("^auxiliary.lm_head.layer_norm", "auxiliary.transform.2"),
    ("^auxiliary.lm_head.bias", "auxiliary.output_bias"),
    ("^relative_attention_bias", "main.relative"), ("relative_attention_bias", "relative"),
    ("^embeddings.word_embeddings", "main.embeddings.tokens"),
    ("^embeddings.position_embeddings", "main.embeddings.positions"),
    ("^embeddings.LayerNorm", "main.embeddings.norm"), ("^encoder.layer", "main.layers"),
    ("attention.LayerNorm", "attention_norm"), ("output.LayerNorm", "ffn_norm"),
    ("intermediate.dense", "ffn_in"), ("output.dense", "ffn_out"),
    ("^scl_head.dense", "scl_head.0"), ("^scl_head.LayerNorm", "scl_head.2"),
]


def from_release(theirs, settings):
    """Config of a released model, its weights by our names, and which of them this code cannot keep.

        "encoder.sentence_encoder.layers.0.fc1.weight"  ->  "main.layers.0.ffn_in.weight"

    theirs: name -> tensor; settings: the args of the fairseq code, or config.json of the Hugging Face port.
    Not kept are tensors of the auxiliary and of the LM heads that differ from the main Transformer's, where
    this code has one tensor for both. Raises ValueError if it is no COCO-LM.
    """
    tokens = re.compile(r"(.*?)(encoder\.sentence_encoder\.embed_tokens|embeddings\.word_embeddings)\.weight")
    prefixes, weights = [found[1] for found in map(tokens.fullmatch, theirs) if found], {}
    if not prefixes:
        raise ValueError("it has no embedding of tokens that COCO-LM would have")
    for name, tensor in theirs.items():
        name = name.removeprefix(prefixes[0])
        for pattern, ours in RELEASED:
            name = re.sub(pattern, ours, name)
        weights[name] = tensor
    try:
        layers, auxiliary_layers = (len({name.split(".")[2] for name in weights if name.startswith(part)})
                                    for part in ("main.layers.", "auxiliary.layers."))
        vocab_size, width = weights["main.embeddings.tokens.weight"].shape
        c = dict(vocab_size=vocab_size, pad_id=1, mask_id=vocab_size - 1, layers=layers, width=width,
                 ffn_width=len(weights["main.layers.0.ffn_in.weight"]),
                 max_len=len(weights["main.embeddings.positions.weight"]),
                 auxiliary_layers=auxiliary_layers or settings.get("generator_layers") or 4,
                 relative_positions="main.relative.weight" in weights)
        if c["relative_positions"]:
            c["relative_bins"], c["heads"] = weights["main.relative.weight"].shape
            c["max_distance"] = settings["max_rel_pos"]
        else:
            c["heads"] = settings.get("encoder_attention_heads") or settings["num_attention_heads"]
    except KeyError as error:
        raise ValueError(f"it lacks {error}") from None
    stated = settings.get("encoder_layers", settings.get("num_hidden_layers", layers))
    if stated != layers:
        raise ValueError(f"it has {layers} layers, but its settings say {stated}")
    twins = {name: name.replace("auxiliary.", "main.") for name in weights if "auxiliary.embeddings." in name}
    for head in ("encoder.lm_head.weight", "auxiliary.lm_head.weight"):
        twins |= {head: "main.embeddings.tokens.weight"} if head in weights else {}
    differ = [name for name, twin in twins.items() if not torch.equal(weights[name], weights[twin])]
    return Config(**c), {name: w for name, w in weights.items() if "lm_head.weight" not in name}, differ
