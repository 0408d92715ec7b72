"""Every pair of flags of `fastlm train` trains, or is refused by name, and none is left out without a word."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path

import flag_pairs
import pytest
import torch
from flag_pairs import Outcome, Pair, Walk


@pytest.fixture(scope="module")
def walk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Walk]:
    with pytest.MonkeyPatch.context() as patch, flag_pairs.quick():
        patch.chdir(tmp_path_factory.mktemp("walk"))
        patch.setenv("FASTLM_CACHE", str(Path("cache").absolute()))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        flag_pairs.prepare()
        yield Walk()
        torch.set_num_threads(threads)


def test_every_flag_has_a_value_that_is_not_the_default() -> None:
    lacking = [name for name, some in flag_pairs.values().items() if not some]
    assert not lacking, f"flag_pairs.VALUES gives a value of {lacking}"


def drawn(config: pytest.Config, count: int) -> list[Pair]:
    seed = config.getoption("--grid-seed")
    print("seed", seed)
    return random.Random(seed).sample(flag_pairs.pairs(), count)


def check(walk: Walk, some: list[Pair]) -> None:
    faults = [(one, two, why) for one, two in some if (why := walk.pair(one, two))]
    assert not faults, "\n".join(map(str, faults))


def test_some_pairs_of_flags_train_or_are_refused_by_name(walk: Walk, pytestconfig: pytest.Config) -> None:
    check(walk, [pair for pair in drawn(pytestconfig, 12) if ("compile", True) not in pair])


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_more_pairs_of_flags_do_too(walk: Walk, pytestconfig: pytest.Config) -> None:
    check(walk, drawn(pytestconfig, 400 if pytestconfig.getoption("--grid-part") >= 1 else 40))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_flag_alone_shows_or_is_said_to_be_of_no_effect(walk: Walk) -> None:
    singles = [(name, value) for name, some in flag_pairs.values().items() for value in some]
    faults = [(one, why) for one in singles if (why := walk.single(one))]
    assert not faults, "\n".join(map(str, faults))


def test_the_walk_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """A walk over made-up outcomes: what is left out, refused namelessly or ends otherwise is a fault."""
    ran = Outcome(0, "", "", "1")
    outcomes = {(): ran}
    monkeypatch.setattr(flag_pairs, "run", lambda changes: outcomes[tuple(changes)])

    def fault(first: Outcome, second: Outcome, both: Outcome) -> str:
        one, two = ("clip", 2.0), ("lr", 1.0)
        outcomes.update({(one,): first, (two,): second, (one, two): both})
        return Walk().pair(one, two)

    lone, other, two = (Outcome(0, "", "", name) for name in "234")
    assert not fault(lone, other, two)
    assert fault(lone, other, other) == "--clip is left out without a word"
    assert not fault(lone, other, Outcome(0, "", "--clip is of no effect here", "3"))
    for text, fine in itertools.product(("no", "--clip", "--lr and --clip"), (True, False)):
        no = Outcome(2, "", f"fastlm train: {text}")
        refused = fault(lone if fine else no, other, no)
        assert bool(refused) == (text != "--lr and --clip" if fine else text == "no"), (text, fine)
    assert fault(lone, other, Outcome(1, "", "", fault="exit status 1")) == "exit status 1"
