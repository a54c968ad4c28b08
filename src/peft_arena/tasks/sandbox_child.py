"""One process of the sandbox: confines itself, and only then compiles the code it was sent and runs it.

Run as a script (``python -s -S -P -B sandbox_child.py``) by :mod:`peft_arena.tasks.sandbox`; imports the standard
library only. The first line of standard input is a JSON object: what to run and within which limits. There are two
parts. ``program`` defines a function and answers calls of it; ``tests`` calls that function through a pipe, compares,
and writes the verdict to a pipe the program does not have.

The confinement is by the kernel and holds for whatever runs in the process: a Landlock ruleset (files), a seccomp
filter that allows a list of system calls and no other (no process, thread, socket, signal or change of an attribute),
and resource limits. Landlock: Linux Documentation/userspace-api/landlock.rst; seccomp: Documentation/userspace-api/
seccomp_filter.rst; numbers of system calls: Linux arch/x86/entry/syscalls/syscall_64.tbl and
include/uapi/asm-generic/unistd.h.
"""

import _socket
import contextlib
import ctypes
import errno
import json
import mmap
import os
import random
import resource
import struct
import sys
import warnings
from typing import Any

READY = "ready"
_PLAIN = (int, float, str)
_RIGHTS = {"write": 1 << 1, "read": 1 << 2, "list": 1 << 3, "remove": 1 << 5, "make": 1 << 8, "truncate": 1 << 14}
_ALL_RIGHTS = (1 << 13) - 1
"""Every right of the first version of Landlock."""
_TRUNCATE_SINCE = 3
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
_SECCOMP_FILTER, _SIGKILL = 2, 9
_O_TRUNC, _ACCESS_MODE = 0o1000, 0o3
_MAP_ANONYMOUS = 0x20
_HIDDEN_FILES = 8
"""Files that a program may delete and keep open; each is at most so great a share of what all files may hold."""
_OPEN_FILES = 3 + _HIDDEN_FILES
"""At one time: the standard streams and these; pipes that came with a higher number stay beside them."""
_PACKAGES = {"site-packages", "dist-packages"}
_NOT_LOADED = {
    "_curses", "_curses_panel", "_dbm", "_gdbm", "_tkinter", "nis", "ossaudiodev", "readline", "spwd",
    "_asyncio", "_elementtree", "_zoneinfo",
}  # fmt: skip
"""Compiled modules that no judged program needs, and those that are slow to import and have a twin in Python."""
_FCNTL = (0, 1, 2, 3, 1030)
"""F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC: not those that have the kernel send signals."""
_KILL, _ALLOW, _ERRNO = 0x80000000, 0x7FFF0000, 0x00050000
_LOAD, _AND, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x06
_X32 = 0x40000000

_X86_64 = {
    "read": 0, "write": 1, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "poll": 7, "lseek": 8,
    "mprotect": 10, "munmap": 11, "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15,
    "pread64": 17, "pwrite64": 18, "readv": 19, "writev": 20, "access": 21, "pipe": 22, "select": 23,
    "sched_yield": 24, "mremap": 25, "madvise": 28, "dup": 32, "dup2": 33, "nanosleep": 35, "getpid": 39, "exit": 60,
    "uname": 63, "fsync": 74, "ftruncate": 77, "getcwd": 79, "rename": 82, "unlink": 87, "readlink": 89,
    "gettimeofday": 96, "getrusage": 98, "sysinfo": 99, "times": 100, "getuid": 102, "getgid": 104, "geteuid": 107,
    "getegid": 108, "getppid": 110, "sigaltstack": 131, "gettid": 186, "futex": 202, "sched_getaffinity": 204,
    "getdents64": 217, "restart_syscall": 219, "clock_gettime": 228, "clock_getres": 229, "clock_nanosleep": 230,
    "exit_group": 231, "newfstatat": 262, "unlinkat": 263, "renameat": 264, "readlinkat": 267, "faccessat": 269,
    "pselect6": 270, "ppoll": 271, "set_robust_list": 273, "dup3": 292, "pipe2": 293, "renameat2": 316,
    "getrandom": 318, "statx": 332, "rseq": 334, "faccessat2": 439,
}  # fmt: skip
_AARCH64 = {
    "getcwd": 17, "dup": 23, "dup3": 24, "unlinkat": 35, "renameat": 38, "ftruncate": 46, "faccessat": 48, "close": 57,
    "pipe2": 59, "getdents64": 61, "lseek": 62, "read": 63, "write": 64, "readv": 65, "writev": 66, "pread64": 67,
    "pwrite64": 68, "pselect6": 72, "ppoll": 73, "readlinkat": 78, "newfstatat": 79, "fstat": 80, "fsync": 82,
    "exit": 93, "exit_group": 94, "futex": 98, "set_robust_list": 99, "nanosleep": 101, "clock_gettime": 113,
    "clock_getres": 114, "clock_nanosleep": 115, "sched_getaffinity": 123, "sched_yield": 124, "restart_syscall": 128,
    "sigaltstack": 132, "rt_sigaction": 134, "rt_sigprocmask": 135, "rt_sigreturn": 139, "times": 153, "uname": 160,
    "getrusage": 165, "gettimeofday": 169, "getpid": 172, "getppid": 173, "getuid": 174, "geteuid": 175, "getgid": 176,
    "getegid": 177, "gettid": 178, "sysinfo": 179, "brk": 214, "munmap": 215, "mremap": 216,
    "mprotect": 226, "madvise": 233, "renameat2": 276, "getrandom": 278, "statx": 291, "rseq": 293, "faccessat2": 439,
}  # fmt: skip
MACHINES: dict[str, dict[str, Any]] = {
    "x86_64": {"audit": 0xC000003E, "calls": _X86_64, "openat": 257, "fcntl": 72, "ioctl": 16, "mmap": 9},
    "aarch64": {"audit": 0xC00000B7, "calls": _AARCH64, "openat": 56, "fcntl": 25, "ioctl": 29, "mmap": 222},
}
"""Machines whose system calls are known here."""


