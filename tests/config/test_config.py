"""Configurations: what is read, what is refused, and the messages."""

import dataclasses
import math
import pathlib
import subprocess
import sys
import typing

import pytest

from deltanet_jax import config
from deltanet_jax.config import experiment, mixers
from deltanet_jax.config.experiment import MeshConfig
from deltanet_jax.config.mixers import AttentionConfig
from deltanet_jax.config.objectives import NextTokenConfig
from deltanet_jax.lab.study.config import StudyConfig

SOURCE = """
from deltanet_jax.config.experiment import *
from deltanet_jax.config.mixers import AttentionConfig, GatedDeltaNetConfig

def get_config():
  mixers = GatedDeltaNetConfig.tiny(), AttentionConfig.tiny()
  return Experiment(
    model=ModelConfig(
      vocab=257, d_model=32, repeats=2,
      period=tuple(Layer(mixer, MLPConfig(64)) for mixer in mixers),
    ),
    data=DataConfig(path='*.txt', seq_len=64, batch=8),
    optim=OptimConfig(),
    train=TrainConfig(steps=10),
  )
"""


@pytest.fixture
def file(tmp_path):
  path = tmp_path / 'small.py'
  path.write_text(SOURCE)
  return path


@pytest.fixture
def cfg(file):
  return config.load(file)


def refusal(call, *args):
  with pytest.raises(config.ConfigError) as error:
    call(*args)
  message = str(error.value)
  assert '\n' not in message
  return message


@pytest.mark.parametrize(
  'name, text, value',
  [
    ('optim.lr', '3e-4', 3e-4),
    ('optim.lr', '1', 1.0),
    ('train.steps', '1_000', 1000),
    ('model.tied', 'true', True),
    ('model.tied', 'False', False),
    ('data.path', 'a,b', 'a,b'),
    ('data.path', 'None', 'None'),
    ('model.period.1.mixer.window', '16', 16),
    ('model.period.1.mixer.window', 'None', None),
    ('model.period.0.mixer.chunk', '32', 32),
  ],
)
def test_an_override_is_read_as_its_field_is_annotated(cfg, name, text, value):
  cfg = config.override_field(cfg, name, text)
  for part in name.split('.'):
    cfg = cfg[int(part)] if isinstance(cfg, tuple) else getattr(cfg, part)
  assert cfg == value and type(cfg) is type(value)


def test_an_override_changes_nothing_else_and_not_the_original(cfg):
  changed = config.override_field(cfg, 'model.period.0.mixer.chunk', '32')
  lines = config.list_differences(cfg, changed)
  assert lines == ['model.period.0.mixer.chunk: 64 != 32']
  assert cfg.model.period[0].mixer.chunk == 64


@pytest.mark.parametrize(
  'name, text, words',
  [
    ('optim.l', '1', "did you mean 'lr'?"),
    ('optm.lr', '1', "did you mean 'optim'?"),
    ('mesh.zzz', '1', 'there is replica, data, fsdp, expert, seq, tensor'),
    ('train.steps', '3.5', 'a whole number'),
    ('train.steps', '1e3', 'a whole number'),
    ('optim.lr', 'fast', 'a number'),
    ('optim.lr', 'nan', 'a number'),
    ('optim.lr', 'None', 'a number'),
    ('model.tied', '1', 'true or false'),
    ('model.period.1.mixer.window', 'x', 'a whole number or None'),
    ('model.period.2.ffn.hidden', '1', 'give 0 to 1'),
    ('model.period.x.ffn.hidden', '1', 'give 0 to 1'),
    ('model.prefix.0.ffn.hidden', '1', 'model.prefix is empty'),
    ('model.period', '1', 'tuple of 2'),
    ('model', '1', 'is a group'),
    ('optim.lr.x', '1', "optim.lr is a value and has no 'x'"),
    ('train.steps', '0', 'give 1 or more'),
    ('model.period.0.mixer.chunk', '10', '16, 32, 64 or another 16 * 2^n'),
    ('optim.name', 'sgd', 'one of adamw, muon'),
    ('model.period.0.mixer.form', 'scan', 'one of auto, recurrent'),
  ],
)
def test_a_wrong_override_is_refused_in_one_line(cfg, name, text, words):
  assert words in refusal(config.override_field, cfg, name, text)


