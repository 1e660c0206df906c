"""The recurrences and their gradients, token by token, in float64 numpy.

One recurrence covers every rule of deltanet_jax/ops:

    S' = diag(e^g) S;  S = S' + k (w * v - S'^T (b * k))^T;  o = S^T q

b = 0, w = 1: linear attention; b = w = beta: delta rule. And softmax attention.
Nothing here shares code with the library, and the gradients are written out by
hand.
"""

import numpy as np


def _recurrence(q, k, v, w, b, g, state, fresh):
  """All [B,T,H,...]; returns o, the last state and `backward(d_o, d_state)`."""
  B, T, H, V = v.shape
  o = np.zeros((B, T, H, V))
  tape = []
  for t in range(T):
    state = np.where(fresh[:, t, None, None, None], 0.0, state)
    decayed = np.exp(g[:, t])[..., None] * state
    erased = b[:, t] * k[:, t]
    u = w[:, t] * v[:, t] - np.einsum('bhk,bhkv->bhv', erased, decayed)
    state = decayed + k[:, t, :, :, None] * u[:, :, None, :]
    o[:, t] = np.einsum('bhk,bhkv->bhv', q[:, t], state)
    tape.append((decayed, erased, u, state))

  def backward(d_o, d_state):
    d = {
      name: np.zeros(x.shape)
      for name, x in zip('qkvwbg', (q, k, v, w, b, g), strict=True)
    }
    for t in reversed(range(T)):
      decayed, erased, u, state = tape[t]
      d_state = d_state + q[:, t, :, :, None] * d_o[:, t, :, None, :]
      d['q'][:, t] = np.einsum('bhkv,bhv->bhk', state, d_o[:, t])
      d_u = np.einsum('bhkv,bhk->bhv', d_state, k[:, t])
      d_erased = -np.einsum('bhkv,bhv->bhk', decayed, d_u)
      d['k'][:, t] = np.einsum('bhkv,bhv->bhk', d_state, u)
      d['k'][:, t] += b[:, t] * d_erased
      d['b'][:, t] = k[:, t] * d_erased
      d['w'][:, t] = v[:, t] * d_u
      d['v'][:, t] = w[:, t] * d_u
      d_decayed = d_state - erased[..., None] * d_u[:, :, None, :]
      d['g'][:, t] = (d_decayed * decayed).sum(-1)
      d_state = np.exp(g[:, t])[..., None] * d_decayed
      d_state = np.where(fresh[:, t, None, None, None], 0.0, d_state)
    return d, d_state

  return o, state, backward


def _run(q, k, v, w, b, g, state, segment_ids, d_o, d_state):
  B, T, J, K = q.shape
  H = v.shape[2]
  wide = lambda x: np.repeat(np.float64(x), H // J, axis=2)
  fresh = np.zeros((B, T), bool)
  if segment_ids is not None:
    fresh[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
  o, last, backward = _recurrence(
    wide(q), wide(k), np.float64(v), w, b, g, np.float64(state), fresh
  )
  d, d_first = backward(np.float64(d_o), np.float64(d_state))
  for name in 'qk':
    d[name] = d[name].reshape(B, T, J, H // J, K).sum(3)
  return {'o': o, 'last': last, 'state': d_first}, d


def _full(x, shape):
  """x [B,T,H] or [B,T,H,N], or one value, as float64 of `shape`."""
  x = np.float64(x)
  if x.ndim == 3:
    x = x[..., None]
  return np.broadcast_to(x, shape)


def linear_attention(q, k, v, g, *, state, d_o, d_state, segment_ids=None):
  """Value and gradients by name: o, last, q, k, v, g, state."""
  keys = (*v.shape[:3], q.shape[3])
  per_token = 0.0 if g is None else np.broadcast_to(g, v.shape[:3])
  out, d = _run(
    q,
    k,
    v,
    _full(1.0, v.shape),
    _full(0.0, keys),
    _full(per_token, keys),
    state,
    segment_ids,
    d_o,
    d_state,
  )
  out |= {name: d[name] for name in 'qkv'}
  if g is not None:
    d_g = d['g'].sum(-1)
    out['g'] = d_g if g.ndim == 3 else d_g.sum((0, 1))
  return out


def delta_rule(q, k, v, beta, g, *, state, d_o, d_state, segment_ids=None):
  """Value and gradients by name: o, last, q, k, v, beta, g, state."""
  keys = (*v.shape[:3], q.shape[3])
  out, d = _run(
    q,
    k,
    v,
    _full(beta, v.shape),
    _full(beta, keys),
    _full(0.0 if g is None else g, keys),
    state,
    segment_ids,
    d_o,
    d_state,
  )
  out |= {name: d[name] for name in 'qkv'}
  out['beta'] = d['w'].sum(-1) + d['b'].sum(-1)
  if g is not None:
    out['g'] = d['g'].sum(-1)
  return out


def kda(q, k, v, beta, g, *, erase=None, state, d_o, d_state, segment_ids=None):
  """Value and gradients by name: o, last, q, k, v, beta, g, erase, state."""
  keys = (*v.shape[:3], q.shape[3])
  out, d = _run(
    q,
    k,
    v,
    _full(beta, v.shape),
    _full(beta if erase is None else erase, keys),
    _full(g, keys),
    state,
    segment_ids,
    d_o,
    d_state,
  )
  out |= {name: d[name] for name in 'qkvg'}
  out['beta'] = d['w'] if beta.ndim == 4 else d['w'].sum(-1)
  if erase is None:
    out['beta'] = out['beta'] + d['b'].sum(-1)
  else:
    out['erase'] = d['b']
  return out


def softmax_attention(q, k, v, mask, *, scale, d_o):
  """Value and gradients by name: o, q, k, v. mask [B,T,S]."""
  q, k, v, d_o = (np.float64(x) for x in (q, k, v, d_o))
  (B, S, J, _), G = k.shape, q.shape[2] // k.shape[2]
  k, v = (np.repeat(x, G, axis=2) for x in (k, v))
  scores = scale * np.einsum('bthk,bshk->bhts', q, k)
  scores = np.where(mask[:, None], scores, -np.inf)
  p = np.exp(scores - scores.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  d_p = np.einsum('bthv,bshv->bhts', d_o, v)
  d_scores = scale * p * (d_p - (p * d_p).sum(-1, keepdims=True))
  heads = lambda x: x.reshape(B, S, J, G, -1).sum(3)
  return {
    'o': np.einsum('bhts,bshv->bthv', p, v),
    'q': np.einsum('bhts,bshk->bthk', d_scores, k),
    'k': heads(np.einsum('bhts,bthk->bshk', d_scores, q)),
    'v': heads(np.einsum('bhts,bthv->bshv', p, d_o)),
  }
