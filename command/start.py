"""The first import of every command: Ctrl-C while the others are imported, which takes seconds, leaves no traceback.

`cli.run` gives Ctrl-C its usual meaning back. In a module that a test or a notebook imports, nothing changes.
"""

import os
import signal
import sys

program = getattr(sys.modules["__main__"], "__file__", None)
root = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
is_command = program is not None and os.path.dirname(os.path.realpath(program)) == root
if is_command and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
