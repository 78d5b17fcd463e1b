//! An agent is halted for 30 s and goes on: no server that is wanted and not superseded has another pid.

use drover_tests::faults::pause;
use std::time::Duration;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_that_is_halted_for_a_while_loses_no_server() -> anyhow::Result<()> {
    pause::run(Duration::from_secs(30)).await
}
