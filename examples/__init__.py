"""The method without PyTorch, to read beside the README."""
