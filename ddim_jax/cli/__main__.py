"""`python -m ddim_jax.cli`: the command `ddim-jax`."""

from ddim_jax.cli import main

main()
