"""GFML core: metric learning with a gravity function.

Importing this package does no work; import the part you need, for example
``from gfml.gravity import Gravity``.
"""

__version__ = "0.1.0"
