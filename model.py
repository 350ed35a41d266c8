"""COCO-LM in one file: the two Transformers, their heads and their losses.

    X  original      [CLS] the cat sat on the mat ...
    X' masked        [CLS] the [M] sat on the [M] ...     15 % of the tokens, all of them replaced by [MASK]
          |  auxiliary Transformer: predicts the masked tokens, and one token is sampled at each of them
    X^MLM corrupted  [CLS] the dog sat on the mat ...     a sampled token can happen to be the original one
          |  main Transformer
          +--> copy head: at every token, is this token the original one?
          +--> LM head: at the masked positions, which token was it?
          +--> [CLS] vector, contrasted with the [CLS] vector of X^crop
    X^crop           [CLS] sat on the ...                 a random contiguous 90 % of X, through the main too

Corrective language modelling (CLM) is the copy head and the LM head together: finding the replaced tokens is
the easier task, is learned at every token, and helps to learn the harder one, what stood there [paper]. The
[CLS] vectors are for sequence contrastive learning (SCL). In a hurry, read the equations and COCOLM.forward.

Sources of the facts, as the docstrings cite them:
  [paper]  Meng et al., "COCO-LM: Correcting and Contrasting Text Sequences for Language Model Pretraining",
           NeurIPS 2021, arXiv 2102.08473
  [model]  the authors' model and fine-tuning code, github.com/microsoft/COCO-LM
  [loss]   the loss skeleton that the first author published in issue 2 of that repository
  [ours]   a decision of this project

Shapes: B sequences, T tokens, K masked positions of each sequence, H heads, d = head width, D width,
V vocabulary, N sequences of all processes together.
"""

