"""The inside of the sandbox: a small program that puts generated code behind every wall that the system has, and watches it.

`tasks/sandbox.py` starts it in a bare interpreter, which is quicker to start and to fork than the process of a training run. For each job a
supervisor stays outside and keeps the time; it starts an init, and this the code itself:

    supervisor    waits for a result, for the deadline, or for its parent to hang up; then kills init
    init          process 1 of namespaces of its own (users, processes, files, network, IPC, names): all in them dies with it
    the code      no privileges, limits, Landlock, the filter of system calls; a number of files and nothing else open

With namespaces the code sees a tree of Python's libraries, read-only, and an empty folder in memory. They need root or a kernel that gives
users namespaces; containers often do neither. Then all the rest remains: another user (where we are root and its files are everybody's to
read), Landlock in the place of the tree, and no second process, so that none can be left behind. Root's jobs have a user each, because the
kernel counts processes by user. Which of these walls stand is reported with each result.

Not done: limits of memory over several processes (cgroups, which are rarely ours); file contents are hidden by Landlock, names are not.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import resource
import select
import struct
import sys
import time

from jevons.tasks.remote import Connection, Gone, answer, decode, encode, plain
from jevons.tasks.seccomp import MACHINES, OTHERS, REFUSED, check, filter_program, install_filter, libc, restrict_files, table

NEW_FILES, NEW_NAMES, NEW_IPC, NEW_USERS, NEW_PROCESSES, NEW_NETWORK = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
SPACES = NEW_FILES | NEW_NAMES | NEW_IPC | NEW_PROCESSES | NEW_NETWORK
FIRST_USER = 2**30  # root's jobs run as this plus their process's number: nobody's
OUT_OF_MEMORY, GONE = 86, 87  # statuses of the code's process, besides Python's
OPEN_FILES = 64
FOLDER = "/sandbox"  # the code's own, where it has a tree of its own
LINUX = sys.platform == "linux"
SIGKILL, SIGCHLD = 9, 17  # the module `signal` imports enum
TYPE_CHECKING = False  # typing takes longer to import than all that happens here
if TYPE_CHECKING:
    from typing import Any, NoReturn

    Spec = dict[str, Any]


class Job:
    """File descriptors of one job, by their numbers in this process; -1: none."""

    NAMES = ("spec", "stdin", "out", "err", "line", "requests", "answers")

    def __init__(self, text: str):
        self.spec, self.stdin, self.out, self.err, self.line, self.requests, self.answers = map(int, text.split(","))

    def close(self, *kept: str) -> None:
        for name in self.NAMES:
            if name not in kept and getattr(self, name) >= 0:
                os.close(getattr(self, name))
                setattr(self, name, -1)


def main(texts: list[str]) -> None:
    """Run the jobs, each described by a text, side by side. Reads a job's own description only after the fork that separates it."""
    os.umask(0o022)
    jobs = list(map(Job, texts))
    if len(jobs) == 1:
        return supervise(jobs[0])
    for job in jobs:
        if os.fork() == 0:
            for other in jobs:
                if other is not job:
                    other.close()
            supervise(job)
            os._exit(0)
    for job in jobs:
        job.close()
    while True:
        try:
            os.wait()
        except ChildProcessError:
            return


# -- the supervisor


def supervise(job: Job) -> None:
    with open(job.spec, "rb", closefd=False) as file:
        spec: Spec = decode(file.read(), plain)
    if LINUX:
        libc.prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: what init leaves behind is ours to wait for
    spec |= {"user": os.geteuid(), "group": os.getegid(), "own_user": FIRST_USER + os.getpid()}
    os.chdir("/")
    missing = "" if _choices()[0] else "on Linux alone, for x86-64 and ARM"
    for spaces in _choices():
        mine, theirs = os.pipe()
        start = time.monotonic()
        try:
            child = _clone(spaces)
        except OSError as error:
            missing = str(error.strerror)
            os.close(mine)
            os.close(theirs)
            continue
        if child == 0:
            os.close(mine)
            _init(job, spec, spaces, theirs)
        os.close(theirs)
        first = os.read(mine, 4096)
        if not first.startswith(b"unusable"):
            break
        missing = first.decode("utf-8", "replace").partition(" ")[2].strip()
        os.close(mine)
        os.waitpid(child, 0)
    job.close("line")
    result = _watch(job.line, mine, first, child, start + spec["seconds"])
    result |= {"seconds": time.monotonic() - start, "missing": missing if not spaces else ""}
    os.write(job.line, encode(result, plain))


