"""Prints that must not raise: another encoding, a full disk, a closed pipe, no stream at all."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import pytest
from fastlm import console


@pytest.fixture(autouse=True)
def _nothing_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console.Lasting, "_lost", set())


def test_what_an_encoding_lacks_becomes_a_question_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    console.say("a – b")
    assert raw.getvalue() == b"a ? b\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_said_once_on_the_other_stream(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    full = open("/dev/full", "w")  # noqa: SIM115
    monkeypatch.setattr(sys, "stdout", full)
    console.say("one")
    console.say("two")
    assert capsys.readouterr().err.count("No space left on device") == 1
    assert console.finish(0) == 0
    full.close()  # leads nowhere by now, or this would raise


def test_a_stream_that_is_closed_or_none_is_survived(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.StringIO()
    closed.close()
    for stream in (closed, None):
        monkeypatch.setattr(sys, "stdout", stream)
        console.say("text")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_stderr_is_judged_by_itself_and_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    full = open("/dev/full", "w")  # noqa: SIM115
    monkeypatch.setattr(sys, "stderr", full)
    full.write("the last words")
    assert console.finish(0) == 1
    assert capsys.readouterr().out == "fastlm: stderr: No space left on device\n"
    full.close()
    # a stream that was lost before is no news, and the other's state has no say in it
    for lost, code in (("stderr", 0), ("stdout", 1)):
        full = open("/dev/full", "w")  # noqa: SIM115
        monkeypatch.setattr(sys, "stderr", full)
        monkeypatch.setattr(console.Lasting, "_lost", {lost})
        full.write("the last words")
        assert console.finish(0) == code
        full.close()


def test_a_closed_pipe_as_stderr_fails_the_command_without_a_word(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read, write = os.pipe()
    os.close(read)
    pipe = open(write, "w")  # noqa: SIM115
    monkeypatch.setattr(sys, "stderr", pipe)
    pipe.write("the last words")
    assert console.finish(0) == 1
    assert capsys.readouterr().out == ""
    pipe.close()
