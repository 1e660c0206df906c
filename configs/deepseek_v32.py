r"""DeepSeek-V3.2: sparse latent attention, a mixture of experts.

  python -m launch.train --config=configs/deepseek_v32.py \
    --workdir=runs/deepseek_v32 --config.data.path='text/*.parquet'

671,877,944,064 parameters: 61 layers, width 7168, every token attends to 2048
keys that an indexer picks; the block of multi-token prediction (model.mtp) is
left out.
"""

from deltanet_jax.config.experiment import (
  DataConfig,
  Experiment,
  Layer,
  MeshConfig,
  MLPConfig,
  ModelConfig,
  MoEConfig,
  OptimConfig,
  TrainConfig,
)
from deltanet_jax.config.mixers import DSAConfig, YarnConfig


def get_config():
  yarn = YarnConfig(factor=40, original=4096, mscale=1.0, mscale_all_dim=1.0)
  mixer = DSAConfig(
    heads=128,
    latent=512,
    key_dim=128,
    shared_dim=64,
    value_dim=128,
    query_latent=1536,
    rope_theta=1e4,
    yarn=yarn,
    index_heads=64,
    index_dim=128,
    top=2048,
  )
  moe = MoEConfig(
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
    prefix=(Layer(mixer, MLPConfig(hidden=18432)),) * 3,
    period=(Layer(mixer, moe),),
    repeats=58,
  )
  return Experiment(
    model=model,
    data=DataConfig(
      path='text/*.parquet',
      tokenizer='tokenizer.json',
      seq_len=4096,
      batch=64,
      heldout=0.001,
    ),
    optim=OptimConfig(lr=1e-5, warmup=100),
    train=TrainConfig(steps=1000),
    mesh=MeshConfig(fsdp=8),
  )
