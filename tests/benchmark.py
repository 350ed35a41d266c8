"""Measures the speed of a training step and of data preparation on the CPU.

    python tests/benchmark.py                                 about ten minutes on two cores
    python tests/benchmark.py --preset=base --against=electra --text=False
    pip install transformers coco-lm-pytorch x-transformers   other implementations; a missing one is left out

Our step is compared with that of other implementations, and with itself without each of the optimizations for
the CPU. A step is forward, backward and AdamW (fused) on random tokens; all models have the same width, depth
and dropout. Two processes, ours and the other one, take a step in turn, so that a machine whose speed changes
favours neither. Each ratio is of the steps that these two took.
"""

import importlib.util
import multiprocessing
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median_low
from types import SimpleNamespace
from typing import Literal

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import data  # noqa: E402
import model as coco  # noqa: E402
import train  # noqa: E402

preset: Literal["tiny", "small", "base"] = "small"  # sizes of the models
steps: int = 5  # that are timed, after those that warm up
dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of autocast, for all
against: str = "electra,coco-lm-pytorch,memory,dropout,attention"  # others, and what ours is to do without
keep_memory: bool = False  # True: the others keep the memory that they free, as ours does
text: bool = True  # False: leave data preparation out

# sequences, tokens, entries of the vocabulary
SIZES = {"tiny": (16, 128, 8192), "small": (32, 128, 32768), "base": (4, 512, 32768)}

# ------------------------------------------------------------------------------------------------------------
# Contestants. Each builds its model and returns a function that computes one step's loss, and the parameters


def config_of(preset):
    _, T, V = SIZES[preset]
    return coco.Config.from_preset(preset, vocab_size=V, max_len=T, dropout=0.1)


def ours(preset, without=""):
    (B, T, V), c = SIZES[preset], config_of(preset)
    if without == "dropout":  # without our own, that is
        coco.drop = F.dropout
    if without == "attention":
        coco.attention = F.scaled_dot_product_attention
    model = coco.COCOLM(c).train()

    def loss():
        tokens = torch.randint(0, V - 4, (B, T))
        masked = torch.rand(B, T - 1).argsort(1)[:, : c.masked].sort(1).values + 1
        batch = {"tokens": tokens, "masked": masked, "uniforms": torch.rand(B, c.masked),
                 "crop": tokens[:, : c.crop_len + 1].contiguous()}
        return model(batch)[0]["loss"]
    return loss, list(model.parameters())


def electra(preset):
    """transformers' ELECTRA, its generator as wide as ours. No crop, no correction, logits at every token."""
    from transformers import ElectraConfig, ElectraForMaskedLM, ElectraForPreTraining
    (B, T, V), c = SIZES[preset], config_of(preset)

    def config(layers):
        return ElectraConfig(vocab_size=V, embedding_size=c.width, hidden_size=c.width,
                             intermediate_size=c.ffn_width, num_hidden_layers=layers,
                             num_attention_heads=c.heads, max_position_embeddings=T,
                             attn_implementation="sdpa")

    generator = ElectraForMaskedLM(config(c.auxiliary_layers)).train()
    main = ElectraForPreTraining(config(c.layers)).train()
    generator.electra.embeddings = main.electra.embeddings
    generator.generator_lm_head.weight = main.electra.embeddings.word_embeddings.weight

    def loss():
        tokens = torch.randint(0, V - 4, (B, T))
        masked = torch.rand(B, T).argsort(1) < c.masked
        labels = tokens.masked_fill(~masked, -100)
        first = generator(input_ids=tokens.masked_fill(masked, V - 1), labels=labels)
        with torch.no_grad():
            sampled = torch.multinomial(first.logits[masked].float().softmax(-1), 1)[:, 0]
        corrupted = tokens.masked_scatter(masked, sampled)
        return first.loss + 50 * main(input_ids=corrupted, labels=(corrupted != tokens).long()).loss
    return loss, list({*generator.parameters(), *main.parameters()})


def coco_lm_pytorch(preset):
    """lucidrains' COCO on x-transformers. No LM head, a crop of random tokens."""
    from coco_lm_pytorch import COCO
    from x_transformers import Encoder, TransformerWrapper
    (B, T, V), c = SIZES[preset], config_of(preset)

    def transformer(layers, **options):
        layers = Encoder(dim=c.width, depth=layers, heads=c.heads, attn_dim_head=c.width // c.heads,
                         attn_dropout=0.1, ff_dropout=0.1, rel_pos_bias=True)
        return TransformerWrapper(num_tokens=V, max_seq_len=T, emb_dropout=0.1, attn_layers=layers, **options)

    generator, main = transformer(c.auxiliary_layers), transformer(c.layers, return_only_embed=True)
    generator.token_emb, generator.pos_emb = main.token_emb, main.pos_emb
    model = COCO(generator, main, discr_dim=c.width, mask_token_id=2, pad_token_id=0, cls_token_id=1,
                 replace_prob=1.0, crop_percentage=int(0.9 * T) / T).train()
    return lambda: model(torch.randint(3, V, (B, T))), list(model.parameters())


OTHERS = {"electra": electra, "coco-lm-pytorch": coco_lm_pytorch}
WITHOUT = {"memory": "memory given back", "dropout": "torch's dropout", "attention": "torch's attention"}

