"""What routing counts say: tables, overlap, advice, pictures."""
