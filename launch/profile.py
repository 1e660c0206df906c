from deltanet_jax.lab.profile.__main__ import main

if __name__ == '__main__':
  main()
