//! A source in a process of its own, killed by SIGKILL in the middle of its work.

mod common;

use common::{DEADLINE, collector::Collector, open, quick, sequences, sink, spans};
use std::{
    collections::BTreeSet,
    io::{BufRead as _, BufReader, Write as _},
    process::{Command, Stdio},
};

const DIRECTORY: &str = "DROVER_TEST_SPOOL";

/// Not a test by itself: what the test below runs in a process that it kills.
#[test]
#[ignore = "runs in a process of its own"]
fn make_spans_until_killed() {
    let Some(directory) = std::env::var_os(DIRECTORY) else { return };
    let (source, provider) = open(directory.as_ref(), quick());
    let handle = source.handle();
    println!("epoch {}", handle.checkpoint().epoch);
    spans(&provider, 2000);
    assert!(source.flush(DEADLINE));
    loop {
        spans(&provider, 100);
        println!("made {}", handle.checkpoint().highest_sequence);
        std::io::stdout().flush().unwrap();
    }
}

#[tokio::test]
async fn after_kill_9_every_numbered_span_has_arrived_or_is_known_to_be_lost() {
    let directory = tempfile::tempdir().unwrap();
    let collector = Collector::start().await.unwrap();
    let mut arrived_before = 0;
    for round in 0..3 {
        #[allow(clippy::disallowed_methods, reason = "a process to be killed")]
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "make_spans_until_killed", "--ignored", "--nocapture"])
            .env(DIRECTORY, directory.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
        let epoch = lines.find_map(|line| Some(line.split_once("epoch ")?.1.to_owned())).unwrap();
        let made = |line: &String| line.split_once("made ").is_some_and(|(_, n)| n.parse::<u64>().unwrap() >= 3000);
        lines.find(made).unwrap();
        child.kill().unwrap();
        let last =
            lines.last().and_then(|line| line.split_once("made ").and_then(|(_, n)| n.parse().ok())).unwrap_or(3000);
        child.wait().unwrap();

        let (source, provider) = open(directory.path(), quick());
        let earlier = tokio::task::spawn_blocking({
            let handle = source.handle();
            move || handle.earlier()
        });
        let earlier = earlier.await.unwrap();
        let report = earlier.iter().find(|e| e.epoch == epoch).unwrap();
        assert!(report.issued >= last, "round {round}: {report:?} but it had said {last}");
        assert_eq!(report.issued, report.held + report.lost, "round {round}: {report:?}");
        assert!(report.held >= 2000 && !report.ended, "round {round}: {report:?}");
        eprintln!("round {round}: {report:?}");

        source.start_export(sink(&collector));
        let all = arrived_before + usize::try_from(report.held).unwrap();
        let arrived = collector.wait_for(|spans| spans.len() >= all, DEADLINE).await.unwrap();
        drop(provider);
        source.shutdown(DEADLINE).await;
        assert_eq!(collector.spans().len(), all, "none twice");
        let numbers = sequences(&arrived, &epoch);
        assert_eq!(numbers.iter().collect::<BTreeSet<_>>().len(), numbers.len());
        assert!(numbers.iter().all(|n| (1..=report.issued).contains(n)));
        arrived_before = all;
    }
}
