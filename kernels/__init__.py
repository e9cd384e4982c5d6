"""Triton kernels, each operation with its torch reference; no other room imports triton."""
