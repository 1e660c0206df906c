"""Loss and bits per byte on held-out text, or on any."""

import jax
import jax.numpy as jnp

from deltanet_jax.data.rows import Rows
from deltanet_jax.model import HybridLM
from deltanet_jax.objectives.next_token import make_loss
from deltanet_jax.objectives.score import add_up
from deltanet_jax.parallel import sharding
from deltanet_jax.progress import Progress


def score_documents(cfg, params, documents, tokenizer, **how):
  """The `Score` of `Document`s; arguments as of `over_documents`."""
  return add_up(
    over_documents(make_loss, cfg, params, documents, tokenizer, **how),
    tokenizer.eod,
  )


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
  progress = Progress('scored', rows.tokens, 'tokens', stream=stream)
  for one in rows.batches(batch):
    with jax.set_mesh(mesh):
      found = jax.device_get(call(params, jax.device_put(one, home)))
    yield one, found
    progress.add(int(one['weights'].sum()))
  progress.end()


def make_token_nats(cfg, dtype):
  """The function (params, batch) -> nats of every target, [B,T] float32.

  cfg: ModelConfig   batch: as for `make_loss`, whose sum of weights times
  nats is linear in the weights: the nats are its gradient by them, and no more
  than a block's logits are held. Padding has nats too; its segment is 0.
  """
  loss = make_loss(cfg, dtype)

  def weighted(weights, params, batch):
    return loss(params, batch | {'weights': weights})

  def token_nats(params, batch):
    weights = jnp.ones(batch['targets'].shape, jnp.float32)
    return jax.grad(weighted)(weights, params, batch)

  return token_nats
