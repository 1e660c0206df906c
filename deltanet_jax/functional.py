"""The recurrences and attention as functions: `deltanet_jax.kda` and so on.

These functions are in `deltanet_jax` itself; `deltanet_jax.ops` has modules, of
which some have the same names.

A function that is called eagerly is compiled once for each set of shapes; it
works inside `jax.jit`, `grad`, `vmap`, `checkpoint` and `shard_map` (with
check_vma=False). Every form has first and second derivatives, 'kernel',
'splash' and 'cudnn' first ones alone. Forward mode (`jax.jvp`) works with the
form 'recurrent', and with 'associative' without segment_ids, in both cases
without cu_seqlens; elsewhere JAX raises an error that it cannot apply jvp to a
custom_vjp function.
"""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np

from deltanet_jax import kernels
from deltanet_jax.config.forms import SOFTMAX
from deltanet_jax.kernels.attention import attend_rows, choose_form
from deltanet_jax.ops import documents
from deltanet_jax.ops.attention import Place
from deltanet_jax.ops.description import STATE
from deltanet_jax.ops.scan import Result, require_positive
from deltanet_jax.ops.shapes import check_shapes


def gated_delta_rule(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  beta: jax.Array,
  g: jax.Array,
  state: jax.Array | None = None,
  segment_ids: jax.Array | None = None,
  cu_seqlens: jax.Array | None = None,
  form: str = 'auto',
  chunk: int = 64,
) -> Result:
  """The gated delta rule (arXiv:2412.06464 eq. 10).

    S'  = e^{g_t} S_{t-1}
    S_t = S' + beta_t k_t (v_t - S'^T k_t)^T
    o_t = S_t^T q_t

  q, k [B,T,J,K]   v [B,T,H,V]   H a multiple of J: value head h reads key head
  h // (H/J). q and k are neither scaled nor normalized: give keys of norm 1.
  beta [B,T,H]: the share of the value under a key that is replaced, 0 to 2
  g [B,T,H]: the logarithm of the decay, <= 0; -inf: the state is reset

  Arguments that all recurrences share:

  state [B,H,K,V]: the state before the first token; None: zeros
  segment_ids [B,T] int: the state is reset to zero where they change; `state`
    belongs to the first document of a row
  cu_seqlens [N+1] int, B = 1, in place of segment_ids: document n is the tokens
    from cu_seqlens[n] up to cu_seqlens[n+1], perhaps none. Every document has a
    state: the given and the returned one are [N,H,K,V]. Tokens after the last
    document have output 0
  form: 'recurrent', token by token, the definition; 'chunked', for training;
    'associative', a parallel scan over chunks; 'tree', in fewer and larger
    steps than 'chunked', for GPUs (`ops/README.md`, section 9; no card has
    timed it yet); 'kernel', for TPUs alone (section 8; it has not run on one
    yet). All agree. 'auto': 'kernel' on a TPU where it covers the arguments,
    else 'chunked'. With cu_seqlens 'chunked', 'associative' and 'tree' compute
    blocks of 1 to 4 chunks, one after the other
  chunk: tokens of a chunk, 16 * 2^n; not used by 'recurrent', 128 of 'kernel'

  Returns o [B,T,H,V] in v's type and the last state in float32. Gates, decay,
  state and sums are float32; operands of products have q's type.

  Raises:
    ValueError: shapes, heads, form, chunk or cu_seqlens (unless it is on a
      GPU or TPU or traced) do not fit; the message says which.

  A second write under one key, after half of the first has decayed:

  >>> import deltanet_jax as dn, jax.numpy as jnp
  >>> k = jnp.ones((1, 2, 1, 1))
  >>> v = jnp.array([4.0, 6.0]).reshape(1, 2, 1, 1)
  >>> beta, g = jnp.full((1, 2, 1), 0.5), jnp.full((1, 2, 1), jnp.log(0.5))
  >>> o, state = dn.gated_delta_rule(k, k, v, beta=beta, g=g)
  >>> o.ravel().round(4).tolist(), state.shape
  ([2.0, 3.5], (1, 1, 1, 1))
  """
  how = state, segment_ids, cu_seqlens, form, chunk
  return _run('delta_rule', (q, k, v, beta, g), {}, *how)


