"""The least time that a compiled program needs on a chip."""

import collections
import dataclasses
import math

from deltanet_jax.lab.dryrun import hlo


@dataclasses.dataclass(frozen=True)
class Network:
  """Collectives of one kind over devices that lie alike."""

  kind: str
  devices: int  # of a group
  count: int
  bytes: int  # of the results, on one device
  sent: float  # by one device
  seconds: float


def time_networks(collectives, topology, places):
  """[Network], the longest first.

  places: the coordinates of the devices of one slice in the order of the mesh
  """
  sums = collections.defaultdict(lambda: [0, 0, 0.0, 0.0])
  for x in collectives:
    between = x.kind.startswith(hlo.BETWEEN)
    n = topology.slices if between else len(x.group) or len(places)
    sent = _sent(x.kind, x.bytes, n)
    if between:
      rate = topology.chip.dcn_rate / topology.chip.devices
    else:
      rate = topology.ici_rate(_axes(x.group, places))
    row = sums[x.kind, n]
    for i, value in enumerate((1, x.bytes, sent, sent / rate)):
      row[i] += x.times * value
  networks = [Network(*key, *row) for key, row in sums.items()]
  return sorted(networks, key=lambda x: -x.seconds)


def _sent(kind, size, n):
  """Bytes that each of n devices sends, `size` those of its result, by the
  least that moves: rings, and halves both ways in an all-reduce."""
  kind = kind.removeprefix(f'{hlo.BETWEEN}: ')
  if kind == 'all-reduce':
    return 2 * size * (n - 1) / n
  if kind == 'reduce-scatter':
    return size * (n - 1)
  if kind in ('all-gather', 'all-to-all', 'ragged-all-to-all'):
    return size * (n - 1) / n
  return size


def _axes(group, places):
  """The axes of the slice along which a group of devices extends."""
  corners = [places[i] for i in group] if group else places
  return tuple(
    axis
    for axis in range(len(corners[0]))
    if len({p[axis] for p in corners}) > 1
  )


@dataclasses.dataclass(frozen=True)
class Bound:
  """Seconds of one run if nothing but this limited it."""

  compute: float
  memory: float
  ici: float
  dcn: float

  @property
  def seconds(self):
    """Of one run, when everything overlaps perfectly."""
    return max(dataclasses.astuple(self))

  @property
  def limit(self):
    names = {
      'compute': self.compute,
      'memory bandwidth': self.memory,
      'network within a slice': self.ici,
      'network between slices': self.dcn,
    }
    return max(names, key=names.get)


def compute_bound(topology, flops, traffic, networks):
  """The Bound of a program.

  flops: of all devices   traffic: bytes of HBM that one device moves
  """
  chip = topology.chip
  between = lambda x: x.kind.startswith(hlo.BETWEEN)
  return Bound(
    compute=flops / (topology.chips * chip.flops),
    memory=traffic / (chip.hbm_rate / chip.devices),
    ici=math.fsum(x.seconds for x in networks if not between(x)),
    dcn=math.fsum(x.seconds for x in networks if between(x)),
  )
