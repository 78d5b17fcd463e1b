//! Holds up all that this program does but for its connections, for a test. Debug builds only.
//!
//! `DROVER_STALL_FILE` names a file: while it exists every thread of the main runtime is busy. A release build holds none of
//! this.

/// Watches for the file, if one is named. To be called on the main runtime.
pub(crate) fn watch() {
    #[cfg(debug_assertions)]
    armed::watch();
}

#[cfg(debug_assertions)]
mod armed {
    use std::{path::PathBuf, sync::Arc, thread, time::Duration};
    use tokio::runtime::Handle;

    const VARIABLE: &str = "DROVER_STALL_FILE";
    const PAUSE: Duration = Duration::from_millis(20);

    pub(super) fn watch() {
        let Some(file) = std::env::var_os(VARIABLE).map(PathBuf::from) else { return };
        let (file, runtime) = (Arc::new(file), Handle::current());
        let stalled = |file: &PathBuf| {
            while file.exists() {
                #[allow(clippy::disallowed_methods, reason = "to block the thread is what it is for")]
                thread::sleep(PAUSE);
            }
        };
        thread::spawn(move || {
            loop {
                #[allow(clippy::disallowed_methods, reason = "a thread of its own")]
                thread::sleep(PAUSE);
                if file.exists() {
                    tracing::warn!("a test holds this program up");
                    for _ in 0..runtime.metrics().num_workers() {
                        let file = file.clone();
                        runtime.spawn(async move { stalled(&file) });
                    }
                    stalled(&file);
                }
            }
        });
    }
}
