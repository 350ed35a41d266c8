"""From text to batches: documents -> pieces -> tokens -> data/NAME/ -> sequences with their masks and crops.

    python data.py                                        the default text: documentation on this disk
    python data.py PATH... --name=NAME --vocab_size=...   .txt, .jsonl, .txt.gz, .jsonl.gz: files or folders

What is written to data/NAME/:

    train.bin, val.bin     token ids, raw uint16 (uint32 above 65,536 entries); [SEP] ends a document
    tokenizer_state.json   what Tokenizer.from_state takes: the byte-pair ranks, the pattern, lowercase or not
    meta.json              sizes, special ids, sources, checksums
"""

import argparse
import ast
import base64
import contextlib
import errno
import functools
import gzip
import hashlib
import heapq
import importlib.util
import inspect
import io
import itertools
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import zipfile
import zlib
from collections import Counter, defaultdict, deque
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import regex
import tiktoken

SPECIALS = ("[PAD]", "[CLS]", "[SEP]", "[MASK]")
FILES = {"train.bin", "val.bin", "tokenizer_state.json", "meta.json"}
PIECE = 16_000        # characters: shorter documents stay whole, longer ones are cut
LINE = 2 * 10**8      # characters of a line, at most; text8 is one line of half as many
CHUNK = 200           # pieces that a process prepares at once
CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # of this process
SAMPLE = 100_000_000  # bytes of text that the BPE is trained on, about; all of the text if it is shorter
ENCODE = 100_000      # characters in a call of tiktoken, which fails on a million spaces in a row
# Words for the BPE: contractions, letters with their marks, up to three digits, other signs, white space.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?[\p{L}\p{M}]+| ?\p{N}{1,3}| ?[^\s\p{L}\p{M}\p{N}]+|\s+(?!\S)|\s+"

# ------------------------------------------------------------------------------------------------------------
# Options, errors and output of all commands

# A number is from 0 to HIGHEST. These options have a tighter range, both ends included.
HIGHEST = 10**12  # of seconds, a timedelta still holds it
LIMITS = {
    **dict.fromkeys(("batch_size", "micro_batch_size", "max_steps", "log_interval", "eval_interval", "steps",
                     "eval_batches", "checkpoint_interval", "epochs", "seeds", "workers"), (1, HIGHEST)),
    "vocab_size": (260, 2**20), "max_len": (8, 2**20), "val_fraction": (0, 0.5), "warmup_fraction": (0, 1),
    "dropout": (0, 0.9), "beta1": (0, 0.9999999), "beta2": (0, 0.9999999), "epsilon": (1e-30, 1),
    "seed": (0, 2**63 - 1),
}


class InputError(Exception):
    """Something the user gave cannot be used. One sentence: what, where, and what to do. Exit status 2."""


def tell(*words, **how):
    """print. A terminal or pipe that is gone does not end the work."""
    with contextlib.suppress(OSError):
        print(*words, flush=True, **how)


def lock(folder, required=False):
    """Creates a folder and locks it until the returned file is closed. InputError: another run holds it.

    Windows and some file systems have no such lock: a warning, or, if it is `required`, an InputError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    if path.is_symlink():
        raise InputError(f"{path} is a link, not the lock of a run: remove it, or choose another folder.")
    file = open(path, "a")  # never emptied: it may be somebody's
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{folder} is in use by another run: choose another name, or wait.") from None
    except (ImportError, OSError) as error:
        if required:
            raise InputError(f"{folder} is another run's: remove it if that has ended ({error}).") from None
        tell(f"warning: {folder} cannot be locked ({error}): start no second run in it.")
    return file


def read_option(name, kind, may_be_empty, text):
    """The value of the option `name`, whose type is str, int, float, bool or a Literal."""
    if kind is str:
        wanted = "a text"
        if text or may_be_empty:
            return os.path.expanduser(text)  # ~ is the home folder
    elif kind in (int, float):
        low, high = LIMITS.get(name, (0, HIGHEST))
        wanted = f"a {'whole number' if kind is int else 'number'} from {low} to {high}"
        with contextlib.suppress(ValueError):
            if "_" not in text and low <= kind(text) <= high:
                return kind(text)
    else:
        choices = {str(choice).lower(): choice for choice in get_args(kind) or (True, False)}
        wanted = f"one of {', '.join(map(str, choices.values()))}"
        if text.lower() in choices:
            return choices[text.lower()]
    raise argparse.ArgumentTypeError(f"has to be {wanted}, not {text!r}")


class Parser(argparse.ArgumentParser):
    """An option --name for each constant `name: type = value  # reason` of modules, classes and functions."""

    def __init__(self, usage, *owners, without=()):
        super().__init__(usage=usage.replace("%", "%%"), allow_abbrev=False)
        for owner in owners:
            reasons = dict(re.findall(r"^ *(\w+): .*?  # (.*)$", inspect.getsource(owner), re.M))
            values = getattr(owner, "__kwdefaults__", None) or vars(owner)
            for name, kind in get_type_hints(owner).items():
                if name not in without:  # argparse reads a default that is text as it reads the command line
                    default = None if values.get(name) is None else str(values[name])
                    reason = reasons.get(name, "").replace("%", "%%")
                    reason += " (default: %(default)s)" if default else ""
                    read = functools.partial(read_option, name, kind, default == "")
                    self.add_argument(f"--{name}", type=read, default=default, metavar="VALUE", help=reason)

    def error(self, message):
        raise InputError(f"{message} (--help lists all options).")


def run_command(main):
    """Runs a command's main. An error that its user can mend is one sentence, without a traceback."""
    if hasattr(sys.stdout, "reconfigure"):  # not in notebooks
        sys.stdout.reconfigure(errors="replace")  # a terminal without UTF-8 shows what it can
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # cleans up on its way out
    try:
        return main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (InputError, OSError, MemoryError, RuntimeError) as error:  # OSError: a full disk, ...
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if int(os.environ.get("RANK", 0)) > 0:
            time.sleep(3)  # process 0 says what all would say, and torchrun ends the others meanwhile
        said = str(error) or "out of memory"
        if isinstance(error, RuntimeError):  # a fault, unless torch has no memory
            if not re.search("out of memory|can't allocate memory", said):
                raise
            said = f"choose a smaller batch (train.py: --micro_batch_size); {said}"
        print(f"{Path(sys.argv[0]).name}: {said}", file=sys.stderr, flush=True)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        os._exit(2)  # an orderly exit would wait for processes that have ended
    sys.exit(2)


