//! What a span costs the code that makes it: with a receiver that hangs, with a spool at its bound, in a burst.

mod common;

use common::{
    DEADLINE,
    collector::{Answer, Collector},
    open, quick, sequences, sink, spans,
};
use opentelemetry::trace::{Span as _, Tracer as _, TracerProvider as _};
use std::time::{Duration, Instant};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[allow(clippy::disallowed_methods, reason = "the cost in the traced thread is what is measured")]
async fn a_span_costs_little_even_while_the_receiver_hangs() {
    let directory = tempfile::tempdir().unwrap();
    let collector = Collector::start().await.unwrap();
    collector.answer(Answer::Hang);
    let (source, provider) = open(directory.path(), quick());
    source.start_export(sink(&collector));
    spans(&provider, 1);
    collector.wait_for_attempts(1, DEADLINE).await.unwrap();
    let mut costs = tokio::task::spawn_blocking(move || {
        let tracer = provider.tracer("drover");
        let one = |_| {
            let mut span = tracer.start("work");
            let begun = Instant::now();
            span.end();
            begun.elapsed()
        };
        (0..20_000).map(one).collect::<Vec<_>>()
    })
    .await
    .unwrap();
    costs.sort_unstable();
    let at = |share: f64| costs[(costs.len() as f64 * share) as usize];
    println!(
        "end of a span: p50 {:?}, p99 {:?}, p99.9 {:?}, most {:?}",
        at(0.5),
        at(0.99),
        at(0.999),
        costs[costs.len() - 1]
    );
    // Wide of what it takes, so that a busy machine does not fail it; a wait for the network would be 500 ms.
    assert!(at(0.99) < Duration::from_millis(5), "{:?}", at(0.99));
    let checkpoint = source.handle().checkpoint();
    assert_eq!((checkpoint.highest_sequence, checkpoint.acknowledged), (20_001, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_burst_that_outruns_every_queue_arrives_to_the_last_span() {
    let directory = tempfile::tempdir().unwrap();
    let collector = Collector::start().await.unwrap();
    // On a machine that is busy with other things the writer may not get its turn for long.
    let limits = drover_telemetry::Limits { queue_spans: 1000, batch_spans: 512, stall: DEADLINE, ..quick() };
    let (source, provider) = open(directory.path(), limits);
    source.start_export(sink(&collector));
    let threads: Vec<_> = (0..4)
        .map(|_| {
            let provider = provider.clone();
            std::thread::spawn(move || spans(&provider, 12_500))
        })
        .collect();
    for thread in threads {
        tokio::task::spawn_blocking(|| thread.join().unwrap()).await.unwrap();
    }
    let last = source.shutdown(DEADLINE).await;
    assert_eq!((last.highest_sequence, last.acknowledged, last.given_up), (50_000, 50_000, 0));
    assert_eq!(sequences(&collector.spans(), &last.epoch), (1..=50_000).collect::<Vec<_>>(), "in order, none twice");
}
