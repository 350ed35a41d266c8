"""From text to batches: documents -> pieces -> tokens -> data/NAME/ -> sequences with their masks and crops.

    python data.py                                        the default text: documentation on this disk
    python data.py PATH... --name=NAME --vocab_size=...   .txt, .jsonl, .txt.gz, .jsonl.gz: files or folders

What is written to data/NAME/:

    train.bin, val.bin     token ids, raw uint16 (uint32 above 65,536 entries); [SEP] ends a document
    tokenizer.tiktoken     the byte-pair ranks in tiktoken's format; [PAD] [CLS] [SEP] [MASK] follow them
    meta.json              sizes, special ids, pattern, sources, versions, checksums
"""

import argparse
import ast
import base64
import contextlib
import functools
import gzip
import hashlib
import heapq
import importlib.util
import inspect
import itertools
import json
import os
import platform
import re
import shutil
import signal
import sys
import sysconfig
import tempfile
import threading
import time
import zlib
from collections import Counter, defaultdict, deque
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

import numpy as np
import regex
import tiktoken

SPECIALS = ("[PAD]", "[CLS]", "[SEP]", "[MASK]")
FILES = {"train.bin", "val.bin", "tokenizer.tiktoken", "meta.json"}
PIECE = 16_000        # characters: shorter documents stay whole, longer ones are cut
CHUNK = 500_000       # bytes of text that a process prepares at once
SAMPLE = 100_000_000  # bytes of text on which the BPE is trained, about, if there are as many
ENCODE = 100_000      # characters that tiktoken gets at once: a million spaces in a row are too many for it
# Words for the BPE: contractions, letters with their marks, up to three digits, other signs, white space.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?[\p{L}\p{M}]+| ?\p{N}{1,3}| ?[^\s\p{L}\p{M}\p{N}]+|\s+(?!\S)|\s+"

# ------------------------------------------------------------------------------------------------------------
# Options, errors and output of all three commands


class InputError(Exception):
    """Something the user gave cannot be used. One sentence: what, where, and what to do. Exit status 2."""


def option_type(hint, may_be_empty):
    """The function with which argparse reads an option of this annotated type.

        Literal["bpe", "gpt2"]      one of these
        Annotated[float, 0, 1]      a number from 0 to 1
        bool, str                   True or False; a text, where ~ is the home folder
    """
    kind, *limits = get_args(hint) if get_origin(hint) is Annotated else [hint]
    choices = ("True", "False") if hint is bool else get_args(hint) if get_origin(hint) is Literal else ()

    def read(text):
        if choices:
            match = [choice for choice in choices if choice.lower() == text.lower()]
            if match:
                return match[0] == "True" if hint is bool else match[0]
            wanted = f"one of {', '.join(choices)}"
        elif kind is str:
            if text or may_be_empty:
                return os.path.expanduser(text)
            wanted = "a text"
        else:
            with contextlib.suppress(ValueError):
                if limits[0] <= kind(text) <= limits[1]:
                    return kind(text)
            wanted = f"a {'whole ' if kind is int else ''}number from {limits[0]} to {limits[1]}"
        raise argparse.ArgumentTypeError(f"has to be {wanted}, not {text!r}")

    return read


class Parser(argparse.ArgumentParser):
    """argparse with an option --name for each annotated constant: `name: type = value  # reason`."""

    def __init__(self, usage, *owners, without=()):
        """usage: a docstring; owners: the modules, classes and functions that hold the constants"""
        super().__init__(usage=usage.replace("%", "%%"), allow_abbrev=False)
        for owner in owners:
            reasons = dict(re.findall(r"^ *(\w+): .*?  # (.*)$", inspect.getsource(owner), re.M))
            values = getattr(owner, "__kwdefaults__", None) or vars(owner)
            for name, hint in get_type_hints(owner, include_extras=True).items():
                if name not in without:  # argparse reads a default that is text as it reads the command line
                    default = None if values.get(name) is None else str(values[name])
                    reason = reasons.get(name, "").replace("%", "%%")
                    reason += " (default: %(default)s)" if default or name not in values else ""
                    self.add_argument(f"--{name}", type=option_type(hint, default == ""), default=default,
                                      metavar="VALUE", help=reason)

    def error(self, message):
        raise InputError(f"{message} (--help lists all options).")


