"""TPU chips and their topologies.

Standard library only, so that a wrong topology is refused before jax loads.
"""

import dataclasses
import math
import re

from deltanet_jax.config import ConfigError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """Peak rates of a chip; each direction of a link counts once."""

  flops: float  # bfloat16 FLOP/s
  hbm: float  # bytes that programs may use on the chip
  hbm_rate: float  # bytes per second
  link_rate: float  # bytes per second, one direction of one link
  axes: int  # of the network, two links each
  dcn_rate: float  # bytes per second, one direction to other slices
  devices: int  # jax devices
  pod: tuple  # the longest sides of a slice
  wraps: int  # sides divisible by it are rings; 0: only the pod's


# docs.cloud.google.com/tpu/docs/{v5e,v5p,v6e,tpu7x}, tables "System
# architecture": peak in bf16, HBM bandwidth, bidirectional ICI bandwidth of a
# chip over 2 x its ports for one way of one link, data center network per chip
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
  """One or more slices of a kind, such as 'v5p:4x4x8'."""

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
    """Links used at once by a ring or line of devices along an axis."""
    side, wraps = self.sides[axis], self.chip.wraps
    if side == 1:
      return 0
    ring = side % wraps == 0 if wraps else side == self.chip.pod[axis]
    return 2 if ring else 1

  def ici_rate(self, axes):
    """Most bytes per second that a device sends within a group that spans these
    axes of the slice; (): within a chip, assumed as fast as its network."""
    links = sum(map(self.links, axes)) or 2 * self.chip.axes
    return links * self.chip.link_rate / self.chip.devices


def parse_topology(text, slices=1):
  """The Topology of 'v5p:4x4x8'.

  Raises:
    ConfigError: unknown chip, or sides that no slice has.
  """
  refusal = lambda why: ConfigError(f'--topology={text}: {why}')
  kind, _, sides = text.partition(':')
  if kind not in CHIPS or not re.fullmatch(r'\d+(x\d+)*', sides):
    raise refusal(
      f'give a chip ({", ".join(CHIPS)}) and the sides of a slice, such as'
      ' v5e:16x16 or v5p:4x4x8'
    )
  topology = Topology(kind, tuple(map(int, sides.split('x'))), slices)
  pod = topology.chip.pod
  example = f'{kind}:{"x".join(["4"] * len(pod))}'
  if len(topology.sides) != len(pod):
    raise refusal(f'a slice of {kind} has {len(pod)} sides, such as {example}')
  if any(side % 2 for side in topology.sides[:2]):
    raise refusal(
      f'hosts have 2x2 chips; make the first two sides even, such as {example}'
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