class Progress:
    """Prints how far the work is and the time left, every 10 s."""

    def __init__(self, what, total, unit="MB", scale=1e6):
        self.what, self.total, self.unit, self.scale = what, total, unit, scale
        self.start = self.last = time.monotonic()

    def __call__(self, done):
        now = time.monotonic()
        if now - self.last >= 10:
            self.last, left = now, max(self.total - done, 0) / done * (now - self.start)
            tell(f"{self.what}: {done / self.scale:,.0f} {self.unit}, {left:.0f} s left")


def start_worker():
    """Ignores Ctrl-C, which the parent handles, and exits when the parent is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()


def start_workers(pool, workers):
    """Starts all workers of a pool, which inherit that Ctrl-C is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for _ in range(workers):
        pool.submit(int)


def undisturbed(function, *arguments):
    """function(*arguments). A signal takes effect after it: an exception inside could leave a lock held."""
    late = []
    handlers = {number: signal.signal(number, lambda number, frame: late.append(number))
                for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return function(*arguments)
    finally:
        for number, handler in reversed(handlers.items()):  # Ctrl-C last: from then on it raises its error
            signal.signal(number, handler)
        for number in late:
            signal.raise_signal(number)


def in_parallel(function, items, workers):
    """function(item) for each item, in order, by processes. Few items are under way, so memory is bounded."""
    # Another thread cannot set signal handlers, and no pool works once the main thread has ended
    if workers == 1 or threading.current_thread() is not threading.main_thread():
        yield from map(function, items)
        return
    pool, pending = ProcessPoolExecutor(workers, get_context("spawn"), start_worker), deque()
    script = sys.modules["__main__"]
    sys.modules["__main__"] = sys.modules[__name__]  # workers import this: scripts may lack a __main__ guard
    try:
        undisturbed(start_workers, pool, workers)
        for item in items:
            pending.append(undisturbed(pool.submit, function, item))
            if len(pending) > 3 * workers:
                yield undisturbed(pending.popleft().result)
        yield from (undisturbed(future.result) for future in pending)
    except BrokenProcessPool:
        raise InputError("a worker was killed, perhaps for its memory: choose fewer --workers.") from None
    finally:
        sys.modules["__main__"] = script
        pool.shutdown(cancel_futures=True)


# ------------------------------------------------------------------------------------------------------------
# The default text

MARKUP = re.compile(r":[\w:]+:`~?([^`<]*?)(?:\s*<[^`]*>)?`|``?([^`]*)``?")
NO_PROSE = re.compile(r"(Args|Returns?|Raises|Yields)\b|\w[\w, *]* ?(\([^)]*\))? ?(:|--) "  # parameters
                      r"|.*([-=~^*#]{3}|\.\. |:param|:return| : )")


def docs_files():
    """The source files of Python's library, where ast.py is, of numpy and of torch."""
    skip = {"test", "tests", "testing", "site-packages", "idlelib", "lib2to3"}
    roots = [Path(importlib.util.find_spec(name).origin).parent for name in ("ast", "numpy", "torch")]
    return [str(file) for root in roots for file in sorted(root.rglob("*.py"))
            if not skip & set(file.relative_to(root).parts)]


def docs_paragraphs(path):
    """The English paragraphs of a Python file's docstrings, a line each: no code, tables or parameters."""
    try:
        tree = ast.parse(Path(path).read_bytes())
    except (SyntaxError, ValueError):  # a template, say
        return []
    texts = (str(node.value.value) for node in ast.walk(tree)
             if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))
    paragraphs = (part for text in texts for part in re.split(r"\n\s*\n", text))
    lines = (MARKUP.sub(r"\1\2", " ".join(paragraph.split())) for paragraph in paragraphs)
    return [line + "\n" for line in lines if is_prose(line)]


def is_prose(line):
    """Words, nearly all of them plain, that end as a sentence."""
    words = line.split()
    plain = sum(word.strip(".,;:!?()\"'").isalpha() for word in words)
    ends = re.search(r"[.!?]\W*$", line)
    return len(words) >= 8 and plain >= 0.75 * len(words) and ends and not NO_PROSE.match(line)


