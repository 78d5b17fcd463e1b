//! Deliberate breakages, for tests that must be seen to fail: `DROVER_MUTANT` names one, or a simulation chooses one for its
//! thread. Compiled out of release builds.

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
        thread::CHOSEN.get().map_or_else(|| CHOSEN.as_deref() == Some(_name), |chosen| chosen == _name)
    }
    #[cfg(not(debug_assertions))]
    false
}

/// Chooses the breakage of this thread, whatever the environment says; an empty name: none. Debug builds only.
#[cfg(debug_assertions)]
pub fn choose(name: Option<&'static str>) {
    thread::CHOSEN.set(name);
}

#[cfg(debug_assertions)]
mod thread {
    thread_local! {
        pub(super) static CHOSEN: std::cell::Cell<Option<&'static str>> = const { std::cell::Cell::new(None) };
    }
}

#[cfg(all(test, debug_assertions))]
mod tests {
    #[test]
    fn a_thread_chooses_for_itself() {
        super::choose(Some("a"));
        assert!(super::on("a") && !super::on("b"));
        assert!(!std::thread::spawn(|| super::on("a")).join().unwrap());
        super::choose(Some(""));
        assert!(!super::on("a"));
    }
}