def _choices() -> tuple[int, ...]:
    """Flags of `clone` to try, best first; 0 is a plain fork."""
    if not LINUX or os.uname().machine not in MACHINES:
        return (0,)
    return (SPACES, SPACES | NEW_USERS, 0) if os.geteuid() == 0 else (SPACES | NEW_USERS, 0)


def _clone(spaces: int) -> int:
    """`os.fork` into new namespaces."""
    if not spaces:
        return os.fork()
    number = table(OTHERS, os.uname().machine)["clone"]
    ctypes.pythonapi.PyOS_BeforeFork()
    child = libc.syscall(number, ctypes.c_ulong(spaces | SIGCHLD), None, None, None, None)
    if child == 0:
        ctypes.pythonapi.PyOS_AfterFork_Child()
    else:
        failed = ctypes.get_errno()
        ctypes.pythonapi.PyOS_AfterFork_Parent()
        ctypes.set_errno(failed)
    return check(child)


def _watch(line: int, status: int, first: bytes, child: int, deadline: float) -> dict[str, Any]:
    """Wait until the code has ended or must end; nothing of it is left afterwards."""
    result: dict[str, Any] = {"reason": "broken", "detail": "it ended before it began", "facts": ""}
    poll = select.poll()
    poll.register(status, select.POLLIN)
    poll.register(line, select.POLLIN)
    pid, buffer, ended, ready = 0, first, not first, False
    while not ended:
        *lines, buffer = buffer.split(b"\n")
        for word, _, rest in (text.decode("utf-8", "replace").partition(" ") for text in lines):
            if word == "started":
                pid = int(rest)
            elif word == "ready":
                result |= {"detail": "its init ended", "facts": rest}
                ready = True
            else:  # exit, signal or broken
                result |= {"reason": word if ready else "broken", "detail": rest}
                ended = True
        if ended:
            break
        events = dict(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))
        if status in events:
            data = os.read(status, 4096)
            buffer, ended = buffer + data, not data
        else:
            result |= {"reason": "stopped" if events else "time", "detail": ""}
            ended = True
    for process in (pid, child):
        try:
            if process and (process == child or not LINUX):  # on Linux the code dies with init
                os.kill(process, SIGKILL)
        except ProcessLookupError:
            pass
    while True:
        try:
            os.wait()
        except ChildProcessError:
            return result


# -- init


def _init(job: Job, spec: Spec, spaces: int, status: int) -> None:
    """Start the code and report its end. Returns in no process: the code's leaves by SystemExit, as Python's own programs do."""
    if spaces:
        try:
            if spaces & NEW_USERS:
                user, group = spec["user"], spec["group"]
                _write("/proc/self/setgroups", "deny")
                _write("/proc/self/gid_map", f"{group} {group} 1")
                _write("/proc/self/uid_map", f"{user} {user} 1")
            _build_tree(spec["folder"], spec["file_mb"])
        except OSError as error:
            os.write(status, f"unusable {error}\n".encode())
            os._exit(0)
    if LINUX:
        libc.prctl(1, SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
    os.setsid()
    child = os.fork()
    if child == 0:
        _inside(job, spec, spaces, status)
    os.write(status, b"started %d\n" % (0 if spaces else child))
    os.closerange(3, status)
    os.closerange(status + 1, os.sysconf("SC_OPEN_MAX"))
    code = None
    while code is None:
        pid, ended = os.wait()
        code = ended if pid == child else None
    word, number = ("signal", os.WTERMSIG(code)) if os.WIFSIGNALED(code) else ("exit", os.WEXITSTATUS(code))
    os.write(status, f"{word} {number}\n".encode())
    os._exit(0)


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY)
    os.write(fd, text.encode())
    os.close(fd)


