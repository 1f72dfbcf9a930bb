"""What --method, --task and --recipe stand for: tables of settings."""
