"""convert.py: the authors' released weights and their tokenizer; all in float32.

Releases are written here: the fixtures, whose outputs the authors' own code computed, and random ones.
"""

import io
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import unicodedata
from argparse import Namespace
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import runs
import torch

import convert
import data
import finetune
import model as coco
import train

FIXTURES = Path(__file__).parent / "fixtures"
SIZES = [  # in our Config, in the args of their fairseq code, in config.json of their Hugging Face port
    ("relative_bins", "rel_pos_bins", "rel_pos_bins"), ("max_distance", "max_rel_pos", "max_rel_pos"),
    ("layers", "encoder_layers", "num_hidden_layers"), ("width", "encoder_embed_dim", "hidden_size"),
    ("ffn_width", "encoder_ffn_embed_dim", "intermediate_size"),
    ("heads", "encoder_attention_heads", "num_attention_heads"),
    ("max_len", "max_positions", "max_position_embeddings"),
    ("auxiliary_layers", "generator_layers", "generator_layers"),
]
FIXTURE = coco.Config(vocab_size=48, pad_id=1, mask_id=47, max_len=32, layers=2, width=16, heads=2,
                      ffn_width=40, auxiliary_layers=1, relative_bins=8, max_distance=12)
OTHER = dict(pad_id=1, max_len=24, layers=11, width=24, heads=3, ffn_width=36, auxiliary_layers=3,
             relative_bins=12, max_distance=10)
KINDS = "fairseq", "huggingface"
EACH_KIND = pytest.mark.parametrize("kind", KINDS)

# ------------------------------------------------------------------------------------------------------------
# Helpers


def official(kind):
    """A fixture: weights, inputs and outputs"""
    groups = {"param": {}, "in": {}, "out": {}}
    for key, array in np.load(FIXTURES / f"{kind}_tiny.npz").items():
        group, name = key.split("/")
        groups[group][name] = torch.from_numpy(array)
    return groups.values()


def write_release(folder, kind, weights=None, config=FIXTURE, format="zip", wrap="args", **changes):
    """Writes a release, by default the fixture, without a tokenizer. changes: of the sizes that it states"""
    weights = next(iter(official(kind))) if weights is None else weights
    settings = {row[1 + KINDS.index(kind)]: getattr(config, row[0]) for row in SIZES} | changes
    file, content = "pytorch_model.bin", weights
    if kind == "huggingface":
        (folder / "config.json").write_text(json.dumps(settings))
    else:
        file, content = "model.pt", {"args": None, "model": weights, wrap: Namespace(**settings)}
    if format == "safetensors":
        pytest.importorskip("safetensors.torch").save_file(weights, folder / "model.safetensors")
    else:
        torch.save(content, folder / file, _use_new_zipfile_serialization=format == "zip")


def converted(source, target=None):
    """(model, tokenizer) of a release, by way of the command"""
    target = target or Path(tempfile.mkdtemp(), "new", "converted.pt")
    convert.main([str(source), str(target)])
    return train.load_checkpoint(target)