def libraries() -> list[str]:
    """Folders that Python and the libraries of its modules are loaded from."""
    folders = [f"{sys.base_prefix}/lib", f"{sys.base_exec_prefix}/lib", os.path.dirname(os.__file__)]
    folders += ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/share/zoneinfo"]
    kept: list[str] = []
    for folder in sorted({os.path.normpath(f) for f in folders if os.path.isdir(f)}):
        if not any(folder.startswith(f"{other}/") for other in kept):
            kept.append(folder)
    return kept


def _build_tree(folder: str, size_mb: int) -> None:
    """Make a tree of libraries, /dev/null and an empty folder the only files in sight. Raises OSError where that is not allowed."""
    bind, recursive, private, no_suid_no_devices = 0x1000, 0x4000, 0x40000, 6

    def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
        check(libc.mount(source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), options.encode()))

    mount("none", "/", "", recursive | private)
    mount("tmpfs", folder, "tmpfs", no_suid_no_devices, "size=1m,mode=755")
    for library in libraries():
        os.makedirs(folder + library, exist_ok=True)
        mount(library, folder + library, "", bind | recursive)
    os.mkdir(f"{folder}/dev")
    os.close(os.open(f"{folder}/dev/null", os.O_CREAT))
    mount("/dev/null", f"{folder}/dev/null", "", bind)
    os.mkdir(folder + FOLDER)
    os.chdir(folder)
    check(libc.syscall(table(REFUSED, os.uname().machine)["pivot_root"], b".", b"."))
    check(libc.umount2(b".", 2))  # MNT_DETACH: the old root, stacked on the new one
    os.chdir("/")
    read_only = struct.pack("<QQQQ", 0b11, 0, 0, 0)  # and no set-user-ID programs
    check(libc.syscall(442, -100, b"/", 0x8000, read_only, ctypes.c_size_t(32)))  # mount_setattr, all that is mounted below too
    mount("tmpfs", FOLDER, "tmpfs", no_suid_no_devices, f"size={size_mb}m,nr_inodes=4096,mode=1777")


# -- the code


def _inside(job: Job, spec: Spec, spaces: int, status: int) -> NoReturn:
    try:
        _enclose(job, spec, spaces, status)
    except BaseException as error:  # whatever it is, the code must not run
        os.write(status, f"broken {type(error).__name__}: {error}\n".encode())
        os._exit(1)
    os.environ.clear()
    sys.argv = [""]
    if spec["mode"] == "program":
        os.close(3)
        os.close(4)
        raise SystemExit(_run("__main__", spec["source"]))
    if spec["mode"] == "serve":
        failed = _run("solution", spec["source"])
        if failed:
            os._exit(failed)
        answer(sys.modules["solution"].__dict__, 3, 4)
    _examine(spec, Connection(3, 4))


