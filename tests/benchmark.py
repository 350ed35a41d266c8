"""How fast it is: our training step, the same with each lever switched off, and the peers that are installed.

    python tests/benchmark.py                                 under 10 minutes on two CPU cores
    python tests/benchmark.py --preset=base --parts=steps     other sizes: tiny | small | base
    pip install transformers coco-lm-pytorch x-transformers   brings the peers (ELECTRA and coco-lm-pytorch)

Every contestant is timed against ours, two processes that take a step in turn, so that a machine whose speed changes
does not favour anyone. A step is forward, backward and AdamW on the same number of sequences, all at full width and
depth, dropout 0.1, with random tokens. Its FLOPs are those it needs (ours: model.flops, peers: what torch counts), its
speed limit is a matrix product's, measured in every round.
"""

import importlib.util
import multiprocessing
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data
import finetune
import model as coco
import train

OPTIONS = {
    "preset": ("small", ["tiny", "small", "base"], "sizes of the steps"),
    "steps": (5, (1, 1000), "steps that count, behind those that warm up; half as many of each lever"),
    "peers": ("electra,coco-lm-pytorch", str, "which of them, or none"),
    "kept": (False, bool, "let the peers keep the memory that they free, as we do (train.keep_memory)"),
    "levers": ("memory,dropout,attention", str, "what to take from ours; also recompute, which saves memory, or none"),
    "parts": ("steps,around,projection", str, "which tables: steps, around, scaling, projection"),
    "dtype": ("auto", ["auto", "float32", "bfloat16"], "of our autocast"),
    "data_dir": ("", str, "where data/docs lies; default: it is prepared in a temporary folder"),
}
SIZES = {"tiny": (16, 128, 8192), "small": (32, 128, 32768), "base": (4, 512, 32768)}  # sequences, tokens, vocabulary
GPUS = {"8 x A100": (8 * train.PEAK["A100"] * 1e12, 2.0), "8 x H100": (8 * train.PEAK["H100"] * 1e12, 3.0)}  # peak, $
PROJECTED_MFU = 0.4  # of a GPU; a guess, nobody has measured this code on one

# --------------------------------------------------------------------------------------------------------------------
# Contestants. Each builds its model and returns (a function that makes one step's loss, its parameters).


def config_of(preset):
    _, T, V = SIZES[preset]
    return coco.Config.from_preset(preset, vocab_size=V, max_len=T, dropout=0.1)


def ours(preset, lever=""):
    B, T, V = SIZES[preset]
    c = config_of(preset)
    model = coco.COCOLM(c).train()
    model.main.recompute = lever == "recompute"
    if lever == "dropout":
        coco.drop = F.dropout
    if lever == "attention":
        coco.attention = lambda q, k, v, bias, p: F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=p)
    if lever == "compile":
        model.passes = torch.compile(model.passes, dynamic=False)

    def loss():
        tokens = torch.randint(0, V - 4, (B, T))
        masked = torch.stack([torch.randperm(T - 1)[: c.masked].sort().values + 1 for _ in range(B)])
        batch = {"tokens": tokens, "masked": masked, "uniforms": torch.rand(B, c.masked),
                 "crop": tokens[:, : c.crop_len + 1].contiguous()}
        return model(batch, None, False)[0]["loss"]
    return loss, list(model.parameters())


