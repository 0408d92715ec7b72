"""Glue from tensors to the C++ kernels for CPUs in fastlm._C, one file per op."""
