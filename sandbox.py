"""Runs model-written Python programs against their tests, HumanEval style, and says what that protects from.

    verdicts = run_programs([Program(code, test, entry_point), ...])  # one Verdict each, in the same order
    print(protection())                                               # which of the two levels below is in force

The verdict is that of openai/human-eval (human_eval/execution.py) for `code + "\\n" + test + "\\n" + f"check({entry_point})"`,
but the candidate (`code`) and its judge never share an interpreter. Each program is three processes:

    supervisor   none of the program's text; starts the two others, keeps the time, kills what is left
    candidate    runs `code`, then answers calls; forked before code, test or verdict pipe reached the supervisor
    checker      runs `test` and `check(...)` on a stand-in for the candidate; it alone can write the verdict

Only JSON passes between candidate and checker: arguments one way, results the other (and arguments changed in
place). So nothing done inside the candidate can pass a test that its answers do not pass: not exiting early, not
printing, not patching builtins, `assert` or `check`, not reading frames, memory or descriptors; expected values are not
there to be read. An answer is data: an object whose `__eq__` always says True equals nothing here, though it passes
the reference. The reference is also followed where a test leans on the program: arguments changed in place stay
changed, and a name that the test does not define (HumanEval/32 `poly`, /38 `encode_cyclic`, /50 `encode_shift`; /33 compares
the answer with a second answer) is the program's own: a program that redefines it passes, here and there. A test can pass
plain data and earlier results to a program, not functions of its own.

Protection, tried once for real and named by `protection()`:

- always: wall-clock and CPU limits, memory per process, file size, open files, processes (on Linux: and threads),
  no privileges and, for root, a user id of its own; empty environment, no stdin, output discarded, a temporary folder;
- "namespaces" (bubblewrap, else unshare): no network; of the disk only the interpreter's folders, read-only, and a
  private /tmp in memory; processes see and signal only each other, and all die with the supervisor;
- "limits only" (no user namespaces; macOS, untested): files and network are those of the user (for root: those any
  user may reach); without root, a program can also signal, and where the system allows it debug, every process of
  that user, this one included, so a determined one can forge a verdict or leave a process behind.

It does not protect, at any level, from a bug in the kernel (no system call filter) or in the interpreter's JSON reader, from
reading what lies in the interpreter's folders (an installed copy of the benchmark), from side channels, or from many
processes of one program that fill the memory together. For code that is hostile rather than wrong, use a virtual machine.
"""

import builtins
import functools
import itertools
import json
import math
import operator
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from types import ModuleType
from typing import NamedTuple

# This file is also what each sandbox starts: modules that only the caller's side needs are imported where used.

MEMORY = 1 << 30  # bytes of address space a process may have
DISK = 64 << 20  # bytes a file, or all files in a private /tmp, may hold
PROCESSES = 16  # processes and threads at a time
OPEN_FILES = 64
ANSWER = 64 << 20  # bytes of JSON of one answer
STARTING = 30.0  # seconds, beyond the program's own, after which a sandbox itself counts as hung
FIRST_UID, NUM_UIDS = 60578, 600  # root only: system ids that nobody owns (systemd.io/UIDS-GIDS)
LINUX = sys.platform == "linux"


class Program(NamedTuple):
    """A candidate solution (`code` = prompt + completion) and the test that judges it."""

    code: str
    test: str  # defines check(candidate)
    entry_point: str


class Verdict(NamedTuple):
    """`outcome`: "passed", "failed: <reason>", "timed out" or "crashed: <signal>"."""

    passed: bool
    outcome: str


# ----------------------------------------------------------------------------------------- the caller's side


class Level(NamedTuple):
    """One way to start a sandbox: the command before the interpreter, and how it is announced."""

    name: str  # "bubblewrap", "unshare" or "" for none
    command: tuple[str, ...]

    @property
    def description(self) -> str:
        return f"namespaces: no network, private mounts and pids ({self.name})" if self.name else "limits only"


