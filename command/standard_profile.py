"""The standard library's module `profile`, whose name our profile.py has taken.

cProfile imports `profile` and uses four names of it, and every torch optimizer imports cProfile. Without these names in
our profile.py, no optimizer could be made. The other way round, a debugger, IPython or `python -m cProfile` may have
imported the standard module before ours: then it is forgotten, and `import profile` finds ours.
"""

import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec
from pathlib import Path
from sysconfig import get_path

_spec = PathFinder.find_spec("profile", [get_path("stdlib")])
_standard = module_from_spec(_spec)
_spec.loader.exec_module(_standard)
run, runctx, Profile, _Utils = _standard.run, _standard.runctx, _standard.Profile, _standard._Utils

_imported = sys.modules.get("profile")
if _imported is not None and Path(_imported.__file__).parent != Path(__file__).parent.parent:
    del sys.modules["profile"]
