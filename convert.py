"""Other people's formats, in and out.

    python convert.py cocolm-base out/cocolm-base.pt   a release of the authors -> a checkpoint
    python convert.py out/ckpt.pt hf/                  a checkpoint -> a folder that Hugging Face's tools load

A release is a folder or the file in it: fairseq's model.pt, or pytorch_model.bin or model.safetensors of the
Hugging Face port beside config.json. For text it also needs sp.model and dict.txt in that folder.

A checkpoint is one of train.py, of finetune.py (best.pt), or a converted release. What is written is a stock
model, without code of its own: AutoModel, AutoTokenizer, pipeline and sentence-transformers load it.
"""

import base64
import importlib
import json
import math
import os
import re
import sys
import tempfile
from argparse import Namespace
from pathlib import Path

import torch
import torch.nn.functional as F

from data import (SPECIALS, InputError, Parser, SentencePieceTokenizer, Tokenizer, read_lines, read_torch,
                  run_command)
from model import COCOLM, PRESETS, Config, relative_position_bucket
from train import print0, read_checkpoint, write_file

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

# ------------------------------------------------------------------------------------------------------------
# Files


def import_optional(module, purpose):
    """An optional package's module. purpose: what needs it, for the message if it is missing"""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise InputError(f"{purpose} needs a package: pip install {module.split('.')[0]}") from None


def find_file(path):
    """The file with the weights: path, or one in that folder"""
    names = ("model.pt", "model.safetensors", "pytorch_model.bin", "ckpt.pt")
    for name in names:
        if Path(path, name).is_file():
            return Path(path, name)
    if path.is_dir():
        raise InputError(f"{path} is a folder without {', '.join(names)}.")
    return path


def read_dict(file):
    """The dict that a file holds. Runs no code."""
    if file.suffix != ".safetensors":
        return read_torch(file)
    safetensors = import_optional("safetensors.torch", file)
    try:
        return safetensors.load_file(file)
    except Exception as error:  # safetensors has its own
        raise InputError(f"{file} cannot be read ({error}).") from None


# ------------------------------------------------------------------------------------------------------------
# From a release


def rename(weights):
    """By our names: encoder.sentence_encoder.layers.0.fc1.bias becomes main.layers.0.ffn_in.bias."""
    tokens = re.compile(r"(.*?)(encoder\.sentence_encoder\.embed_tokens|embeddings\.word_embeddings)\.weight")
    prefixes, renamed = [found[1] for found in map(tokens.fullmatch, weights) if found], {}
    if not prefixes:
        raise ValueError("it has no embedding of tokens that COCO-LM would have")
    for name, tensor in weights.items():
        name = name.removeprefix(prefixes[0])
        for pattern, our_name in RELEASED:
            name = re.sub(pattern, our_name, name)
        renamed[name] = tensor
    return renamed


def make_config(weights, settings):
    """The Config of a release. Its sizes are those of the weights, by our names.

    settings: the args of the fairseq code, or config.json of the Hugging Face port
    """
    layers, auxiliary_layers = (len({name.split(".")[2] for name in weights if name.startswith(part)})
                                for part in ("main.layers.", "auxiliary.layers."))
    stated = settings.get("encoder_layers", settings.get("num_hidden_layers", layers))
    if stated != layers:
        raise ValueError(f"it has {layers} layers, but its settings say {stated}")
    vocab_size, width = weights["main.embeddings.tokens.weight"].shape
    sizes = dict(vocab_size=vocab_size, pad_id=1, mask_id=vocab_size - 1, layers=layers, width=width,
                 ffn_width=len(weights["main.layers.0.ffn_in.weight"]),
                 max_len=len(weights["main.embeddings.positions.weight"]),
                 auxiliary_layers=auxiliary_layers or settings.get("generator_layers") or 4)
    if "main.relative.weight" in weights:
        sizes["relative_bins"], sizes["heads"] = weights["main.relative.weight"].shape
        return Config(**sizes, max_distance=settings["max_rel_pos"])
    heads = settings.get("encoder_attention_heads") or settings["num_attention_heads"]
    return Config(**sizes, heads=heads, relative_positions=False)


