"""A dry run as text."""

from deltanet_jax.lab.dryrun.chips import GIB

_PARTS = 'arguments', 'outputs', 'aliased', 'temporaries', 'program'


def format_text(record, topology):
  """The page of one record of `run.run_dryrun`."""
  mesh = ', '.join(f'{axis} {n}' for axis, n in record['mesh'].items())
  lines = [
    record['program'],
    f'{topology}; mesh {mesh or "of one device"}; jax {record["jax"]}, libtpu'
    f' {record["libtpu"]}; lowered in {record["seconds"]["lower"]:.0f} s,'
    f' compiled in {record["seconds"]["compile"]:.0f} s',
    '',
    *_memory(record['memory']),
  ]
  if record['bound'] is not None:
    lines += ['', *_collectives(record), '', *_bound(record, topology)]
  lines += ['', _verdict(record)]
  lines += [f'  {x}' for x in record['advice']]
  return '\n'.join(lines)


def _memory(memory):
  parts = ', '.join(
    f'{name} {size / GIB:.2f}' for name, size in memory['held'].items()
  )
  lines = ['Memory of a device, GiB']
  for name in _PARTS:
    if name in memory:
      what = f'  ({parts})' if name == 'arguments' else ''
      sign = -1 if name == 'aliased' else 1
      lines.append(f'  {name:<12}{sign * memory[name] / GIB:>10.2f}{what}')
  lines.append(f'  {"together":<12}{memory["total"] / GIB:>10.2f}')
  lines.append(f'  {"there are":<12}{memory["available"] / GIB:>10.2f}')
  if 'refused' in memory:
    lines.append(f'  the compiler: {memory["refused"]}')
  return lines


def _collectives(record):
  collectives = record['collectives']
  if not collectives:
    return ['No collectives.']
  lines = [
    f'{"Collectives of a device":<34}{"devices":>8}{"count":>8}'
    f'{"result, MiB":>13}{"sent, MiB":>11}{"ms":>10}'
  ]
  for x in collectives:
    lines.append(
      f'  {x["kind"]:<32}{x["devices"]:>8}{x["count"]:>8}'
      f'{x["bytes"] / 2**20:>13,.1f}{x["sent"] / 2**20:>11,.1f}'
      f'{1e3 * x["seconds"]:>10,.4g}'
    )
  return lines


def _bound(record, topology):
  limits, flops = record['bound'], record['flops']
  peak = topology.chips * topology.chip.flops
  rows = [
    (
      'compute',
      limits['compute'],
      f'{flops["program"]:.3e} operations ({flops["model"]:.3e} the model'
      f' needs) at {peak:.3e} a second',
    ),
    (
      'memory',
      limits['memory'],
      f'{record["hbm_bytes"] / GIB:,.1f} GiB a device',
    ),
    ('within a slice', limits['ici'], ''),
  ]
  if topology.slices > 1:
    rows.append(('between slices', limits['dcn'], ''))
  lines = ['Least time, ms']
  lines += [
    f'  {name:<16}{1e3 * seconds:>12,.4g}  {note}'.rstrip()
    for name, seconds, note in rows
  ]
  if unknown := record['unknown_loops']:
    lines.append(f'  counted once: {len(unknown)} loops of unknown length')
  return lines


def _verdict(record):
  memory = record['memory']
  if not record['fits']:
    return (
      f'Does not fit: {memory["total"] / GIB:.2f} GiB a device of'
      f' {memory["available"] / GIB:.2f}. Change:'
    )
  step, runs = record['step_seconds'], record['runs']
  rate = record['tokens'] / step
  sentence = (
    f'Fits. Bound by {record["bound"]["limit"]}: at best {1e3 * step:,.4g} ms,'
    f' {rate:,.0f} tokens a second, MFU {100 * record["mfu"]:.3g}%'
  )
  if runs > 1:
    sentence += f'; {runs} of these for the whole prompt, {runs * step:,.3g} s'
  return sentence
