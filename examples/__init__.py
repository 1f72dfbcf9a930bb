"""The method in small files, to read beside the README: plain PyTorch, NumPy, a notebook, exercises."""
