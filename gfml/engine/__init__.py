"""A run, whoever's it is: its directory, its loop, its processes, its curves."""
