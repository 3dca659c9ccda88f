"""`python -m neuron_attn_rewrite`."""

from neuron_attn_rewrite.cli import main

if __name__ == "__main__":
    main()