import math
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
    """What the model is and what it learns; stored in every checkpoint. The default sizes are those of base.

    A value that its type or RANGES does not allow raises ValueError, and so does an ablation that others
    leave without effect.
    """

    vocab_size: int
    pad_id: int = None   # default: vocab_size - 4, as in data.py's tokenizers
    mask_id: int = None  # default: vocab_size - 1

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
    relative_init: Literal["normal", "local"] = "normal"  # start of that table; local is below

    # The objective
    mask_fraction: float = 0.15   # masked share of the tokens after [CLS] [paper]
    crop: float = 0.9             # length of the crop, share of the tokens after [CLS] [paper]
    temperature: float = 1.0      # of the contrastive softmax [paper, loss]
    lambda_copy: float = 50.0     # weight of the copy loss, as in ELECTRA [paper, model]
    lambda_scl: float = 1.0       # weight of the contrastive loss [paper, model]

    # Ablations
    token_task: Literal["clm", "rtd", "all_token_mlm", "mlm"] = "clm"  # rtd: copy head alone; mlm: BERT's
    lm_loss: Literal["mixture", "weighted"] = "mixture"  # mixture [paper] | weighted [loss]
    copy_mechanism: bool = True    # False: plain cross-entropy at the masked positions, beside the copy loss
    stop_gradient: bool = True     # False: the LM loss trains the copy head, too
    contrastive: bool = True       # False: no sequence contrastive learning
    gather_negatives: bool = True  # False: contrast only with the sequences of the same process
    relative_positions: bool = True  # False: absolute positions only
    corruption: Literal["auxiliary", "random", "frozen"] = "auxiliary"  # frozen: it was trained before
    auxiliary_width: int = 0       # 0: as wide as the main Transformer
    auxiliary_dropout: float = 0.0  # above 0: tokens are sampled in a second pass without it

    def __post_init__(self):
        if self.pad_id is None:
            self.pad_id = self.vocab_size - 4
        if self.mask_id is None:
            self.mask_id = self.vocab_size - 1
        self.auxiliary_width = self.auxiliary_width or self.width
        check_config(self)

    @classmethod
    def from_preset(cls, preset, **changes):
        """`Config.from_preset("base", vocab_size=32768, crop=0.8)`"""
        return cls(**{**PRESETS[preset], **changes})

    @property
    def mask_count(self):
        """Masked positions of a sequence, K. All have the same, so means over batches are exact. [ours]"""
        return round(self.mask_fraction * (self.max_len - 1))

    @property
    def crop_len(self):
        """Tokens of the crop, without its own [CLS]."""
        return round(self.crop * (self.max_len - 1))

    @property
    def has_auxiliary(self):
        """Whether an auxiliary Transformer corrupts the text."""
        return self.token_task != "mlm" and self.corruption != "random"


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

    Of every four heads one looks left, one right, one around and one everywhere: in the direction of a head
    the nearest token has the logit 0, and logits fall with the distance. From normal(0, 0.02) all hidden
    states of a small model become equal, and it never learns more than how frequent each token is.
    """
    distance = torch.arange(-max_distance, max_distance + 1)
    bucket = relative_position_bucket(distance, bins, max_distance)
    inside = F.one_hot(bucket, bins).float()
    d = (inside.T @ distance.float()) / inside.sum(0).clamp(min=1)  # (bins,) the mean distance in a bin
    left = torch.where(d < 0, d + 1, -6.0)  # -6: e^-6 = 0.002 of the nearest token's weight
    right = torch.where(d > 0, 1 - d, -6.0)
    patterns = torch.stack([left, right, -0.3 * d.abs(), torch.zeros(bins)], dim=1).clamp(min=-8)  # (bins, 4)
    return patterns[:, torch.arange(heads) % 4]


def drop(x, dropout):
    """Dropout: zeros with this probability, and the rest scaled so that the mean stays.

    On the CPU F.dropout takes as long as the matrix product before it. There the mask is made of random
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

    CUDA's fused kernels take the bias, in the type of q, and the dropout; the bias may be (1, H, Q, W), with
    W > T. On the CPU a bias or dropout makes scaled_dot_product_attention slow, so it is written out there.
    """
    if q.device.type != "cpu":
        bias = bias[..., : k.shape[2]]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
    B, H, Q, d = q.shape
    q, k, v, bias = (x.reshape(B * H, *x.shape[2:]) for x in (q, k, v, bias))
    logits = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=d**-0.5)  # (B * H, Q, T)
    return (drop(logits.softmax(-1), dropout) @ v).view(B, H, Q, d)


def at_positions(x, positions):
    """x (B, T, D) at positions (B, K): (B, K, D)"""
    return x.gather(1, positions[..., None].expand(-1, -1, x.shape[-1]))


class Layer(nn.Module):
    """One post-LN Transformer layer: attention, add, norm, feed-forward, add, norm. [model]"""

    def __init__(self, width, heads, ffn_width):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)  # rows: all of q, then k, then v, as in the releases
        self.attention_out = nn.Linear(width, width)
        self.attention_norm = nn.LayerNorm(width, eps=1e-5)
        self.ffn_in = nn.Linear(width, ffn_width)
        self.ffn_out = nn.Linear(ffn_width, width)
        self.ffn_norm = nn.LayerNorm(width, eps=1e-5)

    def forward(self, x, bias, dropout, positions=None):
        """x (B, T, D), bias (B, H, T, T) -> (B, T, D); positions (B, K), bias (B, H, K, T) -> (B, K, D)"""
        q, k, v = self.qkv(x).chunk(3, dim=-1)  # (B, T, D) each
        if positions is not None:  # queries of a few positions; keys and values of all
            q, x = at_positions(q, positions), at_positions(x, positions)  # (B, K, D)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))  # (B, H, T or K, d)
        y = attention(q, k, v, bias, dropout).transpose(1, 2).flatten(2)  # (B, T, D)
        x = self.attention_norm(x + drop(self.attention_out(y), dropout))
        y = self.ffn_out(F.gelu(self.ffn_in(x)))
        return self.ffn_norm(x + drop(y, dropout))


class Embeddings(nn.Module):
    """Token + learned absolute position embedding, then LayerNorm [model]. Both Transformers share one.

    The authors' auxiliary shares only the token embedding if it has no dropout; here it shares all. [ours]
    """

    def __init__(self, config):
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.width, padding_idx=config.pad_id)
        self.positions = nn.Embedding(config.max_len, config.width)
        self.norm = nn.LayerNorm(config.width, eps=1e-5)

    def forward(self, tokens):
        """(B, T) -> (B, T, D)"""
        T, longest = tokens.shape[1], self.positions.num_embeddings
        if T > longest:
            raise ValueError(f"a sequence of {T} tokens is longer than the model's {longest} positions")
        return self.norm(self.tokens(tokens) + self.positions(torch.arange(T, device=tokens.device)))


class Encoder(nn.Module):
    """A stack of layers on the embeddings; both the main and the auxiliary Transformer are one."""

    recompute = False  # True: keep only the layers' inputs, and compute the rest again for the gradient

    def __init__(self, config, embeddings, layers, width, dropout):
        super().__init__()
        self.pad_id, self.dropout, self.embeddings = config.pad_id, dropout, embeddings
        scale = width / config.width  # a narrow auxiliary has fewer heads, of about the same width
        divisors = (h for h in range(1, config.heads + 1) if width % h == 0)
        heads = min(divisors, key=lambda h: abs(h - config.heads * scale))
        self.narrow = nn.Linear(config.width, width) if width != config.width else nn.Identity()
        ffn_width = round(config.ffn_width * scale)
        self.layers = nn.ModuleList(Layer(width, heads, ffn_width) for _ in range(layers))
        self.heads, self.relative = heads, None
        self.columns = config.max_len + 8 - config.max_len % 8  # W: see bias
        if config.relative_positions:
            self.relative = nn.Embedding(config.relative_bins, heads)  # one table for all layers
            place = torch.arange(self.columns)
            distance = place[None, :] - place[:, None]  # (W, W) key - query
            bucket = relative_position_bucket(distance, config.relative_bins, config.max_distance)
            self.register_buffer("bucket", bucket, persistent=False)  # (W, W)

    def bias(self, tokens, padding):
        """What is added to the attention logits of tokens (B, T): relative positions, (1, H, T, W).

        With padding (B, T) it is (B, H, T, W), -inf at padding keys. CUDA's fused kernels want it in the type
        that attention computes in, and its rows at multiples of 8 elements; otherwise they copy it in every
        layer. So W is such a multiple. It is above any T; the columns behind T are not used.
        """
        T = tokens.shape[1]
        if self.relative is None:
            bias = self.embeddings.positions.weight.new_zeros(1, self.heads, T, self.columns)
        else:
            bias = self.relative(self.bucket[:T]).permute(2, 0, 1)[None].contiguous()  # (1, H, T, W)
        if torch.is_autocast_enabled(tokens.device.type):
            bias = bias.to(torch.get_autocast_dtype(tokens.device.type))
        if padding is False:
            return bias
        padding = padding & ~padding.all(1, keepdim=True)  # no NaN from a row of nothing but padding
        padding = F.pad(padding, (0, self.columns - T))[:, None, None, :]
        return bias.masked_fill(padding, -math.inf)

    def forward(self, tokens, padding=None, positions=None, dropout=None):
        """Hidden states (B, T, D) of tokens (B, T).

        padding: (B, T), True where there is no token; False: nowhere; default: at [PAD].
        positions: (B, K), if the output is wanted only there: (B, K, D). The last layer skips the rest.
        dropout: the rate; default: the model's in training, 0 in evaluation.
        """
        if padding is None:
            padding = tokens == self.pad_id
        if dropout is None:
            dropout = self.dropout if self.training else 0.0
        x = self.narrow(drop(self.embeddings(tokens), dropout))
        bias = self.bias(tokens, padding)
        B, T = tokens.shape
        if tokens.device.type == "cpu":  # once for all layers: the CPU's attention cannot broadcast
            bias = bias[..., :T].expand(B, -1, -1, -1).contiguous()  # (B, H, T, T)
        for layer in self.layers[:-1]:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, x, bias, dropout, use_reentrant=False)
            else:
                x = layer(x, bias, dropout)
        if positions is not None:
            index = positions[:, None, :, None].expand(-1, self.heads, -1, bias.shape[3])
            bias = bias.expand(B, -1, -1, -1).gather(2, index)  # (B, H, K, W)
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

    right=True never gives a token of probability zero; without its last column the cdf never gives V. A sum
    in parallel, as on GPUs, can round the cdf up at a token of probability zero: then the likeliest is taken.
    """
    probabilities = logits.float().softmax(-1)
    cdf = probabilities.cumsum(-1)
    thresholds = uniforms[..., None] * cdf[..., -1:]
    token = torch.searchsorted(cdf[..., :-1].contiguous(), thresholds, right=True)  # (..., 1)
    possible = probabilities.gather(-1, token) > 0
    return torch.where(possible, token, probabilities.argmax(-1, keepdim=True))[..., 0]