def delta_rule(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  beta: jax.Array,
  state: jax.Array | None = None,
  segment_ids: jax.Array | None = None,
  cu_seqlens: jax.Array | None = None,
  form: str = 'auto',
  chunk: int = 64,
) -> Result:
  """The delta rule, without decay (arXiv:2406.06484 eq. 2).

    S_t = S_{t-1} + beta_t k_t (v_t - S_{t-1}^T k_t)^T
    o_t = S_t^T q_t

  q, k [B,T,J,K]   v [B,T,H,V]   beta [B,T,H]

  The rest is as in `gated_delta_rule`. A second write under one key replaces
  the first:

  >>> import deltanet_jax as dn, jax.numpy as jnp
  >>> k = jnp.ones((1, 2, 1, 1))
  >>> v = jnp.array([4.0, 6.0]).reshape(1, 2, 1, 1)
  >>> o, state = dn.delta_rule(k, k, v, beta=jnp.ones((1, 2, 1)))
  >>> o.ravel().tolist(), state.ravel().tolist()
  ([4.0, 6.0], [6.0])
  """
  how = state, segment_ids, cu_seqlens, form, chunk
  return _run('delta_rule', (q, k, v, beta, None), {}, *how)


def kda(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  beta: jax.Array,
  g: jax.Array,
  erase: jax.Array | None = None,
  state: jax.Array | None = None,
  segment_ids: jax.Array | None = None,
  cu_seqlens: jax.Array | None = None,
  form: str = 'auto',
  chunk: int = 64,
) -> Result:
  """Kimi Delta Attention, a decay for every key channel (arXiv:2510.26692
  eq. 1).

    S'  = diag(e^{g_t}) S_{t-1}
    S_t = S' + k_t (w_t * v_t - S'^T (b_t * k_t))^T
    o_t = S_t^T q_t

  q, k [B,T,J,K]   v [B,T,H,V]   g [B,T,H,K], <= 0
  beta [B,T,H]: w = b = beta. With erase [B,T,H,K], which is b, beta is w and
  may be [B,T,H,V]: Gated DeltaNet-2 (arXiv:2605.22791)

  The rest is as in `gated_delta_rule`. A channel that keeps its value and one
  that is reset:

  >>> import deltanet_jax as dn, jax.numpy as jnp
  >>> k = jnp.array([[1.0, 0], [0, 1], [0, 0]]).reshape(1, 3, 1, 2)
  >>> v = jnp.array([4.0, 6, 0]).reshape(1, 3, 1, 1)
  >>> g = jnp.broadcast_to(jnp.array([0.0, -jnp.inf]), (1, 3, 1, 2))
  >>> o, state = dn.kda(k, k, v, beta=jnp.ones((1, 3, 1)), g=g)
  >>> state.ravel().tolist()
  [4.0, 0.0]
  """
  how = state, segment_ids, cu_seqlens, form, chunk
  return _run('kda', (q, k, v, beta, g), {'erase': erase}, *how)


def linear_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  state: jax.Array | None = None,
  segment_ids: jax.Array | None = None,
  cu_seqlens: jax.Array | None = None,
  form: str = 'auto',
  chunk: int = 64,
) -> Result:
  """Linear attention without a normalizer (arXiv:2006.16236 eq. 18-20).

    S_t = S_{t-1} + k_t v_t^T        o_t = S_t^T q_t

  q, k [B,T,J,K], after their feature map   v [B,T,H,V]

  The rest is as in `gated_delta_rule`; chunk may be any positive number. Values
  under one key add up:

  >>> import deltanet_jax as dn, jax.numpy as jnp
  >>> k = jnp.ones((1, 2, 1, 1))
  >>> v = jnp.array([4.0, 6.0]).reshape(1, 2, 1, 1)
  >>> o, state = dn.linear_attention(k, k, v)
  >>> o.ravel().tolist()
  [4.0, 10.0]
  """
  how = state, segment_ids, cu_seqlens, form, chunk
  return _run('linear_attention', (q, k, v, None), {}, *how)


