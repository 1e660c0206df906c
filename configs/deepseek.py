r"""DeepSeek-V3, V3.1 and V3.2: latent attention, a mixture of experts.

  python -m launch.train --config=configs/deepseek.py:v3 \
    --workdir=runs/deepseek_v3 --config.data.path='text/*.parquet'

61 layers, three of them dense; every token uses 8 of 256 experts and a shared
one. v3 is also V3.1. In v32 an indexer chooses 2048 keys for every query. The
block of multi-token prediction (model.mtp) is left out.
"""

from deltanet_jax.config.experiment import (
  Experiment,
  Layer,
  MLPConfig,
  ModelConfig,
  MoEConfig,
)
from deltanet_jax.config.mixers import DSAConfig, MLAConfig, YarnConfig
from deltanet_jax.config.presets import train_released

LATENT = {
  'heads': 128,
  'latent': 512,
  'key_dim': 128,
  'shared_dim': 64,
  'value_dim': 128,
  'query_latent': 1536,
  'yarn': YarnConfig(40, original=4096, mscale=1.0, mscale_all_dim=1.0),
}
INDEXER = {'index_heads': 64, 'index_dim': 128, 'top': 2048}

# the mixer                                                          parameters
SIZES = {
  'v3': MLAConfig(**LATENT),                                  # 671,026,419,200
  'v32': DSAConfig(**LATENT, **INDEXER),                      # 671,877,944,064
}  # fmt: skip


def get_config(size: str = 'v3') -> Experiment:
  mixer = SIZES[size]
  experts = MoEConfig(
    experts=256,
    top=8,
    hidden=2048,
    score='sigmoid',
    bias=True,
    groups=8,
    top_groups=4,
    eps=1e-20,
    scale=2.5,
    shared=2048,
  )
  model = ModelConfig(
    vocab=129_280,
    d_model=7168,
    remat='full',
    prefix=(Layer(mixer, MLPConfig(18432)),) * 3,
    period=(Layer(mixer, experts),),
    repeats=58,
  )
  return train_released(model)
