"""Programs that are right pass, programs that are wrong fail whatever they try, and nothing outside notices."""

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from textwrap import dedent

import pytest

import sandbox
from sandbox import Program

LINUX = sys.platform == "linux"
CHECK = "def check(f):\n    assert f(3) == 10\n    assert f(5) == 26\n"  # f(x) = x * x + 1


def available_levels() -> list[sandbox.Level]:
    """Every level that works here; under root the last needs an interpreter that everyone may run."""
    works = Program("import socket\ndef f(x): return x * x + 1", CHECK, "f")
    return [level for level in sandbox._levels() if sandbox._run(level, works, 10.0).passed]


LEVELS = available_levels()


@pytest.fixture(params=LEVELS, ids=lambda level: level.tool or "limits only")
def level(request, monkeypatch) -> sandbox.Level:
    monkeypatch.setattr(sandbox, "_level", lambda: request.param)
    return request.param


def outcomes(codes: dict[str, str] | list[str], test: str = CHECK, timeout: float = 10.0) -> dict[str, str]:
    """Run every code against one test; the outcomes by name."""
    codes = codes if isinstance(codes, dict) else {code: code for code in codes}
    verdicts = sandbox.run_programs([Program(dedent(code), test, "f") for code in codes.values()], timeout, progress=False)
    assert all(verdict.passed == (verdict.outcome == "passed") for verdict in verdicts)
    return {name: verdict.outcome for name, verdict in zip(codes, verdicts, strict=True)}


# ------------------------------------------------------------------------ the verdict of the reference scorer


