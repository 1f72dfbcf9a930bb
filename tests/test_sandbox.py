"""Programs that are right pass, programs that are wrong fail whatever they try, and nothing outside notices."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from textwrap import dedent

import pytest

from scoring import sandbox
from scoring.sandbox import Program

LINUX = sys.platform == "linux"
CHECK = "def check(f):\n    assert f(3) == 10\n    assert f(5) == 26\n"  # f(x) = x * x + 1


def available_levels() -> list[sandbox.Level]:
    """Every level that works here; under root the last needs an interpreter that everyone may run."""
    works = Program("import socket\ndef f(x): return x * x + 1", CHECK, "f")
    return [level for level in sandbox._levels() if sandbox._run(level, works, 10.0).passed]


LEVELS = available_levels()
assert LEVELS, "no sandbox starts here: sandbox.protection() says why"  # else pytest would skip what has no parameters


@pytest.fixture(params=LEVELS, ids=lambda level: level.tool or "limits only")
def level(request, monkeypatch) -> sandbox.Level:
    monkeypatch.setattr(sandbox, "_level", lambda: request.param)
    return request.param


def outcomes(codes: dict | list, test: str | None = None, timeout: float = 10.0, workers=None) -> dict[str, str]:
    """Run every code, or (code, test), against its test, else `test`, else CHECK; the outcomes by name."""
    codes = codes if isinstance(codes, dict) else {code: code for code in codes}
    pairs = [(code, CHECK) if isinstance(code, str) else code for code in codes.values()]
    programs = [Program(dedent(code), test or its_test, "f") for code, its_test in pairs]
    verdicts = sandbox.run_programs(programs, timeout, workers)
    assert all(verdict.passed == (verdict.outcome == "passed") for verdict in verdicts)
    return {name: verdict.outcome for name, verdict in zip(codes, verdicts, strict=True)}


# ------------------------------------------------------------------------ the verdict of the reference scorer


def parse(text: str) -> dict[str, tuple[str, str]]:
    """name -> (code, test) of "## name" entries; what follows a line "#" is the test, else CHECK."""
    entries = [entry.partition("\n") for entry in text.strip().removeprefix("## ").split("\n## ")]
    programs = {name: body.partition("\n#\n") for name, _, body in entries}
    return {name: (code, test or CHECK) for name, (code, _, test) in programs.items()}


HONEST = parse(r"""
## right
def f(x): return x * x + 1
## wrong
def f(x): return x * x
## raises
def f(x): raise ValueError(x)
## system exit
def f(x): raise SystemExit
## main guard does not run
def f(x): return x * x + 1
if __name__ == '__main__': 1 / 0
## recursion
def f(x): return f(x)
## text
def f(x): return x[::-1]
#
def check(f): assert f('a\n\ud800\u00e9\u4e2d') == '\u4e2d\u00e9\ud800\na'
## test with its own names
LIMIT = 5
def f(x): return x
#
LIMIT = 7
def g(y): return y + LIMIT
def check(f):
    assert g(f(1)) == 8
## test that raises
def f(x): return x
#
def check(f): return undefined_name
## test without check
def f(x): return x
#
x = 1
## input
def f(x): return input()
## numpy
import numpy as np
def f(x): return np.array([x, 2.0])
#
def check(f): assert np.allclose(f(1), [1, 2])
""")


def reference(programs: list[tuple[str, str]]) -> list[bool]:
    """Plain exec() of each program as one file, as human_eval/execution.py does (without its time limit)."""
    script = """
import json, sys
def passes(program):
    try: exec(program, {})
    except BaseException: return False
    return True
result = [passes(program) for program in json.loads(sys.argv[1])]
sys.__stdout__.write(json.dumps(result))"""
    files = json.dumps([f"{code}\n{test}\ncheck(f)" for code, test in programs])
    done = subprocess.run([sys.executable, "-I", "-c", script, files], stdin=subprocess.DEVNULL, capture_output=True)
    return json.loads(done.stdout)


def test_verdicts_are_those_of_exec_in_one_interpreter(level):
    expected = dict(zip(HONEST, reference([*HONEST.values()]), strict=True))
    assert 4 < sum(expected.values()) < len(HONEST) - 4
    verdicts = sandbox.run_programs([Program(*pair, "f") for pair in HONEST.values()], 10.0)
    got = {name: verdict for name, verdict in zip(HONEST, verdicts, strict=True)}
    assert {name: verdict.passed for name, verdict in got.items()} == expected, got


MODULES = parse(r"""
## pickles its own class
import pickle
class C:
    def __init__(self, x): self.x = x
