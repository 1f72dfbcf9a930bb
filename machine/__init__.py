"""The machine: its processes and devices, and whether a model fits into its memory."""
