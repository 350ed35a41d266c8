"""Other people's formats: a release of the authors becomes a checkpoint of this project.

    python convert.py cocolm-base out/cocolm-base.pt

A release is a folder or the file in it: fairseq's model.pt, or pytorch_model.bin or model.safetensors of the
Hugging Face port beside config.json. For text it also needs sp.model and dict.txt in that folder.
"""

import base64
import importlib
import json
import re
import sys
from argparse import Namespace
from pathlib import Path

import torch

from data import InputError, Parser, SentencePieceTokenizer, read_lines, read_torch, run_command
from model import COCOLM, PRESETS, Config
from train import print0, write_file

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
    """path, or the file with the weights if it is a folder"""
    names = ("model.pt", "model.safetensors", "pytorch_model.bin")
    files = [Path(path, name) for name in names] if path.is_dir() else [path]
    for file in files:
        if file.is_file():
            return file
    raise InputError(f"{path} is a folder without {', '.join(names)}." if path.is_dir() else
                     f"{path} does not exist.")


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
    """By our names: "encoder.sentence_encoder.layers.0.fc1.bias" becomes "main.layers.0.ffn_in.bias"."""
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
    parts = dict.fromkeys(name.split(".")[0] for name in new)
    in_part = {part for part in parts if any(name.startswith(part) for name in used)}
    return model, {
        "start anew": [f"{part} (in part)" if part in in_part else part for part in parts],
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


def main(argv):
    parser = Parser(__doc__)
    parser.add_argument("source", help="a release")
    parser.add_argument("target", help="the file to write; it must not exist")
    args = parser.parse_args(argv)
    file, target = find_file(Path(args.source)), Path(args.target)
    if target.exists():
        raise InputError(f"{target} exists: choose another name, or remove it.")
    saved = read_dict(file)
    if "step" in saved:
        raise InputError(f"{file} is a checkpoint of this project already.")
    convert_release(file, saved, target)


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