def f(x): return pickle.loads(pickle.dumps(C(x))).x ** 2 + 1
## reads its own source
import inspect
class C: one = 1
def f(x): return x * x + inspect.getsource(f).count('1 +') * 0 + len(inspect.getsource(C).splitlines())
## resolves annotations
from __future__ import annotations
import typing
from dataclasses import dataclass
@dataclass
class P:
    x: Q
class Q: one = 1
def f(x): return x * x + typing.get_type_hints(P)['x'].one
""")  # fmt: skip
POOLS = parse(r"""
## a pool
import multiprocessing
def square(x): return x * x
def f(x):
    with multiprocessing.Pool(2) as pool: return pool.map(square, [x])[0] + 1
## a process and a queue
import multiprocessing
def put(queue, x): queue.put(x * x + 1)
def f(x):
    queue = multiprocessing.Queue()
    process = multiprocessing.Process(target=put, args=(queue, x))
    process.start()
    got = queue.get()
    process.join()
    return got
""")


@pytest.mark.parametrize("name", [*MODULES, *POOLS])
def test_programs_of_many_parts_pass_as_they_do_when_python_runs_the_file(level, name, tmp_path):
    code, test = (MODULES | POOLS)[name]
    (tmp_path / "program.py").write_text(f"{code}\n{test}\ncheck(f)")
    subprocess.run([sys.executable, "program.py"], cwd=tmp_path, stdin=subprocess.DEVNULL, check=True, timeout=60)
    outcome = outcomes({name: (code, test)})[name]
    if name in POOLS and not level.tool:
        assert outcome == "not supported: os.fork where the system offers no namespaces"
    else:
        assert outcome == "passed"


@pytest.mark.parametrize("call", ["os.remove('f')", "os.kill(1, 9)", "os.system('')", "subprocess.run('true')"])
def test_what_is_taken_away_is_not_supported_rather_than_failed(call):
    code = f"import os, subprocess\ndef f(x):\n    try: {call}\n    except Exception: pass\n    return x * x + 1"
    judge = "import sys; from scoring import sandbox_inside as s; s._take_away(); print(s._judge(*sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", judge, code, CHECK, "f"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("not supported: ")


def test_outcomes_say_why(level):
    got = outcomes(parse(r"""
## assert
def f(x): return 0
## error
def f(x): return {}['a b']
## long
def f(x): raise ValueError('long\n' * 10**6)
## silent
class E(Exception):
    def __str__(self): raise self
def f(x): raise E
## unpicklable
def f(x): raise Exception(lambda: 0, open('/dev/null'))
## exit
import os
def f(x): os._exit(0)
## deputy
import ctypes, os
if ctypes.CDLL(None).fork(): os._exit(3)
def f(x): return x * x + 1
## signal
import ctypes
def f(x): ctypes.string_at(0)
## processor
def f(x):
    import resource
    resource.setrlimit(resource.RLIMIT_CPU, (1, 2))
    while True: pass
## memory
def f(x): return bytearray(10 * 2**30)
"""), timeout=60.0)  # fmt: skip
    assert got["assert"] == "failed: AssertionError: assert f(3) == 10"
    assert got["error"].startswith("failed: KeyError") and "a b" in got["error"]
    assert got["long"].startswith("failed: ValueError: long long") and len(got["long"]) < 300
    assert got["silent"].startswith("failed: ") and got["unpicklable"].startswith("failed: ")
    assert got["exit"] == "failed: ended itself with exit status 0"
    assert got["deputy"] == "failed: ended itself with exit status 3"
    assert (got["signal"], got["processor"]) == ("crashed: SIGSEGV", "crashed: SIGXCPU")
    assert not LINUX or got["memory"].startswith("failed: MemoryError")


# ------------------------------------------------------------------- endings that must not pass for a verdict


CHEATS = parse(r"""
## _exit on import
import os
os._exit(0)
## _exit when called
import os
def f(x): os._exit(0)
## exit on import
import sys
sys.exit(0)
## exit when called
def f(x): exit(0)
## system exit
def f(x): raise SystemExit(0)
## system exit on import
raise SystemExit
## exec of another program
import os
def f(x): os.execv('/bin/true', ['true'])
## says so
import os, sys
for s in ('passed', 'passed\n'):
    print(s); print(s, file=sys.stderr)
    os.write(1, s.encode())
