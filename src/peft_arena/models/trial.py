"""The first use of a chat template, in a process of its own: a template is a program that somebody else wrote.

transformers gives it no access to anything, but lets it run for ever and take all memory, even while it is compiled
(constants are computed then). What a few short conversations show to end is then used in this process.
"""

from __future__ import annotations

import os
import resource
import signal
import time
from contextlib import suppress
from functools import lru_cache
from typing import Any

SECONDS = 5
"""Most processor time of one rendering."""
_WALL_SECONDS = 120.0
"""After which the process is ended, should the system not have done so."""
_MEMORY = 1 << 28
"""Most bytes that it may take beyond what this process has."""
_LONGEST = 1 << 20
"""Most characters of a template, and 16 times as many of what it makes of a short conversation."""
_ENDED, _MEMORY_FULL, _LONG = 0, 3, 4
_TURNS = ("user", "assistant", "user")
_CONVERSATIONS = (_TURNS[:1], _TURNS, ("system", *_TURNS))


@lru_cache(maxsize=256)
def trial(template: str) -> str:
    """Say why a template cannot be used: it does not end, or takes too much memory; empty if it can.

    That it refuses a conversation is no reason: other conversations may be its own.
    """
    if len(template) > _LONGEST:
        return f"it has {len(template)} characters, at most {_LONGEST}"
    # imported here, so that the other process has them and this one imports them once
    from transformers.utils import chat_template_utils  # noqa: F401

    child = _fork()
    if child == 0:
        os._exit(_tried(template))
    status = _wait(child)
    if os.WIFSIGNALED(status):
        return f"it takes more than {SECONDS} s for a short conversation"
    return {
        _MEMORY_FULL: f"it takes more than {_MEMORY >> 20} MiB for a short conversation",
        _LONG: f"it makes more than {_LONGEST << 4} characters of a short conversation",
    }.get(os.WEXITSTATUS(status), "")


def _fork() -> int:
    """Fork; the tokenizers library warns of it on standard error unless this variable is set."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = before or "false"
    try:
        return os.fork()
    finally:
        if before is None:
            del os.environ[name]


def _wait(child: int) -> int:
    """Return the status that a process ended with; it is ended where it does not end itself."""
    end, pause = time.monotonic() + _WALL_SECONDS, 0.001
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        time.sleep(pause)
        pause = min(2 * pause, 0.05)
    os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def _tried(template: str) -> int:
    """Render some conversations in the child process and return its exit code; nothing may leave this function."""
    code = _ENDED
    try:
        signal.signal(signal.SIGXCPU, signal.SIG_DFL)
        with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123 - no import after a fork
            held = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + _MEMORY, held + _MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        for roles in _CONVERSATIONS:
            for ask in (True, False):
                with suppress(Exception):
                    try:
                        code = code or _render(template, roles, ask)
                    except MemoryError:
                        code = _MEMORY_FULL
    except BaseException:  # noqa: BLE001 - a child that returned would go on as its parent
        code = code or _ENDED
    return code


def _render(template: str, roles: tuple[str, ...], ask: bool) -> int:
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered: Any = render_jinja_template(
        conversations=[[{"role": role, "content": "Say it."} for role in roles]],
        chat_template=template,
        add_generation_prompt=ask,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    )
    return _LONG if len(rendered[0][0]) > _LONGEST << 4 else _ENDED
