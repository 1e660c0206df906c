"""Stubs in place of the clouds' commands and of Python, for the launchers."""

import os
import pathlib
import subprocess
import time

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SCRIPTS = {  # name: the options it cannot do without
  'local.sh': [],
  'tpu_vm.sh': ['up', '--name=mine', '--zone=z', '--type=v6e-16',
                '--version=v2-alpha-tpuv6e'],
  'gke.sh': ['--name=mine', '--image=hub/x:tpu', '--type=v6e',
             '--topology=4x4', '--claim=runs'],
  'xpk.sh': ['--cluster=c', '--zone=z', '--name=mine', '--image=hub/x:tpu',
             '--type=v6e-16', '--storage=runs'],
  'slurm.sbatch': [],
}  # fmt: skip
# what a shell, ssh, YAML or Kubernetes would like to have a word with
HARD = [
  '--config=configs/quickstart.py',
  "--config.data.path=texts/*.txt,more/[ab]?.txt,!it's",
  '--config.text=two  words "quoted" $HOME $(HOME) `id` \\n {x} é #&;|<>',
]
# records its arguments, then does what the lines of stub.sh say
STUB = """#!/usr/bin/env bash
printf '%s\\0' "${{0##*/}}" "$@" $'\\n' >>'{log}'
{body}
"""


class Commands:
  """A PATH of stubs, and what they were called with."""

  def __init__(self, folder):
    self.folder = folder
    self.log = folder / 'calls'
    self.bin = folder / 'bin'
    self.bin.mkdir()
    self.env = os.environ | {
      'PATH': f'{self.bin}:{os.environ["PATH"]}',
      'HOME': str(folder),
      'JAX_PLATFORMS': 'cpu',
      'STUBS': str(folder),
    }

  def add(self, name, body=''):
    path = self.bin / name
    path.write_text(STUB.format(log=self.log, body=body))
    path.chmod(0o755)

  def calls(self, name=None):
    """Argument lists, in order."""
    if not self.log.exists():
      return []
    lines = self.log.read_text().split('\0\n\0')[:-1]
    found = [line.split('\0') for line in lines]
    return [c[1:] for c in found if c[0] == name] if name else found

  def run(self, script, *args, **env):
    return subprocess.run(
      [ROOT / 'launch' / script, *map(str, args)],
      cwd=self.folder,
      env=self.env | env,
      capture_output=True,
      text=True,
      timeout=600,
    )


@pytest.fixture
def commands(tmp_path):
  return Commands(tmp_path)


def assert_refused(done, *words):
  assert done.returncode == 2, done.stderr
  assert done.stdout == ''
  assert done.stderr.startswith('error: ') and done.stderr.count('\n') == 1
  for word in words:
    assert word in done.stderr


def flags_of(workdir):
  return ['--', *HARD, f'--workdir={workdir}']


def until(condition):
  for _ in range(2400):
    if condition():
      return
    time.sleep(0.05)
  raise AssertionError('not in time')
