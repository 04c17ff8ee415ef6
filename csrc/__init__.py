"""C++ CPU kernels, built on first use."""
