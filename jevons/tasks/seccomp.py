"""What generated code may ask of Linux: a filter on system calls, and Landlock's rules on files.

Both can only be tightened, need no privilege, and hold for every process that the code starts. They stand beside namespaces, and are all
that is left between the code and the user's files and processes where a container forbids these.

The filter is a list of what is refused and not of what is allowed, because C libraries and versions of Python differ in what they need. It
refuses what reaches outside of the process (sockets, signals to others, tracing, mounts, keys, clocks, other programs) with an error that
Python raises as PermissionError, and every call newer than Linux 5.3 that is not known to be harmless as if the kernel did not have it.
Sources: the kernel's seccomp_filter and landlock documents. Not done: other machines than x86-64 and 64-bit ARM.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

TYPE_CHECKING = False  # typing takes longer to import than all that happens here
if TYPE_CHECKING:
    from collections.abc import Iterable

MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column of the tables below; the kernel's AUDIT_ARCH
# name:x86_64:aarch64, from the kernel's tables
REFUSED = """
socket:41:198 connect:42:203 bind:49:200 listen:50:201 accept:43:202 accept4:288:242
ptrace:101:117 process_vm_readv:310:270 process_vm_writev:311:271 kcmp:312:272 migrate_pages:256:238 move_pages:279:239
sched_setaffinity:203:122 sched_setparam:142:118 sched_setscheduler:144:119 sched_setattr:314:274 setpriority:141:140 ioprio_set:251:30
execve:59:221 execveat:322:281 unshare:272:97 setns:308:268 mount:165:40 umount2:166:39 pivot_root:155:41 chroot:161:51
swapon:167:224 swapoff:168:225 add_key:248:217 request_key:249:218 keyctl:250:219 bpf:321:280 perf_event_open:298:241 userfaultfd:323:282
kexec_load:246:104 kexec_file_load:320:294 init_module:175:105 finit_module:313:273 delete_module:176:106 reboot:169:142 acct:163:89
syslog:103:116 quotactl:179:60 lookup_dcookie:212:18 personality:135:92 vhangup:153:58 settimeofday:164:170 clock_settime:227:112
adjtimex:159:171 clock_adjtime:305:266 sethostname:170:161 setdomainname:171:162 open_by_handle_at:304:265 name_to_handle_at:303:264
mknod:133:- mknodat:259:33 fanotify_init:300:262 memfd_create:319:279 shmget:29:194 shmat:30:196 msgget:68:186 semget:64:190 mq_open:240:180
vmsplice:278:75 sync:162:81 syncfs:306:267 iopl:172:- ioperm:173:- modify_ldt:154:-
"""
# Landlock says nothing about these, so they are refused where the user's files are in sight
ATTRIBUTES = """
chmod:90:- fchmod:91:52 fchmodat:268:53 chown:92:- fchown:93:55 lchown:94:- fchownat:260:54 utime:132:- utimes:235:- futimesat:261:-
utimensat:280:88 truncate:76:45 setxattr:188:5 lsetxattr:189:6 fsetxattr:190:7 removexattr:197:14 lremovexattr:198:15 fremovexattr:199:16
"""
SIGNALS = "kill:62:129 tgkill:234:131 rt_sigqueueinfo:129:138 rt_tgsigqueueinfo:297:240"
OTHERS = "clone:56:220 fork:57:- vfork:58:- tkill:200:130 prctl:157:167 prlimit64:302:261 socketpair:53:199 open:2:- openat:257:56"
FIRST_NEW = 424  # from here on numbers are the same on all machines
HARMLESS = (436, 439, 441, 449)  # close_range faccessat2 epoll_pwait2 futex_waitv
HARMLESS_ALONE = 437  # openat2, whose flags a filter cannot read

THREAD, NAMESPACES = 0x10000, 0x7E020000  # flags of clone
ALLOW, KILL, REFUSE, ABSENT = 0x7FFF0000, 0x80000000, 0x50000 | errno.EPERM, 0x50000 | errno.ENOSYS
LOAD, AND, EQUAL, AT_LEAST, RETURN = 0x20, 0x54, 0x15, 0x35, 0x06  # instructions of the kernel's filter machine

libc = ctypes.PyDLL(None, use_errno=True)  # PyDLL keeps the interpreter's lock, which a raw clone must not lose


def check(result: int) -> int:
    """The result of a C function, or its error raised as OSError."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def table(text: str, machine: str) -> dict[str, int]:
    column = MACHINES[machine][0] + 1
    entries = [entry.split(":") for entry in text.split()]
    return {entry[0]: int(entry[column]) for entry in entries if entry[column] != "-"}


