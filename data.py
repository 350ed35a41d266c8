"""From text to batches: documents -> pieces -> tokens -> data/NAME/ -> sequences with their masks and crops.

    python data.py                                          the default corpus: documentation that is on this disk
    python data.py PATH... --name=NAME --vocab_size=32768   any .txt, .jsonl, .txt.gz, .jsonl.gz, file or folder

What is written to data/NAME/:

    train.bin, val.bin     token ids, raw uint16 (uint32 above 65,536 entries), documents separated by [SEP]
    tokenizer.tiktoken     the byte-pair ranks in tiktoken's format; [PAD] [CLS] [SEP] [MASK] stand behind them
    meta.json              sizes, special ids, pattern, sources, versions, checksums
"""

import ast
import base64
import difflib
import functools
import gzip
import hashlib
import heapq
import importlib.util
import inspect
import itertools
import json
import os
import re
import shutil
import signal
import sys
import sysconfig
import tempfile
import time
from collections import Counter, defaultdict, deque
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import regex
import tiktoken

PIECE = 16_000          # characters: short documents stay whole, long ones are cut into pieces of this size
ENCODE = 100_000        # characters that tiktoken gets at once: a million spaces in a row are too many for it
SAMPLE = 100_000_000    # characters of text that the BPE is trained on at the most
DOCS = {"name": "docs", "vocab_size": 8192, "val_fraction": 0.05}  # the default corpus: small, so more of it validates
SPECIALS = ("[PAD]", "[CLS]", "[SEP]", "[MASK]")
# Words for the BPE: contractions, letters with their marks, up to three digits, other signs, white space.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?[\p{L}\p{M}]+| ?\p{N}{1,3}| ?[^\s\p{L}\p{M}\p{N}]+|\s+(?!\S)|\s+"

OPTIONS = {  # name: (default, what it may be, reason)
    "name": ("", str, "the corpus is written to DATA_DIR/NAME"),
    "data_dir": ("data", str, "folder of all prepared corpora"),
    "vocab_size": (32768, (260, 2**24), "entries of the vocabulary, the four special tokens included"),
    "lowercase": (True, bool, "lowercase every character, as the paper's base model does"),
    "encoding": ("bpe", str, "bpe: train one on this text; or a tiktoken encoding such as gpt2; or a corpus' folder"),
    "val_fraction": (0.01, (0.0, 0.5), "share of the text that goes to val.bin, chosen by content"),
    "workers": (os.cpu_count(), (1, 4096), "processes; the result does not depend on it"),
    "field": ("text", str, "the field of a .jsonl line that holds the text"),
    "document_per_file": (False, bool, "a text file is one document; otherwise a blank line ends a document"),
    "hub": ("", str, "name of a Hugging Face dataset to stream, or its local folder (needs: pip install datasets)"),
    "hub_config": ("", str, "configuration of that dataset"),
    "overwrite": (False, bool, "replace the corpus of that name if there is one"),
}

# --------------------------------------------------------------------------------------------------------------------
# Options and errors, for all our commands


class InputError(Exception):
    """Something the user gave cannot be used: one sentence that says what, where, and what to do. Exit status 2."""


