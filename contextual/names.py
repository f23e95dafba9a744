"""Names of losses and ablations, as flags spell them. Imports nothing heavy: the command line reads them."""

from __future__ import annotations

from gfml.base.errors import choice_error

# The two published programs: 256 x 256 pixels (contextual/main.py) and 224 x 224 pixels (contextual/train.py).
PIPELINES = ("256", "224")
# What --lam weighs: the contextual term (256) or the contrastive one (224).
LAM_CONVENTIONS = ("context", "contrast")
# How losses other than hybrid take the similarity regulariser.
REGULARISE = ("none", "additive", "convex")
BACKENDS = ("fused", "reference")

LOSSES = {
    "hybrid": "contextual loss with contrastive loss and similarity regulariser",
    "contextual": "contextual loss alone",
    "contrastive": "pairs beyond their margins",
    "triplet": "triplets from distance-weighted sampling",
    "ms": "Multi-Similarity on all pairs",
    "ms+miner": "Multi-Similarity on mined pairs",
    "proxy-anchor": "Proxy-Anchor",
    "proxy-nca": "Proxy-NCA with the positive in the denominator",
    "normalized-softmax": "softmax over cosines",
    "cosface": "softmax over cosines with an additive margin",
    "nt-xent": "normalised temperature-scaled cross-entropy, all positives",
    "fast-ap": "average precision by a histogram of distances",
    "smooth-ap": "average precision with sigmoid ranks",
    "smooth-ap+contrastive": "half smooth-ap, half contrastive",
    "softbin-ap": "average precision by triangular bins",
    "softbin-ap+contrastive": "half softbin-ap, half contrastive",
    "sup-ap": "ROADMAP's upper bound of 1 - AP",
    "roadmap": "half sup-ap, half contrastive",
}
# Losses with weights of their own, one row per training class.
HAS_PROXIES = frozenset({"proxy-anchor", "proxy-nca", "normalized-softmax", "cosface"})
# Spellings of the published programs.
ALIASES = {
    **{name.capitalize(): name for name in ("hybrid", "contextual", "contrastive", "roadmap", "triplet")},
    "MS": "ms", "multisimilarity": "ms", "MS+miner": "ms+miner", "Proxy_Anchor": "proxy-anchor",
    "Proxy_NCA": "proxy-nca", "proxynca": "proxy-nca", "NormalizedSoftmax": "normalized-softmax",
    "normsoftmax": "normalized-softmax", "CosFace": "cosface", "ntxent": "nt-xent", "smoothap": "smooth-ap",
    "fastap": "fast-ap",
}  # fmt: skip
# Variants of the contextual similarity, in the order of the published list (its ids 0 to 10).
ABLATIONS = {
    "none": "the method as it is",
    "neighbours": "step 1 alone: the neighbourhood mask, slack 1e-5",
    "neighbours-sigmoid": "step 1 alone with a sigmoid of temperature 0.01, slack 1e-5",
    "intersection": "steps 1 and 2: no expansion, not symmetrised",
    "intersection-inside": "steps 1 and 2, common neighbours only",
    "minimum": "minimum in place of every product",
    "sigmoid": "sigmoid of temperature 0.01 in place of the step",
    "inside": "common neighbours only: common strangers do not count",
    "no-intersection": "the mask itself in place of the intersection measure",
    "detach-expansion": "no gradient through the size of the mutual neighbourhood",
    "detach-nothing": "gradient through the sizes of neighbourhoods too",
}


def canonical(name: str) -> str:
    """The name in :data:`LOSSES`; a UserError for an unknown one."""
    found = ALIASES.get(name, name)
    if found not in LOSSES:
        raise choice_error("loss", name, known_names())
    return found


def known_names() -> tuple[str, ...]:
    """Every accepted spelling of a loss."""
    return (*LOSSES, *ALIASES)


def describe_lam(convention: str) -> str:
    """What ``--lam`` and ``--gamma`` mean."""
    if convention == "context":
        return "lam weighs the contextual term: lam contextual + (1 - lam - gamma) contrastive + gamma regulariser"
    return "lam weighs the contrastive term: (1 - lam) contextual + lam contrastive + gamma regulariser"
