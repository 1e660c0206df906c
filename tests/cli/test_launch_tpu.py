"""launch/tpu_vm.sh, with two folders of this machine as a TPU's workers."""

import re
import shutil
import subprocess

import pytest

from tests.launchers import (
  HARD,
  ROOT,
  SCRIPTS,
  commands as commands,
  flags_of,
  until,
)

GCLOUD = r"""
for word in "$@"; do
  case $word in --command=*) command=${word#*=} ;; esac
done
homes() { for i in 0 1; do echo "$STUBS/home-$i"; done; }
case $4 in
  list) head -n 1 "$STUBS/states"
    [ "$(wc -l <"$STUBS/states")" = 1 ] || sed -i 1d "$STUBS/states" ;;
  create) rm -rf $(homes); mkdir $(homes) ;;
  delete) rm -rf $(homes) ;;
  describe) echo 'no quota for this' ;;
  scp) for home in $(homes); do cp "$5" "$home/"; done ;;
  ssh)
    for home in $(homes); do
      (cd "$home" && HOME=$home bash -c "$command") || exit 255
    done ;;
esac
"""
UV = r"""
[ "$1" = venv ] || exit 0
for folder in "$@"; do :; done
mkdir -p "$folder/bin"
cp "$STUBS/bin/fake_python" "$folder/bin/python"
"""


@pytest.fixture
def cloud(commands):
  """Commands with gcloud and two workers; `up` from a small repository."""
  commands.add('gcloud', GCLOUD)
  commands.add('uv', UV)
  commands.add('hostname', 'echo "${HOME##*/}"')
  (commands.bin / 'sleep').write_text('#!/bin/sh\nexec /bin/sleep 0.05\n')
  (commands.bin / 'sleep').chmod(0o755)
  repo = commands.folder / 'repo'
  shutil.copytree(ROOT / 'launch', repo / 'launch')
  (repo / 'requirements-tpu.txt').write_text('jax[tpu]\n')
  (repo / '.gitignore').write_text('runs/\n')
  (repo / 'gone.py').write_text('')
  for command in ('init -q', 'add -A'):
    subprocess.run(['git', *command.split()], cwd=repo, check=True)
  (repo / 'gone.py').unlink()
  (repo / 'new.py').write_text('')
  (repo / 'runs').mkdir()
  (repo / 'runs' / 'big').write_text('')
  commands.repo = repo
  return commands


def _tpu(cloud, verb, *args, states=(), train=None):
  """What `verb` did; states: of the TPU, one for each time it is asked.

  train: what a worker's Python does, in bash.
  """
  if states:
    (cloud.folder / 'states').write_text('\n'.join(states) + '\n')
  if train is not None:
    cloud.add('fake_python', train)
  return cloud.run(cloud.repo / 'launch/tpu_vm.sh', verb, *args)


def _up(cloud, *options, **how):
  flags = flags_of(cloud.folder / 'shared run')
  given = SCRIPTS['tpu_vm.sh'][1:]
  return _tpu(cloud, 'up', *given, *options, *flags, **how)


def _verbs(cloud):
  """queued-resources' verbs, of ssh what it asked for."""
  for call in cloud.calls('gcloud'):
    assert call[:3] == ['compute', 'tpus', 'queued-resources']
    assert '--zone=z' in call and '--quiet' in call
    if call[3] == 'ssh':
      assert '--worker=all' in call and '--node=all' in call
      asked = re.search(r'tpu_worker.sh (\w+)', ' '.join(call))
      yield asked.group(1)
    elif call[3] != 'list':
      yield call[3]


# until the machine is gone; minutes where a test left it
LOOP = """echo step 3
for _ in {1..9000}; do [ -d "$HOME" ] || break; /bin/sleep 0.03; done"""


def test_tpu_is_made_again_after_a_preemption_and_the_run_continues(cloud):
  train = f'[ -e "$STUBS/again" ] && exit 0; {LOOP}; touch "$STUBS/again"'
  states = ['', 'WAITING_FOR_RESOURCES', 'PROVISIONING', 'ACTIVE', 'ACTIVE',
            'ACTIVE', 'SUSPENDING', 'SUSPENDED', '', 'ACTIVE']  # fmt: skip
  done = _up(cloud, '--spot', '--slices=2', states=states, train=train)
  assert done.returncode == 0, done.stderr
  begin = ['status', 'scp', 'install', 'start']
  assert list(_verbs(cloud)) == [
    'create', *begin, 'status', 'status', 'delete', 'create', *begin, 'status'
  ]  # fmt: skip
  for sign in ('mine: ACTIVE', 'running: step 3', 'preempted', 'billed'):
    assert sign in done.stderr
  create = next(c for c in cloud.calls('gcloud') if c[3] == 'create')
  assert create[4:] == [
    'mine', '--zone=z', '--quiet', '--accelerator-type=v6e-16',
    '--runtime-version=v2-alpha-tpuv6e', '--node-count=2',
    '--node-prefix=mine', '--spot',
  ]  # fmt: skip

  run = cloud.folder / 'shared run'
  calls = cloud.calls('python')
  assert len(calls) == 4
  for call in calls:
    assert call == [
      '-m', 'launch.train', '--distributed', *HARD, f'--workdir={run}'
    ]  # fmt: skip
  for i in (0, 1):
    assert 'step 3' in (run / f'logs/worker-home-{i}.log').read_text()
  copied = cloud.folder / 'home-1' / 'deltanet_jax'
  assert (copied / 'new.py').exists() and not (copied / 'runs').exists()
  pip = ['pip', 'install', '--quiet', '--python', f'{copied}/.venv/bin/python',
         '-r', f'{copied}/requirements-tpu.txt']  # fmt: skip
  assert pip in cloud.calls('uv')