def sentence(error):
    """What an InputError says, or an OSError: no permission, disk full, ..."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}." if error.filename else f"{error.strerror}."
    return str(error)


def nearest(word, words):
    """', did you mean "vocab_size"?' or nothing"""
    match = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    return f', did you mean "{match[0]}"?' if match else f"; known are {', '.join(words)}."


def checked(name, value, allowed):
    """The value, if it is what the option may be: bool, str, a list of choices, or a range of ints or of floats.

    A string, as the command line gives it, is converted: checked("lr", "1e-3", (0.0, 1.0)) -> 0.001
    """
    if allowed is bool:
        wanted = None if str(value) in ("True", "False", "true", "false") else "True or False"
        value = value if wanted else str(value) in ("True", "true")
    elif allowed is str:
        wanted = None if isinstance(value, str) and "\0" not in value else "text"
    elif isinstance(allowed, list):
        match = [choice for choice in allowed if str(choice).lower() == str(value).lower()]
        wanted = None if match else "one of " + ", ".join(map(str, allowed))
        value = match[0] if match else value
    else:
        kind = type(allowed[0])
        wanted = f"a {'whole ' if kind is int else ''}number from {allowed[0]} to {allowed[1]}"
        try:
            number = kind(value)
            if isinstance(value, str) or (number == value and not isinstance(value, bool)):
                value = number
            if type(value) is kind and allowed[0] <= value <= allowed[1]:
                wanted = None
        except (TypeError, ValueError, OverflowError):
            pass
    if wanted:
        raise InputError(f"--{name} has to be {wanted}, not {value!r}.")
    return value


def parse_options(argv, options, usage):
    """The options given as --name=value, checked, and the other arguments. --help prints all of them and exits."""
    given, others = {}, []
    for argument in argv:
        if argument in ("-h", "--help"):
            print(usage.strip() + "\n\nOptions, with their defaults:\n")
            for name, (default, _, reason) in options.items():
                print(f"  --{name}={default}".ljust(36) + reason)
            sys.exit(0)
        if not argument.startswith("-"):
            others.append(argument)
            continue
        name, equals, value = argument.lstrip("-").partition("=")
        if name not in options:
            raise InputError(f"there is no option --{repr(name)[1:-1]}{nearest(name, options)}")
        if not equals:
            raise InputError(f"write --{name}=VALUE, with an equals sign and no space.")
        given[name] = checked(name, value, options[name][1])
    return given, others


def run_command(main, quiet=lambda: False):
    """Runs a command's main; what the user can mend is one sentence on standard error and exit status 2."""
    sys.stdout.reconfigure(errors="replace")  # a terminal without UTF-8 shows what it can
    try:
        return main()
    except (InputError, OSError) as error:
        message = sentence(error)
    except KeyboardInterrupt:
        sys.exit(130)
    if quiet():
        time.sleep(2)  # torchrun ends all processes when the first one ends: let the one that speaks be first
    else:
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


def tell(*words, end="\n"):
    """print, which the work outlives: after `python train.py | head -3`, or with standard output on a full disk, the
    run goes on without a word; what counts is in its files."""
    try:
        print(*words, end=end, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Progress:
    """Says how far a long work is, how fast and how long still: a line, redrawn in a terminal, else every 10 s."""

    def __init__(self, what, total, unit="MB", scale=1e6):
        self.what, self.total, self.unit, self.scale = what, total, unit, scale
        self.start = self.last = time.time()

    def __call__(self, done):
        now, terminal = time.time(), sys.stdout.isatty()
        if now - self.last < (0.5 if terminal else 10):
            return
        self.last = now
        speed = done / (now - self.start)
        left = f", {max(self.total - done, 0) / speed:.0f} s left" if self.total else ""
        digits = 1 if self.scale > 1 else 0
        line = (f"{self.what}: {done / self.scale:,.{digits}f} {self.unit}, {speed / self.scale:.2f} {self.unit}/s"
                f"{left}")
        tell("\r\033[K" + line if terminal else line, end="" if terminal else "\n")

    def end(self):
        if sys.stdout.isatty():
            tell("\r\033[K", end="")


def start_worker(setup, arguments):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the first one ends the others
    if setup:
        setup(*arguments)


def in_parallel(function, items, workers, setup=None, arguments=()):
    """function(item) for each item, in order, by processes; at most a few items are under way, so memory is bounded."""
    if workers == 1:
        if setup:
            setup(*arguments)
        yield from map(function, items)
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), start_worker, (setup, arguments)) as pool:
        pending = deque()
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > 3 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


# --------------------------------------------------------------------------------------------------------------------
# Sources. Each gives lines of text, and None where a document ends.


