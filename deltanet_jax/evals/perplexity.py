"""Loss and bits per byte of a model on documents."""

from collections.abc import Callable, Iterator, Sequence
from typing import NotRequired, TextIO, TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from deltanet_jax.config.experiment import ModelConfig
from deltanet_jax.data.files import Document
from deltanet_jax.data.rows import HostBatch, Rows
from deltanet_jax.data.tokenizer import Tokenizer
from deltanet_jax.model import HybridLM
from deltanet_jax.objectives.next_token import make_loss
from deltanet_jax.objectives.score import Score, sum_scores
from deltanet_jax.parallel import sharding
from deltanet_jax.parallel.sharding import Batch, Params
from deltanet_jax.progress import Progress

Judge = Callable[[Params, Batch], jax.Array]


class Scoring(TypedDict):
  """How documents are scored."""

  dtype: DTypeLike  # of the computation
  mesh: Mesh  # where the parameters are
  seq_len: int  # of the rows that documents are packed into, as in training
  batch: int  # rows at a time, a multiple of mesh.data x mesh.fsdp
  stream: NotRequired[TextIO | None]  # for the progress line; default: stderr


def score_documents(
  cfg: ModelConfig,
  params: Params,
  documents: Sequence[Document],
  tokenizer: Tokenizer,
  **how: Unpack[Scoring],
) -> Score:
  """The `Score` of documents, see `run_documents`."""
  losses = run_documents(make_loss, cfg, params, documents, tokenizer, **how)
  return sum_scores(losses, tokenizer.eod)


def run_documents(
  make: Callable[[ModelConfig, DTypeLike], Judge],
  cfg: ModelConfig,
  params: Params,
  documents: Sequence[Document],
  tokenizer: Tokenizer,
  **how: Unpack[Scoring],
) -> Iterator[tuple[HostBatch, np.ndarray]]:
  """Yields (batch, output of the function that `make` returns).

  Every token of a document and its end-of-document token are predicted once,
  from the tokens before them in the same document and row of `seq_len` tokens.
  """
  mesh, stream = how['mesh'], how.get('stream')
  ids = tokenizer.encode_documents(documents)
  rows = Rows(ids, tokenizer.eod, tokenizer.vocab_size, how['seq_len'])
  param_shardings = sharding.make_param_shardings(HybridLM(cfg), mesh)
  batch_sharding = sharding.make_batch_sharding(mesh)
  call = jax.jit(
    make(cfg, jnp.dtype(how['dtype'])),
    in_shardings=(param_shardings, batch_sharding),
  )
  progress = Progress('scored', rows.tokens, 'tokens', stream=stream)
  for host_batch in rows.make_batches(how['batch']):
    with jax.set_mesh(mesh):
      batch = jax.device_put(host_batch, batch_sharding)
      output = jax.device_get(call(params, batch))
    yield host_batch, output
    progress.add(int(host_batch['weights'].sum()))
  progress.end()


def make_token_nats(cfg: ModelConfig, dtype: DTypeLike) -> Judge:
  """Returns (params, batch) -> loss of every target in nats, [B,T] float32.

  batch: as for `make_loss`. Its result, the sum of weights times nats, is
  linear in the weights, so the nats are its gradient with respect to them; this
  way only one block of logits is in memory. Padding (segment 0) has nats too.
  """
  loss = make_loss(cfg, dtype)

  def weighted(weights, params, batch):
    return loss(params, batch | {'weights': weights})

  def token_nats(params, batch):
    weights = jnp.ones(batch['targets'].shape, jnp.float32)
    return jax.grad(weighted)(weights, params, batch)

  return token_nats
