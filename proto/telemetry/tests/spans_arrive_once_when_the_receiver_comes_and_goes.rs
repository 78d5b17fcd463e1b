//! Export over real gRPC to a receiver that fails in every way first.

mod common;

use common::{
    DEADLINE,
    collector::{Answer, Collector},
    open, quick, sequences, sink, spans,
};
use prost::Message as _;
use std::time::Duration;
use tonic::Status;

#[tokio::test]
async fn every_span_arrives_exactly_once_after_refusals_and_silence() {
    let directory = tempfile::tempdir().unwrap();
    let collector = Collector::start().await.unwrap();
    collector.answer_next([
        Answer::Unavailable(None),
        Answer::Unavailable(Some(Duration::from_millis(20))),
        Answer::Hang,
        Answer::Status(Status::internal("a mistake of the receiver")),
        Answer::Status(Status::unauthenticated("a mistake of the operator")),
    ]);
    let (source, provider) = open(directory.path(), quick());
    spans(&provider, 1000);
    source.start_export(sink(&collector));
    let arrived = collector.wait_for(|spans| spans.len() >= 1000, DEADLINE).await.unwrap();

    let epoch = source.handle().checkpoint().epoch;
    assert_eq!(sequences(&arrived, &epoch), (1..=1000).collect::<Vec<_>>());
    let span = &arrived[0];
    assert_eq!((span.service(), span.resource["service.instance.id"].as_str()), ("drover-test", "one"));
    assert_eq!(span.resource["service.version"], env!("CARGO_PKG_VERSION"));

    // The first batch was sent six times, always the same bytes.
    let attempts = collector.attempts();
    for again in &attempts[1..6] {
        assert_eq!(again.encode_to_vec(), attempts[0].encode_to_vec());
    }
    assert_ne!(attempts[6], attempts[0]);

    let last = source.shutdown(DEADLINE).await;
    assert_eq!((last.highest_sequence, last.acknowledged, last.acknowledged_through), (1000, 1000, 1000));
    assert_eq!((last.given_up, last.rejected), (0, 0));
}

#[tokio::test]
async fn nothing_is_freed_before_it_is_acknowledged_and_the_next_life_sends_the_rest() {
    let directory = tempfile::tempdir().unwrap();
    let collector = Collector::start().await.unwrap();
    collector.answer_next([Answer::Accept]);
    collector.answer_next(std::iter::repeat_n(Answer::Unavailable(None), 1000));
    let (source, provider) = open(directory.path(), quick());
    spans(&provider, 120);
    assert!(source.flush(DEADLINE));
    source.start_export(sink(&collector));
    collector.wait_for_attempts(3, DEADLINE).await.unwrap();
    let held = tokio::task::spawn_blocking({
        let handle = source.handle();
        move || handle.held()
    });
    assert_eq!(held.await.unwrap(), 70);
    spans(&provider, 30);
    let first = source.shutdown(Duration::from_millis(300)).await;
    assert_eq!((first.highest_sequence, first.acknowledged, first.acknowledged_through), (150, 50, 50));
    drop((source, provider));

    collector.answer(Answer::Accept);
    let (source, provider) = open(directory.path(), quick());
    spans(&provider, 5);
    source.start_export(sink(&collector));
    let arrived = collector.wait_for(|spans| spans.len() >= 155, DEADLINE).await.unwrap();
    let second = source.shutdown(DEADLINE).await;
    assert_eq!(sequences(&arrived, &first.epoch), (1..=150).collect::<Vec<_>>());
    assert_eq!(sequences(&arrived, &second.epoch), (1..=5).collect::<Vec<_>>());
    for batch in collector.attempts() {
        assert_eq!(batch.resource_spans.len(), 1, "one epoch a batch");
    }
    assert_eq!(second.acknowledged, 5);
}

#[tokio::test]
async fn a_receiver_that_is_not_there_at_first_gets_everything_when_it_comes() {
    let directory = tempfile::tempdir().unwrap();
    let collector = Collector::start().await.unwrap();
    let address = collector.address();
    let to = sink(&collector);
    collector.stop().await.unwrap();
    let (source, provider) = open(directory.path(), quick());
    source.start_export(to);
    spans(&provider, 200);
    assert!(source.flush(DEADLINE));
    let collector = Collector::start_at(address).await.unwrap();
    let arrived = collector.wait_for(|spans| spans.len() >= 200, DEADLINE).await.unwrap();
    let last = source.shutdown(DEADLINE).await;
    assert_eq!(sequences(&arrived, &last.epoch), (1..=200).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_batch_refused_for_good_is_declared_and_does_not_hold_up_the_others() {
    let directory = tempfile::tempdir().unwrap();
    let collector = Collector::start().await.unwrap();
    collector.answer_next([Answer::Status(Status::invalid_argument("no")), Answer::Partial(7)]);
    let (source, provider) = open(directory.path(), quick());
    spans(&provider, 150);
    assert!(source.flush(DEADLINE));
    source.start_export(sink(&collector));
    let last = source.shutdown(DEADLINE).await;
    assert_eq!((last.highest_sequence, last.acknowledged_through), (150, 150));
    assert_eq!((last.acknowledged, last.rejected, last.given_up), (93, 7, 50));
    let (ranges, _) = source.handle().given_up();
    assert_eq!((ranges.len(), ranges[0].first, ranges[0].last), (1, 1, 50));
}