# (code, test): judged by the sandbox and by exec() of the whole, which is what openai/human-eval does
HONEST = {
    "right": ("def f(x): return x * x + 1", CHECK),
    "wrong": ("def f(x): return x * x", CHECK),
    "syntax": ("def f(x: return 1", CHECK),
    "unterminated string": ('def f(x):\n    """never closed\n    return x * x + 1', CHECK),
    "missing name": ("def g(x): return x * x + 1", CHECK),
    "raises": ("def f(x): raise ValueError(x)", CHECK),
    "raises on import": ("def f(x): return x * x + 1\n1 / 0", CHECK),
    "system exit": ("def f(x): raise SystemExit", CHECK),
    "main guard does not run": ("def f(x): return x * x + 1\nif __name__ == '__main__': 1 / 0", CHECK),
    "recursion": ("def f(x): return f(x)", CHECK),
    "float for int": ("def f(x): return x * x + 1.0", CHECK),
    "list is not tuple": ("def f(x): return [x]", "def check(f): assert f(2) == (2,)"),
    "nested": ("def f(x): return {x: [(x, None)], 'k': {x}}", "def check(f): assert f(2) == {'k': {2}, 2: [(2, None)]}"),
    "type": ("def f(x): return (1.5, b'a', 2j, True)", "def check(f): assert [type(v) for v in f(0)] == "
             "[float, bytes, complex, bool]"),
    "infinity": ("def f(x): return [float('inf'), -0.0]", "def check(f): assert str(f(0)) == '[inf, -0.0]'"),
    "nan": ("def f(x): return float('nan')", "def check(f): assert f(0) == f(0)"),
    "huge integer": ("def f(x): return 7 ** 9999", "def check(f): assert f(0) == 7 ** 9999"),
    "text": ("def f(x): return x[::-1]", "def check(f): assert f('a\\n\\ud800\\u00e9\\u4e2d') == '\\u4e2d\\u00e9\\ud800\\na'"),
    "range": ("def f(x): return range(x)", "def check(f): assert f(3) == range(3) and f(3) != [0, 1, 2]"),
    "generator": ("def f(x): yield from range(x)", "def check(f): assert list(f(3)) == [0, 1, 2] and f(3) != [0, 1, 2]"),
    "map": ("def f(x): return map(str, x)", "def check(f): assert tuple(f([1, 2])) == ('1', '2')"),
    "keys": ("def f(x): return {x: 1}.keys()", "def check(f): assert sorted(f(4)) == [4] and len(f(4)) == 1 and 4 in f(4)"),
    "empty generator": ("def f(x): return iter(())", "def check(f): assert list(f(1)) == []"),
    "subclasses": ("import collections as c\nf = lambda x: [c.Counter(x), c.defaultdict(int, a=1), c.OrderedDict(b=2)]",
                   "def check(f): assert f('aab') == [{'a': 2, 'b': 1}, {'a': 1}, {'b': 2}]"),
    "enum": ("import enum\nclass E(enum.IntEnum):\n    A = 3\ndef f(x): return E.A", "def check(f): assert f(0) == 3"),
    "text enum": ("import enum\nclass E(str, enum.Enum):\n    A = 'a'\ndef f(x): return E.A", "def check(f): assert f(0) == 'a'"),
    "named tuple": ("import collections\nP = collections.namedtuple('P', 'x y')\ndef f(x): return P(x, 2)",
                    "def check(f): assert f(1) == (1, 2)"),
    "fraction": ("from fractions import Fraction\ndef f(x): return Fraction(x, 2)", "def check(f): assert f(7) == 3.5"),
    "decimal": ("from decimal import Decimal\ndef f(x): return Decimal(x) / 2", "def check(f): assert f(7) == 3.5"),
    "decimal is no float": ("from decimal import Decimal\ndef f(x): return Decimal(x)", "def check(f): assert f(7) - 0.5 < 7"),
    "truth": ("def f(x): return (i for i in ())", "def check(f): assert f(0)"),
    "changed argument": ("def f(x): x.sort(); return x", "def check(f):\n    v = [2, 1]\n    f(v)\n    assert v == [1, 2]"),
    "changed dict": ("def f(x): x.pop('a')", "def check(f):\n    v = {'a': 1, 'b': 2}\n    f(v)\n    assert v == {'b': 2}"),
    "keeps state": ("n = []\ndef f(x): n.append(x); return len(n)", "def check(f): assert [f(0), f(0)] == [1, 2]"),
    "caught": ("def f(x): raise KeyError(x)", "def check(f):\n    try: f(1)\n    except KeyError: return\n    assert False"),
    "wrong exception": ("def f(x): raise KeyError(x)", "def check(f):\n    try: f(1)\n    except IndexError: pass"),
    "own exception": ("class E(Exception): pass\ndef f(x): raise E", "def check(f):\n    try: f(1)\n    except Exception: pass"),
    "helper of the program": ("import math\ndef g(x): return x + 1\ndef f(x): return x", "def check(f):\n    assert math.floor"
                              "(g(f(1)) + 0.5) == 2 and g.__name__ == 'g'"),
    "absent helper": ("def f(x): return x", "def check(f): assert g(f(1)) == 2"),
    "closure": ("def f(x): return lambda y: x + y", "def check(f): assert f(1)(2) == 3"),
    "object": ("class C:\n    def __init__(self, x): self.x = x\n    def get(self): return self.x\nf = C",
               "def check(f):\n    c = f(4)\n    assert c.get() == c.x == 4"),
    "object back": ("class C: pass\nstore = C()\ndef f(x=None): return store if x is None else x is store",
                    "def check(f): assert f(f())"),
    "keyword": ("def f(x, *, y): return x - y", "def check(f): assert f(5, y=2) == 3"),
    "missing attribute": ("f = object()", "def check(f): assert f.nothing"),
    "test with its own names": ("LIMIT = 5\ndef f(x): return x", "LIMIT = 7\ndef g(y): return y + LIMIT\n"
                                "def check(f):\n    assert g(f(1)) == 8"),
    "test that raises": ("def f(x): return x", "def check(f): return undefined_name"),
    "test without check": ("def f(x): return x", "x = 1"),
    "input": ("def f(x): return input()", CHECK),
}  # fmt: skip


