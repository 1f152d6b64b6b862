"""Commands: one file each, submitted with `ray job submit -- python -m jobs.<name>`."""
