"""What the routing of a task shows: statistics and tables, pictures, and what k hot experts cover and cost."""
