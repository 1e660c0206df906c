"""Which folders hold quantised weights? Of them FP8 in blocks alone is read."""

import re
import reprlib

from deltanet_jax.config import ConfigError

BLOCK = 128  # rows and columns that share a scale in block-scaled float8

# of AWQ and GPTQ, MLX, bitsandbytes, compressed-tensors, NVFP4, MXFP4
_TENSORS = re.compile(
  r'(.*\.)?(qweight|qzeros|g_idx|scales|biases|SCB'
  r'|weight_(packed|shape|zero_point|scale|scale_2|scales|global_scale|format)'
  r'|(input|output|k|v)_(scale|global_scale|zero_point)'
  r'|weight\.(nested_)?(absmax|quant_map|quant_state\..+)'
  r'|\w+_(blocks|scales))'
)
# what we read: the value that an absent key stands for, and others
_FP8 = {
  'quant_method': ('fp8',),
  'weight_block_size': ([BLOCK, BLOCK],),
  'fmt': ('e4m3',),
  'scale_fmt': ('float', 'ue8m0', None),
}
_FREE = ('activation_scheme', 'modules_to_not_convert', 'ignored_layers')


def require_none(settings, tensors, where):
  """Refuses quantised weights, apart from FP8 in blocks.

  settings: config.json as a dict   tensors: their names   where: the folder

  Raises:
    ConfigError: with the method, or the tensor that is a sign of it.
  """
  for key in ('quantization_config', 'quantization', 'compression_config'):
    found = _find(settings, key)
    if found and (reason := _unread(key, found)):
      raise ConfigError(
        f'{where}/config.json: quantised weights: {key} has {reason}; only FP8'
        f' in blocks of {BLOCK} x {BLOCK} is read, give a folder that is not'
        ' quantised'
      )
  for name in tensors:
    if _TENSORS.fullmatch(name):
      raise ConfigError(
        f'{where}/{tensors[name]}: {name} belongs to quantised weights; give a'
        ' folder that is not quantised'
      )


def exponents(settings):
  """Whether scales are powers of two, stored as their exponents (ue8m0)."""
  found = _find(settings, 'quantization_config')
  return isinstance(found, dict) and found.get('scale_fmt') == 'ue8m0'


def removed(settings):
  """A config.json of weights that are not quantised any more."""
  found = {k: v for k, v in settings.items() if k != 'quantization_config'}
  if isinstance(text := found.get('text_config'), dict):
    found['text_config'] = removed(text)
  return found


def _find(settings, key):
  """Of config.json, or of the text model in it."""
  text = settings.get('text_config')
  return settings.get(key) or (isinstance(text, dict) and text.get(key))


def _unread(key, found):
  """What of a quantization_config we do not read, or None."""
  if not isinstance(found, dict) or key != 'quantization_config':
    return reprlib.repr(found)
  method = found.get('quant_method', 'fp8')
  if method != 'fp8':
    return f'quant_method {reprlib.repr(method)}'
  for name, supported in _FP8.items():
    value = found.get(name, supported[0])
    if value not in supported:
      return f'{name} {reprlib.repr(value)}'
  if 'quant_method' not in found:
    more = [name for name in found if name not in (*_FP8, *_FREE)]
    if more:
      return f'{more[0]} {reprlib.repr(found[more[0]])}'
  return None
