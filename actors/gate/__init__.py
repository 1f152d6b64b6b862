"""What a new checkpoint must pass before it appears."""