def run_programs(
    programs: list[Program], timeout: float = 3.0, workers: int | None = None, progress: bool = True
) -> list[Verdict]:
    """Run every program in a sandbox of its own, `workers` (default: all cores) at a time.

    `timeout`: seconds of wall clock for one program and its test. `progress`: a bar, if stderr is a terminal.
    Raises RuntimeError if this system starts no sandbox at all.
    """
    from concurrent.futures import ThreadPoolExecutor

    from tqdm import tqdm

    level = _level()
    pool = ThreadPoolExecutor(workers or (len(os.sched_getaffinity(0)) if LINUX else os.cpu_count()))
    try:
        verdicts = pool.map(lambda program: _run(level, program, timeout), programs)
        return list(tqdm(verdicts, "running programs", len(programs), disable=None if progress else True))
    finally:
        pool.shutdown(cancel_futures=True)


def protection() -> str:
    """The level in force: "namespaces: no network, private mounts and pids (<tool>)" or "limits only"."""
    return _level().description


@functools.cache
def _level() -> Level:
    """The strongest level that this system really gives: a probe must see no file, port or pid of ours."""
    import socket
    import tempfile

    with tempfile.NamedTemporaryFile() as ours, socket.create_server(("127.0.0.1", 0)) as server:
        look = f"""
import math, os, socket
def look():
    with socket.socket() as s:
        return [os.path.exists({ours.name!r}), os.getppid(), s.connect_ex({server.getsockname()!r}) == 0]
"""
        for level in _levels():
            expected = "== [False, 1, False]" if level.name else "is not None"
            test = f"def check(look):\n    assert look() {expected}"
            verdict = _run(level, Program(look, test, "look"), timeout=10.0)
            if verdict.passed:
                return level
    raise RuntimeError(f"no sandbox starts here ({verdict.outcome}); {_advice()}")


def _levels() -> list[Level]:
    """What may work here, strongest first."""
    import shutil

    levels = []
    bwrap, unshare = shutil.which("bwrap"), shutil.which("unshare")
    if LINUX and bwrap:
        shown = []
        for path in [*_visible_paths(), os.path.abspath(__file__)]:
            shown += ["--dir", os.path.dirname(path), "--ro-bind", path, path]  # --dir: enterable by everyone
        command = f"{bwrap} --unshare-net --unshare-pid --unshare-ipc --unshare-uts --as-pid-1 --die-with-parent"
        files = f"--dev /dev --size {DISK} --tmpfs /tmp"
        levels.append(Level("bubblewrap", (*command.split(), *files.split(), *shown)))
    if LINUX and unshare:
        command = f"{unshare} --net --pid --ipc --uts --mount --fork --kill-child".split()
        if os.geteuid() == 0:  # real root needs no user namespace, and can then give programs ids of their own
            levels.append(Level("unshare", (*command,)))
        levels.append(Level("unshare", (*command, "--user", "--map-root-user")))
    return [*levels, Level("", ())]


def _advice() -> str:
    """Why even "limits only" may fail: root drops to an unprivileged user, who must reach the interpreter."""
    for path in itertools.accumulate(sys.base_prefix.strip("/").split("/"), "{}/{}".format):
        if os.geteuid() == 0 and not os.stat(f"/{path}").st_mode & 1:
            return f"programs run unprivileged and cannot enter /{path}: run `chmod o+x /{path}`, or not as root"
    return f"is {sys.executable} a working Python that may start processes?"


_ids = itertools.count(os.getpid())  # sandboxes running at the same time differ in their user ids


