"""What runs inside a sandbox: supervisor, candidate and checker (sandbox.py says who they are and why).

    python -I sandbox_inside.py TOOL FOLDER TIMEOUT UID [VISIBLE ...] < task.json    # writes the outcome to stdout

Every program starts this file anew, so it imports little: what one branch needs is imported there. Below the line
"candidate" nothing is trusted; the checker believes no message to be more than data.
"""

import builtins
import functools
import importlib
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

MEMORY = 1 << 30  # bytes of address space of one process
DISK = 64 << 20  # bytes of one file, and of all files in a private /tmp
PROCESSES = 16  # processes and threads of one user at a time
OPEN_FILES = 64
ANSWER = 64 << 20  # bytes of JSON
LINUX = sys.platform == "linux"
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_REC = 1, 2, 4, 8, 32, 4096, 16384
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 36, 38


# -------------------------------------------------------------------------------------------- supervisor


def supervise(tool: str, folder: str, timeout: str, uid: str, *visible: str) -> None:
    """Start candidate and checker, write the outcome to stdout, leave no process."""
    if LINUX:
        with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")  # when memory runs out, the kernel takes a sandbox first
        _prctl(PR_SET_CHILD_SUBREAPER, 1)  # orphans become our children
        _prctl(PR_SET_DUMPABLE, 0)  # a process of the same user cannot debug us or read our memory
    if tool == "unshare":
        _enter_private_root(folder, visible)
    work = "/tmp" if tool else folder
    if os.getuid() == 0:
        with suppress(OSError):  # a namespace that knows one user
            os.chown(work, int(uid), int(uid))
    requests, replies = os.pipe(), os.pipe()
    serve = _serve if tool else _serve_guarded
    candidate = _fork(serve, (requests[0], replies[1]), work, int(uid), timeout)  # no text, no verdict to inherit
    task, verdict = os.dup(0), os.pipe()
    checker = _fork(_judge, (task, requests[1], replies[0], verdict[1]), "/", int(uid) + 1, timeout)
    for fd in (requests[0], *replies, verdict[1]):  # requests[1] stays open: its end would end the candidate
        os.close(fd)
    if not select.select([verdict[0]], [], [], float(timeout))[0]:
        outcome = "timed out"
    elif not (outcome := os.read(verdict[0], 4096).decode()):
        outcome = f"crashed: {ending(_wait(checker, 1.0))} (the test)"
    elif outcome in ("gone", "passed"):  # a candidate that has ended did so itself
        status = _wait(candidate, 1.0 if outcome == "gone" else 0.0)
        if outcome == "gone" or status is not None:
            outcome = f"{'crashed' if status and status < 0 else 'failed'}: {ending(status)}"
    if os.getpid() != 1:  # else the kernel ends every process of this namespace with us
        _kill_descendants(candidate)
    os.write(1, outcome.encode())
    os._exit(0)


def _fork(run: Callable[..., None], pipes: tuple[int, ...], work: str, uid: int, timeout: str) -> int:
    """Start a process that keeps nothing but `pipes`, calls `run(*pipes)` and ends."""
    if pid := os.fork():
        return pid
    try:
        os.setpgid(0, 0)
        null = os.open("/dev/null", os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        for fd in set(range(3, OPEN_FILES)) - set(pipes):
            with suppress(OSError):
                os.close(fd)
        os.chdir(work)
        _give_up_rights(uid, math.ceil(float(timeout)) + 1)
        run(*pipes)
    finally:
        os._exit(70)  # whatever happened, the supervisor's code does not go on here


def _give_up_rights(uid: int, seconds: int) -> None:
    """Set the limits for good and become nobody."""
    import resource

    limits = {"AS": MEMORY, "FSIZE": DISK, "NOFILE": OPEN_FILES, "NPROC": PROCESSES, "CORE": 0, "CPU": seconds}
    for name, value in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        hard = value + 1 if hard == resource.RLIM_INFINITY else min(value + 1, hard)  # CPU: SIGXCPU, then SIGKILL
        with suppress(*(() if LINUX else (OSError, ValueError))):  # macOS does not limit address space
            resource.setrlimit(kind, (min(value, hard), hard))
    if os.getuid() == 0:
        with suppress(OSError):  # a namespace that knows one user: its root is that user
            os.setgroups([])
            os.setgid(uid)
            os.setuid(uid)
    if LINUX:
        import ctypes

        if ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()):
            raise OSError("capset")
        _prctl(PR_SET_NO_NEW_PRIVS, 1)
        _prctl(PR_SET_DUMPABLE, 0)  # again: a new user resets it
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _prctl(option: int, value: int) -> None:
    import ctypes

    if ctypes.CDLL(None).prctl(option, value, 0, 0, 0):
        raise OSError(f"prctl {option}")


