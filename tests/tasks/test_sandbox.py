"""The sandbox: right is right, wrong is wrong, and what a program must not do fails."""

from __future__ import annotations

import json
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

import peft_arena.tasks.sandbox as sandbox
from peft_arena.core.errors import UserError
from peft_arena.tasks import sandbox_child as child
from peft_arena.tasks.sandbox import Limits, Outcome, refusal, run

SOURCE = Path(__file__).parents[2] / "src"
TESTS = "def check(f):\n    assert f(1) == 2\n    assert f(3) == 4, 'three'\n"
SMALL = Limits(cpu_s=1, wall_s=3.0, memory_bytes=256 << 20, file_bytes=1 << 20, files=20, output_bytes=10_000)
RIGHT = "def f(x):\n    return x + 1\n"


@pytest.fixture(autouse=True)
def supported() -> None:
    """Skip where the kernel cannot confine programs: like a GPU, it is nothing that could be installed."""
    if (why := refusal()) is not None:
        pytest.skip(why)


def tried(program: str, tests: str = TESTS, **limits: float) -> Outcome:
    return run(program, tests, "f", limits=Limits(**{**vars(SMALL), **limits}))  # type: ignore[arg-type]


def attempt(body: str) -> str:
    """A program that does something forbidden in its first call and answers right if nobody objects."""
    lines = "".join(f"    {line}\n" for line in body.strip().splitlines())
    return f"import ctypes, fcntl, os, signal, subprocess, threading\ndef f(x):\n{lines}    return x + 1\n"


def test_a_right_program_passes() -> None:
    assert tried(RIGHT) == Outcome("passed", "", "")


def test_a_wrong_program_fails_with_the_first_line_of_why() -> None:
    assert tried("def f(x): return 2")[:2] == ("failed", "AssertionError: three")
    assert tried("def g(x): return 2")[:2] == ("failed", "KeyError: 'f'")
    assert tried("def f(x) return 2").reason.startswith("SyntaxError")
    assert tried("def f(x): raise ValueError('one\\ntwo')")[:2] == ("failed", "ValueError: one")


def test_tests_that_call_nothing_do_not_pass_a_program_that_defines_nothing() -> None:
    assert tried("def f(x) return 2", "def check(f): pass").reason.startswith("SyntaxError")
    assert tried(RIGHT, "def check(f): pass").state == "passed"


def test_programs_may_use_the_standard_library_and_files_in_their_folder() -> None:
    program = (
        "import bisect, collections, dataclasses, datetime, decimal, functools, hashlib, heapq, itertools, json, math\n"
        "import os, random, re, statistics, string, typing\n"
        "@dataclasses.dataclass\nclass Held:\n    value: int\n"
        "def f(x):\n"
        "    assert hashlib.md5(b'1').hexdigest().startswith('c4ca')\n"
        "    with open('made', 'w') as file: file.write('ab')\n"
        "    with open('made', 'r+') as file: file.truncate(1)\n"
        "    assert open('made').read() == 'a' and os.listdir('.') == ['made']\n"
        "    os.rename('made', 'moved'); os.remove('moved')\n"
        "    return Held(x).value + 1\n"
    )
    assert tried(program)[:2] == ("passed", "")


def test_plain_data_arrives_as_it_was() -> None:
    values = "[None, True, 2, -1.5, 10**40, float('inf'), 'é\\ud800', b'ab', 1j, (1, [2]), {1: (2,)}, {3}, frozenset()]"
    tests = (
        f"def check(f):\n    given = {values}\n    found = f(given, key=(1,))\n"
        "    assert found == [given, (1,)]\n    assert list(map(type, found[0])) == list(map(type, given))\n"
    )
    assert tried("def f(x, key): return [x, key]", tests)[:2] == ("passed", "")


