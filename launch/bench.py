from deltanet_jax.lab.bench.__main__ import main

if __name__ == '__main__':
  main()
