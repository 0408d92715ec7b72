"""The group of a text and the text itself fall on one side of the split."""

from __future__ import annotations

import os

from fastlm.data import cutting, groups


def test_a_text_s_group_has_the_mark_of_the_text() -> None:
    for text in (b"", b"abc", os.urandom(100)):
        assert groups.mark(groups.group_of(text)) == cutting.mark(text)


def test_any_other_name_is_a_group_too() -> None:
    for name in ("cluster-17", "ABCDEF0123456789", "\ud800"):
        assert groups.mark(name) == cutting.mark(name.encode("utf-8", "surrogatepass"))
