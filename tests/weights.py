"""Released folders that are made by hand, tensor by tensor and byte by byte."""

import json
import math
import pathlib
import shutil

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file

FIXTURES = pathlib.Path(__file__).parent / 'fixtures'
KINDS = {
  np.dtype(np.float64): 'F64',
  np.dtype(np.float32): 'F32',
  np.dtype(np.float16): 'F16',
  np.dtype(ml_dtypes.bfloat16): 'BF16',
  np.dtype(ml_dtypes.float8_e4m3fn): 'F8_E4M3',
  np.dtype(ml_dtypes.float8_e8m0fnu): 'F8_E8M0',
  np.dtype(np.uint8): 'U8',
  np.dtype(np.int8): 'I8',
  np.dtype(np.int32): 'I32',
  np.dtype(np.uint32): 'U32',
  np.dtype(np.bool_): 'BOOL',
}


def tensors(name, part='model'):
  """The tensors of a fixture."""
  return load_file(FIXTURES / name / f'{part}.safetensors')


def settings(name):
  """The config.json of a fixture, in the released keys."""
  return json.loads((FIXTURES / name / 'config.released.json').read_text())


def write_file(path, found):
  """A safetensors file, written without the package."""
  header, blobs, at = {}, [], 0
  for name, x in found.items():
    blob = np.ascontiguousarray(x).tobytes()
    header[name] = {
      'dtype': KINDS[x.dtype],
      'shape': list(x.shape),
      'data_offsets': [at, at + len(blob)],
    }
    at += len(blob)
    blobs.append(blob)
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(packed(json.dumps(header).encode(), b''.join(blobs)))


def packed(header, data):
  return len(header).to_bytes(8, 'little') + header + data


def write(folder, name, found=None, files=None, **more):
  """A folder of a fixture's family.

  found: its tensors, the fixture's own unless given   files: of each tensor in
  turn, of an index; one file without   more: of config.json
  """
  found = tensors(name) if found is None else found
  folder.mkdir(parents=True, exist_ok=True)
  config = json.dumps(settings(name) | more)
  (folder / 'config.json').write_text(config)
  if files is None:
    write_file(folder / 'model.safetensors', found)
    return folder
  groups, share = {}, math.ceil(len(found) / len(files))
  for i, (key, x) in enumerate(found.items()):
    groups.setdefault(files[i // share], {})[key] = x
  for file, group in groups.items():
    write_file(folder / file, group)
  return write_index(
    folder, {key: file for file, group in groups.items() for key in group}
  )


def write_index(folder, weight_map):
  text = json.dumps({'metadata': {}, 'weight_map': weight_map})
  (folder / 'model.safetensors.index.json').write_text(text)
  return folder


def snapshot(folder, cache):
  """The folder as the hub's library keeps it: links to a folder of blobs."""
  (cache / 'blobs').mkdir(parents=True)
  at = cache / 'snapshots' / 'main'
  for path in sorted(folder.rglob('*')):
    if path.is_dir():
      continue
    to = at / path.relative_to(folder)
    to.parent.mkdir(parents=True, exist_ok=True)
    blob = cache / 'blobs' / f'{len(list((cache / "blobs").iterdir()))}'
    shutil.copy(path, blob)
    up = '/'.join(['..'] * (len(to.relative_to(cache).parts) - 1))
    to.symlink_to(f'{up}/blobs/{blob.name}')
  return at
