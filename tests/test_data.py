"""data.py against obvious versions: BPE, tokenizer, pieces, prepared corpora, sequences, options, bad input."""

import base64
import contextlib
import errno
import gzip
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import types
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import tiktoken.load

import data

ROOT = Path(data.__file__).resolve().parent
FILES = ["meta.json", "tokenizer.tiktoken", "train.bin", "val.bin"]
SPECIALS = ["[PAD]", "[CLS]", "[SEP]", "[MASK]"]


def sentences(count, seed=0, words=12):
    """Different documents of a few made-up words; every third has two lines and letters beyond ASCII."""
    rng = random.Random(seed)
    lexicon = ["".join(rng.choices("aeiounrtsl", k=rng.randint(2, 7))) for _ in range(60)] + ["Ünïcode", "日本", "🙂"]
    found = []
    for i in range(count):
        text = " ".join(rng.choices(lexicon, k=words))
        found.append(f"{text}\nZeile {seed} {i}." if i % 3 == 0 else f"{text} {seed} {i}.")
    return found


def write_source(path, documents, field="text"):
    """A text file with a blank line after each document, or a .jsonl; gzipped if the name says so."""
    if ".jsonl" in path.name:
        text = "".join(json.dumps({"id": i, field: d}) + "\n" for i, d in enumerate(documents))
    else:
        text = "\n\n".join(documents) + "\n"
    raw = text.encode("utf-8")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def prepare(folder, *paths, **options):
    """data.prepare on one process into folder/data/corpus, with a small vocabulary unless an encoding is named."""
    size = {} if "encoding" in options else {"vocab_size": 280}
    return data.prepare([str(p) for p in paths],
                        **{"name": "corpus", "data_dir": str(folder / "data"), "workers": 1, **size, **options})


def meta_of(folder):
    return json.loads((folder / "meta.json").read_text())


def ranks_of(folder):
    """{token: rank} as the file says, read without data.py"""
    lines = (folder / "tokenizer.tiktoken").read_text().splitlines()
    return {base64.b64decode(token): int(rank) for token, rank in (line.split(" ") for line in lines)}


def ids_of(folder, split):
    return np.fromfile(folder / f"{split}.bin", meta_of(folder)["dtype"])


def documents_of(folder, split):
    """What stands between the separators, decoded with the ranks file alone; the file ends with a separator."""
    sep, spelling, found = meta_of(folder)["special_ids"]["[SEP]"], {r: t for t, r in ranks_of(folder).items()}, [b""]
    for token in ids_of(folder, split).tolist():
        if token == sep:
            found.append(b"")
        else:
            found[-1] += spelling[token]
    assert found.pop() == b""
    return [text.decode("utf-8", "surrogatepass") for text in found]


def all_documents(folder):
    return documents_of(folder, "train") + documents_of(folder, "val")


def lowered(documents):
    return [data.lower(d) for d in documents]


def contents(folder):
    return {name: (folder / name).read_bytes() for name in FILES}


