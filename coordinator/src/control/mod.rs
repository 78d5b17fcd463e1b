//! Control: what a coordinator does on its own account, above the store and below the API.
//!
//! Owns: the watched view of the store ([`view`]), what each node has part in ([`shares`], pure), what in it breaks an
//! invariant ([`alarm`]), whether it can be reached ([`reach`]) and has room ([`space`]), the election ([`leader`]), the cycle
//! observe → plan → commit ([`cycle`]), agents' sessions ([`sessions`]), planned absences ([`absences`]) and claims
//! ([`claims`]), what owners report ([`status`]), what operators ask of nodes ([`commands`]), and the record of what happened
//! ([`events`]).

pub mod absences;
pub mod alarm;
pub mod claims;
pub mod clock;
pub mod commands;
pub mod cycle;
pub mod events;
pub mod leader;
pub mod mutant;
pub mod reach;
pub mod seen;
pub mod sessions;
pub mod shares;
pub mod space;
pub mod status;
#[cfg(test)]
pub(crate) mod tests;
pub mod view;

pub(crate) use sessions::store_status;
