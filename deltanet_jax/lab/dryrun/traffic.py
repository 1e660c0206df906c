"""Bytes that a compiled program reads from and writes to a device's HBM."""

from deltanet_jax.lab.dryrun import hlo

# these move nothing, or it is counted where it is used
_FREE = {
  'parameter', 'constant', 'tuple', 'get-tuple-element', 'bitcast', 'while',
  'call', 'conditional', 'after-all', 'iota', 'partition-id', 'replica-id',
  'opt-barrier', 'broadcast', 'domain', 'recv', 'async-start', 'reshape',
  'call-start', 'add-dependency',
}  # fmt: skip
# in a fusion: computed where it is used
_SAME = ('bitcast', 'copy')
_SLICES = ('dynamic-slice', 'slice', 'gather')


def count_bytes(text, filled=1):
  """Bytes of one run on one device.

  Every instruction reads its operands and writes its results once; of a sliced
  array only the slice counts, of on-chip memory nothing.

  filled: share of the rows of a grouped product that belong to a group
  """
  program = hlo.parse_program(text)
  total = 0
  for step in hlo.list_steps(program):
    x = step.instruction
    if step.computation != step.home or x.op in _FREE:
      continue
    if x.op.endswith('-done') or 'AllocateBuffer' in x.text:
      continue
    total += step.times * _moved(program, step, x, filled)
  return round(total)


def _moved(program, step, x, filled):
  around = program.computations[step.computation]
  read = [around[name].arrays for name in x.operands if name in around]
  if x.op in _SLICES:
    return 2 * _hbm(x.arrays)
  if x.op == 'dynamic-update-slice':
    return 2 * _hbm(read[1])
  if x.op in ('copy-start', 'slice-start'):
    # results: the new and the old array, in any order
    size = min(a.bytes for a in x.arrays[:2])
    return size * sum(not a.fast for a in x.arrays[:2])
  if x.op.startswith('ragged-all-to-all'):
    return 2 * _hbm((hlo.find_smaller(around, x),))
  if x.op == 'custom-call' and x.name.startswith('ragged-dot'):
    # rows are matrices; those of groups are stacked
    arrays = [a for arrays in (x.arrays, *read) for a in arrays]
    return sum(
      _hbm((a,)) * (filled if len(a.shape) == 2 else 1) for a in arrays
    )
  if x.op == 'send':
    return _hbm(x.arrays[:1])
  if x.op != 'fusion':
    return _hbm(x.arrays) + sum(map(_hbm, read))
  return _fused(_inlined(program, x), read, x.arrays)


def _inlined(program, fusion):
  """The computation of a fusion, with nested fusions inlined."""
  (name,) = [
    target for link, target in hlo.list_called(fusion) if link == 'calls'
  ]
  flat = {}
  for x in program.computations[name].values():
    if x.op != 'fusion':
      flat[x.name] = x
      continue
    inside = lambda name, x=x: f'{x.name}/{name}'
    for y in _inlined(program, x).values():
      name = x.name if y.root else inside(y.name)
      operands = tuple(map(inside, y.operands))
      if y.op == 'parameter':
        y, operands = y._replace(op='bitcast'), (x.operands[int(y.literal)],)
      flat[name] = y._replace(
        name=name, operands=operands, root=x.root and y.root
      )
  return flat


def _hbm(arrays):
  return sum(a.bytes for a in arrays if not a.fast)


def _fused(inner, read, written):
  """In a fusion a parameter that is only sliced counts as its slices, a result
  written into an operand as what is written."""
  users = {}
  for x in inner.values():
    for name in x.operands:
      users.setdefault(name, []).append(x)
  total = 0
  for x in inner.values():
    if x.op == 'parameter':
      arrays = read[int(x.literal)] if int(x.literal) < len(read) else ()
      if _hbm(arrays):
        total += min(_hbm(arrays), _used(x, users, inner))
  root = hlo.find_root(inner)
  parts = [inner[n] for n in root.operands] if root.op == 'tuple' else [root]
  if len(parts) != len(written):
    return total + _hbm(written)
  for part, array in zip(parts, written, strict=True):
    while part.op in _SAME:
      part = inner[part.operands[0]]
    if part.op == 'dynamic-update-slice':
      update = inner[part.operands[1]]
      total += 0 if array.fast else sum(a.bytes for a in update.arrays)
    else:
      total += _hbm((array,))
  return total


def _used(x, users, inner):
  """Bytes of a value that its users in the fusion read."""
  size = sum(a.bytes for a in x.arrays)
  used = 0
  for user in users.get(x.name, ()):
    if user.op in _SAME and not user.root:
      used += _used(user, users, inner)
    elif user.op in _SLICES and user.operands[0] == x.name:
      used += sum(a.bytes for a in user.arrays)
    elif user.op == 'dynamic-update-slice' and user.operands[0] == x.name:
      continue
    else:
      used += size
  return used
