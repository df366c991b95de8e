"""Takes every permission from this process that a program and its tests do not need.

The kernel's Landlock refuses files, libseccomp every system call that is not listed, resource limits the rest.
"""

import contextlib
import ctypes
import os
import resource
import signal
import struct
import sys
import sysconfig

try:  # now: as another user, or without permissions, they could not be found
    import landlock
    import pyseccomp
except (ImportError, OSError, RuntimeError) as error:
    MISSING = str(error)
else:
    MISSING = ""

PYTHON = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}

NOBODY = 65534
"""The user and group that programs run as where the evaluation is root. Source: the kernel's overflowuid."""

READ_CAPABILITIES = 1 << 1 | 1 << 2
"""CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH. Source: linux/capability.h."""

PDEATHSIG, KEEPCAPS = 1, 8
"""Options of prctl. Source: linux/prctl.h."""

LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/share/zoneinfo", "/etc/ld.so.cache",
             "/etc/localtime", "/dev/null", "/dev/urandom", "/dev/zero")  # fmt: skip
"""What Python reads apart from its own folders."""

ALLOWED = """
read readv pread64 preadv preadv2 write writev pwrite64 pwritev pwritev2 lseek close close_range dup dup2 dup3
open openat stat fstat lstat newfstatat statx statfs fstatfs access faccessat faccessat2 readlink readlinkat getdents
getdents64 getcwd chdir fchdir mkdir mkdirat rmdir unlink unlinkat rename renameat renameat2 link linkat symlink
symlinkat truncate ftruncate fsync fdatasync umask copy_file_range sendfile
mmap munmap mprotect mremap madvise mincore msync brk membarrier
poll ppoll select pselect6 epoll_create epoll_create1 epoll_ctl epoll_wait epoll_pwait epoll_pwait2 eventfd2 pipe pipe2
recvfrom recvmsg shutdown getsockopt setsockopt getsockname getpeername
rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending rt_sigsuspend rt_sigtimedwait sigaltstack setitimer getitimer
alarm pause restart_syscall nanosleep clock_nanosleep clock_gettime clock_getres gettimeofday time times
getpid getppid gettid getpgid getpgrp getsid getuid geteuid getgid getegid getresuid getresgid getgroups
getrandom getrusage getrlimit sysinfo uname sched_yield getcpu futex set_robust_list rseq set_tid_address arch_prctl
wait4 waitid exit exit_group
""".split()  # noqa: SIM905
"""System calls that act on this process, its folder and its own pipes, and on nothing else."""

FCNTL = (0, 1030, 1, 2, 3, 5, 6, 7, 36, 37, 38, 1031, 1032)
"""Commands of fcntl: duplicates, flags, locks, a pipe's size; not F_SETOWN and F_SETSIG. Source: linux/fcntl.h."""

IOCTL = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
"""Commands of ioctl: TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX. Source: asm-generic/ioctls.h."""


class Unrestricted(Exception):
    """A restriction cannot be enforced on this machine; the text is the reason and the remedy."""


def restrict(limits: dict[str, int]) -> None:
    """Restricts this process for good.

    Args:
        limits: Resource limits by their name in `resource`.

    Raises:
        Unrestricted: This machine lacks something; the process must run no program.
    """
    if sys.platform != "linux":
        raise Unrestricted(f"programs are restricted by Linux, and this is {sys.platform}; run it in a container")
    if MISSING:
        raise Unrestricted(
            f"what restricts programs is not installed: {MISSING}; install the packages landlock==1.0.0.dev5 and "
            "pyseccomp, and the library libseccomp (apt-get install libseccomp2)"
        )
    for name, number in limits.items():
        _limit(getattr(resource, name), number)
    if os.geteuid() == 0:
        _leave_root()
    ctypes.CDLL(None).prctl(PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    _restrict_files()
    _restrict_calls()


def _limit(kind: int, number: int) -> None:
    """Sets a resource limit. The hard limit on CPU time is a second longer: the soft one has a signal of its own."""
    highest = resource.getrlimit(kind)[1]
    hard = number + (kind == resource.RLIMIT_CPU)
    hard = hard if highest == resource.RLIM_INFINITY else min(hard, highest)
    resource.setrlimit(kind, (min(number, hard), hard))


def _leave_root() -> None:
    """Becomes the user nobody; keeps the right to read past permissions if Python itself lies in root's own folder."""
    libc = ctypes.CDLL(None, use_errno=True)
    readable = READ_CAPABILITIES & _permitted()
    libc.prctl(KEEPCAPS, 1, 0, 0, 0)
    try:
        os.chown(".", NOBODY, NOBODY)
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    except OSError as error:
        raise Unrestricted(
            f"the evaluation runs as root, and programs cannot run as another user ({error}); run it as a user"
        ) from error
    if not _python_is_readable():
        _set_capabilities(libc, readable)
        if not _python_is_readable():
            raise Unrestricted(
                f"the evaluation runs as root, and other users cannot read Python in {', '.join(sorted(PYTHON))}; "
                "run it as a user, or install Python where every user may read it"
            )
        return
    _set_capabilities(libc, 0)


def _python_is_readable() -> bool:
    with contextlib.suppress(OSError):
        return all(os.listdir(folder) for folder in PYTHON if folder)
    return False


def _permitted() -> int:
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1], 16) for line in status if line.startswith("CapPrm"))


