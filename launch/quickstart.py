from deltanet_jax.lab.quickstart.__main__ import main

if __name__ == '__main__':
  main()
