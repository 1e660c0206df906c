"""The programs of a run, lowered from shapes for any mesh."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from deltanet_jax import flops
from deltanet_jax.cli import command
from deltanet_jax.config import ConfigError
from deltanet_jax.config.experiment import MoEConfig
from deltanet_jax.config.sampling import Sampling
from deltanet_jax.infer import cache_growth
from deltanet_jax.infer.generate import make_advance
from deltanet_jax.lab.cost import calc
from deltanet_jax.model import HybridLM, init_cache
from deltanet_jax.parallel import experts, sharding
from deltanet_jax.train import loop

# logical axes of cache arrays by name; others are replicated
_CACHE = {
  'state': ('batch', 'heads', None, None),
  'q': ('batch', None, 'kv_heads', None),
  'k': ('batch', None, 'kv_heads', None),
  'v': ('batch', None, 'heads', None),
  'latent': ('batch', None, None),
  'key': ('batch', None, None),
  'index': ('batch', None, None),
  'positions': ('batch', None),
  'length': ('batch',),
}


class Lowered(NamedTuple):
  """A lowered program with its sizes."""

  lowered: object
  flops: int  # of the program on all devices, with recomputation
  tokens: int  # of its input
  filled: float  # share of expert capacity in use, balanced
  held: dict  # bytes per device of each argument
  what: str = ''
  model_flops: float = 0  # without recomputation
  runs: int = 1  # runs of it for the whole prompt


def lower_training(experiment, mesh):
  """The training step, as `launch.train` runs it."""
  program = loop.make_program(experiment, mesh)
  data, state = experiment.data, program.abstract
  tokens = data.batch * data.seq_len
  # not under the mesh: its devices do not exist and cannot hold a key
  need = 3 * tokens * calc.count_flops(experiment.model, data.seq_len)
  filled = _filled(
    experiment.model, mesh, tokens // experiment.optim.accumulate
  )
  arguments = {
    'parameters': state.params,
    'optimizer': state.opt_state,
    'batch': program.batch,
  }
  lowered = _lower(
    mesh, program.step, (state, program.batch), arguments, tokens, filled
  )
  what = f'training step of {data.batch} rows of {data.seq_len:,} tokens'
  return lowered._replace(what=what, model_flops=need)


def _lower(mesh, function, given, arguments, tokens, filled):
  """arguments: {name: part of `given` whose bytes are reported}"""
  with jax.set_mesh(mesh):
    traced = function.trace(*given)
    count = flops.count_in_jaxpr(traced.jaxpr.jaxpr, filled)
    lowered = traced.lower()
  size = sharding.count_bytes_per_device
  held = {name: size(x) for name, x in arguments.items()}
  return Lowered(lowered, count, tokens, filled, held)


def lower_prefill(experiment, mesh, context, batch, weights):
  """The last piece of a prompt of `context` tokens, as in `launch.generate`.
  The prompt has `runs` pieces; earlier ones attend to less."""
  piece = min(context, cache_growth.PIECE)
  program = _advance(experiment, mesh, context, batch, weights, piece)
  runs = -(-context // piece)
  need = batch * context * calc.count_flops(experiment.model, context)
  what = f'prefill of {batch} x {context:,} tokens, {piece:,} at a time'
  # the count has logits of every token, a piece only those of its last
  need = min(need / runs, program.flops)
  return program._replace(what=what, model_flops=need, runs=runs)


def lower_decoding(experiment, mesh, context, batch, weights):
  """One token of each sequence, the last of `context`, as in
  `launch.generate`."""
  program = _advance(experiment, mesh, context, batch, weights, 1)
  need = batch * calc.count_decoding_flops(experiment.model, context)
  what = f'decoding {batch} x 1 token in a cache of {context:,}'
  return program._replace(what=what, model_flops=need)


def _filled(cfg, mesh, tokens):
  split = lambda *names: math.prod(
    mesh.shape[axis] for name in names for axis in sharding.find_mesh_axes(name)
  )
  N = max(1, tokens // split('batch', 'time'))
  P = split('experts')
  shares = {
    experts.find_filled_share(N, layer.ffn.experts, layer.ffn.top, P)
    for layer in (*cfg.prefix, *cfg.period, *cfg.suffix)
    if isinstance(layer.ffn, MoEConfig)
  }
  return max(shares, default=1)


def _advance(experiment, mesh, context, batch, weights, tokens):
  cfg, dtype = experiment.model, jnp.dtype(experiment.train.dtype)
  rows = math.prod(mesh.shape[a] for a in sharding.find_mesh_axes('batch'))
  if batch % rows:
    raise ConfigError(
      f'--batch={batch} does not divide over the {rows} devices of mesh.replica'
      ' x data x fsdp x expert; give a multiple or change the mesh'
    )
  model = HybridLM(cfg)
  with command.bad_input():
    shardings = sharding.make_param_shardings(model, mesh)
  params = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, weights, sharding=s),
    sharding.make_abstract_params(model),
    shardings,
  )

  def put(axes, x):
    spec = sharding.make_spec(axes, x.shape, mesh)
    named = jax.sharding.NamedSharding(mesh, spec)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=named)

  def put_cache(path, x):
    axes = _CACHE.get(getattr(path[-1], 'name', None), ())
    # stacked over repeats
    return put((None,) * (x.ndim - len(axes)) + axes, x)

  ids = put(('batch', None), jax.ShapeDtypeStruct((batch, tokens), jnp.int32))
  cache = jax.tree_util.tree_map_with_path(
    put_cache, jax.eval_shape(lambda: init_cache(cfg, batch, context, dtype))
  )
  key = jax.eval_shape(lambda: jax.random.key(0))
  advance = make_advance(cfg, dtype, Sampling(), cfg.vocab)
  given, tokens = (params, cache, ids, key), batch * tokens
  arguments = {'parameters': params, 'cache': cache}
  filled = _filled(cfg, mesh, tokens)
  return _lower(mesh, advance, given, arguments, tokens, filled)
