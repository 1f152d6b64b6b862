"""The configuration: one schema, one default per field."""
