from deltanet_jax.lab.dryrun.__main__ import main

if __name__ == '__main__':
  main()