def sentence(error):
    """What an InputError says, or an OSError: no permission, disk full, ..."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}." if error.filename else f"{error.strerror}."
    return str(error)


def run_command(main):
    """Runs a command's main. An error that its user can mend is one sentence, without a traceback.

    Of several processes process 0 says what all would say: the others wait, and torchrun ends them meanwhile.
    """
    sys.stdout.reconfigure(errors="replace")  # a terminal without UTF-8 shows what it can
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # cleans up on its way out
    rank, several = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)) > 1
    try:
        return main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (InputError, OSError) as error:
        status, message = 2, sentence(error)
    except RuntimeError as error:  # torch has no class of its own for these two
        status, message = 1, str(error).strip().split("\n")[0]
        if re.search("out of memory|allocate memory", message):
            message = f"out of memory: choose a smaller batch or max_len ({message})."
        elif several and re.search("gloo|nccl|connection|timed out", message, re.I):
            message = f"another process has ended ({message[:100]} ...)."
        else:
            raise
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if rank > 0:
        time.sleep(3)
    print(f"{Path(sys.argv[0]).name}{f', process {rank}' * several}: {message}", file=sys.stderr, flush=True)
    (os._exit if several else sys.exit)(status)  # an orderly exit would wait for processes that have ended


def tell(*words, **how):
    """print that never ends a run: after `python train.py | head -3` the log still has everything."""
    try:
        print(*words, flush=True, **how)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Progress:
    """Says how far work is, its speed and the time left: redrawn in a terminal, else a line every 10 s."""

    def __init__(self, what, total, unit="MB", scale=1e6):
        self.what, self.total, self.unit, self.scale = what, total, unit, scale
        self.start = self.last = time.monotonic()

    def __call__(self, done):
        now, terminal = time.monotonic(), sys.stdout.isatty()
        if now - self.last < (0.5 if terminal else 10):
            return
        self.last = now
        speed = done / (now - self.start)
        left = f", {max(self.total - done, 0) / speed:.0f} s left" if self.total else ""
        done, speed = done / self.scale, speed / self.scale
        line = f"{self.what}: {done:,.{int(self.scale > 1)}f} {self.unit}, {speed:.2f} {self.unit}/s{left}"
        tell("\r\033[K" + line if terminal else line, end="" if terminal else "\n")

    def end(self):
        if sys.stdout.isatty():
            tell("\r\033[K", end="")


def in_parallel(function, items, workers):
    """function(item) for each item, in order, by processes. Few items are under way, so memory is bounded."""
    if workers == 1:
        yield from map(function, items)
        return
    pool, pending = ProcessPoolExecutor(workers, get_context("spawn")), deque()
    main_thread = threading.current_thread() is threading.main_thread()
    try:
        if main_thread:  # Ctrl-C reaches all processes: workers start with it ignored, this one ends them
            handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        for _ in range(workers):
            pool.submit(int)  # starts a worker
        if main_thread:
            signal.signal(signal.SIGINT, handler)
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > 3 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


# ------------------------------------------------------------------------------------------------------------
# The default text

CODE = re.compile(r"\s*(>>>|\.\.\.|\.\. |[-=~^*#]{3,}|:\w+|@|\||\+-|(Args|Returns?|Raises|Yields)\b:?)")
PARAMETER = re.compile(r"\w[\w, *]* ?(\([^)]*\))? ?(:|--) ")
MARKUP = re.compile(r":[\w:]+:`~?([^`<]*?)(?:\s*<[^`]*>)?`|``?([^`]*)``?")


def docs_files():
    """Python's own, numpy's and torch's source files: the default text is their documentation."""
    roots = [Path(sysconfig.get_paths()["stdlib"])]
    roots += [Path(importlib.util.find_spec(name).origin).parent for name in ("numpy", "torch")]
    skip = {"test", "tests", "testing", "site-packages", "idlelib", "lib2to3"}
    files = [(root, file) for root in roots for file in sorted(root.rglob("*.py"))]
    return [str(file) for root, file in files if not skip & set(file.relative_to(root).parts)]