def test_the_tests_may_need_helpers_of_their_own() -> None:
    helper = "def twice(x): return 2 * x\ndef f(x): '''What to write.'''\n"
    found = run("def f(x): return x / 2", "def check(g):\n    assert twice(g(4)) == 4", "f", setup=helper, limits=SMALL)
    assert found.state == "passed"


def test_verdicts_do_not_change() -> None:
    program = "import random\ndef f(x): return x + 1 if random.random() < 0.5 and len({'a', 'b'}) else x"
    assert len({tried(program) for _ in range(4)}) == 1
    order = "def f(x): raise ValueError(str({'a', 'b', 'c', 'd', 'e'}))"
    assert len({tried(order).reason for _ in range(4)}) == 1


@pytest.mark.parametrize(
    "program",
    [
        "import os; os._exit(0)",
        "import sys; sys.exit(0)",
        "raise SystemExit(0)",
        "import os\ndef f(x): os._exit(0)",
        "import sys\ndef f(x): sys.exit(0)",
        "print('passed'); print('{\"failure\": \"\"}')\ndef f(x): return 0",
        'import os\nfor n in range(64):\n    try: os.write(n, b\'{"failure": ""}\\n\')\n    except OSError: pass\n'
        "def f(x): return 0",
        "class Same(int):\n    def __eq__(self, other): return True\n    __hash__ = None\ndef f(x): return Same(0)",
        "class Same:\n    def __eq__(self, other): return True\ndef f(x): return Same()",
        "import builtins\nbuiltins.AssertionError = KeyError\nbuiltins.check = print\ndef f(x): return 0\n"
        "def check(f): pass",
        "import sys\nsys.modules['__main__'].judge = lambda job: ''\ndef f(x): return 0",
        "import sys\nsys.modules['__main__'].encode = lambda value: True\ndef f(x): return 0",
        "import json\njson.dumps = lambda value: '{}'\ndef f(x): return 0",
        "import gc\ndef f(x):\n    return [o for o in gc.get_objects() if 'three' in repr(o)[:200]][0]",
    ],
)
def test_no_program_can_write_its_own_verdict(program: str) -> None:
    found = tried(program)
    assert found.state == "failed"
    assert found.reason


def test_a_program_that_never_ends_is_ended() -> None:
    began = time.monotonic()
    busy = tried("def f(x):\n    while True: pass")
    assert busy[:2] == ("timeout", "the program used more than 1 s of processor time")
    stubborn = "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"
    assert tried(stubborn, wall_s=9).state == "timeout"
    asleep = tried("import time\ndef f(x):\n    time.sleep(1000)", wall_s=0.5)
    assert asleep[:2] == ("timeout", "the program took longer than 0.5 s")
    assert time.monotonic() - began < 15


