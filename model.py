"""COCO-LM in one file: the two Transformers, their heads and their losses.

    X  original      [CLS] the cat sat on the mat ...
    X' masked        [CLS] the [M] sat on the [M] ...     15 % of the tokens, all of them replaced by [MASK]
          |  auxiliary Transformer: predicts the masked tokens, and one token is sampled at each of them
    X^MLM corrupted  [CLS] the dog sat on the mat ...     a sampled token can happen to be the original one
          |  main Transformer
          +--> copy head: at every token, is this token the original one?
          +--> LM head: at the masked positions, which token was it?
          +--> [CLS] vector, contrasted with the [CLS] vector of
    X^crop           [CLS] sat on the ...                 a random contiguous 90 % of X, through the main Transformer

Read from the top: everything is met before it is used. This file knows no file, no process group and no optimizer.

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
from dataclasses import dataclass, fields

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# --------------------------------------------------------------------------------------------------------------------
# Configuration


@dataclass
class Config:
    """All that decides what the model is and what it learns; stored in every checkpoint.

    Raises ValueError, in one sentence, for a value out of range or a combination that makes no sense.
    """

    vocab_size: int
    pad_id: int = None              # default: the fourth token from the end, as data.py's tokenizers have it
    mask_id: int = None             # default: the last token
    max_len: int = 512              # tokens in a sequence, [CLS] included
    # main Transformer [paper, model]; the defaults are the base model's
    layers: int = 12
    width: int = 768
    heads: int = 12
    ffn_width: int = 3072
    dropout: float = 0.1            # on embeddings, attention probabilities and both sub-layer outputs
    relative_positions: bool = True
    relative_bins: int = 32
    max_distance: int = 128         # tokens; all that are further away share the outermost bin
    relative_init: str = "normal"   # normal | local: how the relative-position table starts, see local_relative_table
    # auxiliary Transformer
    auxiliary_layers: int = 4
    auxiliary_width: int = 0        # 0: as wide as the main Transformer
    auxiliary_dropout: float = 0.0  # 0: samples from its one pass; above: a second pass without dropout to sample from
    corruption: str = "auxiliary"   # auxiliary | random (uniform tokens) | frozen (a trained auxiliary, not trained on)
    # objective
    token_task: str = "clm"         # clm | rtd (detect only) | all_token_mlm (the mixture everywhere) | mlm (BERT's)
    lm_loss: str = "mixture"        # mixture [paper] | weighted [loss]
    copy_mechanism: bool = True     # False: plain cross-entropy at masked positions beside the copy loss
    stop_gradient: bool = True      # True: the LM loss does not train the copy head
    lambda_copy: float = 50.0       # weight of the copy loss [paper, model]
    mask_fraction: float = 0.15     # of the tokens behind [CLS]
    contrastive: bool = True        # sequence contrastive learning
    lambda_scl: float = 1.0         # weight of the contrastive loss [paper, model]
    crop: float = 0.9               # length of the crop, as a share of the tokens behind [CLS]
    temperature: float = 1.0        # of the contrastive softmax [paper, loss]
    gather_negatives: bool = True   # contrast with the sequences of all processes, not only with one's own

    def __post_init__(self):
        if self.pad_id is None:
            self.pad_id = self.vocab_size - 4
        if self.mask_id is None:
            self.mask_id = self.vocab_size - 1
        self.auxiliary_width = self.auxiliary_width or self.width
        for name, (smallest, largest) in RANGES.items():
            value = getattr(self, name)
            if not smallest <= value <= largest:
                raise ValueError(f"{name}={value} is out of range: it has to be from {smallest} to {largest}.")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} has to be one of {', '.join(choices)}.")
        for name in ("pad_id", "mask_id"):
            if not 0 <= getattr(self, name) < self.vocab_size:
                raise ValueError(f"{name}={getattr(self, name)} is not in the vocabulary of {self.vocab_size} tokens.")
        if self.width % self.heads:
            raise ValueError(f"width={self.width} cannot be split over heads={self.heads}: choose a multiple of it.")
        if self.auxiliary_width > self.width:
            raise ValueError(f"auxiliary_width={self.auxiliary_width} is above width={self.width}: it can only be "
                             f"narrower.")
        if self.relative_bins % 4:
            raise ValueError(f"relative_bins={self.relative_bins} has to be a multiple of 4.")
        if self.max_distance <= self.relative_bins // 4 + 1:
            raise ValueError(f"max_distance={self.max_distance} has to be above relative_bins / 4 + 1 = "
                             f"{self.relative_bins // 4 + 1}.")
        if self.masked < 1 or self.crop_len < 1:
            raise ValueError(f"max_len={self.max_len} is too short: mask_fraction={self.mask_fraction} of it or "
                             f"crop={self.crop} of it is less than one token.")
        for setting, condition, reason in (  # what would silently do nothing
            ("corruption", self.token_task == "mlm", "the main model reads the masked text"),
            ("lm_loss", self.token_task != "clm", "only clm has the choice"),
            ("copy_mechanism", self.token_task != "clm", "only clm has the choice"),
            ("stop_gradient", self.token_task in ("rtd", "mlm"), "no LM loss uses the copy probability"),
            ("lm_loss", not self.copy_mechanism, "the plain cross-entropy does not use the copy probability"),
            ("stop_gradient", not self.copy_mechanism, "the plain cross-entropy does not use the copy probability"),
        ):
            if condition and getattr(self, setting) != DEFAULTS[setting]:
                raise ValueError(f"{setting}={getattr(self, setting)} has no effect with token_task={self.token_task} "
                                 f"and copy_mechanism={self.copy_mechanism}: {reason}.")

    @classmethod
    def from_preset(cls, preset, **changes):
        """`Config.from_preset("base", vocab_size=32768, crop=0.8)`"""
        return cls(**{**PRESETS[preset], **changes})

    @property
    def masked(self):
        """Masked positions in every sequence, so that all shapes are static and means of means are means [ours]."""
        return round(self.mask_fraction * (self.max_len - 1))

    @property
    def crop_len(self):
        """Tokens of the crop behind its own [CLS]."""
        return round(self.crop * (self.max_len - 1))


RANGES = {
    "vocab_size": (8, 2**31 - 1), "max_len": (8, 2**20), "layers": (1, 1000), "width": (1, 2**20), "heads": (1, 2**16),
    "ffn_width": (1, 2**22), "dropout": (0.0, 0.9), "relative_bins": (8, 4096), "max_distance": (4, 2**20),
    "auxiliary_layers": (1, 1000), "auxiliary_width": (1, 2**20), "auxiliary_dropout": (0.0, 0.9),
    "lambda_copy": (0.0, 1e6), "lambda_scl": (0.0, 1e6), "mask_fraction": (0.01, 0.4), "crop": (0.01, 1.0),
    "temperature": (1e-3, 1e3),
}
CHOICES = {
    "relative_init": ("normal", "local"), "corruption": ("auxiliary", "random", "frozen"),
    "token_task": ("clm", "rtd", "all_token_mlm", "mlm"), "lm_loss": ("mixture", "weighted"),
}
DEFAULTS = {field.name: field.default for field in fields(Config)}
PRESETS = {
    # [ours] learns something in minutes on two CPU cores; the local start of the relative table is what makes it learn
    "tiny": dict(layers=2, width=128, heads=4, ffn_width=512, auxiliary_layers=1, max_len=128, dropout=0.0,
                 relative_init="local"),
    "small": dict(layers=12, width=256, heads=4, ffn_width=1024, auxiliary_layers=2),  # the published code's preset
    "base": dict(),
    "base++": dict(relative_bins=64),
    "large++": dict(layers=24, width=1024, heads=16, ffn_width=4096, auxiliary_layers=6, relative_bins=128,
                    max_distance=256),
}

# --------------------------------------------------------------------------------------------------------------------
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

    Of every four heads one looks left, one right, one around and one everywhere. From normal(0, 0.02) all hidden
    states of a small model become equal and it never predicts more than how frequent the tokens are.
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

    On the CPU torch's own costs as much as the matrix product before it. There the mask is made of random bytes,
    eight from one draw, so the probability is a multiple of 1/256: 0.1 is 26/256 = 0.1016.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling() or not dropout:
        return F.dropout(x, dropout)
    dropped = max(1, round(dropout * 256))  # of the 256 values of a byte
    draws = torch.empty((x.numel() + 7) // 8, dtype=torch.int64).random_(-(2**63), None)  # all 64 bits
    kept = draws.view(torch.uint8)[: x.numel()].view(x.shape).ge_(dropped)  # 1 or 0; in place, or it is slow
    return x * kept.to(x.dtype).mul_(256 / (256 - dropped))


LARGE = 2**23  # attention probabilities of a layer, 32 MB


def attention_by_hand(q, k, v, bias, dropout):
    """What `attention` is, in the form that was measured to be the fastest on the CPU."""
    B, H, Q, d = q.shape
    q, k, v, bias = (x.reshape(B * H, *x.shape[2:]) for x in (q, k, v, bias))
    logits = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=d**-0.5)  # (B * H, Q, T)
    probabilities = drop(logits.softmax(-1), dropout)
    return (probabilities @ v).view(B, H, Q, d)


def attention(q, k, v, bias, dropout):
    """softmax(q k^T / sqrt(d) + bias) v, with q (B, H, Q, d), k and v (B, H, T, d), bias (B, H, Q, T).

    On CUDA the fused kernels take the bias, in the type of q, and the dropout. On the CPU those send
    scaled_dot_product_attention to its slow path, so there it is written out. Where the probabilities are large they
    are not kept but computed once more for the gradient: a third of the memory of base, and 2 % of its time.
    """
    if q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
    large = bias.numel() >= LARGE and q.device.type == "cpu" and not torch.compiler.is_compiling()
    if large and torch.is_grad_enabled():
        return checkpoint(attention_by_hand, q, k, v, bias, dropout, use_reentrant=False)
    return attention_by_hand(q, k, v, bias, dropout)


def rows_of(x, rows):
    """The rows (B, K) of every sequence of x (B, T, D): (B, K, D)"""
    return x.gather(1, rows[..., None].expand(-1, -1, x.shape[-1]))


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

    def forward(self, x, bias, dropout, rows=None):
        """x (B, T, D), bias (B, H, T, T) -> (B, T, D); with rows (B, K) and bias (B, H, K, T) only those: (B, K, D)"""
        D = x.shape[-1]
        if rows is None:
            q, k, v = self.qkv(x).chunk(3, dim=-1)
        else:  # keys and values of all positions, queries of a few
            k, v = F.linear(x, self.qkv.weight[D:], self.qkv.bias[D:]).chunk(2, dim=-1)
            x = rows_of(x, rows)
            q = F.linear(x, self.qkv.weight[:D], self.qkv.bias[:D])
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))  # (B, H, T, d)
        y = attention(q, k, v, bias, dropout).transpose(1, 2).flatten(2)  # (B, T, D)
        x = self.attention_norm(x + drop(self.attention_out(y), dropout))
        y = self.ffn_out(F.gelu(self.ffn_in(x)))
        return self.ffn_norm(x + drop(y, dropout))


class Embeddings(nn.Module):
    """Token + learned absolute position embedding, then LayerNorm. Both Transformers use the same one. [model]"""

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
        scale = width / config.width  # a narrow auxiliary has heads of the same width, or nearly so, and fewer of them
        divisors = (h for h in range(1, config.heads + 1) if width % h == 0)
        heads = min(divisors, key=lambda h: abs(h - config.heads * scale))
        self.narrow = nn.Linear(config.width, width) if width != config.width else nn.Identity()
        self.layers = nn.ModuleList(Layer(width, heads, round(config.ffn_width * scale)) for _ in range(layers))
        self.heads = heads
        if config.relative_positions:
            self.relative = nn.Embedding(config.relative_bins, heads)  # one table for all layers
            distance = torch.arange(config.max_len)[None, :] - torch.arange(config.max_len)[:, None]  # key - query
            bucket = relative_position_bucket(distance, config.relative_bins, config.max_distance)
            self.register_buffer("bucket", bucket, persistent=False)  # (T, T)
        else:
            self.relative = None

    def bias(self, padding):
        """What is added to the attention logits: relative positions, and -inf at padding keys. (B, H, T, T)

        In the type that attention computes in, and with rows that start at multiples of 8 elements: CUDA's fused
        kernels want both, and would make a copy in every layer otherwise.
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

    def forward(self, tokens, padding=None, rows=None, dropout=None):
        """Hidden states (B, T, D) of tokens (B, T).

        padding: (B, T), True where there is no token. Decided by the padding id unless given: for corrupted text it
            has to be that of the original text, since the auxiliary may well sample [PAD].
        rows: (B, K) positions, if the output is wanted only there: (B, K, D). The last layer skips the others.
        dropout: the rate, if it is to be another than the model's in training and 0 in evaluation.
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
        if rows is not None:
            bias = bias.gather(2, rows[:, None, :, None].expand(-1, bias.shape[1], -1, bias.shape[3]))  # (B, H, K, T)
        return self.layers[-1](x, bias, dropout, rows)


# --------------------------------------------------------------------------------------------------------------------
# Heads


class Transform(nn.Sequential):
    """dense -> GELU -> LayerNorm: the SCL head, and the first half of the auxiliary's MLM head. [model]"""

    def __init__(self, width):
        super().__init__(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width, eps=1e-5))


