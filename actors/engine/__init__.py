"""Answers of one loaded model with any set of decoder layers switched off."""
