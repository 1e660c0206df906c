r"""Gated DeltaNet and gated attention 3:1, width 1024: 15B tokens.

  python -m launch.train --config=configs/gdn_hybrid_340m.py \
    --workdir=runs/gdn_hybrid_340m --config.data.path='text/*.parquet' \
    --config.data.tokenizer=tokenizer.json

366,563,680 parameters, on eight devices. After the Gated DeltaNet paper
(arXiv:2412.06464): 21 layers, keys 0.75 and values 1.5 times the width in heads
of 256 and 512, a vocabulary of 32,000 (bring its tokenizer.json), batches of
128 rows of 4096 tokens; gated attention in every fourth layer, where the
paper's hybrids have windows.
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
from deltanet_jax.config.mixers import AttentionConfig, GatedDeltaNetConfig


def get_config():
  ffn = MLPConfig(hidden=2816)
  delta = GatedDeltaNetConfig(
    key_heads=3, value_heads=3, key_dim=256, value_dim=512
  )
  attention = AttentionConfig(
    heads=8,
    kv_heads=2,
    head_dim=128,
    rotary_dim=64,
    qk_norm=True,
    gate=True,
  )
  return Experiment(
    model=ModelConfig(
      vocab=32_000,
      d_model=1024,
      remat='dots',
      prefix=(Layer(delta, ffn),),
      repeats=5,
      period=(Layer(delta, ffn),) * 3 + (Layer(attention, ffn),),
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
