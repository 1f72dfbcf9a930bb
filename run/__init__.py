"""A run: settings, processes and sharding, the memory plan, the run folder and its state."""
