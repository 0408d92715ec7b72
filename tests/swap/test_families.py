"""swap: families of transformers, promise held against calls; docs/transformers.md holds what the walk over all found."""

from __future__ import annotations

import random
import re

import pytest

pytest.importorskip("transformers")
import families
import transformers

POPULAR = {"llama": 2, "gpt2": 2, "bert": 2, "t5": 6, "mixtral": 2, "gpt_oss": 2, "deepseek_v3": 2, "modernbert": 2}


def rows():
    """The page's rows by family: (made as, attention served, norms, fused blocks)."""
    found = re.findall(r"^\| ([\w-]+) \| (\w+) \| (\d+ of \d+) \| (\d+) \| (\d+) \|", families.PAGE.read_text(), re.M)
    return {name: tuple(rest) for name, *rest in found}


@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()


@pytest.mark.parametrize("name", POPULAR)
def test_popular_families_are_served_whole(name):
    family = families.walk(name)
    assert (family.served, family.attentions, family.broken) == (POPULAR[name], POPULAR[name], "")


@pytest.mark.slow
def test_the_page_says_what_a_walk_finds(request):
    known = rows()
    assert len(known) > 150
    drawn = random.Random(request.config.option.grid_seed).sample(sorted(known), 12)
    whole = request.config.getoption("--grid-part") >= 1
    same = f"transformers {transformers.__version__}," in families.PAGE.read_text()
    wrong = []
    for name in sorted(known) if whole else drawn:
        family = families.walk(name)
        told = (family.kind, f"{family.served} of {family.attentions}", str(family.norms), str(family.fused))
        if family.broken or (same and told != known[name]):
            wrong.append((name, family.broken, told, known[name]))
    assert not wrong
