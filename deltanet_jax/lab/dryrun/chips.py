"""TPU chips and the topologies that they are wired to.

Standard library only: a wrong topology is answered before jax is imported.
"""

import dataclasses
import math
import re

from deltanet_jax.config import ConfigError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """What one chip can do, each way of a link counted once."""

  flops: float  # bfloat16 operations a second
  hbm: float  # bytes a program may use, of all its devices
  hbm_rate: float  # bytes a second
  link_rate: float  # bytes a second, one way over one link to a neighbor
  axes: int  # of its network, two links each
  dcn_rate: float  # bytes a second, one way to other slices
  devices: int  # that jax sees
  pod: tuple  # the longest sides of a slice
  wraps: int  # a side is a ring where this divides it (0: the pod's side alone)


# docs.cloud.google.com/tpu/docs/{v5e,v5p,v6e,tpu7x}, tables "System
# architecture": peak in bf16, HBM bandwidth, bidirectional ICI bandwidth of a
# chip over 2 x its ports for one way of one link, data centre network per chip
# (v5e, v6e: a pod's over 256). The memory is what libtpu 0.0.42 leaves to
# programs; the tables say 16, 95, 32 and 192. A v5p chip's two cores are one
# device, those of a tpu7x two. Rings: jax-ml.github.io/scaling-book/tpus.
CHIPS = {
  'v5e': Chip(
    197e12, 15.75 * GIB, 819e9, 50e9, 2, 3.125e9, 1, (16, 16), wraps=0
  ),
  'v5p': Chip(
    459e12, 95.74 * GIB, 2765e9, 100e9, 3, 6.25e9, 1, (16, 16, 24), wraps=4
  ),
  'v6e': Chip(
    918e12, 31.25 * GIB, 1638e9, 100e9, 2, 12.5e9, 1, (16, 16), wraps=0
  ),
  'tpu7x': Chip(
    2307e12, 189.5 * GIB, 7380e9, 100e9, 3, 12.5e9, 2, (16, 24, 24), wraps=4
  ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Topology:
  """Slices of one kind: 'v5p:4x4x8', perhaps several."""

  kind: str
  sides: tuple
  slices: int = 1

  @property
  def name(self):
    return f'{self.kind}:{"x".join(map(str, self.sides))}'

  @property
  def chip(self):
    return CHIPS[self.kind]

  @property
  def chips(self):
    return math.prod(self.sides) * self.slices

  @property
  def devices(self):
    return self.chips * self.chip.devices

  def __str__(self):
    chips = f'{self.chips} chips'
    if self.chip.devices > 1:
      chips += f' of {self.chip.devices} devices'
    if self.slices > 1:
      return f'{self.slices} slices of {self.name}, {chips}'
    return f'{self.name}, {chips}'

  def links(self, axis):
    """Links that a ring or line of devices along an axis sends over at once."""
    side, wraps = self.sides[axis], self.chip.wraps
    if side == 1:
      return 0
    ring = side % wraps == 0 if wraps else side == self.chip.pod[axis]
    return 2 if ring else 1

  def ici_rate(self, axes):
    """Bytes a second that a device sends at most within a group of devices that
    spreads over these axes of the slice; (): within a chip, taken for as fast
    as the chip's whole network."""
    links = sum(map(self.links, axes)) or 2 * self.chip.axes
    return links * self.chip.link_rate / self.chip.devices


def parse_topology(text, slices=1):
  """The Topology of 'v5p:4x4x8'.

  Raises:
    ConfigError: no such chip, or sides that no slice has.
  """
  refusal = lambda why: ConfigError(f'--topology={text}: {why}')
  kind, _, sides = text.partition(':')
  if kind not in CHIPS or not re.fullmatch(r'\d+(x\d+)*', sides):
    raise refusal(
      f'give a chip of {", ".join(CHIPS)} and the sides of a slice, as'
      ' v5e:16x16 or v5p:4x4x8'
    )
  topology = Topology(kind, tuple(map(int, sides.split('x'))), slices)
  pod = topology.chip.pod
  example = f'{kind}:{"x".join(["4"] * len(pod))}'
  if len(topology.sides) != len(pod):
    raise refusal(f'a slice of {kind} has {len(pod)} sides, as {example}')
  if any(side % 2 for side in topology.sides[:2]):
    raise refusal(
      f'hosts have 2x2 chips; make the first two sides even, as in {example}'
    )
  pairs = zip(sorted(topology.sides), sorted(pod), strict=True)
  if 0 in topology.sides or any(side > most for side, most in pairs):
    raise refusal(
      f'the largest slice of {kind} is {"x".join(map(str, pod))}; take several'
      ' with --slices'
    )
  return topology


def check_mesh(mesh, topology):
  """ConfigError unless a MeshConfig fills the topology, slices by replica."""
  if mesh.replica % topology.slices:
    raise ConfigError(
      f'mesh.replica is {mesh.replica} and there are {topology.slices} slices;'
      f' set --config.mesh.replica={topology.slices}'
    )
  sizes = {f.name: getattr(mesh, f.name) for f in dataclasses.fields(mesh)}
  have, need = math.prod(sizes.values()), topology.devices
  if have == need:
    return
  axes = ' x '.join(f'{a} {n}' for a, n in sizes.items() if n > 1) or 'of one'
  others = have // mesh.fsdp
  change = (
    f'--config.mesh.fsdp={need // others}'
    if need % others == 0
    else f'axes whose product is {need}'
  )
  where = f'{topology.slices} x ' if topology.slices > 1 else ''
  raise ConfigError(
    f'mesh {axes} is {have} devices and {where}{topology.name} has {need}; set'
    f' {change}'
  )
