"""Small-image classification: a vision transformer with gravity attention, balanced or long-tailed data."""
