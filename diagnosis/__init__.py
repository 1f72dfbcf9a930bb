"""Did the experts train, merge and load? What moved in an adapter or a merged checkpoint, and what is wrong."""
