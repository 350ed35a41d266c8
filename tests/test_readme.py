"""README.md: its Python snippets run as they stand, each on its own, beside a checkpoint of a few steps."""

import os
import re

import pytest

import convert
import finetune
import train
from runs import ROOT, make_corpus

README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", README, re.M | re.S)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder in which a user has pretrained and fine-tuned."""
    folder, before = tmp_path_factory.mktemp("user"), os.getcwd()
    os.chdir(folder)
    make_corpus(folder, name="toy")
    train.main("--dataset=toy --data_dir=. --layers=1 --width=32 --heads=2 --ffn_width=64 --max_steps=3 "
               "--warmup_steps=1 --batch_size=4 --eval_interval=1 --eval_batches=1 --dtype=float32".split())
    (folder / "reviews").mkdir()
    for split in ("train", "dev"):
        rows = "".join(f"{'good' if i % 2 else 'bad'}\tfilm number {i}\n" for i in range(8))
        (folder / f"reviews/{split}.tsv").write_text("label\ttext\n" + rows)
    finetune.main("--task=reviews --data_dir=. --epochs=1 --dtype=float32".split())
    yield folder
    os.chdir(before)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda snippet: snippet.splitlines()[-1].strip())
def test_a_snippet_of_readme(snippet, folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if '"hf"' in snippet:
        for package in ("safetensors", "transformers", "sentence_transformers", "datasets", "accelerate"):
            pytest.importorskip(package, reason='pip install "sentence-transformers[train]"')
        convert.main(["out/ckpt.pt", "hf"])
    names = {}
    exec(snippet, names)
    if "print" in snippet:
        assert len(eval(capsys.readouterr().out)) == 2  # a label of each text


def test_readme_has_snippets_of_every_kind():
    assert len(SNIPPETS) == 2
