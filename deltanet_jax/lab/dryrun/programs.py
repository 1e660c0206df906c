"""The programs that a run would start, lowered from shapes for any mesh."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from deltanet_jax import flops
from deltanet_jax.config import ConfigError
from deltanet_jax.config.experiment import MoEConfig
from deltanet_jax.config.sampling import Sampling
from deltanet_jax.infer import room
from deltanet_jax.infer.generate import make_advance
from deltanet_jax.lab.cost import calc
from deltanet_jax.model import HybridLM, init_cache
from deltanet_jax.parallel import experts, sharding
from deltanet_jax.train import loop

# the axes of a cache's arrays by their names; what is not here is whole
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
  """A program before it is compiled, and what it is for."""

  what: str
  lowered: object
  flops: int  # of the program on all devices, what it repeats included
  model_flops: float  # what the model needs, of the same
  tokens: int  # that it takes in
  runs: int  # of it, for what the user asked
  filled: float  # of the room for experts' rows, when all are used alike
  held: dict  # bytes a device holds of each argument


def lower_training(experiment, mesh):
  """The training step, as `launch.train` runs it."""
  program = loop.make_program(experiment, mesh)
  data = experiment.data
  tokens = data.batch * data.seq_len
  # not under the mesh: its devices are not there to hold even a key
  need = 3 * tokens * calc.count_flops(experiment.model, data.seq_len)
  filled = _filled(
    experiment.model, mesh, tokens // experiment.optim.accumulate
  )
  with jax.set_mesh(mesh):
    traced = program.step.trace(program.abstract, program.batch)
    return Lowered(
      f'training step of {data.batch} rows of {data.seq_len:,} tokens',
      traced.lower(),
      flops.count_in_jaxpr(traced.jaxpr.jaxpr, filled),
      need,
      tokens,
      1,
      filled,
      {
        'parameters': sharding.count_bytes_per_device(program.abstract.params),
        'optimizer': sharding.count_bytes_per_device(
          program.abstract.opt_state
        ),
        'batch': sharding.count_bytes_per_device(program.batch),
      },
    )


def lower_prefill(experiment, mesh, context, batch, weights):
  """The last piece of a prompt of `context` tokens, as `launch.generate` runs
  it. `runs` pieces are the prompt; attention's earlier ones are cheaper, since
  they skip the slots that are not written yet."""
  piece = min(context, room.PIECE)
  program = _advance(experiment, mesh, context, batch, weights, piece)
  runs = -(-context // piece)
  need = batch * context * calc.count_flops(experiment.model, context)
  what = f'prefill of {batch} x {context:,} tokens, {piece:,} at a time'
  # that count has the output head at every token, a piece at its last alone
  need = min(need / runs, program.flops)
  return program._replace(what=what, model_flops=need, runs=runs)


def lower_decoding(experiment, mesh, context, batch, weights):
  """One token of each sequence, the last of `context`, as `launch.generate`
  runs it."""
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
      ' x data x fsdp x expert; make it a multiple or change the mesh'
    )
  model = HybridLM(cfg)
  try:
    places = sharding.make_param_shardings(model, mesh)
  except ValueError as error:
    raise ConfigError(str(error)) from error
  params = jax.tree.map(
    lambda x, place: jax.ShapeDtypeStruct(x.shape, weights, sharding=place),
    sharding.make_abstract_params(model),
    places,
  )
  place = lambda axes, shape: jax.sharding.NamedSharding(
    mesh, sharding.make_spec(axes, shape, mesh)
  )
  ids = jax.ShapeDtypeStruct(
    (batch, tokens),
    jnp.int32,
    sharding=place(('batch', None), (batch, tokens)),
  )

  def put(path, x):
    axes = _CACHE.get(getattr(path[-1], 'name', None), ())
    axes = (None,) * (x.ndim - len(axes)) + axes  # stacked over the repeats
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place(axes, x.shape))

  cache = jax.tree_util.tree_map_with_path(
    put, jax.eval_shape(lambda: init_cache(cfg, batch, context, dtype))
  )
  key = jax.eval_shape(lambda: jax.random.key(0))
  advance = make_advance(cfg, dtype, Sampling(), cfg.vocab)
  filled = _filled(cfg, mesh, batch * tokens)
  with jax.set_mesh(mesh):
    traced = advance.trace(params, cache, ids, key)
    return Lowered(
      '',
      traced.lower(),
      flops.count_in_jaxpr(traced.jaxpr.jaxpr, filled),
      0,
      batch * tokens,
      1,
      filled,
      {
        'parameters': sharding.count_bytes_per_device(params),
        'cache': sharding.count_bytes_per_device(cache),
      },
    )
