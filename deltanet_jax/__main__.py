"""`python -m deltanet_jax NAME ...`"""

from deltanet_jax.cli.deltanet import main

if __name__ == '__main__':
  main()
