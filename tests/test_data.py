"""data.py against obvious versions: options, BPE, tokenizer, pieces, corpora, bad input, sequences."""

import contextlib
import gzip
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import tiktoken
import tiktoken.load
import torch

import data

FILES = ["meta.json", "tokenizer_state.json", "train.bin", "val.bin"]
SPECIALS = ["[PAD]", "[CLS]", "[SEP]", "[MASK]"]


def sentences(count, seed=0, words=12):
    """Different documents of a few made-up words; every third has two lines."""
    rng = random.Random(seed)
    lexicon = ["".join(rng.choices("aeiounrtsl", k=rng.randint(2, 7))) for _ in range(60)]
    lexicon += ["Ünïcode", "日本", "🙂"]
    texts = [" ".join(rng.choices(lexicon, k=words)) for _ in range(count)]
    return [f"{text}\n{seed} {i}." if i % 3 == 0 else f"{text} {seed} {i}." for i, text in enumerate(texts)]


def write_source(path, documents, field="text"):
    """A text file with a blank line after each document, or a .jsonl; gzipped if the name says so."""
    if ".jsonl" in path.name:
        text = "".join(json.dumps({"id": i, field: d}) + "\n" for i, d in enumerate(documents))
    else:
        text = "\n\n".join(documents) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix.lower() == ".gz" else text.encode())
    return path


def prepare(folder, *paths, **options):
    """data.prepare by one process into folder/data/corpus, with a small vocabulary"""
    usual = {"name": "corpus", "data_dir": str(folder / "data"), "workers": 1}
    usual |= {} if "encoding" in options else {"vocab_size": 280}
    return data.prepare(paths, **(usual | options))


def meta_of(folder):
    return json.loads((folder / "meta.json").read_text())


def ids_of(folder, split):
    return np.fromfile(folder / f"{split}.bin", meta_of(folder)["dtype"])


def documents_of(folder, *splits):
    """The texts of these splits, or of both. [SEP] follows each."""
    ids = np.concatenate([ids_of(folder, split) for split in splits or ("train", "val")])
    *texts, rest = data.Tokenizer.load(folder).decode(ids).split("[SEP]")
    assert rest == ""
    return texts


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
    return prepare(folder, write_source(folder / "in.txt", sentences(300)), vocab_size=400, val_fraction=0.2)


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return data.Tokenizer.load(corpus)


def start(folder, *arguments, **options):
    """`python data.py ARGUMENTS` as a process group of its own"""
    return subprocess.Popen([sys.executable, data.__file__, *arguments], cwd=folder, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, **options)


# ------------------------------------------------------------------------------------------------------------
# Options, the BPE trainer, the tokenizer


class Settings:
    steps: int = 10
    rate: float = 0.5  # how fast, in %
    kind: Literal["a", "b"] = "a"
    loud: bool = False
    place: str = "here"


def test_options():
    parser = data.Parser("usage", Settings)
    usual = {"steps": 10, "rate": 0.5, "kind": "a", "loud": False, "place": "here"}
    assert vars(parser.parse_args([])) == usual
    given = parser.parse_args(["--steps=5", "--rate", "1e-1", "--kind=B", "--loud=True", "--place=~"])
    assert vars(given) == {"steps": 5, "rate": 0.1, "kind": "b", "loud": True, "place": str(Path.home())}
    assert "how fast, in % (default: 0.5)" in parser.format_help()
    for argument in ("--steps=0", "--steps=2.5", "--steps=1_0", "--rate=nan", "--rate=-1",
                     "--rate=1e999", "--kind=c", "--loud=1", "--place=", "--zzz=1"):
        with pytest.raises(data.InputError):
            parser.parse_args([argument])


def slow_bpe(words, size):
    """Counts all pairs anew at each step; ties go to the pair of older tokens."""
    tokens = [bytes([b]) for b in range(256)]
    spelled = {word: list(word.encode()) for word in words}
    while len(tokens) < size:
        counts = Counter()
        for word, ids in spelled.items():
            for pair in zip(ids, ids[1:]):
                counts[pair] += words[word]
        if not counts:
            break
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        for ids in spelled.values():
            for i in range(len(ids)):  # past the end of merged ids there is nothing to find
                if tuple(ids[i : i + 2]) == best:
                    ids[i : i + 2] = [len(tokens)]
        tokens.append(tokens[best[0]] + tokens[best[1]])
    return tokens


@pytest.mark.parametrize("alphabet", ["a", "ab", "aab ", "etaoin", "b🙂🙃日"])
def test_bpe_equals_slow_trainer(alphabet):
    rng = random.Random(0)
    words = Counter("".join(rng.choices(alphabet, k=rng.choice([1, 2, 5, 14, 100]))) for _ in range(60))
    for size in (256, 257, 261, 270, 300):
        wanted = slow_bpe(words, size)
        if len(wanted) < size:
            with pytest.raises(data.InputError, match="too little text"):
                data.train_bpe(words, size)
            continue
        for given in (words, dict(reversed(words.items()))):  # whatever their order
            assert list(data.train_bpe(given, size).items()) == list(zip(wanted, range(size)))