def reference(code: str, test: str) -> bool:
    """exec() of one file in an interpreter of its own, as human_eval/execution.py does."""
    script = "import sys\ntry: exec(sys.argv[1], {})\nexcept BaseException: sys.exit(1)"
    command = [sys.executable, "-I", "-c", script, f"{code}\n{test}\ncheck(f)"]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True).returncode == 0


EXPECTED = {}  # computed once for all levels


def test_verdicts_are_those_of_exec_in_one_interpreter(level):
    if not EXPECTED:
        EXPECTED.update({name: reference(code, test) for name, (code, test) in HONEST.items()})
        assert 10 < sum(EXPECTED.values()) < len(HONEST) - 10
    verdicts = sandbox.run_programs([Program(*pair, "f") for pair in HONEST.values()], 10.0, progress=False)
    got = {name: verdict for name, verdict in zip(HONEST, verdicts, strict=True)}
    assert {name: verdict.passed for name, verdict in got.items()} == EXPECTED, got


def test_outcomes_say_why(level):
    got = outcomes(
        {
            "assert": "def f(x): return 0",
            "error": "def f(x): return {}['a b']",
            "long": "def f(x): raise ValueError('long\\n' * 10**6)",
            "silent": "class E(Exception):\n    def __str__(self): raise self\ndef f(x): raise E",
            "unpicklable": "def f(x): raise Exception(lambda: 0, open('/dev/null'))",
            "exit": "import os\ndef f(x): os._exit(0)",
            "signal": "import ctypes\ndef f(x): ctypes.string_at(0)",
            "memory": "def f(x): return bytearray(10 * 2**30)",
        }
    )
    assert got["assert"] == "failed: AssertionError: assert f(3) == 10"
    assert got["error"].startswith("failed: KeyError") and "a b" in got["error"]
    assert got["long"].startswith("failed: ValueError: long long") and len(got["long"]) < 300
    assert got["silent"].startswith("failed: ") and got["unpicklable"].startswith("failed: ")
    assert got["exit"] == "failed: ended itself with exit status 0"
    assert got["signal"] == "crashed: SIGSEGV"
    assert not LINUX or got["memory"].startswith("failed: MemoryError")


def test_a_test_that_hands_over_a_function_is_refused_in_words(level):
    [outcome] = outcomes(["def f(g): return g(1)"], "def check(f): assert f(lambda x: x) == 1").values()
    assert outcome == "failed: TypeError: a test cannot hand a function to the program"


# ---------------------------------------------------------------------------- verdicts that cannot be faked


