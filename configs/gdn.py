r"""Gated DeltaNet, alone or 3:1 with gated attention, at research sizes.

  python -m launch.train --config=configs/gdn.py:340m \
    --workdir=runs/gdn_340m --config.data.path='text/*.parquet' \
    --config.data.tokenizer=tokenizer.json

For eight devices. After the Gated DeltaNet paper (arXiv:2412.06464): 21 layers,
keys 0.75 and values 1.5 times the model width, in heads of 256 and 512, a
vocabulary of 32,000 (bring a tokenizer.json), batches of 128 rows of 4096
tokens; 15B training tokens for 340m, 100B for 1p3b. Every fourth layer of a
hybrid is gated attention; the paper's hybrids use windowed attention.
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

# width, hidden, remat, steps, warm-up, micro-batches of a step
SMALL = (1024, 2816, 'dots', 28_610, 1024, 2)
LARGE = (2048, 5632, 'full', 190_735, 1907, 4)

# hybrid, and the above                                              parameters
SIZES = {
  '340m': (False, *SMALL),                                        # 379,764,350
  'hybrid_340m': (True, *SMALL),                                  # 366,563,680
  '1p3b': (False, *LARGE),                                      # 1,387,348,732
  'hybrid_1p3b': (True, *LARGE),                                # 1,334,672,832
}  # fmt: skip


def get_config(size: str = '340m') -> Experiment:
  hybrid, width, hidden, remat, steps, warmup, accumulate = SIZES[size]
  heads = 3 * width // 1024
  delta = Layer(
    GatedDeltaNetConfig(heads, heads, key_dim=256, value_dim=512),
    MLPConfig(hidden),
  )
  attention = Layer(
    AttentionConfig(
      heads=width // 128,
      kv_heads=width // 512,
      head_dim=128,
      rotary_dim=64,
      qk_norm=True,
      gate=True,
    ),
    MLPConfig(hidden),
  )
  return Experiment(
    model=ModelConfig(
      vocab=32_000,
      d_model=width,
      remat=remat,
      prefix=(delta,) if hybrid else (),
      period=(delta, delta, delta, attention) if hybrid else (delta,),
      repeats=5 if hybrid else 21,
    ),
    data=DataConfig(
      path='text/*.parquet',
      tokenizer='tokenizer.json',
      seq_len=4096,
      batch=128,
      heldout=0.001,
    ),
    optim=OptimConfig(lr=4e-4, warmup=warmup, accumulate=accumulate),
    train=TrainConfig(steps=steps, eval_every=1000, save_every=1000),
    mesh=MeshConfig(fsdp=8),
  )
