"""Settings of sampling. Standard library only: checked before jax."""

from typing import NamedTuple

SEEDS = range(1 << 32)


class Sampling(NamedTuple):
  """How the next token is drawn.

  temperature: of the softmax; 0: the most likely token (greedy)
  top_k: the number of most likely tokens kept; 0: all
  top_p: keep the fewest most likely tokens whose probabilities, after
    temperature and top_k, sum to it or more
  """

  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0

  def check(self) -> None:
    """Raises ValueError for a setting out of its range."""
    if not 0 <= self.temperature < float('inf'):
      raise ValueError(
        f'temperature is {self.temperature}; give 0 (greedy) or more'
      )
    if self.top_k < 0:
      raise ValueError(f'top_k is {self.top_k}; give 0 (all tokens) or more')
    if not 0 < self.top_p <= 1:
      raise ValueError(f'top_p is {self.top_p}; give more than 0, up to 1')