def random_release(folder, kind, config):
    """Writes a release with random weights -> the weights, by our names

    Which of the fixture's tensors is which of ours is seen when it is loaded; parity shows that it is right.
    """
    weights, *_ = official(kind)
    write_release(folder, kind, weights)
    loaded = dict(converted(folder)[0].named_parameters())
    pairs = [(theirs, name) for theirs, tensor in weights.items() for name in loaded
             if torch.equal(tensor, loaded[name])]
    torch.manual_seed(1)
    ours = {name: 0.3 * torch.randn_like(p) for name, p in coco.COCOLM(config).named_parameters()}
    theirs = {re.sub(r"(layers?)\.\d+", rf"\1.{n}", theirs): ours[here].clone() for theirs, name in pairs
              for n in range(config.layers) if (here := re.sub(r"layers\.\d+", f"layers.{n}", name)) in ours}
    write_release(folder, kind, theirs, config)
    return ours


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs a command in this process -> (exit status, what it printed)"""
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def run(main, *arguments):
        status = 0
        try:
            data.run_command(lambda: main(list(map(str, arguments))))
        except SystemExit as stop:
            status = stop.code
        return status, "".join(capsys.readouterr())
    return run


# ------------------------------------------------------------------------------------------------------------
# Weights


@pytest.mark.parametrize("layout", [
    dict(), dict(format="legacy"), dict(wrap="cfg"), dict(format="legacy", wrap="cfg")], ids=str)
@pytest.mark.parametrize("prefix", ["", "model."])
def test_fairseq_outputs_and_losses(tmp_path, layout, prefix, capsys):
    weights, inputs, outputs = official("fairseq")
    weights = {prefix + name: tensor for name, tensor in weights.items()}
    weights["classification_heads.mnli.dense.weight"] = weights[prefix + "version"] = torch.ones(1)
    write_release(tmp_path, "fairseq", weights, **layout)
    model, _ = converted(tmp_path if prefix else tmp_path / "model.pt")
    assert model.config == FIXTURE and not model.training
    said = capsys.readouterr().out
    assert "version" in said and "classification_heads.mnli.dense.weight" in said and "newly" not in said

    tokens, corrupted, mask = inputs["tokens"], inputs["corrupted"], inputs["mask"]
    real, same = tokens != 1, corrupted == tokens
    auxiliary_hidden = model.auxiliary(inputs["masked_tokens"])
    hidden, crop_hidden = model.main(corrupted, ~real), model.main(inputs["crop"])
    copy_logits = model.copy_head(hidden)[..., 0]
    found = dict(auxiliary_hidden=auxiliary_hidden, main_hidden=hidden, crop_hidden=crop_hidden,
                 auxiliary_logits=model.auxiliary.logits(auxiliary_hidden[mask]),
                 lm_logits=model.lm_logits(hidden[mask]), copy_logits=copy_logits[real],
                 seq_emb=model.scl_head(hidden[:, 0]), crop_seq_emb=model.scl_head(crop_hidden[:, 0]))
    heads = found["lm_logits"], copy_logits[mask], tokens[mask]
    cosines = coco.cosines(found["seq_emb"], found["crop_seq_emb"])
    found |= dict(mlm_loss=coco.mlm_loss(found["auxiliary_logits"], tokens[mask]).mean(),
                  copy_loss=coco.copy_loss(copy_logits, same)[real].mean(),
                  lm_loss_weighted=coco.lm_loss_weighted(*heads).mean(),
                  lm_loss_mixture=coco.lm_loss_mixture(*heads, same[mask]).mean(),
                  scl_loss_temperature_1=coco.scl_loss(cosines, 1.0))
    assert found.keys() == outputs.keys()
    for name, value in found.items():
        where = (inputs["crop"] != 1 if "crop" in name else real) if "hidden" in name else ...
        close(value[where], outputs[name][where])


@pytest.mark.parametrize("format", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("prefix", ["cocolm.", ""])
def test_hugging_face_outputs(tmp_path, format, prefix, capsys):
    """What the port has is as its code computed; what it has not is new, which is said."""
    weights, inputs, outputs = official("huggingface")
    weights = {name.replace("cocolm.", prefix): tensor for name, tensor in weights.items()}
    write_release(tmp_path, "huggingface", weights, format=format)
    model, _ = converted(tmp_path)
    real, hidden = inputs["tokens"] != 1, model.main(inputs["tokens"])
    close(hidden[real], outputs["main_hidden"][real])
    close(model.scl_head(hidden[:, 0]), outputs["seq_emb"])
    said = capsys.readouterr().out
    assert all(name in said for name in ("auxiliary", "copy_head", "lm_bias", "classifier.out_proj.weight"))
    assert "scl_head" not in said and not model.lm_bias.any()


@EACH_KIND
def test_other_sizes(tmp_path, kind):
    """Eleven layers: their numbers have one and two digits."""
    expected = random_release(tmp_path, kind, coco.Config(vocab_size=60, **OTHER))
    model, _ = converted(tmp_path)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[name]) or kind == "huggingface" and not name.startswith(
            ("main", "scl")), name
    assert model.config == coco.Config(vocab_size=60, **OTHER)


@pytest.mark.parametrize("name, said", [
    ("auxiliary.sentence_encoder.embed_positions.weight", "positions"),
    ("auxiliary.sentence_encoder.emb_layer_norm.bias", "norm"),
    ("encoder.lm_head.weight", "lm_head"), ("auxiliary.lm_head.weight", "auxiliary.lm_head")])
def test_weights_that_are_shared_here_alone_are_said(tmp_path, name, said, capsys):
    """Those of the main Transformer are taken."""
    weights, *_ = official("fairseq")
    write_release(tmp_path, "fairseq")
    before, _ = converted(tmp_path)
    assert said not in capsys.readouterr().out
    write_release(tmp_path, "fairseq", weights | {name: weights[name] + 1})
    model, _ = converted(tmp_path)
    assert said in capsys.readouterr().out
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


def test_a_head_of_another_width_starts_anew(tmp_path, capsys):
    """Their SCL head is 768 wide by default, whatever the model's width."""
    weights, *_ = official("fairseq")
    wide = {name: torch.ones(24, *w.shape[1:]) for name, w in weights.items() if "seq_head" in name}
    write_release(tmp_path, "fairseq", weights | wide)
    model, _ = converted(tmp_path)
    assert "scl_head" in capsys.readouterr().out and not model.scl_head[0].bias.any()


@pytest.mark.parametrize("kind, lost, changes", [  # lost: what begins so is not in the file
    ("fairseq", "encoder.sentence_encoder.layers.1.fc2.bias", {}), ("fairseq", "", {}),
    ("fairseq", "encoder.sentence_encoder.embed_tokens", {}),
    ("fairseq", "encoder.sentence_encoder.layers.1", {}), ("fairseq", "none", {"encoder_layers": 3}),
    ("fairseq", "none", {"max_rel_pos": None}), ("fairseq", "none", {"max_rel_pos": "far"}),
    ("huggingface", "none", {"num_hidden_layers": 3}), ("huggingface", "none", {"max_rel_pos": None})])