def mlm_loss(logits, targets):
    """-log p(x_i) at each masked position, for L_MLM and within L_LM. [paper]  (..., V), (...) -> (...)"""
    losses = F.cross_entropy(logits.float().flatten(0, -2), targets.flatten(), reduction="none")
    return losses.view(targets.shape)


def copy_loss(copy_logits, same):
    """Binary cross-entropy of p_copy = sigmoid(w.h + b) with 1[x^MLM_i = x_i] at each token [paper, model]"""
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
# COCO-LM


class COCOLM(nn.Module):
    """The auxiliary and the main Transformer with their heads. Only what the configuration uses is built.

    >>> model = COCOLM(Config.from_preset("tiny", vocab_size=8192))
    >>> hidden = model.main(tokens)               # (B, T) -> (B, T, D)
    >>> vectors = model.embed(tokens)             # (B, T) -> (B, D), of length 1
    >>> losses, outputs = model(batch)            # of pretraining
    """

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        embeddings = Embeddings(c)
        self.main = Encoder(c, embeddings, c.layers, c.width, c.dropout)
        if c.has_auxiliary:
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
            module.relative.weight.data.add_(table)  # apply() visits children first: the noise is there

    def copy_logits(self, hidden):
        """The copy head: the logit of p_copy.  (B, T, D) -> (B, T), float32"""
        return self.copy_head(hidden)[..., 0].float()

    def lm_logits(self, hidden):
        """The LM head: E h + b.  (..., D) -> (..., V)"""
        return F.linear(hidden, self.main.embeddings.tokens.weight, self.lm_bias)

    def corrupt(self, tokens, masked, uniforms):
        """X^MLM: the original text, with what the auxiliary samples at the masked positions. [paper]

        -> X^MLM (B, T); L_MLM (), the auxiliary's loss; its best guesses (B, K)
        """
        c = self.config
        masked_tokens = tokens.scatter(1, masked, c.mask_id)  # (B, T)
        hidden = self.auxiliary(masked_tokens, padding=False, positions=masked)  # (B, K, D)
        logits = self.auxiliary.logits(hidden)  # (B, K, V)
        loss = mlm_loss(logits, tokens.gather(1, masked)).mean()
        with torch.no_grad():  # no gradient flows back through the choice of a token
            if self.training and c.auxiliary_dropout > 0:  # an ablation: samples without dropout
                hidden = self.auxiliary(masked_tokens, padding=False, positions=masked, dropout=0.0)
                logits = self.auxiliary.logits(hidden)
            sampled = sample(logits, uniforms)  # (B, K)
        return tokens.scatter(1, masked, sampled), loss, logits.detach().argmax(-1)

    def corrective_lm_loss(self, lm_logits, copy_logits, originals, same):
        """L_LM at the masked positions. [paper]  -> ()

        What the copy head is sure of needs no correction: the LM head learns where a token is in doubt. With
        stop_gradient, the copy head learns only from L_copy, which knows all tokens.
        """
        c = self.config
        if c.stop_gradient:
            copy_logits = copy_logits.detach()
        if c.copy_mechanism and c.lm_loss == "mixture":
            losses = lm_loss_mixture(lm_logits, copy_logits, originals, same)
        elif c.copy_mechanism:
            losses = lm_loss_weighted(lm_logits, copy_logits, originals)
        else:
            losses = mlm_loss(lm_logits, originals)
        return losses.mean()

    def forward(self, batch, gather=None):
        """The losses of pretraining on a batch [paper], which is a dict of

            tokens    (B, T)  the original text, [CLS] first; packed, so there is no padding
            masked    (B, K)  positions that are masked
            uniforms  (B, K)  in [0, 1): the randomness of the auxiliary's sampling
            crop      (B, 1 + crop_len)  [CLS] and a contiguous part of the original

        gather: a function from this process' sequence vectors (2, B, D) to those of all processes, (2, N, D).
        -> losses: `loss`, which is trained, and its terms `mlm_loss`, `copy_loss`, `lm_loss`, `scl_loss`.
           outputs, without gradient: `corrupted` and `copy_logits` (B, T); the best guesses `mlm_tokens` and
           `lm_tokens` (B, K); `pooled` (B, D), the mean hidden states; `scl_vectors` (2, N, D).
        """
        if not isinstance(batch, dict):
            raise TypeError("a batch is a dict; for token ids call model.embed or model.main")
        c, losses, outputs = self.config, {}, {}
        tokens, masked, uniforms = batch["tokens"], batch["masked"], batch["uniforms"]

        # the auxiliary Transformer corrupts the text
        if c.has_auxiliary:
            corrupted, losses["mlm_loss"], outputs["mlm_tokens"] = self.corrupt(tokens, masked, uniforms)
        else:
            corrupted = self.corrupt_without_auxiliary(tokens, masked, uniforms)

        # the main Transformer reads the corrupted text
        hidden = self.main(corrupted, padding=False)  # (B, T, D)

        # corrective language modelling: is a token the original one, and which was it at a masked position?
        if c.token_task == "clm":
            same, originals = corrupted == tokens, tokens.gather(1, masked)  # (B, T), (B, K)
            copy_logits = self.copy_logits(hidden)  # (B, T)
            losses["copy_loss"] = copy_loss(copy_logits, same).mean()
            lm_logits = self.lm_logits(at_positions(hidden, masked))  # (B, K, V)
            losses["lm_loss"] = self.corrective_lm_loss(lm_logits, copy_logits.gather(1, masked), originals,
                                                        same.gather(1, masked))
        else:
            copy_logits, lm_logits = self.other_token_task(hidden, corrupted, tokens, masked, losses)

        # sequence contrastive learning: spreads the vectors of different texts, which otherwise lie close
        # together, and keeps those of similar ones near. Of the crop, only [CLS] is computed
        if c.contrastive:
            first = masked.new_zeros(len(masked), 1)  # (B, 1): the position of [CLS]
            crop_hidden = self.main(batch["crop"], padding=False, positions=first)  # (B, 1, D)
            vectors = torch.stack([self.scl_head(hidden[:, 0]), self.scl_head(crop_hidden[:, 0])]).float()
            if gather is not None and c.gather_negatives:
                vectors = gather(vectors)  # (2, N, D)
            losses["scl_loss"] = scl_loss(cosines(*vectors), c.temperature)
            outputs["scl_vectors"] = vectors.detach()

        weights = {"mlm_loss": 0.0 if c.corruption == "frozen" else 1.0, "copy_loss": c.lambda_copy,
                   "lm_loss": 1.0, "scl_loss": c.lambda_scl}
        losses["loss"] = sum(weights[name] * loss for name, loss in losses.items())

        outputs |= {"corrupted": corrupted, "pooled": hidden.detach().float().mean(1)}
        if copy_logits is not None:
            outputs["copy_logits"] = copy_logits.detach()
        if lm_logits is not None:
            outputs["lm_tokens"] = lm_logits.detach().argmax(-1)
        return losses, outputs

    # ablations [paper], and plain MLM

    def corrupt_without_auxiliary(self, tokens, masked, uniforms):
        """The masked text X' for plain MLM, or random tokens at the masked positions.  -> (B, T)"""
        c = self.config
        if c.token_task == "mlm":
            return tokens.scatter(1, masked, c.mask_id)
        return tokens.scatter(1, masked, (uniforms * c.vocab_size).long())

    def other_token_task(self, hidden, corrupted, tokens, masked, losses):
        """In place of corrective language modelling: ELECTRA's task, BERT's, or all-token MLM.

        Adds to the losses -> copy_logits (B, T), lm_logits (B, K, V); None without that head
        """
        copy_logits = lm_logits = None
        same = corrupted == tokens  # (B, T)
        if self.config.token_task == "rtd":  # replaced token detection
            copy_logits = self.copy_logits(hidden)
            losses["copy_loss"] = copy_loss(copy_logits, same).mean()
        elif self.config.token_task == "mlm":
            lm_logits = self.lm_logits(at_positions(hidden, masked))
            losses["lm_loss"] = mlm_loss(lm_logits, tokens.gather(1, masked)).mean()
        else:  # all-token MLM: the mixture at every token, whose one loss trains both heads
            copy_logits, lm_logits = self.copy_logits(hidden), self.lm_logits(hidden)  # (B, T), (B, T, V)
            losses["lm_loss"] = lm_loss_mixture(lm_logits, copy_logits, tokens, same).mean()
            lm_logits = at_positions(lm_logits.detach(), masked)  # (B, K, V)
        return copy_logits, lm_logits

    @torch.no_grad()
    def embed(self, tokens, batch_size=64):
        """Vectors of texts: the mean of all hidden states of the main Transformer, scaled to length 1.

        tokens (B, T), padded -> (B, D), float32, on the same device. A row of only padding gives zeros. Rows
        are sorted by length, so that a batch has little padding. Of [CLS], the SCL head and this mean, the
        mean was closest to human scores of similarity. [ours]
        """
        if not isinstance(tokens, torch.Tensor) or tokens.dim() != 2:
            raise TypeError("embed takes token ids (B, T): model.embed(tokenizer.batch(texts))")
        vectors = torch.zeros(len(tokens), self.config.width, device=tokens.device)
        if not tokens.numel():
            return vectors
        place = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)  # (T,)
        lengths = ((tokens != self.config.pad_id) * place).amax(1).clamp(min=1)  # (B,)
        for chosen in lengths.argsort().split(batch_size):
            part = tokens[chosen, : lengths[chosen].max()].to(self.main.embeddings.tokens.weight.device)
            hidden = self.main(part, dropout=0.0).float()  # (b, T, D)
            counted = (part != self.config.pad_id)[..., None]  # (b, T, 1)
            vectors[chosen] = F.normalize((hidden * counted).sum(1), dim=-1).to(vectors.device)
        return vectors


