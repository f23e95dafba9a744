"""MCL: mixed-centric loss for collaborative filtering, with gravity and mixed modes."""
