//! The same random operations on both stores, answer by answer: the twin in memory is what the simulation runs on.
//!
//! Prints the seed of each run; `DROVER_SEED=n` repeats one. Revisions are compared relative to the start of the run,
//! leases by the order in which they were granted. What etcd alone can do (run out of space, ask for a log-in) is in
//! `etcd_faults_end_in_the_right_error.rs`; reads at an earlier revision are none of the store's calls.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "helpers of a test are no #[test]"
)]

mod history;
mod outage;
mod pair;
mod together;

use drover_coordinator::store::{
    Store,
    etcd::{self, Etcd},
};
use drover_tests::etcd::Etcd as Server;
use pair::Pair;
use std::{sync::Arc, time::Duration};
use tokio::time::Instant;

const TIME: Duration = Duration::from_secs(8);

/// A few seeds, or the one that was asked for.
fn seeds() -> Vec<u64> {
    match std::env::var("DROVER_SEED") {
        Ok(seed) => vec![seed.parse().expect("DROVER_SEED is no number")],
        // Found seeds stay; a few new ones each time.
        Err(_) => [1, 2, 3, 4].into_iter().chain((0..50).map(|_| rand::random::<u32>().into())).collect(),
    }
}

async fn connect(server: &Server, prefix: &str, call_timeout: Duration) -> Store {
    let mut settings = etcd::Settings::new(server.endpoints());
    settings.prefix = format!("/differential/{prefix}/");
    settings.call_timeout = call_timeout;
    Arc::new(Etcd::connect(settings).await.unwrap())
}

#[tokio::test]
async fn whatever_is_asked_of_them() {
    let server = Server::start().await.unwrap();
    let begun = Instant::now();
    let mut runs = 0;
    for seed in seeds() {
        println!("DROVER_SEED={seed}");
        let etcd = connect(&server, &format!("{seed}/{runs}"), Duration::from_secs(5)).await;
        Pair::new(etcd, seed).await.run(&server).await;
        runs += 1;
        if begun.elapsed() > TIME {
            break;
        }
    }
    println!("{runs} runs of {} steps", pair::STEPS);
    assert!(runs > 0);
}