def test_what_makes_no_model_is_refused(tmp_path, kind, lost, changes):
    weights, *_ = official(kind)
    weights = {name: tensor for name, tensor in weights.items() if not name.startswith(lost)}
    write_release(tmp_path, kind, weights, **changes)
    with pytest.raises(data.InputError):
        converted(tmp_path)


def test_a_missing_or_damaged_config(tmp_path):
    write_release(tmp_path, "huggingface")
    converted(tmp_path)
    for text in ("", "{", "[]", "{}", "\0", None):
        (tmp_path / "config.json").unlink()
        if text is not None:
            (tmp_path / "config.json").write_text(text)
        with pytest.raises(data.InputError):
            converted(tmp_path)


class Crafted:
    """Pickled, it creates a file when it is read."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@EACH_KIND
@pytest.mark.parametrize("format", ["zip", "legacy"])
def test_reading_runs_no_code(tmp_path, kind, format, command):
    created, (weights, *_) = tmp_path / "created", official(kind)
    write_release(tmp_path, kind, weights | {"other": Crafted(created)}, format=format)
    status, said = command(convert.main, tmp_path, tmp_path / "new.pt")
    assert status == 2 and "Traceback" not in said
    assert not created.exists() and not (tmp_path / "new.pt").exists()
    torch.load(next(tmp_path.glob("*model.*")), weights_only=False)
    assert created.exists()  # it would have been


@pytest.mark.parametrize("damage", [
    lambda w: w * math.nan, lambda w: w / 0, lambda w: w.long(), lambda w: w.to(torch.complex64)])
def test_what_is_not_finite_is_refused(tmp_path, damage, command):
    """What is not used may be anything, a `version` of integers, say."""
    weights, *_ = official("fairseq")
    weights["encoder.version"], weights["other"] = torch.tensor([3]), torch.tensor([math.nan])
    write_release(tmp_path, "fairseq", weights)
    converted(tmp_path)
    bias = "encoder.lm_head.bias"
    write_release(tmp_path, "fairseq", weights | {bias: damage(weights[bias])})
    status, said = command(convert.main, tmp_path, tmp_path / "new.pt")
    assert status == 2 and "lm_bias" in said and not (tmp_path / "new.pt").exists(), said


@EACH_KIND
def test_what_is_written(tmp_path, kind):
    """A checkpoint of ours: float32 whatever the release has, the same each time, and all that COCOLM has."""
    weights, *_ = official(kind)
    write_release(tmp_path, kind, {name: tensor.half() for name, tensor in weights.items()})
    for name in ("a.pt", "b.pt"):
        convert.main([str(tmp_path), str(tmp_path / name)])
    saved, again = data.read_torch(tmp_path / "a.pt"), data.read_torch(tmp_path / "b.pt")
    model = coco.COCOLM(coco.Config(**saved["config"]))
    assert saved["step"] == 0 and saved["model"].keys() == model.state_dict().keys()
    for name, tensor in saved["model"].items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, again["model"][name]), name


def test_wrong_arguments(tmp_path, command):
    write_release(tmp_path, "fairseq")
    (tmp_path / "there.pt").write_text("mine")
    for source, target, word in (
            (".", "there.pt", "exists"), (".", "folder", ".pt"), ("no", "new.pt", "not exist"),
            (FIXTURES, "new.pt", "folder without"), ("there.pt", "new.pt", "damaged")):
        status, said = command(convert.main, tmp_path / source, tmp_path / target)
        assert status == 2 and word in said and "Traceback" not in said, said
        assert not (tmp_path / "new.pt").exists() and (tmp_path / "there.pt").read_text() == "mine"


# ------------------------------------------------------------------------------------------------------------
# Their tokenizer


@pytest.fixture(scope="session")
def pieces(tmp_path_factory):
    """A folder with an sp.model, which knows few characters, and a dict.txt without some of its pieces"""
    spm, draw, file = pytest.importorskip("sentencepiece"), random.Random(0), io.BytesIO()
    words = "the cat sat on a mat , dogs bark . it 's we 're i 'll \" naïve ( river ) don 't 12 - u.s."
    sentences = [" ".join(draw.choices(words.split(), k=12)) for _ in range(500)]
    spm.SentencePieceTrainer.train(sentence_iterator=iter(sentences), model_writer=file, vocab_size=70,
                                   hard_vocab_limit=False, minloglevel=2)
    processor = spm.SentencePieceProcessor(model_proto=file.getvalue())
    symbols = [processor.id_to_piece(i) for i in range(3, processor.get_piece_size())]
    folder = tmp_path_factory.mktemp("pieces")
    (folder / "sp.model").write_bytes(file.getvalue())
    (folder / "dict.txt").write_text("".join(f"{symbol} 1\n" for symbol in symbols[:1:-1]), encoding="utf-8")
    return folder


def is_mark(character):
    return character.isascii() and not character.isalnum() or unicodedata.category(character)[0] == "P"


def slow_clean(text):
    text, words = text.strip().replace("``", '"').replace("''", '"'), []
    for curly, plain in zip("“”‘’–—", "\"\"''--"):
        text = text.replace(curly, plain)
    for word in text.split():
        start, end = 0, len(word)
        while start < end and is_mark(word[start]):
            start += 1
        while start < end and is_mark(word[end - 1]):
            end -= 1
        words += [part for part in (word[:start], word[start:end], word[end:]) if part]
    text = " ".join(words)
    for clitic in ("s", "m", "d", "t", "ll", "re", "ve", "S", "M", "D", "T", "LL", "RE", "VE"):
        text = re.sub(rf"' {clitic}\b", f"'{clitic}", text)
    return text


def random_texts(count=3000):
    """Without characters that sentencepiece normalises"""
    draw = random.Random(0)
    parts = [*"aest 12é.,?!-()[]'’‘“”`–—«¿\n\t ", "'s", "' t", " 're", "’LL", "' ve", "cat ", "the ", "mat"]
    return ["".join(draw.choices(parts, k=draw.randint(0, 14))) for _ in range(count)]


@pytest.mark.parametrize("text, cleaned", [
    ("``Don't,'' he 's said", '" Don\'t ," he \'s said'), ("  (the cat)…\n", "( the cat )…"),
    ("‘‘a’’ “b” c—d – e", "'' a '' \" b \" c-d - e"), ("it ' s We ’ LL go", "it 's We 'LL go"),
    ("rock ' stone ' team 's' re-do", "rock ' stone ' team 's 're-do"), ("!?", "!?"), (" ", ""),
    ("U.S. ¿que? a.b", "U.S . ¿ que ? a.b")])
def test_cleaning(text, cleaned):
    assert data.clean(text)[0] == slow_clean(text) == cleaned


def test_cleaning_of_random_texts():
    for text in random_texts():
        cleaned, starts, ends = data.clean(text)
        assert cleaned == slow_clean(text), text
        assert len(cleaned) == len(starts) == len(ends) and sorted(starts) == starts and sorted(ends) == ends
        for character, start, end in zip(cleaned, starts, ends):
            assert slow_clean(text[start:end]) == character.strip(), text


def test_ids_offsets_and_text(pieces):
    tokenizer, dropped = convert.read_tokenizer(pieces), 0
    import sentencepiece
    processor = sentencepiece.SentencePieceProcessor(model_file=str(pieces / "sp.model"))
    lines = (pieces / "dict.txt").read_text(encoding="utf-8").splitlines()
    numbers = {line.split(" ")[0]: 4 + i for i, line in enumerate(lines)}
    assert tokenizer.special_ids == {"[CLS]": 0, "[PAD]": 1, "[SEP]": 2, "[MASK]": 4 + len(lines)}
    assert tokenizer.vocab_size == 5 + len(lines) and tokenizer.dtype == np.uint16
    for text in random_texts(1000):
        found, kept = processor.encode(slow_clean(text), out_type=str), []
        for piece, following in zip(found, [*found[1:], "."]):
            if piece != "▁" or not is_mark(following[0]):
                kept.append(piece)
        dropped += len(found) - len(kept)
        ids, spans = tokenizer.offsets(text)
        assert ids == tokenizer.encode(text) == [numbers.get(piece, 3) for piece in kept], text
        assert len(ids) == len(spans) and np.all(np.diff(spans, axis=0) >= 0)
        assert np.all(spans[:, 0] <= spans[:, 1]) and spans.max(initial=0) <= len(text)
        for piece, (start, end) in zip(kept, spans):
            assert slow_clean(text[start:end]).replace(" ", "") == piece.strip("▁"), text
    assert dropped
    for text in ("cat[MASK]cat", "cat[CLS]cat", "cat[PAD]", "<s> <pad> </s>", "<mask>"):  # ordinary text
        assert not set(tokenizer.encode(text)) & set(tokenizer.special_ids.values())
    assert tokenizer.decode(tokenizer.encode("(the cat sat)")) == "( the cat sat )"
    assert data.Tokenizer.from_state(tokenizer.state()).encode("the dogs ?") == tokenizer.encode("the dogs ?")


DICTIONARY = "".join(f"w{i} 1\n" for i in range(43))  # for the 48 tokens of the fixtures


@pytest.mark.parametrize("files, said", [
    ((), "sp.model"), (("dict.txt",), "sp.model"), (("sp.model",), "dict.txt"),
    (("sp.model", "dict.txt"), "pip install sentencepiece")], ids=str)
def test_the_first_use_says_what_the_tokenizer_lacks(tmp_path, monkeypatch, files, said):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    write_release(tmp_path, "fairseq")
    for file in files:
        (tmp_path / file).write_text(DICTIONARY)
    _, tokenizer = converted(tmp_path)
    with pytest.raises(data.InputError, match=said):
        tokenizer.batch(["a text"])


@pytest.mark.parametrize("content", [b"", b"damaged"])
def test_a_damaged_sp_model(pieces, tmp_path, content):
    shutil.copy(pieces / "dict.txt", tmp_path)
    (tmp_path / "sp.model").write_bytes(content)
    with pytest.raises(data.InputError, match="sp.model"):
        convert.read_tokenizer(tmp_path).encode("a text")


@pytest.mark.parametrize("text", [
    DICTIONARY + "w 1\n", DICTIONARY[:-6], "", DICTIONARY.replace("w5", "w6")], ids=range(4))
def test_a_dictionary_that_does_not_fit_is_refused(tmp_path, text):
    write_release(tmp_path, "fairseq")
    (tmp_path / "dict.txt").write_text(DICTIONARY)
    assert converted(tmp_path)[1].mask_id == 47
    (tmp_path / "dict.txt").write_text(text)
    with pytest.raises(data.InputError, match="dict.txt"):
        converted(tmp_path)


# ------------------------------------------------------------------------------------------------------------
# From a folder to the end


@EACH_KIND
def test_from_a_release_to_the_end(pieces, tmp_path, kind, command):
    """Continued pretraining, whose learning rate of 0 shows what it starts from; fine-tuning; vectors."""
    config = coco.Config(vocab_size=convert.read_tokenizer(pieces).vocab_size, **OTHER)
    expected, checkpoint = random_release(tmp_path, kind, config), tmp_path / "converted.pt"
    for file in pieces.iterdir():
        shutil.copy(file, tmp_path)
    converted(tmp_path, checkpoint)
    corpus = runs.make_corpus(tmp_path, encoding=str(checkpoint), vocab_size=None)
    options = [f"--init_from={checkpoint}", "--dtype=float32", "--device=cpu"]
    training = [*options, f"--data_dir={tmp_path}", "--dataset=toy", f"--out_dir={tmp_path}/out",
                "--learning_rate=0", "--batch_size=4", "--max_steps=3", "--eval_batches=1"]
    for contradiction in ("--layers=2", "--max_len=32", "--relative_bins=64"):
        status, said = command(train.main, *training, contradiction)
        assert status == 2 and "Traceback" not in said and not (tmp_path / "out").exists(), said
    status, said = command(train.main, *training)
    assert status == 0, said
    model, tokenizer = train.load_checkpoint(tmp_path / "out" / "ckpt.pt")
    for name, parameter in model.named_parameters():
        if kind == "fairseq" or name.startswith(("main", "scl")):
            assert torch.equal(parameter, expected[name]), name
    assert tokenizer.state() == data.Tokenizer.load(checkpoint).state()
    ids = np.fromfile(corpus / "val.bin", tokenizer.dtype).tolist()
    documents = (tmp_path / "toy.txt").read_text().split("\n\n")
    assert ids[: ids.index(tokenizer.sep_id)] in [tokenizer.encode(text) for text in documents]

    (tmp_path / "CoLA").mkdir()
    lines = [f"x\t{i % 2}\t\tthe {'cat' if i % 2 else 'dogs'} sat\n" for i in range(32)]
    for split in ("train", "dev"):
        (tmp_path / "CoLA" / f"{split}.tsv").write_text("".join(lines))
    status, said = command(finetune.main, *options, f"--data_dir={tmp_path}", f"--out_dir={tmp_path}/fine",
                           "--task=CoLA", "--epochs=1")
    assert status == 0 and (tmp_path / "fine" / "CoLA" / "seed0" / "best.pt").exists(), said

    model, tokenizer = train.load_checkpoint(checkpoint)
    tokens = tokenizer.batch(["the cat sat " * 20, "dogs"])
    assert tokens.shape == (2, 24)
    close(model.embed(tokens).norm(dim=1), torch.ones(2))


# ------------------------------------------------------------------------------------------------------------
# To Hugging Face: stock models give what ours gives

SMALL = dict(max_len=32, layers=2, width=16, heads=2, ffn_width=24, auxiliary_layers=1, relative_bins=8,
             max_distance=12)
SHAPES = {}  # the heads, widths and bins of the presets, with two layers
for preset, max_len in (("tiny", 128), ("small", 64), ("base", 128), ("base++", 160), ("large++", 288)):
    config = coco.Config.from_preset(preset, vocab_size=300)
    SHAPES[preset] = {name: getattr(config, name) for name in SMALL}
    SHAPES[preset] |= dict(layers=2, auxiliary_layers=1, ffn_width=64, max_len=max_len)


@pytest.fixture(scope="session")
def hf():
    """transformers, which stays offline"""
    os.environ["HF_HUB_OFFLINE"] = "1"
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    for package in ("safetensors", "tokenizers"):
        pytest.importorskip(package, reason=f"pip install {package}")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def small_tokenizer(pattern=data.PATTERN, lowercase=True):
    text = "the cat sat on the mat. it's 1234 dogs, they'll bark; naïve cats and lower lowest mats 12 34 " * 3
    words = Counter(data.regex.findall(pattern, text))
    return data.Tokenizer(data.train_bpe(words, 300), pattern, lowercase)


def exported(folder, tokenizer=None, **changes):
    """(our model, its tokenizer, the folder for Hugging Face) of random weights"""
    tokenizer = tokenizer or small_tokenizer()
    model = coco.COCOLM(coco.Config(tokenizer.vocab_size, **SMALL | changes)).eval()
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        size = 1.0 if "relative" in name else 0.4 / model.config.width**0.5
        parameter.data += size * torch.randn_like(parameter)
    torch.save({"model": model.state_dict(), "config": vars(model.config), "step": 3,
                "tokenizer": tokenizer.state()}, folder / "ckpt.pt")
    convert.main([str(folder / "ckpt.pt"), str(folder / "hf")])
    return model, tokenizer, folder / "hf"


def equal_hidden_states(model, theirs, first=4):
    """At max_len, one token below, and with padding; first: the id that the first token has there"""
    c = model.config
    tokens = torch.randint(5, c.vocab_size - 5, (3, c.max_len))
    tokens[1, c.max_len - 1 :] = tokens[2, c.max_len // 3 :] = c.pad_id
    for part in (tokens, tokens[1:, : c.max_len - 1], tokens[2:, : c.max_len // 2]):
        mask = part != c.pad_id
        with torch.no_grad():
            expected = model.main(part)[mask]
            found = theirs(input_ids=(part + first) % c.vocab_size, attention_mask=mask.long())
        torch.testing.assert_close(found.last_hidden_state[mask], expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("changes", [*SHAPES.values(), dict(relative_positions=False)],
                         ids=[*SHAPES, "relative_positions=False"])
def test_hidden_states(tmp_path, hf, changes):
    model, _, folder = exported(tmp_path, **changes)
    theirs = hf.AutoModel.from_pretrained(folder)
    assert type(theirs) is (hf.BertModel if changes == dict(relative_positions=False) else hf.LayoutLMv3Model)
    equal_hidden_states(model, theirs)


@EACH_KIND
def test_hidden_states_of_a_release(tmp_path, hf, kind, capsys):
    """Its vocabulary stays in order; its tokenizer is not a stock one, which is said."""
    write_release(tmp_path, kind)
    model, _ = converted(tmp_path, tmp_path / "new.pt")
    convert.main([str(tmp_path / "new.pt"), str(tmp_path / "hf")])
    assert "the tokenizer" in capsys.readouterr().out and not list(tmp_path.glob("hf/tokenizer*"))
    equal_hidden_states(model, hf.AutoModel.from_pretrained(tmp_path / "hf"), first=0)


ODD = [
    "İ", "ı", "Σ", "ΑΣ", "ς", "é", "e\u0301", "\u0307", "i\u0307", "\0", "\r\n", "\r", "\n\n", "\u00a0",
    "\u2028", "\u0085", "\x1c", "\u200b", "🙂", "👩‍👧", "\U0010fffe", "[MASK]", "[CLS]", "[PAD]", "[mask]",
    "'s", "'LL", "’s", "12345", "²½", "٣٤", "中文", "ผู้", "ǅ", "ß", "ẞ", "  ", "\t", "the", " cat", "lower",
    "LOWEST", "_", "#", "a"]
CL100K = r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|""" \
         r"""\s++$|\s*[\r\n]|\s+(?!\S)|\s"""