def docs_files():
    """Python's own, numpy's and torch's source files: what the default corpus is read from."""
    roots = [Path(sysconfig.get_paths()["stdlib"])]
    roots += [Path(importlib.util.find_spec(name).origin).parent for name in ("numpy", "torch")]
    skip = {"test", "tests", "testing", "site-packages", "idlelib", "lib2to3"}
    return [str(f) for root in roots for f in sorted(root.rglob("*.py")) if not skip & set(f.relative_to(root).parts)]


def docstrings(path):
    """The documentation in a Python file, read without running it: docstrings, add_docstr calls, pydoc's topics."""
    try:
        tree = ast.parse(Path(path).read_bytes())
    except (SyntaxError, ValueError, OSError):  # a template, say
        return []
    found = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            found.append(ast.get_docstring(node) or "")
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("add_docstr", "add_newdoc"):
            found += [c.value for a in node.args for c in ast.walk(a) if isinstance(c, ast.Constant)]
        elif isinstance(node, ast.Dict) and path.endswith("topics.py"):
            found += [v.value for v in node.values if isinstance(v, ast.Constant)]
    return [inspect.cleandoc(text) for text in found if isinstance(text, str)]


CODE = re.compile(r"\s*(>>>|\.\.\.|\.\. |[-=~^*#]{3,}|:\w+|@|\||\+-|(Args|Returns?|Raises|Yields)\b:?)")
PARAMETER = re.compile(r"\w[\w, *]* ?(\([^)]*\))? ?(:|--) ")
MARKUP = re.compile(r":[\w:]+:`~?([^`<]*?)(?:\s*<[^`]*>)?`|``?([^`]*)``?")


def prose(text):
    """The paragraphs of a docstring that read as English: sentences, not code, tables or lists of parameters."""
    for paragraph in re.split(r"\n\s*\n", text):
        lines = paragraph.splitlines()
        line = MARKUP.sub(r"\1\2", " ".join(paragraph.split()))
        words = line.split()
        plain = sum(word.strip(".,;:!?()\"'").isalpha() for word in words)
        if (len(words) >= 8 and plain >= 0.75 * len(words) and re.search(r"[.!?]\W*$", line)
                and not PARAMETER.match(line) and not any(CODE.match(line) for line in lines)):
            yield line + "\n"


def docs_paragraphs(path):
    return [paragraph for text in docstrings(path) for paragraph in prose(text)]


def read_docs(workers):
    """The default corpus: a document per source file, every paragraph only once, so that none is in both splits."""
    seen, progress, files = set(), Progress("reading documentation", None, "files", 1), docs_files()
    for number, paragraphs in enumerate(in_parallel(docs_paragraphs, files, workers)):
        progress(number)
        yield from (p for p in paragraphs if p not in seen and not seen.add(p))
        yield None
    progress.end()


def find_files(paths):
    """All text files that the paths name, folders searched recursively."""
    endings = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz")
    files = []
    if "" in map(str, paths):
        raise InputError("an empty PATH was given: name a file or a folder.")
    for path in map(Path, paths):
        if not path.exists():
            raise InputError(f"{path} does not exist.")
        found = sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else [path]
        found = [f for f in found if f.name.endswith(endings)]
        if not found:
            raise InputError(f"{path} holds no text: files that end in {', '.join(endings)} are read.")
        files += found
    return files


def read_file(path, field, document_per_file):
    """Lines of a file; a line that is not UTF-8, not JSON or without the field is refused with its number."""
    json_lines = path.name.endswith((".jsonl", ".jsonl.gz"))
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            for number, raw in enumerate(file, 1):
                where = f"{path}, line {number}"
                try:
                    line = raw.decode("utf-8-sig" if number == 1 else "utf-8").replace("\r\n", "\n")
                except UnicodeDecodeError as error:
                    raise InputError(f"{where}: byte {error.start + 1} is not UTF-8; convert the file first.") from None
                if json_lines and line.strip():
                    try:
                        text = json.loads(line)[field]
                    except (ValueError, RecursionError) as error:
                        raise InputError(f"{where}: not JSON ({error}).") from None
                    except (KeyError, TypeError, IndexError):
                        raise InputError(f'{where}: no field "{field}"; name the right one by --field=.') from None
                    if not isinstance(text, str):
                        raise InputError(f'{where}: the field "{field}" is not text.')
                    yield from text.splitlines(keepends=True)
                    yield None
                elif not json_lines:
                    yield line if line.strip() or document_per_file else None
    except (EOFError, gzip.BadGzipFile, gzip.zlib.error) as error:
        raise InputError(f"{path}: damaged gzip file ({error}).") from None
    yield None


