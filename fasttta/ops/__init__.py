"""Operations: one name each, registered with PyTorch's dispatcher.

``schema`` defines them, ``reference`` states them in plain PyTorch, ``composite`` is the default
implementation on every device, ``autograd`` makes them differentiable.
"""
