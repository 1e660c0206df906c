"""How to choose the next token. Standard library only: checked before jax."""

from typing import NamedTuple

SEEDS = range(1 << 32)


class Sampling(NamedTuple):
  """How to choose. Temperature 0 is the most likely token.

  top_k: 0 or the number of tokens kept; top_p: the most likely tokens whose
  probability reaches it are kept, after temperature and top_k.
  """

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0

  def check(self) -> None:
    """Raises ValueError for settings that mean nothing."""
    if not 0 <= self.temperature < float('inf'):
      raise ValueError(
        f'temperature is {self.temperature}; give 0 (greedy) or more'
      )
    if self.top_k < 0:
      raise ValueError(f'top_k is {self.top_k}; give 0 (all tokens) or more')
    if not 0 < self.top_p <= 1:
      raise ValueError(f'top_p is {self.top_p}; give more than 0, up to 1')
