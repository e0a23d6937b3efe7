"""`python -m wanmoe.launch`: what the deepspeed launcher starts on every rank."""

import sys

from .cli import main

# The launcher puts --local_rank first; the environment carries it too.
sys.argv[1:] = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
main()