GPT2 = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


@pytest.mark.parametrize("pattern, lowercase", [
    (data.PATTERN, True), (data.PATTERN, False), (GPT2, True), (CL100K, False)],
    ids=["ours", "ours, cased", "gpt2", "cl100k"])
def test_ids_of_odd_texts(tmp_path, hf, pattern, lowercase):
    """Texts, pairs, and what is cut"""
    _, tokenizer, folder = exported(tmp_path, small_tokenizer(pattern, lowercase))
    theirs, draw = hf.AutoTokenizer.from_pretrained(folder), random.Random(0)

    def mine(*texts, max_len=10**6):
        return [(i + 4) % tokenizer.vocab_size for i in tokenizer.encode_pair(*texts, max_len=max_len)]

    texts = ["".join(draw.choices(ODD, k=draw.randint(0, 12))) for _ in range(1000)]
    for text, other in zip(texts, texts[1:]):
        assert theirs(text).input_ids == mine(text), repr(text)
    assert theirs(text, other).input_ids == mine(text, other)
    text = "the cat sat " * 30
    assert theirs(text, truncation=True).input_ids == mine(text, max_len=32)
    assert theirs.convert_tokens_to_ids(
        [theirs.pad_token, theirs.cls_token, theirs.sep_token, theirs.mask_token]) == [0, 1, 2, 3]
    assert theirs.decode(theirs("the cat's 12 naïve mats").input_ids[1:-1]) == "the cat's 12 naïve mats"
    assert list(theirs("the cat")) == ["input_ids", "attention_mask"]