def gated_linear_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  g: jax.Array,
  state: jax.Array | None = None,
  segment_ids: jax.Array | None = None,
  cu_seqlens: jax.Array | None = None,
  form: str = 'auto',
  chunk: int = 64,
) -> Result:
  """Linear attention with a decay for every token and head, as in Mamba-2
  (arXiv:2405.21060 sec. 3); GLA (arXiv:2312.06635) has one for every channel.

    S_t = e^{g_t} S_{t-1} + k_t v_t^T        o_t = S_t^T q_t

  q, k [B,T,J,K]   v [B,T,H,V]   g [B,T,H], <= 0

  The rest is as in `linear_attention`. g = -inf resets the state:

  >>> import deltanet_jax as dn, jax.numpy as jnp
  >>> k = jnp.ones((1, 2, 1, 1))
  >>> v = jnp.array([4.0, 6.0]).reshape(1, 2, 1, 1)
  >>> o, _ = dn.gated_linear_attention(k, k, v, g=jnp.full((1, 2, 1), -jnp.inf))
  >>> o.ravel().tolist()
  [4.0, 6.0]
  """
  check_shapes(v=(v, 'BTHV'), g=(g, 'BTH'))
  how = state, segment_ids, cu_seqlens, form, chunk
  return _run('linear_attention', (q, k, v, g), {}, *how)


def lightning_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  g: jax.Array,
  state: jax.Array | None = None,
  segment_ids: jax.Array | None = None,
  cu_seqlens: jax.Array | None = None,
  form: str = 'auto',
  chunk: int = 64,
) -> Result:
  """Lightning attention: a constant decay for every head (arXiv:2501.08313).

    S_t = e^g S_{t-1} + k_t v_t^T        o_t = S_t^T q_t

  q, k [B,T,J,K]   v [B,T,H,V]   g [H], <= 0: minus the slope of a head

  The rest is as in `linear_attention`. A decay of one half:

  >>> import deltanet_jax as dn, jax.numpy as jnp
  >>> k = jnp.ones((1, 2, 1, 1))
  >>> v = jnp.array([4.0, 6.0]).reshape(1, 2, 1, 1)
  >>> o, _ = dn.lightning_attention(k, k, v, g=jnp.log(jnp.array([0.5])))
  >>> o.ravel().round(4).tolist()
  [4.0, 8.0]
  """
  check_shapes(v=(v, 'BTHV'), g=(g, 'H'))
  how = state, segment_ids, cu_seqlens, form, chunk
  return _run('linear_attention', (q, k, v, g), {}, *how)


def attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  scale: float | None = None,
  window: int | None = None,
  segment_ids: jax.Array | None = None,
  form: str = 'auto',
) -> jax.Array:
  """Causal softmax attention (online softmax, arXiv:2205.14135).

    o_t = sum_{s <= t} softmax_s(scale q_t^T k_s) v_s

  q [B,T,H,K]   k [B,T,J,K]   v [B,T,J,V]   H a multiple of J: query head h
  reads key head h // (H/J)
  scale: None: K^-1/2
  window: a token sees so many of the last keys, its own included; None: all
  segment_ids [B,T] int: a token sees keys of its own document, a run of equal
    ids; None: each row is one document
  form: 'blocks', a program of XLA; 'splash', splash attention of JAX on TPUs;
    'cudnn', cuDNN on NVIDIA GPUs. All agree; `docs/kernels.md` says what they
    cover. 'auto': that of the platform where it covers the arguments, else
    'blocks'

  Returns o [B,T,H,V] in v's type. Products take q's, k's and v's type, the
  softmax and sums are float32; memory grows with T, not with T^2.

  Raises:
    ValueError: shapes, heads or form do not fit.

  >>> import deltanet_jax as dn, jax.numpy as jnp
  >>> q = jnp.zeros((1, 2, 1, 1))  # all keys are alike
  >>> v = jnp.array([4.0, 6.0]).reshape(1, 2, 1, 1)
  >>> dn.attention(q, q, v).ravel().tolist()
  [4.0, 5.0]
  """
  check_shapes(
    q=(q, 'BTHK'),
    k=(k, 'BTJK'),
    v=(v, 'BTJV'),
    segment_ids=(segment_ids, 'BT'),
  )
  if form not in ('auto', *SOFTMAX):
    known = ', '.join(('auto', *SOFTMAX))
    raise ValueError(f'form is {form!r}; give one of {known}')
  device = next(iter(_find_devices(q)), None)
  form = choose_form(form, q, k, v, segment_ids, device)
  scale = q.shape[-1] ** -0.5 if scale is None else scale
  return _attend(q, k, v, segment_ids, scale, window, form)


