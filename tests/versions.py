"""Runs the fast tests under a Python and a jax; the result goes to
docs/versions.md.

  python -m tests.versions --python=python3.13 --jax=0.12.0.1
  python -m tests.versions --python=python3.12 --jax=0.11.2 tests/ops

--python is an interpreter. Its environment, .venv-PYTHON-jax-JAX, is made once;
the other libraries are the newest that requirements.txt and this jax allow.
What is left of the command line goes to tests/run.sh; the table names it.

Exit status: that of pytest.
"""

import argparse
import datetime
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree

ROOT = pathlib.Path(__file__).parents[1]
TABLE = ROOT / 'docs/versions.md'
HEAD = """\
# Versions that were tried

The fast tests on a CPU, by `python -m tests.versions`, which writes this page;
a pair's newest run.

| Python | jax | flax | date | tests | passed | failed | skipped | minutes |
|---|---|---|---|---|---|---|---|---|
"""
SHOW = """
import platform, flax, jax
print(platform.python_version(), jax.__version__, flax.__version__)
"""


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--python', default=sys.executable, help='interpreter')
  parser.add_argument('--jax', required=True, help='version')
  taken, chosen = parser.parse_known_args()
  folder = make_environment(taken.python, taken.jax)
  python = folder / 'bin/python'
  versions = _output(python, '-c', SHOW)
  with tempfile.TemporaryDirectory() as work:
    report = pathlib.Path(work) / 'report.xml'
    status = subprocess.run(
      ['bash', 'tests/run.sh', f'--junitxml={report}', *chosen],
      cwd=ROOT,
      env=os.environ | {'VIRTUAL_ENV': str(folder)},
    ).returncode
    if not report.is_file():
      return status
    counts = count_tests(report.read_text())
  tests = [word for word in chosen if not word.startswith('-n')]
  today = datetime.date.today().isoformat()
  row = [*versions.split(), today, ' '.join(tests) or 'all', *counts]
  text = TABLE.read_text() if TABLE.is_file() else HEAD
  TABLE.write_text(insert_row(text, row))
  return status


def make_environment(python: str, jax: str) -> pathlib.Path:
  """The folder of an environment with requirements.txt and a jax."""
  script = 'import sys; print("%d.%d" % sys.version_info[:2])'
  folder = ROOT / f'.venv-{_output(python, "-c", script)}-jax-{jax}'
  if not (folder / 'done').exists():
    subprocess.run([python, '-m', 'venv', folder], check=True)
    subprocess.run(
      [folder / 'bin/python', '-m', 'pip', 'install', '--quiet',
       '-r', ROOT / 'requirements.txt', f'jax=={jax}'],
      check=True,
    )  # fmt: skip
    (folder / 'done').touch()
  return folder


def count_tests(report: str) -> list[str]:
  """Passed, failed, skipped and minutes of a JUnit report."""
  suites = list(ElementTree.fromstring(report).iter('testsuite'))
  add = lambda name: sum(float(suite.get(name, 0)) for suite in suites)
  failed, skipped = add('failures') + add('errors'), add('skipped')
  passed = add('tests') - failed - skipped
  return [f'{passed:.0f}', f'{failed:.0f}', f'{skipped:.0f}',
          f'{add("time") / 60:.0f}']  # fmt: skip


def insert_row(table: str, row: list[str]) -> str:
  """The table with a row in the place of the same Python and jax."""
  head, rule, rows = re.split(r'(\|---.*\|\n)', table)
  cells = [line.strip('| ').split(' | ') for line in rows.splitlines()]
  others = [cell for cell in cells if cell[:2] != row[:2]]
  lines = [f'| {" | ".join(cell)} |\n' for cell in sorted([*others, row])]
  return head + rule + ''.join(lines)


def _output(*command):
  done = subprocess.run(command, check=True, text=True, capture_output=True)
  return done.stdout.strip()


if __name__ == '__main__':
  sys.exit(main())