EQUAL = """
class Yes:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    __lt__ = __le__ = __gt__ = __ge__ = __eq__
    __hash__ = lambda self: 0
    __sub__ = __rsub__ = __abs__ = __call__ = __getitem__ = __round__ = lambda self, *a: self
"""
CHEATS = {
    "_exit on import": "import os\nos._exit(0)",
    "_exit when called": "import os\ndef f(x): os._exit(0)",
    "exit on import": "import sys\nsys.exit(0)",
    "exit when called": "def f(x): exit(0)",
    "system exit": "def f(x): raise SystemExit(0)",
    "system exit on import": "raise SystemExit",
    "exec of another program": "import os\ndef f(x): os.execv('/bin/true', ['true'])",
    "says so": "import os, sys\nfor s in ('passed', 'passed\\n'):\n    print(s); print(s, file=sys.stderr)\n    "
               "os.write(1, s.encode())\ndef f(x): return 'passed'",
    "says so at exit": "import atexit, os, sys\natexit.register(lambda: (print('passed'), os._exit(0)))\nsys.exit()",
    "writes everywhere": "import os\nfor fd in range(64):\n    try: os.write(fd, b'passed')\n    except OSError: pass\n"
                         "def f(x): return 0",
    "forged messages": "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'[\"value\", true, null]\\n' * 9)\n"
                       "    except OSError: pass",
    "forged objects": "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'[\"value\", {\"object\": [1]}, null]\\n' * 99)\n"
                      "    except OSError: pass",
    "forged module": "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'[\"value\", {\"module\": [\"os\"]}, null]\\n' * 9)\n"
                     "    except OSError: pass",
    "malformed messages": "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'{}\\n[[[\\n' + b'[' * 9**5 + b'\\n')\n"
                          "    except OSError: pass",
    "own check": "def f(x): return 0\ndef check(f): pass",
    "own assertion": "import builtins\nclass E(BaseException):\n    def __new__(c, *a): raise SystemExit(0)\n"
                     "builtins.AssertionError = AssertionError = E\ndef f(x): return 0",
    "own exec": "import builtins\nbuiltins.exec = builtins.compile = builtins.eval = lambda *a, **k: None\ndef f(x): return 0",
    "own print and type": "import builtins\nfor n in ('isinstance', 'type', 'len', 'abs', 'all', 'hasattr'):\n"
                          "    setattr(builtins, n, lambda *a: True)\ndef f(x): return 0",
    "patched builtins": "__builtins__['AssertionError'] = SystemExit\n__builtins__['__build_class__'] = None\n"
                        "def f(x): return 0",
    "asserts off": "import sys, ctypes\nsys.flags = None\n__debug__1 = False\ndef f(x): return 0",
    "trace": "import sys, os\ndef t(frame, event, arg):\n    if event == 'exception': os._exit(0)\n    return t\n"
             "sys.settrace(t)\nsys.setprofile(lambda *a: None)\ndef f(x): return 0",
    "frames": "import sys, gc\ndef f(x):\n    g = sys._getframe()\n    while g:\n        for d in (g.f_globals, g.f_locals):\n"
              "            for k, v in list(d.items()):\n                if callable(v) and k not in ('f', 'sys', 'gc'):\n"
              "                    d[k] = lambda *a, **k: 'passed'\n        g = g.f_back\n    return 0",
    "frames for the answer": "import sys, gc\ndef f(x):\n    for o in gc.get_objects():\n        if isinstance(o, str) and "
                             "'assert f(3)' in o: return 10\n    return 'assert' in repr(sys._getframe(1).f_locals)",
    "harness": "import __main__\nfor k in list(vars(__main__)):\n    if not k.startswith('__'): setattr(__main__, k, lambda *a, "
               "**k: 'passed')\ndef f(x): return 0",
    "json": "import json\njson.dumps = lambda *a, **k: 'passed'\ndef f(x): return 0",
    "always equal": EQUAL + "def f(x): return Yes()",
    "always equal, inside": EQUAL + "def f(x): return [Yes()]",
    "always equal, integer": EQUAL + "class Int(Yes, int): __hash__ = int.__hash__\ndef f(x): return Int(0)",
    "always equal, callable": EQUAL + "f = Yes()",
    "always equal, meta": EQUAL + "class Meta(Yes, type): pass\nclass f(metaclass=Meta):\n    def __new__(c, x): return c",
    "thread": "import threading, os\nthreading.Thread(target=lambda: os._exit(0)).start()\ndef f(x): return 0",
    "closed descriptors": "import os\nos.closerange(0, 64)\ndef f(x): return 0",
    "signals": "import signal, os\nsignal.signal(signal.SIGALRM, lambda *a: os._exit(0))\nsignal.setitimer(0, 0.01)\n"
               "def f(x):\n    while True: pass",
    "fork": "import os\ndef f(x):\n    if os.fork(): os._exit(0)\n    return 0",
    "test's text": "import os, sys\ndef f(x):\n    for pid in filter(str.isdigit, os.listdir('/proc')):\n        for fd in range(9):\n"
                   "            try: open(f'/proc/{pid}/fd/{fd}', 'wb').write(b'passed')\n            except OSError: pass\n"
                   "    return 0",
    "memory of others": "import os\ndef f(x):\n    for pid in (os.getppid(), os.getpid() + 1):\n        "
                        "open(f'/proc/{pid}/mem', 'r+b')\n    return 10 if x == 3 else 26",
}  # fmt: skip


