"""The search: its space, stages, rows and budget."""
