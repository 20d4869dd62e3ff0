"""A small task of texts: which package a docstring is from, by the first 40 words of it.

Six packages that come with backtrail or with torch, 800 or so docstrings of each; words are hashed
to numbers. What is read depends on the versions installed, which `about` tells.
"""

import ast
import re
import zlib
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

PACKAGES = "torch", "numpy", "scipy", "polars", "sympy", "networkx"
WORDS, LENGTH, FEWEST, WIDTH, WANTED = 2048, 40, 10, 16, 800


def about() -> str:
    """The packages and their versions."""
    return ", ".join(f"{name} {version(name)}" for name in PACKAGES)


@cache
def rows() -> tuple[Tensor, Tensor]:
    """Numbers of words `[row, word]`, 0 behind the last, and numbers of packages `[row]`."""
    found = [(text, place) for place, name in enumerate(PACKAGES) for text in _texts(name)]
    numbers = torch.zeros(len(found), LENGTH, dtype=torch.int64)
    for row, (words, _) in enumerate(found):
        for place, word in enumerate(words[:LENGTH]):
            numbers[row, place] = 1 + zlib.crc32(word.encode()) % (WORDS - 1)
    return numbers, torch.tensor([place for _, place in found])


def _texts(name: str) -> list[list[str]]:
    """Docstrings of files in a fixed random order, until there are enough."""
    spec = find_spec(name)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    root, found = Path(spec.submodule_search_locations[0]), []
    files = sorted(file for file in root.rglob("*.py") if "test" not in str(file.relative_to(root)))
    for place in np.random.default_rng(0).permutation(len(files)):
        found += _of_file(files[place])
        if len(found) >= WANTED:
            break
    return found


def _of_file(file: Path) -> list[list[str]]:
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return []
    nodes = (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef)))
    texts = (re.findall("[a-z]+", (ast.get_docstring(node) or "").lower()) for node in nodes)
    return [words for words in texts if len(words) >= FEWEST]


class Bag(nn.Module):
    """The mean of learned vectors of the words, a hidden layer, and a score for every package."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.embed, self.middle = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, len(PACKAGES))

    def forward(self, words: Tensor) -> Tensor:
        """[slot, word] to [slot, package]."""
        real = (words > 0).unsqueeze(-1)
        mean = (self.embed(words) * real).sum(1) / real.sum(1)
        scores: Tensor = self.head(gelu(self.middle(mean)))
        return scores