class Refused(Exception):  # noqa: N818 - not an error of the code that runs
    """The confinement cannot be had; the text says what is missing."""


def confine(limits: dict[str, int], folder: str) -> None:
    """Confine this process for good, and try out that it is.

    Args:
        limits: ``cpu_s``, ``memory_bytes``, ``file_bytes``.
        folder: the one place where files may be written.

    Raises:
        Refused: the kernel cannot do it.
    """
    machine = MACHINES.get(os.uname().machine)
    if sys.platform != "linux" or sys.byteorder != "little" or machine is None:
        raise Refused(f"it needs Linux on {' or '.join(MACHINES)}, this is {sys.platform} on {os.uname().machine}")
    libc = ctypes.CDLL(None, use_errno=True)
    _load_compiled()
    _control(libc, _PR_SET_PDEATHSIG, _SIGKILL)
    _control(libc, _PR_SET_DUMPABLE, 0)
    _control(libc, _PR_SET_NO_NEW_PRIVS, 1)
    _limit(limits)
    _restrict_files(libc, folder)
    _filter_calls(libc, machine)
    _try_out()
    random.seed(0)  # the same program gets the same verdict each time


def _control(libc: ctypes.CDLL, option: int, value: int, pointer: object = None) -> None:
    if libc.prctl(option, ctypes.c_ulong(value), pointer or ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0)):
        raise Refused(f"the kernel refuses prctl {option}: {os.strerror(ctypes.get_errno())}")


def _limit(limits: dict[str, int]) -> None:
    """Set the resource limits; the second second of CPU is for a program that ignores the first signal."""
    resource.setrlimit(resource.RLIMIT_CPU, (limits["cpu_s"], limits["cpu_s"] + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (_OPEN_FILES, _OPEN_FILES))
    one = limits["file_bytes"] // _HIDDEN_FILES
    resource.setrlimit(resource.RLIMIT_FSIZE, (one, one))
    resource.setrlimit(resource.RLIMIT_AS, (limits["memory_bytes"], limits["memory_bytes"]))


def _load_compiled() -> None:
    """Import every compiled module of the standard library: afterwards no file can be mapped, so none can be loaded.

    A file that is mapped keeps its place on the disk when its name is removed, where nobody sees it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some of them are going to leave the library
        for name in sorted(_compiled()):
            with contextlib.suppress(ImportError, OSError):  # its shared library is not installed
                __import__(name)


def _compiled() -> list[str]:
    """Return the compiled modules of the standard library that a program may need."""
    folders = [path for path in sys.path if path.endswith("lib-dynload")]
    names = [name.partition(".")[0] for folder in folders for name in os.listdir(folder)]  # noqa: PTH208
    return [name for name in names if name in sys.stdlib_module_names and name not in _NOT_LOADED]


def _readable() -> list[str]:
    """Return what may be read: Python's own library but for packages that are installed in it, and time zones."""
    library = os.path.dirname(os.__file__)  # noqa: PTH120 - pathlib would double the start-up time
    if os.path.isdir(library):  # noqa: PTH112
        within = [f"{library}/{name}" for name in os.listdir(library) if name not in _PACKAGES]  # noqa: PTH208
        within = [path for path in within if not (os.path.islink(path) and os.path.isdir(path))]  # noqa: PTH112, PTH114
    else:
        within = [library]  # a zip file
    return [*within, "/usr/share/zoneinfo", "/dev/null", "/dev/zero", "/dev/urandom"]


def _restrict_files(libc: ctypes.CDLL, folder: str) -> None:
    version = libc.syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1)
    if version < 1:
        raise Refused("the kernel has no Landlock, or it is switched off: nothing would protect files")
    handled = _ALL_RIGHTS | (_RIGHTS["truncate"] if version >= _TRUNCATE_SINCE else 0)
    attributes = struct.pack("=Q", handled)
    ruleset = libc.syscall(_LANDLOCK_CREATE, attributes, ctypes.c_size_t(len(attributes)), 0)
    if ruleset < 0:
        raise Refused(f"the kernel refuses a Landlock ruleset: {os.strerror(ctypes.get_errno())}")
    seen = _RIGHTS["read"] | _RIGHTS["list"]
    written = seen | _RIGHTS["write"] | _RIGHTS["remove"] | _RIGHTS["make"] | _RIGHTS["truncate"]
    for path in _readable():
        _allow(libc, ruleset, path, seen)
    _allow(libc, ruleset, folder, written & handled, needed=True)
    if libc.syscall(_LANDLOCK_RESTRICT, ruleset, 0):
        raise Refused(f"the kernel refuses to apply a Landlock ruleset: {os.strerror(ctypes.get_errno())}")
    os.close(ruleset)


