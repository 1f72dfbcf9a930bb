"""The first import of every command: what must be set before torch is loaded.

Ctrl-C while modules are imported, which takes seconds, leaves no traceback. `cli.run` gives it its usual meaning back.
On a machine that does other work too, torch's threads wait for each other, and spin while they do: small steps can take
many times as long. Threads of a command therefore spin briefly, and then sleep. Without any spinning, a step on an idle
machine takes longer.

In 16 bits on a CPU, oneDNN compiles a kernel for every number of rows that it meets. Two caches keep 1,024 kernels
each, which steps of changing lengths fill with more than 1 GB. With 64 kernels a step takes no longer.

In a module that a test or a notebook imports, nothing changes.
"""

import os
import signal
import sys

program = getattr(sys.modules["__main__"], "__file__", None)
root = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
is_command = program is not None and os.path.dirname(os.path.realpath(program)) == root
if is_command and "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
if is_command:
    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(cache, "64")
if is_command and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