def read_docs(workers):
    """The lines of the default text: a document per source file; each paragraph once, so in one split."""
    seen = set()
    for paragraphs in in_parallel(docs_paragraphs, docs_files(), workers):
        fresh = [paragraph for paragraph in dict.fromkeys(paragraphs) if paragraph not in seen]
        seen.update(fresh)
        yield from [*fresh, "\n"]


# ------------------------------------------------------------------------------------------------------------
# The user's text: files -> lines, with None where a document ends -> pieces


def find_files(paths):
    """{file: (size, time)} of the text files that the paths name. Folders are searched, links to them not."""
    def refuse(error):  # a folder that cannot be read, which Path.rglob would leave out
        raise error

    endings, files = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz"), {}
    for path in paths:
        root = Path(os.path.expanduser(path))
        walk = os.walk(root, onerror=refuse) if root.is_dir() else [(root.parent, [], [root.name])]
        found = sorted(Path(folder, name) for folder, _, names in walk for name in names)
        found = [file for file in found if file.is_file() and file.name.lower().endswith(endings)]
        if not found:
            raise InputError(f"there is no {', '.join(endings)} file at or in {path}.")
        files |= {file: (file.stat().st_size, file.stat().st_mtime_ns) for file in found}
    return files


def read_lines(path):
    r"""(number, line) of a text file, of a .gz as well. A line ends with \n, in the file \r\n and \r too."""
    open_text = gzip.open if path.name.lower().endswith(".gz") else open
    try:
        with open_text(path, "rt", encoding="utf-8-sig", errors="surrogateescape") as file:
            for number, line in enumerate(iter(functools.partial(file.readline, LINE), ""), 1):
                if len(line) == LINE:
                    raise InputError(f"{path}, line {number} has {LINE:,} characters or more.")
                line.encode()  # an error where a byte was escaped
                yield number, line
    except UnicodeEncodeError as error:
        raise InputError(f"{path}, line {number}: character {error.start + 1} is not UTF-8.") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path}: damaged gzip file ({error}).") from None
    except MemoryError:
        raise InputError(f"{path} has a line for which there is not enough memory.") from None


def read_documents(files, field, document_per_file):
    """Lines of text files, and None where a document ends. A line that cannot be read is refused."""
    for path in files:
        jsonl = path.name.lower().endswith((".jsonl", ".jsonl.gz"))
        for number, line in read_lines(path):
            if not jsonl:
                yield line if line.strip() or document_per_file else None
            elif line.strip():
                try:
                    text = replace_surrogates(json.loads(line)[field])
                except (ValueError, KeyError, TypeError, RecursionError) as error:
                    raise InputError(f'{path}, line {number} has no text "{field}" ({error!r}).') from None
                yield from io.StringIO(text.strip() + "\n", newline=None)  # the same line ends
                yield None
        yield None


def pieces(lines):
    r"""Cuts documents into (starts a document?, text) of at most PIECE characters. If that were 12:

        "one two\n", "six\n", "seven eight nine\n", None, "ten\n", None
        -> (True, "one two\nsix\n"), (False, "seven eight"), (False, " nine"), (True, "ten")

    A piece takes as many lines as fit; a line that is longer than a piece is cut before a space. Joined, the
    pieces of a document are the document, without the white space around it.
    """
    part_of_line = re.compile(rf"(?s).{{1,{PIECE}}}(?= |\Z)|.{{1,{PIECE}}}")
    starts, text = True, ""
    for line in lines:
        for part in part_of_line.findall(line or ""):
            if len(text) + len(part) > PIECE:  # the piece is full
                yield starts, text
                starts, text = False, ""
            text = (text + part).lstrip() if starts else text + part
        if line is None:
            if text.rstrip():
                yield starts, text.rstrip()
            starts, text = True, ""


def chunks(lines, lowercase, what, total):
    """Lists of (starts a document?, text): the work that a process gets at once. Shows progress."""
    found, done, progress = pieces(lines), 0, Progress(what, total)
    while chunk := list(itertools.islice(found, CHUNK)):
        yield [(starts, lower(text) if lowercase else text) for starts, text in chunk]
        done += sum(len(text.encode()) for _, text in chunk)
        progress(done)


