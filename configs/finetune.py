r"""Fine-tunes released weights on your own text.

  python -m launch.train --released=Qwen3-0.6B --workdir=runs/mine \
    --config.data.path='texts/*.jsonl' --config.train.steps=500

Model and tokenizer are those of the release. launch.train uses this file if
--released is given without --config. Parameters, gradients and Adam's moments
are float32: 16 bytes per parameter, sharded over mesh.fsdp devices.
"""

import dataclasses

from deltanet_jax.config.experiment import (
  DataConfig,
  Experiment,
  MoEConfig,
  OptimConfig,
  TrainConfig,
)
from deltanet_jax.config.objectives import NextTokenConfig


def get_config(released):
  model = dataclasses.replace(released.model, remat='full')
  return Experiment(
    model=model,
    data=DataConfig(
      path='texts/**/*.txt',
      tokenizer=released.tokenizer,
      seq_len=1024,
      batch=8,
    ),
    optim=OptimConfig(lr=1e-5, warmup=20, weight_decay=0.01),
    train=TrainConfig(
      steps=500, eval_every=100, save_every=100, objective=_objective(model)
    ),
  )


def _objective(model):
  experts = [x.ffn for x in model.layers if isinstance(x.ffn, MoEConfig)]
  sparse = any(hasattr(x.mixer, 'stage') for x in model.layers)
  balance = 0.0
  if experts:
    # selection biases stay fixed, with this small balance loss, as at the end
    # of the training of DeepSeek-V3 (arXiv:2412.19437 sec. 4.2)
    balance = 1e-4 if experts[0].bias else 1e-3
  return NextTokenConfig(
    further=0.1 if model.mtp is not None else 0.0,
    balance=balance,
    indexer=1.0 if sparse else 0.0,
  )