def _enclose(job: Job, spec: Spec, spaces: int, status: int) -> None:
    """All that the code is kept by, except for time."""
    null = os.open(os.devnull, os.O_RDONLY)
    ends = [job.stdin, job.out, job.err, job.requests, job.answers, status]
    high = [fcntl.fcntl(fd if fd >= 0 else null, fcntl.F_DUPFD, OPEN_FILES) for fd in ends]  # out of each other's way
    for target, fd in enumerate(high):
        os.dup2(fd, target)
    os.closerange(6, os.sysconf("SC_OPEN_MAX"))
    status = 5
    folder = FOLDER if spaces else spec["folder"]
    os.chdir(folder)
    facts = ["namespaces"] if spaces else []
    if LINUX:
        facts.append("memory")
        check(libc.prctl(38, 1, 0, 0, 0))  # PR_SET_NO_NEW_PRIVS
        if version := restrict_files(["/"] if spaces else libraries(), [folder, "/dev/null"]):
            facts.append(f"landlock{version}")
    root = os.geteuid() == 0
    own_user = root and not spaces & NEW_USERS and (bool(spaces) or _open_to_all(folder)) and _become(spec["own_user"], folder)
    if own_user:
        facts.append("user")
    forks = spec["processes"] > 1 and bool(spaces) and (own_user or not root)  # else the kernel would count others' too
    machine = os.uname().machine
    filtered = LINUX and machine in MACHINES
    # where nothing filters forks, no process is left to the code, nor a thread; root has no such limit
    _limit(spec, spec["processes"] + bool(spaces & NEW_USERS) if forks else 0 if filtered else 1)
    if not filtered and (own_user or not root):
        facts.append("single")
    if LINUX:
        check(libc.capset(struct.pack("<Ii", 0x20080522, 0), bytes(24)))  # none are left
        check(libc.prctl(1, SIGKILL, 0, 0, 0))  # PR_SET_PDEATHSIG: with init; last, because a change of user unsets it
    if filtered:
        install_filter(filter_program(machine, forks=forks, own_tree=bool(spaces), alone=bool(spaces), pid=os.getpid()))
        facts.append("seccomp")
    os.write(status, f"ready {' '.join(facts)}\n".encode())
    os.close(status)


def _become(user: int, folder: str) -> bool:
    """Be this user from now on. False where we may not be: in a container that has few users, or none but root."""
    try:
        os.chown(folder, user, user)
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    except OSError:
        return False
    return True


def _open_to_all(folder: str) -> bool:
    """Whether any user may read Python's library, and come to this folder."""
    ready = bool(os.stat(os.__file__).st_mode & 4)
    for path in (os.__file__, folder):
        while path != "/":
            path = os.path.dirname(path)
            ready = ready and bool(os.stat(path).st_mode & 1)
    return ready


def _limit(spec: Spec, processes: int) -> None:
    seconds, megabyte = int(spec["seconds"]) + 1, 2**20
    limits = [(resource.RLIMIT_CPU, seconds), (resource.RLIMIT_FSIZE, spec["file_mb"] * megabyte), (resource.RLIMIT_CORE, 0)]
    limits += [(resource.RLIMIT_NOFILE, OPEN_FILES)]
    if LINUX:  # macOS has the name and not the limit
        limits += [(resource.RLIMIT_AS, spec["memory_mb"] * megabyte), (resource.RLIMIT_MEMLOCK, 0)]
    if processes:
        limits += [(resource.RLIMIT_NPROC, processes)]
    for what, most in limits:
        _, hard = resource.getrlimit(what)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (most, most))


def _run(name: str, source: str) -> int:
    """Execute a module of this name. Returns the status that Python would end with."""
    module = type(sys)(name)
    sys.modules[name] = module
    try:
        exec(compile(source, f"<{name}>", "exec"), module.__dict__)
    except SystemExit as error:
        if name == "__main__":
            raise
        return _report(error)
    except BaseException as error:
        return _report(error)
    return 0


def _report(error: BaseException) -> int:
    below = error.__traceback__ and error.__traceback__.tb_next  # without our own frame
    sys.excepthook(type(error), error.with_traceback(below), below)
    return OUT_OF_MEMORY if isinstance(error, MemoryError) else 1


def _examine(spec: Spec, connection: Connection) -> NoReturn:
    """Run the tests. Their end is reached by this process alone, which holds nothing of the tested code but plain data."""
    status = 1
    try:
        space: dict[str, Any] = {"__name__": "tests"}
        remote = {name: connection.ask("name", name) for name in spec["names"]}
        space.update(remote)
        exec(compile(spec["setup"], "<setup>", "exec"), space)
        space.update(remote)
        exec(compile(spec["source"], "<tests>", "exec"), space)
        status = 0
    except Gone:
        status = GONE
    except BaseException as error:
        status = _report(error)
    sys.stderr.flush()
    os._exit(status)