def fingerprint(text):
    """64 bits that depend on the text alone: they decide its split, and whether the BPE is trained on it."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


# ------------------------------------------------------------------------------------------------------------
# The tokenizer


def replace_surrogates(text):
    """Replaces lone surrogates, which JSON can spell ("\\ud83d"), by U+FFFD."""
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def lower(text):
    """Lowercase, character by character: str.lower makes two of İ, and looks at the neighbours of Σ."""
    return "İ".join(part.lower() for part in text.replace("Σ", "σ").split("İ"))


def count_words(chunk, share=1.0):
    """How often each word of PATTERN occurs in a share of the pieces.

    The share takes the highest fingerprints, so that validation text, which has the lowest, comes in last.
    """
    chosen = (text for _, text in chunk if fingerprint(text) >= (1 - share) * 2**64)
    words = (word for text in chosen for word in regex.findall(PATTERN, text))
    # Text without spaces makes long words: they are counted in parts
    return Counter(word[start : start + 100] for word in words for start in range(0, len(word), 100))


def new_neighbours(parts, pair, new):
    """(old pair, new pair) of each neighbour when the pair between `parts` becomes the token `new`.

        parts "fl", "er" and pair "ow": ("lo", "l" + new), ("we", new + "e")
    """
    left, right = pair
    for place, (before, after) in enumerate(itertools.pairwise(parts)):
        if before:
            yield before[-1] + left, before[-1] + new
        elif place > 0:  # the pair stood there twice in a row
            yield right + left, new + new
        if after:
            yield right + after[0], new + after[0]


def train_bpe(words, size):
    """Byte-pair encoding: {token: rank} with `size` entries, the 256 bytes first, from a Counter of words.

        {"low": 5, "lower": 2}: the most frequent pair is l+o (7 times), then lo+w (7), then e+r (2) ...

    Each step merges the most frequent pair into a token; a tie goes to the pair of older tokens. A word is a
    str whose characters are token ids. It is split at the pair. Only the ends of its parts get new
    neighbours, so the work of a step is the number of places of its pair.
    """
    tokens = [bytes([byte]) for byte in range(256)]
    spelled = [word.encode().decode("latin-1") for word in words]  # byte 65 is chr(65)
    frequency = list(words.values())
    counts, where = Counter(), defaultdict(list)
    for index, text in enumerate(spelled):
        for pair in map("".join, itertools.pairwise(text)):
            counts[pair] += frequency[index]
            where[pair].append(index)
    heap = [(-count, pair) for pair, count in counts.items()]
    heapq.heapify(heap)
    progress = Progress("training the BPE", size, "tokens", 1)
    while len(tokens) < size:
        if not heap:
            raise InputError(f"too little text for a vocabulary of {size + len(SPECIALS)}: it gives only "
                             f"{len(tokens) + len(SPECIALS)} entries; choose a smaller --vocab_size.")
        count, pair = heapq.heappop(heap)
        if -count != counts[pair]:  # an old entry: the pair has become rarer since
            if counts[pair] > 0:
                heapq.heappush(heap, (-counts[pair], pair))
            continue
        new, changed = chr(len(tokens)), set()
        tokens.append(tokens[ord(pair[0])] + tokens[ord(pair[1])])
        progress(len(tokens))
        for index in set(where.pop(pair)):
            parts = spelled[index].split(pair)
            spelled[index] = new.join(parts)
            for old, fresh in new_neighbours(parts, pair, new):
                counts[old] -= frequency[index]
                counts[fresh] += frequency[index]
                where[fresh].append(index)
                changed.add(fresh)
        for fresh in changed:
            heapq.heappush(heap, (-counts[fresh], fresh))
    return {token: rank for rank, token in enumerate(tokens)}


class Tokenizer:
    """A tiktoken encoding whose ranks are followed by [PAD] [CLS] [SEP] [MASK].

    >>> tokenizer = Tokenizer.load("data/docs")
    >>> ids = tokenizer.encode("The cat [MASK]")       # what spells [MASK] is ordinary text
    >>> tokenizer.decode(ids), tokenizer.pieces(ids)   # "the cat [mask]", ["the", " cat", " [", ...]
    >>> tokenizer.batch(["The cat", "A dog barks"])    # int64 (2, 5): [CLS] ... [SEP] [PAD], [CLS] ... [SEP]
    """

    max_len = 512  # tokens of a sequence by default; load_checkpoint sets it to the model's positions

    def __init__(self, ranks, pattern, lowercase):
        self.ranks, self.pattern, self.lowercase = ranks, pattern, lowercase
        first = max(ranks.values()) + 1
        self.special_ids = {name: first + i for i, name in enumerate(SPECIALS)}
        self.pad_id, self.cls_id, self.sep_id, self.mask_id = self.special_ids.values()
        self.vocab_size = first + len(SPECIALS)
        self.token_bytes = {i: token for token, i in ranks.items()}
        self.token_bytes |= {i: name.encode() for name, i in self.special_ids.items()}
        self.dtype = np.dtype("uint16" if self.vocab_size <= 65536 else "uint32")  # of train.bin and val.bin
        self.encoding = tiktoken.Encoding("nanococo", pat_str=pattern, mergeable_ranks=ranks,
                                          special_tokens=self.special_ids)

    def encode(self, text):
        """Token ids of a text, without special tokens. A lone surrogate becomes U+FFFD."""
        text = replace_surrogates(lower(text) if self.lowercase else text)
        parts = (text[i : i + ENCODE] for i in range(0, len(text), ENCODE))
        return [token for part in parts for token in self.encoding.encode_ordinary(part)]

    def encode_pair(self, a, b=None, max_len=None):
        """[CLS] A [SEP] [SEP] B [SEP], or [CLS] A [SEP]; if too long, the longer one is cut first. [model]"""
        max_len = self.max_len if max_len is None else max_len
        if max_len < (2 if b is None else 4):
            raise InputError(f"max_len={max_len} has no room for the special tokens.")
        a = self.encode(a)
        if b is None:
            return [self.cls_id, *a[: max_len - 2], self.sep_id]
        b, room = self.encode(b), max_len - 4
        keep_b = min(len(b), max(room // 2, room - len(a)))
        return [self.cls_id, *a[: room - keep_b], self.sep_id, self.sep_id, *b[:keep_b], self.sep_id]

    def batch(self, texts, pairs=None, max_len=None):
        """Token ids of texts, or of texts and their pairs: int64 (B, T), cut to max_len tokens and padded."""
        import torch  # here, since the workers that prepare a corpus do not need it
        if isinstance(texts, str) or isinstance(pairs, str):
            raise TypeError("batch takes a list of texts, and of their pairs: batch([text])")
        texts = list(texts)
        pairs = [None] * len(texts) if pairs is None else pairs
        rows = [torch.tensor(self.encode_pair(a, b, max_len)) for a, b in zip(texts, pairs, strict=True)]
        if not rows:
            return torch.zeros(0, 0, dtype=torch.int64)
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.pad_id)

    def offsets(self, text):
        """Token ids of a text, and the characters that each token covers: (n, 2), start and end (exclusive).

        A token can be a part of a character: "é" in two tokens -> (0, 1), (0, 1).
        """
        ids = self.encode(text)
        _, starts = self.encoding.decode_with_offsets(ids)
        starts = np.array(starts, np.int64)
        ends = np.append(starts[1:], len(text))[: len(ids)]
        return ids, np.stack([starts, np.maximum(ends, starts + 1)], axis=1)

    def decode(self, ids):
        """The text of token ids. Invalid UTF-8 becomes U+FFFD; unknown ids are skipped."""
        return b"".join(self.token_bytes.get(int(i), b"") for i in ids).decode("utf-8", "replace")

    def pieces(self, ids):
        """The text of each token."""
        return [self.token_bytes.get(int(i), b"").decode("utf-8", "replace") for i in ids]

    def state(self):
        """Plain types, for a checkpoint; Tokenizer.from_state turns them back."""
        lines = "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in self.ranks.items())
        return {"ranks": lines, "pattern": self.pattern, "lowercase": self.lowercase}

    @staticmethod
    def from_state(state, path="this"):
        """The tokenizer with this state. path: where it comes from, for messages"""
        try:
            if "dictionary" in state:
                return SentencePieceTokenizer(**state, path=path)
            lines = [line.split() for line in state["ranks"].splitlines()]
            ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
            return Tokenizer(ranks, state["pattern"], state["lowercase"])
        except (KeyError, ValueError, TypeError, AttributeError):
            raise InputError(f"{path} has no tokenizer that can be read.") from None

    @staticmethod
    def load(path):
        """The tokenizer of a prepared corpus, of a checkpoint, or of a run's folder, which holds ckpt.pt."""
        path = Path(path)
        if (path / "meta.json").exists():
            meta, file = read_meta(path), path / "tokenizer_state.json"
            if checksum(file) != meta["sha256"]["tokenizer_state"]:
                raise InputError(f"{file} is not as meta.json says; prepare the corpus again.")
            return Tokenizer.from_state(json.loads(file.read_bytes()), path)
        file = path if path.is_file() else path / "ckpt.pt"
        saved = read_torch(file) if file.exists() and file.suffix != ".safetensors" else {}
        if "tokenizer" not in saved:
            raise InputError(f"{path} is neither a corpus nor a checkpoint of this project; a released model "
                             f"becomes one by python convert.py {path} out/NAME.pt")
        return Tokenizer.from_state(saved["tokenizer"], path)