def test_characters_of_tokens(tmp_path, hf):
    """They leave out the space before a word. (In tokenizers 0.20.0 they are wrong.)"""
    _, _, folder = exported(tmp_path)
    theirs, text = hf.AutoTokenizer.from_pretrained(folder), "the cat's 12  mats, lower"
    encoded = theirs(text, return_offsets_mapping=True, add_special_tokens=False)
    found = [text[start:end] for start, end in encoded.offset_mapping]
    assert "".join(found) == "thecat's12mats,lower" and "the" in found


@pytest.fixture(scope="session")
def finetuned(tmp_path_factory):
    """task -> best.pt, of a real run: two or three classes of a text or a pair, and numbers"""
    folder = tmp_path_factory.mktemp("finetuned")
    runs.make_corpus(folder)
    train.main(f"--dataset=toy --data_dir={folder} --out_dir={folder}/out --layers=2 --width=32 --heads=2 "
               "--ffn_width=64 --max_len=64 --max_steps=3 --warmup_steps=1 --batch_size=4 --eval_interval=3 "
               "--eval_batches=1 --dtype=float32 --device=cpu".split())
    for task, header, labels in (
            ("reviews", "text", ["good", "bad"]), ("ratings", "text", ["-2.5", "0", "7"]),
            ("pairs", "premise\thypothesis", ["yes", "no", "maybe"])):
        (folder / task).mkdir()
        rows = "".join(f"{labels[i % len(labels)]}\t{labels[i % len(labels)]} film {i}"
                       + "\tit is good" * (task == "pairs") + "\n" for i in range(12))
        for split in ("train", "dev"):
            (folder / task / f"{split}.tsv").write_text(f"label\t{header}\n{rows}")
        finetune.main([f"--task={task}", f"--data_dir={folder}", f"--init_from={folder}/out/ckpt.pt",
                       f"--out_dir={folder}/fine", "--epochs=3", "--learning_rate=0.01", "--dtype=float32",
                       "--device=cpu", f"--regression={task == 'ratings'}"])
    return {path.parent.name: path for path in folder.glob("fine/*/best.pt")}


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("name", ["reviews", "pairs", "ratings"])
def test_a_fine_tuned_model(tmp_path, hf, finetuned, name, relative):
    """Equal logits of texts and pairs; a regression gives the score. `pipeline` has the labels' names."""
    saved = data.read_torch(finetuned[name])
    saved["config"]["relative_positions"] = relative
    saved["model"] = {k: v for k, v in saved["model"].items() if relative or k != "encoder.relative.weight"}
    torch.save(saved, tmp_path / "best.pt")
    model, tokenizer, task = finetune.load_finetuned(tmp_path / "best.pt")
    convert.main([str(tmp_path / "best.pt"), str(tmp_path / "hf")])
    theirs = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf")
    their_tokenizer = hf.AutoTokenizer.from_pretrained(tmp_path / "hf")
    texts, others = ["a good film", "Bad. " * 30, ""], ["it is good", "no", "maybe"]
    scores = (lambda x: x) if task["labels"] else lambda x: task["low"] + (task["high"] - task["low"]) * x
    for pairs in (None, others):
        expected = scores(model(tokenizer.batch(texts, pairs)))
        inputs = their_tokenizer(texts, pairs, padding=True, truncation=True, return_tensors="pt")
        with torch.no_grad():
            close(theirs(**inputs).logits, expected)
    function = {} if task["labels"] else {"function_to_apply": "none"}  # the first versions take sigmoid
    said = hf.pipeline("text-classification", str(tmp_path / "hf"), **function)(texts[0])[0]
    first = scores(model(tokenizer.batch(texts[:1])))[0]
    if task["labels"]:
        first = first.softmax(0)
    assert said["label"] == (task["labels"] or ["score"])[first.argmax()]
    assert said["score"] == pytest.approx(first.max().item(), abs=1e-4)