@pytest.mark.parametrize(
    ("body", "state", "why"),
    [
        ("while True: os.fork()", "failed", "PermissionError"),
        ("while True: subprocess.Popen(['/bin/true'])", "failed", "PermissionError"),
        ("os.execv('/bin/true', ['/bin/true'])", "failed", "PermissionError"),
        ("os.posix_spawn('/bin/true', ['/bin/true'], {})", "failed", "PermissionError"),
        ("while True: threading.Thread(target=print).start()", "failed", "can't start new thread"),
        ("while True: print('x' * 1000, flush=True)", "limit", "more than 10000 bytes of output"),
        ("held = 'x' * 10**10", "limit", "MemoryError"),
        ("held = []\nwhile True: held.append('x' * 10**7)", "limit", "MemoryError"),
        ("open('big', 'wb').write(b'x' * 10**8)", "failed", "File too large"),
        ("for n in range(10**9): open(str(n), 'wb').write(b'x' * 10**5)", "limit", "more than"),
        ("for n in range(10**9): open(str(n), 'wb').close()", "limit", "more than 20 files"),
        ("held = [open('one', 'wb') for _ in range(1000)]", "failed", "Too many open files"),
        ("open('made', 'w').write('x')\nos.open('made', os.O_RDONLY | os.O_TRUNC)", "failed", "PermissionError"),
        ("os.mkdir('folder')", "failed", "PermissionError"),
        ("os.symlink('/etc/passwd', 'link')", "failed", "PermissionError"),
        ("os.mkfifo('pipe')", "failed", "PermissionError"),
        ("os.kill(os.getppid(), signal.SIGKILL)", "failed", "PermissionError"),
        ("os.kill(-1, signal.SIGKILL)", "failed", "PermissionError"),
        ("os.killpg(os.getppid(), signal.SIGKILL)", "failed", "PermissionError"),
        ("os.setuid(0)", "failed", "PermissionError"),
        ("os.setsid()", "failed", "PermissionError"),
        ("os.nice(-5)", "failed", "PermissionError"),
        ("os.chdir('/')", "failed", "PermissionError"),
        ("os.chroot('/')", "failed", "PermissionError"),
        ("os.chmod('.', 0o777)", "failed", "PermissionError"),
        ("os.memfd_create('held')", "failed", "PermissionError"),
        ("import mmap\nm = open('m', 'w+b')\nm.truncate(9)\nmmap.mmap(m.fileno(), 1)", "failed", "PermissionError"),
        ("import mmap\nmmap.mmap(os.open('/dev/zero', os.O_RDONLY), 1, mmap.MAP_PRIVATE)", "failed", "PermissionError"),
        ("import numpy", "failed", "ModuleNotFoundError"),
        ("import sys\nopen(os.path.dirname(os.__file__) + '/site-packages/README.txt')", "failed",
         "PermissionError|FileNotFound"),
        ("os.listdir(os.path.dirname(os.__file__) + '/site-packages')", "failed", "PermissionError|FileNotFound"),
        ("os.listdir('/usr/lib')", "failed", "PermissionError"),
        ("open('/dev/shm/held', 'w')", "failed", "PermissionError"),
        ("open('/tmp/held', 'w')", "failed", "PermissionError"),
        ("open(f'/proc/{os.getppid()}/environ').read()", "failed", "PermissionError"),
        ("os.listdir('/proc')", "failed", "PermissionError"),
        ("open('/etc/passwd').read()", "failed", "PermissionError"),
        ("os.listdir('/')", "failed", "PermissionError"),
        ("input()", "failed", "EOFError"),
        ("ends = os.pipe()\nfcntl.fcntl(ends[0], fcntl.F_SETOWN, os.getppid())", "failed", "PermissionError"),
        ("ends = os.pipe()\nfcntl.fcntl(ends[0], fcntl.F_SETFL, os.O_ASYNC)", "failed", "PermissionError"),
        ("import resource\nresource.setrlimit(resource.RLIMIT_CPU, (99, 99))", "failed", "ValueError|PermissionError"),
        ("assert ctypes.CDLL(None).ptrace(16, os.getppid(), 0, 0) == 0", "failed", "AssertionError"),
        ("assert ctypes.CDLL(None).unshare(0x10000000) == 0", "failed", "AssertionError"),
        ("assert ctypes.CDLL(None).kill(os.getppid(), 9) == 0", "failed", "AssertionError"),
        ("ctypes.string_at(0)", "failed", "exit code -11"),
    ],
)  # fmt: skip
def test_what_programs_must_not_do_fails(body: str, state: str, why: str) -> None:
    found = tried(attempt(body))
    assert found.state == state, found
    assert re.search(why, found.reason), found
    assert len(found.output) <= 10_000