def docs_paragraphs(path):
    """The English paragraphs of a Python file: of its docstrings, add_docstr calls and pydoc's topics."""
    try:
        tree = ast.parse(Path(path).read_bytes())
    except (SyntaxError, ValueError, OSError):  # a template, say
        return []
    texts = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            texts.append(ast.get_docstring(node))
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("add_docstr", "add_newdoc"):
            texts += [c.value for a in node.args for c in ast.walk(a) if isinstance(c, ast.Constant)]
        elif isinstance(node, ast.Dict) and path.endswith("topics.py"):
            texts += [v.value for v in node.values if isinstance(v, ast.Constant)]
    return [line for text in texts if isinstance(text, str) for line in prose(inspect.cleandoc(text))]


def prose(text):
    """The paragraphs that are sentences, a line each: no code, tables or lists of parameters."""
    for paragraph in re.split(r"\n\s*\n", text):
        line = MARKUP.sub(r"\1\2", " ".join(paragraph.split()))
        words = line.split()
        plain = sum(word.strip(".,;:!?()\"'").isalpha() for word in words)
        if (len(words) >= 8 and plain >= 0.75 * len(words) and re.search(r"[.!?]\W*$", line)
                and not PARAMETER.match(line) and not any(map(CODE.match, paragraph.splitlines()))):
            yield line + "\n"


def read_docs(workers):
    """The default text: a document per source file. Each paragraph occurs once, so none is in both splits."""
    seen, progress = set(), Progress("reading documentation", None, "files", 1)
    for number, paragraphs in enumerate(in_parallel(docs_paragraphs, docs_files(), workers)):
        progress(number)
        yield from (p for p in paragraphs if p not in seen and not seen.add(p))
        yield None
    progress.end()


# ------------------------------------------------------------------------------------------------------------
# The user's text: files -> lines, with None where a document ends -> pieces


def find_files(paths):
    """The text files that the paths name, folders searched, and a Counter of what was skipped in them."""
    endings, files, skipped = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz"), [], Counter()
    for path in map(str, paths):
        root, found = Path(path).expanduser(), []
        if not path or not root.exists():
            raise InputError(f"{path or 'an empty PATH'} does not exist.")
        walk = os.walk(root, onerror=lambda error: skipped.update(["unreadable folder"]))
        for folder, folders, names in walk if root.is_dir() else [(root.parent, [], [root.name])]:
            skipped["linked folder"] += sum(Path(folder, name).is_symlink() for name in folders)
            for file in (Path(folder, name) for name in names):
                if file.is_file() and file.name.lower().endswith(endings):
                    found.append(file)
                else:
                    skipped[file.suffix.lower() or "no ending" if file.exists() else "dangling link"] += 1
        if not found:
            raise InputError(f"{path} holds no text: files that end in {', '.join(endings)} are read.")
        files += sorted(found)
    return files, +skipped


def read_file(path, field="text", document_per_file=False):
    """Lines of a file, and None where a document ends. A line that cannot be read is refused."""
    name = path.name.lower()
    try:
        with (gzip.open if name.endswith(".gz") else open)(path, "rb") as file:
            for number, raw in enumerate(file, 1):
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").replace("\r\n", "\n")
                if ".jsonl" not in name:
                    yield line if line.strip() or document_per_file else None
                elif line.strip():  # JSON alone can spell half a character: "\ud83d"
                    text = re.sub("[\ud800-\udfff]", "\ufffd", json.loads(line)[field])
                    yield from text.splitlines(keepends=True)
                    yield None
        yield None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}, line {number}: byte {error.start + 1} is not UTF-8; convert it.") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}, line {number}: not JSON ({error}).") from None
    except (KeyError, TypeError):
        raise InputError(f'{path}, line {number}: no text in "{field}"; name the right --field.') from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path}: damaged gzip file ({error}).") from None


def pieces(lines):
    r"""Cuts documents into (starts a document?, text) of at most PIECE characters. If that were 12:

        "one two\n", "six\n", "seven eight nine\n", None, "ten\n", None
        -> (True, "one two\nsix\n"), (False, "seven eight"), (False, " nine"), (True, "ten")

    A piece takes as many lines as fit; a line that is longer than a piece is cut before a space. Joined, the
    pieces of a document are the document, without the white space around it.
    """
    cut = rf"(?s).{{1,{PIECE}}}(?![^ ])|.{{{PIECE}}}"  # up to a space or the end, or anywhere
    new, held, size = True, [], 0  # the lines of the next piece, and how many characters they have
    for line in lines:
        for part in re.findall(cut, line) if line else [None]:
            if part is None or size + len(part) > PIECE:
                text = "".join(held)
                text = text.lstrip() if new else text
                text = text.rstrip() if part is None else text
                if text:
                    yield new, text
                new, held, size = part is None or new and not text, [], 0
            if part is not None:
                held.append(part)
                size += len(part)


