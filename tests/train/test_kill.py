"""kill -9 at random instants, a save included: the run that goes on ends as the one never killed, byte for byte.

Two ways to choose the instant: by the clock, from another process, anywhere between the start of the interpreter and the
end of the run; and before the n-th file operation (a write torn in its middle, a sync, a rename, a link, a removal), which
reaches every state that a save can leave on disk. Processes come from a fork server (kill_worker.py) that has imported fastlm.

The grid kills 200 times: optimizers by dtypes, alone and on two ranks (data parallel, sharded, tensor parallel, a pipeline),
every other time beside busy processes. All else that the state of a run consists of is drawn by the number of the case.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from pathlib import Path

import killing
import pytest

WORDS = """
    book.txt --layers 2 --heads 2 --width 32 --context 16 --batch 4 --micro 2 --dropout 0.1 --ema 0.9 --lr 1e-2 --warmup 2
    --steps 40 --save-every 3 --eval-every 5 --eval-tokens 512 --sample 8 --keep 2 --keep-every 9 --device cpu --threads 1
    --quiet
""".split()  # noqa: SIM905
SMALL = """
    book.txt --layers 2 --heads 2 --width 32 --context 16 --batch 4 --lr 1e-2 --warmup 2 --steps 24 --eval-tokens 256
    --device cpu --threads 1 --quiet
""".split()  # noqa: SIM905
KILLS = 5  # of a case of the grid
KINDS = [(optimizer, dtype) for dtype in ("float32", "bfloat16", "float16") for optimizer in ("adamw", "lion", "muon")]
MESHES = ("dp=2", "fsdp=2", "tp=2", "pp=2")
CASES = [(*KINDS[i % 9], "") for i in range(20)] + [
    (*KINDS[(i // 4 * 2 + i % 4) % 9], MESHES[i % 4]) for i in range(20)
]
BUSY = 2


@pytest.fixture
def place(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[killing.Place]:
    with killing.fork_server(tmp_path / "cache") as server:
        yield killing.Place(tmp_path, [*WORDS, "--kernels", request.param], server)


@pytest.mark.parametrize("place", ["torch"], indirect=True)
def test_a_run_killed_anywhere_ends_as_the_run_never_killed(place: killing.Place) -> None:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    killing.kill_and_go_on(place, 3, random.Random(seed))
    # the comparison can fail: the same run with a rate that differs in its sixth digit after a kill in its middle
    assert place.attempt("other", operations={0: place.operations[0] // 2}) == [-signal.SIGKILL]
    assert place.attempt("other", "--lr", "0.01000001") == [0], place.said()
    with pytest.raises(AssertionError, match="step 36 model"):
        place.check("other")


@pytest.mark.slow
@pytest.mark.parametrize("place", ["torch", "fused"], indirect=True)
def test_twenty_kills_and_more(place: killing.Place) -> None:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    killing.kill_and_go_on(place, 24, random.Random(seed))


def words_of(case: int, folder: Path) -> list[str]:
    """The flags of a case: optimizer, dtype and mesh by its place in CASES, all others drawn by its number."""
    optimizer, dtype, mesh = CASES[case]
    draw = random.Random(case)
    one_of = {
        "kernels": ["fused", "torch"],
        "style": ["gpt2", "llama"],
        "micro": [1, 2] if mesh != "pp=2" else [1],
        "ema": [0, 0.9],
        "dropout": [0, 0.2],
        "recompute": ["none", "half", "full"],
        "packing": ["blocks", "documents"] if mesh in ("", "dp=2", "fsdp=2") else ["blocks"],
        "ramp": [0, 8],
        "smoothing": [0, 0.1],
        "z-loss": [0, 1e-4],
        "schedule": ["cosine", "wsd"],
        "spike": [0, 1.05],
        "save-every": [2, 3, 5],
        "eval-every": [0, 4, 5],
        "sample": [0, 8],
        "keep": [1, 3],
        "keep-every": [0, 6],
    }
    words = [*SMALL, "--optimizer", optimizer, "--dtype", dtype, *(["--mesh", mesh] if mesh else [])]
    for flag, values in one_of.items():
        words += [f"--{flag}", str(draw.choice(values))]
    return [*words, "--val", f"more={folder}/more.txt"] if draw.random() < 0.5 else words


@pytest.mark.slow
@pytest.mark.timeout(1800)  # two ranks, five kills and two busy processes on two cores
@pytest.mark.grid(of=0.25)  # a tenth in CI, which draws 40% of the grids
@pytest.mark.parametrize(
    "case", range(len(CASES)), ids=[f"{i}-{'-'.join(filter(None, c))}" for i, c in enumerate(CASES)]
)
def test_two_hundred_kills(case: int, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    seed = f"{request.config.getoption('--grid-seed')} {case}"
    words = words_of(case, tmp_path)
    print("seed", seed, *words)
    (tmp_path / "more.txt").write_text("".join(f"more of line {i % 41} and {i * 7 % 19}\n" for i in range(300)))
    with killing.fork_server(tmp_path / "cache") as server:
        place = killing.Place(tmp_path, words, server, ranks=2 if CASES[case][2] else 1)
        compared = killing.kill_and_go_on(place, KILLS, random.Random(seed), BUSY)
    print(f"{KILLS} kills, {compared} runs equal; one takes {place.seconds:.1f} s")


def test_the_grid_kills_two_hundred_times_over_all_kinds() -> None:
    assert len(CASES) * KILLS == 200
    assert {case[:2] for case in CASES} == set(KINDS) == {case[:2] for case in CASES if not case[2]}
    assert {case[2] for case in CASES} == {"", *MESHES}
    for mesh in MESHES:
        assert len({case[:2] for case in CASES if case[2] == mesh}) == 5
        assert {case[0] for case in CASES if case[2] == mesh} == {"adamw", "lion", "muon"}
