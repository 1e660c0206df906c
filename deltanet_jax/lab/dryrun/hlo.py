"""Parses the text of a compiled program; finds its collectives.

Loop bodies count as often as they run, unlike in XLA's cost analysis. Branches
marked `routing.RARE` do not count.
"""

import math
import re
from typing import NamedTuple

import numpy as np

from deltanet_jax.ops.routing import RARE

KINDS = (
  'all-gather', 'all-reduce', 'reduce-scatter', 'collective-permute',
  'ragged-all-to-all', 'all-to-all', 'collective-broadcast',
)  # fmt: skip
BETWEEN = 'between slices'  # traffic to other slices

_HEAD = re.compile(r'^(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{$')
_NAME = re.compile(r'^\s+(ROOT )?%?([\w.\-]+) = ')
_ARRAY = re.compile(r'\b([a-z]+)(\d*)\w*\[([\d,]*)\]((?:\{[^}]*\})?)')
_CALLED = re.compile(
  r'(calls|body|condition|to_apply|true_computation|false_computation)'
  r'=%?([\w.\-]+)'
)
_BRANCHES = re.compile(r'branch_computations=\{([^}]*)\}')


class Array(NamedTuple):
  shape: tuple
  bytes: int
  fast: bool  # in on-chip memory, not in HBM


class Instruction(NamedTuple):
  name: str
  op: str
  arrays: tuple  # of the result
  operands: tuple  # names
  text: str  # attributes
  root: bool
  literal: str  # between the parentheses


class HloProgram(NamedTuple):
  computations: dict  # name -> {name: Instruction} in order
  entry: str


class Step(NamedTuple):
  """An instruction and where it runs."""

  instruction: Instruction
  computation: str  # whose text has it
  home: str  # that runs it, looking through fusions
  times: int


class Collective(NamedTuple):
  kind: str
  shapes: tuple  # of its results on one device
  bytes: int  # of its results on one device
  times: int  # how often a device does it
  group: tuple  # the first group of devices; (): all, or unknown


def parse_program(text):
  """The HloProgram of the text of a compiled module."""
  computations, entry, now = {}, None, None
  for line in text.splitlines():
    if now is None:
      head = _HEAD.match(line)
      if head and ' = ' not in line.split('(')[0]:
        now = computations.setdefault(head[2], {})
        entry = head[2] if head[1] else entry
    elif line.startswith('}'):
      now = None
    elif name := _NAME.match(line):
      instruction = _instruction(name[2], line[name.end() :], bool(name[1]))
      now[instruction.name] = instruction
  return HloProgram(computations, entry)


def _instruction(name, text, root):
  end = _closing(text) + 1 if text.startswith('(') else text.index(' ')
  result, rest = text[:end], text[end:].lstrip()
  op, _, rest = rest.partition('(')
  end = _closing('(' + rest) - 1
  literal, text = rest[:end], rest[end + 1 :]
  operands = tuple(re.findall(r'%([\w.\-]+)', literal))
  return Instruction(name, op, _arrays(result), operands, text, root, literal)


def _closing(text):
  """The index of the parenthesis that closes the first one."""
  depth = 0
  for match in re.finditer(r'[()]', text):
    depth += 1 if match[0] == '(' else -1
    if not depth:
      return match.start()
  raise ValueError(f'no end of {text[:80]!r}')


def _arrays(text):
  arrays = []
  for kind, bits, sizes, layout in _ARRAY.findall(text):
    shape = tuple(map(int, filter(None, sizes.split(','))))
    # pred has one byte per element; token and opaque have no size
    width = int(bits) / 8 if bits else kind == 'pred'
    fast = re.search(r'S\([1-9]', layout) is not None
    arrays.append(Array(shape, math.ceil(width * math.prod(shape)), fast))
  return tuple(arrays)


def list_steps(program):
  """All Steps, unordered, with those of fusions."""
  yield from _steps(program, program.entry, program.entry, 1)


def _steps(program, name, home, times):
  around = program.computations[name]
  for x in around.values():
    yield Step(x, name, home, times)
    often = times
    if x.op == 'while':
      runs = count_trips(program, x, around)
      often *= 1 if runs is None else runs
    for link, target in list_called(x):
      if link == 'condition' or target not in program.computations:
        continue
      if x.op == 'conditional' and _rare(program.computations[target]):
        continue
      # the function of a reduction works on single elements
      if link == 'to_apply' and x.op not in ('call', 'call-start'):
        continue
      inner = home if x.op.startswith('fusion') else target
      yield from _steps(program, target, inner, often)


def _rare(branch):
  return any(f'/{RARE}/' in x.text for x in branch.values())


def list_called(instruction):
  """(attribute, name) of every computation that an instruction runs."""
  links = _CALLED.findall(instruction.text)
  for branches in _BRANCHES.findall(instruction.text):
    links += [('calls', x.strip(' %')) for x in branches.split(',')]
  return links