def test_words():
    found = data.count_words([(True, "The cat's  hat, 12345"), (False, "The")])
    assert found == {"The": 2, " cat": 1, "'s": 1, " ": 1, " hat": 1, ",": 1, " 123": 1, "45": 1}
    assert data.count_words([(True, "x" * 250)]) == {"x" * 100: 2, "x" * 50: 1}


def test_of_much_text_the_bpe_is_trained_on_a_share_without_validation_text(tmp_path, monkeypatch):
    source = write_source(tmp_path / "in.txt", sentences(400))
    monkeypatch.setattr(data, "SAMPLE", 0.6 * source.stat().st_size)
    folder = prepare(tmp_path, source, name="share", val_fraction=0.4)
    monkeypatch.undo()
    train = prepare(tmp_path, write_source(tmp_path / "train.txt", documents_of(folder, "train")))
    assert contents(folder)["tokenizer_state.json"] == contents(train)["tokenizer_state.json"]


TEXTS = [
    "", "  two\t\ttabs \n\n\n  and\r\nlines  ", "e\u0301 Z\u0351 \u0301", " " * 10**6 + "end",
    "👩‍👩‍👧‍👦🏳️‍🌈🇩🇪", "שלום עולם \u202eمرحبا\u202c", "".join(map(chr, range(256))),
    "\ufffe\uffff\U0010ffff \ufeff \u2028\x85 \ufffd", "[PAD][CLS] [SEP] [MASK] <|endoftext|> <s>",
    "İSTANBUL ΟΔΟΣ Straße ẞ Ǆ ﬁ Ａ K Å 𐐀 ŉ ΑΣ. Σ ς", "1234567890 ١٢٣ ½ ²"]


def test_text_round_trips(tokenizer):
    """No special id comes from text. Half characters are replaced."""
    cased = data.Tokenizer.from_state({**tokenizer.state(), "lowercase": False})
    for text in TEXTS:
        assert cased.decode(cased.encode(text)) == text
        assert tokenizer.decode(tokenizer.encode(text)) == data.lower(text)
        assert all(0 <= i < tokenizer.pad_id for i in tokenizer.encode(text) + cased.encode(text))
    assert cased.decode(cased.encode("\ude42\ud83d 🙂 \udc80")) == "\ufffd\ufffd 🙂 \ufffd"
    ids = cased.encode("The cat sat.")
    assert "".join(cased.pieces(ids)) == "The cat sat." and len(cased.pieces(ids)) == len(ids) < 12


def test_lower_is_per_character():
    everything = "".join(map(chr, range(sys.maxunicode + 1)))
    assert data.lower(everything) == "".join(c.lower() if len(c.lower()) == 1 else c for c in everything)
    assert data.lower("İI ΟΔΟΣ ΑΣ. Straße ẞ") == "İi οδοσ ασ. straße ß"


