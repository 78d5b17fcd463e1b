//! Deliberate breakages, for tests that must be seen to fail: `DROVER_MUTANT` names one. Compiled out of release builds.

/// Names of breakages.
pub mod name {
    /// The claim transaction does not compare that there is no claim yet.
    pub const CLAIM_WITHOUT_CREATE_COMPARE: &str = "claim-without-create-compare";
    /// Status is written without comparing the claim.
    pub const STATUS_WITHOUT_FENCE: &str = "status-without-fence";
}

/// Whether this breakage is switched on.
#[must_use]
pub fn on(_name: &str) -> bool {
    #[cfg(debug_assertions)]
    {
        static CHOSEN: std::sync::LazyLock<Option<String>> = std::sync::LazyLock::new(|| {
            let chosen = std::env::var("DROVER_MUTANT").ok().filter(|m| !m.is_empty())?;
            tracing::error!(mutant = chosen, "a rule is broken on purpose: this process is fit for a test only");
            Some(chosen)
        });
        CHOSEN.as_deref() == Some(_name)
    }
    #[cfg(not(debug_assertions))]
    false
}
