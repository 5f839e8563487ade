"""bsjax: the batch-size laboratory in JAX."""

__version__ = "0.1.0"
