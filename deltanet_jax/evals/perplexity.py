"""Loss and bits per byte on held-out text, or on any."""

import math
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp

from deltanet_jax.data.rows import Rows
from deltanet_jax.model import HybridLM
from deltanet_jax.parallel import sharding
from deltanet_jax.train import log, step as steps


class Score(NamedTuple):
  """Sums over the targets that were scored."""

  nats: float
  tokens: int
  ends: int  # of these tokens, ends of a document

  @property
  def loss(self):
    """Nats per token."""
    return self.nats / self.tokens

  @property
  def perplexity(self):
    """e^loss; of a model that diverged, inf."""
    try:
      return math.exp(self.loss)
    except OverflowError:
      return math.inf

  def bits_per_byte(self, size):
    """Bits per byte of a text of `size` bytes that these targets spell."""
    return self.nats / math.log(2) / size


def evaluate(total_loss, params, batches, place, eod):
  """The `Score` of batches as `TextData.heldout_batches` gives them.

  total_loss: jitted (params, batch) -> nats   place: host batch -> device batch
  eod: the id that ends a document
  """
  nats, tokens, ends = 0.0, 0, 0
  for batch in batches:
    batch = place(batch)  # may be rows that other processes hold
    # the sum over batches is kept on the host in float64
    nats += float(jax.device_get(total_loss(params, batch)))
    counts = jax.device_get(_counts(batch['weights'], batch['targets'], eod))
    tokens, ends = tokens + int(counts[0]), ends + int(counts[1])
  return Score(nats, tokens, ends)


@jax.jit
def _counts(weights, targets, eod):
  """How many targets are scored, and of these, how many are `eod`."""
  scored = weights > 0
  return jnp.sum(scored), jnp.sum(scored & (targets == eod))


def score_documents(cfg, params, documents, tokenizer, **how):
  """The `Score` of `Document`s; arguments as of `over_documents`."""
  return add_up(
    over_documents(steps.make_loss, cfg, params, documents, tokenizer, **how),
    tokenizer.eod,
  )


def add_up(scored, eod):
  """The `Score` of pairs (host batch, nats of its targets with weight)."""
  nats, tokens, ends = 0.0, 0, 0
  for batch, one in scored:
    nats += float(one)  # in float64
    tokens += int(batch['weights'].sum())
    ends += int(batch['weights'][batch['targets'] == eod].sum())
  return Score(nats, tokens, ends)


def over_documents(
  make,
  cfg,
  params,
  documents,
  tokenizer,
  *,
  dtype,
  mesh,
  seq_len,
  batch,
  stream=None,
):
  """Yields (batch, what the model makes of it) over `Document`s, packed into
  rows as in training.

  make: (cfg, dtype) -> the function (params, batch) -> arrays
  cfg: ModelConfig   params: on `mesh`   dtype: of the computation
  batch: rows at a time, a multiple of mesh.data x mesh.fsdp

  Every token of a document and the end after it is predicted once, from what
  comes before it in its document and in its row of `seq_len` tokens. How far
  it is shows on `stream`, stderr unless given.
  """
  ids = tokenizer.encode_documents(documents)
  rows = Rows(ids, tokenizer.eod, tokenizer.vocab_size, seq_len)
  places = sharding.param_shardings(HybridLM(cfg), mesh)
  home = sharding.batch_sharding(mesh)
  call = jax.jit(make(cfg, jnp.dtype(dtype)), in_shardings=(places, home))
  for one in _shown(rows, batch, stream or sys.stderr):
    with jax.set_mesh(mesh):
      found = jax.device_get(call(params, jax.device_put(one, home)))
    yield one, found


def _shown(rows, size, stream):
  """rows.batches(size), telling after each how much of all it was."""
  done, live = 0, stream.isatty()
  told = begun = time.perf_counter()
  for batch in rows.batches(size):
    yield batch
    # the caller has waited for its loss
    done += int(batch['weights'].sum())
    now = time.perf_counter()
    if done < rows.tokens and now - told < 1:
      continue
    told, rate = now, done / (now - begun)
    left = log.span((rows.tokens - done) / rate)
    text = f'{done:,}/{rows.tokens:,} tokens  {rate:,.0f} tokens/s  {left} left'
    if live and done < rows.tokens:
      stream.write('\r' + text.ljust(70))
    else:
      stream.write(('\r' if live else '') + text.ljust(70 * live) + '\n')
    stream.flush()


def make_token_nats(cfg, dtype):
  """The function (params, batch) -> nats of every target, [B,T] float32.

  cfg: ModelConfig   batch: as for `step.make_loss`, whose sum of weights times
  nats is linear in the weights: the nats are its gradient by them, and no more
  than a block's logits are held. Padding has nats too; its segment is 0.
  """
  loss = steps.make_loss(cfg, dtype)

  def weighted(weights, params, batch):
    return loss(params, batch | {'weights': weights})

  def token_nats(params, batch):
    weights = jnp.ones(batch['targets'].shape, jnp.float32)
    return jax.grad(weighted)(weights, params, batch)

  return token_nats