def _allow(libc: ctypes.CDLL, ruleset: int, path: str, rights: int, needed: bool = False) -> None:
    """Add a rule for a folder or a file; one that is not there needs none."""
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        place = -1
    if place < 0:
        if needed:
            raise Refused(f"the folder of the sandbox is gone: {path}")
        return
    if not os.path.isdir(path):  # noqa: PTH112 - pathlib would double the start-up time
        rights &= ~_RIGHTS["list"]
    rule = struct.pack("=Qi", rights, place)
    failed = libc.syscall(_LANDLOCK_ADD, ruleset, 1, rule, 0)
    os.close(place)
    if failed:
        raise Refused(f"the kernel refuses a Landlock rule for {path}: {os.strerror(ctypes.get_errno())}")


def _filter_calls(libc: ctypes.CDLL, machine: dict[str, Any]) -> None:
    code = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, machine["audit"]), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0)]
    code += [(_AT_LEAST, 0, 1, _X32), (_RETURN, 0, 0, _KILL)]
    for number in machine["calls"].values():
        code += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ALLOW)]
    # mapping a file would keep it on the disk after its name is gone: memory of one's own only
    code += [(_EQUAL, 0, 5, machine["mmap"]), (_LOAD, 0, 0, 16 + 8 * 3), (_AND, 0, 0, _MAP_ANONYMOUS)]
    code += [(_EQUAL, 1, 0, 0), (_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _ERRNO | errno.EPERM)]
    code += [(_EQUAL, 0, 1, machine["ioctl"]), (_RETURN, 0, 0, _ERRNO | errno.ENOTTY)]
    # an open file may be emptied only by who may write it: older versions of Landlock do not look at O_TRUNC
    emptying = [(_LOAD, 0, 0, 16 + 8 * 2), (_AND, 0, 0, _O_TRUNC | _ACCESS_MODE)]
    for mode in (_O_TRUNC, _O_TRUNC | _ACCESS_MODE):
        emptying += [(_EQUAL, 0, 1, mode), (_RETURN, 0, 0, _ERRNO | errno.EPERM)]
    emptying += [(_RETURN, 0, 0, _ALLOW)]
    code += [(_EQUAL, 0, len(emptying), machine["openat"]), *emptying]
    commands = [(_LOAD, 0, 0, 16 + 8)]
    for command in _FCNTL:
        commands += [(_EQUAL, 0, 1, command), (_RETURN, 0, 0, _ALLOW)]
    code += [(_EQUAL, 0, len(commands), machine["fcntl"]), *commands]
    code += [(_RETURN, 0, 0, _ERRNO | errno.EPERM)]
    words = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *instruction) for instruction in code))
    program = ctypes.create_string_buffer(struct.pack("@HP", len(code), ctypes.addressof(words)))
    _control(libc, _PR_SET_SECCOMP, _SECCOMP_FILTER, program)


def _map_a_file() -> None:
    place = os.open("/dev/zero", os.O_RDONLY)
    try:
        mmap.mmap(place, 1, mmap.MAP_PRIVATE)
    finally:
        os.close(place)


def _try_out() -> None:
    """Check on this very process that what must fail does."""
    for what, attempt in (
        ("a socket", _socket.socket),
        ("another process", lambda: os._exit(0) if os.fork() == 0 else None),
        ("a signal", lambda: os.kill(os.getpid(), 0)),
        ("reading /proc", lambda: os.open("/proc/self/environ", os.O_RDONLY)),
        ("writing outside", lambda: os.open("/dev/null", os.O_WRONLY)),
        ("mapping a file", _map_a_file),
    ):
        try:
            attempt()
        except PermissionError:
            continue
        except OSError as error:
            raise Refused(f"{what} was to be denied, and failed otherwise: {error}") from None
        raise Refused(f"{what} was to be denied, and was not")


