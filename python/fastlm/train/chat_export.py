"""A run's chat template in what is exported of it: transformers' chat_template.jinja, llama.cpp's, and fastlm's own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fastlm.data import chat
from fastlm.data import tokenizer as tokenizers

NAMES = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>")
# As `chat.Template` writes it: behind the token by which every text begins, each answer with the token that ends it.
_PLAIN = """
{{- END }}
{%- set names = NAMES %}
{%- for message in messages %}
    {%- if message['role'] not in names %}
        {{- raise_exception('the role ' + message['role'] + ' is none of ' + names | join(', ')) }}
    {%- endif %}
    {{- ('' if loop.first else '\\n\\n') + names[message['role']] + ':\\n' + message['content'] }}
    {%- if message['role'] == 'assistant' %}
        {{- END }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- ('\\n\\n' if messages else '') + 'Assistant:\\n' }}
{%- endif %}
"""


def jinja(template: str, tokenizer: Mapping[str, Any]) -> str:
    """The template of a specification in Jinja, for texts of a tokenizer of the specification `tokenizer`."""
    found = json.loads(template)
    if found["kind"] == "jinja":
        return str(found["template"])
    return _PLAIN.strip().replace("END", _literal(_end(tokenizer))).replace("NAMES", json.dumps(chat.NAMES))


def _literal(text: str) -> str:
    return "'" + text.encode("unicode_escape").decode().replace("'", "\\'") + "'"


def _end(spec: Mapping[str, Any]) -> str:
    """How the token that ends a text is written in one."""
    if spec["kind"] == "bytes":
        return "\0"
    if spec["kind"] != "bpe":
        return NAMES[0]
    content, eot = json.loads(spec["content"]), tokenizers.load(dict(spec)).eot
    return next((str(t["content"]) for t in content.get("added_tokens", ()) if t["id"] == eot), NAMES[0])


def files(template: str, tokenizer: Mapping[str, Any] | None, to: str) -> dict[str, Any]:
    """What of the template goes into an exported folder, by the names of its files; what is a dict is added to the JSON there.

    `template` is a specification of `chat.resolve`, or "" for a model of no conversations.
    """
    if not template or tokenizer is None:
        return {}
    own = {"config.json": {"chat_template": template}}  # fastlm reads it back
    if to != "hf":
        return own
    return {
        **own,
        "chat_template.jinja": jinja(template, tokenizer),
        "tokenizer_config.json": json.loads(template).get("tokens", {}),
    }
