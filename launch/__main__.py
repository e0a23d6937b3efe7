"""`python -m wanmoe.launch`: what the deepspeed launcher starts on every rank."""

import logging
import multiprocessing
import os
import sys

from .cli import main
from .launcher import under_launcher

# The launcher puts --local_rank first; the environment carries it too.
sys.argv[1:] = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
try:
    main()
except SystemExit as end:
    if under_launcher():
        # Threads of gloo and others still run at the end of the interpreter, which now and then aborts for it
        # ("terminate called without an active exception"): a rank whose work is done would count as lost.
        for worker in multiprocessing.active_children():
            worker.terminate()
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else int(end.code is not None))
    raise