def filter_program(machine: str, *, forks: bool, own_tree: bool, alone: bool, pid: int) -> bytes:
    """The filter as the kernel's instructions.

    `forks`: may start processes. `own_tree`: sees no files of the user. `alone`: sees no other processes; else it may signal `pid` only.
    """
    refused, others = table(REFUSED, machine), table(OTHERS, machine)
    program = [(LOAD, 0, 0, 4), (EQUAL, 1, 0, MACHINES[machine][1]), (RETURN, 0, 0, KILL), (LOAD, 0, 0, 0)]

    def verdict(number: int, value: int) -> None:
        program.extend([(EQUAL, 0, 1, number), (RETURN, 0, 0, value)])

    def unless(number: int, argument: int, mask: int, value: int, *, wanted: bool) -> None:
        """Refuse the call where its argument's lower half, masked, is not the value, or where it is (`wanted` false)."""
        first, second = (ALLOW, REFUSE) if wanted else (REFUSE, ALLOW)
        load = [(LOAD, 0, 0, 16 + 8 * argument), (AND, 0, 0, mask), (EQUAL, 0, 1, value)]
        program.extend([(EQUAL, 0, 5, number), *load, (RETURN, 0, 0, first), (RETURN, 0, 0, second)])

    harmless = (*HARMLESS, *([HARMLESS_ALONE] if own_tree else []))
    new = [part for number in harmless for part in ((EQUAL, 0, 1, number), (RETURN, 0, 0, ALLOW))]
    program += [(AT_LEAST, 0, len(new) + 1, FIRST_NEW), *new, (RETURN, 0, 0, ABSENT)]  # x32's calls are in this range too
    for number in (refused | ({} if own_tree else table(ATTRIBUTES, machine))).values():
        verdict(number, REFUSE)
    if forks:
        unless(others["clone"], 0, NAMESPACES, 0, wanted=True)
    else:
        unless(others["clone"], 0, THREAD, THREAD, wanted=True)
        for name in ("fork", "vfork"):
            if name in others:
                verdict(others[name], REFUSE)
    if not alone:
        for number in table(SIGNALS, machine).values():
            unless(number, 0, 0xFFFFFFFF, pid, wanted=True)
        verdict(others["tkill"], REFUSE)
    unless(others["prctl"], 0, 0xFFFFFFFF, 1, wanted=False)  # PR_SET_PDEATHSIG: it dies with us
    unless(others["prlimit64"], 0, 0xFFFFFFFF, 0, wanted=True)  # of itself
    unless(others["socketpair"], 1, 0xF, 1, wanted=True)  # streams: a datagram's could be sent elsewhere
    # opening to read and emptying, which Landlock misses before Linux 6.2
    for name, argument in (("open", 1), ("openat", 2)):
        if name in others:
            unless(others[name], argument, os.O_ACCMODE | os.O_TRUNC, os.O_TRUNC, wanted=False)
    program.append((RETURN, 0, 0, ALLOW))
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in program)


def install_filter(program: bytes) -> None:
    """From now on, for this thread and all that it starts. Raises OSError where the kernel has no filters."""
    code = ctypes.create_string_buffer(program, len(program))

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_void_p)]

    what = Program(len(program) // 8, ctypes.addressof(code))
    check(libc.prctl(22, 2, ctypes.byref(what), 0, 0))  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


def landlock_version() -> int:
    """The kernel's version of Landlock, 0 where it has none."""
    return max(libc.syscall(444, None, ctypes.c_size_t(0), 1), 0)


def restrict_files(readable: Iterable[str], writable: Iterable[str]) -> int:
    """Leave this thread, and all that it starts, these paths and what is under them. Returns Landlock's version, 0 where there is none.

    Later versions also forbid TCP, and signals and abstract sockets of processes outside.
    """
    version = landlock_version()
    if not version:
        return 0
    rights = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1
    read, of_files = 0b1100, 0b1100_0000_0000_0110 & rights  # files and folders; write, read, truncate, ioctl
    attributes = struct.pack("<QQQ", rights, 0b11, 0b11)[: 8 if version < 4 else 16 if version < 6 else 24]
    rules = check(libc.syscall(444, attributes, ctypes.c_size_t(len(attributes)), 0))
    for paths, allowed in ((readable, read), (writable, rights & ~1)):  # the lowest right is to execute
        for path in paths:
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
            fits = allowed if os.path.isdir(path) else allowed & of_files
            check(libc.syscall(445, rules, 1, struct.pack("<Qi", fits, fd), 0))
            os.close(fd)
    check(libc.syscall(446, rules, 0))
    os.close(rules)
    return version
