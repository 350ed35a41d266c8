"""Other people's formats, in and out.

    python convert.py cocolm-base out/cocolm-base.pt   a release of the authors -> a checkpoint
    python convert.py out/ckpt.pt hf/                  a checkpoint -> a folder that Hugging Face's tools load

A release is a folder or the file in it: fairseq's model.pt, or pytorch_model.bin or model.safetensors of the
Hugging Face port beside config.json. For text it also needs sp.model and dict.txt in that folder.

A checkpoint is one of train.py, of finetune.py (best.pt), or a converted release. What is written is a stock
model, without code of its own: AutoModel, AutoTokenizer, pipeline and sentence-transformers load it. Of a
release it is the model alone, without a tokenizer.
"""

import base64
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

from data import (SPECIALS, InputError, Parser, SentencePieceTokenizer, Tokenizer, clean_up, read_lines,
                  read_torch, run_command)
from model import COCOLM, PRESETS, Config, relative_position_bucket
from train import write_file

BERT = [  # the names of BERT, of LayoutLMv3 and of the authors' Hugging Face port, and ours
    ("embeddings.word_embeddings", "embeddings.tokens"),
    ("embeddings.position_embeddings", "embeddings.positions"), ("embeddings.LayerNorm", "embeddings.norm"),
    ("encoder.layer", "layers"), ("attention.output.dense", "attention_out"),
    ("attention.output.LayerNorm", "attention_norm"), ("intermediate.dense", "ffn_in"),
    ("output.dense", "ffn_out"), ("output.LayerNorm", "ffn_norm"),
]
RELEASED = [  # the names of both releases, as regular expressions, and ours [model]
    (r"^\w+\.(?=(encoder|auxiliary|embeddings|scl_head|relative_attention_bias)\b)", ""),  # "model."
    ("^encoder.sentence_encoder", "main"), ("^auxiliary.sentence_encoder", "auxiliary"),
    ("embed_tokens", "embeddings.tokens"), ("embed_positions", "embeddings.positions"),
    ("emb_layer_norm", "embeddings.norm"), ("self_attn_layer_norm", "attention_norm"),
    ("(attention.)?self_attn.in_proj", "qkv"), ("(attention.)?self_attn.out_proj", "attention_out"),
    ("fc1", "ffn_in"), ("fc2", "ffn_out"), ("final_layer_norm", "ffn_norm"),
    ("^encoder.binary_head.out_proj", "copy_head"), ("^encoder.lm_head.bias", "lm_bias"),
    ("^(encoder.seq|scl)_head.dense", "scl_head.0"),
    ("^(encoder.seq|scl)_head.(layer_norm|LayerNorm)", "scl_head.2"),
    ("^auxiliary.lm_head.dense", "auxiliary.transform.0"),
    ("^auxiliary.lm_head.layer_norm", "auxiliary.transform.2"),
    ("^auxiliary.lm_head.bias", "auxiliary.output_bias"),
    ("relative_attention_bias", "relative"), ("attention.LayerNorm", "attention_norm"), *BERT,
    ("^(embeddings|layers|relative)", r"main.\1"),
]

# ------------------------------------------------------------------------------------------------------------
# From a release


def rename(weights):
    """By our names: encoder.sentence_encoder.layers.0.fc1.bias becomes main.layers.0.ffn_in.bias."""
    renamed = {}
    for name, tensor in weights.items():
        for pattern, our_name in RELEASED:
            name = re.sub(pattern, our_name, name)
        renamed[name] = tensor
    return renamed


def make_config(weights, settings):
    """The Config of a release, of its weights' sizes. settings: fairseq's args, or config.json"""
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
    """The main Transformer's tensor to which this code ties the one of this name; None if it is not tied."""
    if name.endswith("lm_head.weight"):
        return "main.embeddings.tokens.weight"
    return name.replace("auxiliary", "main", 1) if name.startswith("auxiliary.embeddings.") else None


def make_model(weights, config):
    """The COCOLM of a release, and notes, {note: names}, for example on newly initialized tensors."""
    torch.manual_seed(0)  # for the newly initialized ones
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
        "newly initialized": dict.fromkeys(name.split(".")[0] for name in new),
        "not used": [name for name in weights if name not in used and not tied(name)],
        "replaced by the main Transformer's": differ,
    }


def read_tokenizer(folder, vocab_size=None):
    """The tokenizer of a folder's sp.model and dict.txt. Either may be missing if no text is encoded."""
    model, dictionary = folder / "sp.model", folder / "dict.txt"
    model = base64.b64encode(model.read_bytes()).decode() if model.exists() else None
    text = "".join(line for _, line in read_lines(dictionary)) if dictionary.exists() else None
    return SentencePieceTokenizer(model, text, vocab_size, folder)


