//! etcd is away for longer than any lease lives, killed or halted: every server goes on under its pid, requests are answered,
//! changes are refused with a clear error, and nothing is moved when it is back. For ten minutes: `tests/run faults outage`.

use drover_tests::faults::outage::{self, How};
use std::time::Duration;

const OUTAGE: Duration = Duration::from_secs(45);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn when_it_was_killed_and_is_started_again() -> anyhow::Result<()> {
    outage::run(How::Kill, OUTAGE).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn when_it_was_halted_and_goes_on() -> anyhow::Result<()> {
    outage::run(How::Stop, OUTAGE).await
}
