"""Triton kernels, one operation a file with its torch reference; no other room imports triton."""
