"""What runs inside a sandbox: a supervisor, and the program with its test in one interpreter.

    python -I sandbox_inside.py TOOL FOLDER TIMEOUT UID [VISIBLE ...] < task.json    # writes the outcome to stdout

Every program starts this file in a new process, so it imports little; what one branch needs is imported there.
"""

import json
import linecache
import math
import os
import select
import signal
import sys
import time
import types
from collections.abc import Callable
from contextlib import suppress

MEMORY = 1 << 30  # bytes of address space of one process
DISK = 64 << 20  # bytes of one file, and of all files in a private /tmp
PROCESSES = 16  # processes and threads of one user at a time
OPEN_FILES = 64
LINUX = sys.platform == "linux"
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND, MS_REC = 1, 2, 4, 8, 32, 4096, 16384
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 36, 38


# -------------------------------------------------------------------------------------------- supervisor


def supervise(tool: str, folder: str, timeout: str, uid: str, *visible: str) -> None:
    """Run the program, write the outcome to stdout, leave no process."""
    if LINUX:
        with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
            file.write("1000")  # when memory runs out, the kernel takes a sandbox first
        _prctl(PR_SET_CHILD_SUBREAPER, 1)  # orphans become our children
        _prctl(PR_SET_DUMPABLE, 0)  # a process of the same user cannot debug us or read our memory
    task = json.load(sys.stdin)
    if tool == "unshare":
        _enter_private_root(folder, visible)
    work = "/tmp" if tool else folder
    if os.getuid() == 0:
        with suppress(OSError):  # a namespace that knows one user
            os.chown(work, int(uid), int(uid))
    verdict, key = os.pipe(), os.urandom(16).hex()
    program = _start_program(verdict[1], work, int(uid), timeout, key, task, guarded=not tool)
    os.close(verdict[1])
    outcome = _await_outcome(program, verdict[0], key, float(timeout))
    if os.getpid() != 1:  # else the kernel ends every process of this namespace with us
        _kill_descendants(program)
    os.write(1, outcome.encode(errors="replace"))
    os._exit(0)


def _await_outcome(program: int, verdict: int, key: str, timeout: float) -> str:
    """What the program reports behind `key`, or how it ended."""
    said, deadline = b"", time.monotonic() + timeout
    while select.select([verdict], [], [], max(0.0, deadline - time.monotonic()))[0]:
        if part := os.read(verdict, 4096):
            said += part
            if key.encode() in said:
                break
        else:
            break  # every process that could report has closed its end
    else:
        return "timed out"
    status = _wait(program, 1.0)
    if status == 0 and key.encode() in said:
        return said.partition(key.encode())[2].decode(errors="replace")
    return f"{'crashed' if status and status < 0 else 'failed'}: {ending(status)}"


def _start_program(verdict: int, work: str, uid: int, timeout: str, key: str, task: list[str], guarded: bool) -> int:
    """Start the process that runs the program. It keeps no descriptor but `verdict`."""
    if pid := os.fork():
        return pid
    try:
        os.setpgid(0, 0)
        null = os.open("/dev/null", os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        for fd in set(range(3, OPEN_FILES)) - {verdict}:
            with suppress(OSError):
                os.close(fd)
        os.chdir(work)
        _give_up_rights(uid, math.ceil(float(timeout)) + 1)
        exit_now, write = os._exit, os.write
        if guarded:
            _take_away()
        outcome = _judge(*task)
        write(verdict, (key + outcome[:1000]).encode(errors="replace"))
        exit_now(0)
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
    os.makedirs(f"{root}/dev/shm")  # semaphores of multiprocessing
    os.chmod(f"{root}/dev/shm", 0o1777)
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


# ------------------------------------------------------------------------------------------------- the program


DANGEROUS = """kill killpg system fork forkpty posix_spawn posix_spawnp execv execve remove unlink rmdir removedirs
rename renames replace truncate ftruncate chmod fchmod lchmod chown fchown lchown chroot link symlink"""  # names in os


class NotSupported(BaseException):
    """A program asks for what is taken away; not an Exception, so that no ordinary handler hides it."""


def _take_away() -> None:
    """Where files and processes of others are in reach: remove what an accident needs, as the reference does."""
    import subprocess

    def taken(name: str) -> Callable:
        def refuse(*args, **kwargs):
            raise NotSupported(f"{name} where the system offers no namespaces")

        return refuse

    for name in DANGEROUS.split():
        setattr(os, name, taken(f"os.{name}"))
    subprocess.Popen = taken("subprocess.Popen")


def _judge(code: str, test: str, entry_point: str) -> str:
    """Run program and test as one file, as the reference does.  -> the outcome

    The file is a module that Python knows, so that pickle, inspect and annotations find what it defines. As in the
    reference, `__name__` is not "__main__".
    """
    source = f"{code}\n{test}\ncheck({entry_point})"
    module = sys.modules["program"] = types.ModuleType("program")
    module.__file__ = "<program>"
    linecache.cache["<program>"] = (len(source), None, source.splitlines(keepends=True), "<program>")
    try:
        exec(compile(source, "<program>", "exec", dont_inherit=True), module.__dict__)
    except NotSupported as error:
        return f"not supported: {error}"
    except BaseException as error:
        return f"failed: {_reason(error, source)}"
    return "passed"


def _reason(error: BaseException, source: str) -> str:
    """One line: the exception and its message, or the line that failed if there is no message."""
    try:
        text = str.__str__(str(error))[:200]
    except BaseException:  # a message may itself fail
        text = "(no message)"
    trace = error.__traceback__
    while trace.tb_next:
        trace = trace.tb_next
    if not text and trace.tb_frame.f_code.co_filename == "<program>":
        text = source.splitlines()[trace.tb_lineno - 1][:200]
    return " ".join(f"{type(error).__name__}: {text}".split())


if __name__ == "__main__":
    supervise(*sys.argv[1:])