def chunks(lines, lowercase, what, total):
    """Lists of pieces, of about CHUNK bytes: the work that a process gets at once. Shows progress."""
    chunk, size, done, progress = [], 0, 0, Progress(what, total)
    for new, text in pieces(lines):
        chunk.append((new, lower(text) if lowercase else text))
        size += len(text.encode())
        if size > CHUNK:
            yield chunk
            chunk, size, done = [], 0, done + size
            progress(done)
    yield chunk
    progress.end()


def fingerprint(text):
    """64 bits that depend on the text alone: they decide its split, and whether the BPE is trained on it."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


# ------------------------------------------------------------------------------------------------------------
# The tokenizer


def lower(text):
    """Lowercase, so that character i of the result is character i of the text.

    str.lower alone makes two characters of İ, and one of two forms of Σ, by its neighbours.
    """
    return "İ".join(part.lower() for part in text.replace("Σ", "σ").split("İ"))


def count_words(chunk, share=1.0):
    """How often each word of PATTERN occurs in a share of the pieces; those are the last to be in val.bin."""
    chosen = (text for _, text in chunk if fingerprint(text) >= (1 - share) * 2**64)
    return Counter(word for text in chosen for word in regex.findall(PATTERN, text))


def train_bpe(words, size, progress=lambda done: None):
    """Byte-pair encoding: {token: rank} with `size` entries, the 256 bytes first, from a Counter of words.

        {"low": 5, "lower": 2}: the most frequent pair is l+o (7 times), then lo+w (7), then low+e (2) ...

    Each step makes the most frequent pair of neighbours a token; of several, the pair of older tokens. Pair
    counts are kept up to date, so a step touches only the words that hold the pair.
    """
    tokens = [bytes([b]) for b in range(256)]
    spelled = [(list(word.encode()), count) for word, count in words.items()]
    counts, where = Counter(), defaultdict(list)
    for index, (ids, count) in enumerate(spelled):
        for pair in zip(ids, ids[1:]):
            counts[pair] += count
            where[pair].append(index)
    heap = [(-count, pair) for pair, count in counts.items()]
    heapq.heapify(heap)
    while len(tokens) < size:
        if not heap:
            raise InputError(f"too little text: it gives only {len(tokens)} byte pairs, not {size}; "
                             f"choose a smaller --vocab_size or more text.")
        count, pair = heapq.heappop(heap)
        if -count != counts[pair]:  # an old entry: the pair has become rarer since
            if counts[pair] > 0:
                heapq.heappush(heap, (-counts[pair], pair))
            continue
        new, changed = len(tokens), set()
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
        progress(new)
        for index in dict.fromkeys(where.pop(pair)):
            ids, count = spelled[index]
            merged = []
            for token in ids:
                if token == pair[1] and merged and merged[-1] == pair[0]:
                    merged[-1] = new
                else:
                    merged.append(token)
            if len(merged) == len(ids):  # another merge has taken the pair apart
                continue
            for old in zip(ids, ids[1:]):
                counts[old] -= count
            for fresh in zip(merged, merged[1:]):
                counts[fresh] += count
                if new in fresh:
                    where[fresh].append(index)
                    changed.add(fresh)
            spelled[index] = merged, count
        for fresh in changed:
            heapq.heappush(heap, (-counts[fresh], fresh))
    return {token: rank for rank, token in enumerate(tokens)}


class Tokenizer:
    """A tiktoken encoding whose ranks are followed by [PAD] [CLS] [SEP] [MASK].

    >>> tokenizer = Tokenizer.load("data/docs")
    >>> ids = tokenizer.encode("The cat [MASK]")       # what spells [MASK] is ordinary text
    >>> tokenizer.decode(ids), tokenizer.pieces(ids)   # "the cat [mask]", ["the", " cat", " [", ...]
    """

    def __init__(self, ranks, pattern, lowercase):
        self.ranks, self.pattern, self.lowercase = ranks, pattern, lowercase
        first = max(ranks.values()) + 1
        self.special_ids = {name: first + i for i, name in enumerate(SPECIALS)}
        self.pad_id, self.cls_id, self.sep_id, self.mask_id = self.special_ids.values()
        self.vocab_size = first + len(SPECIALS)
        self.token_bytes = {i: token for token, i in ranks.items()}
        self.token_bytes |= {i: name.encode() for name, i in self.special_ids.items()}
        self.encoding = tiktoken.Encoding("nanococo", pat_str=pattern, mergeable_ranks=ranks,
                                          special_tokens=self.special_ids)

    def encode(self, text):
        """Ids of a text, no special ones among them. Half a character becomes U+FFFD, as tiktoken has it."""
        text = lower(text) if self.lowercase else text
        parts = (text[start : start + ENCODE] for start in range(0, len(text), ENCODE))
        return [i for part in parts for i in self.encoding.encode_ordinary(part)]

    def encode_pair(self, a, b=None, max_len=512):
        """[CLS] A [SEP] [SEP] B [SEP], or [CLS] A [SEP]; if too long, the longer one is cut first. [model]"""
        a, b = self.encode(a), None if b is None else self.encode(b)
        room = max_len - (2 if b is None else 4)
        if room < 0:
            raise InputError(f"max_len={max_len} has no room for the special tokens.")
        if b is None:
            return [self.cls_id, *a[:room], self.sep_id]
        keep_b = min(len(b), max(room // 2, room - len(a)))
        return [self.cls_id, *a[: room - keep_b], self.sep_id, self.sep_id, *b[:keep_b], self.sep_id]

    def decode(self, ids):
        """The text. Bytes that are not UTF-8 become U+FFFD; ids that the encoding leaves out are ignored."""
        return b"".join(self.token_bytes.get(int(i), b"") for i in ids).decode("utf-8", "replace")

    def pieces(self, ids):
        """The text of each token."""
        return [self.decode([i]) for i in ids]

    def state(self):
        """Plain types, for a checkpoint; Tokenizer.from_state turns them back."""
        lines = "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in self.ranks.items())
        return {"ranks": lines, "pattern": self.pattern, "lowercase": self.lowercase}

    @classmethod
    def from_state(cls, state, path="this"):
        """The tokenizer with this state. path: where it comes from, for the message if it is damaged."""
        try:
            ranks = {}
            for line in state["ranks"].splitlines():
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            if len(set(ranks.values())) < len(ranks) or any(bytes([b]) not in ranks for b in range(256)):
                raise ValueError  # tiktoken would only find out later, and panic
            return cls(ranks, state["pattern"], state["lowercase"])
        except Exception as error:  # of base64 or of tiktoken, which has its own kinds
            raise InputError(f"{path} has no tokenizer that can be read ({type(error).__name__}).") from None

    @classmethod
    def load(cls, folder):
        """The tokenizer of a prepared corpus."""
        meta, path = read_meta(folder), Path(folder, "tokenizer.tiktoken")
        if checksum(path) != meta["sha256"]["tokenizer"]:
            raise InputError(f"{path} is not as meta.json says; prepare the corpus again.")
        tokenizer = cls.from_state({"ranks": path.read_text(), **meta}, folder)
        if tokenizer.special_ids != meta["special_ids"] or tokenizer.vocab_size != meta["vocab_size"]:
            raise InputError(f"{folder}/meta.json is not about its tokenizer; prepare the corpus again.")
        return tokenizer


# ------------------------------------------------------------------------------------------------------------
# A prepared corpus


def token_dtype(vocab_size):
    return np.dtype(np.uint16 if vocab_size <= 65536 else np.uint32)


def checksum(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_meta(folder):
    """meta.json of a prepared corpus."""
    try:
        meta = json.loads(Path(folder, "meta.json").read_bytes())
        numbers = [meta["vocab_size"], *(meta["tokens"][split] for split in ("train", "val")),
                   *(meta["special_ids"][name] for name in SPECIALS)]
        texts = [meta["pattern"], *(meta["sha256"][file] for file in ("train", "val", "tokenizer"))]
        if (all(type(n) is int and 0 <= n < 2**48 for n in numbers) and all(type(t) is str for t in texts)
                and type(meta["lowercase"]) is bool):
            return meta
    except FileNotFoundError:
        raise InputError(f"{folder} is no prepared corpus: it has no meta.json.") from None
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    raise InputError(f"{folder}/meta.json is damaged; prepare the corpus again.")


@functools.lru_cache(maxsize=1)
def cached_tokenizer(ranks, pattern, lowercase):
    return Tokenizer.from_state({"ranks": ranks, "pattern": pattern, "lowercase": lowercase})


def encode_chunk(chunk, state, val_fraction):
    """[(starts a document?, text)] -> [(starts a document?, split, ids as bytes, bytes of text)]"""
    tokenizer, val_limit = cached_tokenizer(**state), val_fraction * 2**64
    dtype = token_dtype(tokenizer.vocab_size)
    return [(new, "val" if fingerprint(text) < val_limit else "train",
             np.array(tokenizer.encode(text), dtype).tobytes(), len(text.encode())) for new, text in chunk]


def make_tokenizer(encoding, vocab_size, lowercase, stream, total, workers):
    """A BPE trained on the text, the tokenizer of another corpus, or one of tiktoken's. None: not given."""
    if encoding == "bpe":
        lowercase, words = lowercase is not False, Counter()
        count = functools.partial(count_words, share=min(1, SAMPLE / total))
        for counts in in_parallel(count, chunks(stream(), lowercase, "counting words", total), workers):
            words.update(counts)
        progress = Progress("training the BPE", vocab_size, "tokens", 1)
        ranks = train_bpe(words, vocab_size - len(SPECIALS), progress)
        progress.end()
        return Tokenizer(ranks, PATTERN, lowercase)
    if os.path.isdir(encoding):
        tokenizer = Tokenizer.load(encoding)
    else:
        try:
            base = tiktoken.get_encoding(encoding)
        except Exception as error:  # an unknown name, or ranks that cannot be downloaded
            raise InputError(f"--encoding={encoding} is no folder, and tiktoken cannot fetch it "
                             f"({' '.join(str(error).split())[:200]}).") from None
        tokenizer = Tokenizer(base._mergeable_ranks, base._pat_str, lowercase is not False)
    if vocab_size not in (None, tokenizer.vocab_size) or lowercase not in (None, tokenizer.lowercase):
        raise InputError(f"--encoding={encoding} has vocab_size={tokenizer.vocab_size} and "
                         f"lowercase={tokenizer.lowercase}; --vocab_size and --lowercase cannot change that.")
    return tokenizer


