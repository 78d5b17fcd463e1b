//! The exporter's task: reads the spool in order, sends one batch at a time until it is settled, frees what was settled.
//!
//! Must never: trace itself. Each export runs without a subscriber, so no span or event within it is recorded.

use crate::{
    environment::Limits,
    sink::{ExportError, Sink},
    source::lock,
    spool::{Batch, Outcome, Spool},
};
use std::{
    io,
    sync::{Arc, Mutex},
    time::Duration,
};
use tokio::sync::{Notify, watch};
use tracing::{dispatcher::Dispatch, instrument::WithSubscriber as _};

/// Longest pause that a receiver can ask for.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(300);
/// Longest pause between attempts while the program ends.
const PAUSE_AT_END: Duration = Duration::from_millis(100);

/// The task.
pub(crate) struct Task {
    pub spool: Arc<Mutex<Spool>>,
    pub wake: Arc<Notify>,
    pub sink: Arc<dyn Sink>,
    pub limits: Limits,
    pub stop: watch::Receiver<bool>,
}

impl Task {
    /// Runs until it is told to stop and nothing is left.
    pub async fn run(mut self) {
        let mut failures = 0;
        loop {
            match self.next_batch().await {
                Ok(Some(batch)) => match self.send(&batch).await {
                    Ok(left) => {
                        if failures > 0 {
                            tracing::info!(failures, "spans are exported again");
                            failures = 0;
                        }
                        if left < self.limits.batch_spans as u64 {
                            self.pause(self.limits.linger).await;
                        }
                    }
                    Err((message, after)) => self.failed(&mut failures, &message, after).await,
                },
                Ok(None) if *self.stop.borrow() => return,
                Ok(None) => {
                    tokio::select! {
                        () = self.wake.notified() => self.pause(self.limits.linger).await,
                        _ = self.stop.changed() => {}
                    }
                }
                Err(error) => self.failed(&mut failures, &format!("the spool can't be read: {error}"), None).await,
            }
        }
    }

    async fn failed(&mut self, failures: &mut u32, message: &str, after: Option<Duration>) {
        if *failures == 0 {
            tracing::warn!(message, "spans can't be exported; they wait in the spool");
        }
        let pause = pause(&self.limits, *failures, after, rand::random());
        *failures = failures.saturating_add(1);
        self.pause(pause).await;
    }

    /// Waits; cut short when the program ends.
    async fn pause(&mut self, time: Duration) {
        if *self.stop.borrow() {
            tokio::time::sleep(time.min(PAUSE_AT_END)).await;
            return;
        }
        tokio::select! {
            () = tokio::time::sleep(time) => {}
            _ = self.stop.changed() => {}
        }
    }

    async fn next_batch(&self) -> io::Result<Option<Batch>> {
        let limits = self.limits.batch();
        self.with_spool(move |spool| spool.next_batch(limits)).await?
    }

    /// Sends a batch once. Spans left when it is settled, or why it is to be sent again.
    async fn send(&self, batch: &Batch) -> Result<u64, (String, Option<Duration>)> {
        let export = self.sink.export(batch.request.clone()).with_subscriber(Dispatch::none());
        let outcome = match tokio::time::timeout(self.limits.export_timeout, export).await {
            Ok(Ok(())) => Outcome::Acknowledged { rejected: 0 },
            Ok(Err(ExportError::Partial { rejected, message })) => {
                tracing::warn!(rejected, message, "the backend rejected spans of a batch");
                Outcome::Acknowledged { rejected }
            }
            Ok(Err(ExportError::Refused { message })) => {
                tracing::warn!(spans = batch.spans, message, "spans were refused for good and are given up");
                Outcome::Refused
            }
            Ok(Err(ExportError::Retry { message, after })) => return Err((message, after)),
            Err(_) => return Err((format!("no answer within {:?}", self.limits.export_timeout), None)),
        };
        let settled = self.with_spool(move |spool| {
            spool.settle(outcome);
            spool.held()
        });
        settled.await.map_err(|error| (error.to_string(), None))
    }

    /// Uses the spool on a thread that may wait for the disk.
    async fn with_spool<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Spool) -> T + Send + 'static,
    ) -> io::Result<T> {
        let spool = self.spool.clone();
        tokio::task::spawn_blocking(move || work(&mut lock(&spool))).await.map_err(io::Error::other)
    }
}

/// PURE: how long to wait after a number of failures: doubling, between half of it and all of it by `random`, and no shorter
/// than what the receiver asked for.
fn pause(limits: &Limits, failures: u32, after: Option<Duration>, random: u32) -> Duration {
    let whole = limits.backoff.saturating_mul(1 << failures.min(16)).min(limits.backoff_max);
    let jittered = whole.mul_f64(0.5 + 0.5 * f64::from(random) / f64::from(u32::MAX));
    jittered.max(after.unwrap_or_default().min(RETRY_AFTER_MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_a_bound_and_honour_what_the_receiver_asked_for() {
        let limits = Limits::default();
        assert_eq!(pause(&limits, 0, None, u32::MAX), limits.backoff);
        assert_eq!(pause(&limits, 0, None, 0), limits.backoff / 2);
        assert_eq!(pause(&limits, 1, None, u32::MAX), limits.backoff * 2);
        assert_eq!(pause(&limits, u32::MAX, None, u32::MAX), limits.backoff_max);
        let asked = Duration::from_secs(42);
        assert_eq!(pause(&limits, 0, Some(asked), 0), asked);
        assert_eq!(pause(&limits, 0, Some(Duration::MAX), 0), RETRY_AFTER_MAX);
    }
}