def test_a_command_line_gives_configuration_and_rest(file):
  argv = ['train', f'--config={file}', '--workdir=w', '--config.mesh.seq', '-1']
  cfg, rest = config.parse_argv([*argv, '--', '--config.x=1'])
  assert rest == ['train', '--workdir=w', '--', '--config.x=1']
  lines = config.list_differences(config.load(file), cfg)
  assert lines == ['mesh.seq: 1 != -1']


def test_fields_that_must_fit_each_other_change_together(file):
  parts, batch = '--config.optim.accumulate=3', '--config.data.batch=9'
  cfg, _ = config.parse_argv([f'--config={file}', parts, batch])
  assert (cfg.data.batch, cfg.optim.accumulate) == (9, 3)
  alone = [f'--config={file}', '--config.optim.accumulate=3']
  assert 'multiple of 3' in refusal(config.parse_argv, alone)


@pytest.mark.parametrize(
  'axes, words',
  [
    ({'data': 3}, 'data.batch 8 does not divide over mesh.data 3; make it a'),
    ({'replica': 2, 'expert': 8}, 'over mesh.replica 2 x mesh.expert 8; make'),
    ({'seq': 5}, 'data.seq_len 64 does not divide over mesh.seq 5; make it a'),
    ({'fsdp': 4, 'seq': 16}, 'd_model 32 does not divide over mesh.fsdp 4 x'),
    ({'tensor': 8}, 'heads 4 does not divide over mesh.tensor 8; make it a'),
  ],
)
def test_a_mesh_that_does_not_divide_the_sizes_is_refused(file, axes, words):
  rest = [f'--config.mesh.{axis}={n}' for axis, n in axes.items()]
  argv = [f'--config={file}', *rest]
  assert words in refusal(config.parse_argv, argv)


def test_one_axis_of_a_mesh_takes_the_devices_that_are_left(file):
  mesh = MeshConfig(replica=2, fsdp=-1, tensor=4)
  assert mesh.fill(64) == MeshConfig(replica=2, fsdp=8, tensor=4)
  assert mesh.fill(8).fill(64) == mesh.fill(8)
  with pytest.raises(ValueError, match='take 8 devices, which does not divide'):
    mesh.fill(12)
  argv = [f'--config={file}', '--config.mesh.fsdp=-1']
  cfg, _ = config.parse_argv(argv)
  assert cfg.mesh.fill(4) == MeshConfig(fsdp=4)
  two = refusal(config.parse_argv, [*argv, '--config.mesh.seq=-1'])
  assert 'mesh.fsdp and mesh.seq are -1; give all but one' in two
  assert 'mesh.fsdp is -2' in refusal(
    config.parse_argv, [argv[0], '--config.mesh.fsdp=-2']
  )


def test_the_last_of_two_overrides_counts(file):
  values = ['--config.train.steps=5', '--config.train.steps=6']
  assert config.parse_argv([f'--config={file}', *values])[0].train.steps == 6


def test_a_flag_without_value_is_refused(file):
  argv = [f'--config={file}', '--config.train.steps', '--workdir=w']
  assert 'has no value' in refusal(config.parse_argv, argv)


def test_a_missing_file_is_answered_by_what_there_is(
  file, tmp_path, monkeypatch
):
  near, far = tmp_path / 'smal.py', tmp_path / 'quite_other.py'
  assert f'did you mean {file}?' in refusal(config.load, near)
  assert f'there is {file}' in refusal(config.load, far)
  monkeypatch.chdir(tmp_path)
  file.parent.joinpath('configs').mkdir()
  file.rename('configs/small.py')
  given = refusal(config.parse_argv, ['train'])
  assert str(pathlib.Path('configs/small.py')) in given


