from deltanet_jax.lab.cost.presets import main

if __name__ == '__main__':
  main()