def _run(level: Level, program: Program, timeout: float) -> Verdict:
    """Start one sandbox and wait for its verdict."""
    import subprocess
    import tempfile

    with tempfile.TemporaryDirectory(prefix="sandbox-", ignore_cleanup_errors=True) as folder:
        uid = FIRST_UID + 2 * next(_ids) % NUM_UIDS
        python = [sys.executable, "-I", os.path.abspath(__file__), level.name, folder, str(timeout), str(uid)]
        # One thread for numpy's BLAS, whose threads would not fit the limits; the loader's path may be needed.
        environment = {"TMPDIR": folder, "OMP_NUM_THREADS": "1"}
        environment |= {key: os.environ[key] for key in ("LD_LIBRARY_PATH",) if key in os.environ}
        process = subprocess.Popen(
            [*level.command, *python],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            cwd="/",
            start_new_session=True,
        )
        with process:
            try:
                outcome, errors = process.communicate(json.dumps(program).encode(), timeout + STARTING)
            except subprocess.TimeoutExpired:
                outcome = b"timed out"
                os.killpg(process.pid, signal.SIGKILL)
    outcome = outcome.decode()
    if not outcome:
        last = errors.decode(errors="replace").strip().rpartition("\n")[2]
        outcome = f"crashed: {_ending(process.returncode)}" + (f" ({last[:200]})" if last else "")
    return Verdict(outcome == "passed", outcome)


# ------------------------------------------------------------------------------------------- the supervisor


def _supervise(level: str, folder: str, timeout: str, uid: str) -> None:
    """The sandbox's first process: start candidate and checker, write the outcome to stdout, kill the rest."""
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # when memory runs out, the kernel takes a sandbox first
    if LINUX:
        _prctl(36, 1)  # PR_SET_CHILD_SUBREAPER: orphans come to us, so that we can find them
        _prctl(4, 0)  # PR_SET_DUMPABLE: no debugging and no /proc/pid/mem from a process of the same user
    if level == "unshare":
        _enter_private_root(folder)
    work = "/tmp" if level else folder
    if os.getuid() == 0:
        with suppress(OSError):  # a namespace with one user has no other owner to give it to
            os.chown(work, int(uid), int(uid))
    requests, replies = os.pipe(), os.pipe()
    # The candidate comes first: neither the program nor the verdict's pipe exists yet in what it inherits.
    candidate = _fork(_serve, (requests[0], replies[1]), work, int(uid), timeout)
    task, verdict = os.dup(0), os.pipe()
    checker = _fork(_judge, (task, requests[1], replies[0], verdict[1]), "/", int(uid) + 1, timeout)
    for fd in (requests[0], *replies, verdict[1], task):  # requests[1] stays: nothing must tell the candidate to end
        os.close(fd)
    if not select.select([verdict[0]], [], [], float(timeout))[0]:
        outcome = "timed out"
    else:
        outcome = os.read(verdict[0], 4096).decode()
        if not outcome:
            outcome = f"crashed: the checker: {_ending(_wait(checker))}"
        elif outcome == "gone" or (outcome == "passed" and _wait(candidate, 0.0) is not None):
            status = _wait(candidate)  # a candidate never ends before its verdict unless it ends itself
            outcome = f"{'crashed' if status and status < 0 else 'failed'}: {_ending(status)}"
    _kill_descendants(candidate)
    os.write(1, outcome.encode())
    os._exit(0)


def _fork(run: Callable[..., None], pipes: tuple[int, ...], work: str, uid: int, timeout: str) -> int:
    """Start a process that keeps nothing but `pipes`, calls `run(*pipes)` and ends."""
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setpgid(0, 0)
        null = os.open("/dev/null", os.O_RDWR)
        for fd in range(OPEN_FILES):
            if fd < 3:
                os.dup2(null, fd)
            elif fd not in pipes:
                with suppress(OSError):
                    os.close(fd)
        os.chdir(work)
        _give_up_privileges(uid, math.ceil(float(timeout)) + 1)
        run(*pipes)
    finally:
        os._exit(70)  # reached only if `run` raised: the supervisor's code must not go on here