def f(x): return 'passed'
## says so at exit
import atexit, os, sys
atexit.register(lambda: (print('passed'), os._exit(0)))
sys.exit()
## writes everywhere
import os
for fd in range(64):
    try: os.write(fd, b'passed')
    except OSError: pass
def f(x): return 0
## own check
def f(x): return 0
def check(f): pass
## thread
import threading, os
threading.Thread(target=lambda: os._exit(0)).start()
def f(x): return 0
## closed descriptors
import os
os.closerange(0, 64)
def f(x): return 0
## signals
import signal, os
signal.signal(signal.SIGALRM, lambda *a: os._exit(0))
signal.setitimer(0, 0.01)
def f(x):
    while True: pass
## fork
import os
def f(x):
    if os.fork(): os._exit(0)
    return 0
## test's text
import os, sys
def f(x):
    for pid in filter(str.isdigit, os.listdir('/proc')):
        for fd in range(9):
            try: open(f'/proc/{pid}/fd/{fd}', 'wb').write(b'passed')
            except OSError: pass
    return 0
## memory of others
import os
def f(x):
    for pid in (os.getppid(), os.getpid() + 1):
        open(f'/proc/{pid}/mem', 'r+b')
    return x * x + 1
## debugger
import ctypes, os
def f(x):
    libc = ctypes.CDLL(None)
    attached = [libc.ptrace(16, pid, 0, 0) == 0 for pid in (os.getppid(), os.getpid() + 1)]
    return x * x + 1 if any(attached) else 0
## descriptors of others
import ctypes, os
def f(x):
    libc = ctypes.CDLL(None)
    taken = [libc.syscall(438, libc.syscall(434, pid, 0), 1, 0) >= 0 for pid in (os.getppid(), os.getpid() + 1)]
    return x * x + 1 if any(taken) else 0
""")  # fmt: skip


def test_no_program_that_ends_prints_or_closes_its_files_passes(level):
    got = outcomes(CHEATS)
    assert not [name for name, outcome in got.items() if outcome == "passed"]
    assert got["own check"] == got["writes everywhere"] == "failed: AssertionError: assert f(3) == 10"


def test_a_program_that_does_odd_things_and_answers_right_passes(level):
    got = outcomes(parse(r"""
## builtins
import builtins
builtins.AssertionError = builtins.print = None
def f(x): return x * x + 1
## output
print('x' * 10**6)
def f(x): print('failed'); return x * x + 1
## signals
import signal
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM): signal.signal(number, signal.SIG_IGN)
def f(x): return x * x + 1
## thread
import threading, time
try: threading.Thread(target=lambda: time.sleep(99)).start()
except RuntimeError: pass  # where the limit counts all processes of the user
def f(x): return x * x + 1
## at exit
import atexit, time
atexit.register(time.sleep, 99)
def f(x): return x * x + 1
## own files
import os
def f(x):
    with open('here', 'w') as file: file.write('y')
    return x * x + (os.listdir('.') != [] and open('here').read() == 'y')
"""))  # fmt: skip
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


def gone(name: str, seconds: float = 5.0) -> bool:
    """No process of that name is left, or will be in a moment."""
    deadline = time.monotonic() + seconds
    while name in names_of_processes() and time.monotonic() < deadline:
        time.sleep(0.05)
    return name not in names_of_processes()


def test_what_never_ends_is_timed_out_and_leaves_no_process(level):
    codes = parse(
        r"""
## loop
def f(x):
    while True: pass
## sleep
import time
time.sleep(99)
## output
def f(x):
    while True: print('x' * 10**6)
## answers
def f(x):
    while True: yield x
## deaf
import signal
for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}: signal.signal(number, signal.SIG_IGN)
def f(x):
    while True: pass
## swallows
def f(x):
    while True:
        try:
            while True: pass
        except BaseException: pass
## threads
import threading
def g():
    while True: pass
def f(x):
    try: threading.Thread(target=g).start()
    except RuntimeError: pass  # where the limit counts all processes of the user
    g()
## bomb
import ctypes, time
end = time.time() + 20
libc = ctypes.CDLL(None)
libc.prctl(15, NAME, 0, 0, 0)
def f(x):
    while time.time() < end: libc.fork()
## daemon
import ctypes, time
libc = ctypes.CDLL(None)
libc.prctl(15, NAME, 0, 0, 0)
def f(x):
    if libc.fork() == 0:
        libc.setsid()
        if libc.fork() == 0: time.sleep(20)
        libc._exit(0)
    time.sleep(20)