def _enter_private_root(root: str, visible: tuple[str, ...]) -> None:
    """In a mount namespace of our own: make the folder `root` a disk in memory that shows `visible`, and enter it."""
    import ctypes

    def mount(source: str, target: str, flags: int, data: str = "") -> None:
        number = ctypes.c_ulong(flags)
        if ctypes.CDLL(None).mount(source.encode(), target.encode(), b"tmpfs", number, data.encode()):
            raise OSError(f"mount {source} on {target}")

    mount("tmpfs", root, MS_NOSUID | MS_NODEV, f"size={DISK},mode=755")
    for path in (*visible, "/dev/null", "/dev/urandom"):
        os.makedirs(root + (path if os.path.isdir(path) else os.path.dirname(path)), exist_ok=True)
        if not os.path.isdir(path):
            open(root + path, "w").close()
        mount(path, root + path, MS_BIND | MS_REC)
    with open("/proc/self/mounts") as file:
        mounts = [line.split() for line in file]
    for _, target, _, options, *_ in mounts:
        target = target.encode().decode("unicode_escape")  # a space is written \040
        if target.startswith(f"{root}/"):
            kept = {"nodev": MS_NODEV, "noexec": MS_NOEXEC}  # flags in force must be repeated
            flags = MS_NOSUID | sum(kept.get(option, 0) for option in options.split(","))
            mount("", target, MS_REMOUNT | MS_BIND | MS_RDONLY | flags)
    os.makedirs(f"{root}/tmp", exist_ok=True)
    os.chroot(root)  # no way back without privileges, an open folder or /proc, and no nested user namespace
    os.chdir("/")


def _wait(pid: int, seconds: float) -> int | None:
    """The exit status (negative: a signal) of a child that ends within `seconds`, else None."""
    deadline = time.monotonic() + seconds
    while not (done := os.waitpid(pid, os.WNOHANG))[0] and time.monotonic() < deadline:
        time.sleep(0.002)
    return os.waitstatus_to_exitcode(done[1]) if done[0] else None


def ending(status: int | None) -> str:
    """How a process ended, in words; None: it did not."""
    if status is None:
        return "the program closed its connection"
    names = {number.value: number.name for number in signal.Signals}
    return names.get(-status, f"signal {-status}") if status < 0 else f"ended itself with exit status {status}"


def _kill_descendants(candidate: int) -> None:
    """Without a pid namespace: kill children until none is left; each death may hand us its orphans."""
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


# ------------------------------------------------------------------------- messages: JSON, nothing else


COLLECTIONS = {kind.__name__: kind for kind in (dict, list, tuple, set, frozenset, bytes, bytearray)}
NUMBERS = {"Fraction": "fractions", "Decimal": "decimal"}  # their text says all


def _encode(value, other: Callable):
    """`value` as data for JSON, a subclass as its base; `other(value)` stands for what is not plain data."""
    kind = type(value)
    if value is None or kind in (bool, float, str):
        return value
    if isinstance(value, int):
        return int(value) if -(1 << 63) < value < 1 << 63 else {"int": [hex(value)]}  # hex has no limit of digits
    if isinstance(value, (float, str)):
        return float(value) if isinstance(value, float) else str.__str__(value)
    for name, base in COLLECTIONS.items():
        if isinstance(value, base):
            return {name: [_encode(part, other) for part in (value.items() if base is dict else value)]}
    if kind is complex:
        return {"complex": [value.real, value.imag]}
    if kind is range:
        return {"range": [value.start, value.stop, value.step]}
    if kind.__module__ == NUMBERS.get(kind.__name__):
        return {kind.__name__: [str(value)]}
    if kind.__module__ == "numpy" and getattr(value, "shape", None) == ():
        return _encode(value.item(), other)
    return other(value)


def _decode(data, other: Callable):
    """The value that `_encode` was given; `other(kind, key)` for what stood for it."""
    if not isinstance(data, dict):
        return data
    [(kind, parts)] = data.items()
    parts = [_decode(part, other) for part in parts]
    if kind in COLLECTIONS:
        return COLLECTIONS[kind](parts)
    if kind == "int":
        return int(parts[0], 16)
    if kind in ("complex", "range"):
        return getattr(builtins, kind)(*parts)
    if kind in NUMBERS:
        return getattr(importlib.import_module(NUMBERS[kind]), kind)(parts[0])
    return other(kind, parts[0])


def _text(error: BaseException) -> str:
    """The message of an exception, which may itself fail or be huge."""
    try:
        return str.__str__(str(error))[:200]
    except BaseException:
        return "(no message)"


# --------------------------------------------------------------------------------------------- candidate


DANGEROUS = """kill killpg system fork forkpty posix_spawn posix_spawnp execv execve remove unlink rmdir removedirs
rename renames replace truncate ftruncate chmod fchmod lchmod chown fchown lchown chroot link symlink"""  # names in os


def _serve_guarded(requests: int, replies: int) -> None:
    """Where files and processes of others are in reach: take away what an accident needs, as the reference does."""
    import subprocess

    for name in DANGEROUS.split():
        setattr(os, name, None)
    subprocess.Popen = None
    _serve(requests, replies)