class Auxiliary(Encoder):
    """The shallow Transformer whose guesses corrupt the text: an encoder with an MLM head on tied embeddings."""

    def __init__(self, config, embeddings):
        super().__init__(config, embeddings, config.auxiliary_layers, config.auxiliary_width, config.auxiliary_dropout)
        self.transform = Transform(config.auxiliary_width)
        narrow = config.auxiliary_width != config.width
        self.widen = nn.Linear(config.auxiliary_width, config.width) if narrow else nn.Identity()
        self.output_bias = nn.Parameter(torch.zeros(config.vocab_size))

    def logits(self, hidden):
        """(..., D) -> (..., V)"""
        return F.linear(self.widen(self.transform(hidden)), self.embeddings.tokens.weight, self.output_bias)


# --------------------------------------------------------------------------------------------------------------------
# Equations. All of them compute in float32, whatever the autocast type.


def sample(logits, uniforms):
    """One token per row of logits (..., V), by inverse CDF at uniforms (...) in [0, 1). [paper: from the softmax]

        probabilities .2 .0 .5 .3   ->   cdf .2 .2 .7 1.   ->   uniform .1 gives 0, .2 gives 2, .69 gives 2, .7 gives 3

    right=True never gives a token of probability zero, leaving out the last column never gives V.
    """
    cdf = logits.float().softmax(-1).cumsum(-1)
    return torch.searchsorted(cdf[..., :-1].contiguous(), uniforms[..., None] * cdf[..., -1:], right=True)[..., 0]


