//! The spool on a real disk.

use super::*;
use crate::mapped::Progress;
use opentelemetry_proto::tonic::trace::v1::Span;
use proptest::prelude::*;
use prost::Message as _;
use std::{cell::Cell, fs::OpenOptions};
use tempfile::TempDir;

const LIMITS: BatchLimits = BatchLimits { spans: 10, bytes: 64 << 10 };

fn epoch(n: u128) -> String {
    uuid::Uuid::from_u128(n).to_string()
}

fn open(root: &TempDir, n: u128, bytes_max: u64) -> Spool {
    let (spool, error) = Spool::open(root.path(), bytes_max, || epoch(n), crate::resource::unknown).unwrap();
    assert!(error.is_none(), "{error:?}");
    spool
}

/// Numbers and encodes spans as the writer does.
fn spans(spool: &Spool, count: u64, padding: usize) -> Vec<(u64, Vec<u8>)> {
    let counters = spool.counters();
    (0..count)
        .map(|_| {
            let sequence = counters.issue();
            let span = Span { name: format!("{sequence}"), trace_state: "x".repeat(padding), ..Default::default() };
            (sequence, span.encode_to_vec())
        })
        .collect()
}

fn append(spool: &mut Spool, count: u64, padding: usize) {
    let spans = spans(spool, count, padding);
    spool.append(&spans);
}

fn names(batch: &Batch) -> Vec<u64> {
    let resource = &batch.request.resource_spans[0];
    resource.scope_spans[0].spans.iter().map(|span| span.name.parse().unwrap()).collect()
}

/// Takes everything out, acknowledged.
fn drain(spool: &mut Spool) -> Vec<u64> {
    let mut all = Vec::new();
    while let Some(batch) = spool.next_batch(LIMITS).unwrap() {
        all.extend(names(&batch));
        spool.settle(Outcome::Acknowledged { rejected: 0 });
    }
    all
}

fn files(root: &TempDir) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for directory in std::fs::read_dir(root.path()).unwrap() {
        let directory = directory.unwrap().path();
        files.extend(std::fs::read_dir(directory).unwrap().map(|f| f.unwrap().path()));
    }
    files.retain(|path| path.extension().is_some());
    files.sort();
    files
}

/// The rule that everything serves, for the life that is going on.
fn check_balance(spool: &Spool) {
    let counters = spool.counters();
    let Progress { acknowledged, given_up, rejected, .. } = counters.progress();
    assert_eq!(counters.issued(), acknowledged + rejected + given_up + spool.current.held());
}

#[test]
fn spans_come_out_in_order_and_are_freed_only_when_acknowledged() {
    let root = tempfile::tempdir().unwrap();
    let mut spool = open(&root, 1, BYTES_MIN);
    append(&mut spool, 40, 1000);
    assert!(files(&root).len() > 5, "segments are small here");
    let before = files(&root);
    let first = spool.next_batch(LIMITS).unwrap().unwrap();
    let again = spool.next_batch(LIMITS).unwrap().unwrap();
    assert_eq!(first.request.encode_to_vec(), again.request.encode_to_vec());
    assert_eq!(files(&root), before);
    spool.settle(Outcome::Acknowledged { rejected: 0 });
    assert_eq!(files(&root), before[1..]);
    let rest = drain(&mut spool);
    assert_eq!([names(&first), rest].concat(), (1..=40).collect::<Vec<_>>());
    assert_eq!(files(&root).len(), 1, "only the one being written");
    assert_eq!(spool.counters().progress(), Progress { settled_through: 40, acknowledged: 40, ..Progress::default() });
    check_balance(&spool);
}

#[test]
fn at_the_bound_the_oldest_are_given_up_and_counted_but_not_what_is_being_exported() {
    let root = tempfile::tempdir().unwrap();
    let mut spool = open(&root, 1, BYTES_MIN);
    append(&mut spool, 9, 1000);
    let out = names(&spool.next_batch(LIMITS).unwrap().unwrap());
    for _ in 0..50 {
        append(&mut spool, 5, 1000);
        check_balance(&spool);
        assert!(files(&root).iter().map(|f| f.metadata().unwrap().len()).sum::<u64>() <= BYTES_MIN);
    }
    assert_eq!(names(&spool.next_batch(LIMITS).unwrap().unwrap()), out);
    let (ranges, forgotten) = spool.given_up();
    let [range] = ranges[..] else { panic!("one range, since all were given up in order: {ranges:?}") };
    assert_eq!((range.first, range.reason, forgotten), (out.last().unwrap() + 1, Reason::SpoolFull, 0));
    assert_eq!((range.spans, range.spans), (range.last + 1 - range.first, spool.counters().progress().given_up));
    let arrived = drain(&mut spool);
    assert_eq!(arrived, out.into_iter().chain(range.last + 1..=259).collect::<Vec<_>>());
    check_balance(&spool);
}

