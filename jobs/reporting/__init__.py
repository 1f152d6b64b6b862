"""Pages, figures and model cards from recorded rows."""