def test_the_specials_follow_ranks_in_tiktokens_format(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", "")  # no copy elsewhere
    (tmp_path / "ranks").write_text(tokenizer.state()["ranks"])
    assert tiktoken.load.load_tiktoken_bpe(str(tmp_path / "ranks")) == tokenizer.ranks
    assert sorted(tokenizer.ranks.values()) == list(range(396)) and tokenizer.vocab_size == 400
    assert tokenizer.special_ids == dict(zip(SPECIALS, range(396, 400)))


def test_load_knows_corpora_checkpoints_and_runs(tokenizer, corpus, tmp_path):
    """What is none of them may be a released model: the sentence names the command that converts it."""
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    torch.save({"args": None, "model": {}}, tmp_path / "model.pt")
    for name in ("", "model.pt", "model.safetensors"):
        with pytest.raises(data.InputError, match="python convert.py"):
            data.Tokenizer.load(tmp_path / name)
    torch.save({"tokenizer": tokenizer.state()}, tmp_path / "ckpt.pt")
    for path in (corpus, tmp_path, tmp_path / "ckpt.pt"):
        assert data.Tokenizer.load(path).state() == tokenizer.state()
    torch.save({"tokenizer": None}, tmp_path / "bad.pt")
    with pytest.raises(data.InputError, match="bad.pt"):
        data.Tokenizer.load(tmp_path / "bad.pt")


def test_encode_pair_cuts_the_longer_side_first(tokenizer):
    """As if tokens were popped from the longer side until both fit."""
    texts = [" ".join("abcdefghijkl"[:n]) for n in (0, 1, 2, 3, 7, 12)]
    cls, sep = tokenizer.cls_id, tokenizer.sep_id
    for first, second, max_len in itertools.product(texts, texts, [4, 5, 6, 7, 8, 12, 15, 40]):
        a, b = tokenizer.encode(first), tokenizer.encode(second)
        while len(a) + len(b) + 4 > max_len:
            (a if len(a) > len(b) else b).pop()
        assert tokenizer.encode_pair(first, second, max_len) == [cls, *a, sep, sep, *b, sep]
    assert tokenizer.encode_pair("a b c", max_len=4) == [cls, *tokenizer.encode("a b c")[:2], sep]
    with pytest.raises(data.InputError):
        tokenizer.encode_pair("a", "b", 3)


# ------------------------------------------------------------------------------------------------------------
# From text to a corpus


def test_pieces(monkeypatch):
    monkeypatch.setattr(data, "PIECE", 12)
    lines = ["one two\n", "six\n", "seven eight nine\n", None, " \n", None, "\n", "x" * 26 + "\n", "y", None]
    wanted = ["one two\nsix\n", "seven eight", " nine", "x" * 12, "x" * 12, "xx\ny"]
    assert list(data.pieces(lines)) == list(zip([True, False, False, True, False, False], wanted))
    endless = itertools.cycle(["some words\n", None])  # given as lines come
    assert list(itertools.islice(data.pieces(endless), 3)) == [(True, "some words")] * 3
    rng = random.Random(0)
    for _ in range(300):  # joined they are the document: lines are blank, short or longer than a piece
        makers = [lambda n: " " * n, lambda n: "word " * n, lambda n: "日本" * n, lambda n: "word."]
        lines = [rng.choice(makers)(rng.randint(0, 30)) + "\n" for _ in range(rng.randint(0, 12))]
        found = list(data.pieces([*lines, None, "next", None]))
        assert found.pop() == (True, "next") and all(0 < len(text) <= 12 for _, text in found)
        assert [new for new, _ in found] == [True, *[False] * (len(found) - 1)][: len(found)]
        assert "".join(text for _, text in found).rstrip() == "".join(lines).strip()


FIRST = "The first paragraph is plain English and makes a sentence of some length."
SECOND = "This one is only in the second of the files, so it is kept there as it is."
SOURCE = f'''"""{FIRST}

    ==========  ============================================================
    a table     of some words that would be a sentence if they were no table.
"""
raise SystemExit("this file must never be run")

async def method(self):
    """The :func:`method` waits until the ``work`` is
    done, and gives back what was found.

    x : int
        The number of the things that are counted in here, which is a parameter.
    """
'''


def test_default_text(tmp_path, monkeypatch):
    """The prose of source files, each paragraph once; prepared with a vocabulary and a split of its own."""
    assert len(data.docs_files()) > 1000 and not any("/tests/" in file for file in data.docs_files())
    files = [tmp_path / name for name in ("a.py", "b.py", "c.py")]
    for file, text in zip(files, [SOURCE, f'"""{FIRST}\n\n{SECOND}"""', "this is { no Python"]):
        file.write_text(text)
    monkeypatch.setattr(data, "docs_files", lambda: list(map(str, files)))
    folder = data.prepare(data_dir=str(tmp_path / "data"), vocab_size=270, workers=1)  # a given value counts
    assert folder == tmp_path / "data" / "docs" and meta_of(folder)["val_fraction"] == 0.05
    method = "The method waits until the work is done, and gives back what was found."
    assert sorted(documents_of(folder)) == sorted(lowered([f"{FIRST}\n{method}", SECOND]))
    with pytest.raises(data.InputError, match="vocabulary of 8192"):  # the default text's own vocabulary
        data.prepare(data_dir=str(tmp_path / "other"), workers=1)


@pytest.mark.parametrize("name, field", [("in.txt", "text"), ("in.jsonl.gz", "body")])
def test_the_corpus_is_the_documents(tmp_path, monkeypatch, name, field):
    """Also those that are cut: [SEP] stands where a document ends or continues in the other split."""
    monkeypatch.setattr(data, "PIECE", 300)
    documents = [*sentences(40), "\n".join(sentences(40, seed=1)), *sentences(5, seed=2, words=400)]
    source = write_source(tmp_path / name, documents, field)
    folder = prepare(tmp_path, source, name="whole", val_fraction=0, field=field)
    assert documents_of(folder, "train") == lowered(documents) and documents_of(folder, "val") == []
    folder = prepare(tmp_path, source, name="split", val_fraction=0.3, field=field)
    tokenizer, wanted = data.Tokenizer.load(folder), {"train": [], "val": []}
    for document in lowered(documents):
        texts = [text for _, text in data.pieces([*document.splitlines(keepends=True), None])]
        for in_val, part in itertools.groupby(texts, lambda text: data.fingerprint(text) < 0.3 * 2**64):
            split = wanted["val" if in_val else "train"]
            split += [i for text in part for i in tokenizer.encode(text)] + [tokenizer.sep_id]
    assert {split: ids_of(folder, split).tolist() for split in wanted} == wanted
    assert meta_of(folder)["documents"] == len(documents) < len(documents_of(folder)) - 10
    assert meta_of(folder)["bytes"] == len("".join(lowered(documents)).encode())
    assert sorted(os.listdir(folder)) == FILES and sorted(os.listdir(folder.parent)) == ["split", "whole"]
    assert folder.stat().st_mode & 0o055 == 0o055  # readable by others, unlike a temporary folder


def test_folders_are_searched(tmp_path, monkeypatch):
    documents = sentences(40)
    for i, name in enumerate(["in/A.TXT", "in/sub/b.jsonl", "in/sub/deep/c.Txt.Gz", "single.txt"]):
        write_source(tmp_path / name, documents[i::4])
    for name in ("readme.md", "sub/e.json"):
        (tmp_path / "in" / name).write_text("not a text of the corpus")
    (tmp_path / "in" / "f.txt").symlink_to("nowhere")
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = prepare(tmp_path, tmp_path / "in", "~/single.txt", lowercase=False)
    assert sorted(documents_of(folder)) == sorted(documents)


def test_a_folder_that_cannot_be_read_is_not_left_out(tmp_path, monkeypatch):
    write_source(tmp_path / "in/a.txt", sentences(3))
    write_source(tmp_path / "in/sub/b.txt", sentences(3))
    scandir = os.scandir

    def refuse_sub(path):
        return scandir(path if Path(path).name != "sub" else "/nowhere")

    assert len(data.find_files([tmp_path / "in"])) == 2
    monkeypatch.setattr(os, "scandir", refuse_sub)
    with pytest.raises(OSError):
        data.find_files([tmp_path / "in"])


def test_documents_of_several_lines(tmp_path):
    """A document per file; blank lines in JSON; half characters; a byte order mark."""
    book = "\n\n".join(sentences(6))
    (tmp_path / "book.txt").write_text(f"\n\n {book}\n\n\n", encoding="utf-8")
    folder = prepare(tmp_path, tmp_path / "book.txt", document_per_file=True, name="book")
    assert documents_of(folder) == lowered([book])
    documents = ["one\n\ntwo " * 10, "half \ud83d of one " * 5]
    source = write_source(tmp_path / "in.jsonl", ["", *documents, " \n"])
    found = documents_of(prepare(tmp_path, source, vocab_size=262, val_fraction=0, name="jsonl"))
    assert found == [d.strip().replace("\ud83d", "\ufffd") for d in documents]
    (tmp_path / "in.txt").write_bytes(b"\xef\xbb\xbfone and one\ntwo\n\nthree and three\n \n\nfour")
    found = documents_of(prepare(tmp_path, tmp_path / "in.txt", vocab_size=262, val_fraction=0))
    assert found == ["one and one\ntwo", "three and three", "four"]


def test_line_ends(tmp_path, monkeypatch):
    r"""\n, \r\n and \r end a line, and nothing else does; .txt and .jsonl give the same pieces."""
    monkeypatch.setattr(data, "PIECE", 60)
    lines = [f"{text} of" for text in "\n".join(sentences(40)).split("\n")]
    text, found = "\n".join(lines) + "\none\u2028two\x0cthree\x1dfour\x85five\x0bsix\n", []
    for end in ("\n", "\r\n", "\r"):
        (tmp_path / "in.txt").write_bytes(text.replace("\n", end).encode())
        write_source(tmp_path / "in.jsonl", [text.replace("\n", end)])
        found += [prepare(tmp_path, tmp_path / name, name=f"{name}{len(found)}", val_fraction=0.3)
                  for name in ("in.txt", "in.jsonl")]
    for name in FILES[1:]:
        assert len({contents(folder)[name] for folder in found}) == 1
    numbers = [number for number, _ in data.read_lines(tmp_path / "in.txt")]
    assert numbers == list(range(1, len(lines) + 2)) and len(ids_of(found[0], "val")) > 100


def test_the_command_gives_the_same_bytes_by_any_number_of_workers(tmp_path, monkeypatch):
    documents = sentences(1500)
    write_source(tmp_path / "in" / "a.txt", documents[::2] * 9 + ["\n".join(documents)])  # several chunks
    write_source(tmp_path / "in" / "b.jsonl.gz", [*documents[1::2], "\n".join(documents), "half \ud83d"])
    process = start(tmp_path, "--name=two", "in/a.txt", "--vocab_size=300", "--val_fraction", "0.2",
                    "in/b.jsonl.gz", "--workers=2")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and err == "" and "prepared data/two" in out
    monkeypatch.chdir(tmp_path)
    one = prepare(Path(), "in/a.txt", "in/b.jsonl.gz", vocab_size=300, val_fraction=0.2)
    assert contents(one) == contents(Path("data/two")) and len(ids_of(one, "val")) > 1000


def test_the_split_depends_on_the_text_alone(tmp_path):
    """As it is tokenised: texts that differ in case alone are in one split."""
    documents, more = sentences(120), sentences(40, seed=1)

    def val(name, documents, **options):
        source = write_source(tmp_path / f"{name}.jsonl", documents)
        folder = prepare(tmp_path, source, name=name, **{"val_fraction": 0.3, **options})
        train, val = set(documents_of(folder, "train")), set(documents_of(folder, "val"))
        assert not train & val and train | val == set(lowered(documents))
        return val

    wanted = val("all", documents)
    assert val("more", more + documents[::-1]) - set(lowered(more)) == wanted
    assert val("case", [d.upper() for d in documents if d.isascii()] + documents, vocab_size=290) == wanted
    assert val("small", documents, val_fraction=0.1) < wanted and 20 < len(wanted) < 55


def test_the_tokenizer_of_a_corpus_is_reused(corpus, tmp_path):
    source = write_source(tmp_path / "in.txt", sentences(20, seed=3))
    folder = prepare(tmp_path, source, encoding=str(corpus))
    assert contents(folder)["tokenizer_state.json"] == contents(corpus)["tokenizer_state.json"]
    assert sorted(documents_of(folder)) == sorted(lowered(sentences(20, seed=3)))
    for conflict in ({"vocab_size": 401}, {"lowercase": False}):
        with pytest.raises(data.InputError, match="vocab_size=400.*lowercase=True"):
            prepare(tmp_path, source, encoding=str(corpus), name="new", **conflict)


@pytest.mark.parametrize("highest, dtype", [(65531, "uint16"), (65532, "uint32")])
def test_an_encoding_of_tiktoken(tmp_path, monkeypatch, highest, dtype):
    """65,536 entries fit into 16 bits, one more does not. Ids that the encoding leaves out can be shown."""
    ranks = {bytes([255 - b]): b for b in range(256)} | {b"th": 256, b"the": highest}
    encoding = tiktoken.Encoding("gpt2", pat_str=r" ?\w+|\W", mergeable_ranks=ranks, special_tokens={})
    monkeypatch.setattr(tiktoken, "get_encoding", {"gpt2": encoding}.__getitem__)
    documents = ["the other <|endoftext|> of the theatre", *sentences(30)]
    source = write_source(tmp_path / "in.txt", documents)
    folder = prepare(tmp_path, source, encoding="gpt2", val_fraction=0, lowercase=False)
    meta, sep = meta_of(folder), highest + 3
    assert meta["special_ids"] == dict(zip(SPECIALS, range(highest + 1, highest + 5)))
    assert meta["dtype"] == dtype and data.Tokenizer.load(folder).pattern == r" ?\w+|\W"
    wanted = [i for d in documents for i in [*encoding.encode_ordinary(d), sep]]
    assert ids_of(folder, "train").tolist() == wanted and wanted[0] == highest
    assert data.Tokenizer.load(folder).pieces([highest, 300, sep]) == ["the", "", "[SEP]"]
    tokens = data.Sequences(folder, "train", 10, 1, 8, 0).batch(0, range(9), 9)["tokens"]
    assert tokens[0, 0] == highest + 2 and set(tokens[:, 1:].ravel()) <= set(wanted)


# ------------------------------------------------------------------------------------------------------------
# What goes wrong


@pytest.mark.parametrize("sent, send", [(signal.SIGTERM, os.kill), (signal.SIGINT, os.killpg)])
def test_a_signal_leaves_nothing_and_no_traceback(corpus, tmp_path, sent, send):
    """Ctrl-C reaches the whole group of processes."""
    write_source(tmp_path / "in.txt", sentences(3000) * 60)
    process = start(tmp_path, "in.txt", "--name=new", f"--encoding={corpus}", "--workers=2",
                    preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    try:
        while not any(file.stat().st_size for file in tmp_path.glob("data/.new~*/new/train.bin")):
            assert process.poll() is None
            time.sleep(0.01)
        send(process.pid, sent)
        _, err = process.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 128 + sent and err == "" and listing(tmp_path / "data") == []


@pytest.mark.parametrize("method", ["submit", "result"])
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_does_not_break_a_lock_of_the_pool(monkeypatch, method, sent):
    """Raised within Future.result, say, the handler's error could leave a lock held, or released twice."""
    owner = {"submit": ProcessPoolExecutor, "result": Future}[method]
    original, completed = getattr(owner, method), []

    def disturbed(self, *arguments):
        signal.raise_signal(sent)
        completed.append(original(self, *arguments))
        return completed[-1]

    def handle(number, frame):
        raise KeyError(number)

    handlers = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        results = data.in_parallel(abs, range(-9, 0), workers=2)
        monkeypatch.setattr(owner, method, disturbed)
        with pytest.raises(KeyError, match=str(int(sent))):
            list(results)
        assert completed and all(signal.getsignal(number) == handle for number in handlers)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_workers_end_when_their_parent_is_killed(tmp_path):
    write_source(tmp_path / "in.txt", sentences(3000) * 60)
    process = start(tmp_path, "in.txt", "--name=new", "--workers=2", "--vocab_size=300")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while len(started := children.read_text().split()) < 3:  # two workers, and multiprocessing's tracker
        time.sleep(0.01)
    time.sleep(1)
    process.kill()
    process.communicate(timeout=60)  # their ends of stdout are closed
    assert not any(Path("/proc", child, "exe").exists() for child in started)


def test_a_damaged_checkpoint_is_told_from_an_error_of_the_disk(tmp_path, monkeypatch):
    path, draw = tmp_path / "ckpt.pt", random.Random(0)
    torch.manual_seed(0)
    torch.save({"model": {str(i): torch.randn(30, 40) for i in range(20)}}, path)
    raw = path.read_bytes()
    for _ in range(300):
        path.write_bytes(raw[: draw.randrange(len(raw))])
        with pytest.raises(data.InputError, match="is damaged"):
            data.read_torch(path)
    monkeypatch.setattr(torch, "load", lambda *_, **__: os.close(-1))  # an OSError
    with pytest.raises(OSError):
        data.read_torch(path)


@pytest.mark.parametrize("use", ["{}", "import threading; threading.Thread(target=lambda: {}).start()"])
def test_prepare_in_a_script(tmp_path, use):
    """Without `if __name__ == "__main__"`, or in a thread. The workers do not run the script as well."""
    write_source(tmp_path / "in.txt", sentences(100))
    use = use.format("data.prepare(['in.txt'], name='new', vocab_size=300, workers=2)")
    (tmp_path / "script.py").write_text(f"import data\nprint('begins')\n{use}")
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, text=True, capture_output=True,
                          env=os.environ | {"PYTHONPATH": str(Path(data.__file__).parent)}, timeout=60)
    assert done.returncode == 0 and done.stderr == "" and done.stdout.count("begins") == 1
    assert sorted(os.listdir(tmp_path / "data" / "new")) == FILES


def test_overwrite_replaces_a_corpus_or_leaves_it(tmp_path, monkeypatch):
    first, second = (write_source(tmp_path / f"{i}.txt", sentences(40, seed=i)) for i in range(2))
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"good text\n" * 50 + b"\xff\n")
    folder, rename = prepare(tmp_path, first), os.rename
    before = contents(folder)

    def rename_and_stop(*paths):  # stopped between the two renames; a killed process leaves the copy
        monkeypatch.setattr(os, "rename", rename)
        rename(*paths)
        shutil.copytree(Path(paths[1]).parent, tmp_path / "killed")
        raise KeyboardInterrupt

    with pytest.raises(data.InputError, match="overwrite"):
        prepare(tmp_path, second)
    with pytest.raises(data.InputError, match="line 51"):
        prepare(tmp_path, bad, overwrite=True)
    monkeypatch.setattr(os, "rename", rename_and_stop)
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path, second, overwrite=True)
    assert contents(folder) == before and os.listdir(tmp_path / "data") == ["corpus"]
    shutil.rmtree(folder)  # the next command finds what is left
    (tmp_path / "killed").rename(tmp_path / "data" / ".corpus~killed")
    with pytest.raises(data.InputError, match="overwrite"):
        prepare(tmp_path, second)
    assert contents(folder) == before and os.listdir(tmp_path / "data") == ["corpus"]
    prepare(tmp_path, second, overwrite=True, encoding=str(folder))  # with its own tokenizer
    assert sorted(documents_of(folder)) == sorted(lowered(sentences(40, seed=1)))
    assert os.listdir(tmp_path / "data") == ["corpus"] and sorted(os.listdir(folder)) == FILES