# ------------------------------------------------------------------------------------------------------------
# Statistics that tell whether it works. Each is (sum, count), so that batches and processes add up. (copy_auc
# needs all logits of a validation at once, and is in train.py.)


def sum_and_count(values, where=None):
    """Sum and count of the values where `where` is true (everywhere if None): (2,), float32"""
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
        "scl_accuracy": sum_and_count(cosine.masked_fill(itself, -math.inf).argmax(-1) == twin),
        "alignment": sum_and_count(2 - 2 * cosine.gather(1, twin[:, None])),
        "uniformity": torch.stack([means.clamp(min=1e-9).log().mean(), means.new_tensor(1.0)]) * (N > 1),
    }


@torch.no_grad()
def statistics(batch, outputs, gather=None):
    """The statistics, name -> (sum, count), of what COCOLM.forward returned for a batch."""
    tokens, corrupted = batch["tokens"], outputs["corrupted"]  # (B, T)
    originals, same = tokens.gather(1, batch["masked"]), corrupted == tokens  # (B, K), (B, T)
    found = {}
    if "mlm_tokens" in outputs:
        found["mlm_accuracy"] = sum_and_count(outputs["mlm_tokens"] == originals)
    if "copy_logits" in outputs:
        says_original = outputs["copy_logits"] > 0
        found["replaced_fraction"] = sum_and_count(~same)
        found["copy_accuracy_original"] = sum_and_count(says_original, same)
        found["copy_accuracy_replaced"] = sum_and_count(~says_original, ~same)
    if "lm_tokens" in outputs:
        replaced = ~same.gather(1, batch["masked"])  # (B, K)
        found["lm_accuracy_replaced"] = sum_and_count(outputs["lm_tokens"] == originals, replaced)
    pooled = outputs["pooled"] if gather is None else gather(outputs["pooled"])  # (N, D)
    unit, N = F.normalize(pooled, dim=-1), len(pooled)
    # the cosines of all pairs of different sequences add up to |sum of the unit vectors|^2 - N
    found["mean_cosine"] = torch.stack([unit.sum(0).square().sum() - N, unit.new_tensor(N * (N - 1.0))])
    if "scl_vectors" in outputs:
        found.update(scl_statistics(cosines(*outputs["scl_vectors"])))
    return found


