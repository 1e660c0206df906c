"""launch/gke.sh, xpk.sh and slurm.sbatch, with stubs of what they call."""

import re
import shutil
import subprocess

import pytest
import yaml

from tests import jobset
from tests.launchers import (
  HARD,
  ROOT,
  SCRIPTS,
  assert_refused,
  commands as commands,
  flags_of,
)

# GKE

TOPOLOGIES = [  # type, one slice, the label's value, chips on a host, hosts
  ('v5e', '1x1', 'tpu-v5-lite-podslice', 1, 1),
  ('v5e', '2x4', 'tpu-v5-lite-podslice', 4, 2),
  ('v5e', '16x16', 'tpu-v5-lite-podslice', 4, 64),
  ('v5p', '2x2x1', 'tpu-v5p-slice', 4, 1),
  ('v5p', '4x4x8', 'tpu-v5p-slice', 4, 32),
  ('v6e', '4x4', 'tpu-v6e-slice', 4, 4),
  ('tpu7x', '2x2x2', 'tpu7x', 4, 2),
  ('tpu7x', '4x4x16', 'tpu7x', 4, 64),
]


def _manifest(commands, *options):
  done = commands.run(
    'gke.sh', '--name=mine', '--image=hub/x:tpu', '--claim=runs', *options,
    '--dry_run', *flags_of('/mnt/runs/mine'),
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  return yaml.safe_load(done.stdout)


def _faults(manifest):
  jsonschema = pytest.importorskip(
    'jsonschema', reason='pip install jsonschema'
  )
  validator = jsonschema.Draft202012Validator(jobset.SCHEMA)
  return [error.message for error in validator.iter_errors(manifest)]


@pytest.mark.parametrize('kind, topology, label, chips, hosts', TOPOLOGIES)
@pytest.mark.parametrize('slices', [1, 2])
def test_gke_manifest_is_a_jobset_of_whole_slices(
  kind, topology, label, chips, hosts, slices, commands
):
  manifest = _manifest(
    commands, f'--type={kind}', f'--topology={topology}', f'--slices={slices}',
    *(['--spot', '--queue=team', '--namespace=lab'] if slices == 2 else []),
  )  # fmt: skip
  assert _faults(manifest) == []
  (replicated,) = manifest['spec']['replicatedJobs']
  assert replicated['replicas'] == slices
  job = replicated['template']['spec']
  assert job['parallelism'] == job['completions'] == hosts
  assert job['backoffLimit'] == 0 and manifest['spec']['failurePolicy']
  pod = job['template']['spec']
  assert pod['restartPolicy'] == 'Never'
  selected = {
    'cloud.google.com/gke-tpu-accelerator': label,
    'cloud.google.com/gke-tpu-topology': topology,
  }
  if slices == 2:
    selected['cloud.google.com/gke-spot'] = 'true'
    assert manifest['metadata']['namespace'] == 'lab'
    assert 'team' in manifest['metadata']['labels'].values()
  assert pod['nodeSelector'] == selected
  (container,) = pod['containers']
  assert container['resources']['limits'] == {'google.com/tpu': chips}
  assert container['resources']['requests'] == {'google.com/tpu': chips}
  mounted = {mount['name'] for mount in container['volumeMounts']}
  assert mounted == {volume['name'] for volume in pod['volumes']}
  rules = job['podFailurePolicy']['rules']
  assert rules[0]['onExitCodes']['containerName'] == container['name']
  assert container['command'] == ['python', '-m', 'launch.train']
  args = [arg.replace('$$(', '$(') for arg in container['args']]
  assert args == ['--distributed', *HARD, '--workdir=/mnt/runs/mine']
  assert not any(re.search(r'(?<!\$)\$\(', a) for a in container['args'])


@pytest.mark.parametrize(
  'change, fault',
  [
    (lambda m: m['spec'].pop('replicatedJobs'), 'replicatedJobs'),
    (lambda m: m['spec']['failurePolicy'].update(maxRestarts='x'), 'integer'),
    (lambda m: m['spec'].update(failurePolcy={}), 'failurePolcy'),
    (lambda m: m['metadata'].update(name='a_b'), 'a_b'),
    (
      lambda m: m['spec']['failurePolicy']['rules'][0].update(action='Retry'),
      'Retry',
    ),
    (
      lambda m: m['spec']['replicatedJobs'][0]['template']['spec'].pop(
        'template'
      ),
      'template',
    ),
  ],
)
def test_a_wrong_jobset_is_found(change, fault, commands):
  manifest = _manifest(commands, '--type=v6e', '--topology=4x4')
  change(manifest)
  assert any(fault in message for message in _faults(manifest))


def test_gke_applies_the_manifest_that_a_dry_run_prints(commands):
  commands.add('kubectl', 'cat >"$STUBS/applied"')
  args = [*SCRIPTS['gke.sh'], *flags_of('/mnt/runs/mine')]
  done = commands.run('gke.sh', *args)
  assert done.returncode == 0, done.stderr
  assert commands.calls() == [['kubectl', 'apply', '-f', '-']]
  shown = commands.run('gke.sh', *SCRIPTS['gke.sh'], '--dry_run', *args[-5:])
  assert (commands.folder / 'applied').read_text() == shown.stdout
  commands.add('kubectl', 'cat >&2; echo "no such server" >&2; exit 3')
  failed = commands.run('gke.sh', *args)
  assert failed.returncode == 3 and 'no such server' in failed.stderr


@pytest.mark.parametrize(
  'options, words',
  [
    (['--type=v7'], ['v7', 'v6e']),
    (['--type=v5p', '--topology=4x4'], ['4x4', '3 sizes']),
    (['--type=v6e', '--topology=4x4x4'], ['2 sizes']),
    (['--topology=2x3'], ['6 chips', '4']),
    (['--topology=0x4'], ['--topology=0']),
    (['--name=My_Run'], ['My_Run']),
    (['--', '--workdir=runs/x'], ['runs/x', '/mnt/runs']),
  ],
)
def test_gke_refuses_what_no_cluster_has(options, words, commands):
  if options[0] != '--':
    options = [*options, '--', '--workdir=/mnt/runs/x']
  done = commands.run('gke.sh', *SCRIPTS['gke.sh'], '--dry_run', *options)
  assert_refused(done, *words)


def test_xpk_runs_the_same_command_on_every_host(commands):
  commands.add('xpk', 'exit 5')
  run = f'{commands.folder}/mnt'
  done = commands.run(
    'xpk.sh', *SCRIPTS['xpk.sh'], '--slices=2', '--restarts=4', *flags_of(run)
  )
  assert done.returncode == 5
  (call,) = commands.calls('xpk')
  assert call[:-1] == [
    'workload', 'create', '--cluster=c', '--zone=z', '--workload=mine',
    '--docker-image=hub/x:tpu', '--tpu-type=v6e-16', '--num-slices=2',
    '--storage=runs', '--max-restarts=4',
    '--termination-grace-period-seconds=120',
  ]  # fmt: skip
  # as xpk puts it into a script, which Kubernetes reads first
  command = call[-1].removeprefix('--command=')
  assert '\n' not in command and command.startswith('exec ')
  commands.add('python')
  script = f'({command}) & wait $!'
  subprocess.run(['bash', '-c', script], env=commands.env, check=True)
  assert commands.calls('python') == [
    ['-m', 'launch.train', '--distributed', *HARD, f'--workdir={run}']
  ]


# SLURM


def _job(commands, run, *options, **env):
  """The job's script as SLURM runs it: a copy, in a folder of its own."""
  copy = commands.folder / 'spool'
  shutil.copy(ROOT / 'launch' / 'slurm.sbatch', copy)
  env = {
    'SLURM_JOB_ID': '7', 'SLURM_SUBMIT_DIR': str(ROOT),
    'SLURM_CPUS_PER_TASK': '6',
  } | env  # fmt: skip
  return commands.run(copy, *options, *flags_of(run), **env)


def test_slurm_starts_a_task_for_every_gpu_and_again_after_a_failure(commands):
  commands.add(
    'srun',
    """echo "$SRUN_CPUS_PER_TASK" >"$STUBS/cpus"
[ -e "$STUBS/again" ] || { touch "$STUBS/again"; exit 1; }""",
  )
  commands.add('scontrol')
  run = commands.folder / 'a run'
  done = _job(commands, run)
  assert done.returncode == 0, done.stderr
  assert 'starting again, 1 of 3' in done.stderr
  assert (commands.folder / 'cpus').read_text() == '6\n'
  command = [
    '--kill-on-bad-exit=1', '--gpu-bind=none', '--open-mode=append',
    f'--output={run}/logs/worker-%t.log', 'python', '-m', 'launch.train',
    '--distributed', *HARD, f'--workdir={run}',
  ]  # fmt: skip
  assert commands.calls() == [['srun', *command]] * 2
  assert (run / 'logs').is_dir()


@pytest.mark.parametrize(
  'status, calls, ends',
  [(143, ['srun', 'scontrol'], 0), (2, ['srun'], 2), (134, ['srun'] * 2, 134)],
)
def test_slurm_job_queues_itself_again_when_time_is_up(
  status, calls, ends, commands
):
  commands.add('srun', f'exit {status}')
  commands.add('scontrol')
  done = _job(commands, commands.folder / 'run', '--restarts=1')
  assert done.returncode == ends
  assert [call[0] for call in commands.calls()] == calls
  if status == 143:
    assert commands.calls('scontrol') == [['requeue', '7']]


def test_slurm_job_that_is_cancelled_does_not_come_back(commands):
  # scancel signals the shell of the job and the tasks
  commands.add('srun', 'kill -TERM $PPID; exit 143')
  commands.add('scontrol')
  done = _job(commands, commands.folder / 'run')
  assert done.returncode == 143
  assert [call[0] for call in commands.calls()] == ['srun']


def test_slurm_job_is_submitted_from_the_repository(commands):
  assert_refused(
    _job(commands, commands.folder / 'run', SLURM_SUBMIT_DIR='/nowhere'),
    '/nowhere',
  )
  # a script's options for sbatch end at its first command
  text = (ROOT / 'launch/slurm.sbatch').read_text()
  head = text[: text.index('\nset -euo')]
  for option in ('--requeue', '--signal=TERM@120', '--open-mode=append'):
    assert f'\n#SBATCH {option}\n' in head
