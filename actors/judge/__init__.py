"""The judge: what it is asked, how its output is read, when it is asked again, and the controls that it must pass."""
