"""--help: in groups, one a dataclass of the configuration, with examples at its end, readable at 80 columns."""

from __future__ import annotations

import dataclasses
import re
import shlex

import pytest
from fastlm.cli import main as cli
from fastlm.data.augment import Augment
from fastlm.train.config import Config

GROUPS = {group.name: group.default_factory for group in dataclasses.fields(Config)}  # type: ignore[misc]
COMMANDS = {
    "train": GROUPS,
    "plan": GROUPS,
    "energy": {},
    "generate": {},
    "eval": {},
    "export": {},
    "soup": {},
    "inspect": {},
    "compare": {},
    "data prepare": {"data": GROUPS["data"]},
    "data show": {"data": GROUPS["data"]},
    "data augment": {"how": Augment},
    "data filter": {},
    "data pairs": {},
    "review": {},
}


def help_of(command: str, width: int, patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    patch.setenv("COLUMNS", str(width))
    with pytest.raises(SystemExit) as end:
        cli.main([*command.split(), "--help"])
    assert not end.value.code
    return capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_grouped_and_ends_with_examples(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = help_of(command, 80, monkeypatch, capsys)
    assert text.startswith(f"usage: fastlm {command} ")
    assert max(map(len, text.splitlines())) <= 80
    boxes = re.findall(r"╭─ (.*?) ─+╮\n(.*?)╰", text, re.S)
    assert [title for title, _ in boxes if title.removesuffix(" options") in COMMANDS[command]] == [
        f"{name} options" for name in COMMANDS[command]
    ]
    for title, body in boxes:
        if kind := COMMANDS[command].get(title.removesuffix(" options")):
            named = re.findall(r"^│ --([a-z-]+)", body, re.M)
            own = [field.name.replace("_", "-") for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
            assert named == own
    _, _, examples = text.partition("\nexamples:\n")
    lines = examples.splitlines()
    assert len(lines) >= 1
    for line in lines:
        words = shlex.split(line, comments=True)
        assert " ".join(words).startswith(f"fastlm {command}")
        for flag in (word for word in words if word.startswith("--")):
            assert re.search(rf"[│ ]{flag}[, ]", text.partition("\nexamples:\n")[0]), flag


def test_help_is_whole_on_a_narrow_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = help_of("train", 20, monkeypatch, capsys)
    assert "--lr" in text
    assert "examples:" in text


def test_flags_of_a_group_need_no_prefix_and_wrong_ones_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--optim.lr", "1"], ["--model.layers", "2"]):
        with pytest.raises(SystemExit) as end:
            cli.main(["train", *words])
        assert end.value.code == 2
        assert words[0] in capsys.readouterr().err
