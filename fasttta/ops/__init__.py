"""Operations: one file each, bearing its name, declared with PyTorch's dispatcher.

A file says, in this order: schemas, fakes, the reference in plain PyTorch, autograd, and which
arguments suit the kernels. ``registry`` is how one is declared, ``native`` builds the C++ kernels.
"""