# ------------------------------------------------------------------------------------------------------------
# The compute of a sequence, and what a configuration may hold


def flops(c):
    """Floating-point operations of training on one sequence: all matrix products of both Transformers, of the
    crop's pass and of the heads, forward and backward. The 2N x 2N cosines are left out.

    Nothing is counted for recomputing, and of the last layer, after q, k and v, only the positions that are
    used. A product of (n, k) and (k, m) is 2 n k m operations; the backward pass takes twice the forward's.

    >>> flops(Config.from_preset("base", vocab_size=32768)) / 1e9     # of 512 tokens: 636.0
    """
    def encoder(layers, width, T, read):
        """Multiply-adds of a pass over T tokens whose last layer is read at some of them."""
        qkv, ffn_width = 3 * width * width, round(c.ffn_width * width / c.width)
        rest = width * (width + 2 * ffn_width + 2 * T)  # of a token: output, feed-forward, attention
        narrow = width * c.width if width != c.width else 0
        return T * (narrow + layers * qkv) + ((layers - 1) * T + read) * rest

    T, K, A, vocabulary = c.max_len, c.mask_count, c.auxiliary_width, c.width * c.vocab_size
    forward = encoder(c.layers, c.width, T, T)
    if c.token_task != "mlm":
        forward += T * c.width  # the copy head
    if c.token_task != "rtd":
        forward += (T if c.token_task == "all_token_mlm" else K) * vocabulary
    if c.contrastive:
        forward += encoder(c.layers, c.width, c.crop_len + 1, 1) + 2 * c.width**2
    auxiliary = passes = 0
    if c.has_auxiliary:
        head = A * A + (A * c.width if A != c.width else 0) + vocabulary
        auxiliary = encoder(c.auxiliary_layers, A, T, K) + K * head
        passes = 1 if c.corruption == "frozen" else 4 if c.auxiliary_dropout else 3
    return 2 * (3 * forward + passes * auxiliary)  # 3: a forward and, as two, a backward pass


