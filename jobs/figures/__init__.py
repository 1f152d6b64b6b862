"""Figures, drawn from recorded rows."""
