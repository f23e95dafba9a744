"""A program: its flags, its life, and many runs of it."""
