//! All coordinators end at once, in order or killed, for a moment or for longer than sessions live, also in the middle of a
//! start and of a drain: every server that is wanted goes on under its pid, and what was asked for is done.

use drover_tests::faults::restart;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_coordinators_restart_at_once() -> anyhow::Result<()> {
    restart::run().await
}
