"""Linear-attention hybrid language models in JAX.

  import deltanet_jax as dn

  dn.gated_delta_rule(q, k, v, beta=beta, g=g)  recurrences and attention
  dn.fla                                        flash-linear-attention's names
  dn.GatedDeltaNetConfig(...).make(d_model=D)   mixers, as Flax modules
  dn.HybridLM(dn.ModelConfig(...))              language models
  dn.config.load('qwen3:8b')                    presets by name
  dn.load_model(folder), dn.save_model          released weights
  dn.open_model(folder)                         a run, release or conversion
  dn.generate, dn.continue_text                 tokens, text

A name is imported when it is first used: `import deltanet_jax` alone does not
import jax.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from deltanet_jax import config as config, fla as fla
  from deltanet_jax.config.error import ConfigError as ConfigError
  from deltanet_jax.config.experiment import (
    Experiment as Experiment,
    Layer as Layer,
    MLPConfig as MLPConfig,
    ModelConfig as ModelConfig,
    MoEConfig as MoEConfig,
  )
  from deltanet_jax.config.mixers import (
    AttentionConfig as AttentionConfig,
    DeltaNetConfig as DeltaNetConfig,
    DSAConfig as DSAConfig,
    GatedDeltaNetConfig as GatedDeltaNetConfig,
    KDAConfig as KDAConfig,
    LightningConfig as LightningConfig,
    LinearAttentionConfig as LinearAttentionConfig,
    MLAConfig as MLAConfig,
  )
  from deltanet_jax.config.sampling import Sampling as Sampling
  from deltanet_jax.functional import (
    attention as attention,
    delta_rule as delta_rule,
    gated_delta_rule as gated_delta_rule,
    gated_linear_attention as gated_linear_attention,
    kda as kda,
    lightning_attention as lightning_attention,
    linear_attention as linear_attention,
  )
  from deltanet_jax.hf import load_model as load_model, save_model as save_model
  from deltanet_jax.infer.generate import generate as generate
  from deltanet_jax.infer.text import continue_text as continue_text
  from deltanet_jax.mixers.base import Context as Context
  from deltanet_jax.model import HybridLM as HybridLM
  from deltanet_jax.runs.source import open_model as open_model

# the same names again, for the import at run time
_NAMES = {
  'functional': (
    'attention delta_rule gated_delta_rule gated_linear_attention kda'
    ' lightning_attention linear_attention'
  ),
  'config.mixers': (
    'AttentionConfig DeltaNetConfig DSAConfig GatedDeltaNetConfig KDAConfig'
    ' LightningConfig LinearAttentionConfig MLAConfig'
  ),
  'config.experiment': 'Experiment Layer MLPConfig ModelConfig MoEConfig',
  'config.error': 'ConfigError',
  'config.sampling': 'Sampling',
  'mixers.base': 'Context',
  'model': 'HybridLM',
  'hf': 'load_model save_model',
  'runs.source': 'open_model',
  'infer.generate': 'generate',
  'infer.text': 'continue_text',
}
_MODULES = {name: m for m, names in _NAMES.items() for name in names.split()}


if not TYPE_CHECKING:  # a type checker knows the names above alone

  def __getattr__(name: str) -> object:
    if name in ('config', 'fla'):
      return importlib.import_module(f'{__name__}.{name}')
    if name not in _MODULES:
      raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    module = importlib.import_module(f'{__name__}.{_MODULES[name]}')
    globals()[name] = getattr(module, name)
    return globals()[name]


def __dir__() -> list[str]:
  own = (name for name in globals() if name.startswith('__'))
  return sorted({*own, *_MODULES, 'config', 'fla'})