# ------------------------------------------------------------------------------------------------------------
# The steps


def contestant(pipe, build, arguments, dtype, keep):
    """A process that takes a step whenever it is asked to.

    It sends (FLOPs, "") or (0, why it does not run), and then for each step (seconds, MB).
    """
    if keep:
        train.keep_memory()
    torch.manual_seed(0)
    try:
        loss, parameters = build(*arguments)
    except Exception as error:  # not installed, or another version
        return pipe.send((0, f"{type(error).__name__}: {error}"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)

    def step():
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 2.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    with FlopCounterMode(display=False) as counter:
        step()
    step()
    pipe.send((counter.get_total_flops(), ""))
    while pipe.recv():
        start = time.perf_counter()
        step()
        seconds = time.perf_counter() - start
        pipe.send((seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024))


def start(*arguments):
    """Starts a contestant -> our end of its pipe"""
    context = multiprocessing.get_context("spawn")
    ours, its = context.Pipe()
    context.Process(target=contestant, args=(its, *arguments), daemon=True).start()
    return ours


def step_of(pipe):
    pipe.send(True)
    return pipe.recv()


def steps_table(args):
    dtype, (B, T, _) = getattr(torch, args.dtype), SIZES[args.preset]
    names = args.against.split(",") if args.against else []
    if set(names) - {*OTHERS, *WITHOUT}:
        raise data.InputError(f"--against={args.against} is not a list of {', '.join([*OTHERS, *WITHOUT])}.")
    we, rows, our_steps = start(ours, (args.preset,), dtype, True), [], []
    our_flops, _ = we.recv()
    for name in names:
        if name in OTHERS:
            they = start(OTHERS[name], (args.preset,), dtype, args.keep_memory)
        else:
            they = start(ours, (args.preset, name), dtype, name != "memory")
        flops, problem = they.recv()
        if problem:
            print(f"  {name} does not run: {problem}")
            continue
        step_of(we)  # it has waited while the other one was built
        pairs = [(step_of(we), step_of(they)) for _ in range(args.steps)]
        they.send(False)
        our_part, steps = zip(*pairs)
        our_steps += our_part
        label = f"ours, {WITHOUT[name]}" if name in WITHOUT else name
        rows.append((label, flops, steps, median_low(steps)[0] / median_low(our_part)[0]))
    our_steps = our_steps or [step_of(we) for _ in range(args.steps)]
    we.send(False)

    print(f"\nA step of preset {args.preset}, {B} sequences of {T} tokens, medians of {args.steps}\n\n"
          f"| | tokens/s | seconds (min to max) | ours is faster by | GFLOP a step | memory, MB |\n"
          f"|---|---|---|---|---|---|")
    for name, flops, steps, ratio in [("ours", our_flops, our_steps, 1.0), *rows]:
        least, seconds, most = min(steps)[0], median_low(steps)[0], max(steps)[0]
        print(f"| {name} | {B * T / seconds:,.0f} | {seconds:.2f} ({least:.2f} to {most:.2f}) | {ratio:.2f} "
              f"| {flops / 1e9:,.0f} | {steps[-1][1]:,.0f} |", flush=True)


# ------------------------------------------------------------------------------------------------------------
# Data preparation


def text_table(args):
    """data.py and Hugging Face's tokenizers on the default text, one thread each."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ROOT / "data.py", f"--data_dir={folder}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        tokenizer = data.Tokenizer.load(Path(folder, "docs"))
        ids = data.Sequences(Path(folder, "docs"), "train", 128, 1, 1, 0).tokens[:1_000_000]
        text = data.lower(tokenizer.decode(ids))
    entries, megabytes, times = len(tokenizer.ranks), len(text.encode()) / 1e6, min(args.steps, 3)
    works = {"training a BPE": lambda: data.train_bpe(data.count_words([(True, text)]), entries),
             "tokenising": lambda: tokenizer.encode(text)}
    if importlib.util.find_spec("tokenizers"):
        os.environ["RAYON_NUM_THREADS"] = "1"
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers
        other, lines = Tokenizer(models.BPE()), text.split("\n")
        other.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(vocab_size=entries, show_progress=False,
                                      initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
        works["training a BPE, tokenizers"] = lambda: other.train_from_iterator(lines, trainer)
        works["tokenising, tokenizers"] = lambda: other.encode_batch(lines)
    print(f"\nData preparation, {megabytes:.1f} MB, BPE of {entries:,}, one thread, medians of {times}\n\n"
          f"| | MB/s |\n|---|---|")
    for name, work in works.items():
        taken = []
        for _ in range(times):
            start = time.perf_counter()
            work()
            taken.append(time.perf_counter() - start)
        print(f"| {name} | {megabytes / median_low(taken):.1f} |", flush=True)


def main():
    args = data.Parser(__doc__, sys.modules[__name__]).parse_args()
    hardware = SimpleNamespace(device="cpu", dtype=args.dtype)
    train.choose_hardware(hardware)
    args.dtype = hardware.dtype
    names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())  # Linux
    print(f"{time.strftime('%Y-%m-%d')}, {names[0] if names else platform.machine()}, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}, {args.dtype}", flush=True)
    steps_table(args)
    if args.text:
        text_table(args)


if __name__ == "__main__":
    data.run_command(main)