def test_the_encoder_of_a_squad_model(tmp_path, hf, finetuned, capsys):
    saved = data.read_torch(finetuned["reviews"])
    model = finetune.Model({"name": "SQuAD-2.0"}, coco.Config(**saved["config"]), 0.0).eval()
    torch.save(saved | {"model": model.state_dict(), "task": {"name": "SQuAD-2.0"}}, tmp_path / "best.pt")
    convert.main([str(tmp_path / "best.pt"), str(tmp_path / "hf")])
    assert "not carried: out" in capsys.readouterr().out
    tokens = torch.randint(5, 300, (2, 20))
    theirs = hf.AutoModel.from_pretrained(tmp_path / "hf")
    with torch.no_grad():
        close(theirs(tokens + 4).last_hidden_state, model.encoder(tokens))


def test_training_and_torch_export(tmp_path, hf):
    """A stock token classifier learns; torch.export with dynamic batch and length changes nothing."""
    _, _, folder = exported(tmp_path)
    tagger = hf.AutoModelForTokenClassification.from_pretrained(folder, num_labels=3)
    tokenizer = hf.AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(["the cat sat", "mats"], padding=True, return_tensors="pt")
    labels = inputs.input_ids % 3
    optimizer = torch.optim.AdamW(tagger.eval().parameters(), lr=1e-3)
    before = tagger(**inputs, labels=labels).loss
    before.backward()
    optimizer.step()
    assert tagger(**inputs, labels=labels).loss < before
    answers = hf.AutoModelForQuestionAnswering.from_pretrained(folder)
    places = torch.tensor([1, 1])
    answers(**inputs, start_positions=places, end_positions=places).loss.backward()

    theirs, size = hf.AutoModel.from_pretrained(folder).eval(), dict.fromkeys((0, 1), torch.export.Dim.AUTO)
    program = torch.export.export(theirs, (), dict(inputs), dynamic_shapes={name: size for name in inputs})
    other = torch.randint(4, 300, (5, 11))
    with torch.no_grad():
        found = program.module()(input_ids=other, attention_mask=torch.ones_like(other)).last_hidden_state
        torch.testing.assert_close(found, theirs(other).last_hidden_state)