def _give_up_privileges(uid: int, seconds: int) -> None:
    """Set the limits for good, and leave root's rights behind."""
    import resource

    limits = {"AS": MEMORY, "FSIZE": DISK, "NOFILE": OPEN_FILES, "NPROC": PROCESSES, "CORE": 0, "CPU": seconds}
    for name, value in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        with suppress(*(() if LINUX else (OSError, ValueError))):  # macOS takes no address space limit
            resource.setrlimit(kind, (value, value + (name == "CPU" and value != hard)))  # SIGXCPU, then SIGKILL
    if os.getuid() == 0:
        with suppress(OSError):  # a namespace that maps one user only: its root is that user, without privileges
            os.setgroups([])
            os.setgid(uid)
            os.setuid(uid)
    if LINUX:
        import ctypes

        _prctl(38, 1)  # PR_SET_NO_NEW_PRIVS: no set-uid program helps
        header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        if _libc().capset(header, none) != 0:
            raise OSError("capset")
        _prctl(4, 0)  # again PR_SET_DUMPABLE: changing the user may have reset it
        _prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: die with the supervisor


def _libc():
    import ctypes

    return ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, value: int) -> None:
    if _libc().prctl(option, value, 0, 0, 0) != 0:
        raise OSError(f"prctl {option}")


def _visible_paths() -> list[str]:
    """What a Python needs of the disk; a folder inside another one of the list is left out."""
    paths = [sys.prefix, sys.base_prefix, "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/nix/store"]
    paths = sorted(p for p in {*paths, "/usr/share/zoneinfo", "/etc/ld.so.cache"} if os.path.exists(p))
    return [p for p in paths if not any(p.startswith(other.rstrip("/") + "/") for other in paths)]


def _enter_private_root(root: str) -> None:
    """In a mount namespace of our own: make `root` a small disk in memory that shows what Python needs."""
    import ctypes

    read_only, bind, recursive, remount = 1, 4096, 16384, 32
    option_flags = {"nosuid": 2, "nodev": 4, "noexec": 8}

    def mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
        words = [word.encode() for word in (source, target, kind)]
        if _libc().mount(*words, ctypes.c_ulong(flags), data.encode()) != 0:
            raise OSError(ctypes.get_errno(), f"mount {source} on {target}")

    mount("tmpfs", root, "tmpfs", option_flags["nosuid"] | option_flags["nodev"], f"size={DISK},mode=755")
    for path in [*_visible_paths(), "/dev/null", "/dev/urandom"]:
        if os.path.isdir(path):
            os.makedirs(root + path)
        else:
            os.makedirs(os.path.dirname(root + path), exist_ok=True)
            open(root + path, "w").close()
        mount(path, root + path, "", bind | recursive)
    with open("/proc/self/mounts") as file:
        mounts = [line.split() for line in file]
    for _, target, _, options, *_ in mounts:
        target = target.encode().decode("unicode_escape")  # a space is written \040
        if target.startswith(root + "/"):  # flags that a mount already has must be repeated
            flags = sum(option_flags.get(option, 0) for option in options.split(","))
            mount("", target, "", remount | bind | read_only | option_flags["nosuid"] | flags & ~2)
    os.makedirs(f"{root}/tmp", exist_ok=True)
    os.chroot(root)  # without CAP_SYS_CHROOT, open folders or /proc there is no way back, nor a nested user namespace
    os.chdir("/")


def _wait(pid: int, seconds: float = 1.0) -> int | None:
    """The exit status (negative: the signal) of a child that ends within `seconds`, else None."""
    deadline = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= deadline:
            return None
        time.sleep(0.002)


def _ending(status: int | None) -> str:
    if status is None:
        return "the program closed its connection"
    return signal.Signals(-status).name if status < 0 else f"ended itself with exit status {status}"


def _kill_descendants(candidate: int) -> None:
    """Leave no process behind. In a pid namespace of our own the kernel does that as we end."""
    if os.getpid() == 1:
        return
    with suppress(OSError):
        os.killpg(candidate, signal.SIGKILL)
    deadline = time.monotonic() + 5.0
    while time.monotonic() < deadline:
        for pid in filter(str.isdigit, os.listdir("/proc") if LINUX else ()):
            with suppress(OSError), open(f"/proc/{pid}/stat") as file:
                if int(file.read().rpartition(")")[2].split()[1]) == os.getpid():
                    os.kill(int(pid), signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.001)


