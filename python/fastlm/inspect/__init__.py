"""`fastlm inspect`: what a language model does with one text, by hooks on the model itself."""

from fastlm.inspect.anatomy import Anatomy, find
from fastlm.inspect.views import attention, goals_of, lens, saliency, surprise

__all__ = ["Anatomy", "attention", "find", "goals_of", "lens", "saliency", "surprise"]
