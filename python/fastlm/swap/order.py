"""All rules of swap, in the order in which they are asked and edit source.

The order is part of what a seed means: places that draw random numbers are numbered as rules edit. New rules that draw
come last.
"""

from __future__ import annotations

from fastlm.swap.attention import AttentionRule
from fastlm.swap.blocks import BlockRule
from fastlm.swap.dropout import DropoutRule
from fastlm.swap.functional import FunctionalNormRule
from fastlm.swap.interface import InterfaceRule
from fastlm.swap.multihead import EncoderLayerRule, MultiheadRule
from fastlm.swap.norms import NormRule
from fastlm.swap.rules import Rule
from fastlm.swap.written import WrittenAttentionRule

RULES: tuple[Rule, ...] = (
    AttentionRule(),
    NormRule(),
    DropoutRule(),
    BlockRule(),
    FunctionalNormRule(),  # after blocks, which read some of these norms as ends of their chains
    InterfaceRule(),
    MultiheadRule(),
    EncoderLayerRule(),
    WrittenAttentionRule(),
)


def rule_named(name: str) -> Rule:
    """The rule of that name. Raises LookupError."""
    for rule in RULES:
        if rule.name == name:
            return rule
    raise LookupError(f"fastlm.swap has no rule {name!r}; it has {', '.join(rule.name for rule in RULES)}")
