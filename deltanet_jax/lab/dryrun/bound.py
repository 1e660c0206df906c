"""Roofline lower bound of the time of a compiled program."""

import collections
import dataclasses
import math

from deltanet_jax.lab.dryrun import hlo


@dataclasses.dataclass(frozen=True)
class Network:
  """Collectives of one kind over device groups of one shape."""

  kind: str
  devices: int  # in a group
  count: int
  bytes: int  # of the results, on one device
  sent: float  # by one device
  seconds: float


def time_networks(collectives, topology, coordinates):
  """[Network], the longest first.

  coordinates: coordinates of the devices of a slice in mesh order
  """
  sums = collections.defaultdict(lambda: [0, 0, 0.0, 0.0])
  for x in collectives:
    between = x.kind.startswith(hlo.BETWEEN)
    n = topology.slices if between else len(x.group) or len(coordinates)
    sent = _sent(x.kind, x.bytes, n)
    if between:
      rate = topology.chip.dcn_rate / topology.chip.devices
    else:
      rate = topology.ici_rate(_axes(x.group, coordinates))
    row = sums[x.kind, n]
    for i, value in enumerate((1, x.bytes, sent, sent / rate)):
      row[i] += x.times * value
  networks = [Network(*key, *row) for key, row in sums.items()]
  return sorted(networks, key=lambda x: -x.seconds)


def _sent(kind, size, n):
  """Bytes that each of n devices sends at least for a result of `size` bytes:
  rings, in both directions for an all-reduce."""
  kind = kind.removeprefix(f'{hlo.BETWEEN}: ')
  if kind == 'all-reduce':
    return 2 * size * (n - 1) / n
  if kind == 'reduce-scatter':
    return size * (n - 1)
  if kind in ('all-gather', 'all-to-all', 'ragged-all-to-all'):
    return size * (n - 1) / n
  return size


def _axes(group, coordinates):
  """The axes of the slice that a group of devices spans."""
  corners = [coordinates[i] for i in group] if group else coordinates
  return tuple(
    axis
    for axis in range(len(corners[0]))
    if len({p[axis] for p in corners}) > 1
  )


@dataclasses.dataclass(frozen=True)
class Bound:
  """Lower bounds in seconds, each by one resource."""

  compute: float
  memory: float
  ici: float
  dcn: float

  @property
  def seconds(self):
    """The largest bound: perfect overlap."""
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

  flops: of all devices   traffic: HBM bytes of one device
  """
  chip = topology.chip
  between = lambda x: x.kind.startswith(hlo.BETWEEN)
  return Bound(
    compute=flops / (topology.chips * chip.flops),
    memory=traffic / (chip.hbm_rate / chip.devices),
    ici=math.fsum(x.seconds for x in networks if not between(x)),
    dcn=math.fsum(x.seconds for x in networks if between(x)),
  )
