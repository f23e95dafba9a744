"""Contextual similarity: image retrieval trained on who a picture's neighbours are."""