def read_hub(name, config, field):
    try:
        import datasets
    except ImportError:
        raise InputError("--hub needs an optional package: pip install datasets") from None
    try:
        rows = iter(datasets.load_dataset(name, config or None, split="train", streaming=True))
        for row in rows:
            if not isinstance(row.get(field), str):
                raise InputError(f'{name} has no text "{field}" among {", ".join(row)}: choose one with --field=.')
            yield from row[field].splitlines(keepends=True)
            yield None
    except InputError:
        raise
    except Exception as error:  # not found, no network, a broken file, ...: the hub's own words say it best
        raise InputError(f"--hub={name} cannot be read: {' '.join(str(error).split())}") from None


def pieces(lines):
    """Cuts a stream of lines (None ends a document) into (starts a document?, text) of about PIECE characters.

    Long documents are cut at paragraph ends, paragraphs that are longer still at a space. Joined, the pieces of a
    document are the document, without white space around it.
    """

    def parts(line):
        start = 0
        while line and len(line) - start > PIECE:
            space = line.rfind(" ", start + 1, start + PIECE)
            end = space if space > 0 else start + PIECE
            yield line[start:end]
            start = end
        yield line[start:] if line else line

    new, space, held, size = True, "", [], 0  # held: the lines since the last cut; space: what stood behind the cut
    for part in (part for line in lines for part in parts(line)):
        while held and (part is None or size + len(part) > PIECE):
            blank = [i for i, line in enumerate(held) if not line.strip()]  # if there are, they end the paragraphs
            cut = len(held) if part is None or not blank else blank[-1] + 1
            text = space + "".join(held[:cut])
            space, held = text[len(text.rstrip()) :], held[cut:]
            size = sum(map(len, held))
            text = text.strip() if new else text.rstrip()
            if text:
                yield new, text
                new = False
        if part is None:
            new, space = True, ""
        else:
            held.append(part)
            size += len(part)


