"""Hierarchical latent relations for collaborative metric learning: HLR, HLR++ and what they are compared with."""