def test_no_trick_passes_a_test_that_its_answers_do_not_pass(level):
    got = outcomes(CHEATS, timeout=3.0)
    assert not [name for name, outcome in got.items() if outcome == "passed"]
    # and the judge did speak: tricks that only change the candidate are judged by the answer it gives
    assert got["own check"] == got["patched builtins"] == "failed: AssertionError: assert f(3) == 10"


def test_a_program_that_does_odd_things_and_answers_right_passes(level):
    got = outcomes(
        {
            "builtins": "import builtins\nbuiltins.AssertionError = None\nbuiltins.abs = None\ndef f(x): return x * x + 1",
            "output": "print('x' * 10**6)\ndef f(x): print('failed'); return x * x + 1",
            "signals": """
                import signal
                for s in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM): signal.signal(s, signal.SIG_IGN)
                def f(x): return x * x + 1""",
            "thread": """
                import threading, time
                threading.Thread(target=lambda: time.sleep(99)).start()
                def f(x): return x * x + 1""",
            "at exit": "import atexit, time\natexit.register(time.sleep, 99)\ndef f(x): return x * x + 1",
            "own files": """
                import os, tempfile
                def f(x):
                    with open('here', 'w') as a, tempfile.NamedTemporaryFile('w', delete=False) as b: a.write('y')
                    return x * x + (os.listdir('.') != [] and open('here').read() == 'y')""",
        }
    )
    if os.geteuid() != 0 and not level.tool:
        del got["thread"]  # the limit of processes counts all of the user's: no threads
    assert set(got.values()) == {"passed"}, got


# ---------------------------------------------------------------------------------------- harmless to others


def names_of_processes() -> set[str]:
    names = set()
    for path in Path("/proc").glob("[0-9]*/comm"):
        try:
            names.add(path.read_text().strip())
        except OSError:  # it has ended meanwhile
            pass
    return names


def test_what_never_ends_is_timed_out_and_leaves_no_process(level):
    called = "import ctypes\nlibc = ctypes.CDLL(None)\nlibc.prctl(15, b'left-behind', 0, 0, 0)\n"
    codes = {
        "loop": "def f(x):\n    while True: pass",
        "sleep": "import time\ntime.sleep(99)",
        "output": "def f(x):\n    while True: print('x' * 10**6)",
        "answers": "def f(x):\n    while True: yield x\ndef g(x): pass",
        "deaf": "import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n    except Exception: pass\n"
        "def f(x):\n    while True: pass",
        "swallow": "def f(x):\n    while True:\n        try:\n            while True: pass\n        except BaseException: pass",
        "threads": "import threading\ndef g():\n    while True: pass\ndef f(x):\n    threading.Thread(target=g).start()\n    g()",
        "bomb": called + "def f(x):\n    while True: libc.fork()",
        "daemon": called + "def f(x):\n    if libc.fork() == 0:\n        libc.setsid()\n        if libc.fork() == 0:\n"
        "            while True: pass\n        libc._exit(0)\n    while True: pass",
    }
    start = time.monotonic()
    got = outcomes(codes, "def check(f): assert list(f(1)) == 1", timeout=1.0)
    if os.geteuid() != 0 and not level.tool:
        got.pop("threads")
    assert set(got.values()) == {"timed out"}, got
    assert time.monotonic() - start < 30.0
    deadline = time.monotonic() + 5.0
    while "left-behind" in names_of_processes() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert "left-behind" not in names_of_processes()


def test_a_daemon_does_not_outlive_a_program_that_passes(level):
    code = """
        import ctypes
        libc = ctypes.CDLL(None)
        if libc.fork() == 0:
            libc.prctl(15, b'daemon-left', 0, 0, 0)
            libc.setsid()
            if libc.fork() == 0:
                while True: pass
            libc._exit(0)
        def f(x): return x * x + 1"""
    assert outcomes([code]) == {code: "passed"}
    assert "daemon-left" not in names_of_processes()