def _set_capabilities(libc: ctypes.CDLL, mask: int) -> None:
    header = struct.pack("=Ii", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    if libc.capset(header, struct.pack("=6I", mask, mask, 0, 0, 0, 0)):
        raise Unrestricted(f"root's capabilities cannot be dropped ({os.strerror(ctypes.get_errno())}); run as a user")


def _restrict_files() -> None:
    """Allows reading Python and its libraries, everything in the working directory, and nothing else."""
    try:
        rules = landlock.Ruleset()
    except OSError as error:
        raise Unrestricted(
            f"programs cannot be kept from this user's files: {error}; it takes Linux 5.13 or newer with landlock in "
            "its boot option lsm="
        ) from error
    access = landlock.FSAccess
    for path in filter(os.path.exists, {*LIBRARIES, *PYTHON, os.path.join(sys.base_prefix, "lib")}):
        listed = access.READ_DIR if os.path.isdir(path) else access(0)
        rules.allow(path, rules=access.READ_FILE | listed)
    rules.allow("/dev/null", rules=access.READ_FILE | access.WRITE_FILE)
    rules.allow(".", rules=rules.restrict_rules & ~(access.EXECUTE | access.MAKE_CHAR | access.MAKE_BLOCK))
    rules.apply()


def _restrict_calls() -> None:
    """Makes every system call that is not allowed fail with EPERM."""
    calls = pyseccomp.SyscallFilter(pyseccomp.ERRNO(1))
    own, equal, masked = os.getpid(), pyseccomp.EQ, pyseccomp.MASKED_EQ
    conditions = {
        "fcntl": [[pyseccomp.Arg(1, equal, command)] for command in FCNTL]
        # F_SETFL without O_ASYNC, which sends signals
        + [[pyseccomp.Arg(1, equal, 4), pyseccomp.Arg(2, masked, 0o20000, 0)]],
        "ioctl": [[pyseccomp.Arg(1, equal, command)] for command in IOCTL],
        "kill": [[pyseccomp.Arg(0, equal, own)]],
        "tgkill": [[pyseccomp.Arg(0, equal, own)]],
        "prlimit64": [[pyseccomp.Arg(0, equal, pid)] for pid in (0, own)],
        "sched_getaffinity": [[pyseccomp.Arg(0, equal, pid)] for pid in (0, own)],
        # pairs of streams only: a datagram could be sent to another socket
        "socketpair": [[pyseccomp.Arg(0, equal, 1), pyseccomp.Arg(1, masked, 0xF, 1)]],
        "sendto": [[pyseccomp.Arg(4, equal, 0)]],
    }
    for name in ALLOWED:
        with contextlib.suppress(OSError):  # a call that this architecture or library does not have
            calls.add_rule(pyseccomp.ALLOW, name)
    for name, alternatives in conditions.items():
        for arguments in alternatives:
            calls.add_rule(pyseccomp.ALLOW, name, *arguments)
    try:
        calls.load()
    except OSError as error:
        raise Unrestricted(
            f"programs cannot be kept from the network and other processes: {error}; it takes a kernel with seccomp"
        ) from error