def test_overwrite_never_deletes_a_users_files(corpus, tmp_path):
    source, folder = write_source(tmp_path / "in.txt", sentences(40)), tmp_path / "data"
    for name in ("more", "other"):
        shutil.copytree(corpus, folder / name)
    (folder / "more" / "notes.md").write_text("a user's file")
    (folder / "other" / "tokenizer_state.json").unlink()
    (folder / "file").write_text("a user's file")
    (folder / ".file~copy").mkdir()
    (folder / ".file~copy" / "notes.md").write_text("a user's file")
    (folder / "link").symlink_to(corpus)
    before = listing(folder)
    for name in ("more", "other", "file", "link"):
        with pytest.raises(data.InputError):
            prepare(tmp_path, source, overwrite=True, name=name)
    assert listing(folder) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_comes_while_a_corpus_is_prepared_stays(tmp_path, monkeypatch, overwrite):
    """A user's folder of this name; and a second preparation is refused, not confused with a killed one."""
    source, folder, count = write_source(tmp_path / "in.txt", sentences(40)), tmp_path / "data/mine", []

    def tokens(*arguments):
        folder.mkdir()
        (folder / "thesis.txt").write_text("a user's file")
        with pytest.raises(data.InputError, match="in use"):
            prepare(tmp_path, source, name="mine", overwrite=True)
        count.append(folder)
        return write_tokens(*arguments)

    write_tokens = data.write_tokens
    monkeypatch.setattr(data, "write_tokens", tokens)
    with pytest.raises(data.InputError, match="exists"):
        prepare(tmp_path, source, name="mine", overwrite=overwrite)
    assert count == [folder] and os.listdir(tmp_path / "data") == ["mine"]
    assert os.listdir(folder) == ["thesis.txt"]


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    source, checksum = write_source(tmp_path / "in.txt", sentences(40)), data.checksum
    monkeypatch.setattr(data, "checksum", lambda path: (source.write_text("less"), checksum(path))[1])
    with pytest.raises(data.InputError, match="in.txt changed"):
        prepare(tmp_path, source)
    assert os.listdir(tmp_path / "data") == []


