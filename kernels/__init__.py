"""Triton kernels. They import torch, triton and each other, nothing of fasttta."""
