"""Machine code for CPUs: arrays in, arrays out. Importing these modules imports numba: do it where they are used."""
