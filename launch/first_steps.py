from deltanet_jax.lab.first_steps.__main__ import main

if __name__ == '__main__':
  main()