#[test]
fn a_refused_batch_is_given_up_and_a_partly_rejected_one_is_counted() {
    let root = tempfile::tempdir().unwrap();
    let mut spool = open(&root, 1, 1 << 20);
    append(&mut spool, 30, 10);
    spool.next_batch(LIMITS).unwrap().unwrap();
    spool.settle(Outcome::Refused);
    spool.next_batch(LIMITS).unwrap().unwrap();
    spool.settle(Outcome::Acknowledged { rejected: 3 });
    let progress = spool.counters().progress();
    assert_eq!(progress, Progress { settled_through: 20, acknowledged: 7, given_up: 10, rejected: 3 });
    assert_eq!(spool.given_up().0, [GivenUp { first: 1, last: 10, spans: 10, reason: Reason::Refused }]);
    check_balance(&spool);
}

#[test]
fn the_next_life_exports_what_the_last_one_left_under_its_own_epoch() {
    let root = tempfile::tempdir().unwrap();
    let mut first = open(&root, 1, 1 << 20);
    append(&mut first, 25, 10);
    first.next_batch(LIMITS).unwrap().unwrap();
    first.settle(Outcome::Acknowledged { rejected: 0 });
    first.next_batch(LIMITS).unwrap().unwrap();
    // Two more get their numbers and no further: what kill -9 does to spans in memory.
    spans(&first, 2, 0);

    let living = open(&root, 2, 1 << 20);
    assert!(living.reports().is_empty(), "a life that goes on is left alone");
    drop((first, living));

    let mut third = open(&root, 3, 1 << 20);
    let reports = third.reports();
    let report = reports.iter().find(|r| r.epoch == epoch(1)).unwrap();
    let expected = Earlier {
        epoch: epoch(1),
        issued: 27,
        acknowledged: 10,
        rejected: 0,
        held: 15,
        given_up: 0,
        lost: 2,
        torn: 0,
        ended: false,
    };
    assert_eq!(*report, expected);
    append(&mut third, 1, 0);
    let batch = third.next_batch(LIMITS).unwrap().unwrap();
    assert_eq!(names(&batch), (11..=20).collect::<Vec<_>>());
    assert_eq!(batch.request.resource_spans[0].resource, Some(crate::resource::unknown(&epoch(1))));
    drop(third);

    // The loss is counted once: a further crash finds it among what was given up.
    let mut fourth = open(&root, 4, 1 << 20);
    let report = fourth.reports().into_iter().find(|r| r.epoch == epoch(1)).unwrap();
    assert_eq!((report.lost, report.given_up, report.held), (0, 2, 15));
    assert_eq!(drain(&mut fourth), (11..=25).chain([1]).collect::<Vec<_>>());
    assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 1, "settled lives are removed");
}

#[test]
fn a_torn_tail_is_counted_and_the_spans_before_it_arrive() {
    let root = tempfile::tempdir().unwrap();
    let mut spool = open(&root, 1, 1 << 20);
    append(&mut spool, 5, 10);
    drop(spool);
    let file = OpenOptions::new().write(true).open(&files(&root)[0]).unwrap();
    file.set_len(file.metadata().unwrap().len() - 3).unwrap();
    let seen = inspect(root.path()).unwrap().remove(0);
    let counters = seen.counters.unwrap();
    assert_eq!((seen.epoch, counters.issued, counters.ended), (epoch(1), 5, false));
    let segment = &seen.segments[0];
    assert_eq!((segment.range, segment.held, segment.torn), (Some((1, 4)), 4, true));
    let mut next = open(&root, 2, 1 << 20);
    let report = &next.reports()[0];
    assert_eq!((report.held, report.lost, report.torn), (4, 1, 1));
    assert_eq!(drain(&mut next), [1, 2, 3, 4]);
}

