"""Rules that turn text into a verdict, and the sandbox that runs model-written code."""
