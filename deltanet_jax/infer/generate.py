"""Continuing a text: prefill, then one token at a time from the cache."""

import functools

import jax
import jax.numpy as jnp

from deltanet_jax.data import tokenizer as tokenizers
from deltanet_jax.infer import room
from deltanet_jax.infer.sampling import sample, seeded
from deltanet_jax.model import Backbone, HybridLM, head_weight, init_cache
from deltanet_jax.parallel import sharding
from deltanet_jax.runs.checkpoint import CheckpointError, Checkpoints


def continue_text(workdir, experiment, prompt, *, max_tokens, sampling, seed):
  """Yields the text that the model of a run adds to `prompt`, in pieces.

  workdir: Workdir   experiment: what it holds   prompt: str, maybe empty

  It ends after `max_tokens` tokens or before the end of the document, or of a
  text in the eyes of the release that the run began with. The prompt is the
  beginning of a document.

  Raises:
    ConfigError: the prompt is no text, or the tokenizer cannot serve.
    ValueError: the seed is none.
    CheckpointError: no checkpoint can be read.
  """
  key = seeded(seed)
  tokenizer = tokenizers.load(workdir.tokenizer(experiment))
  # a document is trained on from the end of the one before
  ids = [tokenizer.eod, *tokenizer.encode(prompt).tolist()]
  ends = {tokenizer.eod, *tokenizer.ends}
  params = load_params(workdir, experiment.model)
  stream = TextStream(tokenizer.decode, ids)
  tokens = generate(
    params,
    experiment.model,
    ids,
    max_tokens=max_tokens,
    sampling=sampling,
    key=key,
    dtype=jnp.dtype(experiment.train.dtype),
    vocab=tokenizer.vocab_size,
  )
  for token in tokens:
    if token in ends:
      break
    yield stream.push(token)
  yield stream.close()


def load_params(workdir, cfg, mesh=None):
  """The parameters of the newest whole checkpoint, where `sharding` lays them
  on the mesh, or on the first device."""
  model = HybridLM(cfg)
  shapes = sharding.abstract_params(model)
  if mesh is None:
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    places = jax.tree.map(lambda x: one, shapes)
  else:
    places = sharding.param_shardings(model, mesh)
  abstract = jax.tree.map(
    lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
    shapes,
    places,
  )
  with Checkpoints(workdir.checkpoints) as checkpoints:
    found = checkpoints.restore({'params': abstract})
  if found is None:
    raise CheckpointError(f'no checkpoint in {workdir.path} yet; train first')
  return found[1]['params']


def generate(params, cfg, prompt, *, max_tokens, sampling, key, dtype, vocab):
  """Yields up to `max_tokens` token ids, each as soon as it is chosen.

  prompt: ids, at least one   cfg: ModelConfig   dtype: of the computation
  vocab: the ids that mean something; a model may have more for their shape

  A program is compiled for a piece of the prompt, one for its rest, and one for
  a token at every size of the cache, which doubles as the text grows (`room`).
  The i-th token depends on the i-th key folded from `key` alone.
  """
  if not len(prompt):
    raise ValueError('the prompt has no token; give at least one')
  sampling.check()
  advance = make_advance(cfg, dtype, sampling, vocab)
  most = len(prompt) + max_tokens
  slots = room.slots(len(prompt), most)
  cache = init_cache(cfg, 1, slots, dtype)
  tokens = jnp.asarray(prompt, jnp.int32)[None]
  for i in range(max_tokens):
    length = len(prompt) + i
    if length > slots:
      slots = room.slots(length, most)
      cache = room.grow(cache, cfg, 1, slots, dtype)
    for piece in room.pieces(tokens):
      token, cache = advance(params, cache, piece, jax.random.fold_in(key, i))
    yield int(token[0])
    tokens = token[:, None]


@functools.cache
def make_advance(cfg, dtype, sampling, vocab):
  """(params, cache (donated), tokens [B,T], key) -> next token [B], cache."""
  backbone = Backbone(cfg, dtype)

  @functools.partial(jax.jit, donate_argnums=1)
  def advance(params, cache, tokens, key):
    hidden, cache = backbone.apply(
      {'params': params['backbone']}, tokens, cache=cache
    )
    head = head_weight(params, cfg)[:, :vocab].astype(hidden.dtype)
    logits = jnp.einsum(
      'BD,DZ->BZ', hidden[:, -1], head, preferred_element_type=jnp.float32
    )
    return sample(logits, key, sampling), cache

  return advance


class TextStream:
  """Token ids in, text out, whole characters only.

  The pieces are what the ids add to the text of those `before`: a decoder may
  take the space off the first word of a text, and off no other. A trailing
  U+FFFD may be a character whose other bytes are yet to come: it is held back
  until the next id shows.
  """

  def __init__(self, decode, before=()):
    self._decode = decode
    self._ids = _last_word(decode, list(before))
    self._shown = len(decode(self._ids))

  def push(self, token):
    """The text that `token` completes, possibly empty."""
    self._ids.append(token)
    return self._new(self._decode(self._ids).rstrip('\ufffd'))

  def close(self):
    """What was held back."""
    return self._new(self._decode(self._ids))

  def _new(self, text):
    new = text[self._shown :]
    self._shown = max(self._shown, len(text))
    return new


def _last_word(decode, ids):
  """As many of the last ids as decode to the end of what all do, so that a long
  prompt is not decoded with every token: some text in whole characters."""
  whole, count = decode(ids), 8
  while count < len(ids):
    last = decode(ids[-count:])
    if last.strip() and whole.endswith(last) and '\ufffd' not in last:
      return ids[-count:]
    count *= 4
  return ids