def test_limits_hold_and_stay(level):
    """Asked in the program itself, and tried: what a process may have is what the module says."""
    code = """
        import os, resource, sys
        def f(x):
            kinds = [resource.RLIMIT_AS, resource.RLIMIT_FSIZE, resource.RLIMIT_NOFILE, resource.RLIMIT_CORE]
            for kind in kinds:
                try: resource.setrlimit(kind, (10**12, 10**12))
                except (ValueError, OSError): pass
            return [resource.getrlimit(kind)[0] for kind in kinds]
        def write():
            with open('big', 'wb') as file:
                for _ in range(10**4): file.write(bytes(10**6))
        def files(): return [open('/dev/null') for _ in range(99)]
        def environment(): return [name for name in os.environ if name not in ('TMPDIR', 'OMP_NUM_THREADS', 'LC_CTYPE')]
        def user(): return os.getuid(), os.getgroups()
        def read(): return sys.stdin.read()"""
    test = """
def fails(f, kind):
    try: f()
    except kind: return True
def check(f):
    assert f(0)[1:] == [64 << 20, 64, 0] and f(0)[0] in EXPECTED
    assert fails(write, OSError) and fails(files, OSError)
    assert [name for name in environment() if name != 'LD_LIBRARY_PATH'] == [] and read() == ''
""".replace("EXPECTED", str([1 << 30] if LINUX else [1 << 30, -1]))
    assert outcomes([code], test) == {code: "passed"}


def test_no_more_processes_than_the_limit(level):
    code = """
        import ctypes, os, time
        def f(x):
            children = 0
            for _ in range(200):
                pid = ctypes.CDLL(None).fork()
                if pid == 0: time.sleep(99)
                children += pid > 0
            return children"""
    [outcome] = outcomes([code], "def check(f): assert f(0) < 18").values()
    assert outcome == "passed"