# --------------------------------------------------------------------------- between candidate and checker: JSON


COLLECTIONS = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset, "bytearray": bytearray}
BY_TEXT = ("fractions.Fraction", "decimal.Decimal")  # numbers whose text says all


def _encode(value, other: Callable):
    """`value` as JSON data; a subclass becomes its base. `other(value)` stands for what is not plain data."""
    kind = type(value)
    if value is None or kind in (bool, float, str):
        return value
    if isinstance(value, int):
        value = int(value)
        return value if abs(value) < 1 << 63 else {"int": hex(value)}  # hex has no limit of digits
    if isinstance(value, float):
        return float(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, bytes):
        return {"bytes": value.decode("latin1")}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, dict):
        return {"dict": [[_encode(k, other), _encode(v, other)] for k, v in value.items()]}
    for name, base in COLLECTIONS.items():
        if isinstance(value, base):
            return {name: [_encode(item, other) for item in value]}
    if kind is range:
        return {"range": [value.start, value.stop, value.step]}
    if f"{kind.__module__}.{kind.__name__}" in BY_TEXT:
        return {kind.__name__: str(value)}
    if kind.__module__ == "numpy" and getattr(value, "shape", None) == ():
        return _encode(value.item(), other)
    return other(value)


def _decode(data, other: Callable):
    """The value that `_encode` was given; `other(kind, body)` for what stood for it."""
    if not isinstance(data, dict):
        return data
    [(kind, body)] = data.items()
    if kind in COLLECTIONS:
        return COLLECTIONS[kind]([_decode(item, other) for item in body])
    if kind == "dict":
        return {_decode(k, other): _decode(v, other) for k, v in body}
    if kind == "int":
        return int(body, 16)
    if kind == "bytes":
        return body.encode("latin1")
    if kind in ("complex", "range"):
        return getattr(builtins, kind)(*body)
    if kind in ("Fraction", "Decimal"):
        import decimal
        import fractions

        return getattr(decimal if kind == "Decimal" else fractions, kind)(body)
    return other(kind, body)


OPERATIONS = {
    "call": lambda function, *arguments, **keywords: function(*arguments, **keywords),
    "getattr": getattr,
    "getitem": operator.getitem,
    "bool": bool,
    "len": len,
    "iter": iter,
    "next": next,
}


def _serve(requests: int, replies: int) -> None:
    """The candidate: run the program, then do what the checker asks. Nothing here is trusted by anyone."""
    namespace, objects = {}, []  # globals as the reference has them: `__name__` is not "__main__"

    def keep(value):
        if isinstance(value, ModuleType) and value.__name__.partition(".")[0] in sys.stdlib_module_names:
            return {"module": value.__name__}  # the checker takes its own
        objects.append(value)
        return {"object": len(objects) - 1}

    def find(kind, key):
        return objects[key]

    with open(requests, "rb") as incoming, open(replies, "wb") as outgoing:
        for line in incoming:
            name, arguments, keywords = json.loads(line)
            try:
                values = [_decode(argument, find) for argument in arguments]
                if name == "exec":
                    exec(compile(values[0], "<program>", "exec"), namespace)
                    value = None
                elif name == "global":
                    value = namespace[values[0]]
                else:
                    value = OPERATIONS[name](*values, **{k: _decode(v, find) for k, v in keywords.items()})
                after = [_encode(argument, keep) for argument in values]
                reply = ["value", _encode(value, keep), after if after != arguments else None]
                text = json.dumps(reply)
            except BaseException as error:
                text = json.dumps(["error", type(error).__name__, _text(error)])
            outgoing.write(text.encode() + b"\n")
            outgoing.flush()


def _text(error: BaseException) -> str:
    """The message of an exception, which may itself fail or be endless."""
    try:
        return str.__str__(str(error))[:200]
    except BaseException:
        return "(no message)"


