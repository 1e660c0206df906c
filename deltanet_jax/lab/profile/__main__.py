"""Measures time and memory of prefill and decoding against context length.

  python -m launch.profile --size=cpu --out=runs/profile

compares models of the same width and depth: attention (full), multi-head latent
attention (mla), DeepSeek sparse attention (dsa), hybrids with three recurrent
layers per attention layer (gdn3, kda3) and recurrent models (gdn, kda).
--size=smoke takes seconds, --size=gpu goes to 1,048,576 tokens. To measure one
model, beside the same model with attention in every layer:

  python -m launch.profile --config=small:hybrid_gdn     random weights
  python -m launch.profile --workdir=runs/quickstart     a training run
  python -m launch.profile --released=Qwen3-0.6B         a release

For each context: time to the first token and time per token (the last 64 of the
context) of one sequence; throughput of decoding with as many sequences as fit
--budget_gib beside the parameters; time to copy a saved cache to the device;
bytes of the cache, checked against launch.calc; peak memory of each program as
XLA plans it. Compilation is not timed. What would take longer than --seconds or
exceed the memory is listed and not run.

--out gets results.jsonl, summary.md, summary.csv and plots. A profile that was
stopped continues with the next context.
"""

import dataclasses
import pathlib
import sys

from absl import flags

from deltanet_jax import config
from deltanet_jax.cli import command, model_flags
from deltanet_jax.config import ConfigError
from deltanet_jax.config.extras import require_extra
from deltanet_jax.lab.profile import plan

SIZE = flags.DEFINE_enum(
  'size', 'cpu', list(plan.SIZES), 'Models, contexts and limits.'
)
MODELS = flags.DEFINE_list(
  'models', None,
  f"Some of {','.join(plan.MODELS)}; ratios are to the first. Default: those"
  ' of the size.',
)  # fmt: skip
CONTEXTS = flags.DEFINE_list(
  'contexts', None, 'Tokens, such as 1024,4096. Default: those of the size.'
)
BUDGET = flags.DEFINE_float(
  'budget_gib',
  None,
  'Memory for parameters and caches of the largest batch.',
  lower_bound=0.0,
)
SECONDS = flags.DEFINE_float(
  'seconds', None,
  'Most seconds for all rounds of one model, context and quantity.',
  lower_bound=0.0,
)  # fmt: skip
flags.adopt_module_key_flags(model_flags)

TWIN = flags.DEFINE_bool(
  'twin', True, 'Also measure the model with attention in every layer.'
)
OUT = flags.DEFINE_string('out', 'runs/profile', 'Folder of the results.')


def take_experiment(argv):
  """(Experiment or None, other arguments)."""
  if any(arg.split('=')[0].split('.')[0] == '--config' for arg in argv):
    return config.parse_argv(argv)
  return None, argv


@command.as_main(take_experiment)
def main(experiment):
  settings = _settings()
  given = model_flags.WORKDIR.value, model_flags.RELEASED.value
  if sum(map(bool, (experiment, *given))) > 1:
    raise ConfigError('give one of --config, --workdir and --released')
  require_extra('matplotlib', 'profile')
  if any((experiment, *given)):
    models = _one(experiment, settings)
  else:
    cfgs = plan.make_models(plan.SIZES[SIZE.value], _names())
    models = {name: (cfg, None) for name, cfg in cfgs.items()}
  from deltanet_jax.lab.profile import run

  out = pathlib.Path(OUT.value)
  print(run.run_profile(settings, models, out), end='')
  print(f'\nFiles in {out}: results.jsonl, summary.md, summary.csv, plots')
  return 0


def _settings():
  settings = plan.SIZES[SIZE.value].settings
  changes = {'budget_gib': BUDGET.value, 'seconds': SECONDS.value}
  changes = {name: x for name, x in changes.items() if x is not None}
  if CONTEXTS.value is not None:
    changes['contexts'] = command.read_numbers(
      CONTEXTS, plan.SHORTEST, sys.maxsize,
      f'give numbers of tokens from {plan.SHORTEST} on, such as 1024,4096',
    )  # fmt: skip
  return dataclasses.replace(settings, **changes)


def _names():
  if MODELS.value is None:
    return plan.SIZES[SIZE.value].models
  if not MODELS.value or set(MODELS.value) - set(plan.MODELS):
    raise ConfigError(
      f'--models={",".join(MODELS.value)}: give some of {",".join(plan.MODELS)}'
    )
  return list(dict.fromkeys(MODELS.value))


def _one(experiment, settings):
  """{name: (ModelConfig, parameters or None)} of one model and its
  all-attention twin."""
  import jax.numpy as jnp

  from deltanet_jax.lab.cost import calc

  if experiment is not None:
    cfg, params = experiment.model, None
  else:
    source = model_flags.open_source()
    source.check()
    cfg, params = source.model, source.load(dtype=jnp.dtype(settings.dtype))
  models = {'model': (cfg, params)}
  if TWIN.value:
    try:
      twin = calc.make_attention_twin(cfg)
    except ValueError:
      twin = cfg
    if twin.layers != cfg.layers:
      models = {'all attention': (twin, None), **models}
  return models


if __name__ == '__main__':
  main()
