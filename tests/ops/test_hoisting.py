"""JAX does not hoist masks out of scanned layers: none has the size of a
row."""

import dataclasses
import inspect

import jax
import pytest
from jax.extend.core import jaxprs_in_params

from deltanet_jax.config import mixers
from deltanet_jax.config.experiment import (
  DataConfig,
  Experiment,
  Layer,
  MeshConfig,
  MLPConfig,
  ModelConfig,
  OptimConfig,
  TrainConfig,
)
from deltanet_jax.parallel import sharding
from deltanet_jax.train import loop

B, T = 2, 65536
CHUNK = 512


def _classes():
  for name, cls in inspect.getmembers(mixers, inspect.isclass):
    if hasattr(cls, 'tiny'):
      yield pytest.param(cls, id=name)


def _sizes(jaxpr):
  """(elements, type) of every computed array, also in inner jaxprs."""
  for eqn in jaxpr.eqns:
    for x in eqn.outvars:
      if hasattr(x.aval, 'size'):
        yield x.aval.size, str(x.aval)
    for inner in jaxprs_in_params(eqn.params):
      yield from _sizes(inner)


@pytest.mark.parametrize('spans, remat', [(1, 'none'), (4, 'full')])
@pytest.mark.parametrize('cls', list(_classes()))
def test_scanned_layers_keep_no_masks_of_a_row(cls, spans, remat):
  cfg = cls.tiny()
  if hasattr(cfg, 'chunk'):
    cfg = dataclasses.replace(cfg, chunk=CHUNK)
  experiment = Experiment(
    model=ModelConfig(
      vocab=64,
      d_model=16,
      remat=remat,
      period=(Layer(cfg, MLPConfig(hidden=16)),),
      repeats=2,
    ),
    data=DataConfig(path='-', seq_len=T, batch=B),
    optim=OptimConfig(),
    train=TrainConfig(steps=1),
    mesh=MeshConfig(seq=spans),
  )
  mesh = sharding.make_mesh(experiment.mesh, jax.devices()[:spans])
  program = loop.make_program(experiment, mesh)
  with jax.set_mesh(mesh):
    step = program.step.trace(program.abstract, program.batch).jaxpr
  size, what = max(_sizes(step.jaxpr))
  # masks of all heads would be twice as large, those of attention 128 times
  assert size <= B * T * CHUNK, what