def _serve(requests: int, replies: int) -> None:
    """Run the program, then do what the checker asks."""
    namespace, objects = {}, {}  # an empty namespace as in the reference: `__name__` is not "__main__"
    operations = {
        "exec": lambda code: exec(compile(code, "<program>", "exec", dont_inherit=True), namespace),
        "global": lambda name: namespace[name],
        "call": lambda function, *arguments, **keywords: function(*arguments, **keywords),
        "getattr": getattr,
        "getitem": operator.getitem,
        "bool": bool,
        "len": len,
        "iter": iter,
        "next": next,
    }

    def keep(value):
        if isinstance(value, ModuleType) and value.__name__.partition(".")[0] in sys.stdlib_module_names:
            return {"module": [value.__name__]}
        objects[id(value)] = value
        return {"object": [id(value)]}

    def find(kind: str, key: int):
        return objects[key]

    with open(requests, "rb") as incoming, open(replies, "wb") as outgoing:
        for line in incoming:
            operation, before, keywords = json.loads(line)
            try:
                arguments = [_decode(argument, find) for argument in before]
                value = operations[operation](*arguments, **_decode(keywords, find))
                after = [_encode(argument, keep) for argument in arguments]
                reply = json.dumps(["value", _encode(value, keep), after if after != before else None])
            except BaseException as error:
                reply = json.dumps(["error", type(error).__name__, _text(error)])
            outgoing.write(reply.encode() + b"\n")
            outgoing.flush()


# ----------------------------------------------------------------------------------------------- checker


class _Remote:
    """What the program made and is not plain data: used from afar, equal to nothing but itself."""

    def __init__(self, ask: Callable, key: int) -> None:
        self._ask, self._key = ask, key

    def _do(self, operation: str, *arguments, **keywords):
        return self._ask(operation, self, *arguments, **keywords)

    __call__ = functools.partialmethod(_do, "call")
    __getattr__ = functools.partialmethod(_do, "getattr")
    __getitem__ = functools.partialmethod(_do, "getitem")
    __bool__ = functools.partialmethod(_do, "bool")
    __len__ = functools.partialmethod(_do, "len")
    __iter__ = functools.partialmethod(_do, "iter")
    __next__ = functools.partialmethod(_do, "next")


def _judge(task: int, requests: int, replies: int, verdict: int) -> None:
    """Run the test on a stand-in for the candidate and write the verdict."""
    with open(task, "rb") as file:
        code, test, entry_point = json.load(file)
    incoming, outgoing = open(replies, "rb"), open(requests, "wb")

    def finish(outcome: str) -> None:
        os.write(verdict, outcome.encode(errors="replace")[:1000])
        os._exit(0)  # no `except` or `finally` of the test comes between

    def ask(operation: str, *arguments, **keywords):
        request = [operation, [_encode(argument, refer) for argument in arguments], _encode(keywords, refer)]
        with suppress(OSError):  # nobody reads any more: the answer will say so
            outgoing.write(json.dumps(request).encode() + b"\n")
            outgoing.flush()
        line = incoming.readline(ANSWER)
        if not line.endswith(b"\n"):
            finish("failed: the answer is too large" if line else "gone")
        kind, first, second = json.loads(line)
        if kind == "error":
            raise _exception(first, second)
        for argument, after in zip(arguments, second or (), strict=False):
            _change(argument, _decode(after, stand_in))
        return _decode(first, imported if operation == "global" else stand_in)

    def refer(value):
        if isinstance(value, _Remote):
            return {"object": [value._key]}
        raise TypeError(f"a test cannot hand a {type(value).__name__} to the program")

    def stand_in(kind: str, key):
        return _Remote(ask, key)

    def imported(kind: str, key):  # a module that the program imported is also there for its test: our own copy
        known = kind == "module" and key.partition(".")[0] in sys.stdlib_module_names
        return importlib.import_module(key) if known else stand_in(kind, key)

    class Names(dict):
        """Globals of the test: its own; then, before the program's, the builtins."""

        def __missing__(self, name: str):
            if name.startswith("__") or hasattr(builtins, name):
                raise KeyError(name)
            return ask("global", name)  # Python makes a NameError of the KeyError

    try:
        ask("exec", code)
        names = Names()
        exec(compile(test, "<test>", "exec", dont_inherit=True), names)
        exec(f"check({entry_point})", names)
    except BaseException as error:
        finish(f"failed: {_reason(error, test)}")
    finish("passed")


def _exception(name: str, text: str) -> BaseException:
    """The program's exception for the test to catch: of the same class if that is builtin, else an Exception."""
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, BaseException):
        with suppress(TypeError):  # UnicodeDecodeError and others take more than a message
            return kind(text)
    return Exception(f"{name}: {text}")


def _change(old, new) -> None:
    """Make of the test's argument what the program made of it."""
    if isinstance(old, (list, bytearray)) and type(old) is type(new):
        old[:] = new
    elif isinstance(old, (dict, set)) and type(old) is type(new):
        old.clear()
        old.update(new)


def _reason(error: BaseException, test: str) -> str:
    """One line: the exception and its message, or else the assertion that failed."""
    text, trace = _text(error), error.__traceback__
    while trace.tb_next:
        trace = trace.tb_next
    if not text and trace.tb_frame.f_code.co_filename == "<test>":
        text = test.splitlines()[trace.tb_lineno - 1][:200]
    return " ".join(f"{type(error).__name__}: {text}".split())


if __name__ == "__main__":
    supervise(*sys.argv[1:])
