r"""Gated DeltaNet of width 1024: 15B tokens.

  python -m launch.train --config=configs/gdn_340m.py \
    --workdir=runs/gdn_340m --config.data.path='text/*.parquet' \
    --config.data.tokenizer=tokenizer.json

379,764,350 parameters, on eight devices. After the Gated DeltaNet paper
(arXiv:2412.06464): 21 layers, keys 0.75 and values 1.5 times the width in heads
of 256 and 512, a vocabulary of 32,000 (bring its tokenizer.json), batches of
128 rows of 4096 tokens; no attention.
"""

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
from deltanet_jax.config.mixers import GatedDeltaNetConfig


def get_config():
  ffn = MLPConfig(hidden=2816)
  delta = GatedDeltaNetConfig(
    key_heads=3, value_heads=3, key_dim=256, value_dim=512
  )
  return Experiment(
    model=ModelConfig(
      vocab=32_000,
      d_model=1024,
      remat='dots',
      period=(Layer(delta, ffn),),
      repeats=21,
    ),
    data=DataConfig(
      path='text/*.parquet',
      tokenizer='tokenizer.json',
      seq_len=4096,
      batch=128,
      heldout=0.001,
    ),
    optim=OptimConfig(lr=4e-4, warmup=1024, accumulate=2),
    train=TrainConfig(steps=28610, eval_every=1000, save_every=1000),
    mesh=MeshConfig(fsdp=8),
  )
