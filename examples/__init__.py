"""The method in other clothes, to read beside the README."""