def test_files_outside_stay_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    canary = tmp_path / "folder" / "canary"
    canary.write_text("alive")
    os.utime(canary, (1, 1))
    canary.chmod(0o666)
    (tmp_path / "folder").chmod(0o777)
    for body in (
        f"os.remove({str(canary)!r})",
        f"import shutil; shutil.rmtree({str(tmp_path)!r})",
        f"os.rmdir({str(tmp_path / 'folder')!r})",
        f"open({str(canary)!r}, 'w')",
        f"open({str(canary)!r}, 'r')",
        f"os.open({str(canary)!r}, os.O_RDONLY | os.O_TRUNC)",
        f"os.open({str(canary)!r}, 3 | os.O_TRUNC)",
        f"os.truncate({str(canary)!r}, 0)",
        f"os.rename({str(canary)!r}, 'mine')",
        f"os.link({str(canary)!r}, 'mine')",
        f"open('mine', 'w').close(); os.replace('mine', {str(canary)!r})",
        f"os.utime({str(canary)!r}, (5, 5))",
        f"os.chmod({str(canary)!r}, 0)",
        f"os.chown({str(canary)!r}, 1, 1)",
        f"os.setxattr({str(canary)!r}, 'user.a', b'b')",
        f"open({str(tmp_path / 'folder' / 'new')!r}, 'w')",
        f"os.mkdir({str(tmp_path / 'new')!r})",
    ):
        found = tried(attempt(body))
        assert found.state == "failed", (body, found)
        assert "Error" in found.reason, (body, found)
        assert canary.read_text() == "alive", body
        assert canary.stat().st_mtime == 1, body
        assert sorted(tmp_path.rglob("*")) == [tmp_path / "folder", canary], body


def test_deleted_files_hold_no_more_than_files_may() -> None:
    """Open or mapped, a deleted file keeps its place on the disk, and nobody sees it."""
    program = (
        "import mmap, os\ndef f(x):\n    held = []\n    found = ''\n    while not found:\n"
        "        try:\n            made = open('made', 'w+b', buffering=0)\n            os.remove('made')\n"
        "            held.append(made)\n            while True: made.write(b'x' * 1000)\n"
        "        except OSError as error:\n            found = '' if error.errno == 27 else str(error)\n"
        "    print(sum(os.fstat(one.fileno()).st_size for one in held), found)\n    return x + 1\n"
    )
    found = tried(program)
    assert found.state == "passed", found
    size, _, why = found.output.partition(" ")
    assert SMALL.file_bytes // 2 < int(size) <= SMALL.file_bytes and "Too many open files" in why


def test_the_standard_library_is_whole() -> None:
    """No file can be mapped any more when a program begins, and so no compiled module loaded."""
    names = [
        "asyncio",
        "bz2",
        "cmath",
        "csv",
        "ctypes",
        "datetime",
        "decimal",
        "difflib",
        "email.message",
        "hashlib",
        "heapq",
        "json",
        "lzma",
        "multiprocessing",
        "queue",
        "random",
        "sqlite3",
        "ssl",
        "statistics",
        "struct",
        "unicodedata",
        "unittest",
        "uuid",
        "xml.etree.ElementTree",
        "zlib",
        "zoneinfo",
    ]
    program = f"import {', '.join(names)}\ndef f(x):\n    zoneinfo.ZoneInfo('UTC'); return asyncio.run(g(x))\n"
    program += "async def g(x):\n    return x + 1\n"
    has = "import sqlite3, ssl, lzma, bz2"  # some builds of Python lack them
    if subprocess.run([sys.executable, "-c", has], capture_output=True, check=False).returncode:
        program = program.replace("sqlite3, ssl, ", "").replace("lzma, ", "").replace("bz2, ", "")
    found = tried(program)
    assert found.state in ("passed", "failed") and "ImportError" not in found.reason, found


def test_the_environment_is_not_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "sekrit")
    found = tried("import os\ndef f(x):\n    print(sorted(os.environ.items()), os.path.expanduser('~'))\n    return x")
    assert "sekrit" not in found.output
    assert "PYTHONHASHSEED" in found.output and "HOME" not in found.output