def fingerprint(text):
    """64 bits that depend on the text alone: they decide its split, and whether the BPE is trained on it."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


# --------------------------------------------------------------------------------------------------------------------
# The tokenizer


@functools.cache
def lower_table():
    return {i: low for i in range(sys.maxunicode + 1) if len(low := chr(i).lower()) == 1 and low != chr(i)}


def lower(text):
    """Lowercase character by character, so that character i of the result is character i of the text."""
    return text.lower() if text.isascii() else text.translate(lower_table())


def count_words(texts, lowercase):
    """How often each word of PATTERN occurs, as a list of (word, count)"""
    words, find = Counter(), regex.compile(PATTERN).findall
    for text in texts:
        words.update(find(lower(text) if lowercase else text))
    return list(words.items())


def train_bpe(words, size, progress=lambda done: None):
    """Byte-pair encoding: {token: rank} with `size` entries, the 256 bytes first, from a Counter of words.

        words {"low": 5, "lower": 2}:  most frequent pair l+o -> "lo" (7), then lo+w -> "low" (7), then low+e (2) ...

    Again and again the most frequent pair of neighbours becomes one token (of equally frequent ones, the pair of the
    older tokens). Pair counts are kept up to date, so a step touches only the words that hold the pair.
    """
    ranks = {bytes([b]): b for b in range(256)}
    tokens = list(ranks)
    spelled = [(list(word.encode("utf-8", "surrogatepass")), count) for word, count in words.items()]
    counts, where = Counter(), defaultdict(list)
    for index, (ids, count) in enumerate(spelled):
        for pair in zip(ids, ids[1:]):
            counts[pair] += count
            where[pair].append(index)
    heap = [(-count, pair) for pair, count in counts.items()]
    heapq.heapify(heap)
    while len(ranks) < size:
        if not heap:
            raise InputError(f"too little text: it gives only {len(ranks)} byte pairs, not {size}; "
                             f"choose a smaller --vocab_size or more text.")
        count, pair = heapq.heappop(heap)
        if -count != counts[pair]:  # an old entry: the pair has become rarer since
            if counts[pair] > 0:
                heapq.heappush(heap, (-counts[pair], pair))
            continue
        new, changed = len(tokens), set()
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
        ranks[tokens[new]] = new
        progress(new)
        for index in dict.fromkeys(where.pop(pair)):
            ids, count = spelled[index]
            merged, i = [], 0
            while i < len(ids):
                if i + 1 < len(ids) and (ids[i], ids[i + 1]) == pair:
                    merged.append(new)
                    i += 2
                else:
                    merged.append(ids[i])
                    i += 1
            if len(merged) == len(ids):
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
    return ranks


class Tokenizer:
    """A tiktoken encoding with [PAD] [CLS] [SEP] [MASK] behind its ranks.

    >>> tokenizer = Tokenizer.load("data/docs")
    >>> ids = tokenizer.encode("The cat [MASK]")       # plain text: what spells [MASK] is text
    >>> tokenizer.decode(ids), tokenizer.pieces(ids)   # "the cat [mask]" (lowercased), ["the", " cat", " [", ...]
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
        """Ids of a text, no special ones among them. Any str can be encoded and decoded again, broken ones too."""
        if self.lowercase:
            text = lower(text)
        ids = []
        for part in re.split("([\ud800-\udfff])", text):  # half characters, which UTF-8 has no place for
            if "\ud800" <= part <= "\udfff" and len(part) == 1:
                ids += [self.ranks[bytes([b])] for b in part.encode("utf-8", "surrogatepass")]
                continue
            for start in range(0, len(part), ENCODE):
                ids += self.encoding.encode_ordinary(part[start : start + ENCODE])
        return ids

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

    def bytes_of(self, ids):
        return b"".join(self.token_bytes.get(int(i), b"") for i in ids)  # some encodings leave ids out

    def decode(self, ids):
        """The text. Bytes that are no UTF-8, as of half a character, become U+FFFD."""
        try:
            return self.bytes_of(ids).decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            return self.bytes_of(ids).decode("utf-8", "replace")

    def pieces(self, ids):
        """The text of each token."""
        return [self.decode([i]) for i in ids]

    def state(self):
        """Plain types, for a checkpoint; Tokenizer.from_state turns them back."""
        lines = "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in self.ranks.items())
        return {"ranks": lines, "pattern": self.pattern, "lowercase": self.lowercase}

    @classmethod
    def from_state(cls, state, path="this"):
        """The tokenizer with this state; path: where it comes from, for the message if it is damaged."""
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
        meta, ranks = read_meta(folder), Path(folder, "tokenizer.tiktoken").read_bytes()
        if hashlib.sha256(ranks).hexdigest() != meta["sha256"].get("tokenizer"):
            raise InputError(f"{folder}/tokenizer.tiktoken is not as meta.json says; prepare the corpus again.")
        tokenizer = cls.from_state({"ranks": ranks.decode(errors="replace"), **meta}, folder)
        if tokenizer.special_ids != meta["special_ids"] or tokenizer.vocab_size != meta["vocab_size"]:
            raise InputError(f"{folder}/meta.json has other special_ids than its tokenizer; prepare the corpus again.")
        return tokenizer


def read_meta(folder):
    """What write_tokens and prepare said of a corpus."""
    try:
        meta = json.loads(Path(folder, "meta.json").read_text())
        numbers = [meta["vocab_size"], *(meta["tokens"][split] for split in ("train", "val")),
                   *(meta["special_ids"][name] for name in SPECIALS)]
        kinds = {"lowercase": bool, "pattern": str, "sha256": dict}
        if all(type(n) is int and 0 <= n < 2**48 for n in numbers) and all(
                isinstance(meta[name], kind) for name, kind in kinds.items()) and all(
                isinstance(meta["sha256"][split], str) for split in ("train", "val")):
            return meta
    except FileNotFoundError:
        raise InputError(f"{folder} is no prepared corpus: it has no meta.json; make it with python data.py.") from None
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    raise InputError(f"{folder}/meta.json is damaged; prepare the corpus again.")