# ------------------------------------------------------------------------------------------------------------
# SentencePiece with the authors' cleaning: the tokenizer of their released models

PUNCTUATION = regex.compile(r"[!-/:-@\[-`{-~\p{P}]*")
CLITIC = re.compile(r"(?:[smdtSMDT]|ll|LL|re|RE|ve|VE)\b")
PLAIN = {"``": '"', "''": '"', "“": '"', "”": '"',
         "‘": "'", "’": "'", "´": "'", "–": "-", "—": "-"}
NAMES = {"<s>": "[CLS]", "<pad>": "[PAD]", "</s>": "[SEP]", "<unk>": "[UNK]", "<mask>": "[MASK]"}


def clean(text):
    """The text as sp.model expects it, and where in `text` each of its characters starts and ends. [model]

        "``Don't,'' he 's said"   ->   '" Don\'t ," he \'s said'
    """
    text = replace_surrogates(text)
    found = [(PLAIN.get(m[0], m[0]), *m.span()) for m in re.finditer(r"(?s)``|''|.", text)]
    plain, kept = "".join(character for character, _, _ in found), []
    for word in re.finditer(r"\S+", plain):
        front = PUNCTUATION.match(plain, *word.span()).end()
        back = max(front, word.end() - PUNCTUATION.match(word[0][::-1]).end())
        for start, end in itertools.pairwise((word.start(), front, back, word.end())):
            if start < end:
                if kept and not (kept[-1][0] == "'" and CLITIC.match(plain, start, end)):
                    kept.append((" ", kept[-1][2], found[start][1]))
                kept += found[start:end]
    return "".join(c for c, _, _ in kept), [start for _, start, _ in kept], [end for _, _, end in kept]


