"""`fastlm review`: outputs and tasks that people judge on a page of their own machine, kept in one database."""

from fastlm.data.review.items import Item
from fastlm.data.review.store import Conflict, Judgement, Store

__all__ = ["Conflict", "Item", "Judgement", "Store"]