def mlm_loss(logits, targets):
    """-log p(x_i) at each masked position. [paper]  (..., V), (...) -> (...)"""
    return F.cross_entropy(logits.float().flatten(0, -2), targets.flatten(), reduction="none").view(targets.shape)


def copy_loss(copy_logits, same):
    """Binary cross-entropy of p_copy = sigmoid(w.h + c) against 1[x^MLM_i = x_i] at each token. [paper, model]"""
    return F.binary_cross_entropy_with_logits(copy_logits.float(), same.float(), reduction="none")


def lm_loss_mixture(lm_logits, copy_logits, targets, same):
    """-log( 1[same] p_copy + (1 - p_copy) softmax(lm_logits)[target] ) at each position. [paper, equation of L_LM]

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
    """-log softmax of each one's twin among the 2N-1 others, the mean over the 2N. [paper, loss]  (2N, 2N) -> ()

    Vector i's twin is i + N (the crop of the same sequence) and the other way round; itself is left out.
    """
    N = len(cosine) // 2
    logits = (cosine / temperature).masked_fill(torch.eye(2 * N, dtype=torch.bool, device=cosine.device), -math.inf)
    return F.cross_entropy(logits, torch.arange(2 * N, device=cosine.device).roll(N))


# --------------------------------------------------------------------------------------------------------------------
# Statistics that tell whether it works. Each is a pair (sum, count), so that batches and processes add up.


def pair(values, where=None):
    """Sum and count of the values where `where` is true (everywhere if None), (2,) in float32."""
    where = torch.ones_like(values, dtype=torch.float32) if where is None else where.float()
    return torch.stack([(values.float() * where).sum(), where.sum()])


def scl_statistics(cosine):
    """How often the twin is the nearest (chance: 1 / (2N - 1)); alignment and uniformity as Wang & Isola (2020)
    define them: mean squared distance of twins, and log mean exp(-2 squared distance) of different sequences,
    averaged over the corrupted and the cropped vectors. Of unit vectors the squared distance is 2 - 2 cosine."""
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
    """Cosines of the mean-pooled hidden states of different sequences: near 1 the model is dead, all texts look the
    same to it.  (N, D) -> (2,)"""
    unit = F.normalize(pooled.float(), dim=-1)
    N = len(unit)
    return torch.stack([unit.sum(0).square().sum() - N, torch.full((), N * (N - 1.0), device=unit.device)])


# --------------------------------------------------------------------------------------------------------------------
# COCO-LM


class COCOLM(nn.Module):
    """The auxiliary and the main Transformer with their heads. Only what the configuration uses is built.

    >>> model = COCOLM(Config.from_preset("tiny", vocab_size=8192))
    >>> hidden = model.main(tokens)                         # (B, T) -> (B, T, D)
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
            self.lm_bias = nn.Parameter(torch.zeros(c.vocab_size))  # the LM head: tied embedding + bias, nothing else
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
        if isinstance(module, Encoder) and module.relative is not None and self.config.relative_init == "local":
            table = local_relative_table(self.config.relative_bins, module.heads, self.config.max_distance)
            module.relative.weight.data.add_(table)  # children come first: the small noise is there already

    def train(self, mode=True):
        super().train(mode)
        if self.config.corruption == "frozen":
            self.auxiliary.eval()
        return self

    def lm_logits(self, hidden):
        """The main model's LM head: E h + b.  (..., D) -> (..., V)"""
        return F.linear(hidden, self.main.embeddings.tokens.weight, self.lm_bias)

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
        """Everything within one process: -> losses, statistics, predictions, and the SCL vectors (2, B, D) or None."""
        c, tokens, masked = self.config, batch["tokens"], batch["masked"]
        losses, statistics, predictions = {}, {} if with_statistics else None, {}
        padding = tokens == c.pad_id
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
            predictions["copy_logits"] = copy_logits.detach()
        if c.token_task in ("clm", "rtd"):
            losses["copy_loss"] = (copy_loss(copy_logits, same) * real).sum() / real.sum()
        if c.token_task == "all_token_mlm":
            lm_logits = self.lm_logits(hidden)  # (B, T, V)
            losses["lm_loss"] = (lm_loss_mixture(lm_logits, copy_logits, tokens, same) * real).sum() / real.sum()
            lm_logits = rows_of(lm_logits.detach(), masked)
        elif c.token_task != "rtd":
            lm_logits = self.lm_logits(rows_of(hidden, masked))  # (B, K, V)
            if c.token_task == "mlm" or not c.copy_mechanism:
                losses["lm_loss"] = mlm_loss(lm_logits, originals).mean()
            else:
                at_masked = copy_logits.gather(1, masked)  # (B, K)
                at_masked = at_masked.detach() if c.stop_gradient else at_masked
                if c.lm_loss == "mixture":
                    losses["lm_loss"] = lm_loss_mixture(lm_logits, at_masked, originals, same_masked).mean()
                else:
                    losses["lm_loss"] = lm_loss_weighted(lm_logits, at_masked, originals).mean()

        vectors = None
        if c.contrastive:  # the crop goes through the main model alone, and only its [CLS] is wanted
            crop_hidden = self.main(batch["crop"], rows=torch.zeros_like(masked[:, :1]))  # (B, 1, D)
            vectors = torch.stack([self.scl_head(hidden[:, 0]), self.scl_head(crop_hidden[:, 0])]).float()

        if with_statistics:
            predictions["corrupted"] = corrupted
            if c.token_task != "mlm":
                says_original = predictions["copy_logits"] > 0
                statistics["replaced_fraction"] = pair(~same, real)
                statistics["copy_accuracy_original"] = pair(says_original, same * real)
                statistics["copy_accuracy_replaced"] = pair(~says_original, ~same * real)
            if c.token_task != "rtd":
                predictions["lm_tokens"] = lm_logits.detach().argmax(-1)  # (B, K)
                statistics["lm_accuracy_replaced"] = pair(predictions["lm_tokens"] == originals, ~same_masked)
            predictions["pooled"] = (hidden.detach().float() * real[..., None]).sum(1) / real.sum(1, keepdim=True)
        return losses, statistics, predictions, vectors

    def forward(self, batch, gather=None, with_statistics=True):
        """Losses, statistics and predictions of one batch:

            tokens    (B, T)  the original text, [CLS] first
            masked    (B, K)  positions that are masked
            uniforms  (B, K)  in [0, 1): the randomness of the auxiliary's sampling
            crop      (B, C)  [CLS] and a contiguous part of the original

        gather: a function that brings the sequence vectors (..., B, D) of all processes together: (..., N, D).
        -> losses: `loss`, the sum that is trained, and its terms `mlm_loss`, `copy_loss`, `lm_loss`, `scl_loss`, ();
           statistics: name -> (sum, count); predictions: `corrupted` and `copy_logits` (B, T), `lm_tokens`
           (B, K), `pooled` (B, D), the mean hidden states.
        """
        c = self.config
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
    """Floating-point operations that a Config's training takes for one sequence: of all matrix products, forward and
    backward, in both Transformers, the crop's pass and the heads (not of the 2N x 2N cosines: next to nothing).

    Only what is needed: the last layer where it is read, and nothing for recomputing. A product of (n, k) and (k, m)
    is 2 n k m of them; the backward pass takes twice the forward's.

    >>> flops(Config.from_preset("base", vocab_size=32768)) / 1e9     # of 512 tokens: 632.8
    """
    def encoder(layers, width, T, rows):
        """Multiply-adds of a pass over T tokens whose last layer is wanted at `rows` of them."""
        ffn_width = round(c.ffn_width * width / c.width)
        keys_values = 2 * width * width
        rest = width * (2 * width + 2 * ffn_width + 2 * T)  # of a token: q, output, feed-forward, attention to T
        return layers * T * keys_values + ((layers - 1) * T + rows) * rest + T * width * c.width * (width != c.width)

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
        auxiliary = encoder(c.auxiliary_layers, A, T, K) + K * (A * A + A * c.width * (A != c.width) + vocabulary)
        passes = 1 if c.corruption == "frozen" else 4 if c.auxiliary_dropout else 3
    return 2 * (3 * forward + passes * auxiliary)  # 3: a forward and, as two, a backward pass