class SentencePieceTokenizer(Tokenizer):
    """sp.model cuts a text into pieces, dict.txt gives them ids. Needs the package sentencepiece. [model]

    The authors' cleaning puts a space after uppercase 'LL, 'RE and 'VE; this one does not.
    """

    pattern, lowercase = "", False

    def __init__(self, model, dictionary, vocab_size=None, path="this"):
        """model: sp.model in base64; dictionary: the text of dict.txt; vocab_size: of the released model"""
        symbols = [line.rsplit(" ", 1)[0] for line in (dictionary or "").split("\n") if line.strip()]
        self.model, self.dictionary, self.path, ids = model, dictionary, path, {}
        for symbol in ("[CLS]", "[PAD]", "[SEP]", "[UNK]", *symbols, "[MASK]"):
            ids.setdefault(NAMES.get(symbol, symbol), len(ids))
        self.vocab_size = vocab_size or len(ids)
        if dictionary is None:
            ids["[MASK]"] = vocab_size - 1
        elif len(ids) != self.vocab_size:
            raise InputError(f"{path}: the model has {self.vocab_size} tokens, dict.txt {len(ids)}.")
        self.token_bytes = {i: symbol.replace("▁", " ").encode() for symbol, i in ids.items()}
        self.special_ids = {name: ids.pop(name) for name in SPECIALS}
        self.symbol_ids = ids  # the others: what spells [MASK] in a text is unknown
        self.pad_id, self.cls_id, self.sep_id, self.mask_id = self.special_ids.values()
        self.dtype = np.dtype("uint16" if self.vocab_size <= 65536 else "uint32")

    def state(self):
        return {"model": self.model, "dictionary": self.dictionary, "vocab_size": self.vocab_size}

    @functools.cached_property
    def processor(self):
        if not self.model or not self.dictionary:
            raise InputError(f"{self.path}: its tokenizer lacks sp.model or dict.txt; put both beside the "
                             "weights of the release, and convert it again with python convert.py.")
        try:
            import sentencepiece
            processor = sentencepiece.SentencePieceProcessor(model_proto=base64.b64decode(self.model))
            processor.encode_as_offset_mapping  # since version 0.2.2
            return processor
        except (ImportError, AttributeError):
            raise InputError(f"{self.path}: its tokenizer needs sentencepiece 0.2.2 or newer: pip install "
                             "sentencepiece --upgrade") from None
        except (RuntimeError, ValueError) as error:
            raise InputError(f"{self.path}: sp.model cannot be read ({error}).") from None

    def encode(self, text):
        return self.offsets(text)[0]

    def offsets(self, text):
        cleaned, starts, ends = clean(text)
        found = self.processor.encode_as_offset_mapping(cleaned)
        pieces, places = found["pieces"], found["offsets"]
        ids, spans, starts, ends = [], [], [*starts, len(text)], [0, *ends]
        for piece, following, (begin, end) in zip(pieces, [*pieces[1:], "."], places):
            if piece != "▁" or not PUNCTUATION.match(following)[0]:  # else a space before punctuation
                ids.append(self.symbol_ids.get(piece, self.symbol_ids["[UNK]"]))
                spans.append((starts[begin], max(starts[begin], ends[end])))  # a piece can be empty
        return ids, np.array(spans, np.int64).reshape(-1, 2)

    def decode(self, ids):
        return super().decode(ids).strip()


# ------------------------------------------------------------------------------------------------------------
# A prepared corpus


def read_torch(path):
    """A dict from torch.save. Runs no code: argparse.Namespace is the only class allowed besides torch's."""
    import torch  # here, since the workers that prepare a corpus do not need it
    try:
        if zipfile.is_zipfile(path):  # torch.load verifies no checksums; older files, not zips, have none
            with zipfile.ZipFile(path) as archive:  # torch reads unset memory for an entry marked as a folder
                if archive.testzip() or any(record.external_attr for record in archive.infolist()):
                    raise zipfile.BadZipFile("a checksum differs")
        with torch.serialization.safe_globals([argparse.Namespace]):
            return dict(torch.load(path, map_location="cpu", weights_only=True))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist.") from None
    except Exception as error:  # damage has many names: zipfile's, pickle's, torch's
        if isinstance(error, OSError | MemoryError) and getattr(error, "errno", 0) != errno.EINVAL:
            raise  # the disk or memory failed, not the file; EINVAL is torch's seek in a cut file
        raise InputError(f"{path} is damaged, or no checkpoint that can be read safely "
                         f"({type(error).__name__}).") from None