def test_sentence_transformers_gives_embed(tmp_path, hf):
    reason = "pip install sentence-transformers"
    sentence_transformers = pytest.importorskip("sentence_transformers", reason=reason)
    model, tokenizer, folder = exported(tmp_path)
    texts = ["The cat sat on the mat.", "dogs", "", "it's naïve " * 30]
    found = sentence_transformers.SentenceTransformer(str(folder), device="cpu").encode(texts)
    tokenizer.max_len = 32
    expected = model.embed(tokenizer.batch(texts))
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0, atol=1e-6)


def test_a_cross_encoder_gives_the_score(tmp_path, hf, finetuned):
    reason = "pip install sentence-transformers"
    sentence_transformers = pytest.importorskip("sentence_transformers", reason=reason)
    convert.main([str(finetuned["ratings"]), str(tmp_path / "hf")])
    model, tokenizer, task = finetune.load_finetuned(finetuned["ratings"])
    found = sentence_transformers.CrossEncoder(str(tmp_path / "hf"), device="cpu").predict([("film", "good")])
    share = model(tokenizer.batch(["film"], ["good"])).item()
    assert found.item() == pytest.approx(task["low"] + (task["high"] - task["low"]) * share, abs=1e-4)


def test_the_model_card(tmp_path, hf, finetuned):
    """It says what the model is; its lines of metadata are what the hub reads."""
    yaml = pytest.importorskip("yaml")
    pretrained = ["steps: 3", "tokens: 768", "text: toy", "preset: tiny", "auxiliary", torch.__version__]
    for source, words in ((finetuned["reviews"], ["task: reviews", "accuracy on dev"]),
                          (finetuned["reviews"].parents[2] / "out" / "ckpt.pt", pretrained)):
        folder = tmp_path / source.stem
        convert.main([str(source), str(folder)])
        _, metadata, text = (folder / "README.md").read_text().split("---\n", 2)
        assert yaml.safe_load(metadata)["library_name"] == "transformers"
        assert all(word in text for word in words), text


