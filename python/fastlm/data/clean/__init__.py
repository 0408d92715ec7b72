"""`fastlm data clean`: a corpus without junk, copies and personal data, as a list of datatrove's blocks."""

from fastlm.data.clean.options import CleanOptions

__all__ = ["CleanOptions"]