def checksum(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_meta(folder):
    """meta.json of a prepared corpus."""
    try:
        meta = json.loads(Path(folder, "meta.json").read_bytes())
        meta["sha256"]["tokenizer_state"]  # corpora of older versions have none
        return meta
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(f"{folder} is no corpus of this version (meta.json: {error!r}). If it was one, "
                         "remove it and prepare it again with python data.py.") from None


@functools.lru_cache(maxsize=1)
def read_state(path):
    """The tokenizer of a tokenizer_state.json, which a worker reads once"""
    return Tokenizer.from_state(json.loads(path.read_bytes()), path)


def encode_chunk(chunk, state, val_fraction):
    """[(starts a document?, text)] -> [(starts a document?, split, ids as bytes, bytes of text)]"""
    tokenizer = read_state(state)
    return [(new, "val" if fingerprint(text) < val_fraction * 2**64 else "train",
             np.array(tokenizer.encode(text), tokenizer.dtype).tobytes(), len(text.encode()))
            for new, text in chunk]


def make_tokenizer(encoding, vocab_size, lowercase, lines, total, workers):
    """Trains a BPE, or takes the tokenizer of a corpus, of a checkpoint or of tiktoken. None: not given."""
    if encoding == "bpe":
        lowercase, words = lowercase is not False, Counter()
        count = functools.partial(count_words, share=min(1, SAMPLE / total))
        for counts in in_parallel(count, chunks(lines(), lowercase, "counting words", total), workers):
            words.update(counts)
        return Tokenizer(train_bpe(words, vocab_size - len(SPECIALS)), PATTERN, lowercase)
    if os.path.exists(encoding):
        tokenizer = Tokenizer.load(encoding)
    else:
        try:
            base = tiktoken.get_encoding(encoding)
        except (ValueError, OSError) as error:  # OSError: no network
            raise InputError(f"--encoding={encoding} is neither bpe nor a path, nor available from tiktoken "
                             f"({type(error).__name__}), which has {tiktoken.list_encoding_names()} and "
                             "downloads an encoding when it is first used.") from None
        tokenizer = Tokenizer(base._mergeable_ranks, base._pat_str, lowercase is not False)
    if vocab_size not in (None, tokenizer.vocab_size) or lowercase not in (None, tokenizer.lowercase):
        raise InputError(f"--encoding={encoding} has vocab_size={tokenizer.vocab_size} and "
                         f"lowercase={tokenizer.lowercase}, which cannot be changed.")
    return tokenizer


def write_tokens(folder, chunks, tokenizer, val_fraction, workers):
    """Writes train.bin and val.bin. Returns what meta.json says about them."""
    encode = functools.partial(encode_chunk, state=folder / "tokenizer_state.json", val_fraction=val_fraction)
    separator = np.array([tokenizer.sep_id], tokenizer.dtype).tobytes()
    documents, text_bytes, before = 0, 0, None
    with open(folder / "train.bin", "wb") as train, open(folder / "val.bin", "wb") as val:
        files = {"train": train, "val": val}
        for starts, split, ids, size in itertools.chain.from_iterable(in_parallel(encode, chunks, workers)):
            if before and (starts or split != before):  # a document ends, or continues in the other split
                files[before].write(separator)
            files[split].write(ids)
            documents, text_bytes, before = documents + int(starts), text_bytes + size, split
        files[before].write(separator)
        tokens = {split: file.tell() // tokenizer.dtype.itemsize for split, file in files.items()}
    return {"tokens": tokens, "dtype": tokenizer.dtype.name, "documents": documents, "bytes": text_bytes}


def clean_up(scratch, folder):
    """Removes the scratch folder of a new `folder`. If that stopped between its renames, restores the old."""
    if (scratch / "old").exists() and not folder.exists():
        os.rename(scratch / "old", folder)
        tell(f"{folder} is the old one again: its replacement was stopped.")
    shutil.rmtree(scratch)


def new_folder(data_dir, name, overwrite):
    """data_dir/name, where a corpus may be written. What killed preparations left there is removed."""
    if not re.fullmatch(r"\w[\w.+-]*", name):
        raise InputError(f"give --name= of letters, digits, _ . + - for the corpus, not {name!r}.")
    folder = Path(data_dir, name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    for killed in folder.parent.glob(f".{name}~*"):
        scratch_files = {"new", "old", "docs.txt", ".lock"}
        if killed.is_dir() and {file.name for file in killed.iterdir()} <= scratch_files:
            lock(killed, required=True).close()  # raises InputError if the preparation goes on
            clean_up(killed, folder)
    refuse_other(folder, overwrite)
    return folder


def refuse_other(folder, overwrite):
    """Raises InputError if there is something that a preparation may not replace."""
    is_corpus = not folder.is_symlink() and {file.name for file in folder.glob("*")} == FILES
    if os.path.lexists(folder) and not (is_corpus and overwrite):
        raise InputError(f"{folder} exists; choose another --name. --overwrite=True replaces only a corpus.")


def prepare(
    paths=(), *,
    name: str = "",                  # the corpus is data_dir/name; without PATH: docs
    data_dir: str = "data",          # folder of all prepared corpora
    vocab_size: int = None,          # entries of the vocabulary: 32768; without PATH: 8192
    lowercase: bool = None,          # lowercase all text: True, as the paper's base
    encoding: str = "bpe",           # bpe: train one; gpt2, ...; or the path of a corpus or checkpoint
    val_fraction: float = None,      # share of val.bin: 0.01; without PATH: 0.05
    workers: int = CPUS,             # processes; the result does not depend on it
    field: str = "text",             # the field of a .jsonl line that holds the text
    document_per_file: bool = False,  # a .txt is one document; else a blank line ends one
    overwrite: bool = False,         # replace the corpus of that name if there is one
):
    """Prepares a corpus and returns its folder. Without paths its text is the documentation on this disk.

    A hash of each text, after lowercasing, decides its split: equal texts are in one split. A document above
    PIECE characters is cut into pieces, which may be in different splits. The BPE is trained on both splits;
    if they have more than SAMPLE bytes, validation text is the last to be used. Raises InputError if a text
    or an option cannot be used, or if a folder of that name may not be replaced.
    """
    start = time.monotonic()
    if encoding == "bpe" and vocab_size is None:
        vocab_size = 32768 if paths else 8192
    if val_fraction is None:
        val_fraction = 0.01 if paths else 0.05
    folder = new_folder(data_dir, name or ("" if paths else "docs"), overwrite)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}~", dir=folder.parent))
    in_use = lock(scratch)
    try:
        new, docs = scratch / "new", scratch / "docs.txt"
        new.mkdir()
        if not paths:
            docs.write_text("".join(read_docs(workers)), encoding="utf-8", errors="replace")
        files = find_files(paths or [docs])
        total = sum(size * (3 if file.suffix.lower() == ".gz" else 1) for file, (size, _) in files.items())
        lines = functools.partial(read_documents, files, field, document_per_file)
        if not next(pieces(lines()), None):
            raise InputError(f"there is no text in {', '.join(map(str, paths))}.")
        tokenizer = make_tokenizer(encoding, vocab_size, lowercase, lines, total, workers)
        (new / "tokenizer_state.json").write_text(json.dumps(tokenizer.state()))
        text = chunks(lines(), tokenizer.lowercase, "tokenising", total)
        meta = {"vocab_size": tokenizer.vocab_size, "special_ids": tokenizer.special_ids,
                **write_tokens(new, text, tokenizer, val_fraction, workers),
                "encoding": encoding, "sources": list(map(str, paths)), "val_fraction": val_fraction,
                "sha256": {file.stem: checksum(file) for file in sorted(new.iterdir())}}
        (new / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
        if changed := files.items() ^ find_files(paths or [docs]).items():
            raise InputError(f"{min(changed)[0]} changed while it was read.")
        refuse_other(folder, overwrite)  # one may have appeared in the meantime
        if folder.exists():
            os.rename(folder, scratch / "old")
        os.rename(new, folder)
    finally:
        in_use.close()
        clean_up(scratch, folder)

    tokens, size, seconds = meta["tokens"], meta["bytes"], time.monotonic() - start
    tell(f"prepared {folder}: {meta['documents']:,} documents, {size / 1e6:.1f} MB, {seconds:.1f} s\n"
         f"  {tokens['train']:,} tokens in train.bin, {tokens['val']:,} in val.bin, "
         f"{size / sum(tokens.values()):.2f} bytes per token, vocabulary of {tokenizer.vocab_size:,}")
    return folder


# ------------------------------------------------------------------------------------------------------------
# Batches


class Sequences:
    """Packed sequences of one split, of max_len tokens each: [CLS] and the next max_len - 1 of the corpus.

    With a given batch size, a sequence is a pure function of (seed, step, index): its tokens (each epoch is a
    seeded permutation), its masked positions, its crop and the uniform numbers that the auxiliary samples
    with. The number of processes, accumulation and resuming do not change it.
    """

    def __init__(self, folder, split, max_len, mask_count, crop_len, seed):
        meta, self.path = read_meta(folder), Path(folder, f"{split}.bin")
        dtype, count = np.dtype(meta["dtype"]), meta["tokens"][split]
        if self.path.stat().st_size != count * dtype.itemsize:
            raise InputError(f"{self.path} is truncated or changed; prepare the corpus again.")
        self.tokens = np.memmap(self.path, dtype, "r") if count else np.zeros(0, dtype)  # mmap needs a byte
        self.max_len, self.mask_count, self.crop_len, self.seed = max_len, mask_count, crop_len, seed
        self.vocab_size, special_ids = meta["vocab_size"], meta["special_ids"]
        self.cls_id, self.sep_id = special_ids["[CLS]"], special_ids["[SEP]"]
        self.order = functools.lru_cache(maxsize=2)(self.order)

    def __len__(self):
        return len(self.tokens) // (self.max_len - 1)

    def order(self, epoch):
        order = np.arange(len(self), dtype="uint32" if len(self) <= 2**32 else "uint64")
        np.random.default_rng([0, self.seed, epoch]).shuffle(order)
        return order

    def sequence(self, step, index, batch_size):
        epoch, place = divmod(step * batch_size + index, len(self))
        start = int(self.order(epoch)[place]) * (self.max_len - 1)
        text = self.tokens[start : start + self.max_len - 1]
        tokens = np.concatenate([[self.cls_id], text], dtype=np.int64)
        random = np.random.default_rng([1, self.seed, step, index])
        ordinary = np.flatnonzero((tokens != self.cls_id) & (tokens != self.sep_id))  # what may be masked
        if len(ordinary) < self.mask_count or tokens.max() >= self.vocab_size:
            raise InputError(f"{self.path}, token {start:,}: damaged, or too few tokens other than [SEP].")
        masked = np.sort(random.permutation(ordinary)[: self.mask_count])
        crop_start = random.integers(1, self.max_len - self.crop_len + 1)
        crop = np.concatenate([tokens[:1], tokens[crop_start : crop_start + self.crop_len]])
        return {"tokens": tokens, "masked": masked, "crop": crop,
                "uniforms": random.random(self.mask_count, dtype=np.float32)}

    def batch(self, step, indices, batch_size):
        """Sequences of one step, stacked: tokens (B, T), masked and uniforms (B, K), crop (B, C)"""
        rows = [self.sequence(step, index, batch_size) for index in indices]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def batches(sequences, batch_size, micro_batch_size, rank, world, first_step=0):
    """Yields the micro-batches of one process, without end. A thread prepares the next one meanwhile."""
    starts = range(rank * micro_batch_size, batch_size, world * micro_batch_size)
    parts = ((step, range(i, i + micro_batch_size)) for step in itertools.count(first_step) for i in starts)
    with ThreadPoolExecutor(1) as thread:
        upcoming = thread.submit(sequences.batch, *next(parts), batch_size)
        for step, indices in parts:
            ready, upcoming = upcoming, thread.submit(sequences.batch, step, indices, batch_size)
            yield ready.result()


def main():
    parser = Parser(__doc__, prepare)
    parser.add_argument("paths", nargs="*", metavar="PATH", help="text files, or folders that hold them")
    prepare(**vars(parser.parse_intermixed_args()))


if __name__ == "__main__":
    run_command(main)