GOOD = "\n".join(sentences(30)).encode() + b"\n"
ROW = json.dumps({"text": "some text"}).encode() + b"\n"
PACKED = gzip.compress(GOOD * 20, mtime=0)


@pytest.mark.parametrize("name, raw, argument, words", [  # a file in/NAME, and what the sentence names
    ("a.txt", GOOD, "absent.txt", "absent.txt"),
    ("a.md", GOOD, "in", "in"),
    ("a.txt", b"fine\n\nLatin caf\xe9.\n", "in", "in/a.txt, line 3: character 10"),
    ("a.jsonl", ROW + b"\n" + b'{"text": \n', "in", "in/a.jsonl, line 3"),
    ("a.jsonl.gz", gzip.compress(ROW + b'{"txt": "a"}'), "in", "in/a.jsonl.gz, line 2"),
    ("a.txt.gz", PACKED[:-30], "in", "in/a.txt.gz"),
    ("a.txt.gz", PACKED[:50] + b"\xff" * 40 + PACKED[90:], "in", "in/a.txt.gz"),
    ("a.txt", GOOD + b"x" * 2000, "in", "in/a.txt, line 41"),
    ("a.txt", b"\n \n\t\n", "in", "no text"),
    ("a.txt", GOOD, "--encoding=gpt2", "FileNotFoundError"),
    ("a.txt", GOOD, "--encoding=in", "python convert.py in"),
    ("a.txt", GOOD, "--name=", "--name"),
    ("a.txt", GOOD, "--encoding=gpt3", "gpt3"),
    ("a.txt", GOOD, "--name=../new", "--name= of letters"),
    ("a.txt", GOOD, "--data_dir=in/a.txt/out", "in/a.txt")])
