"""lmeff: efficient language models in JAX. Any composition is one config, proven equal to the plain model."""

__version__ = "0.1.0"
