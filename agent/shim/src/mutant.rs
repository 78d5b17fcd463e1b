//! The shim's deliberate breakages, for tests that must be seen to fail: `DROVER_MUTANT` names one, as it does for the other
//! programs; an agent hands it on ([`crate::failpoint::handed_on`]). Compiled out of release builds.

/// Name of the environment variable.
pub const VARIABLE: &str = "DROVER_MUTANT";

/// Names of breakages.
pub mod name {
    /// A token lower than the recorded one is not refused.
    pub const SHIM_IGNORES_TOKENS: &str = "shim-ignores-tokens";
}

/// Whether this breakage is switched on.
#[must_use]
#[inline]
pub fn on(name: &str) -> bool {
    #[cfg(debug_assertions)]
    return std::env::var(VARIABLE).is_ok_and(|chosen| chosen == name);
    #[cfg(not(debug_assertions))]
    {
        let _ = name;
        false
    }
}