class _Remote:
    """What the program returned that is not plain data: used from afar, equal to nothing but itself."""

    def __init__(self, ask: Callable, key: int) -> None:
        self._ask, self._key = ask, key

    def __call__(self, *arguments, **keywords):
        return self._ask("call", self, *arguments, **keywords)

    def __getattr__(self, name: str):
        return self._ask("getattr", self, name)

    def __getitem__(self, index):
        return self._ask("getitem", self, index)

    def __bool__(self):
        return self._ask("bool", self)

    def __len__(self):
        return self._ask("len", self)

    def __iter__(self):
        return self._ask("iter", self)

    def __next__(self):
        return self._ask("next", self)


def _judge(task: int, requests: int, replies: int, verdict: int) -> None:
    """The checker: run the test on a stand-in for the candidate and write the verdict."""
    with open(task, "rb") as file:
        code, test, entry_point = json.load(file)
    incoming, outgoing = open(replies, "rb"), open(requests, "wb")

    def finish(outcome: str) -> None:
        os.write(verdict, outcome.encode(errors="replace")[:1000])
        os._exit(0)  # no `except` and no `finally` of the test comes between

    def ask(operation: str, *arguments, **keywords):
        request = [operation, [_encode(a, refer) for a in arguments]]
        request.append({name: _encode(value, refer) for name, value in keywords.items()})
        try:
            outgoing.write(json.dumps(request).encode() + b"\n")
            outgoing.flush()
            line = incoming.readline(ANSWER)
        except OSError:
            line = b""
        if not line.endswith(b"\n"):
            finish("failed: an answer is too large" if line else "gone")
        kind, first, second = json.loads(line)
        if kind == "error":
            raise _exception(first, second)
        for argument, after in zip(arguments, second or (), strict=False):
            _change(argument, _decode(after, stand_in))
        return _decode(first, stand_in)

    def refer(value):
        if isinstance(value, _Remote):
            return {"object": value._key}
        raise TypeError(f"a test cannot pass a {type(value).__name__} to the program")

    def stand_in(kind, body):
        if kind == "module" and body.partition(".")[0] in sys.stdlib_module_names:
            return __import__(body, fromlist=["itself"])
        return _Remote(ask, body)

    class Names(dict):
        """Globals of the test: its own, then the builtins, then the program's."""

        def __missing__(self, name):
            if name.startswith("__") or hasattr(builtins, name):
                raise KeyError(name)
            return ask("global", name)  # its KeyError becomes the NameError of the reference

    try:
        ask("exec", code)
        names = Names()
        exec(compile(test, "<test>", "exec", dont_inherit=True), names)
        exec(f"check({entry_point})", names)
    except BaseException as error:
        finish(f"failed: {_reason(error, test)}")
    finish("passed")


def _exception(name: str, text: str) -> BaseException:
    """The program's exception for the test to catch: a builtin one if its name is, else an Exception."""
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, BaseException):
        with suppress(TypeError):  # UnicodeDecodeError and others want more than a message
            return kind(text)
    return Exception(f"{name}: {text}")


def _change(old, new) -> None:
    """Make the test's argument what the program made of it."""
    if type(old) is not type(new):
        return
    if isinstance(old, (list, bytearray)):
        old[:] = new
    elif isinstance(old, (dict, set)):
        old.clear()
        old.update(new)


def _reason(error: BaseException, test: str) -> str:
    """One short line: the exception, or the assertion that failed."""
    text = _text(error)
    if isinstance(error, AssertionError) and not text:
        trace = error.__traceback__
        while trace.tb_next:
            trace = trace.tb_next
        if trace.tb_frame.f_code.co_filename == "<test>":
            text = test.splitlines()[trace.tb_lineno - 1].strip()[:200]
    return " ".join(f"{type(error).__name__}: {text}".split())


if __name__ == "__main__":
    _supervise(*sys.argv[1:])