@functools.partial(jax.jit, static_argnames=('scale', 'window', 'form'))
def _attend(q, k, v, segment_ids, scale, window, form):
  index = jnp.arange(q.shape[1], dtype=jnp.int32)
  at = Place(index, documents.number_segments(segment_ids))
  return attend_rows(form, q, k, v, at, scale=scale, window=window)


def _run(rule, inputs, gates, state, segment_ids, cu_seqlens, form, chunk):
  if cu_seqlens is not None and not _is_remote(cu_seqlens):
    cu_seqlens, T = np.asarray(cu_seqlens), inputs[0].shape[1]
    ends = np.concatenate([[0], cu_seqlens.ravel(), [T]])
    if (np.diff(ends) < 0).any() or not (cu_seqlens.ravel()[:1] == 0).all():
      raise ValueError(
        f'cu_seqlens is {cu_seqlens.tolist()}; give 0, then the ends of the'
        f' documents, ascending to {T} at most'
      )
  module = importlib.import_module(f'deltanet_jax.ops.{rule}')
  device = next(iter(_find_devices(inputs[0])), None)
  form = kernels.choose_form(form, module, inputs, gates, device)
  return _compiled(
    rule, inputs, gates, state, segment_ids, cu_seqlens, form, chunk
  )


def _is_remote(x):
  """Whether to look at the values of x would wait for a device."""
  if isinstance(x, jax.core.Tracer):
    return True
  return any(device.platform != 'cpu' for device in _find_devices(x))


def _find_devices(x):
  """The devices of x; none of a tracer or of what is no array of JAX."""
  if isinstance(x, jax.core.Tracer) or not isinstance(x, jax.Array):
    return ()
  return x.devices()


@functools.partial(jax.jit, static_argnames=('rule', 'form', 'chunk'))
def _compiled(rule, inputs, gates, state, segment_ids, cu_seqlens, form, chunk):
  """Computes a rule in one of its forms, those of `kernels` included."""
  module = importlib.import_module(f'deltanet_jax.ops.{rule}')
  forms = kernels.forms(module)
  if form not in forms:
    raise ValueError(f'form is {form!r}; give one of auto, {", ".join(forms)}')
  require_positive(chunk)
  run = functools.partial(forms[form], chunk=chunk)
  if cu_seqlens is None:
    return run(*inputs, state=state, segment_ids=segment_ids, **gates)
  names = dict(zip(module.DESCRIPTION.inputs, inputs, strict=True)) | gates
  sizes = module.DESCRIPTION.check(**names)
  if segment_ids is not None or sizes['B'] != 1 or cu_seqlens.ndim != 1:
    raise ValueError(
      f'cu_seqlens of shape {cu_seqlens.shape} with {sizes["B"]} rows'
      f'{" and segment_ids" * (segment_ids is not None)}; give [N+1] with one'
      ' row that holds the N documents, and no segment_ids'
    )
  shape = (len(cu_seqlens) - 1, *(sizes[letter] for letter in STATE[1:]))
  if state is None:
    state = jnp.zeros(shape, jnp.float32)
  if state.shape != shape:
    raise ValueError(
      f'state has shape {state.shape}; expected [N,H,K,V] = {shape}'
    )
  state, v = state.astype(jnp.float32), names['v']
  if not v.size or not shape[0]:
    return jnp.zeros_like(v), state
  # several chunks in a block where documents are long enough to fill them
  count = min(4, max(1, sizes['T'] // (4 * shape[0] * chunk)))
  whole = lambda x: x if x.ndim > 1 else jnp.broadcast_to(x, v.shape[:3])
  return documents.run_per_document(
    lambda arrays, state: run(*arrays[0], state=state, **arrays[1]),
    jax.tree.map(whole, (inputs, gates)),
    state,
    cu_seqlens,
    1 if form == 'recurrent' else count * chunk,
  )
