from deltanet_jax.lab.probes.__main__ import main

if __name__ == '__main__':
  main()
