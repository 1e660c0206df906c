from deltanet_jax.cli.evaluate import main

if __name__ == '__main__':
  main()
