"""A wrong result of XLA's CPU compiler, as a report to its makers.

    JAX_PLATFORMS=cpu python docs/xla_cpu_repeated_number.py

A product with one repeated number on its right, as `jnp.zeros` or `jnp.ones`
or a scalar broadcast, whose left side was divided by a sum over its rows, is
garbage: it differs between processes and calls, up to 1e31 and NaN. Seen with
jaxlib 0.10.2, 0.11.2 and 0.12.0.1 on x86-64; nothing but jax is needed.

The compiled program holds one `__ynn_fusion` with the reduction, the broadcast
of the scalar and the dot in it. The broadcast is defined in the library's graph
as a dimension of extent 1 expanded, which the dot seems to read as if its
elements lay in memory. All of these are right:

- a left side without a sum over rows (`x`, `exp(x)`);
- the repeated number on the left, or as an argument of the program;
- a vector or a matrix broadcast in its place;
- XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type= (an empty list).

`lax.optimization_barrier` around the repeated number is wrong with 0.10.2.
"""

import jax
import jax.numpy as jnp
import numpy as np

B, T, K = 64, 64, 32


def unit(x):
  return x * jax.lax.rsqrt((x * x).sum(-1, keepdims=True) + 1e-6)


def product(x, y):
  return jnp.einsum('btk,bkv->btv', x, y)


CASES = {
  'rows of length 1, times zeros': lambda x: product(
    unit(x), jnp.zeros((B, K, K))
  ),
  'rows of length 1, times ones': lambda x: product(
    unit(x), jnp.ones((B, K, K))
  ),
  'softmax, times zeros': lambda x: product(
    jax.nn.softmax(x), jnp.zeros((B, K, K))
  ),
}


def main():
  print(f'jax {jax.__version__}, {jax.devices()[0].device_kind}')
  x = jax.random.normal(jax.random.key(0), (B, T, K))
  for name, f in CASES.items():
    want = np.asarray(f(x))  # one operation at a time: right
    compiled = jax.jit(f)
    error = max(np.abs(compiled(x) - want).max() for _ in range(5))
    print(f'{name}: off by {error:.1e} of {np.abs(want).max():.1e}')


if __name__ == '__main__':
  main()
