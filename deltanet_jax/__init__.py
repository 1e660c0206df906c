"""Linear-attention hybrid language models in JAX."""