@pytest.mark.parametrize(
  'old, new, words',
  [
    ('def get_config', 'def get_confg', 'no function get_config()'),
    ('  return Experiment(', '  return Experiment((', ': SyntaxError'),
    ('  return Experiment(', '  return dict(', 'returned a dict'),
    ('d_model=32', 'd_model=0', ':8: model.d_model is 0'),
    ('train=TrainConfig(steps=10),', '', ':7: TypeError'),
    ('seq_len=64', 'seqlen=64', ':12: TypeError'),
    ('import *', 'import Nothing', ':2: ImportError'),
    ('seq_len=64', 'seq_len=64.0', 'data.seq_len is 64.0; give a whole number'),
    ('seq_len=64', 'seq_len=True', 'data.seq_len is True; give a whole number'),
    ('vocab=257', "vocab=257, tied='no'", "model.tied is 'no'; give true or"),
    ('MLPConfig(64)', 'None', 'model.period.0.ffn is None; give MLPConfig'),
    ('model=ModelConfig', 'model=dict', 'model is {'),
  ],
)
def test_a_wrong_file_is_refused_by_name_and_line(file, old, new, words):
  assert old in SOURCE
  file.write_text(SOURCE.replace(old, new))
  message = refusal(config.load, file)
  assert message.startswith(str(file)) and words in message


def test_json_gives_an_equal_configuration_back(cfg):
  assert config.from_json(config.to_json(cfg)) == cfg
  changed = config.override_field(cfg, 'model.period.1.mixer.window', '8')
  assert config.from_json(config.to_json(changed)) == changed != cfg


@pytest.mark.parametrize(
  'old, new, words',
  [
    ('"DataConfig"', '"DataConfigs"', 'no configuration of'),
    ('"DataConfig"', '"os:path"', 'module of your own; give --config=FILE'),
    ('"DataConfig"', '"deltanet_jaxx:DataConfig"', 'module of your own'),
    ('"DataConfig"', '"deltanet_jax.config:x"', 'no configuration of'),
    ('"DataConfig"', '3', 'no configuration of'),
    ('"seq_len"', '"seqlen"', "'seqlen'"),
    ('"seq_len": 64', '"seq_len": 0', 'give 1 or more'),
    ('{', '[', 'no JSON'),
  ],
)
def test_json_of_something_else_is_refused(cfg, old, new, words):
  text = config.to_json(cfg)
  assert old in text
  assert words in refusal(config.from_json, text.replace(old, new))


def test_json_that_names_modules_is_read_by_the_last_part(cfg):
  text = config.to_json(cfg)
  assert '"_type": "ModelConfig"' in text
  old = text.replace('"_type": "', '"_type": "deltanet_jax.gone.since:')
  assert config.from_json(old) == cfg


def test_a_difference_names_types_and_lengths(cfg):
  model = cfg.model
  assert config.list_differences(model.period[0], model.period[1]) == [
    'mixer: GatedDeltaNetConfig != AttentionConfig'
  ]
  assert config.list_differences(model.period, model.period[:1]) == [
    'config: 2 entries != 1 entries'
  ]
  assert (
    config.list_differences(AttentionConfig.tiny(), AttentionConfig.tiny())
    == []
  )


def test_reading_a_command_line_imports_nothing_heavy(file):
  code = (
    'import sys\n'
    'from deltanet_jax import config\n'
    f'cfg, _ = config.parse_argv(["--config={file}"])\n'
    'config.from_json(config.to_json(cfg))\n'
    'heavy = {"jax", "numpy", "flax", "grain"} & set(sys.modules)\n'
    'sys.exit(f"imports {heavy}" if heavy else 0)\n'
  )
  root = pathlib.Path(config.__file__).parents[2]
  done = subprocess.run([sys.executable, '-c', code], cwd=root)
  assert done.returncode == 0


def _every_kind():
  """A valid configuration of every class that has numbers."""
  layer = experiment.Layer(AttentionConfig.tiny(), experiment.MLPConfig(8))
  examples = [
    experiment.MLPConfig(8),
    experiment.MoEConfig(4, 2, 8),
    experiment.Residual('normed'),
    experiment.ModelConfig(9, 8, (layer,), 1, prefix=(layer,)),
    experiment.DataConfig('*.txt', 8, 2),
    experiment.OptimConfig(),
    NextTokenConfig(balance=1.0),
    experiment.TrainConfig(9),
    MeshConfig(),
    mixers.YarnConfig(4.0, 8),
    StudyConfig(local=2),
  ]
  examples += [
    kind.tiny()
    for kind in vars(mixers).values()
    if isinstance(kind, type) and hasattr(kind, 'tiny')
  ]
  known = {type(example) for example in examples}
  for module in (experiment, mixers):
    for kind in vars(module).values():
      if dataclasses.is_dataclass(kind) and any(_numbers(kind)):
        assert kind in known, kind
  return examples


