"""Glue from tensors to the CUDA C++ kernels in fastlm._C, one file per op."""