def electra(preset):
    """transformers' ELECTRA with a generator as wide as ours: no crop, no correction, logits at every token."""
    from transformers import ElectraConfig, ElectraForMaskedLM, ElectraForPreTraining
    (B, T, V), c = SIZES[preset], config_of(preset)

    def configuration(layers):
        return ElectraConfig(vocab_size=V, embedding_size=c.width, hidden_size=c.width, num_hidden_layers=layers,
                             num_attention_heads=c.heads, intermediate_size=c.ffn_width, max_position_embeddings=T,
                             attn_implementation="sdpa")
    generator, main = ElectraForMaskedLM(configuration(c.auxiliary_layers)), ElectraForPreTraining(configuration(c.layers))
    generator.electra.embeddings = main.electra.embeddings
    generator.generator_lm_head.weight = main.electra.embeddings.word_embeddings.weight
    generator.train(), main.train()

    def loss():
        tokens = torch.randint(0, V - 4, (B, T))
        masked = torch.rand(B, T).argsort(1) < c.masked
        labels = tokens.masked_fill(~masked, -100)
        first = generator(input_ids=tokens.masked_fill(masked, V - 1), labels=labels)
        with torch.no_grad():
            sampled = torch.multinomial(first.logits[masked].float().softmax(-1), 1)[:, 0]
        corrupted = tokens.masked_scatter(masked, sampled)
        return first.loss + 50 * main(input_ids=corrupted, labels=(corrupted != tokens).long()).loss
    return loss, list({id(p): p for p in [*generator.parameters(), *main.parameters()]}.values())


def coco_lm_pytorch(preset):
    """lucidrains' COCO on x-transformers: no LM head, a crop of random tokens."""
    from coco_lm_pytorch import COCO
    from x_transformers import Encoder, TransformerWrapper
    (B, T, V), c = SIZES[preset], config_of(preset)

    def transformer(layers, **options):
        layers = Encoder(dim=c.width, depth=layers, heads=c.heads, attn_dim_head=c.width // c.heads, attn_dropout=0.1,
                         ff_dropout=0.1, rel_pos_bias=True)
        return TransformerWrapper(num_tokens=V, max_seq_len=T, emb_dropout=0.1, attn_layers=layers, **options)
    generator, main = transformer(c.auxiliary_layers), transformer(c.layers, return_only_embed=True)
    generator.token_emb, generator.pos_emb = main.token_emb, main.pos_emb
    model = COCO(generator, main, discr_dim=c.width, mask_token_id=2, pad_token_id=0, cls_token_id=1, replace_prob=1.0,
                 crop_percentage=int(0.9 * T) / T).train()
    return lambda: model(torch.randint(3, V, (B, T))), list(model.parameters())