def choose_tokenizer(options, stream, given):
    """The tokenizer that --encoding names: trained on the text, a corpus' own, or one of tiktoken's."""
    encoding, vocab_size, lowercase, workers = (options[n] for n in ("encoding", "vocab_size", "lowercase", "workers"))
    if encoding == "bpe":
        sample, size, level = [], 0, 0  # a piece is in the sample if its fingerprint ends in `level` zero bits
        progress = Progress("reading", None)
        seen = 0
        for _, text in pieces(stream()):
            seen += len(text)
            progress(seen)
            mark = fingerprint(text)
            if mark % 2**level == 0:
                sample.append((mark, text))
                size += len(text)
            while size > SAMPLE:
                level += 1
                sample = [(mark, text) for mark, text in sample if mark % 2**level == 0]
                size = sum(len(text) for _, text in sample)
        progress.end()
        if not sample:
            raise InputError(f"there is no text in {options['sources']}.")
        texts = [[text for _, text in sample[i : i + 64]] for i in range(0, len(sample), 64)]
        del sample
        words, progress, done = Counter(), Progress("counting words", size), 0
        count = functools.partial(count_words, lowercase=lowercase)
        for batch, counts in zip(texts, in_parallel(count, texts, workers)):
            words.update(dict(counts))
            done += sum(map(len, batch))
            progress(done)
        progress.end()
        progress = Progress("training the BPE", vocab_size, "tokens", 1)
        ranks = train_bpe(words, vocab_size - len(SPECIALS), progress)
        progress.end()
        return Tokenizer(ranks, PATTERN, lowercase)
    if os.path.isdir(encoding):
        tokenizer = Tokenizer.load(encoding)
        lowercase = given.get("lowercase", tokenizer.lowercase)
    elif encoding in tiktoken.list_encoding_names():
        try:
            base = tiktoken.get_encoding(encoding)
        except Exception as error:  # its ranks are downloaded when they are first used
            raise InputError(f"--encoding={encoding}: tiktoken cannot fetch it ({type(error).__name__}); "
                             f"is there a network?") from None
        tokenizer = Tokenizer(base._mergeable_ranks, base._pat_str, lowercase)
    else:
        names = ["bpe", *tiktoken.list_encoding_names()]
        raise InputError(f"--encoding={encoding} is neither a folder nor an encoding{nearest(encoding, names)}")
    if lowercase != tokenizer.lowercase or given.get("vocab_size", tokenizer.vocab_size) != tokenizer.vocab_size:
        raise InputError(f"--encoding={encoding} has vocab_size={tokenizer.vocab_size} and "
                         f"lowercase={tokenizer.lowercase}, which --vocab_size and --lowercase cannot change.")
    return tokenizer


# --------------------------------------------------------------------------------------------------------------------
# Preparing a corpus


def set_tokenizer(state):
    global TOKENIZER  # of a worker process
    TOKENIZER = Tokenizer.from_state(state)


def encode_batch(batch, val_fraction):
    """[(new document?, text)] -> [(new document?, split, ids as bytes, bytes of text)]"""
    dtype = token_dtype(TOKENIZER.vocab_size)
    return [(new, "val" if fingerprint(text) < val_fraction * 2**64 else "train",
             np.array(TOKENIZER.encode(text), dtype).tobytes(), len(text.encode("utf-8", "surrogatepass")))
            for new, text in batch]


def token_dtype(vocab_size):
    return np.dtype(np.uint16 if vocab_size <= 65536 else np.uint32)