def _numbers(kind):
  """Names of a dataclass's fields that hold numbers, with their type."""
  hints = typing.get_type_hints(kind)
  for field in dataclasses.fields(kind):
    hint = hints[field.name]
    several = typing.get_origin(hint) is tuple
    options = typing.get_args(hint) or (hint,)
    for number in {int, float} & set(options):
      yield field.name, number, several


# values of fields that look invalid and are valid, and why
MINUS = {
  **dict.fromkeys(('Residual.alpha', 'Residual.beta'), 'a factor of a sum'),
  **dict.fromkeys(
    ('YarnConfig.mscale', 'YarnConfig.mscale_all_dim'), 'a factor of a log'
  ),
  'YarnConfig.attention_factor': 'a length as the file says it',
  'KDAConfig.lower_bound': 'a log-decay is below 0',
  **{
    f'MeshConfig.{field.name}': 'as many devices as there are'
    for field in dataclasses.fields(MeshConfig)
  },
}
ZERO = {
  'MoEConfig.eps': 'released models add none',
  'MoEConfig.shared': 'no such expert',
  'Residual.alpha': 'a layer that forgets its input',
  'Residual.beta': 'a branch that is left out',
  'ModelConfig.repeats': 'prefix and suffix alone',
  'DataConfig.seed': 'a seed',
  'TrainConfig.seed': 'a seed',
  'OptimConfig.warmup': 'none',
  'OptimConfig.decay': 'the last step alone',
  'OptimConfig.final': 'down to nothing',
  'OptimConfig.b1': 'no memory',
  'OptimConfig.b2': 'no memory',
  'OptimConfig.eps': 'it trains',
  'OptimConfig.weight_decay': 'none',
  'YarnConfig.mscale': 'not given',
  'YarnConfig.mscale_all_dim': 'not given',
  'YarnConfig.attention_factor': 'a length as the file says it',
  'AttentionConfig.rotary_dim': 'no positions',
  'StudyConfig.local': 'no such layer',
  'StudyConfig.warmup': 'none',
  'StudyConfig.weight_decay': 'none',
  **{
    f'NextTokenConfig.{field.name}': 'no part of the objective'
    for field in dataclasses.fields(NextTokenConfig)
  },
}
BOUNDED = 'OptimConfig.b1', 'OptimConfig.b2', 'DataConfig.heldout'


def _possible(name, number, value):
  """Why a field accepts the value, or None."""
  field = name.split('.')[1]
  if value == -1:
    return MINUS.get(name)
  if value == 0:
    conv = 'no short convolution' if field == 'conv' else None
    eps = 'nothing added' if field == 'norm_eps' else None
    return ZERO.get(name) or conv or eps
  if value == 2**70 and number is float:
    fits = name not in BOUNDED and field != 'lower_bound'
    return 'a number that float32 holds' if fits else None
  if value in (2**70, 10**400):
    return 'a seed of any length' if name == 'DataConfig.seed' else None
  return None


@pytest.mark.parametrize('cfg', _every_kind(), ids=lambda c: type(c).__name__)
def test_every_number_has_a_range_and_is_refused_by_name_outside_of_it(cfg):
  impossible = -1, 0, math.nan, math.inf, -math.inf, 2**70, 10**400, True, '3'
  for field, number, several in _numbers(type(cfg)):
    name = f'{type(cfg).__name__}.{field}'
    for value in (*impossible, *([1.5] if number is int else [1e-46, 1e39])):
      given = (value,) if several else value
      if _possible(name, number, value):
        dataclasses.replace(cfg, **{field: given})
        continue
      if value == 1e-46 and _possible(name, number, 0):
        continue  # as good as 0
      with pytest.raises(ValueError) as error:
        dataclasses.replace(cfg, **{field: given})
      message = str(error.value)
      assert '\n' not in message and 'give' in message, name
      assert field in message and repr(value) in message, message


