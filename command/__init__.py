"""How every command starts and ends: flags, one-line errors, whole files."""