def from_release(saved, folder):
    """A checkpoint, and notes, {note: names}. saved: what is in the file of a release"""
    if "model" in saved:  # fairseq: {"args" or "cfg": Namespace, "model": weights, ...}
        weights, settings = saved["model"], vars(saved.get("args") or saved.get("cfg") or Namespace())
    else:  # Hugging Face
        weights, settings = saved, json.loads((folder / "config.json").read_bytes())
    weights = rename(weights)
    model, notes = make_model(weights, make_config(weights, settings))
    tokenizer = read_tokenizer(folder, model.config.vocab_size)
    vocabulary = {name: getattr(model.config, name) for name in ("vocab_size", "pad_id", "mask_id")}
    presets = [name for name in PRESETS if Config.from_preset(name, **vocabulary) == model.config]
    checkpoint = {"model": model.state_dict(), "config": vars(model.config), "step": 0,
                  "tokenizer": tokenizer.state(), "settings": {"preset": presets[0]} if presets else {}}
    absent = [name for name in ("sp.model", "dict.txt") if not (folder / name).exists()]
    return checkpoint, notes | {"missing, so it cannot encode texts": absent}


# ------------------------------------------------------------------------------------------------------------
# To Hugging Face: as LayoutLMv3's text encoder, or as BERT if there are no relative positions


def relative_rows(table, c):
    """LayoutLMv3's table (heads, 4 max_len) from this code's (bins, heads): one bin for each distance."""
    distance = torch.arange(1 - c.max_len, c.max_len)  # key - query
    bins = torch.where(distance > 0, 2 * c.max_len + distance, -distance)
    rows = table.new_zeros(c.heads, 4 * c.max_len)
    rows[:, bins] = table[relative_position_bucket(distance, c.relative_bins, c.max_distance)].T
    return rows * math.sqrt(c.width / c.heads)  # by which LayoutLMv3 divides