def encode(value: object) -> object:
    """Return plain data as JSON holds it; containers become lists that begin with their kind.

    Raises:
        TypeError: the value holds something else.
    """
    if value is None or value is True or value is False:
        return value
    for plain in _PLAIN:
        if isinstance(value, plain):
            return plain(value)
    if isinstance(value, complex):
        return ["complex", value.real, value.imag]
    if isinstance(value, (bytes, bytearray)):
        return ["bytes", *value]
    if isinstance(value, dict):
        return ["dict", *([encode(key), encode(held)] for key, held in value.items())]
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return [kind.__name__, *map(encode, value)]
    raise TypeError(f"a value of type {type(value).__name__} is no plain data")


def decode(value: object) -> object:
    """Return the data of :func:`encode`: never anything but plain data.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(value, list):
        return value
    kind, *rest = value
    if kind == "complex":
        return complex(*rest)
    if kind == "bytes":
        return bytes(rest)
    if kind == "dict":
        return {decode(key): decode(held) for key, held in rest}
    kinds = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
    if not isinstance(kind, str) or kind not in kinds:
        raise ValueError("no plain data")
    return kinds[kind](map(decode, rest))


def told(error: BaseException) -> str:
    """Return the kind of an exception and the first line of its message."""
    try:
        lines = str(error).splitlines()
    except Exception:  # noqa: BLE001 - an exception of the program's own making
        lines = []
    return f"{type(error).__name__}: {lines[0]}"[:300] if lines else type(error).__name__


def serve(job: dict[str, Any]) -> None:
    """Define the program's function and answer calls of it until the pipe ends."""
    calls = os.fdopen(job["calls"], "r", encoding="ascii")
    replies = os.fdopen(job["replies"], "w", encoding="ascii")

    def reply(message: dict[str, Any]) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    module = type(sys)("program")
    sys.modules["program"] = module  # dataclasses and the like look up the module of a class
    space: dict[str, Any] = module.__dict__
    try:
        exec(compile(job["program"], "<program>", "exec"), space)
        function = space[job["entry_point"]]
    except BaseException as error:  # noqa: BLE001 - whatever a program raises is its failure
        reply({"error": told(error)})
        return
    reply({"value": None})
    for line in calls:
        try:
            given: Any = decode(json.loads(line))
            values, named = given
            found = {"value": encode(function(*values, **named))}
        except BaseException as error:  # noqa: BLE001 - whatever a program raises is its failure
            found = {"error": told(error)}
        reply(found)


class ProgramFailed(Exception):  # noqa: N818 - its name is shown to readers
    """The program raised, ended, or answered with something that is no plain data."""


def judge(job: dict[str, Any]) -> str:
    """Run the tests with a stand-in that asks the program; return why they failed, or nothing."""
    calls = os.fdopen(job["calls"], "w", encoding="ascii")
    replies = os.fdopen(job["replies"], "r", encoding="ascii")

    def answer() -> object:
        line = replies.readline(job["reply_bytes"])
        if not line.endswith("\n"):
            raise ProgramFailed("the program ended before it answered" if not line else "the answer is too long")
        message = json.loads(line)
        if not isinstance(message, dict) or "value" not in message:
            raise ProgramFailed(str(message.get("error") if isinstance(message, dict) else "no answer")[:300])
        return decode(message["value"])

    def candidate(*values: object, **named: object) -> object:
        try:
            calls.write(json.dumps(encode((values, named))) + "\n")
            calls.flush()
        except BrokenPipeError:
            pass  # the program ended; what it said before is still to be read
        return answer()

    try:
        answer()  # the program defines its function
        space: dict[str, Any] = {"__name__": "tests"}
        exec(compile(job["setup"], "<setup>", "exec"), space)
        space[job["entry_point"]] = candidate
        exec(compile(job["tests"], "<tests>", "exec"), space)
        space["check"](candidate)
    except ProgramFailed as error:
        return str(error)
    except BaseException as error:  # noqa: BLE001 - whatever ends the tests is no pass
        return told(error)
    return ""


def main() -> None:
    """Read the job, confine, and do it."""
    job = json.loads(sys.stdin.readline())
    status = job["status"]
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    os.close(nowhere)
    try:
        if os.getppid() != job["parent"]:
            raise Refused("the process that asked is gone")
        confine(job["limits"], job["folder"])
    except (Refused, OSError, ValueError) as error:
        os.write(status, json.dumps({"refused": told(error)}).encode() + b"\n")
        return
    os.write(status, json.dumps({READY: True}).encode() + b"\n")
    if job["part"] == "program":
        os.close(status)
        serve(job)
    else:
        failure = judge(job)
        os.write(status, json.dumps({"failure": failure}).encode() + b"\n")


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)
