"""What every job is made of: the run, its stages, the command line, progress."""
