"""The first import of every command: what must be set before torch is loaded.

Ctrl-C while modules are imported, which takes seconds, leaves no traceback. `cli.run` gives it its usual meaning back.
On a machine that does other work too, torch's threads do not spin while they wait for each other: small steps took 20
to 50 times as long. In a module that a test or a notebook imports, nothing changes.
"""

import os
import signal
import sys

program = getattr(sys.modules["__main__"], "__file__", None)
root = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
is_command = program is not None and os.path.dirname(os.path.realpath(program)) == root
if is_command:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if is_command and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