RANGES = {  # of numbers, both ends included; all others are finite and not negative
    **dict.fromkeys(("layers", "width", "heads", "ffn_width", "auxiliary_layers"), (1, 2**22)),
    "vocab_size": (8, 2**31 - 1), "max_len": (8, 2**20), "relative_bins": (8, 4096),
    "max_distance": (4, 2**20), "dropout": (0, 0.9), "auxiliary_dropout": (0, 0.9), "crop": (0.01, 1),
    "mask_fraction": (0.01, 0.4), "temperature": (1e-3, math.inf),
}


def check_config(c):
    """Raises ValueError if a value is not allowed, or if two do not go together."""
    for field in fields(c):
        value, choices = getattr(c, field.name), get_args(field.type)
        if choices and value not in choices:
            raise ValueError(f"{field.name}={value!r} has to be one of {', '.join(map(str, choices))}.")
        kind = {bool: bool, int: int, float: (int, float), str: str}.get(field.type, object)
        if not isinstance(value, kind):
            raise ValueError(f"{field.name}={value!r} has to be of type {field.type.__name__}.")
        low, high = RANGES.get(field.name, (0, math.inf))
        if field.type in (int, float) and not (low <= value <= high and math.isfinite(value)):
            raise ValueError(f"{field.name}={value} has to be finite and from {low} to {high}.")
    mixes = c.token_task == "clm" and c.copy_mechanism  # (all_token_mlm always mixes, with gradient)
    for name, has_effect in {"corruption": c.token_task != "mlm", "copy_mechanism": c.token_task == "clm",
                             "lm_loss": mixes, "stop_gradient": mixes,
                             "auxiliary_dropout": c.has_auxiliary and c.corruption != "frozen"}.items():
        if not has_effect and getattr(c, name) != getattr(Config, name):
            raise ValueError(f"{name}={getattr(c, name)} has no effect with token_task={c.token_task}, "
                             f"copy_mechanism={c.copy_mechanism}, corruption={c.corruption}.")
    for wrong, problem in (
        (c.pad_id >= c.vocab_size, f"pad_id={c.pad_id} is not in the vocabulary"),
        (c.mask_id >= c.vocab_size, f"mask_id={c.mask_id} is not in the vocabulary"),
        (c.width % c.heads, f"width={c.width} is not a multiple of heads={c.heads}"),
        (c.auxiliary_width > c.width, f"auxiliary_width={c.auxiliary_width} is above width={c.width}"),
        (c.relative_bins % 4, f"relative_bins={c.relative_bins} is not a multiple of 4"),
        (c.max_distance <= c.relative_bins // 4 + 1, f"max_distance={c.max_distance} is too small"),
        (not c.mask_count or not c.crop_len, f"max_len={c.max_len} is too short to mask and to crop"),
    ):
        if wrong:
            raise ValueError(problem + ".")