#[test]
fn damage_under_a_running_exporter_is_given_up_and_the_rest_arrives() {
    let root = tempfile::tempdir().unwrap();
    let mut spool = open(&root, 1, BYTES_MIN);
    append(&mut spool, 9, 1000);
    let all = files(&root);
    assert_eq!(all.len(), 3);
    let middle = OpenOptions::new().write(true).open(&all[1]).unwrap();
    middle.set_len(20).unwrap();
    std::fs::remove_file(&all[0]).unwrap();
    // A segment's file is named after its first span.
    let sound: u64 = all[2].file_stem().unwrap().to_str().unwrap().parse().unwrap();
    assert_eq!(drain(&mut spool), (sound..=9).collect::<Vec<_>>());
    assert!(spool.given_up().0.iter().all(|r| r.reason == Reason::Damaged));
    assert_eq!(spool.counters().progress().given_up, sound - 1);
    check_balance(&spool);
}

#[test]
fn a_disk_that_refuses_costs_spans_that_are_counted_and_nothing_else() {
    let root = tempfile::tempdir().unwrap();
    let file = root.path().join("file");
    drop(std::fs::File::create(&file).unwrap());
    let (mut spool, error) = Spool::open(&file, 1 << 20, || epoch(1), crate::resource::unknown).unwrap();
    assert!(error.is_some());
    append(&mut spool, 3, 0);
    check_balance(&spool);
    assert_eq!(spool.given_up().0, [GivenUp { first: 1, last: 3, spans: 3, reason: Reason::Disk }]);
    std::fs::remove_file(&file).unwrap();
    append(&mut spool, 2, 0);
    assert_eq!(drain(&mut spool), [4, 5], "it works again as soon as the disk does");
    check_balance(&spool);
}

#[test]
fn many_lives_are_all_looked_after_with_a_bounded_number_of_open_files() {
    let root = tempfile::tempdir().unwrap();
    let lives = LIVES_MAX as u128 + 5;
    for n in 1..=lives {
        // Apart while it lives: the others would take it over otherwise.
        let apart = tempfile::tempdir_in(root.path()).unwrap();
        append(&mut open(&apart, n, 1 << 20), 1, 0);
        std::fs::rename(apart.path().join(epoch(n)), root.path().join(epoch(n))).unwrap();
    }
    let mut spool = open(&root, lives + 1, 1 << 20);
    assert_eq!(spool.earlier.len(), LIVES_MAX);
    assert_eq!(drain(&mut spool).len(), lives as usize);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever happens to the files between two lives: no panic, no span that was not written, and what is missing counted.
    #[test]
    fn damaged_files_never_invent_a_span_and_what_is_missing_is_counted(
        count in 1..60u64, padding in 0..2000usize, acknowledged in 0..4usize,
        cuts in proptest::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>()), 0..3),
        flips in proptest::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>(), 0..8u32), 0..4),
    ) {
        let root = tempfile::tempdir().unwrap();
        let mut spool = open(&root, 1, 1 << 20);
        append(&mut spool, count, padding);
        let mut before = 0;
        for _ in 0..acknowledged {
            before += spool.next_batch(LIMITS).unwrap().map_or(0, |batch| batch.spans);
            spool.settle(Outcome::Acknowledged { rejected: 0 });
        }
        drop(spool);
        let all = files(&root);
        for (file, at) in cuts {
            let file = OpenOptions::new().write(true).open(&all[file.index(all.len())]).unwrap();
            let length = file.metadata().unwrap().len() as usize;
            file.set_len(at.index(length + 1) as u64).unwrap();
        }
        for (file, at, bit) in flips {
            use std::os::unix::fs::FileExt as _;
            let file = OpenOptions::new().read(true).write(true).open(&all[file.index(all.len())]).unwrap();
            let length = file.metadata().unwrap().len() as usize;
            if length > 0 {
                let (mut byte, at) = ([0], at.index(length) as u64);
                file.read_exact_at(&mut byte, at).unwrap();
                file.write_all_at(&[byte[0] ^ (1 << bit)], at).unwrap();
            }
        }
        let mut next = open(&root, 2, 1 << 20);
        let arrived = Cell::new(0);
        let report = next.reports()[0].clone();
        let mut last = before;
        for sequence in drain(&mut next) {
            prop_assert!(sequence > last && sequence <= count);
            last = sequence;
            arrived.set(arrived.get() + 1);
        }
        prop_assert_eq!((report.issued, report.acknowledged), (count, before));
        prop_assert_eq!(report.held, arrived.get());
        prop_assert_eq!(before + report.held + report.lost, count);
    }
}