""".replace("NAME", f"b'left-{os.getpid()}'")
    )
    start = time.monotonic()
    got = outcomes(codes, timeout=1.0, workers=len(codes), test="def check(f): assert [*f(1)] == 1")
    assert set(got.values()) == {"timed out"}, got
    assert time.monotonic() - start < 30.0
    assert not LINUX or gone(f"left-{os.getpid()}")


def test_a_daemon_does_not_outlive_a_program_that_passes(level):
    code = f"""
        import ctypes, time
        libc = ctypes.CDLL(None)
        if libc.fork() == 0:
            libc.prctl(15, b'daemon-{os.getpid()}', 0, 0, 0)
            libc.setsid()
            if libc.fork() == 0: time.sleep(20)
            libc._exit(0)
        def f(x): return x * x + 1"""
    assert outcomes([code]) == {code: "passed"}
    assert not LINUX or gone(f"daemon-{os.getpid()}")


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
        def environment(): return set(os.environ)
        def read(): return sys.stdin.read()
        def streams(): return [os.path.samestat(os.fstat(fd), os.stat('/dev/null')) for fd in (0, 1, 2)]"""
    test = """
def fails(f, kind):
    try: f()
    except kind: return True
def check(f):
    assert f(0)[1:] == [64 << 20, 64, 0] and f(0)[0] in EXPECTED
    assert fails(write, OSError) and fails(files, OSError)
    assert environment() <= {'TMPDIR', 'OMP_NUM_THREADS', 'LD_LIBRARY_PATH', 'LC_CTYPE', 'PWD'}
    assert streams() == [True] * 3 and read() == ''
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
        code += """
        attempt(path.write_text, 'written')
        open('/tmp/x', 'w')
        folders = os.listdir('/')"""
        test = (
            "def check(f): assert f(0) is False and home() is False and 'home' not in folders and 'proc' not in folders"
        )
    else:
        test = "def check(f): pass"
    assert outcomes([code], test) == {code: "passed"}
    assert secret.read_text() == "untouched" and secret.stat().st_mode & 0o777 == 0o600


def test_what_a_program_sees_of_the_disk_it_cannot_change(level, monkeypatch):
    """Shown a folder that everybody may write to, programs read it and write only below /tmp."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as shown:
        Path(shown).chmod(0o777)
        Path(shown, "seen").write_text("seen")
        paths = [*sandbox._visible_paths(), shown]
        monkeypatch.setattr(sandbox, "_visible_paths", lambda: paths)
        [again] = [new for new in sandbox._levels() if new.tool == level.tool]
        monkeypatch.setattr(sandbox, "_level", lambda: again)
        code = f"""
            import os
            def f(x):
                for folder in {[shown, sys.prefix, sys.base_prefix, "/usr/lib", "/lib"]!r}:
                    try: open(os.path.join(folder, "written"), "w").close(); return folder
                    except OSError: pass
                return open({shown + "/seen"!r}).read()"""
        writable = "private mounts" not in sandbox.protection()
        assert outcomes([code], f"def check(f): assert f(0) == {shown if writable else 'seen'!r}") == {code: "passed"}
        assert Path(shown, "written").exists() == writable


def test_the_temporary_folder_is_removed(level, monkeypatch):
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o711)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    code = """
        import os
        os.makedirs('a/b')
        open('a/b/c', 'w').close()
        os.symlink('/etc', 'a/link') if os.symlink else None
        def f(x): return x * x + 1"""
    assert outcomes([code, "import os\nos._exit(0)"])[code] == "passed"
    folder.rmdir()  # which takes an empty one only


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
    got = sandbox.run_programs([Program(code, CHECK, "f") for code in (right, killer, right)])
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
    for script in (f'while [ "$1" != "{sys.executable}" ]; do shift; done; exec "$@"', "exit 1"):
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


@pytest.mark.parametrize(("allowed", "expected"), [(-1, "5 6"), (20, "5 6"), (3, "3 3")])
def test_seconds_of_processor_time_are_one_below_the_end_where_the_process_may_have_them(allowed, expected):
    code = f"""
        import os, resource
        from scoring.sandbox_inside import _give_up_rights
        resource.setrlimit(resource.RLIMIT_CPU, (min(allowed := {allowed}, 9), allowed))
        _give_up_rights(os.getuid(), 5)
        print(*resource.getrlimit(resource.RLIMIT_CPU))
    """
    done = subprocess.run([sys.executable, "-c", dedent(code)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected
