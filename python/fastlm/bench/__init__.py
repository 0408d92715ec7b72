"""Measuring fastlm: the cases of ``bench/bench_*.py``, timed in turn beside their baselines."""
