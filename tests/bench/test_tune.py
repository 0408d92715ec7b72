"""``fastlm bench --tune`` under Triton's interpreter with a timer that knows the answer: what it tries, refuses and writes."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

pytest.importorskip("triton")
from fastlm.bench import tune
from fastlm.bench.__main__ import main
from fastlm.kernels import _attention_trials as attention_trials
from fastlm.kernels import dropout_add_norm as kernel
from fastlm.kernels import table

ON = {"device": "NVIDIA X", "date": "2026-01-02", "versions": {"torch": "t", "triton": "v"}}
NARROW = {"elements": 64, "num_warps": 1, "num_stages": 1}
WIDE = {"elements": 512, "num_warps": 2, "num_stages": 1}
TILES = {"columns": 32, "num_warps": 1, "num_stages": 1}
CONFIGS = (NARROW, WIDE, TILES)


@pytest.fixture
def path(tmp_path, monkeypatch):
    """A copy of the committed table, which the look-ups read."""
    copy = shutil.copy(table._PATH, tmp_path / "table.json")
    monkeypatch.setattr(table, "_PATH", tmp_path / "table.json")
    monkeypatch.setattr(tune, "ROUNDS", 1)
    table.forget()
    yield copy
    monkeypatch.undo()
    table.forget()


class Timer:
    """Seconds by the configuration that is pinned while the call runs; it runs it too."""

    def __init__(self, fastest):
        self.fastest, self.timed = fastest, []

    def __call__(self, call):
        call()
        config = call.__defaults__[0]
        self.timed.append(config)
        return 1.0 if config == self.fastest else 2.0


def _trial(direction="forward", norm="layer", p=0.1):
    return kernel._trial(direction, 64, torch.float32, norm, p, CONFIGS, rows=3)


@pytest.mark.grid(fast=1)
@pytest.mark.interpreter
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("norm,p", [("layer", 0.1), ("rms", 0.0)])
def test_the_fastest_right_candidate_goes_above_the_standing_rules(path, direction, norm, p):
    trial = _trial(direction, norm, p)
    look_up = dict(arch=90, dtype="f32", size=64, features=trial.features)
    planned, others = table.rules(trial.kernel), json.loads(path.read_text())
    counts = tune.tune([trial], path, "cpu", 90, Timer(TILES), ON, 60)
    assert counts == {"changed": 1, "stayed": 0, "not run": 0}
    assert table.config(trial.kernel, **look_up) == TILES
    rules = json.loads(path.read_text())
    assert rules[trial.kernel][0]["measured"] == ON | {"us": 1e6}
    assert rules[trial.kernel][1:] == planned
    assert {k: v for k, v in rules.items() if k != trial.kernel} == {
        k: v for k, v in others.items() if k != trial.kernel
    }
    # a call with any other feature is none of the measured ones
    assert table.config(trial.kernel, **{**look_up, "features": trial.features | {"layerscale"}}) != TILES
    # a second run takes the first one's place
    tune.tune([trial], path, "cpu", 90, Timer(WIDE), ON, 60)
    assert table.config(trial.kernel, **look_up) == WIDE
    assert len(json.loads(path.read_text())[trial.kernel]) == len(planned) + 1


@pytest.mark.interpreter
def test_what_is_wrong_or_fails_is_not_timed_and_says_so(path, monkeypatch, capsys):
    right = kernel.forward

    def broken(*args):
        config = table._pinned[-1][0]["config"]
        if config == WIDE:
            raise RuntimeError("out of resources")
        y, *rest = right(*args)
        return (y * 1.01 if config == NARROW else y), *rest

    monkeypatch.setattr(kernel, "forward", broken)
    timer = Timer(NARROW)
    tune.tune([_trial()], path, "cpu", 90, timer, ON, 60)
    assert NARROW not in timer.timed
    assert WIDE not in timer.timed
    assert TILES in timer.timed
    said = capsys.readouterr().out
    assert "out of resources" in said
    assert "wrong by 1.0e-02" in said


@pytest.mark.interpreter
def test_a_gain_within_the_noise_keeps_the_standing_configuration_and_time_is_limited(path):
    standing = table.config("dropout_add_norm_forward", arch=90, dtype="f32", size=64, features=_trial().features)
    close = lambda call: 1.0 if call.__defaults__[0] == standing else 0.995
    assert tune.tune([_trial()], path, "cpu", 90, close, ON, 60)["stayed"] == 1
    before = path.read_text()
    counts = tune.tune([_trial(), _trial("backward")], path, "cpu", 90, close, ON, -1)
    assert counts == {"changed": 0, "stayed": 0, "not run": 2}
    assert path.read_text() == before


def test_measured_rules_are_compiled_offline_and_ordered_narrow_first(path):
    rules = json.loads(path.read_text())
    own = [name for name in rules if name.startswith("dropout_add_norm")]
    base = {"arch": 90, "dtype": ["bf16"], "features": ["dropout", "layer"], "exact": True, "measured": ON}
    for size in (2048, 768, 4096):
        config = {"elements": 4096, "num_warps": 8, "num_stages": 1}
        for name in own:
            rules[name] = tune.with_rule(rules[name], base | {"size": size, "config": config})
    path.write_text(tune.text_of(rules))
    table.forget()
    assert [r["size"] for r in table.rules("dropout_add_norm_forward")[:3]] == [768, 2048, 4096]
    names = [case.name for case in kernel.offline_cases()]
    assert [rule for rule in table.unreached() if rule.startswith("dropout_add_norm")] == []
    assert any("x768 bf16 measured p=0.1" in name for name in names)


ATTENTION = [
    ("attention_forward", {"dropout"}), ("attention_backward_kv", {"bias"}), ("attention_backward_q", set()),
    ("attention_decode", set()),
]  # fmt: skip


@pytest.mark.grid(fast=1)
@pytest.mark.interpreter
@pytest.mark.parametrize(
    "kernel,features", ATTENTION, ids=lambda x: x if isinstance(x, str) else "+".join(x) or "plain"
)
def test_attention_is_tuned_by_right_candidates(path, kernel, features):
    configs = tuple({"m": m, "n": n, "num_warps": 4, "num_stages": 1} for m, n in ((32, 32), (16, 64)))
    trial = attention_trials.trial(kernel, 16, torch.float32, frozenset(features), configs, length=16, heads=2)
    timer = Timer(configs[0])
    assert tune.tune([trial], path, "cpu", 90, timer, ON, 60) == {"changed": 1, "stayed": 0, "not run": 0}
    assert all(config in timer.timed for config in configs)
    look_up = dict(arch=90, dtype="f32", size=16)
    assert table.config(kernel, **look_up, features=frozenset(features)) == configs[0]
    assert table.config(kernel, **look_up, features=frozenset({"dropout", "bias"})) != configs[0]


def test_measured_rules_of_attention_are_compiled_offline(path):
    rules = json.loads(path.read_text())
    for name, features in ATTENTION:
        rule = {"arch": 90, "dtype": ["f16"], "size": 64, "features": sorted(features), "exact": True, "measured": ON,
                "config": {"m": 64, "n": 64, "num_warps": 4, "num_stages": 1}}  # fmt: skip
        rules[name] = tune.with_rule(rules[name], rule)
    path.write_text(tune.text_of(rules))
    table.forget()
    names = [case.name for case in attention_trials.offline_cases()]
    assert [rule for rule in table.unreached() if rule.startswith("attention")] == []
    assert "attention 64 f16 causal dropout: forward_kernel" in names


def test_the_candidates_cover_what_models_use_and_can_be_taken_by_the_launcher():
    trials = tune.trials([])
    assert len({t.name for t in trials}) == len(trials)
    assert {(t.direction, t.dtype) for t in trials if t.op == "dropout_add_norm" and t.size == 4096} == {
        (d, t) for d in ("forward", "backward") for t in ("bf16", "f32")
    }
    assert {(t.kernel, t.size, *t.features) for t in trials if t.op == "attention"} >= {
        (k, 128, *f)
        for k in attention_trials.CANDIDATES
        if k != "attention_decode"
        for f in ((), ("dropout",), ("bias",))
    }
    for trial in trials:
        assert 2 <= len(trial.configs) <= 16, trial.name
        for config in trial.configs:
            with table.pinned({"config": config}, "another kernel"):
                assert table.config(trial.kernel, arch=90, dtype=trial.dtype, size=trial.size, features=trial.features)
    with pytest.raises(ValueError, match="'nothing' is none of them"):
        tune.trials(["nothing"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_so_in_one_sentence(capsys):
    assert main(["--tune"]) == 2
    assert (
        capsys.readouterr().err == "fastlm bench: --tune times kernels on a CUDA device, and PyTorch finds none here\n"
    )


def test_a_pinned_rule_can_be_for_one_kernel_alone():
    rule = {"config": {"x": 1}}
    look_up = dict(arch=90, dtype="f32", size=64, features=frozenset({"layer"}))
    with table.pinned(rule, "dropout_add_norm_forward"):
        assert table.config("dropout_add_norm_forward", **look_up) == {"x": 1}
        assert table.config("dropout_add_norm_backward", **look_up) != {"x": 1}
