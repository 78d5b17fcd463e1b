//! What the shim and the agent must agree on, and the shim's own work.
//!
//! A shim stands beside one llama-server: it records the process before that executes its first instruction, drains its
//! log and makes its end durable, while agents come and go. Owns: the files of an instance's directory ([`record`]), the
//! identity of a process ([`identity`]), the log files ([`logs`]). Must never: talk to a network, know what a deployment
//! is, or decide that a server should end: that it does when the lease is lost is what its spec says ([`lease`]).
//!
//! # What the death of a shim means
//!
//! It may be killed at any moment, as by the kernel for memory. What holds then:
//!
//! - Before the release byte is written: the held child sees the end of its pipe and exits without having executed
//!   anything. A record may name it; it has ended.
//! - Afterwards: the server lives on and serves. Its record names it, so that an agent takes it back, signals it and sees its
//!   end as before, and no other shim starts a second one, though the lock is free.
//! - What the server prints is lost: its pipe has no reader. llama-server ignores SIGPIPE, so that it does not end by that.
//! - Nobody makes its end durable: it is reported as ended, how is not known.
//! - What it had started and left behind is nobody's child any more: the agent ends it by the cgroup of the run, or, where
//!   there is none, as far as it has stayed in the server's session.

pub mod cgroup;
pub mod clock;
pub mod durable;
pub mod failpoint;
pub mod identity;
pub mod keep;
pub mod lease;
pub mod logs;
pub mod membership;
pub mod mutant;
pub mod oom;
pub mod record;
pub mod start;
pub mod sys;

pub use start::Refusal;
