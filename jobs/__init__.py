"""Decide: one file per command submitted with `ray job submit -- python -m jobs.<name>`."""