def test_an_export_that_cannot_be_replaced_stays(tmp_path, monkeypatch):
    rename, folder = os.rename, tmp_path / "hf"
    convert.write_folder(folder, {"file": b"old"})
    monkeypatch.setattr(os, "rename", lambda a, b: sys.exit() if a.name == "new" else rename(a, b))  # SIGTERM
    with pytest.raises(SystemExit):
        convert.write_folder(folder, {"file": b"new"})
    assert (folder / "file").read_bytes() == b"old" and list(tmp_path.iterdir()) == [folder]


def test_what_cannot_be_exported(tmp_path, hf, monkeypatch, command):
    """A folder with files of others stays; what is missing or does not fit is a sentence; nothing is left."""
    _, _, folder = exported(tmp_path)
    assert command(convert.main, tmp_path / "ckpt.pt", folder)[0] == 0  # replaces the export
    before = sorted(tmp_path.rglob("*"))

    def is_refused(target):
        status, said = command(convert.main, tmp_path / "ckpt.pt", target)
        return status == 2 and "exists" in said

    (tmp_path / "link").symlink_to(folder)
    (folder / "notes.txt").write_text("mine")
    assert is_refused(tmp_path / "link") and is_refused(folder)
    (tmp_path / "link").unlink()
    (folder / "notes.txt").unlink()
    content = (folder / "tokenizer_config.json").read_bytes()
    hf.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    assert is_refused(folder)
    (folder / "tokenizer_config.json").write_bytes(content)
    for file in sorted(folder.rglob("*.jinja")) + sorted(folder.glob("special_tokens_map.json")):
        file.unlink()
    hf.AutoModel.from_pretrained(folder).save_pretrained(folder)
    assert is_refused(folder)
    saved = data.read_torch(tmp_path / "ckpt.pt")
    for change in (dict(width=20), dict(none=1), dict(heads="many")):
        torch.save(saved | {"config": saved["config"] | change}, tmp_path / "ckpt.pt")
        status, said = command(convert.main, tmp_path / "ckpt.pt", tmp_path / "new")
        assert status == 2 and "Traceback" not in said, said
    torch.save(saved, tmp_path / "ckpt.pt")
    for package in ("tokenizers", "safetensors.torch"):
        monkeypatch.setitem(sys.modules, package, None)
        status, said = command(convert.main, tmp_path / "ckpt.pt", tmp_path / "new")
        assert status == 2 and f"pip install {package.split('.')[0]}" in said, said
    assert sorted(tmp_path.rglob("*")) == before
