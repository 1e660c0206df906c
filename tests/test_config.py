"""Configurations: what is read, what is refused, and in what words."""

import pathlib
import subprocess
import sys

import pytest

from deltanet_jax import config
from deltanet_jax.experiment import MeshConfig
from deltanet_jax.mixers.config import AttentionConfig

SOURCE = """
from deltanet_jax.experiment import *
from deltanet_jax.mixers.config import AttentionConfig, GatedDeltaNetConfig

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
  cfg = config.override(cfg, name, text)
  for part in name.split('.'):
    cfg = cfg[int(part)] if isinstance(cfg, tuple) else getattr(cfg, part)
  assert cfg == value and type(cfg) is type(value)


def test_an_override_changes_nothing_else_and_not_the_original(cfg):
  changed = config.override(cfg, 'model.period.0.mixer.chunk', '32')
  lines = config.difference(cfg, changed)
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
    ('model.period.0.mixer.chunk', '10', 'multiple of 16'),
  ],
)
def test_a_wrong_override_is_refused_in_one_line(cfg, name, text, words):
  assert words in refusal(config.override, cfg, name, text)


def test_a_command_line_gives_configuration_and_rest(file):
  argv = ['train', f'--config={file}', '--workdir=w', '--config.optim.lr', '-1']
  cfg, rest = config.from_argv([*argv, '--', '--config.x=1'])
  assert rest == ['train', '--workdir=w', '--', '--config.x=1']
  lines = config.difference(config.load(file), cfg)
  assert lines == ['optim.lr: 0.0003 != -1.0']


def test_fields_that_must_fit_each_other_change_together(file):
  parts, batch = '--config.optim.accumulate=3', '--config.data.batch=9'
  cfg, _ = config.from_argv([f'--config={file}', parts, batch])
  assert (cfg.data.batch, cfg.optim.accumulate) == (9, 3)
  alone = [f'--config={file}', '--config.optim.accumulate=3']
  assert 'multiple of 3' in refusal(config.from_argv, alone)


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
  assert words in refusal(config.from_argv, argv)


def test_one_axis_of_a_mesh_takes_the_devices_that_are_left(file):
  mesh = MeshConfig(replica=2, fsdp=-1, tensor=4)
  assert mesh.filled(64) == MeshConfig(replica=2, fsdp=8, tensor=4)
  assert mesh.filled(8).filled(64) == mesh.filled(8)
  with pytest.raises(ValueError, match='take 8 devices, which does not divide'):
    mesh.filled(12)
  argv = [f'--config={file}', '--config.mesh.fsdp=-1']
  cfg, _ = config.from_argv(argv)
  assert cfg.mesh.filled(4) == MeshConfig(fsdp=4)
  two = refusal(config.from_argv, [*argv, '--config.mesh.seq=-1'])
  assert 'mesh.fsdp and mesh.seq are -1; give all but one' in two
  assert 'mesh.fsdp is -2' in refusal(
    config.from_argv, [argv[0], '--config.mesh.fsdp=-2']
  )


def test_the_last_of_two_overrides_counts(file):
  values = ['--config.train.steps=5', '--config.train.steps=6']
  assert config.from_argv([f'--config={file}', *values])[0].train.steps == 6


def test_a_flag_without_value_is_refused(file):
  argv = [f'--config={file}', '--config.train.steps', '--workdir=w']
  assert 'has no value' in refusal(config.from_argv, argv)


def test_a_missing_file_is_answered_by_what_there_is(
  file, tmp_path, monkeypatch
):
  near, far = tmp_path / 'smal.py', tmp_path / 'quite_other.py'
  assert f'did you mean {file}?' in refusal(config.load, near)
  assert f'there is {file}' in refusal(config.load, far)
  monkeypatch.chdir(tmp_path)
  file.parent.joinpath('configs').mkdir()
  file.rename('configs/small.py')
  given = refusal(config.from_argv, ['train'])
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
  changed = config.override(cfg, 'model.period.1.mixer.window', '8')
  assert config.from_json(config.to_json(changed)) == changed != cfg


@pytest.mark.parametrize(
  'old, new, words',
  [
    ('deltanet_jax.experiment:Data', 'os:path', 'no configuration of'),
    ('deltanet_jax.experiment:Data', 'deltanet_jaxx:Data', 'no configuration'),
    ('deltanet_jax.experiment:DataConfig', 'deltanet_jax.config:x', 'no conf'),
    ('deltanet_jax.experiment:Data', 'deltanet_jax.gone:Data', 'No module'),
    ('"seq_len"', '"seqlen"', "'seqlen'"),
    ('"seq_len": 64', '"seq_len": 0', 'give 1 or more'),
    ('{', '[', 'no JSON'),
  ],
)
def test_json_of_something_else_is_refused(cfg, old, new, words):
  text = config.to_json(cfg)
  assert old in text
  assert words in refusal(config.from_json, text.replace(old, new))


def test_a_difference_names_types_and_lengths(cfg):
  model = cfg.model
  assert config.difference(model.period[0], model.period[1]) == [
    'mixer: GatedDeltaNetConfig != AttentionConfig'
  ]
  assert config.difference(model.period, model.period[:1]) == [
    'config: 2 entries != 1 entries'
  ]
  assert config.difference(AttentionConfig.tiny(), AttentionConfig.tiny()) == []


def test_reading_a_command_line_imports_nothing_heavy(file):
  code = (
    'import sys\n'
    'from deltanet_jax import config\n'
    f'cfg, _ = config.from_argv(["--config={file}"])\n'
    'config.from_json(config.to_json(cfg))\n'
    'heavy = {"jax", "numpy", "flax", "grain"} & set(sys.modules)\n'
    'sys.exit(f"imports {heavy}" if heavy else 0)\n'
  )
  root = pathlib.Path(config.__file__).parent.parent
  done = subprocess.run([sys.executable, '-c', code], cwd=root)
  assert done.returncode == 0
