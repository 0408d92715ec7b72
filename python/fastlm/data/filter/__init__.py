"""`fastlm data filter`: a filter of harmful text, learnt from labels or from a word list, with a policy in a file."""

from fastlm.data.filter.model import Filter, Verdict, load

__all__ = ["Filter", "Verdict", "load"]