@pytest.mark.parametrize('status, starts', [(1, 2), (2, 1)])
def test_tpu_workers_that_fail_start_again_unless_the_input_is_bad(
  status, starts, cloud
):
  # the other one waits
  train = f'case $HOME in *-1) echo why; exit {status} ;; esac; {LOOP}'
  done = _up(cloud, '--restarts=1', states=['', 'ACTIVE'], train=train)
  assert done.returncode == status, done.stderr
  assert f'worker home-1 ended {status}: why' in done.stderr
  verbs = list(_verbs(cloud))
  assert verbs.count('start') == starts and 'delete' not in verbs
  assert verbs[-1] == 'stop'


def test_tpu_run_outlives_the_command_and_is_taken_up_and_stopped(cloud):
  def up():
    return subprocess.Popen(
      [cloud.repo / 'launch/tpu_vm.sh', 'up', *SCRIPTS['tpu_vm.sh'][1:],
       *flags_of(cloud.folder / 'run')],
      cwd=cloud.folder, env=cloud.env, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip

  (cloud.folder / 'states').write_text('\nACTIVE\n')
  save = 'touch "$STUBS/saved-${HOME##*/}"; exit 143'
  cloud.add('fake_python', f"trap '{save}' TERM\n{LOOP}")
  first = up()
  until(lambda: list(_verbs(cloud)).count('status') >= 3)
  first.kill()
  first.communicate()
  second = up()
  for line in second.stderr:
    if 'running: step 3' in line:
      break
  status = _tpu(cloud, 'status', '--name=mine', '--zone=z')
  assert status.stdout.splitlines() == [
    'ACTIVE', *(f'worker home-{i} running: step 3' for i in (0, 1))
  ]  # fmt: skip
  logs = _tpu(cloud, 'logs', '--name=mine', '--zone=z')
  assert logs.stdout == 'step 3\n' * 2
  stop = _tpu(cloud, 'stop', '--name=mine', '--zone=z')
  assert stop.returncode == 0
  errors = second.communicate(timeout=30)[1]
  assert second.returncode == 0 and 'stopped and saved' in errors
  assert all((cloud.folder / f'saved-home-{i}').exists() for i in (0, 1))
  verbs = list(_verbs(cloud))
  assert verbs.count('start') == 1 and 'delete' not in verbs
  done = _tpu(cloud, 'delete', '--name=mine', '--zone=z')
  assert done.returncode == 0 and list(_verbs(cloud))[-1] == 'delete'


def test_tpu_is_created_without_a_run(cloud):
  given = SCRIPTS['tpu_vm.sh'][1:]
  done = _tpu(cloud, 'create', *given, states=['', 'ACTIVE'], train='')
  assert done.returncode == 0, done.stderr
  assert list(_verbs(cloud)) == ['create', 'scp', 'install']


def test_tpu_refused_by_the_cloud_ends_with_its_status_and_reason(cloud):
  create = '[ "$4" != create ] || { echo "no such type" >&2; exit 7; }\n'
  cloud.add('gcloud', create + GCLOUD)
  done = _up(cloud, states=[''], train='')
  assert done.returncode == 7 and 'no such type' in done.stderr

  cloud.add('gcloud', GCLOUD)
  done = _up(cloud, states=['', 'PROVISIONING', 'FAILED'], train='')
  assert done.returncode == 1 and 'no quota for this' in done.stderr
  assert 'delete' not in list(_verbs(cloud))


def test_tpu_that_someone_deletes_is_not_asked_for_again(cloud):
  # the list may show it late
  states = ['', '', 'ACTIVE', 'ACTIVE', '']
  done = _up(cloud, states=states, train=LOOP)
  assert done.returncode == 1 and 'someone deleted it' in done.stderr
  assert list(_verbs(cloud)).count('create') == 1
  done = _up(cloud, states=['ACTIVE', 'ACTIVE', ''], train=LOOP)
  assert done.returncode == 1 and 'someone deleted it' in done.stderr
  assert list(_verbs(cloud)).count('create') == 1
  _tpu(cloud, 'delete', '--name=mine', '--zone=z')


def test_tpu_answers_that_name_no_worker_are_no_success(cloud):
  cloud.add('gcloud', '[ "$4" != ssh ] || exit 0\n' + GCLOUD)
  done = _up(cloud, states=['', 'ACTIVE'], train='')
  assert done.returncode == 1 and 'do not answer' in done.stderr


def test_tpu_whose_workers_do_not_answer_is_given_up(cloud):
  silent = '[ "$4" != ssh ] || { echo "no route to host" >&2; exit 255; }\n'
  cloud.add('gcloud', silent + GCLOUD)
  done = _up(cloud, states=['', 'ACTIVE'], train='')
  assert done.returncode == 1 and 'no route to host' in done.stderr
  assert list(_verbs(cloud)).count('scp') == 10