def test_there_is_no_network() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        port = server.getsockname()[1]
        program = f"import socket\ndef f(x):\n    socket.create_connection(('127.0.0.1', {port}), 1)\n    return x + 1"
        found = tried(program)
        assert found.state == "failed" and "not permitted" in found.reason
        raw = attempt("assert ctypes.CDLL(None).socket(1, 1, 0) >= 0")
        assert tried(raw).state == "failed"
        with pytest.raises(BlockingIOError):
            server.accept()


def test_nothing_is_left_afterwards(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    started: list[subprocess.Popen[bytes]] = []
    spawn = sandbox._Pair._spawn

    def record(self: sandbox._Pair, *given: object) -> subprocess.Popen[bytes]:
        started.append(spawn(self, *given))  # type: ignore[arg-type]
        return started[-1]

    monkeypatch.setattr(sandbox._Pair, "_spawn", record)
    before = len(list(Path("/proc/self/fd").iterdir()))
    tried("import time\ndef f(x):\n    open('file', 'w').write('x')\n    time.sleep(99)", wall_s=0.3)
    tried(RIGHT)
    assert len(started) == 4
    assert all(process.returncode is not None for process in started)
    assert not list(tmp_path.iterdir())
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_processes_end_with_the_one_that_asked(tmp_path: Path) -> None:
    code = (
        "import os, sys, threading\nfrom peft_arena.tasks import sandbox\n"
        "spawn = sandbox._Pair._spawn\n"
        "def record(self, *given):\n    made = spawn(self, *given); print(made.pid, flush=True); return made\n"
        "sandbox.refusal(); sandbox._Pair._spawn = record\n"
        "threading.Timer(0.4, os._exit, [0]).start()\n"
        "sandbox.run('import time; time.sleep(99)', 'def check(f): f(1)', 'f')\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    numbers = [int(line) for line in done.stdout.split()]
    assert len(numbers) == 2, done.stderr
    deadline = time.monotonic() + 5
    while any(_alive(number) for number in numbers):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _alive(number: int) -> bool:
    try:
        text = Path(f"/proc/{number}/stat").read_text()
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] != "Z"


CASES_OF_ANOTHER_USER = {
    RIGHT: "passed",
    "def f(x): return 0": "failed",
    attempt("while True: os.fork()"): "failed",
    attempt("os.kill(os.getppid(), 9)"): "failed",
    attempt("while True: threading.Thread(target=print).start()"): "failed",
    attempt("import socket; socket.socket()"): "failed",
    attempt("open('/etc/passwd')"): "failed",
    attempt("open('/tmp/peft-arena-sandbox-outside', 'w')"): "failed",
    attempt("import time; time.sleep(99)"): "timeout",
}


@pytest.mark.skipif(os.getuid() != 0, reason="the other tests run as a normal user already")
def test_all_holds_for_a_normal_user_too() -> None:
    python = next((found for found in (sys.executable, "/usr/bin/python3") if _runs_as_nobody(found)), None)
    if python is None:
        pytest.skip("no Python 3.11 that a normal user may run")
    code = (
        "import json, os, sys\nfrom peft_arena.tasks.sandbox import Limits, run\n"
        "tests, programs = json.load(sys.stdin)\nassert os.getuid() == 65534\n"
        "limits = Limits(cpu_s=1, wall_s=1)\n"
        "print(json.dumps([run(program, tests, 'f', limits=limits).state for program in programs]))\n"
    )
    given = json.dumps([TESTS, list(CASES_OF_ANOTHER_USER)])
    with tempfile.TemporaryDirectory(dir="/tmp") as source:  # the tree may be in a place only root may enter
        Path(source).chmod(0o755)
        shutil.copytree(SOURCE / "peft_arena", f"{source}/peft_arena", ignore=lambda where, _: _unneeded(Path(where)))
        done = subprocess.run(
            [python, "-S", "-B", "-c", code], input=given, capture_output=True, text=True, timeout=60, check=False,
            user=65534, group=65534, extra_groups=[], env={"PYTHONPATH": source, "TMPDIR": "/tmp"}, cwd="/",
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == list(CASES_OF_ANOTHER_USER.values())


def _unneeded(where: Path) -> set[str]:
    """Names in a folder of the package that the sandbox does without."""
    needed = {"__init__.py", "core", "errors.py", "parts.py", "text.py", "tasks", "sandbox.py", "sandbox_child.py"}
    return {path.name for path in where.iterdir()} - needed


def _runs_as_nobody(python: str) -> bool:
    try:
        done = subprocess.run(
            [python, "-S", "-c", "import sys; sys.exit(sys.version_info < (3, 11))"],
            user=65534, group=65534, extra_groups=[], env={}, cwd="/", capture_output=True, check=False,
        )  # fmt: skip
    except PermissionError:
        return False
    return done.returncode == 0


def test_where_nothing_confines_nothing_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    touched = f"open({str(tmp_path / 'made')!r}, 'w')"
    broken = tmp_path / "child.py"
    text = sandbox.CHILD.read_text()
    for removed, named in (
        ("    _filter_calls(libc, machine)\n", "a socket was to be denied, and was not"),
        ("    _restrict_files(libc, folder)\n", "reading /proc was to be denied, and was not"),
    ):
        assert removed in text
        broken.write_text(text.replace(removed, ""))
        monkeypatch.setattr(sandbox, "CHILD", broken)
        found = sandbox._run(touched, TESTS, "f", "", SMALL)
        assert found.state == "refused" and named in found.reason
        assert not (tmp_path / "made").exists()
    refusal.cache_clear()
    with pytest.raises(UserError, match="here it cannot: Refused: reading /proc") as caught:
        run(touched, TESTS, "f")
    assert "\n" not in str(caught.value)
    refusal.cache_clear()


def test_elsewhere_programs_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    refusal.cache_clear()
    monkeypatch.setattr(sys, "platform", "darwin")
    assert refusal() == "programs are only run where the kernel can confine them: that needs Linux, this is darwin"
    refusal.cache_clear()


def test_a_machine_whose_calls_are_not_known_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "MACHINES", {})
    with pytest.raises(child.Refused, match=platform.machine()):
        child.confine({}, "/tmp")


def test_both_machines_allow_the_same_calls() -> None:
    x86, arm = (set(machine["calls"]) for machine in (child.MACHINES["x86_64"], child.MACHINES["aarch64"]))
    old = {"access", "dup2", "lstat", "pipe", "poll", "readlink", "rename", "select", "stat", "unlink"}
    assert x86 - arm == old  # aarch64 has only the newer form of these
    assert arm <= x86
    for machine in child.MACHINES.values():
        assert len(set(machine["calls"].values())) == len(machine["calls"])


@pytest.mark.parametrize(
    ("machine", "header"),
    [("x86_64", "/usr/include/x86_64-linux-gnu/asm/unistd_64.h"), ("aarch64", "/usr/include/asm-generic/unistd.h")],
)
def test_numbers_of_calls_are_those_of_the_kernels_headers(machine: str, header: str) -> None:
    if not Path(header).is_file():
        pytest.skip("the kernel's headers are not installed")
    found = dict(re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", Path(header).read_text()))
    found |= {"newfstatat": found.get("newfstatat", found.get("fstatat", ""))}
    known = child.MACHINES[machine]
    ours = {**known["calls"], **{name: known[name] for name in ("openat", "fcntl", "ioctl")}}
    assert {name: int(found[name]) for name in ours} == ours


def test_a_program_too_long_is_not_run() -> None:
    assert tried("#" * (sandbox.PROGRAM_BYTES + 1)).state == "limit"


def test_limits_of_this_process_are_untouched() -> None:
    before = resource.getrlimit(resource.RLIMIT_AS), resource.getrlimit(resource.RLIMIT_CPU)
    tried(RIGHT)
    assert before == (resource.getrlimit(resource.RLIMIT_AS), resource.getrlimit(resource.RLIMIT_CPU))