def listing(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A small prepared corpus, for tests that only read it."""
    folder = tmp_path_factory.mktemp("corpus")
    return prepare(folder, write_source(folder / "in.txt", sentences(150)), vocab_size=400, val_fraction=0.2)


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return data.Tokenizer.load(corpus)


@pytest.fixture(scope="module")
def cased(tokenizer):
    return data.Tokenizer.from_state({**tokenizer.state(), "lowercase": False})


# --------------------------------------------------------------------------------------------------------------------
# Running the command: in this process, where many cases have to be fast, and as a user does


def command(monkeypatch, capsys, *arguments):
    """(exit status, standard output, standard error) of `python data.py ARGUMENTS`, run in this process"""
    monkeypatch.setattr(sys, "argv", ["data.py", *arguments])
    before, status = signal.getsignal(signal.SIGTERM), 0
    try:
        data.run_command(data.main)
    except SystemExit as leaving:
        status = leaving.code
    finally:
        signal.signal(signal.SIGTERM, before)
    captured = capsys.readouterr()
    return status or 0, captured.out, captured.err


def environment(**changes):
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **changes}


def cli(folder, *arguments, **changes):
    result = subprocess.run([sys.executable, str(ROOT / "data.py"), *map(str, arguments)], cwd=folder, timeout=120,
                            env=environment(**changes), capture_output=True, text=True, encoding="utf-8")
    return result.returncode, result.stdout, result.stderr


def one_sentence(status, err, *words):
    assert status == 2, err
    assert err.endswith("\n") and err.count("\n") == 1 and "Traceback" not in err, err
    assert len(err.strip()) > 20
    for word in words:
        assert word in err


# --------------------------------------------------------------------------------------------------------------------
# Options


OPTIONS = {"steps": (10, (1, 100), "how many"), "rate": (0.5, (0.0, 1.0), "how fast"),
           "kind": ("a", ["a", "b"], "which"), "loud": (False, bool, "whether"), "place": ("here", str, "where")}


@pytest.mark.parametrize("value, allowed, result", [
    ("7", (1, 9), 7), (7, (1, 9), 7), (7.0, (1, 9), 7), ("1", (1, 9), 1), ("9", (1, 9), 9), ("-3", (-5, 0), -3),
    ("1e-3", (0.0, 1.0), 0.001), (1, (0.0, 1.0), 1.0), ("0", (0.0, 1.0), 0.0), (0.25, (0.0, 1.0), 0.25),
    ("True", bool, True), ("false", bool, False), (True, bool, True), (False, bool, False),
    ("b", ["a", "b"], "b"), ("", str, ""), ("any text", str, "any text"), ("12", str, "12"),
])
def test_checked_converts(value, allowed, result):
    found = data.checked("name", value, allowed)
    assert found == result and type(found) is type(result)


@pytest.mark.parametrize("value, allowed, wanted", [
    ("0", (1, 9), "1 to 9"), ("10", (1, 9), "1 to 9"), ("2.5", (1, 9), "whole number"), (2.5, (1, 9), "whole number"),
    ("many", (1, 9), "whole number"), ("", (1, 9), "whole number"), (None, (1, 9), "whole number"),
    ("inf", (1, 9), "whole number"), (float("inf"), (1, 9), "whole number"), ([1], (1, 9), "whole number"),
    ("nan", (0.0, 1.0), "0.0 to 1.0"), (float("nan"), (0.0, 1.0), "0.0 to 1.0"), ("1.01", (0.0, 1.0), "0.0 to 1.0"),
    ("-0.1", (0.0, 1.0), "0.0 to 1.0"), ("fast", (0.0, 1.0), "number"), ("c", ["a", "b"], "a, b"),
    ("maybe", bool, "True or False"), ("1", bool, "True or False"), (0, bool, "True or False"), (5, str, "text"),
])
def test_checked_refuses(value, allowed, wanted):
    with pytest.raises(data.InputError) as refused:
        data.checked("name", value, allowed)
    assert "--name" in str(refused.value) and wanted in str(refused.value)
    assert f"not {value!r}" in str(refused.value) or f"not {value}." in str(refused.value)


def test_parse_options_types_and_others():
    given, others = data.parse_options(["one", "--steps=5", "--loud=True", "two", "--rate=1e-1", "--place=a=b"],
                                       OPTIONS, "usage")
    assert given == {"steps": 5, "loud": True, "rate": 0.1, "place": "a=b"} and others == ["one", "two"]


def test_parse_options_last_one_wins():
    assert data.parse_options(["--steps=5", "--steps=6", "--loud=True", "--loud=False"], OPTIONS, "")[0] == {
        "steps": 6, "loud": False}


@pytest.mark.parametrize("argument, wanted", [
    ("--stepps=5", '"steps"'), ("--knid=a", '"kind"'), ("--zzzzzz=1", "steps, rate, kind, loud, place"),
    ("--steps", "--steps=VALUE"), ("-", "no option"), ("--steps=", "whole number"), ("--kind=c", "a, b"),
])
def test_parse_options_refuses(argument, wanted):
    with pytest.raises(data.InputError) as refused:
        data.parse_options([argument], OPTIONS, "usage")
    assert wanted in str(refused.value)


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_lists_all_options(flag, monkeypatch, capsys):
    status, out, err = command(monkeypatch, capsys, "--name=x", flag)
    assert status == 0 and err == "" and out.startswith("From text to batches")
    for name, (default, _, reason) in data.OPTIONS.items():
        line, = [line for line in out.splitlines() if line.strip().startswith(f"--{name}=")]
        assert line.split("=", 1)[1].startswith(str(default)) and line.endswith(reason)


def test_every_default_is_allowed():
    for name, (default, allowed, _) in data.OPTIONS.items():
        assert data.checked(name, default, allowed) == default


@pytest.mark.parametrize("error, status, message", [
    (data.InputError("a sentence."), 2, "a sentence."),
    (PermissionError(errno.EACCES, "Permission denied", "a/file"), 2, "a/file: Permission denied."),
    (OSError(errno.ENOSPC, "No space left on device"), 2, "No space left on device."),
    (KeyboardInterrupt(), 130, ""),
])
def test_run_command(error, status, message, monkeypatch, capsys):
    def main():
        raise error

    monkeypatch.setattr(sys, "argv", ["some/where/data.py"])
    with pytest.raises(SystemExit) as leaving:
        data.run_command(main)
    assert leaving.value.code == status
    assert capsys.readouterr().err == (f"data.py: {message}\n" if message else "")


def test_run_command_is_quiet_on_other_processes(monkeypatch, capsys):
    def main():
        raise data.InputError("a sentence.")

    monkeypatch.setattr(data.time, "sleep", lambda seconds: None)
    with pytest.raises(SystemExit) as leaving:
        data.run_command(main, quiet=lambda: True)
    assert leaving.value.code == 2 and capsys.readouterr().err == ""
    assert data.run_command(lambda: "result") == "result"


def test_run_command_shows_defects():
    """What is not the user's mistake keeps its traceback."""
    with pytest.raises(ZeroDivisionError):
        data.run_command(lambda: 1 / 0)


def test_in_parallel_alone_is_lazy_and_sets_up():
    taken, ready = [], []
    results = data.in_parallel(str, map(lambda i: taken.append(i) or i, range(5)), 1, ready.append, ("set up",))
    assert [next(results), next(results)] == ["0", "1"] and taken == [0, 1] and ready == ["set up"]


def test_in_parallel_keeps_order_and_is_bounded():
    """By two processes: results in order, and never more than a few items taken before a result is given."""
    script = ("import data; taken, ahead = [], []\n"
              "def items():\n    for i in range(60): taken.append(i); yield i - 30\n"
              "for n, x in enumerate(data.in_parallel(abs, items(), 2)):\n"
              "    assert x == abs(n - 30); ahead.append(len(taken) - n)\n"
              "print(n + 1, max(ahead))")
    result = subprocess.run([sys.executable, "-c", script], env=environment(), timeout=60,
                            capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    number, ahead = map(int, result.stdout.split())
    assert number == 60 and 1 < ahead <= 10


# --------------------------------------------------------------------------------------------------------------------
# The BPE trainer


def slow_bpe(words, size):
    """Counts all pairs anew at each step; ties go to the pair of older tokens. None if there are too few pairs.

    Two different pairs never spell the same token: where borders stand now they have always stood, so equal spellings
    between borders were merged in equal ways.
    """
    tokens = [bytes([b]) for b in range(256)]
    spelled = {word: list(word.encode("utf-8", "surrogatepass")) for word in words}
    while len(tokens) < size:
        counts = Counter()
        for word, ids in spelled.items():
            for pair in zip(ids, ids[1:]):
                counts[pair] += words[word]
        if not counts:
            return None
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        tokens.append(tokens[best[0]] + tokens[best[1]])
        for word, ids in spelled.items():
            merged = []
            while ids:
                found = tuple(ids[:2]) == best
                merged.append(len(tokens) - 1 if found else ids[0])
                ids = ids[2 if found else 1:]
            spelled[word] = merged
    assert len(set(tokens)) == len(tokens)
    return {token: rank for rank, token in enumerate(tokens)}


def random_words(alphabet, seed):
    rng = random.Random(seed)
    words = Counter()
    for _ in range(40):
        words["".join(rng.choices(alphabet, k=rng.randint(1, 14)))] += rng.choice([1, 1, 2, 5])
    return words


@pytest.mark.parametrize("alphabet", ["a", "ab", "aab ", "etaoin shrdlu", "aäé日本", "b🙂🙃", "a\ud83d\u0301"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_bpe_equals_slow_trainer(alphabet, seed):
    words = random_words(alphabet, seed)
    for size in (256, 257, 259, 270, 300):
        wanted = slow_bpe(words, size)
        if wanted is None:
            with pytest.raises(data.InputError, match="too little text"):
                data.train_bpe(words, size)
        else:
            found = data.train_bpe(words, size)
            assert found == wanted and list(found.items()) == list(wanted.items())


@pytest.mark.parametrize("words", [
    {"a" * n: 1 for n in range(1, 20)}, {"a" * 31: 3}, {"aaaa": 2, "baaab": 2, "aab": 1},
    {"abab" * 5: 1, "baba" * 4: 1}, {"mississippi": 3, "miss": 2, "sip": 4},
])
def test_bpe_overlapping_runs(words):
    size = 257
    while (wanted := slow_bpe(Counter(words), size)) is not None:
        assert data.train_bpe(Counter(words), size) == wanted
        size += 1
    assert size > 259
    with pytest.raises(data.InputError):
        data.train_bpe(Counter(words), size)


def test_bpe_does_not_depend_on_the_order_of_words():
    words = random_words("etaoin shrdlu", 5)
    shuffled = Counter(dict(random.Random(0).sample(list(words.items()), len(words))))
    assert list(words) != list(shuffled)
    assert list(data.train_bpe(words, 300).items()) == list(data.train_bpe(shuffled, 300).items())


def test_bpe_refuses_too_little_text():
    with pytest.raises(data.InputError, match="257.*300.*vocab_size"):
        data.train_bpe(Counter({"ab": 100}), 300)
    with pytest.raises(data.InputError):
        data.train_bpe(Counter(), 257)


def test_count_words():
    found = data.count_words(["The cat's  hat, 12345", "the CAT"], lowercase=True)
    assert Counter(dict(found)) == {"the": 2, " cat": 2, "'s": 1, " ": 1, " hat": 1, ",": 1, " 123": 1, "45": 1}
    assert dict(data.count_words(["The the"], lowercase=False)) == {"The": 1, " the": 1}


# --------------------------------------------------------------------------------------------------------------------
# The tokenizer


TEXTS = {
    "empty": "", "plain": "The quick brown fox, isn't it?", "blanks": "  two\t\ttabs \n\n\n  and\r\nlines  ",
    "emoji": "🙂👩‍👩‍👧‍👦🏳️‍🌈 flags 🇩🇪", "combining": "e\u0301 Z\u0351\u0327a\u034dl\u0317g\u0361o \u0301alone",
    "right to left": "שלום עולם \u202eمرحبا\u202c", "control": "".join(map(chr, range(32))) + "\x7f\x80\x9f\xa0\xad",
    "not characters": "\ufffe\uffff\U0010ffff\ufdd0 \ufeff \u2028\u2029\x85", "replacement": "\ufffd and \ufffd",
    "low half": "a \udc80 b", "high half": "\ud83d", "halves apart": "\ud83d \ude42", "two halves": "x\ud83d\ude42y",
    "swapped halves": "\ude42\ud83d", "half by emoji": "\ud83d🙂\ude42", "specials": "[PAD][CLS] [SEP] [MASK]",
    "foreign specials": "<|endoftext|> <s> </s>", "casing": "İSTANBUL ΟΔΟΣ Straße ẞ Ǆ ﬁ Ａ K Å 𐐀 ŉ", "marks": "ΑΣ. Σ ς",
    "numbers": "1234567890 ١٢٣ ½ ²", "long word": "pneumono" * 60, "chinese": "漢字とかなと한글" * 9,
}


def random_text(seed):
    """Any code points, halves of surrogate pairs among them, mixed with plain text."""
    rng = random.Random(seed)
    ranges = [(0, 128), (0, 0x500), (0x2000, 0x3100), (0xD800, 0xE000), (0xFE00, 0x10000), (0x1F300, 0x1FA00),
              (0, 0x110000)]
    return "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randint(1, 150)))


def texts():
    return [*TEXTS.values(), *map(random_text, range(150))]


def test_any_text_round_trips(cased):
    for text in texts():
        assert cased.decode(cased.encode(text)) == text


def test_lowercased_text_round_trips(tokenizer):
    assert tokenizer.lowercase
    for text in texts():
        assert tokenizer.decode(tokenizer.encode(text)) == data.lower(text)


def test_no_special_id_comes_from_text(tokenizer, cased):
    for text in texts():
        assert all(0 <= i < tokenizer.pad_id for i in tokenizer.encode(text) + cased.encode(text))
    assert cased.decode(cased.encode("[MASK]")) == "[MASK]" and len(cased.encode("[MASK]")) > 1


def test_lower_is_per_character():
    """Against an obvious version, on every code point: character i of the result is character i of the text."""
    everything = "".join(map(chr, range(sys.maxunicode + 1)))
    wanted = "".join(c.lower() if len(c.lower()) == 1 else c for c in everything)
    assert data.lower(everything) == wanted
    assert data.lower("İI") == "İi" and data.lower("ΟΔΟΣ") == "οδοσ" and data.lower("Straße ẞ") == "straße ß"
    for text in texts():
        assert len(data.lower(text)) == len(text) and data.lower(text) == "".join(map(data.lower, text))


def test_bytes_that_are_no_text_alone(cased):
    ids = cased.encode("日")
    single = [cased.encode("a")[0] + 0x80 - ord("a"), cased.encode("a")[0] + 0xFF - ord("a")]  # bytes 80 and FF
    assert cased.decode(ids) == "日" and cased.decode(single[:1]) == cased.decode(single[1:]) == "\ufffd"
    assert cased.decode([*cased.encode("ok"), single[1], *cased.encode("ok")]) == "ok\ufffdok"


def test_pieces_of_tokens(cased):
    text = "The cat sat on the mat, 123 times."
    assert "".join(cased.pieces(cased.encode(text))) == text
    assert len(cased.pieces(cased.encode(text))) == len(cased.encode(text)) < len(text)
    assert cased.pieces([cased.cls_id, cased.mask_id]) == ["[CLS]", "[MASK]"] and cased.pieces([]) == []
    assert cased.pieces(np.array(cased.encode("mat"), np.uint16)) == cased.pieces(cased.encode("mat"))


def test_every_id_can_be_shown(tokenizer):
    assert len(tokenizer.pieces(range(tokenizer.vocab_size))) == tokenizer.vocab_size


def test_specials_stand_behind_the_ranks(corpus, tokenizer):
    ranks = ranks_of(corpus)
    assert sorted(ranks.values()) == list(range(396)) and tokenizer.vocab_size == 400
    assert tokenizer.special_ids == dict(zip(SPECIALS, range(396, 400))) == meta_of(corpus)["special_ids"]
    assert [tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id] == [396, 397, 398, 399]


def test_state_round_trip(tokenizer):
    state = json.loads(json.dumps(tokenizer.state()))  # plain types only
    again = data.Tokenizer.from_state(state)
    assert again.state() == tokenizer.state() and again.special_ids == tokenizer.special_ids
    assert again.lowercase == tokenizer.lowercase and again.vocab_size == tokenizer.vocab_size
    for text in texts():
        assert again.encode(text) == tokenizer.encode(text)


def test_ranks_are_in_tiktokens_format(corpus, tokenizer, cased, monkeypatch):
    """tiktoken's own reader reads the file, and a plain tiktoken.Encoding of it gives the same ids."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")  # no copy elsewhere
    ranks = tiktoken.load.load_tiktoken_bpe(str(corpus / "tokenizer.tiktoken"))
    assert ranks == ranks_of(corpus)
    plain = tiktoken.Encoding("plain", pat_str=meta_of(corpus)["pattern"], mergeable_ranks=ranks, special_tokens={})
    for text in texts():
        if not any("\ud800" <= c <= "\udfff" for c in text):
            assert cased.encode(text) == plain.encode(text)
            assert tokenizer.encode(text) == plain.encode(data.lower(text))


def test_ids_that_an_encoding_leaves_out():
    """tiktoken's p50k_base has no 50256 among its ranks: such an id can be sampled, and has to be shown somehow."""
    ranks = {bytes([b]): b for b in range(256)} | {b"th": 258}
    tokenizer = data.Tokenizer(ranks, r"\w+|\W", False)
    assert tokenizer.vocab_size == 263 and tokenizer.encode("this") == [258, *b"is"]
    assert len(tokenizer.pieces(range(263))) == 263


def pair_by_popping(a, b, max_len):
    a, b = list(a), list(b)
    while len(a) + len(b) + 4 > max_len:
        (a if len(a) > len(b) else b).pop()
    return a, b


def test_encode_pair_cuts_the_longer_side_first(tokenizer):
    words = [" ".join("rstuvwxyz"[:n]) for n in range(10)] + [" ".join("abcdefghij" * 3)]
    cls, sep = tokenizer.cls_id, tokenizer.sep_id
    for first, second in itertools.product(words, words):
        for max_len in [4, 5, 6, 7, 8, 11, 12, 16, 23, 40, 100]:
            a, b = pair_by_popping(tokenizer.encode(first), tokenizer.encode(second), max_len)
            found = tokenizer.encode_pair(first, second, max_len)
            assert found == [cls, *a, sep, sep, *b, sep] and len(found) <= max_len


@pytest.mark.parametrize("max_len", [2, 3, 4, 10, 512])
def test_encode_one_text(tokenizer, max_len):
    for text in ("", "a b c", "a b c d e f g h i j k"):
        ids = tokenizer.encode(text)[: max_len - 2]
        assert tokenizer.encode_pair(text, max_len=max_len) == [tokenizer.cls_id, *ids, tokenizer.sep_id]


def test_encode_pair_needs_room(tokenizer):
    with pytest.raises(data.InputError, match="max_len=3"):
        tokenizer.encode_pair("a", "b", 3)
    with pytest.raises(data.InputError, match="max_len=1"):
        tokenizer.encode_pair("a", max_len=1)


@pytest.mark.parametrize("name, damage", [
    ("tokenizer.tiktoken", lambda raw: b"not base64 at all!\n" + raw), ("tokenizer.tiktoken", lambda raw: raw[:-3]),
    ("tokenizer.tiktoken", lambda raw: b""), ("meta.json", lambda raw: raw[:-10]), ("meta.json", lambda raw: b"{}"),
    ("tokenizer.tiktoken", lambda raw: raw[: raw.rindex(b"\n", 0, -1) + 1]),
])
def test_damaged_tokenizer_is_refused(corpus, tmp_path, name, damage):
    folder = shutil.copytree(corpus, tmp_path / "copy")
    (folder / name).write_bytes(damage((folder / name).read_bytes()))
    with pytest.raises(data.InputError, match="copy"):
        data.Tokenizer.load(folder)


# --------------------------------------------------------------------------------------------------------------------
# Pieces


def joined(lines):
    """The documents of a stream of lines, without white space around them, blank ones left out."""
    ended = [list(group) for is_end, group in itertools.groupby(lines, lambda line: line is None) if not is_end]
    return [text for text in ("".join(document).strip() for document in ended) if text]


def joined_pieces(found):
    documents = []
    for new, text in found:
        assert text
        documents.append(text) if new else documents.append(documents.pop() + text)
    return documents


def random_lines(rng, piece):
    """Documents of lines that are blank, short, or longer than a piece, with and without spaces."""
    for _ in range(30):
        for _ in range(rng.randint(0, 12)):
            word = rng.choice(["x", "ab", "word", "y" * 13])
            yield rng.choice(["\n", "  \n", word * 3 + "\n", f"{word} " * rng.randint(1, piece) + "\n",
                              " " * rng.randint(1, 2 * piece) + "\n", word * rng.randint(1, piece) + "\n"])
            yield f"{word}.\n"
        yield None


@pytest.mark.parametrize("seed", range(8))
def test_pieces_joined_are_the_documents(seed, monkeypatch):
    monkeypatch.setattr(data, "PIECE", 60)
    lines = list(random_lines(random.Random(seed), 60))
    found = list(data.pieces(lines))
    assert joined_pieces(found) == joined(lines)
    assert max(len(text.strip()) for _, text in found) <= 60 and max(len(text) for _, text in found) <= 180
    assert len(found) > 2 * len(joined(lines))


def test_short_documents_stay_whole():
    lines = ["\n", " one \n", "more\n", None, None, "two\n", None, " \n", None, "three", None]
    assert list(data.pieces(lines)) == [(True, "one \nmore"), (True, "two"), (True, "three")]
    assert list(data.pieces([None, "\n", None])) == [] == list(data.pieces([]))
    whole = "w" * (data.PIECE - 1) + "\n"
    assert list(data.pieces([whole, None, "next", None])) == [(True, whole.strip()), (True, "next")]


def test_pieces_end_where_a_paragraph_ends():
    """A paragraph per line: cut at line ends, as late as PIECE allows."""
    paragraphs = [f"Paragraph {i} " + "has some words " * (i % 17) + "and ends.\n" for i in range(2000)]
    found = list(data.pieces([*paragraphs, None]))
    assert "".join(text for _, text in found) == "".join(paragraphs).strip()
    assert [new for new, _ in found] == [True] + [False] * (len(found) - 1)
    for (_, text), (_, following) in itertools.pairwise(found):
        assert text.rstrip().endswith("and ends.") and following.lstrip().startswith("Paragraph")
        assert len(text) <= data.PIECE < len(text) + len(following.lstrip().split("\n")[0]) + 2


def test_pieces_of_wrapped_paragraphs():
    """Lines broken at 70 characters, blank lines between paragraphs (a book): cut behind a blank line, not within."""
    lines = [line for i in range(300)
             for line in [f"Start of {i} " + "a" * 55 + "\n", *["b" * 69 + "\n"] * (3 + i % 5), "End.\n", "\n"]]
    found = list(data.pieces([*lines, None]))
    assert len(found) > 5
    for (_, text), (_, following) in itertools.pairwise(found):
        assert data.PIECE / 2 < len(text) <= data.PIECE
        assert text.rstrip().endswith("End.") and following.lstrip().startswith("Start")


def test_very_long_paragraphs_are_cut_at_spaces():
    line = " ".join(f"word{i}" for i in range(20_000)) + "\n"
    found = [text for _, text in data.pieces([line, None])]
    assert "".join(found) == line.strip() and len(found) == -(-len(line) // data.PIECE)
    for text, following in itertools.pairwise(found):
        assert data.PIECE - 20 < len(text) <= data.PIECE
        assert not text[-1].isspace() and following[0] == " "


def test_a_paragraph_without_spaces_is_cut_anywhere():
    found = list(data.pieces(["字" * (2 * data.PIECE + 5), None, "next", None]))
    assert [(new, len(text)) for new, text in found] == [(True, data.PIECE), (False, data.PIECE), (False, 5), (True, 4)]


def test_pieces_without_white_space_at_the_end():
    """Blank lines behind a piece that is full are white space around the document too."""
    lines = ["w" * (data.PIECE - 1) + "\n", " \n" * 20, None]
    assert joined_pieces(data.pieces(lines)) == joined(lines)


def test_pieces_are_given_as_lines_come():
    endless = itertools.cycle(["some words\n", None])
    assert list(itertools.islice(data.pieces(endless), 3)) == [(True, "some words")] * 3


def test_fingerprint_is_64_bits_of_the_text():
    marks = [data.fingerprint(str(i)) for i in range(4000)]
    assert len(set(marks)) == 4000 and 0 <= min(marks) and 2**63 < max(marks) < 2**64
    for bits in range(64):  # each bit is set in about half of them
        assert 1800 < sum(mark >> bits & 1 for mark in marks) < 2200
    assert data.fingerprint("a\ud83d") != data.fingerprint("a\ud83e")


# --------------------------------------------------------------------------------------------------------------------
# The default corpus


SOURCE = '''"""First module words that are plain English and make a sentence of some length.

Second paragraph with a role, :func:`name`, and ``code``, that is still plain enough to keep.

>>> code_example(that is not prose but has a good many words in it).
"""
raise SystemExit("this file must never be run")


class Thing:
    """A thing has a docstring that says in plain English what the thing is for.

    x : int
        The number of the things that are counted in here, which is a parameter.
    y : float, optional
        The weight of the things that are counted in here, which is another one.

    :param x: the number of things that this thing has, in plain words.

    Args:
        x: the number of things that this thing has, in plain words too.

    ======  =========
    a       table row with plain words that goes on and on and ends.
    ======  =========

    Too short.

    A list without an end of a sentence and with a good many plain words
    """

    async def method(self):
        """The method waits until all of the work is
        done, and then it gives back what was found."""


def function():
    "The function has a docstring, and this text is repeated in the other file."


add_docstr(function, """The text that is added later counts as well, since it is good plain English prose.""")
'''
PROSE = ["First module words that are plain English and make a sentence of some length.",
         "Second paragraph with a role, name, and code, that is still plain enough to keep.",
         "A thing has a docstring that says in plain English what the thing is for.",
         "The method waits until all of the work is done, and then it gives back what was found.",
         "The function has a docstring, and this text is repeated in the other file.",
         "The text that is added later counts as well, since it is good plain English prose."]
OTHER = '"""The function has a docstring, and this text is repeated in the other file.\n\n' + \
        "This one is only in the second of the files, so it is kept there as it is.\n" + '"""\n'


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """Two source files, of which the default corpus then consists, and one that is no Python."""
    files = {"a.py": SOURCE, "b.py": OTHER, "c.py": "this is { no Python\n"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    paths = [str(tmp_path / name) for name in files]
    monkeypatch.setattr(data, "docs_files", lambda: paths)
    return paths


def test_prose_of_a_file(sources):
    found = [paragraph for text in data.docstrings(sources[0]) for paragraph in data.prose(text)]
    assert sorted(found) == sorted(line + "\n" for line in PROSE)
    assert data.docstrings(sources[2]) == []


def test_topics_are_documentation(tmp_path):
    topic = "The assert statement is a convenient way to insert debugging assertions into a program."
    (tmp_path / "topics.py").write_text(f"topics = {{'assert': {topic!r}, 'number': 5}}\n")
    (tmp_path / "table.py").write_text(f"table = {{'assert': {topic!r}}}\n")
    assert topic in data.docstrings(str(tmp_path / "topics.py"))
    assert topic not in data.docstrings(str(tmp_path / "table.py"))


def test_docs_keep_repeated_paragraphs_once(sources):
    first, second, third, rest = "".join(line or "|" for line in data.read_docs(1)).split("|")  # a document per file
    assert [first.count(line) for line in PROSE] == [1] * 6
    assert "repeated" not in second and "only in the second" in second and third == rest == ""


def test_docs_files_are_there_and_no_tests():
    files = list(map(Path, data.docs_files()))
    assert all(any(name in f.parts for f in files) for name in ("numpy", "torch", "pydoc_data", "json"))
    assert not any({"tests", "test", "site-packages"} & set(f.parts[f.parts.index("numpy"):]) for f in files
                   if "numpy" in f.parts)
    assert len(files) == len(set(files)) > 1000


def test_default_corpus(sources, tmp_path):
    folder = data.prepare(data_dir=str(tmp_path / "data"), vocab_size=280, workers=1)
    assert folder == tmp_path / "data" / "docs" and meta_of(folder)["documents"] == 2
    text = "\n".join(all_documents(folder))
    for line in [*PROSE, "This one is only in the second of the files, so it is kept there as it is."]:
        assert text.count(line.lower()) == 1


# --------------------------------------------------------------------------------------------------------------------
# Preparing a corpus


def in_order(found, documents):
    """found is a part of documents, in their order"""
    rest = iter(documents)
    return all(document in rest for document in found)


@pytest.mark.parametrize("name", ["in.txt", "in.jsonl", "in.txt.gz", "in.jsonl.gz"])
def test_the_corpus_is_the_documents(tmp_path, name):
    documents = sentences(80)
    folder = prepare(tmp_path, write_source(tmp_path / name, documents), val_fraction=0.3)
    train, val = documents_of(folder, "train"), documents_of(folder, "val")
    assert sorted(train + val) == sorted(lowered(documents)) and len(train) > len(val) > 5
    assert in_order(train, lowered(documents)) and in_order(val, lowered(documents))
    meta = meta_of(folder)
    for split, texts in (("train", train), ("val", val)):
        assert np.count_nonzero(ids_of(folder, split) == meta["special_ids"]["[SEP]"]) == len(texts)


def test_ids_are_the_tokenizers(tmp_path):
    documents = sentences(30)
    folder = prepare(tmp_path, write_source(tmp_path / "in.txt", documents), val_fraction=0.0)
    tokenizer = data.Tokenizer.load(folder)
    wanted = [i for document in documents for i in [*tokenizer.encode(document), tokenizer.sep_id]]
    assert ids_of(folder, "train").tolist() == wanted and (folder / "val.bin").stat().st_size == 0


def test_cased_corpus(tmp_path):
    documents = sentences(30)
    folder = prepare(tmp_path, write_source(tmp_path / "in.txt", documents), lowercase=False)
    assert sorted(all_documents(folder)) == sorted(documents) != sorted(lowered(documents))
    assert meta_of(folder)["lowercase"] is False


def test_folders_are_searched(tmp_path):
    documents, names = sentences(40), ["a.txt", "sub/b.jsonl", "sub/deep/c.txt.gz", "d.jsonl.gz"]
    for i, name in enumerate(names):
        write_source(tmp_path / "in" / name, documents[i::5])
    (tmp_path / "in" / "readme.md").write_text("not a text of the corpus")
    (tmp_path / "in" / "sub" / "e.json").write_text('{"text": "neither"}')
    single = write_source(tmp_path / "single.txt", documents[4::5])
    folder = prepare(tmp_path, tmp_path / "in", single)
    assert sorted(all_documents(folder)) == sorted(lowered(documents))
    assert sorted(meta_of(folder)["sources"]) == sorted([*(str(tmp_path / "in" / name) for name in names), str(single)])


def test_field(tmp_path):
    documents = sentences(20)
    folder = prepare(tmp_path, write_source(tmp_path / "in.jsonl", documents, "body"), field="body")
    assert sorted(all_documents(folder)) == sorted(lowered(documents))


def test_a_document_per_file(tmp_path):
    books = ["\n\n".join(sentences(6, seed)) for seed in range(5)]
    for i, book in enumerate(books):
        (tmp_path / f"{i}.txt").write_text(f"\n\n {book}\n\n\n", encoding="utf-8")
    paths = sorted(tmp_path.glob("*.txt"))
    assert sorted(all_documents(prepare(tmp_path, *paths, document_per_file=True, name="a"))) == sorted(lowered(books))
    assert len(all_documents(prepare(tmp_path, *paths, name="b"))) == 30


def test_a_json_document_may_hold_blank_lines(tmp_path):
    documents = ["one\n\ntwo " * 10, "three\r\nfour\u2028five\x0csix " * 10, "half \ud83d of a character " * 5]
    folder = prepare(tmp_path, write_source(tmp_path / "in.jsonl", ["", *documents, " \n"]), vocab_size=265)
    assert sorted(all_documents(folder)) == sorted(d.strip() for d in documents)
    assert meta_of(folder)["documents"] == 3


def test_byte_order_mark_and_line_ends(tmp_path):
    (tmp_path / "in.txt").write_bytes(b"\xef\xbb\xbfone and one\r\ntwo\r\n\r\nthree and three\r\n \r\n\r\nfour")
    folder = prepare(tmp_path, tmp_path / "in.txt", vocab_size=262)
    assert sorted(all_documents(folder)) == sorted(["one and one\ntwo", "three and three", "four"])


def test_long_documents_are_cut_between_the_splits(tmp_path):
    """Against an obvious writer: neighbouring pieces in the same split stay together, anything else is separated."""
    rng = random.Random(0)
    books = [[f"{i}.{j} " + " ".join(rng.choices(["hill", "sea", "moon"], k=60)) + "\n" for j in range(400)]
             for i in range(3)]
    for i, book in enumerate(books):
        (tmp_path / f"{i}.txt").write_text("".join(book))
    folder = prepare(tmp_path, *sorted(tmp_path.glob("*.txt")), document_per_file=True, val_fraction=0.4)
    wanted = {"train": [], "val": []}
    for book in books:
        runs = itertools.groupby(data.pieces([*book, None]), lambda piece: data.fingerprint(piece[1]) / 2**64 < 0.4)
        for is_val, run in runs:
            wanted["val" if is_val else "train"].append("".join(text for _, text in run))
    assert documents_of(folder, "train") == wanted["train"] and documents_of(folder, "val") == wanted["val"]
    assert min(map(len, wanted.values())) >= 4 and meta_of(folder)["documents"] == 3


def test_meta(tmp_path):
    documents = sentences(60)
    source = write_source(tmp_path / "in.txt", documents)
    folder = prepare(tmp_path, source, vocab_size=300, val_fraction=0.25)
    meta, sizes = meta_of(folder), {s: (folder / f"{s}.bin").stat().st_size // 2 for s in ("train", "val")}
    assert meta["vocab_size"] == 300 and meta["tokens"] == sizes and meta["dtype"] == "uint16"
    assert meta["documents"] == 60 and meta["bytes"] == sum(len(d.encode()) for d in documents)
    assert meta["special_ids"] == dict(zip(SPECIALS, range(296, 300))) and meta["lowercase"] is True
    assert meta["val_fraction"] == 0.25 and meta["sources"] == [str(source)] and meta["encoding"] == "bpe"
    versions = {"python": sys.version.split()[0], "numpy": np.__version__, "tiktoken": tiktoken.__version__}
    assert meta["versions"] == versions
    files = {"train": "train.bin", "val": "val.bin", "tokenizer": "tokenizer.tiktoken"}
    assert meta["sha256"] == {n: hashlib.sha256((folder / f).read_bytes()).hexdigest() for n, f in files.items()}
    assert sorted(os.listdir(folder)) == FILES and os.listdir(folder.parent) == ["corpus"]
    assert folder.stat().st_mode & 0o055 == 0o055  # readable by others, unlike a temporary folder


def test_report(tmp_path, capsys):
    folder = prepare(tmp_path, write_source(tmp_path / "in.txt", sentences(60)), val_fraction=0.25)
    out, meta = capsys.readouterr().out, meta_of(folder)
    tokens = sum(meta["tokens"].values())
    for wanted in (str(folder), "60 documents", f"{tokens:,} tokens", f"{meta['bytes'] / tokens:.2f} bytes per token",
                   "vocabulary 280"):
        assert wanted in out
    pieces = data.Tokenizer.load(folder).pieces(ids_of(folder, "train")[:30])
    assert repr("|".join(pieces)) in out


def test_a_terminal_that_is_not_utf8(tmp_path):
    """A log file in ASCII is no reason for a traceback at the end of a long preparation."""
    write_source(tmp_path / "in.txt", ["日本 🙂 wörld"] + sentences(40))
    arguments = ["in.txt", "--name=corpus", "--vocab_size=280", "--workers=1", "--val_fraction=0"]
    status, _, err = cli(tmp_path, *arguments, PYTHONIOENCODING="ascii")
    assert status == 0 and err == "" and sorted(os.listdir(tmp_path / "data" / "corpus")) == FILES


def test_the_same_bytes_by_any_number_of_workers(tmp_path):
    documents = sentences(1500)
    write_source(tmp_path / "in" / "a.txt", documents[::2])
    write_source(tmp_path / "in" / "b.jsonl.gz", [*documents[1::2], "\n".join(documents), "half \ud83d"])
    arguments = ["in", "--vocab_size=500", "--val_fraction=0.2"]
    for workers in (1, 2):
        status, _, err = cli(tmp_path, *arguments, f"--name=by{workers}", f"--workers={workers}",
                             PYTHONHASHSEED=str(workers))
        assert status == 0 and err == ""
    one, two = (contents(tmp_path / "data" / name) for name in ("by1", "by2"))
    assert one == two and len(one["val.bin"]) > 1000
    assert contents(prepare(tmp_path, tmp_path / "in", name="here", vocab_size=500, val_fraction=0.2))["train.bin"] == \
        one["train.bin"]


def test_sample_for_the_bpe(tmp_path, monkeypatch):
    """No more than SAMPLE characters, from everywhere in the text, and the same whatever the order."""
    documents, counted, count_words = sentences(400), [], data.count_words
    monkeypatch.setattr(data, "SAMPLE", 8000)
    monkeypatch.setattr(data, "count_words", lambda texts, **rest: counted.extend(texts) or count_words(texts, **rest))
    first = prepare(tmp_path, write_source(tmp_path / "a.txt", documents), name="a")
    assert 1500 < sum(map(len, counted)) <= 8000 < sum(map(len, documents)) and set(counted) <= set(documents)
    assert all(len(set(counted) & set(documents[i : i + 100])) > 3 for i in range(0, 400, 100))
    second = prepare(tmp_path, write_source(tmp_path / "b.txt", documents[::-1]), name="b")
    assert contents(first)["tokenizer.tiktoken"] == contents(second)["tokenizer.tiktoken"]


# --------------------------------------------------------------------------------------------------------------------
# The split depends on content alone


def val_documents(tmp_path, name, documents, **options):
    source, options = write_source(tmp_path / f"{name}.jsonl", documents), {"val_fraction": 0.3, **options}
    folder = prepare(tmp_path, source, name=name, **options)
    train, val = set(documents_of(folder, "train")), set(documents_of(folder, "val"))
    assert not train & val and train | val == set(lowered(documents))
    return val


def test_split_by_content(tmp_path):
    documents, more = sentences(120), sentences(40, seed=1)
    val = val_documents(tmp_path, "all", documents)
    assert 20 < len(val) < 55
    assert val_documents(tmp_path, "reversed", documents[::-1]) == val
    assert val_documents(tmp_path, "more", more + documents) - set(lowered(more)) == val
    assert val_documents(tmp_path, "fewer", documents[::2]) == val & set(lowered(documents[::2]))
    assert val_documents(tmp_path, "other_size", documents, vocab_size=290) == val
    assert val_documents(tmp_path, "twice", documents + more + documents[::-1]) - set(lowered(more)) == val


def test_a_smaller_split_is_part_of_a_larger_one(tmp_path):
    documents = sentences(120)
    small, large = (val_documents(tmp_path, f"by{f}", documents, val_fraction=f) for f in (0.1, 0.5))
    assert small < large and len(small) < 25 and 40 < len(large) < 80


def test_split_does_not_depend_on_the_kind_of_file(tmp_path):
    documents = sentences(60)
    bins = [contents(prepare(tmp_path, write_source(tmp_path / name, documents), name=name, val_fraction=0.3))
            for name in ("a.txt", "b.jsonl", "c.txt.gz")]
    assert all(found["val.bin"] == bins[0]["val.bin"] and found["train.bin"] == bins[0]["train.bin"] for found in bins)


# --------------------------------------------------------------------------------------------------------------------
# Encodings


def test_the_tokenizer_of_a_corpus_is_reused(corpus, tmp_path):
    documents = sentences(20, seed=3)
    folder = prepare(tmp_path, write_source(tmp_path / "in.txt", documents), encoding=str(corpus))
    assert contents(folder)["tokenizer.tiktoken"] == contents(corpus)["tokenizer.tiktoken"]
    assert sorted(all_documents(folder)) == sorted(lowered(documents))
    keys = ("vocab_size", "special_ids", "pattern", "lowercase", "dtype")
    assert [meta_of(folder)[key] for key in keys] == [meta_of(corpus)[key] for key in keys]


def test_a_cased_tokenizer_stays_cased(tmp_path):
    source = write_source(tmp_path / "in.txt", sentences(30))
    first = prepare(tmp_path, source, name="first", lowercase=False)
    second = prepare(tmp_path, source, name="second", encoding=str(first), lowercase=False, vocab_size=280)
    third = prepare(tmp_path, source, name="third", encoding=str(first))
    assert meta_of(second)["lowercase"] is meta_of(third)["lowercase"] is False
    assert contents(first)["train.bin"] == contents(second)["train.bin"] == contents(third)["train.bin"]


@pytest.mark.parametrize("conflict", [{"vocab_size": 401}, {"lowercase": False}])
def test_a_corpus_tokenizer_cannot_be_changed(corpus, tmp_path, conflict):
    source = write_source(tmp_path / "in.txt", sentences(20))
    with pytest.raises(data.InputError, match="vocab_size=400.*lowercase=True"):
        prepare(tmp_path, source, encoding=str(corpus), **conflict)
    assert not list((tmp_path / "data").glob("*"))


@pytest.fixture
def fake_gpt2(monkeypatch):
    """An encoding that tiktoken gives under the name gpt2, without a network."""
    ranks = {bytes([255 - b]): b for b in range(256)} | {b"th": 256, b"the": 257, b" the": 258}
    encoding = tiktoken.Encoding("gpt2", pat_str=r" ?\w+|\W", mergeable_ranks=ranks,
                                 special_tokens={"<|endoftext|>": 259})
    monkeypatch.setattr(tiktoken, "get_encoding", {"gpt2": encoding}.__getitem__)
    return encoding


def test_an_encoding_of_tiktoken(fake_gpt2, tmp_path):
    documents = ["The other <|endoftext|> of the theatre", *sentences(10)]
    source = write_source(tmp_path / "in.txt", documents)
    folder = prepare(tmp_path, source, encoding="gpt2", val_fraction=0.0, lowercase=False)
    wanted = [i for d in documents for i in [*fake_gpt2.encode_ordinary(d), meta_of(folder)["special_ids"]["[SEP]"]]]
    assert ids_of(folder, "train").tolist() == wanted and 258 in wanted
    assert meta_of(folder)["special_ids"] == dict(zip(SPECIALS, range(259, 263)))
    assert meta_of(folder)["vocab_size"] == 263 and meta_of(folder)["encoding"] == "gpt2"
    assert meta_of(folder)["pattern"] == r" ?\w+|\W"
    again = prepare(tmp_path, source, encoding=str(folder), name="again", val_fraction=0.0)
    assert contents(again)["train.bin"] == contents(folder)["train.bin"]
    lower = prepare(tmp_path, source, encoding="gpt2", name="lower", val_fraction=0.0)
    assert all_documents(lower) == lowered(documents)


def test_an_encodings_vocabulary_cannot_be_changed(fake_gpt2, tmp_path):
    source = write_source(tmp_path / "in.txt", sentences(10))
    with pytest.raises(data.InputError, match="vocab_size=263"):
        prepare(tmp_path, source, encoding="gpt2", vocab_size=300)
    assert prepare(tmp_path, source, encoding="gpt2", vocab_size=263).is_dir()


def test_an_encoding_that_cannot_be_fetched(tmp_path, monkeypatch):
    def get_encoding(name):
        raise ConnectionError("a long story\nof several lines")

    monkeypatch.setattr(tiktoken, "get_encoding", get_encoding)
    with pytest.raises(data.InputError, match="gpt2.*network"):
        prepare(tmp_path, write_source(tmp_path / "in.txt", sentences(10)), encoding="gpt2")
    assert not list((tmp_path / "data").glob("*"))


@pytest.mark.parametrize("highest, dtype", [(65531, "uint16"), (65532, "uint32")])
def test_width_of_ids(tmp_path, monkeypatch, highest, dtype):
    """65,536 entries fit into 16 bits, one more does not."""
    ranks = {bytes([b]): b for b in range(256)} | {b"th": highest}
    encoding = tiktoken.Encoding("gpt2", pat_str=r"\w+|\W", mergeable_ranks=ranks, special_tokens={})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    documents = ["the thing is this", *sentences(30)]
    folder = prepare(tmp_path, write_source(tmp_path / "in.txt", documents), encoding="gpt2", val_fraction=0.0)
    assert meta_of(folder)["dtype"] == dtype and meta_of(folder)["vocab_size"] == highest + 5
    assert ids_of(folder, "train")[0] == highest and ids_of(folder, "train")[-1] == highest + 3
    assert all_documents(folder) == lowered(documents)
    batch = data.Sequences(folder, "train", 10, 1, 8, 0).batch(0, [0, 1], 2)
    assert batch["tokens"][0, 0] == highest + 2


# --------------------------------------------------------------------------------------------------------------------
# Hub data sets


def fake_datasets(monkeypatch, load_dataset):
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))


def test_hub(tmp_path, monkeypatch):
    documents, asked = sentences(40), []

    def load_dataset(*names, **options):
        asked.append((names, options))
        return ({"id": i, "body": document} for i, document in enumerate(documents))

    fake_datasets(monkeypatch, load_dataset)
    folder = prepare(tmp_path, hub="some/set", hub_config="en", field="body", val_fraction=0.2)
    assert sorted(all_documents(folder)) == sorted(lowered(documents)) and "some/set" in meta_of(folder)["sources"][0]
    assert all(a == (("some/set", "en"), {"split": "train", "streaming": True}) for a in asked) and asked
    same = prepare(tmp_path, write_source(tmp_path / "in.jsonl", documents), name="same", val_fraction=0.2)
    assert contents(same)["train.bin"] == contents(folder)["train.bin"]


def test_hub_is_one_sentence_without_its_package(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "datasets", None)
    status, _, err = command(monkeypatch, capsys, "--hub=x", "--name=new", f"--data_dir={tmp_path / 'out'}")
    one_sentence(status, err, "pip install datasets")
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize("rows, words", [
    ([{"title": "x", "body": "y"}], ["title, body", "--field="]), ([{"text": 5}], ["text", "--field="]),
    (None, ["--hub=x", "no such set on any of many lines"]),
])
def test_hub_that_cannot_be_read(rows, words, tmp_path, monkeypatch, capsys):
    def load_dataset(*names, **options):
        if rows is None:
            raise FileNotFoundError("no such set\n on any of\n many lines")
        return rows

    fake_datasets(monkeypatch, load_dataset)
    status, _, err = command(monkeypatch, capsys, "--hub=x", "--name=new", f"--data_dir={tmp_path / 'out'}")
    one_sentence(status, err, *words)
    assert not list(tmp_path.glob("out/*"))


# --------------------------------------------------------------------------------------------------------------------
# Interrupted, and once more


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, OSError(errno.ENOSPC, "No space left on device")])
def test_an_exception_leaves_nothing(tmp_path, monkeypatch, error):
    encode, calls = data.Tokenizer.encode, itertools.count()

    def fails(self, text):
        if next(calls) == 40:
            raise error
        return encode(self, text)

    monkeypatch.setattr(data.Tokenizer, "encode", fails)
    with pytest.raises(error if isinstance(error, type) else type(error)):
        prepare(tmp_path, write_source(tmp_path / "in.txt", sentences(100)))
    assert next(calls) > 40 and listing(tmp_path / "data") == []


def test_a_failure_at_the_very_end_leaves_nothing(tmp_path, monkeypatch):
    def fails(*_, **__):
        raise KeyboardInterrupt

    source = write_source(tmp_path / "in.txt", sentences(50))
    monkeypatch.setattr(os, "rename", fails)
    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path, source)
    assert listing(tmp_path / "data") == []


def open_pipe(path, process):
    """The writing end of a named pipe, as soon as the process reads from it."""
    for _ in range(600):
        assert process.poll() is None, process.communicate()
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
            os.set_blocking(descriptor, True)
            return open(descriptor, "wb")
        time.sleep(0.05)
    raise AssertionError("the process never read from the pipe")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("sent, send, workers, status", [
    (signal.SIGTERM, os.kill, 1, 143), (signal.SIGTERM, os.kill, 2, 143), (signal.SIGTERM, os.killpg, 2, 143),
    (signal.SIGINT, os.killpg, 1, 130), (signal.SIGINT, os.killpg, 2, 130), (signal.SIGKILL, os.kill, 1, None),
])
def test_a_signal_leaves_nothing_that_looks_finished(corpus, tmp_path, sent, send, workers, status):
    """The command reads a pipe that never ends: it is stopped while it writes train.bin, at a known place.

    Ctrl-C reaches the whole group of processes, the workers too, and none of them has a traceback to show.
    """
    os.mkfifo(tmp_path / "in.txt")
    arguments = ["in.txt", "--name=new", f"--encoding={corpus}", f"--workers={workers}"]
    process = subprocess.Popen([sys.executable, str(ROOT / "data.py"), *arguments], cwd=tmp_path, env=environment(),
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    try:
        with open_pipe(tmp_path / "in.txt", process) as pipe:
            pipe.write("\n\n".join(sentences(3000) * 5).encode())  # far more than a pipe holds: it has been read
            pipe.flush()
            time.sleep(0.5)  # workers have nothing left to do, and wait
            unfinished, = (tmp_path / "data").rglob("train.bin")
            assert unfinished.stat().st_size > 0 and not (tmp_path / "data" / "new").exists()
            send(process.pid, sent)
            _, err = process.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    if status:
        assert process.returncode == status and err == "" and listing(tmp_path / "data") == []
    assert not (tmp_path / "data" / "new").exists()
    (tmp_path / "in.txt").unlink()
    assert prepare(tmp_path, write_source(tmp_path / "in.txt", sentences(30)), name="new").is_dir()


def test_an_existing_corpus_is_kept_unless_told(tmp_path):
    first, second = (write_source(tmp_path / f"{i}.txt", sentences(40, seed=i)) for i in range(2))
    folder = prepare(tmp_path, first)
    before = contents(folder)
    with pytest.raises(data.InputError, match="corpus.*overwrite"):
        prepare(tmp_path, second)
    assert contents(folder) == before
    prepare(tmp_path, second, overwrite=True)
    assert sorted(all_documents(folder)) == sorted(lowered(sentences(40, seed=1))) and contents(folder) != before
    assert os.listdir(tmp_path / "data") == ["corpus"] and sorted(os.listdir(folder)) == FILES


def test_a_failed_replacement_keeps_the_old_corpus(tmp_path):
    folder = prepare(tmp_path, write_source(tmp_path / "in.txt", sentences(40)))
    before = contents(folder)
    (tmp_path / "in.txt").write_bytes(b"good text\n" * 50 + b"\xff\n")
    with pytest.raises(data.InputError, match="line 51"):
        prepare(tmp_path, tmp_path / "in.txt", overwrite=True)
    assert contents(folder) == before and os.listdir(tmp_path / "data") == ["corpus"]


def test_a_corpus_can_be_made_anew_with_its_own_tokenizer(tmp_path):
    source = write_source(tmp_path / "in.txt", sentences(40))
    folder = prepare(tmp_path, source)
    before = contents(folder)
    prepare(tmp_path, source, encoding=str(folder), overwrite=True)
    assert contents(folder)["train.bin"] == before["train.bin"]


def test_interrupted_while_the_old_corpus_is_deleted(tmp_path, monkeypatch):
    """There is either no corpus of that name, or a whole one: half of one must not look finished."""
    source, rmtree, calls = write_source(tmp_path / "in.txt", sentences(40)), shutil.rmtree, itertools.count()
    folder = prepare(tmp_path, source)

    def interrupted(path, *args, **kwargs):
        if next(calls):
            return rmtree(path, *args, **kwargs)
        Path(path, "tokenizer.tiktoken").unlink(missing_ok=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    with contextlib.suppress(KeyboardInterrupt):
        prepare(tmp_path, source, overwrite=True)
    assert next(calls) > 0  # something was deleted
    assert not folder.exists() or sorted(os.listdir(folder)) == FILES


# --------------------------------------------------------------------------------------------------------------------
# Bad input. name: (files below in/, arguments behind the usual ones, what the sentence says)


GOOD = "\n".join(sentences(30)).encode() + b"\n"
ROW = json.dumps({"text": "\n".join(sentences(30))}).encode() + b"\n"
PACKED = gzip.compress(GOOD * 20, mtime=0)
BAD = {
    "missing path": ({}, ["absent.txt"], ["absent.txt", "does not exist"]),
    "empty folder": ({}, ["in"], ["in holds no text", ".jsonl"]),
    "folder without text": ({"a.md": GOOD}, ["in"], ["in holds no text"]),
    "one folder of two without text": ({"a/a.txt": GOOD, "b/b.md": GOOD}, ["in/a", "in/b"], ["in/b holds no text"]),
    "file that is no text": ({"a.pdf": GOOD}, ["in/a.pdf"], ["in/a.pdf"]),
    "not UTF-8": ({"a.txt": GOOD, "b.txt": b"fine\n\nLatin caf\xe9.\n"}, ["in"], ["in/b.txt, line 3", "UTF-8"]),
    "not UTF-8 at once": ({"a.txt": "日本".encode("utf-16")}, ["in"], ["in/a.txt, line 1", "UTF-8"]),
    "not UTF-8, gzipped": ({"a.txt.gz": gzip.compress(b"fine\n\xff")}, ["in"], ["in/a.txt.gz, line 2", "UTF-8"]),
    "not UTF-8, JSON": ({"a.jsonl": ROW + b'{"text": "\xff"}\n'}, ["in"], ["in/a.jsonl, line 2", "UTF-8"]),
    "not JSON": ({"a.jsonl": ROW + b"\n" + b'{"text": \n'}, ["in"], ["in/a.jsonl, line 3", "JSON"]),
    "not JSON, gzipped": ({"a.jsonl.gz": gzip.compress(ROW * 9 + b"x")}, ["in"], ["in/a.jsonl.gz, line 10", "JSON"]),
    "JSON cut off": ({"a.jsonl": ROW + ROW[:40]}, ["in"], ["in/a.jsonl, line 2", "JSON"]),
    "JSON too deep": ({"a.jsonl": b"[" * 10**5}, ["in"], ["in/a.jsonl, line 1", "JSON"]),
    "JSON with a huge number": ({"a.jsonl": b'{"text": "a", "n": ' + b"1" * 5000 + b"}"}, ["in"], ["a.jsonl, line 1"]),
    "missing field": ({"a.jsonl": ROW + b'{"txt": "a"}'}, ["in"], ["in/a.jsonl, line 2", '"text"', "--field="]),
    "missing field named": ({"a.jsonl": ROW}, ["in", "--field=body"], ["in/a.jsonl, line 1", '"body"', "--field="]),
    "no object": ({"a.jsonl": ROW + b'"text"\n'}, ["in"], ["in/a.jsonl, line 2", '"text"']),
    "a list": ({"a.jsonl": b'["text"]\n'}, ["in"], ["in/a.jsonl, line 1", '"text"']),
    "field that is no text": ({"a.jsonl": ROW + b'{"text": 5}\n'}, ["in"], ["a.jsonl, line 2", '"text"', "not text"]),
    "field that is null": ({"a.jsonl": b'{"text": null}\n'}, ["in"], ["in/a.jsonl, line 1", "not text"]),
    "gzip cut off": ({"a.txt.gz": PACKED[:-30]}, ["in"], ["in/a.txt.gz", "gzip"]),
    "gzip damaged": ({"a.txt.gz": PACKED[:50] + b"\xff" * 40 + PACKED[90:]}, ["in"], ["in/a.txt.gz", "gzip"]),
    "gzip checksum": ({"a.txt.gz": PACKED[:-8] + bytes(4) + PACKED[-4:]}, ["in"], ["in/a.txt.gz", "gzip"]),
    "no gzip": ({"a.txt.gz": GOOD}, ["in"], ["in/a.txt.gz", "gzip"]),
    "empty file": ({"a.txt": b""}, ["in"], ["no text"]),
    "blank text": ({"a.txt": b"\n \n\t\n", "b.jsonl": b'{"text": " "}\n'}, ["in"], ["no text"]),
    "too little text": ({"a.txt": b"abcd"}, ["in"], ["too little text", "vocab_size"]),
    "vocabulary below the bytes": ({"a.txt": GOOD}, ["in", "--vocab_size=259"], ["--vocab_size", "260", "259"]),
    "unknown option": ({"a.txt": GOOD}, ["in", "--vocab_sise=300"], ["--vocab_sise", '"vocab_size"']),
    "option without a value": ({"a.txt": GOOD}, ["in", "--overwrite"], ["--overwrite=VALUE"]),
    "wrong type": ({"a.txt": GOOD}, ["in", "--vocab_size=many"], ["--vocab_size", "whole number", "many"]),
    "not a truth value": ({"a.txt": GOOD}, ["in", "--lowercase=maybe"], ["--lowercase", "True or False"]),
    "out of range": ({"a.txt": GOOD}, ["in", "--val_fraction=0.6"], ["--val_fraction", "0.5", "0.6"]),
    "not a number": ({"a.txt": GOOD}, ["in", "--val_fraction=nan"], ["--val_fraction", "nan"]),
    "no workers": ({"a.txt": GOOD}, ["in", "--workers=0"], ["--workers", "1"]),
    "unknown encoding": ({"a.txt": GOOD}, ["in", "--encoding=gpt3"], ["--encoding=gpt3", '"gpt2"']),
    "folder that is no corpus": ({"a.txt": GOOD}, ["in", "--encoding=in"], ["in"]),
    "name of a path": ({"a.txt": GOOD}, ["in", "--name=../new"], ["--name", "../new"]),
    "hidden name": ({"a.txt": GOOD}, ["in", "--name=.new"], ["--name", ".new"]),
    "no name": ({"a.txt": GOOD}, ["in", "--name="], ["--name"]),
    "paths and a hub": ({"a.txt": GOOD}, ["in", "--hub=x"], ["--hub"]),
    "data_dir below a file": ({"a.txt": GOOD}, ["in", "--data_dir=in/a.txt/out"], ["in/a.txt"]),
    "data_dir is a file": ({"a.txt": GOOD}, ["in", "--data_dir=in/a.txt"], ["in/a.txt"]),
}


def bad_input(case, folder):
    """Writes the case's files; its arguments, what the sentence says, and what is there before."""
    files, arguments, words = BAD[case]
    (folder / "in").mkdir()
    for name, raw in files.items():
        (folder / "in" / name).parent.mkdir(exist_ok=True)
        (folder / "in" / name).write_bytes(raw)
    usual = ["--name=new", "--vocab_size=300", "--workers=1", "--data_dir=out"]
    return usual + arguments, words, listing(folder)


def unchanged(folder, before):
    assert [name for name in listing(folder) if name != "out"] == before


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(case, tmp_path, monkeypatch, capsys):
    arguments, words, before = bad_input(case, tmp_path)
    monkeypatch.chdir(tmp_path)
    status, _, err = command(monkeypatch, capsys, *arguments)
    one_sentence(status, err, *words)
    unchanged(tmp_path, before)


@pytest.mark.parametrize("case, workers", [("missing path", 1), ("not UTF-8", 2), ("unknown option", 1),
                                           ("data_dir below a file", 1)])
def test_bad_input_on_the_command_line(case, workers, tmp_path):
    arguments, words, before = bad_input(case, tmp_path)
    status, _, err = cli(tmp_path, *arguments, f"--workers={workers}")
    one_sentence(status, err, *words)
    unchanged(tmp_path, before)


def test_text_that_goes_bad_after_the_tokenizer(corpus, tmp_path, monkeypatch, capsys):
    """With a tokenizer at hand text is first read when train.bin is already open."""
    monkeypatch.chdir(tmp_path)
    for name, raw, word in [("a.txt", GOOD * 50 + b"\xff", "a.txt, line"), ("b.txt", b" \n", "no text")]:
        Path(name).write_bytes(raw)
        status, _, err = command(monkeypatch, capsys, name, "--name=new", f"--encoding={corpus}", "--workers=1")
        one_sentence(status, err, word)
        assert listing(tmp_path / "data") == []


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    write_source(tmp_path / "in.txt", sentences(30))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "write_tokens", full)
    status, _, err = command(monkeypatch, capsys, "in.txt", "--name=new", "--vocab_size=280", "--workers=1")
    one_sentence(status, err, "No space left on device")
    assert listing(tmp_path / "data") == []


# --------------------------------------------------------------------------------------------------------------------
# Sequences


T, K, C = 33, 5, 28  # max_len, masked positions, length of a crop
LENGTH = 200 * (T - 1) + 7  # tokens of the split: 200 sequences and a rest
CLS, SEP = 20_001, 20_002


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A corpus whose token at place i is i, but for a [SEP] now and then: a sequence tells where it comes from."""
    folder = tmp_path_factory.mktemp("packed")
    tokens = np.arange(LENGTH, dtype=np.uint16)
    tokens[np.random.default_rng(0).integers(0, LENGTH, LENGTH // 20)] = SEP
    tokens.tofile(folder / "train.bin")
    np.arange(3, dtype=np.uint16).tofile(folder / "val.bin")
    meta = {"vocab_size": 20_004, "tokens": {"train": LENGTH, "val": 3}, "dtype": "uint16", "sha256": {
            split: hashlib.sha256((folder / f"{split}.bin").read_bytes()).hexdigest() for split in ("train", "val")},
            "lowercase": True, "pattern": "",
            "special_ids": {"[PAD]": 20_000, "[CLS]": CLS, "[SEP]": SEP, "[MASK]": 20_003}}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def sequences(folder, seed=0, split="train", masked=K):
    return data.Sequences(folder, split, T, masked, C, seed)


def equal(one, two):
    return one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)


def test_number_of_sequences(packed):
    assert len(sequences(packed)) == 200 and len(sequences(packed, split="val")) == 0


def test_tokens_are_packed_and_begin_with_cls(packed):
    stream = ids_of(packed, "train")
    batch = sequences(packed).batch(0, range(200), 200)
    assert batch["tokens"].shape == (200, T) and np.all(batch["tokens"][:, 0] == CLS)
    found = sorted(tuple(row) for row in batch["tokens"][:, 1:].tolist())
    assert found == sorted(tuple(stream[i * (T - 1) : (i + 1) * (T - 1)].tolist()) for i in range(200))


def test_each_epoch_is_a_permutation(packed):
    """Batches of 16 run over the ends of epochs, where 200 sequences are no whole number of them."""
    found, batches = sequences(packed), range(200 * 4 // 16)
    rows = [tuple(row) for step in batches for row in found.batch(step, range(16), 16)["tokens"].tolist()]
    epochs = [rows[i : i + 200] for i in range(0, 800, 200)]
    assert all(len(set(epoch)) == 200 and set(epoch) == set(epochs[0]) for epoch in epochs)
    orders = [tuple(epochs[0].index(row) for row in epoch) for epoch in epochs]
    assert len(set(orders)) == 4
    assert rows != [tuple(row) for row in sequences(packed, seed=1).batch(0, range(200), 200)["tokens"].tolist()]


def test_masks(packed):
    for step in range(4):
        batch = sequences(packed).batch(step, range(50), 50)
        assert batch["masked"].shape == (50, K)
        assert np.all(np.diff(batch["masked"]) > 0) and batch["masked"].min() >= 1 and batch["masked"].max() < T
        assert not np.isin(np.take_along_axis(batch["tokens"], batch["masked"], 1), [CLS, SEP]).any()


def test_masks_are_spread_evenly(packed):
    """Every ordinary token is masked with about the same frequency, at every position and in every sequence."""
    masked, ordinary = np.zeros(T), np.zeros(T)
    for step in range(12):
        batch = sequences(packed).batch(step, range(200), 200)
        share = K / (~np.isin(batch["tokens"], [CLS, SEP])).sum(1, keepdims=True)
        ordinary += (~np.isin(batch["tokens"], [CLS, SEP]) * share).sum(0)
        masked += np.bincount(batch["masked"].ravel(), minlength=T)
    assert masked[0] == ordinary[0] == 0 and masked.sum() == 12 * 200 * K
    assert np.all(np.abs(masked - ordinary)[1:] < 4.5 * np.sqrt(ordinary[1:]))


def test_crops_are_contiguous_and_from_the_original(packed):
    starts = Counter()
    for step in range(3):
        batch = sequences(packed).batch(step, range(200), 200)
        assert batch["crop"].shape == (200, C + 1) and np.all(batch["crop"][:, 0] == CLS)
        for tokens, crop in zip(batch["tokens"].tolist(), batch["crop"].tolist()):
            places = [s for s in range(1, T - C + 1) if tokens[s : s + C] == crop[1:]]
            assert len(places) == 1
            starts[places[0]] += 1
    assert sorted(starts) == list(range(1, T - C + 1)) and min(starts.values()) > 600 / (T - C) / 1.5


def test_uniforms(packed):
    found = np.concatenate([sequences(packed).batch(step, range(200), 200)["uniforms"] for step in range(5)])
    assert found.dtype == np.float32 and found.shape == (1000, K) and found.min() >= 0 and found.max() < 1
    counts = np.bincount((found.ravel() * 10).astype(int), minlength=10)
    assert np.all(np.abs(counts - 500) < 100) and len(np.unique(found)) > 4900


def test_a_sequence_is_a_function_of_seed_step_and_index(packed):
    found = sequences(packed)
    wanted = found.batch(5, range(12), 12)
    assert equal(wanted, sequences(packed).batch(5, range(12), 12))  # a process of its own, a resumed run
    parts = [sequences(packed).batch(5, part, 12) for part in ([0, 1, 2], [3], list(range(4, 12)))]  # accumulation
    assert equal(wanted, {name: np.concatenate([part[name] for part in parts]) for name in wanted})
    ranks = [sequences(packed).batch(5, range(rank, 12, 3), 12) for rank in range(3)]  # several processes
    assert equal(wanted, {name: np.stack([ranks[i % 3][name][i // 3] for i in range(12)]) for name in wanted})
    for step in (900, 0, 3):
        found.batch(step, [7, 2], 12)
    assert equal(wanted, found.batch(5, range(12), 12))  # whatever was asked for before
    backwards = found.batch(5, range(11, -1, -1), 12)
    assert equal(wanted, {name: rows[::-1] for name, rows in backwards.items()})


@pytest.mark.parametrize("name", ["tokens", "masked", "crop", "uniforms"])
def test_other_seeds_steps_and_indices_differ(packed, name):
    """Also the same text in a later epoch has other masks."""
    steps = [sequences(packed).batch(step, range(8), 8)[name] for step in (0, 1, 2, 25)]
    seeds = [sequences(packed, seed).batch(0, range(8), 8)[name] for seed in (1, 2, 10**6)]
    rows = [tuple(row) for batch in steps + seeds for row in batch.tolist()]
    assert len(set(rows)) > (45 if name != "masked" else 50) and len(rows) == 56
    assert len({batch.tobytes() for batch in steps + seeds}) == 7


def test_the_same_text_is_masked_anew_in_each_epoch(packed):
    found = sequences(packed)
    first, second = (found.batch(epoch, range(200), 200) for epoch in range(2))
    place = {tuple(row): i for i, row in enumerate(first["tokens"].tolist())}
    again = [place[tuple(row)] for row in second["tokens"].tolist()]
    same = sum(np.array_equal(second["masked"][i], first["masked"][j]) for i, j in enumerate(again))
    assert same < 10


def test_reading_is_by_memory_map(packed):
    assert isinstance(sequences(packed).tokens, np.memmap)


@pytest.mark.parametrize("change", [lambda raw: raw[:-2], lambda raw: raw + b"\0\0", lambda raw: raw[:-1],
                                    lambda raw: b""])
def test_a_file_of_the_wrong_size_is_refused(packed, tmp_path, change):
    folder = shutil.copytree(packed, tmp_path / "copy")
    (folder / "train.bin").write_bytes(change((folder / "train.bin").read_bytes()))
    with pytest.raises(data.InputError, match="train.bin.*prepare"):
        sequences(folder)


def test_a_corpus_that_is_not_there_is_refused(packed, tmp_path):
    with pytest.raises(data.InputError, match="absent"):
        sequences(tmp_path / "absent")
    folder = shutil.copytree(packed, tmp_path / "copy")
    (folder / "val.bin").unlink()
    with pytest.raises(data.InputError, match="val.bin"):
        sequences(folder, split="val")


def test_sequences_of_a_prepared_corpus(corpus):
    """From text to batches: the first epoch of the training split is its text."""
    found = data.Sequences(corpus, "train", T, K, C, 0)
    rows = found.batch(0, range(len(found)), len(found))["tokens"][:, 1:]
    assert Counter(rows.ravel().tolist()) == Counter(ids_of(corpus, "train")[: rows.size].tolist())
    assert rows.size > 3000