@pytest.mark.parametrize(
  'kind, field, value',
  [
    # one less is the largest float32 below 1, and one more the smallest above
    # 0; 2^32 - 1 the largest seed that jax.random.key does not shorten
    (experiment.OptimConfig(), 'b2', 1 - 2.0**-24),
    (experiment.OptimConfig(), 'lr', 2.0**-126),
    (experiment.TrainConfig(1), 'seed', 2**32 - 1),
    (experiment.DataConfig('x', 1, 1), 'seed', 2**70),
    (experiment.TrainConfig(1), 'steps', 2**31 - 1),
  ],
)
def test_a_range_ends_where_the_device_does(kind, field, value):
  assert getattr(dataclasses.replace(kind, **{field: value}), field) == value
  beyond = value / 2 if field == 'lr' else (value + 1) / 2 + value / 2
  if isinstance(value, int):
    beyond = value + 1
  if value == 2**70:
    return
  with pytest.raises(ValueError, match=rf'\.{field} is '):
    dataclasses.replace(kind, **{field: beyond})


def test_a_whole_number_in_the_place_of_another_is_kept_as_such():
  cfg = experiment.OptimConfig(lr=2**40, clip=1)
  assert isinstance(cfg.lr, float) and isinstance(cfg.clip, float)
  assert cfg == experiment.OptimConfig(lr=2.0**40, clip=1.0)


CHUNKED = [
  kind
  for kind in vars(mixers).values()
  if isinstance(kind, type) and hasattr(kind, 'chunk')
]


@pytest.mark.parametrize('kind', CHUNKED)
def test_a_chunk_that_is_not_16_times_a_power_of_two_is_refused(kind):
  cfg = kind.tiny()
  for chunk in (16, 32, 64, 128, 256, 1024):
    assert dataclasses.replace(cfg, chunk=chunk).chunk == chunk
  for chunk in (-16, 0, 1, 8, 17, 48, 50, 80, 96, 112, 192, 16.0, True):
    with pytest.raises(ValueError, match=r'16, 32, 64 or another 16 \* 2\^n'):
      dataclasses.replace(cfg, chunk=chunk)


@pytest.mark.parametrize('kind', ['AttentionConfig', 'MLAConfig'])
def test_yarn_needs_frequencies_that_differ(kind):
  cfg = getattr(mixers, kind).tiny()
  yarn = mixers.YarnConfig(2.0, 16)
  with pytest.raises(ValueError, match=f'{kind}.rope_theta is 1.0; with yarn'):
    dataclasses.replace(cfg, yarn=yarn, rope_theta=1.0)
  dataclasses.replace(cfg, rope_theta=1.0)


def test_an_objective_of_nothing_is_refused():
  with pytest.raises(ValueError, match='nothing to learn; give one'):
    NextTokenConfig(next=0.0, bias_rate=0.1)


@pytest.mark.parametrize(
  'old, new, words',
  [
    ('"d_model": 32', '"d_model": "32"', "d_model is '32'; give a whole"),
    ('"lr": 0.0003', '"lr": NaN', 'optim.lr is nan; give more than 0'),
    ('"path": "*.txt"', '"path": 3', 'data.path is 3; give a text'),
    ('"tied": false', '"tied": "no"', "model.tied is 'no'; give true or"),
    ('"prefix": []', '"prefix": [1]', 'model.prefix.0 is 1; give Layer'),
    ('"prefix": []', '"prefix": {"a": 1}', 'None is no configuration'),
    ('"prefix": []', '"prefix": null', 'ModelConfig: '),
    ('"tied": false', '"tied": ' + '[' * 10**5 + ']' * 10**5, 'no JSON'),
  ],
)
def test_json_that_was_changed_by_hand_is_refused_in_one_line(
  cfg, old, new, words
):
  text = config.to_json(cfg)
  assert text.count(old) == 1
  changed = text.replace(old, new)
  assert words in refusal(config.from_json, changed, experiment.Experiment)


@pytest.mark.parametrize('text', ['3', 'null', '[]', 'true', '"x"'])
def test_json_of_no_experiment_is_refused(text):
  message = refusal(config.from_json, text, experiment.Experiment)
  assert 'no JSON of an Experiment' in message