def stamp(folder):
    """What is in a folder, and since when: {file name: time}. None if there is no such folder."""
    if not os.path.lexists(folder):
        return None
    is_folder = folder.is_dir() and not folder.is_symlink()
    return {file.name: file.lstat().st_mtime_ns for file in folder.iterdir()} if is_folder else {}


def prepare(
    paths=(), *,
    name: str = "",                                     # the corpus is data_dir/name; without PATH: docs
    data_dir: str = "data",                             # folder of all prepared corpora
    vocab_size: Annotated[int, 260, 2**24] = None,      # entries of the vocabulary: 32768; without PATH: 8192
    lowercase: bool = None,                             # lowercase all text: True, as the paper's base
    encoding: str = "bpe",                              # bpe: train one; or gpt2, ...; or a corpus' folder
    val_fraction: Annotated[float, 0, 0.5] = None,      # share of val.bin: 0.01; without PATH: 0.05
    workers: Annotated[int, 1, 4096] = os.cpu_count(),  # processes; the result does not depend on it
    field: str = "text",                                # the field of a .jsonl line that holds the text
    document_per_file: bool = False,                    # a .txt is one document; else a blank line ends one
    overwrite: bool = False,                            # replace the corpus of that name if there is one
):
    """Prepares a corpus and returns its folder. Without paths its text is the documentation on this disk.

    The fingerprint of a text, as it is tokenised, decides its split: equal texts are in one split, and texts
    that differ in case alone as well if all is lowercased. A document above PIECE characters is cut, and its
    pieces are spread over both splits. The BPE is trained on the text of both.
    """
    start, name = time.monotonic(), name or ("" if paths else "docs")
    vocab_size = vocab_size or ((32768 if paths else 8192) if encoding == "bpe" else None)
    val_fraction = (0.01 if paths else 0.05) if val_fraction is None else val_fraction
    folder = Path(data_dir, name)
    if not re.fullmatch(r"\w[\w.+-]*", name):
        raise InputError(f"--name={name!r} has to be a plain name for the corpus: letters, digits, _ . + -")
    old = stamp(folder)
    ours = old and "meta.json" in old and old.keys() <= FILES and read_meta(folder)
    if old is not None and not ours:
        raise InputError(f"{folder} exists and is not a corpus, or not only that; choose another --name.")
    if old and not overwrite:
        raise InputError(f"{folder} exists; choose another --name, or say --overwrite=True.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=folder.parent))
    aside = Path(f"{partial}.old")
    try:
        if paths:
            files, skipped = find_files(paths)
            sources, total = [str(f) for f in files], sum(f.stat().st_size for f in files)
            total += 2 * sum(f.stat().st_size for f in files if f.suffix.lower() == ".gz")  # a guess

            def stream():
                return itertools.chain.from_iterable(read_file(f, field, document_per_file) for f in files)
        else:
            sources, skipped = ["documentation of Python, numpy and torch"], Counter()
            lines = list(read_docs(workers))
            stream, total = functools.partial(iter, lines), sum(len(line or "") for line in lines)
        if not next(pieces(stream()), None):
            raise InputError(f"there is no text in {', '.join(sources[:5])}.")

        tokenizer = make_tokenizer(encoding, vocab_size, lowercase, stream, total, workers)
        encode = functools.partial(encode_chunk, state=tokenizer.state(), val_fraction=val_fraction)
        work = chunks(stream(), tokenizer.lowercase, "tokenising", total)
        dtype, documents, text_bytes, before = token_dtype(tokenizer.vocab_size), 0, 0, None
        separator = np.array([tokenizer.sep_id], dtype).tobytes()
        with open(partial / "train.bin", "wb") as train, open(partial / "val.bin", "wb") as val:
            files = {"train": train, "val": val}
            for new, split, ids, size in itertools.chain.from_iterable(in_parallel(encode, work, workers)):
                if before and (new or split != before):  # a document ends, or continues in the other split
                    files[before].write(separator)
                files[split].write(ids)
                documents, text_bytes, before = documents + new, text_bytes + size, split
            files[before].write(separator)
        (partial / "tokenizer.tiktoken").write_text(tokenizer.state()["ranks"])

        tokens = {s: (partial / f"{s}.bin").stat().st_size // dtype.itemsize for s in ("train", "val")}
        meta = {"vocab_size": tokenizer.vocab_size, "lowercase": tokenizer.lowercase,
                "special_ids": tokenizer.special_ids, "pattern": tokenizer.pattern, "encoding": encoding,
                "tokens": tokens, "dtype": dtype.name, "documents": documents, "bytes": text_bytes,
                "sources": sources, "val_fraction": val_fraction,
                "sha256": {file.stem: checksum(file) for file in partial.iterdir()},
                "versions": {"python": platform.python_version(), "numpy": np.__version__,
                             "tiktoken": tiktoken.__version__}}
        (partial / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
        partial.chmod(0o755)
        if stamp(folder) != old:
            raise InputError(f"{folder} was written by another command meanwhile; it stays as it is.")
        if old:
            os.rename(folder, aside)
        os.rename(partial, folder)
    finally:
        if aside.exists() and not folder.exists():  # stopped between the two renames
            os.rename(aside, folder)
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(aside, ignore_errors=True)

    left_out = ", ".join(f"{number} {kind}" for kind, number in skipped.most_common(6)) or "nothing"
    first = np.fromfile(folder / "train.bin", dtype, 15)
    tell(f"prepared {folder}: {documents:,} documents, {text_bytes / 1e6:.1f} MB, "
         f"{time.monotonic() - start:.1f} s\n"
         f"  {sum(tokens.values()):,} tokens ({tokens['train']:,} train, {tokens['val']:,} val), "
         f"{text_bytes / sum(tokens.values()):.2f} bytes per token\n"
         f"  vocabulary of {tokenizer.vocab_size:,}; files read: {len(sources)}; skipped: {left_out}\n"
         f"  it begins: {'|'.join(tokenizer.pieces(first))[:80]!r}")
    return folder


# ------------------------------------------------------------------------------------------------------------
# Batches


class Sequences:
    """Packed sequences of one split, of max_len tokens each: [CLS] and the next max_len - 1 of the corpus.

    Sequence `index` of step `step` is a pure function of (seed, step, index), for any number of processes and
    any accumulation, after any resume: its tokens (each epoch is a seeded permutation), its masked positions,
    its crop and the uniform numbers that the auxiliary samples with.
    """

    def __init__(self, folder, split, max_len, masked, crop_len, seed, check=True):
        """check: read the file once, to see that it is what was written (1 GB/s)"""
        meta, self.path = read_meta(folder), Path(folder, f"{split}.bin")
        size, dtype = meta["tokens"][split], token_dtype(meta["vocab_size"])
        if not self.path.exists() or self.path.stat().st_size != size * dtype.itemsize or (
                check and checksum(self.path) != meta["sha256"][split]):
            raise InputError(f"{self.path} is not as meta.json says (size, checksum); prepare it again.")
        self.tokens = np.memmap(self.path, dtype, "r") if size else np.zeros(0, dtype)
        if check and self.tokens.max(initial=0) >= meta["vocab_size"]:
            raise InputError(f"{self.path} has tokens beyond its vocabulary; prepare it again.")
        self.max_len, self.masked, self.crop_len, self.seed = max_len, masked, crop_len, seed
        self.cls_id, self.sep_id = meta["special_ids"]["[CLS]"], meta["special_ids"]["[SEP]"]
        self.order = functools.lru_cache(maxsize=2)(self.order)

    def __len__(self):
        return len(self.tokens) // (self.max_len - 1)

    def order(self, epoch):
        return np.random.default_rng([0, self.seed, epoch]).permutation(len(self))

    def sequence(self, step, index, batch_size):
        epoch, place = divmod(step * batch_size + index, len(self))
        start = self.order(epoch)[place] * (self.max_len - 1)
        tokens = np.empty(self.max_len, np.int64)
        tokens[0] = self.cls_id
        tokens[1:] = self.tokens[start : start + self.max_len - 1]
        random = np.random.default_rng([1, self.seed, step, index])
        ordinary = np.flatnonzero((tokens != self.cls_id) & (tokens != self.sep_id))  # what may be masked
        if len(ordinary) < self.masked:
            raise InputError(f"{self.path} has only {len(ordinary)} tokens besides [SEP] in the sequence at "
                             f"{start:,}, fewer than are masked; prepare it from longer documents.")
        masked = np.sort(random.permutation(ordinary)[: self.masked])
        crop_start = random.integers(1, self.max_len - self.crop_len + 1)
        crop = np.concatenate([tokens[:1], tokens[crop_start : crop_start + self.crop_len]])
        return {"tokens": tokens, "masked": masked, "crop": crop,
                "uniforms": random.random(self.masked, dtype=np.float32)}

    def batch(self, step, indices, batch_size):
        """Sequences of one step, stacked: tokens (B, T), masked and uniforms (B, K), crop (B, C)"""
        rows = [self.sequence(step, index, batch_size) for index in indices]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def batches(sequences, batch_size, micro_batch_size, rank, world, first_step=0):
    """The batches of one process: for each pass of each step. A thread prepares the next one meanwhile."""
    def prepare(step, part):
        first = (part * world + rank) * micro_batch_size
        return sequences.batch(step, range(first, first + micro_batch_size), batch_size)

    parts = range(batch_size // (micro_batch_size * world))
    passes = ((step, part) for step in itertools.count(first_step) for part in parts)
    with ThreadPoolExecutor(1) as thread:
        upcoming = thread.submit(prepare, *next(passes))
        for step, part in passes:
            ready, upcoming = upcoming, thread.submit(prepare, step, part)
            yield ready.result()


def main():
    parser = Parser(__doc__, prepare)
    parser.add_argument("paths", nargs="*", metavar="PATH", help="text files, or folders that hold them")
    prepare(**vars(parser.parse_intermixed_args()))


if __name__ == "__main__":
    run_command(main)
