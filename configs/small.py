r"""Every mixer alone or 3:1 with gated attention: 8 layers of width 256.

  python -m launch.train --config=configs/small.py:gated_deltanet \
    --workdir=runs/small_gated_deltanet

Trains on the sources of Python's standard library, as bytes. The sizes differ
only in their mixers, so their losses can be compared.
"""

import dataclasses

from deltanet_jax.config.experiment import (
  DataConfig,
  Experiment,
  Layer,
  MLPConfig,
  ModelConfig,
  OptimConfig,
  TrainConfig,
)
from deltanet_jax.config.mixers import (
  AttentionConfig,
  DeltaNetConfig,
  GatedDeltaNetConfig,
  KDAConfig,
  LightningConfig,
  LinearAttentionConfig,
)
from deltanet_jax.config.presets import python_sources

LIGHTNING = LightningConfig(4, 64)
GATED_DELTANET = GatedDeltaNetConfig(4, 4, 64, 64)
KDA = KDAConfig(4, 64, 64)
ATTENTION = AttentionConfig(
  heads=8, kv_heads=2, head_dim=32, rotary_dim=16, qk_norm=True, gate=True
)

# repeating block of mixers                                           parameters
SIZES = {
  'attention': [ATTENTION],                                         # 6,232,832
  'window': [dataclasses.replace(ATTENTION, window=128)],           # 6,232,832
  'linear': [LinearAttentionConfig(4, 64, 64)],                     # 6,494,464
  'lightning': [LIGHTNING],                                         # 7,020,800
  'delta_net': [DeltaNetConfig(4, 64, 64)],                         # 6,527,744
  'gated_deltanet': [GATED_DELTANET],                               # 7,060,288
  'kda': [KDA],                                                     # 7,054,112
  # Gated DeltaNet-2
  'gdn2': [dataclasses.replace(KDA, separate_gates=True)],          # 8,094,496
  'hybrid_lightning': [LIGHTNING] * 3 + [ATTENTION],                # 6,823,808
  'hybrid_gdn': [GATED_DELTANET] * 3 + [ATTENTION],                 # 6,853,424
  'hybrid_kda': [KDA] * 3 + [ATTENTION],                            # 6,848,792
}  # fmt: skip


def get_config(size: str = 'gated_deltanet') -> Experiment:
  period = tuple(Layer(mixer, MLPConfig(704)) for mixer in SIZES[size])
  return Experiment(
    model=ModelConfig(
      vocab=264,
      d_model=256,
      tied=True,
      period=period,
      repeats=8 // len(period),
    ),
    data=DataConfig(path=python_sources(), seq_len=512, batch=16),
    optim=OptimConfig(lr=1e-3, warmup=100),
    train=TrainConfig(steps=2000, eval_every=250),
  )