def contestant(pipe, build, arguments, dtype, keep):
    """A process: builds, warms up, and makes a step whenever it is asked to. Sends FLOPs; seconds; memory."""
    if keep:
        train.keep_memory()
    torch.manual_seed(0)
    try:
        loss, parameters = build(*arguments)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        optimizer = torch.optim.AdamW(parameters, lr=1e-5, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01,
                                      fused=build is ours)

        def step():
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                value = loss()
            value.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 2.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        if build is ours:
            step()
            needed = SIZES[arguments[0]][0] * coco.flops(config_of(arguments[0]))
        else:
            with FlopCounterMode(display=False) as counter:
                step()
            step()
            needed = counter.get_total_flops()
        pipe.send(needed)
    except Exception as error:  # a peer of another version, say: the others go on
        pipe.send(f"{type(error).__name__}: {error}")
        return
    while pipe.recv():
        start = time.perf_counter()
        step()
        pipe.send(time.perf_counter() - start)
    pipe.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def start(*arguments):
    """A contestant's end of the pipe and the FLOPs of its step."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    context.Process(target=contestant, args=(there, *arguments), daemon=True).start()
    there.close()
    return here, here.recv()


def one_step(pipe):
    pipe.send(True)
    return pipe.recv()


def memory(pipe):
    pipe.send(False)
    return pipe.recv()


def steps_table(options):
    preset = options["preset"]
    B, T, _ = SIZES[preset]
    dtype = train.choose_dtype(options, torch.device("cpu"))
    opponents = {"ours, float32": (ours, (preset,), torch.float32, True)} if dtype != torch.float32 else {}
    for name, build, package in (("electra", electra, "transformers"),
                                 ("coco-lm-pytorch", coco_lm_pytorch, "coco_lm_pytorch")):
        if name not in options["peers"]:
            continue
        if not importlib.util.find_spec(package):
            print(f"{name} is not installed: no line for it")
            continue
        for peers_dtype in dict.fromkeys([torch.float32, dtype]):
            opponents[f"{name}, {str(peers_dtype)[6:]}"] = (build, (preset,), peers_dtype, options["kept"])
    for lever, name in {"memory": "memory given back", "dropout": "torch's dropout", "attention": "torch's attention",
                        "recompute": "recompute=True"}.items():
        if lever in options["levers"]:
            opponents[f"ours, {name}"] = (ours, (preset, lever), dtype, lever != "memory")

    we, flops = start(ours, (preset,), dtype, True)
    all_ours, rates, rows = [], [], []
    for name, arguments in opponents.items():
        print(f"  {name} ...", flush=True)
        they, counted = start(*arguments)
        if isinstance(counted, str):
            print(f"{name} does not run: {counted[:200]}")
            continue
        one_step(we)  # it has been waiting
        pairs = []
        for _ in range(options["steps"] if arguments[0] is not ours else (options["steps"] + 1) // 2):
            rates.append(train.peak_flops(torch.device("cpu"), dtype))
            pairs.append((one_step(we), one_step(they)))
        our_seconds, their_seconds = zip(*pairs)
        all_ours += our_seconds
        rows.append((name, their_seconds, f"{statistics.median(their_seconds) / statistics.median(our_seconds):.2f}",
                     counted, memory(they)))
    rows.insert(0, (f"ours, {str(dtype)[6:]}", all_ours, "", flops, memory(we)))

    rate = statistics.median(rates)
    print(f"\nA training step of preset {preset}: {B} sequences of {T} tokens. A matrix product runs at "
          f"{rate / 1e9:.0f} GFLOP/s ({min(rates) / 1e9:.0f} to {max(rates) / 1e9:.0f}), {str(dtype)[6:]}. Medians of "
          f"{options['steps']} steps, of our variants {(options['steps'] + 1) // 2}; ours of all its steps, the ratios "
          f"of those in turn with the line's.\n")
    print("| | tokens/s | step, s (min to max) | ours is faster by | GFLOP a step | of the product's rate | memory, MB |")
    print("|---|---|---|---|---|---|---|")
    for name, seconds, ratio, counted, megabytes in rows:
        median = statistics.median(seconds)
        print(f"| {name} | {B * T / median:,.0f} | {median:.2f} ({min(seconds):.2f} to {max(seconds):.2f}) | {ratio} | "
              f"{counted / 1e9:,.0f} | {counted / median / rate:.0%} | {megabytes:,.0f} |", flush=True)


# --------------------------------------------------------------------------------------------------------------------
# What is around the steps


def run_train(folder, *options, processes=1):
    """train.py in a process of its own, one thread each; returns its log."""
    out = tempfile.mkdtemp(dir=folder)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    subprocess.run([sys.executable, *launcher, str(ROOT / "train.py"), f"--out_dir={out}", "--overwrite=True", *options],
                   check=True, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return train.read_log(Path(out, "log.jsonl"))


def seconds_of(work, times=5):
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def around_table(options, folder, times):
    """What a run does beside its steps, and what a newcomer waits for."""
    corpus, preset = folder / "docs", options["preset"]
    B, T, V = SIZES[preset]
    tokenizer, device = data.Tokenizer.load(corpus), torch.device("cpu")
    c = coco.Config.from_preset(preset, vocab_size=tokenizer.vocab_size, max_len=T)
    sequences = data.Sequences(corpus, "train", T, c.masked, c.crop_len, 0)
    model = coco.COCOLM(c)
    settings = {"micro_batch_size": B, "eval_batches": 1, "accumulation": 1, "weight_decay": 0.01, "beta1": 0.9,
                "beta2": 0.98, "epsilon": 1e-6}
    optimizer = train.make_optimizer(model, settings, device)
    autocast = torch.autocast("cpu", enabled=False)

    def step():
        with autocast:
            model(train.to_device(sequences.batch(0, range(B), B), device))[0]["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    model.train()
    step()
    a_step = seconds_of(step, times)
    of_run = train.TRAINING[preset]
    batch = seconds_of(lambda: sequences.batch(1, range(B), B), times)
    evaluation = seconds_of(lambda: train.evaluate(model, sequences, settings, device, autocast), times)
    write = seconds_of(lambda: train.write_checkpoint(folder / "ckpt.pt", {
        "model": model.state_dict(), "optimizer": optimizer.state_dict(), "tokenizer": tokenizer.state()}), times)
    whole = a_step * of_run["batch_size"] / B
    print(f"\nAround the steps of preset {preset} ({a_step:.2f} s for {B} sequences of {T}, vocabulary "
          f"{tokenizer.vocab_size:,}, {of_run['batch_size']} sequences a step); medians of {times}.\n")
    print("| | seconds | share of a run |\n|---|---|---|")
    print(f"| a batch of {B} from the corpus (beside the step, in another thread) | {batch:.4f} | {batch / a_step:.2%} |")
    evaluation *= of_run["eval_batches"] * of_run["batch_size"] / B
    print(f"| a validation | {evaluation:.2f} | {evaluation / whole / of_run['eval_interval']:.2%} |")
    print(f"| writing a checkpoint | {write:.2f} | {write / whole / of_run['checkpoint_interval']:.2%} |")
    start_up = seconds_of(lambda: subprocess.run([sys.executable, "-c", "import train"], cwd=ROOT, check=True), times)
    print(f"| start-up: importing everything | {start_up:.2f} | once |")

    length = min(64, T)
    classifier = finetune.build("SST-2", c, 0.1, 0)
    tuner = train.make_optimizer(classifier, settings, device)
    examples = [{"tokens": sequences.tokens[i * length : (i + 1) * length], "label": i % 2} for i in range(16)]
    batch = train.to_device(finetune.collate(examples, c.pad_id), device)

    def tune():
        finetune.losses_of(classifier(batch), batch).mean().backward()
        tuner.step()
        tuner.zero_grad()

    classifier.train()
    tune()
    taken = seconds_of(tune, times)
    print(f"| a fine-tuning step of 16 examples of {length} tokens | {taken:.3f} | {16 / taken:,.0f} examples/s |")

    text, ranks = tokenizer.decode(sequences.tokens[:1_000_000]), len(tokenizer.ranks)
    size = len(text.encode()) / 1e6
    words = data.Counter(dict(data.count_words([text], True)))
    print(f"\nPreparing text: {size:.1f} MB of {corpus.name}, one process.\n\n| | data.py | tokenizers |\n|---|---|---|")
    counting = seconds_of(lambda: data.count_words([text], True), 1)
    merging = seconds_of(lambda: data.train_bpe(words, ranks), 1)
    encoding = seconds_of(lambda: tokenizer.encode(text), times)
    theirs = ["-", "-"]
    if importlib.util.find_spec("tokenizers"):
        import tokenizers
        peer = tokenizers.Tokenizer(tokenizers.models.BPE())
        peer.normalizer = tokenizers.normalizers.Lowercase()
        peer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = tokenizers.trainers.BpeTrainer(vocab_size=ranks, show_progress=False,
                                                 initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())
        lines = text.split("\n")
        theirs = [seconds_of(lambda: peer.train_from_iterator(lines, trainer), 1),
                  seconds_of(lambda: peer.encode_batch(lines), times)]
        theirs = [f"{size / t:.1f} MB/s, {t:.1f} s" for t in theirs]
    training = counting + merging
    print(f"| training a BPE of {ranks:,} | {size / training:.1f} MB/s, {training:.1f} s, {merging:.1f} of them merging | "
          f"{theirs[0]} |\n| tokenising | {size / encoding:.1f} MB/s, {encoding:.1f} s | {theirs[1]} |", flush=True)


def scaling_table(options, folder, times):
    """Processes, accumulation, length: preset tiny, from the logs of train.py, one thread a process."""
    shared = [f"--data_dir={folder}", "--eval_batches=1", "--eval_interval=1000000", "--log_interval=5"]
    settings = {
        "1 process": (["--batch_size=16"], 1), "2 processes": (["--batch_size=16"], 2),
        "1 process, 4 passes of 4 sequences": (["--batch_size=16", "--micro_batch_size=4"], 1),
        "1 process, 4 sequences of 512": (["--batch_size=4", "--max_len=512"], 1),
    }
    speeds = {name: [] for name in settings}
    steps = 6 * times
    for _ in range(1 if times == 1 else 3):
        for name, (extra, processes) in settings.items():
            log = run_train(folder, *shared, f"--max_steps={steps}", "--warmup_steps=5", *extra, processes=processes)
            rows = [row["tokens_per_sec"] for row in log if row.get("split") == "train"]
            speeds[name].append(statistics.median(rows[1:]))  # the first ones warm up
    print("\nScaling of preset tiny, 2,048 tokens a step, one thread a process; from train.py's logs.\n")
    print("| | tokens/s (min to max) | of 1 process |\n|---|---|---|")
    one = statistics.median(speeds["1 process"])
    for name, values in speeds.items():
        median = statistics.median(values)
        print(f"| {name} | {median:,.0f} ({min(values):,.0f} to {max(values):,.0f}) | {median / one:.2f} |", flush=True)


def projection_table():
    print(f"\nA projection, not a measurement: FLOPs of the whole pretraining at {PROJECTED_MFU:.0%} MFU, which is a guess, at "
          f"{' and '.join(f'${price:.0f}' for _, price in GPUS.values())} a GPU and hour.\n")
    print("| | ZFLOP | " + " | ".join(f"{name}, days | cost" for name in GPUS) + " |\n|---|---|" + "---|---|" * len(GPUS))
    for preset in ("base", "base++", "large++"):
        c = coco.Config.from_preset(preset, vocab_size=32768 if preset == "base" else 64000)
        training = train.TRAINING[preset]
        total = coco.flops(c) * training["batch_size"] * training["max_steps"]
        cells = [f"{total / PROJECTED_MFU / peak / 86400:,.0f} | ${8 * price * total / PROJECTED_MFU / peak / 3600:,.0f}"
                 for peak, price in GPUS.values()]
        print(f"| {preset} | {total / 1e21:,.1f} | " + " | ".join(cells) + " |")


def main():
    given, others = data.parse_options(sys.argv[1:], OPTIONS, __doc__)
    options = {name: default for name, (default, _, _) in OPTIONS.items()} | given
    parts = options["parts"].split(",")
    if others or set(parts) - {"steps", "around", "scaling", "projection"}:
        raise data.InputError("--parts is a list of steps, around, scaling, projection, with commas.")
    threads = torch.get_num_threads()
    print(f"{time.strftime('%Y-%m-%d')}, python {platform.python_version()}, torch {torch.__version__}, "
          f"{cpu()}, {threads} threads", flush=True)
    if "steps" in parts:
        steps_table(options)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options["data_dir"] or temporary)
        if {"around", "scaling"} & set(parts) and not (folder / "docs").exists():
            data.prepare(data_dir=str(folder))
        times = min(5, options["steps"])
        if "around" in parts:
            around_table(options, folder, times)
        if "scaling" in parts:
            scaling_table(options, folder, times)
    if "projection" in parts:
        projection_table()


def cpu():
    """The processor's name and its widest vectors."""
    names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return f"{names[0] if names else platform.machine()} ({torch.backends.cpu.get_cpu_capability()})"


if __name__ == "__main__":
    data.run_command(main)