def tied(name):
    """The main Transformer's tensor that this code has in place of this one; None if it has this one."""
    if name.endswith("lm_head.weight"):
        return "main.embeddings.tokens.weight"
    return name.replace("auxiliary", "main", 1) if name.startswith("auxiliary.embeddings.") else None


def make_model(weights, config):
    """The COCOLM of a release, and {what is special: names}: of tensors that start anew, for example."""
    torch.manual_seed(0)  # for what starts anew
    model = COCOLM(config)
    differ = [name for name in weights if tied(name) and not torch.equal(weights[name], weights[tied(name)])]
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items() if not tied(name)}
    used = {name: tensor for name, tensor in weights.items() if tensor.shape == wanted.get(name)}
    new = [name for name in wanted if name not in used]
    for name, tensor in used.items():
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise ValueError(f"{name} has values that are not finite floating-point numbers")
    if lost := [name for name in new if name.startswith("main.")]:
        raise KeyError(lost[0])
    model.load_state_dict(used, strict=False)
    return model, {
        "start anew": dict.fromkeys(name.split(".")[0] for name in new),
        "not used": [name for name in weights if name not in used and not tied(name)],
        "its own there, the main Transformer's here": differ,
    }


def read_tokenizer(folder, vocab_size=None):
    """That of sp.model and dict.txt in a folder; either may be missing as long as no text comes."""
    model, dictionary = folder / "sp.model", folder / "dict.txt"
    model = base64.b64encode(model.read_bytes()).decode() if model.exists() else None
    text = "".join(line for _, line in read_lines(dictionary)) if dictionary.exists() else None
    return SentencePieceTokenizer(model, text, vocab_size, folder)


