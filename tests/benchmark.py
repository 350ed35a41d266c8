"""Measures the speed of a training step, and on the CPU of data preparation.

    python tests/benchmark.py                                 about ten minutes on two cores
    python tests/benchmark.py --device=cuda                   presets small and base; under four minutes
    python tests/benchmark.py --preset=base --against=electra --text=False
    pip install transformers coco-lm-pytorch x-transformers   other implementations; a missing one is left out

Our step is compared with that of other implementations, and with itself without each of the optimizations for
the CPU. A step is forward, backward and AdamW (fused) on random tokens; all models have the same width, depth
and dropout. Two processes, ours and the other one, take a step in turn, so that a machine whose speed changes
favours neither. Each ratio is of the steps that these two took. On a GPU the steps are taken one after the
other, in one process.
"""

import gc
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

device: Literal["cpu", "cuda"] = "cpu"
preset: Literal["tiny", "small", "base"] = "small"  # sizes of the models; a GPU has small and base
steps: int = 5  # that are timed, after those that warm up
dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of autocast, for all
against: str = "electra,coco-lm-pytorch,memory,dropout,attention"  # others, and what ours is to do without
keep_memory: bool = False  # True: the others keep the memory that they free, as ours does
text: bool = True  # False: leave data preparation out

# sequences, tokens, entries of the vocabulary
SIZES = {"tiny": (16, 128, 8192), "small": (32, 128, 32768), "base": (4, 512, 32768)}
GPU_SIZES = {"small": (32, 512, 32768), "base": (32, 512, 32768)}

# ------------------------------------------------------------------------------------------------------------
# Contestants. Each builds its model and returns a function that computes one step's loss, and the parameters


def config_of(preset):
    _, T, V = SIZES[preset]
    return coco.Config.from_preset(preset, vocab_size=V, max_len=T, dropout=0.1)


def ours(preset, without="", device="cpu", compiled=False):
    (B, T, V), c = SIZES[preset], config_of(preset)
    if without == "dropout":  # without our own, that is
        coco.drop = F.dropout
    if without == "attention":
        coco.attention = F.scaled_dot_product_attention
    if without == "bias":
        coco.attention = lambda q, k, v, bias, p: F.scaled_dot_product_attention(q, k, v, dropout_p=p)
    model = coco.COCOLM(c).to(device).train()
    if compiled:
        model.compile(dynamic=False)

    def loss():
        tokens = torch.randint(0, V - 4, (B, T), device=device)
        masked = torch.rand(B, T - 1, device=device).argsort(1)[:, : c.mask_count].sort(1).values + 1
        batch = {"tokens": tokens, "masked": masked, "uniforms": torch.rand(B, c.mask_count, device=device),
                 "crop": tokens[:, : c.crop_len + 1].contiguous()}
        return model(batch)[0]["loss"]
    return loss, list(model.parameters())


def electra(preset, device="cpu"):
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
    generator.to(device), main.to(device)

    def loss():
        tokens = torch.randint(0, V - 4, (B, T), device=device)
        masked = torch.rand(B, T, device=device).argsort(1) < c.mask_count
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


def make_step(loss, parameters, dtype):
    """A function that takes a whole training step."""
    optimizer, device = torch.optim.AdamW(parameters, lr=1e-5, fused=True), parameters[0].device.type

    def step():
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 2.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


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
    before, step = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, make_step(loss, parameters, dtype)
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
# The steps on a GPU


def seconds_on_gpu(work, times, warm_up=3):
    """The mean of several, after some that warm up: between two events, so that nothing waits in between."""
    for _ in range(warm_up):
        work()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.reset_peak_memory_stats()
    start.record()
    for _ in range(times):
        work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000 / times


def gpu_table(args, sizes=GPU_SIZES):
    """A row for each contestant. FLOPs are those of model.py's `flops`, of others those that torch counts."""
    SIZES.update(sizes)
    dtype, fused = getattr(torch, args.dtype), coco.attention
    a, b = torch.randn(2, args.product, args.product, device=args.device, dtype=dtype)
    product = 2 * args.product**3 / seconds_on_gpu(lambda: a @ b, 20) / 1e12
    print(f"\nA product of two {args.product} x {args.product} matrices: {product:,.0f} TFLOP/s\n\n"
          f"| | sequences/s | TFLOP/s | share of the product's | peak memory, GB |\n|---|---|---|---|---|")
    builds = {"ours, compiled": lambda p: ours(p, device=args.device, compiled=True),
              "ours": lambda p: ours(p, device=args.device),
              "ours without relative positions in attention": lambda p: ours(p, "bias", args.device),
              "electra of transformers": lambda p: electra(p, args.device)}
    for preset, name in ((preset, name) for preset in sizes for name in builds):
        loss = parameters = step = None  # frees those of the row before
        gc.collect()
        coco.attention, (B, T, _) = fused, SIZES[preset]
        try:
            torch.manual_seed(0)
            loss, parameters = builds[name](preset)
            step, total = make_step(loss, parameters, dtype), B * coco.flops(config_of(preset))
            if name.startswith("electra"):
                with FlopCounterMode(display=False) as counter:
                    step()
                total = counter.get_total_flops()
            seconds = seconds_on_gpu(step, args.steps)
        except Exception as error:  # not installed, no memory: the other rows are of use as well
            print(f"| {preset}, {B} x {T}: {name} | {type(error).__name__}: {error} ||||"[:300], flush=True)
            continue
        rate, memory = total / seconds / 1e12, torch.cuda.max_memory_allocated() / 1e9
        print(f"| {preset}, {B} x {T}: {name} | {B / seconds:,.0f} | {rate:.0f} | {rate / product:.2f} "
              f"| {memory:.1f} |", flush=True)
    coco.attention = fused


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
    hardware = SimpleNamespace(device=args.device, dtype=args.dtype)
    train.choose_hardware(hardware)
    args.dtype, args.product = hardware.dtype, 8192
    if args.device == "cuda":
        print(f"{time.strftime('%Y-%m-%d')}, {torch.cuda.get_device_name()}, torch {torch.__version__}, "
              f"{args.dtype}", flush=True)
        return gpu_table(args)
    names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())  # Linux
    print(f"{time.strftime('%Y-%m-%d')}, {names[0] if names else platform.machine()}, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}, {args.dtype}", flush=True)
    steps_table(args)
    if args.text:
        text_table(args)


if __name__ == "__main__":
    data.run_command(main)