def export_encoder(weights, c, dropout, ids):
    """Tensors and settings, as Hugging Face names them. ids: those of [PAD], [CLS] and [SEP] there"""
    tensors = {"embeddings.token_type_embeddings.weight": torch.zeros(1, c.width)}
    for name, tensor in weights.items():
        for their_name, our_name in BERT:
            name = name.replace(our_name, their_name)
        parts = ("query", "key", "value") if "qkv" in name else ("",)
        for part, rows in zip(parts, tensor.chunk(len(parts))):
            tensors[name.replace("qkv", f"attention.self.{part}")] = rows.clone()
    if ids[0] == 0:  # the special tokens are last here, and first there
        tokens = "embeddings.word_embeddings.weight"
        tensors[tokens] = tensors[tokens].roll(len(SPECIALS), 0)
    settings = {
        "model_type": "bert", "architectures": ["BertModel"], "hidden_act": "gelu", "layer_norm_eps": 1e-5,
        "vocab_size": c.vocab_size, "max_position_embeddings": c.max_len, "type_vocab_size": 1,
        "num_hidden_layers": c.layers, "num_attention_heads": c.heads, "hidden_size": c.width,
        "intermediate_size": c.ffn_width, "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout, "pad_token_id": ids[0], "bos_token_id": ids[1],
        "eos_token_id": ids[2]}
    if not c.relative_positions:
        return tensors, settings
    if c.width % 8:
        raise ValueError(f"LayoutLMv3 needs a width that is a multiple of 8, not {c.width}")
    positions, before = "embeddings.position_embeddings.weight", ids[0] + 1  # they start behind [PAD]'s id
    tensors[positions] = F.pad(tensors[positions], (0, 0, before, 0))
    tensors["encoder.rel_pos_bias.weight"] = relative_rows(tensors.pop("relative.weight"), c)
    for axis, share in ("x", 8), ("y", 8), ("h", 4), ("w", 4):  # places on a page
        tensors[f"embeddings.{axis}_position_embeddings.weight"] = torch.zeros(1, c.width // share)
    return tensors, settings | {
        "model_type": "layoutlmv3", "architectures": ["LayoutLMv3Model"],
        "text_embed": True, "visual_embed": False, "max_position_embeddings": before + c.max_len,
        "max_2d_position_embeddings": 1, "coordinate_size": c.width // 8, "shape_size": c.width // 4,
        "has_relative_attention_bias": True, "has_spatial_attention_bias": False,
        "rel_pos_bins": 4 * c.max_len, "max_rel_pos": 2 * c.max_len}


def add_head(tensors, settings, weights, task):
    """Adds the classification head. For a regression, the last layer is scaled to give the score itself."""
    kind, labels = settings["model_type"], task["labels"] or ["score"]
    dense, out = {"bert": ("bert.pooler.dense", "classifier"),
                  "layoutlmv3": ("classifier.dense", "classifier.out_proj")}[kind]
    low, high = (0.0, 1.0) if task["labels"] else (task["low"], task["high"])
    if not task["labels"]:  # sentence-transformers' CrossEncoder would put a sigmoid behind it
        settings = settings | {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}
    return {
        **{f"{kind}.{name}": tensor for name, tensor in tensors.items()},
        f"{dense}.weight": weights["dense.weight"], f"{dense}.bias": weights["dense.bias"],
        f"{out}.weight": weights["out.weight"] * (high - low),
        f"{out}.bias": weights["out.bias"] * (high - low) + low,
    }, settings | {
        "architectures": [settings["architectures"][0].replace("Model", "ForSequenceClassification")],
        "problem_type": "single_label_classification" if task["labels"] else "regression",
        "id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}


def merge_of(token, ranks):
    """The two parts that byte-pair encoding makes a token of: b"lower" -> [b"low", b"er"]"""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        _, i = min((ranks.get(a + b, math.inf), i) for i, (a, b) in enumerate(zip(parts, parts[1:])))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def export_tokenizer(tokenizer):
    """tokenizer.json of a BPE. [PAD] [CLS] [SEP] [MASK] are 0 to 3, a token of rank r is r + 4."""
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors
    from tokenizers import Tokenizer as FastTokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()  # GPT-2's: a printable byte is itself, others follow
    letters = dict(zip(sorted(range(256), key=lambda byte: chr(byte) not in alphabet), sorted(alphabet)))
    ranks = tokenizer.ranks
    words = {token: "".join(letters[byte] for byte in token) for token in ranks}
    vocabulary = {name: i for i, name in enumerate(SPECIALS)}
    vocabulary |= {words[token]: rank + len(SPECIALS) for token, rank in ranks.items()}
    merges = [tuple(words[part] for part in merge_of(token, ranks))
              for token in sorted(ranks, key=ranks.get) if len(token) > 1]
    bpe = FastTokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    if tokenizer.lowercase:  # U+10FFFF stands for İ, of which Lowercase makes two characters
        bpe.normalizer = normalizers.Sequence([
            normalizers.Replace("İ", "\U0010ffff"), normalizers.Lowercase(),
            normalizers.Replace("\U0010ffff", "İ")])
    pattern = re.sub(r"(\{[\d,]+\})\+", r"\1", tokenizer.pattern)  # "{1,3}+" has another meaning there
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=True, add_prefix_space=False),  # the characters of " cat" are "cat"
        processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] [SEP] $B:0 [SEP]",
            special_tokens=[(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")])])
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(list(SPECIALS))
    return bpe.to_str(pretty=True).encode()


def text_files(tokenizer, c, max_len):
    """What turns a text into ids and, for sentence-transformers, into the vector that COCOLM.embed gives."""
    modules = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    return {
        "tokenizer.json": export_tokenizer(tokenizer),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "processor_class": "PreTrainedTokenizerFast",
            "model_max_length": max_len, "model_input_names": ["input_ids", "attention_mask"],
            "clean_up_tokenization_spaces": False, "split_special_tokens": True,  # "[MASK]" is plain text
            **{f"{name[1:-1].lower()}_token": name for name in SPECIALS}},
        "modules.json": [
            {"idx": i, "name": str(i), "path": folder, "type": f"sentence_transformers.models.{module}"}
            for i, (folder, module) in enumerate(modules.items())],
        "sentence_bert_config.json": {
            "transformer_task": "feature-extraction", "module_output_name": "token_embeddings",
            "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
            "max_seq_length": max_len},
        "1_Pooling/config.json": {"word_embedding_dimension": c.width, "pooling_mode_mean_tokens": True},
        "2_Normalize/config.json": {},
    }


def model_card(name, saved, has_head, has_text, left):
    """README.md, with the metadata that the hub reads"""
    run = saved.get("settings", {})
    facts = {"task": saved.get("task", {}).get("name"), "preset": run.get("preset"), "steps": saved["step"],
             "torch": torch.__version__, "not carried": ", ".join(left)}
    facts |= {f"{metric} on dev": round(score, 4) for metric, score in saved.get("scores", {}).items()}
    if "dataset" in run:
        facts |= {"text": run["dataset"], "tokens": saved["step"] * run["batch_size"] * run["max_len"]}
    kind = "AutoModelForSequenceClassification" if has_head else "AutoModel"
    code = ["import transformers", f'model = transformers.{kind}.from_pretrained({name!r})']
    if has_text:
        code.append(f'tokenizer = transformers.AutoTokenizer.from_pretrained({name!r})')
    lines = [
        "---", "library_name: transformers", "tags: [coco-lm, nanococo]",
        f"pipeline_tag: {'text-classification' if has_head else 'feature-extraction'}", "---", f"# {name}\n",
        "A COCO-LM text encoder (arXiv 2102.08473), written by nanoCOCO's convert.py.\n",
        "```python", *code, "```\n",
        *(f"- {what}: {fact}" for what, fact in facts.items() if fact not in (None, "")), ""]
    return "\n".join(lines).encode()


def export(saved, tokenizer, name):
    """The files of a folder `name`, {path: bytes, or what becomes JSON}, and notes."""
    import safetensors.torch
    c, task, weights = Config(**saved["config"]), saved.get("task", {}), saved["model"]
    run, part = (saved["settings"], "encoder.") if task else (saved["config"], "main.")
    has_text = not isinstance(tokenizer, SentencePieceTokenizer)  # which no stock tokenizer equals
    encoder = {name.removeprefix(part): t for name, t in weights.items() if name.startswith(part)}
    tensors, settings = export_encoder(encoder, c, run["dropout"], (0, 1, 2) if has_text else (1, 0, 2))
    left = [*dict.fromkeys(name.split(".")[0] for name in weights if not name.startswith(part))]
    if "labels" in task:
        (tensors, settings), left = add_head(tensors, settings, weights, task), []
    if not has_text:
        left.append("the tokenizer (nanoCOCO's, in the checkpoint, has to give the ids)")
    if c.relative_positions:
        left.append("training of the relative positions, which stay as they are")
    files = text_files(tokenizer, c, run["max_len"]) if has_text else {}
    files |= {"README.md": model_card(name, saved, "labels" in task, has_text, left),
              "model.safetensors": safetensors.torch.save(tensors, {"format": "pt"}),
              "config.json": settings}
    return files, {"not carried": left}


def read(path):
    """The file with the weights, which is path or in that folder, and the dict in it. Runs no code."""
    names = ("model.pt", "model.safetensors", "pytorch_model.bin", "ckpt.pt")
    file = next((path / name for name in names if (path / name).is_file()), path)
    if file.is_dir():
        raise InputError(f"{path} is a folder without {', '.join(names)}.")
    if file.suffix != ".safetensors":
        return file, read_torch(file)
    import safetensors.torch
    return file, safetensors.torch.load_file(file)


def is_export(folder):
    """Whether a folder holds an export and nothing else, unchanged by Hugging Face's tools."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    files = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    exported = {"README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
                "modules.json", "sentence_bert_config.json", "1_Pooling/config.json",
                "2_Normalize/config.json"}
    if not {"README.md", "config.json"} <= files <= exported:
        return False
    marks = {"config.json": b"transformers_version", "tokenizer_config.json": b'"backend"'}
    return b"nanoCOCO's convert.py" in (folder / "README.md").read_bytes() and not any(
        word in (folder / file).read_bytes() for file, word in marks.items() if file in files)


def write_folder(folder, files):
    """Writes a folder, completely or not at all. An older export is replaced."""
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        for name, content in files.items():
            file = scratch / "new" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            as_bytes = content if isinstance(content, bytes) else json.dumps(content, indent=1).encode()
            file.write_bytes(as_bytes)
        if folder.exists():
            os.rename(folder, scratch / "old")
        os.rename(scratch / "new", folder)
    finally:
        clean_up(scratch, folder)


def main(argv):
    parser = Parser(__doc__)
    parser.add_argument("source", type=Path, help="a release, or a checkpoint")
    parser.add_argument("target", type=Path, help="the file or folder to write")
    source, target = vars(parser.parse_args(argv)).values()
    if os.path.lexists(target) and not is_export(target):
        raise InputError(f"{target} exists: choose another name, or remove it.")
    try:
        file, saved = read(source)
        if "step" in saved:
            tokenizer, write = Tokenizer.from_state(saved["tokenizer"], file), write_folder
            content, notes = export(saved, tokenizer, target.name)
        elif target.suffix == ".pt":
            (content, notes), write = from_release(saved, file.parent), write_file
        else:
            raise InputError(f"{file} is a release, which becomes a file: {target} has to end in .pt.")
    except InputError:
        raise
    except ImportError as error:
        package = (error.name or "").split(".")[0]
        raise InputError(f"this needs a package: pip install {package}" if package else str(error)) from None
    except Exception as error:  # what is damaged, or of another kind, has many names
        reason = f"{error!r:.300}"
        raise InputError(f"{source} is no checkpoint and no release that can be used ({reason}).") from None
    target.parent.mkdir(parents=True, exist_ok=True)
    write(target, content)
    print(f"{target} has the weights of {source}")
    for what, names in notes.items():
        if names:
            print(f"  {what}: {', '.join(names)}")


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1:]))