def convert_release(file, saved, target):
    """Writes a checkpoint of a release. saved: what is in its file"""
    if target.suffix != ".pt":
        raise InputError(f"{file} is a release, which becomes a file: {target} has to end in .pt.")
    try:
        if "model" in saved:  # fairseq: {"args" or "cfg": Namespace, "model": weights, ...}
            weights, settings = saved["model"], vars(saved.get("args") or saved.get("cfg") or Namespace())
        else:  # Hugging Face
            weights, settings = saved, json.loads((file.parent / "config.json").read_bytes())
        weights = rename(weights)
        model, special = make_model(weights, make_config(weights, settings))
    except (ValueError, TypeError, AttributeError, KeyError, RuntimeError, OSError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise InputError(f"{file} is no checkpoint and no release that can be used: {reason}.") from None
    tokenizer = read_tokenizer(file.parent, model.config.vocab_size)
    vocabulary = {name: getattr(model.config, name) for name in ("vocab_size", "pad_id", "mask_id")}
    presets = [name for name in PRESETS if Config.from_preset(name, **vocabulary) == model.config]
    target.parent.mkdir(parents=True, exist_ok=True)
    write_file(target, {"model": model.state_dict(), "config": vars(model.config), "step": 0,
                        "tokenizer": tokenizer.state(), "settings": {"preset": name for name in presets}})
    print0(f"{target} has the weights of {file}")
    absent = [name for name in ("sp.model", "dict.txt") if not (file.parent / name).exists()]
    for what, names in (special | {"missing, so it cannot encode texts": absent}).items():
        if names:
            print0(f"  {what}: {', '.join(names)}")


# ------------------------------------------------------------------------------------------------------------
# To Hugging Face: LayoutLMv3's text part is our encoder up to its tables; without relative positions BERT is

EXPORTED = [  # our names and those of LayoutLMv3 and BERT
    ("embeddings.tokens", "embeddings.word_embeddings"),
    ("embeddings.positions", "embeddings.position_embeddings"), ("embeddings.norm", "embeddings.LayerNorm"),
    ("layers.", "encoder.layer."), ("attention_out", "attention.output.dense"),
    ("attention_norm", "attention.output.LayerNorm"), ("ffn_in", "intermediate.dense"),
    ("ffn_out", "output.dense"), ("ffn_norm", "output.LayerNorm"),
]
FAMILIES = {  # model_type: name of the class, names of the two linear maps of a classification head
    "bert": ("Bert", "bert.pooler.dense", "classifier"),
    "layoutlmv3": ("LayoutLMv3", "classifier.dense", "classifier.out_proj"),
}


def relative_rows(table, c):
    """LayoutLMv3's table (heads, 4 * max_len) of COCO-LM's (bins, heads), with a bin for each distance.

    Its formula is T5's. With so many bins distance d = key - query has bin -d for d <= 0 and 2 * max_len + d
    for d > 0. LayoutLMv3 divides by the root of the head width what it adds to the attention's logits.
    """
    distance = torch.arange(1 - c.max_len, c.max_len)
    bins = torch.where(distance > 0, 2 * c.max_len + distance, -distance)
    rows = torch.zeros(c.heads, 4 * c.max_len)
    rows[:, bins] = table[relative_position_bucket(distance, c.relative_bins, c.max_distance)].T
    return rows * math.sqrt(c.width / c.heads)


def export_encoder(weights, c, dropout, ids):
    """Tensors and settings of an encoder, by their names. ids: those that [PAD], [CLS] and [SEP] get"""
    tensors = {"embeddings.token_type_embeddings.weight": torch.zeros(1, c.width)}
    for name, tensor in weights.items():
        for our_name, their_name in EXPORTED:
            name = name.replace(our_name, their_name)
        parts = ("query", "key", "value") if "qkv" in name else ("",)
        for part, rows in zip(parts, tensor.chunk(len(parts))):
            tensors[name.replace("qkv", f"attention.self.{part}")] = rows.clone()
    if ids[0] == 0:  # the special tokens are last here, and first there
        tokens = "embeddings.word_embeddings.weight"
        tensors[tokens] = tensors[tokens].roll(len(SPECIALS), 0)
    settings = {
        "model_type": "bert", "hidden_act": "gelu", "layer_norm_eps": 1e-5, "type_vocab_size": 1,
        "vocab_size": c.vocab_size, "max_position_embeddings": c.max_len, "hidden_size": c.width,
        "num_hidden_layers": c.layers, "num_attention_heads": c.heads, "intermediate_size": c.ffn_width,
        "hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout,
        "pad_token_id": ids[0], "bos_token_id": ids[1], "eos_token_id": ids[2]}
    if not c.relative_positions:
        return tensors, settings
    if c.width % 8:
        raise InputError(f"width={c.width} cannot be exported: LayoutLMv3 needs a multiple of 8.")
    positions, before = "embeddings.position_embeddings.weight", ids[0] + 1  # they start behind [PAD]'s id
    tensors[positions] = F.pad(tensors[positions], (0, 0, before, 0))
    tensors["encoder.rel_pos_bias.weight"] = relative_rows(tensors.pop("relative.weight"), c)
    for axis, width in zip("xyhw", (c.width // 8, c.width // 8, c.width // 4, c.width // 4)):
        tensors[f"embeddings.{axis}_position_embeddings.weight"] = torch.zeros(1, width)  # of a page
    return tensors, settings | {
        "model_type": "layoutlmv3", "text_embed": True, "visual_embed": False,
        "max_position_embeddings": before + c.max_len, "max_2d_position_embeddings": 1,
        "coordinate_size": c.width // 8, "shape_size": c.width // 4,
        "has_relative_attention_bias": True, "has_spatial_attention_bias": False,
        "rel_pos_bins": 4 * c.max_len, "max_rel_pos": 2 * c.max_len}


def export_head(weights, task, dense, out):
    """Tensors and settings of a classification head. A regression gives the score itself."""
    low, high = (0.0, 1.0) if task["labels"] else (task["low"], task["high"])
    labels = task["labels"] or ["score"]
    tensors = {f"{dense}.weight": weights["dense.weight"], f"{dense}.bias": weights["dense.bias"],
               f"{out}.weight": weights["out.weight"] * (high - low),
               f"{out}.bias": weights["out.bias"] * (high - low) + low}
    return tensors, {"problem_type": "single_label_classification" if task["labels"] else "regression",
                     "id2label": dict(enumerate(labels)),
                     "label2id": {label: number for number, label in enumerate(labels)}}


def merge_of(token, ranks):
    """The two parts that byte-pair encoding makes a token of: b"lower" -> [b"low", b"er"]"""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        _, i = min((ranks.get(a + b, math.inf), i) for i, (a, b) in enumerate(zip(parts, parts[1:])))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def export_tokenizer(tokenizer):
    """tokenizer.json of a BPE. [PAD] [CLS] [SEP] [MASK] are 0 to 3, a token of rank r is r + 4."""
    tokenizers = import_optional("tokenizers", "the export")
    normalizers, pre_tokenizers = tokenizers.normalizers, tokenizers.pre_tokenizers
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that are letters, as in GPT-2
    hidden = sorted({*range(256)} - {*visible})
    letters = {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}
    words = {token: "".join(letters[byte] for byte in token) for token in tokenizer.ranks}
    vocabulary = {name: i for i, name in enumerate(SPECIALS)}
    vocabulary |= {words[token]: rank + len(SPECIALS) for token, rank in tokenizer.ranks.items()}
    merges = [tuple(words[part] for part in merge_of(token, tokenizer.ranks))
              for token in sorted(words, key=tokenizer.ranks.get) if len(token) > 1]
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges, ignore_merges=True))
    if tokenizer.lowercase:  # U+10FFFF stands for İ, of which Lowercase makes two characters
        bpe.normalizer = normalizers.Sequence([
            normalizers.Replace("İ", "\U0010ffff"), normalizers.Lowercase(),
            normalizers.Replace("\U0010ffff", "İ")])
    pattern = re.sub(r"(\{[\d,]+\})\+", r"\1", tokenizer.pattern)  # "{1,3}+" has another meaning there
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] [SEP] $B:0 [SEP]",
        special_tokens=[(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")])
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.add_special_tokens(list(SPECIALS))
    return bpe.to_str(pretty=True)


def text_files(tokenizer, c, max_len):
    """What turns a text into ids and, for sentence-transformers, into the vector that COCOLM.embed gives."""
    modules = enumerate({"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}.items())
    return {
        "tokenizer.json": export_tokenizer(tokenizer),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "processor_class": "PreTrainedTokenizerFast",
            "model_max_length": max_len, "model_input_names": ["input_ids", "attention_mask"],
            "clean_up_tokenization_spaces": False, "split_special_tokens": True,  # "[MASK]" is plain text
            **{f"{name[1:-1].lower()}_token": name for name in SPECIALS}},
        "modules.json": [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{module}"}
            for i, (module, path) in modules],
        "sentence_bert_config.json": {
            "transformer_task": "feature-extraction", "module_output_name": "token_embeddings",
            "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
            "max_seq_length": max_len},
        "1_Pooling/config.json": {"word_embedding_dimension": c.width, "pooling_mode_mean_tokens": True},
        "2_Normalize/config.json": {},
    }


def model_card(name, saved, settings, notes):
    """README.md, with the metadata that the hub reads. settings: config.json"""
    kind, pipeline = ("AutoModel", "feature-extraction") if "id2label" not in settings else (
        "AutoModelForSequenceClassification", "text-classification")
    run = saved.get("settings", {})
    facts = {"task": saved.get("task", {}).get("name"), "preset": run.get("preset"),
             "text": run.get("dataset"), "steps": saved["step"]}
    if "dataset" in run:
        facts["tokens"] = saved["step"] * run["batch_size"] * run["max_len"]
    facts |= {f"{metric} on dev": round(score, 4) for metric, score in saved.get("scores", {}).items()}
    facts |= {"torch": torch.__version__, **notes}
    lines = "".join(f"- {key}: {value}\n" for key, value in facts.items() if value not in (None, ""))
    loads = [f'model = {kind}.from_pretrained("{name}")']
    if "no tokenizer" not in notes:
        loads.append(f'tokenizer = AutoTokenizer.from_pretrained("{name}")')
    return f"""---
library_name: transformers
pipeline_tag: {pipeline}
tags: [coco-lm, nanococo]
---
# {name}

A COCO-LM text encoder (arXiv 2102.08473), written by nanoCOCO's convert.py.

```python
from transformers import {kind}, AutoTokenizer
""" + "\n".join(loads) + "\n```\n\n" + lines


def export(saved, tokenizer, name):
    """The files of a folder `name`, {name: content}, and what has to be said."""
    safetensors = import_optional("safetensors.torch", "the export")
    c, task = Config(**saved["config"]), saved.get("task", {})
    run = saved["settings"] if task else saved["config"]  # what has max_len and dropout
    has_text = not isinstance(tokenizer, SentencePieceTokenizer)  # which no stock tokenizer equals
    part = "encoder." if task else "main."
    encoder = {name.removeprefix(part): t for name, t in saved["model"].items() if name.startswith(part)}
    left = dict.fromkeys(name.split(".")[0] for name in saved["model"] if not name.startswith(part))
    tensors, settings = export_encoder(encoder, c, run["dropout"], (0, 1, 2) if has_text else (1, 0, 2))
    family, dense, out = FAMILIES[settings["model_type"]]
    settings["architectures"] = [f"{family}Model"]
    if "labels" in task:
        head, labels = export_head(saved["model"], task, dense, out)
        tensors = {f"{settings['model_type']}.{name}": tensor for name, tensor in tensors.items()} | head
        settings |= labels | {"architectures": [f"{family}ForSequenceClassification"]}
        left = {}
    notes = {"not carried": ", ".join(left)}
    if not has_text:
        notes["no tokenizer"] = "nanoCOCO's, in the checkpoint, has to give the ids"
    if c.relative_positions:
        notes["fixed in further training"] = "the table of relative positions"
    files = {"config.json": settings, "README.md": model_card(name, saved, settings, notes),
             "model.safetensors": safetensors.save(tensors, {"format": "pt"})}
    return files | (text_files(tokenizer, c, run["max_len"]) if has_text else {}), notes


def export_checkpoint(file, target):
    """Writes the folder of a checkpoint, completely or not at all."""
    saved = read_checkpoint(file)
    tokenizer = Tokenizer.from_state(saved["tokenizer"], file)
    try:
        files, notes = export(saved, tokenizer, target.name)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise InputError(f"{file} does not fit model.py: {error!r:.300}.") from None
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as scratch:
        for name, content in files.items():
            path = Path(scratch, "new", name)
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, (dict, list)):
                content = json.dumps(content, indent=1) + "\n"
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        os.rename(Path(scratch, "new"), target)
    print0(f"{target} has the weights of {file}, step {saved['step']:,}")
    for what, names in notes.items():
        if names:
            print0(f"  {what}: {names}")


def main(argv):
    parser = Parser(__doc__)
    parser.add_argument("source", help="a release, or a checkpoint")
    parser.add_argument("target", help="the file or folder to write; it must not exist")
    args = parser.parse_args(argv)
    file, target = find_file(Path(args.source)), Path(args.target)
    if target.exists():
        raise InputError(f"{target} exists: choose another name, or remove it.")
    saved = read_dict(file)
    if "step" in saved:
        export_checkpoint(file, target)
    else:
        convert_release(file, saved, target)


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
