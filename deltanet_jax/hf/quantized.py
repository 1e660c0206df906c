"""Finds quantized weights; only block-scaled FP8 is supported."""

import pathlib
import re
import reprlib
from collections.abc import Mapping

from deltanet_jax.config import ConfigError
from deltanet_jax.hf.names import Json

BLOCK = 128  # rows and columns that share a scale in block-scaled float8

# AWQ and GPTQ, MLX, bitsandbytes, compressed-tensors, NVFP4, MXFP4
_TENSORS = re.compile(
  r'(.*\.)?(qweight|qzeros|g_idx|scales|biases|SCB'
  r'|weight_(packed|shape|zero_point|scale|scale_2|scales|global_scale|format)'
  r'|(input|output|k|v)_(scale|global_scale|zero_point)'
  r'|weight\.(nested_)?(absmax|quant_map|quant_state\..+)'
  r'|\w+_(blocks|scales))'
)
# supported: the value of a missing key, and others
_FP8: dict[str, tuple[object, ...]] = {
  'quant_method': ('fp8',),
  'weight_block_size': ([BLOCK, BLOCK],),
  'fmt': ('e4m3',),
  'scale_fmt': ('float', 'ue8m0', None),
}
_FREE = ('activation_scheme', 'modules_to_not_convert', 'ignored_layers')


def refuse_quantized(
  settings: Json, tensors: Mapping[str, str], where: pathlib.Path
) -> None:
  """Refuses quantized weights other than block-scaled FP8.

  settings: config.json   tensors: {name: file}   where: the folder

  Raises:
    ConfigError: names the method, or the tensor that reveals it.
  """
  for key in ('quantization_config', 'quantization', 'compression_config'):
    value = _find(settings, key)
    if value and (reason := _unread(key, value)):
      raise ConfigError(
        f'{where}/config.json: quantized weights: {key} has {reason}; only FP8'
        f' in blocks of {BLOCK} x {BLOCK} is supported; give a folder that is'
        ' not quantized'
      )
  for name in tensors:
    if _TENSORS.fullmatch(name):
      raise ConfigError(
        f'{where}/{tensors[name]}: {name} belongs to quantized weights; give a'
        ' folder that is not quantized'
      )


def has_exponents(settings: Json) -> bool:
  """Whether scales are stored as exponents of powers of two (ue8m0)."""
  scheme = _find(settings, 'quantization_config')
  return isinstance(scheme, dict) and scheme.get('scale_fmt') == 'ue8m0'


def remove_settings(settings: Json) -> Json:
  """config.json without the keys of quantization."""
  rest = {k: v for k, v in settings.items() if k != 'quantization_config'}
  if isinstance(text := rest.get('text_config'), dict):
    rest['text_config'] = remove_settings(text)
  return rest


def _find(settings: Json, key: str) -> object:
  """The value in config.json or in its text_config."""
  text = settings.get('text_config')
  return settings.get(key) or (isinstance(text, dict) and text.get(key))


def _unread(key: str, scheme: object) -> str | None:
  """The part of a quantization_config that is not supported, or None."""
  if not isinstance(scheme, dict) or key != 'quantization_config':
    return reprlib.repr(scheme)
  method = scheme.get('quant_method', 'fp8')
  if method != 'fp8':
    return f'quant_method {reprlib.repr(method)}'
  for name, supported in _FP8.items():
    value = scheme.get(name, supported[0])
    if value not in supported:
      return f'{name} {reprlib.repr(value)}'
  if 'quant_method' not in scheme:
    more = [name for name in scheme if name not in (*_FP8, *_FREE)]
    if more:
      return f'{more[0]} {reprlib.repr(scheme[more[0]])}'
  return None