def prepare(paths=(), **given):
    """Prepares a corpus as the command line does; the options are OPTIONS. Returns its folder."""
    if unknown := set(given) - set(OPTIONS):
        raise InputError(f"there is no option {min(unknown)}{nearest(min(unknown), OPTIONS)}")
    given = {name: checked(name, value, OPTIONS[name][1]) for name, value in given.items()}
    options = {name: default for name, (default, _, _) in OPTIONS.items()}
    options |= ({} if paths or given.get("hub") else DOCS) | given
    name, workers, start = options["name"], options["workers"], time.time()
    folder = Path(options["data_dir"], name)
    if not re.fullmatch(r"\w[\w.+-]*", name):
        raise InputError(f"--name={name!r} has to be a plain name for the corpus: letters, digits, _ . + -")
    if folder.exists() and not options["overwrite"]:
        raise InputError(f"{folder} exists; choose another --name, or say --overwrite=True.")

    if paths and options["hub"]:
        raise InputError("give either PATHs or --hub, not both.")
    if options["hub"]:
        sources, total = [f"hub:{options['hub']}"], None
        stream = functools.partial(read_hub, options["hub"], options["hub_config"], options["field"])
    elif paths:
        files = find_files(paths)
        sources, total = [str(f) for f in files], sum(f.stat().st_size * (3 if f.suffix == ".gz" else 1) for f in files)

        def stream():
            return itertools.chain.from_iterable(
                read_file(f, options["field"], options["document_per_file"]) for f in files)
    else:
        lines = list(read_docs(workers))
        sources, total = ["documentation of Python, numpy and torch"], sum(len(line or "") for line in lines)
        stream = functools.partial(iter, lines)

    options["sources"] = ", ".join(sources[:5]) + " ..." * (len(sources) > 5)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=folder.parent))  # renamed when complete
    aside = partial.with_name(partial.name + ".old")
    try:
        tokenizer = choose_tokenizer(options, stream, given)
        meta = write_tokens(partial, tokenizer, stream, options["val_fraction"], workers, total)
        if not meta["documents"]:
            raise InputError(f"there is no text in {options['sources']}.")
        seconds = time.time() - start
        versions = {"python": sys.version.split()[0], "numpy": np.__version__, "tiktoken": tiktoken.__version__}
        meta |= {"sources": sources, "encoding": options["encoding"], "versions": versions}
        ranks = tokenizer.state()["ranks"].encode()
        meta["sha256"]["tokenizer"] = hashlib.sha256(ranks).hexdigest()
        (partial / "tokenizer.tiktoken").write_bytes(ranks)
        (partial / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
        partial.chmod(0o755)
        if options["overwrite"] and folder.exists():
            os.rename(folder, aside)
        os.rename(partial, folder)
    finally:
        if aside.exists() and not folder.exists():  # interrupted between the two
            os.rename(aside, folder)
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(aside, ignore_errors=True)

    tokens, text_bytes = sum(meta["tokens"].values()), meta["bytes"]
    first = np.fromfile(folder / "train.bin", token_dtype(tokenizer.vocab_size), 30)
    tell(f"prepared {folder}: {meta['documents']:,} documents, {text_bytes / 1e6:.1f} MB, {tokens:,} tokens "
         f"({meta['tokens']['train']:,} train, {meta['tokens']['val']:,} val)\n"
         f"  {text_bytes / max(tokens, 1):.2f} bytes per token, vocabulary {tokenizer.vocab_size:,}, {seconds:.1f} s\n"
         f"  it begins: {'|'.join(tokenizer.pieces(first))!r}")
    return folder


def write_tokens(folder, tokenizer, stream, val_fraction, workers, total):
    """train.bin and val.bin, written as the text comes; returns what meta.json says about them."""
    tokens, documents, done, previous = {"train": 0, "val": 0}, 0, 0, None
    dtype = token_dtype(tokenizer.vocab_size)
    separator = np.array([tokenizer.sep_id], dtype).tobytes()
    sums = {split: hashlib.sha256() for split in tokens}
    progress = Progress("tokenising", total)
    source = pieces(stream())
    batches = iter(lambda: list(itertools.islice(source, 32)), [])
    encode = functools.partial(encode_batch, val_fraction=val_fraction)
    with open(folder / "train.bin", "wb") as train, open(folder / "val.bin", "wb") as val:

        def write(split, data):
            (train if split == "train" else val).write(data)
            sums[split].update(data)
            tokens[split] += len(data) // dtype.itemsize

        for batch in in_parallel(encode, batches, workers, set_tokenizer, (tokenizer.state(),)):
            for new, split, ids, size in batch:
                if previous and (new or split != previous):  # a document ends, or goes on in the other split
                    write(previous, separator)
                write(split, ids)
                documents, done, previous = documents + new, done + size, split
            progress(done)
        if previous:
            write(previous, separator)
    progress.end()
    return {"vocab_size": tokenizer.vocab_size, "tokens": tokens, "documents": documents, "bytes": done,
            "dtype": dtype.name, "special_ids": tokenizer.special_ids, "lowercase": tokenizer.lowercase,
            "pattern": tokenizer.pattern, "val_fraction": val_fraction,
            "sha256": {split: sums[split].hexdigest() for split in tokens}}


# --------------------------------------------------------------------------------------------------------------------
# Batches


def check_tokens(path, tokens, vocab_size, checksum):
    """Reads a split once: all ids have to be in the vocabulary, and all bytes those that were written (1 GB/s)."""
    digest = hashlib.sha256()
    for start in range(0, len(tokens), 2**24):
        part = tokens[start : start + 2**24]
        if part.max() >= vocab_size:
            raise InputError(f"{path} has the token {part.max()} at place {start + part.argmax():,}, beyond its "
                             f"vocabulary of {vocab_size:,}; prepare it again.")
        digest.update(part)
    if checksum != digest.hexdigest():
        raise InputError(f"{path} is not as meta.json says (its sha256 is {digest.hexdigest()}, not {checksum}); "
                         f"prepare it again.")


class Sequences:
    """Packed sequences of one split, exactly max_len tokens each: [CLS] and the next max_len - 1 of the corpus.

    Sequence `index` of step `step` is a pure function of (seed, step, index), whatever the number of processes, the
    accumulation, or how often the run was resumed: its tokens (each epoch is a seeded permutation), its masked
    positions, its crop and the uniform numbers that the auxiliary samples with.
    """

    def __init__(self, folder, split, max_len, masked, crop_len, seed, check=True):
        meta = read_meta(folder)
        self.path = path = Path(folder, f"{split}.bin")
        dtype = token_dtype(meta["vocab_size"])
        if not path.exists() or path.stat().st_size != meta["tokens"][split] * dtype.itemsize:
            raise InputError(f"{path} is not as meta.json says ({meta['tokens'][split]:,} tokens); prepare it again.")
        self.tokens = np.memmap(path, dtype, "r") if meta["tokens"][split] else np.zeros(0, dtype)
        if check:
            check_tokens(path, self.tokens, meta["vocab_size"], meta["sha256"][split])
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
            raise InputError(f"{self.path} has only {len(ordinary)} tokens but [CLS] and [SEP] at place {start:,} and "
                             f"behind it, and {self.masked} are to be masked; prepare it from other text.")
        masked = np.sort(random.permutation(ordinary)[: self.masked])
        crop_start = random.integers(1, self.max_len - self.crop_len + 1)
        crop = np.concatenate([tokens[:1], tokens[crop_start : crop_start + self.crop_len]])
        return {"tokens": tokens, "masked": masked, "crop": crop,
                "uniforms": random.random(self.masked, dtype=np.float32)}

    def batch(self, step, indices, batch_size):
        """The sequences of these indices of a step, stacked: tokens (B, T), masked and uniforms (B, K), crop (B, C)"""
        rows = [self.sequence(step, index, batch_size) for index in indices]
        return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def main():
    given, paths = parse_options(sys.argv[1:], OPTIONS, __doc__)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing half-written stays behind
    prepare(paths, **given)


if __name__ == "__main__":
    run_command(main)