def count_trips(program, loop, around):
  """Iterations of a while loop; None if the text does not say."""
  known = re.search(r'known_trip_count[^\d]*(\d+)', loop.text)
  if known:
    return int(known[1])
  names = dict(list_called(loop))
  condition = program.computations[names['condition']]
  last = find_root(condition)
  direction = re.search(r'direction=(\w+)', last.text)
  if last.op == 'compare' and direction:
    ends = [_constant(condition, x) for x in last.operands]
    sides = zip(last.operands, ends, strict=True)
    moving = [x for x, end in sides if end is None]
    end = next((x for x in ends if x is not None), None)
    index = _index(condition, moving[0]) if moving else None
    more = {'LT': 0, 'LE': 1}.get(direction[1])
    if None not in (index, end, more):
      first = _first(around, loop.operands[0], index)
      return max(0, end - first + more)
  return None


def find_unknown_loops(text):
  """The names of loops of unknown length, which count once."""
  program = parse_program(text)
  trips = lambda step: count_trips(
    program, step.instruction, program.computations[step.computation]
  )
  return sorted(
    step.instruction.name
    for step in list_steps(program)
    if step.instruction.op == 'while' and trips(step) is None
  )


def _constant(computation, name):
  instruction = computation.get(name)
  if instruction is None or instruction.op != 'constant':
    return None
  return int(instruction.literal)


def _index(computation, name):
  """The index in the tuple of the loop of a value of its condition."""
  value = _origin(computation, name)
  if value.op != 'get-tuple-element':
    return None
  return int(re.search(r'index=(\d+)', value.text)[1])


def _origin(computation, name):
  """The instruction that computes a value, looking through copies; or None."""
  value = computation.get(name)
  while value is not None and value.op in ('copy', 'bitcast'):
    value = computation.get(value.operands[0])
  return value


def _first(around, name, index):
  """The value of that part before the loop; 0 if unknown."""
  before = around.get(name)
  if before is None or before.op != 'tuple':
    return 0
  part = _origin(around, before.operands[index])
  return part and _constant(around, part.name) or 0


def find_collectives(text):
  """Every Collective of a compiled program's text.

  A transfer that the TPU compiler splits over several fusions, to overlap it,
  appears in each of them and counts once.
  """
  program = parse_program(text)
  collectives, seen = [], set()
  for step in list_steps(program):
    x = step.instruction
    kind = x.op.removesuffix('-start')
    if kind == 'send' and 'xla_megascale' in x.text:
      collectives.append(_sent(x, step.times))
      continue
    if kind not in KINDS:
      continue
    if step.computation != step.home:
      key = (step.home, *re.findall(r'(?:channel_id|chain_id)="?(\d+)', x.text))
      if key in seen:
        continue
      seen.add(key)
    arrays = _result(x)
    if kind == 'ragged-all-to-all':
      # the result has room for the rows of all; a device sends only its own
      arrays = (find_smaller(program.computations[step.computation], x),)
    if kind == 'all-reduce' and 'reduce-scatter' in step.computation:
      kind = 'reduce-scatter'
      arrays = find_root(program.computations[step.computation]).arrays
    shapes = tuple(a.shape for a in arrays)
    size, group = sum(a.bytes for a in arrays), parse_group(x.text)
    collectives.append(Collective(kind, shapes, size, step.times, group))
  return collectives


def find_root(computation):
  """The instruction that a computation returns."""
  return next(x for x in computation.values() if x.root)


def find_smaller(around, x):
  """The smaller of the arrays that an exchange reads and writes."""
  both = (around[name].arrays[0] for name in x.operands[:2])
  return min(both, key=lambda a: a.bytes)


def _result(x):
  """The arrays that a collective returns, without the operands of '-start'."""
  if x.op == 'all-gather-start':
    return x.arrays[len(x.arrays) // 2 :]
  if x.op == 'collective-permute-start':
    return x.arrays[1:2]
  return x.arrays


def _sent(x, times):
  transfer = re.search(r'_xla_megascale_transfer_type="(\w+)"', x.text)
  array = x.arrays[0]
  way = transfer[1].lower().replace('_', '-') if transfer else 'send'
  kind = f'{BETWEEN}: {way}'
  return Collective(kind, (array.shape,), array.bytes, times, ())


def parse_group(text):
  """The first device group of a collective, as indices into the mesh."""
  if pairs := re.search(r'source_target_pairs=\{\{(\d+),(\d+)\}', text):
    return tuple(map(int, pairs.groups()))
  if listed := re.search(r'replica_groups=\{\{([\d,]+)\}', text):
    return tuple(map(int, listed[1].split(',')))
  numbers = lambda text: tuple(map(int, text.split(',')))
  grid = lambda sizes: np.arange(math.prod(sizes)).reshape(sizes)
  iota = re.search(
    r'replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', text
  )
  if iota:
    places = grid(numbers(iota[2]))
    if iota[3]:
      places = places.transpose(numbers(iota[3]))
    return tuple(places.reshape(numbers(iota[1]))[0].tolist())
  mesh = re.search(r'replica_groups=mesh\[([^\]]*)\] *\{([^}]*)\}', text)
  if mesh and ':' not in mesh[2]:
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
    places = grid([int(n) for n in sizes.values()])
    within = re.findall(r"'(\w+)'", mesh[2])
    first = tuple(slice(None) if a in within else 0 for a in sizes)
    return tuple(places[first].reshape(-1).tolist())
  return ()
