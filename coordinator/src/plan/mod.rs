//! PURE: snapshot → plan. See README.md beside this file.

pub mod snapshot;
