//! The calls that need `unsafe`: forking a child that is held before its program, signals through pidfds, dispositions.
//!
//! Everything unsafe of shim and agent is here. A shim has one thread, so a forked child may do what its parent may; it
//! still keeps to system calls, and never allocates, so that the rule can be checked by reading.
#![allow(unsafe_code)]

use nix::{
    errno::Errno,
    libc,
    unistd::{ForkResult, fork},
};
use std::{
    ffi::CString,
    io,
    os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
    ptr,
};

/// Exit code of a child that was never released.
pub const EXIT_NOT_RELEASED: i32 = 125;
/// Exit code of a child whose program could not be executed.
pub const EXIT_NOT_EXECUTED: i32 = 127;
/// Signals that a shim outlives; its child gets their default dispositions back.
const IGNORED: [libc::c_int; 6] =
    [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGTERM, libc::SIGPIPE, libc::SIGXFSZ];

/// Opens a handle of a process. It keeps naming that process when the pid is used again.
pub fn pidfd_open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: the call takes two integers and touches no memory of ours.
    let fd = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel has just given us this descriptor, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Sends a signal to the process of a handle; ESRCH when it has ended.
pub fn pidfd_signal(process: BorrowedFd<'_>, signal: nix::sys::signal::Signal) -> io::Result<()> {
    let none: *const libc::siginfo_t = ptr::null();
    // SAFETY: a null siginfo is allowed and means "as kill would fill it"; the rest are integers.
    Errno::result(unsafe {
        libc::syscall(libc::SYS_pidfd_send_signal, process.as_raw_fd(), signal as libc::c_int, none, 0)
    })?;
    Ok(())
}

/// Ignores what would end a shim from outside: it has to outlive its server to record its end.
pub fn ignore_signals() {
    for signal in IGNORED {
        // SAFETY: SIG_IGN runs no code of ours.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
}

/// Closes every descriptor from `first` on, so that nothing of the parent's lives on here.
pub fn close_from(first: u32) {
    // SAFETY: called at the start, before this process owns any descriptor above the standard ones.
    unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, 0) };
}

/// A child that waits before its program.
#[derive(Debug)]
pub struct Held {
    /// Its process id.
    pub pid: i32,
    /// Writing one byte releases it; closing it makes it exit.
    pub release: OwnedFd,
    /// Ends when the program is executed; else carries the error number, as four bytes.
    pub failure: OwnedFd,
}

/// What a child executes.
#[derive(Debug)]
pub struct Program<'a> {
    /// Path.
    pub path: &'a CString,
    /// All arguments, the program's name first.
    pub arguments: &'a [CString],
    /// "NAME=value".
    pub environment: &'a [CString],
    /// Working directory.
    pub directory: &'a CString,
}

/// Forks a child that leads a session of its own, has /dev/null as input and `log` as output, no other descriptor, and
/// executes `program` once it is released.
pub fn fork_held(program: &Program<'_>, input: BorrowedFd<'_>, log: OwnedFd) -> io::Result<Held> {
    let flags = nix::fcntl::OFlag::O_CLOEXEC;
    let (release_read, release) = nix::unistd::pipe2(flags)?;
    let (failure, failure_write) = nix::unistd::pipe2(flags)?;
    let arguments = pointers(program.arguments);
    let environment = pointers(program.environment);
    // SAFETY: this process has one thread, and the child only makes system calls on memory prepared above.
    match unsafe { fork() }? {
        ForkResult::Parent { child } => Ok(Held { pid: child.as_raw(), release, failure }),
        // SAFETY: the pointers are to NUL-terminated strings, the arrays end with a null pointer, and all outlive the
        // call, which never returns.
        ForkResult::Child => unsafe {
            child(
                program,
                arguments.as_ptr(),
                environment.as_ptr(),
                [input.as_raw_fd(), log.as_fd().as_raw_fd(), release_read.as_raw_fd(), failure_write.as_raw_fd()],
            )
        },
    }
}

fn pointers(strings: &[CString]) -> Vec<*const libc::c_char> {
    strings.iter().map(|s| s.as_ptr()).chain([ptr::null()]).collect()
}

/// The child's side. Descriptors end up as 0 input, 1 and 2 log, 3 release, 4 failure (closed by a successful exec).
///
/// # Safety
/// `arguments` and `environment` must be null-terminated arrays of C strings. Only to be called in a forked child.
unsafe fn child(
    program: &Program<'_>,
    arguments: *const *const libc::c_char,
    environment: *const *const libc::c_char,
    [input, log, release, failure]: [libc::c_int; 4],
) -> ! {
    // SAFETY: system calls on integers and on the strings that the caller vouches for.
    unsafe {
        libc::setsid();
        for signal in IGNORED {
            libc::signal(signal, libc::SIG_DFL);
        }
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, ptr::null_mut());
        // First out of the way of 0 to 4, whatever numbers they have.
        let input = libc::fcntl(input, libc::F_DUPFD, 10);
        let log = libc::fcntl(log, libc::F_DUPFD, 10);
        let release = libc::fcntl(release, libc::F_DUPFD, 10);
        let failure = libc::fcntl(failure, libc::F_DUPFD, 10);
        let placed = libc::dup2(input, 0) == 0
            && libc::dup2(log, 1) == 1
            && libc::dup2(log, 2) == 2
            && libc::dup2(release, 3) == 3
            && libc::dup3(failure, 4, libc::O_CLOEXEC) == 4;
        if !placed || libc::syscall(libc::SYS_close_range, 5, u32::MAX, 0) != 0 {
            libc::_exit(EXIT_NOT_RELEASED);
        }
        let mut byte = 0_u8;
        loop {
            match libc::read(3, (&raw mut byte).cast(), 1) {
                1 => break,
                -1 if Errno::last_raw() == libc::EINTR => {}
                // End of file: the shim has ended without releasing us.
                _ => libc::_exit(EXIT_NOT_RELEASED),
            }
        }
        libc::close(3);
        if libc::chdir(program.directory.as_ptr()) == 0 {
            libc::execve(program.path.as_ptr(), arguments, environment);
        }
        let error = Errno::last_raw().to_ne_bytes();
        libc::write(4, error.as_ptr().cast(), error.len());
        libc::_exit(EXIT_NOT_EXECUTED)
    }
}