def test_bad_input_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch, name, raw, argument, words):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(raw)
    monkeypatch.chdir(tmp_path)
    usual = ["data.py", "--name=new", "--vocab_size=300", "--workers=1", "--data_dir=out", "in"]
    monkeypatch.setattr(sys, "argv", [*usual, argument])
    monkeypatch.setattr(data, "LINE", 1000)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: open("without/a/network"))
    with pytest.raises((data.InputError, OSError)) as caught:
        data.main()
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert [path for path in listing(tmp_path) if path != "out"] == ["in", f"in/{name}"]


@pytest.mark.parametrize("allocate", [lambda: bytearray(2**62), lambda: torch.empty(2**60)])
def test_too_little_memory_is_one_sentence(monkeypatch, capsys, allocate):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(SystemExit):
        data.run_command(allocate)
    said = capsys.readouterr().err
    assert "memory" in said and said.count("\n") == 1
    with pytest.raises(RuntimeError, match="shape"):
        data.run_command(lambda: torch.zeros(2) + torch.zeros(3).view(5))


def test_where_nothing_can_be_locked(corpus, tmp_path, monkeypatch, capsys):
    """A run goes on, with a warning; what may be another preparation's is not removed."""
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(fcntl, "flock", lambda *_: os.close(-1))  # an OSError
    data.lock(tmp_path / "out").close()
    assert "cannot be locked" in capsys.readouterr().out
    source = write_source(tmp_path / "in.txt", sentences(20))
    (tmp_path / "data" / ".corpus~1" / "new").mkdir(parents=True)
    with pytest.raises(data.InputError, match="corpus~1.*remove it"):
        prepare(tmp_path, source, encoding=str(corpus))
    assert (tmp_path / "data" / ".corpus~1" / "new").exists()