def test_files_outside_are_safe_and_invisible_as_far_as_claimed(level, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("untouched")
    secret.chmod(0o600)
    code = f"""
        import os, pathlib, shutil, subprocess
        path = pathlib.Path({str(secret)!r})
        def attempt(action, *arguments):
            try: action(*arguments)
            except BaseException: pass
        for action in (os.remove, os.unlink, shutil.rmtree, shutil.os.rmdir, subprocess.run):
            attempt(action, path)
        attempt(path.unlink)
        attempt(shutil.rmtree, path.parent)
        attempt(os.system, f"rm -rf {{path.parent}}")
        attempt(subprocess.run, ["rm", "-rf", path.parent])
        attempt(os.chmod, path, 0o777)
        attempt(os.rename, path, path.with_suffix(".gone"))
        def f(x): return path.exists()
        def home(): return os.path.exists({str(Path(sandbox.__file__))!r})"""
    claims_files = sandbox.protection().startswith("namespaces: no network, private mounts")
    assert claims_files == bool(level.tool)
    if claims_files:
        code += f"\n        attempt(path.write_text, 'written')\n        open('/tmp/x', 'w')\n{'':8}folders = os.listdir('/')"
        test = "def check(f): assert f(0) is False and home() is False and 'home' not in folders and 'proc' not in folders"
    else:
        test = "def check(f): pass"
    assert outcomes([code], test) == {code: "passed"}
    assert secret.read_text() == "untouched" and secret.stat().st_mode & 0o777 == 0o600
    assert not LINUX or not list(Path("/tmp").glob("sandbox-*/*"))


def test_read_only_folders_stay_as_they_are(level):
    code = f"""
        import os, sys
        def f(x):
            done = []
            for folder in {[sys.prefix, sys.base_prefix, "/usr/lib", "/", "/dev", "/etc"]!r}:
                try: open(os.path.join(folder, "written-by-a-program"), "w").close(); done.append(folder)
                except OSError: pass
            return [folder for folder in done if folder not in ("/", "/dev", "/etc")]"""
    assert bool(level.tool) == sandbox.protection().startswith("namespaces")
    if level.tool or os.geteuid() == 0:
        assert outcomes([code], "def check(f): assert f(0) == []") == {code: "passed"}
    written = [Path(folder, "written-by-a-program") for folder in (sys.prefix, sys.base_prefix, "/usr/lib", "/", "/dev")]
    assert not [path for path in written if path.exists()]


def test_the_network_is_as_far_away_as_claimed(level):
    accepted = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            while True:
                try:
                    accepted.append(server.accept())
                except OSError:
                    return

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        code = f"import socket\ndef f(x): return socket.socket().connect_ex({server.getsockname()!r}) == 0"
        claims_network = "no network" in sandbox.protection()
        test = f"def check(f): assert f(0) is {not claims_network}"
        assert outcomes([code], test) == {code: "passed"}
        server.shutdown(socket.SHUT_RDWR)
        thread.join(5.0)
    assert bool(accepted) != claims_network


def test_other_processes_are_out_of_reach_as_far_as_claimed(level):
    """A process of ours survives kill(-1) and kill of its id; without namespaces and root nothing is claimed."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(99)"]) as bystander:
        code = f"""
            import ctypes, os
            libc = ctypes.CDLL(None)
            for number in (9, 15, 19):
                libc.kill({os.getpid()}, number)
                libc.kill({bystander.pid}, number)
                libc.kill(os.getppid(), number)
            {"libc.kill(-1, 9)" if level.tool or os.geteuid() == 0 else ""}
            def f(x): return x * x + 1"""
        if level.tool or os.geteuid() == 0:
            got = outcomes([code, "def f(x): return x * x + 1"])
            assert got["def f(x): return x * x + 1"] == "passed" and len(got) == 2
        assert bystander.poll() is None
        bystander.kill()


def test_a_sandbox_that_dies_takes_one_verdict_with_it(monkeypatch):
    """Without namespaces a program of the same user can kill its supervisor: the others do not notice."""
    right = "def f(x): return x * x + 1"
    killer = "import ctypes, os\nctypes.CDLL(None).kill(os.getppid(), 9)\n" + right
    level = LEVELS[-1]
    monkeypatch.setattr(sandbox, "_level", lambda: level)
    got = sandbox.run_programs([Program(code, CHECK, "f") for code in (right, killer, right)], progress=False)
    assert got[0].passed and got[2].passed
    if level.tool or os.geteuid() == 0:  # its supervisor is out of reach
        assert got[1].passed
    else:
        assert got[1].outcome == "crashed: SIGKILL"


# ------------------------------------------------------------------------------------------------- the level


def test_the_strongest_level_that_works_is_the_one_announced():
    sandbox._level.cache_clear()
    assert sandbox._level() == LEVELS[0]
    tool = LEVELS[0].tool
    expected = f"namespaces: no network, private mounts and pids ({tool})" if tool else "limits only"
    assert sandbox.protection() == expected


def test_a_tool_that_does_not_isolate_is_not_believed(monkeypatch, tmp_path):
    """A `bwrap` that just runs the command, and one that fails: neither level is claimed."""
    fake = tmp_path / "bwrap"
    for script in ('while [ "$1" != "%s" ]; do shift; done; exec "$@"' % sys.executable, "exit 1"):
        fake.write_text(f"#!/bin/sh\n{script}\n")
        fake.chmod(0o755)
        monkeypatch.setattr(sandbox.shutil, "which", lambda name: str(fake) if name == "bwrap" else None)
        sandbox._level.cache_clear()
        try:
            assert sandbox.protection() == "limits only"
        except RuntimeError as error:  # nor does root lend its rights where the interpreter is for root alone
            assert os.geteuid() == 0 and LEVELS[-1].tool and "chmod o+x" in str(error)
        finally:
            sandbox._level.cache_clear()