@pytest.mark.parametrize("name, damage", [
    ("train.bin", lambda raw: raw[:-2]),
    ("tokenizer_state.json", lambda raw: raw.replace(b"IHQ= ", b"enp6 ")),
    ("meta.json", lambda raw: raw[:-10]),
    ("meta.json", lambda raw: raw.replace(b"tokenizer_state", b"tokenizer"))])  # of an older version
def test_a_damaged_corpus_is_refused(corpus, tmp_path, name, damage):
    path = shutil.copytree(corpus, tmp_path / "copy") / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(data.InputError, match="prepare.* again"):
        data.Tokenizer.load(path.parent)
        sequences(path.parent)


# ------------------------------------------------------------------------------------------------------------
# Sequences


T, K, C = 33, 5, 28  # max_len, masked positions, length of a crop


def sequences(folder, seed=0):
    return data.Sequences(folder, "train", T, K, C, seed)


def joined(parts):
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def test_each_epoch_is_a_permutation_of_the_corpus(corpus, tokenizer):
    """Batches of 16 run over the ends of epochs, where the sequences are no whole number of them."""
    found, stream = sequences(corpus), ids_of(corpus, "train")
    n = len(found)
    assert n == len(stream) // (T - 1) and n % 16 and len(stream) % (T - 1)
    tokens = joined([found.batch(step, range(16), 16) for step in range(n // 4 + 1)])["tokens"]
    assert tokens.shape[1] == T and np.all(tokens[:, 0] == tokenizer.cls_id)
    rows = list(map(tuple, tokens[:, 1:].tolist()))
    epochs = [rows[i : i + n] for i in range(0, 4 * n, n)]
    wanted = sorted(tuple(stream[i * (T - 1) : (i + 1) * (T - 1)].tolist()) for i in range(n))
    assert all(sorted(epoch) == wanted for epoch in epochs) and len(set(map(tuple, epochs))) == 4
    assert found.order(3).dtype == np.uint32  # half of what numpy's permutation takes, and equal
    assert found.order(3).tolist() == np.random.default_rng([0, 0, 3]).permutation(n).tolist()


def test_masks_crops_and_uniforms(corpus, tokenizer):
    drawn = joined([sequences(corpus).batch(step, range(200), 200) for step in range(12)])
    tokens, masked, crop, uniforms = (drawn[name] for name in ("tokens", "masked", "crop", "uniforms"))
    assert masked.shape == uniforms.shape == (2400, K) and crop.shape == (2400, C + 1)

    # Every ordinary token is masked about equally often, at every position; [CLS] and [SEP] never
    ordinary = ~np.isin(tokens, [tokenizer.cls_id, tokenizer.sep_id])
    assert np.take_along_axis(ordinary, masked, 1).all() and np.all(np.diff(masked) > 0)
    expected = (ordinary * K / ordinary.sum(1, keepdims=True)).sum(0)
    assert np.all(np.abs(np.bincount(masked.ravel(), minlength=T) - expected) <= 4.5 * np.sqrt(expected))
    assert len({(*t, *m) for t, m in zip(tokens.tolist(), masked.tolist())}) > 2390  # new in each epoch

    # A crop is a stretch of its sequence and begins at any place equally often
    places = np.arange(1, T - C + 1)
    found = (tokens[:, places[:, None] + np.arange(C)] == crop[:, None, 1:]).all(2)
    assert np.all(crop[:, 0] == tokenizer.cls_id) and np.all(found.sum(1) == 1)
    assert np.all(np.abs(found.sum(0) - 2400 / len(places)) < 100)

    assert uniforms.dtype == np.float32 and uniforms.min() >= 0 and uniforms.max() < 1
    assert np.all(np.abs(np.bincount((uniforms.ravel() * 10).astype(int)) - 1200) < 150)


def test_a_sequence_is_a_function_of_seed_step_and_index(corpus):
    found = sequences(corpus)
    wanted = found.batch(5, range(12), 12)
    found.batch(900, [7, 2], 12)
    for reader in (found, sequences(corpus)):  # whatever was asked for before, in whatever order
        backwards = reader.batch(5, range(11, -1, -1), 12)
        np.testing.assert_equal({name: rows[::-1] for name, rows in backwards.items()}, wanted)
    others = [found.batch(step, range(12), 12) for step in (0, 1, 2, 25)]  # 25: the second epoch
    others += [sequences(corpus, seed).batch(5, range(12), 12) for seed in (1, 2, 10**6)]
    for name in wanted:
        rows = {tuple(row) for batch in [wanted, *others] for row in batch[name].tolist()}
        assert len({batch[name].tobytes() for batch in [wanted, *others]}) == 8 and len(rows) > 75


@pytest.mark.parametrize("world, micro", [(1, 12), (1, 3), (2, 6), (3, 2)])
def test_batches_of_any_number_of_processes_and_passes_are_the_same(corpus, world, micro):
    readers = [data.batches(sequences(corpus), 12, micro, rank, world, 5) for rank in range(world)]
    for step in (5, 6):
        parts = [next(reader) for _ in range(12 // (micro * world)) for reader in readers]
        np.testing.assert_equal(joined(parts), sequences(corpus).batch(step, range(12), 12))


@pytest.mark.parametrize("token", [400, 398])
def test_unusable_tokens_are_refused(corpus, tmp_path, token):
    """Beyond the vocabulary, or [SEP] alone."""
    folder = shutil.copytree(corpus, tmp_path / "copy")
    np.full(len(ids_of(folder, "train")), token, np.uint16).tofile(folder / "train.bin")
    with pytest.raises(data.InputError, match="train.bin"):
        sequences(folder).batch(0, [0], 1)
