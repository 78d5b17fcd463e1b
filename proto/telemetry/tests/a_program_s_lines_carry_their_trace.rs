//! The whole as a program uses it: a process of its own calls `init`, logs and ends; its output and its spans are read.

#![allow(clippy::unwrap_used, reason = "what fails here fails a test")]

mod common;

use common::{DEADLINE, collector::Collector};
use drover_proto::transport::{Security, Target};
use drover_telemetry::{ExportError, GrpcSink, Settings, Sink, context};
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use std::{
    collections::BTreeSet,
    path::Path,
    process::{Command, Output},
    sync::Arc,
    time::Duration,
};
use tracing::Instrument as _;

const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";

/// A sink whose own work is traced: if those spans were recorded, each export would make the next one necessary.
struct TracedSink(GrpcSink);

#[tonic::async_trait]
impl Sink for TracedSink {
    async fn export(&self, batch: ExportTraceServiceRequest) -> Result<(), ExportError> {
        self.0.export(batch).instrument(tracing::info_span!(target: "drover", "export")).await
    }
}

/// Not a test by itself: the program that the tests below run.
#[tokio::test]
#[ignore = "runs in a process of its own"]
async fn program() {
    let Ok(directory) = std::env::var("DROVER_TEST_SPOOL") else { return };
    let telemetry = drover_telemetry::init(Settings {
        program: "drover-test",
        instance: "one".to_owned(),
        spool_dir: directory.into(),
        log_filter: "info,h2=off".to_owned(),
        log_json: std::env::var("DROVER_TEST_JSON").is_ok(),
        spool_bytes_max: 1 << 20,
    })
    .unwrap();
    let address = std::env::var("DROVER_TEST_COLLECTOR").unwrap_or("127.0.0.1:9".to_owned());
    let target = Target::new(&[address], &Security::default(), None).unwrap();
    telemetry.start_export(Arc::new(TracedSink(GrpcSink::new(target))));
    let outer = tracing::info_span!(target: "drover", "outer", instance = "a-1");
    context::set_parent(&outer, PARENT);
    async {
        tracing::info!("in the outer");
        let foreign = tracing::info_span!(target: "elsewhere", "foreign");
        async {
            tracing::warn!(answer = 42, "in a span of others");
            tracing::info_span!(target: "drover", "inner").in_scope(|| tracing::info!("in the inner"));
        }
        .instrument(foreign)
        .await;
        assert_eq!(context::trace_id_of(&context::current_traceparent()).as_deref(), Some(TRACE));
    }
    .instrument(outer)
    .await;
    tracing::info!("outside");
    if std::env::var("DROVER_TEST_COLLECTOR").is_ok() {
        // While the program still runs, so that a span made by the export would be recorded.
        let exported = async {
            while telemetry.handle().checkpoint().acknowledged < 2 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(DEADLINE, exported).await.unwrap();
    }
    telemetry.shutdown(Duration::from_secs(5)).await;
}

async fn run(directory: &Path, variables: &[(&str, &str)]) -> Output {
    #[allow(clippy::disallowed_methods, reason = "the program under test")]
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", "program", "--ignored", "--nocapture"])
        .env("DROVER_TEST_SPOOL", directory)
        .envs(variables.iter().copied());
    let output = tokio::task::spawn_blocking(move || command.output().unwrap()).await.unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output
}

#[tokio::test]
async fn spans_arrive_under_the_given_trace_and_every_line_within_names_it() {
    let directory = tempfile::tempdir().unwrap();
    let collector = Collector::start().await.unwrap();
    let address = collector.address().to_string();
    let output = run(directory.path(), &[("DROVER_TEST_COLLECTOR", &address)]).await;
    let spans = collector.wait_for(|spans| spans.len() >= 2, DEADLINE).await.unwrap();
    let names: BTreeSet<_> = spans.iter().map(|s| s.span.name.as_str()).collect();
    assert_eq!(names, BTreeSet::from(["inner", "outer"]), "no span of others, none of the export itself");
    let [inner, outer] = ["inner", "outer"].map(|name| spans.iter().find(|s| s.span.name == name).unwrap());
    assert!(spans.iter().all(|s| s.trace_id() == TRACE && s.service() == "drover-test"));
    assert_eq!(inner.span.parent_span_id, outer.span.span_id);
    assert_eq!((inner.sequence(), outer.sequence(), outer.attribute("instance").as_deref()), (1, 2, Some("a-1")));

    let log = String::from_utf8(output.stderr).unwrap();
    for (line, traced) in
        [("in the outer", true), ("in a span of others", true), ("in the inner", true), ("outside", false)]
    {
        let line = log.lines().find(|l| l.contains(line)).unwrap_or_else(|| panic!("{line} in {log}"));
        assert_eq!(line.ends_with(&format!(" trace_id={TRACE}")), traced, "{line}");
    }
}

#[tokio::test]
async fn json_lines_are_objects_with_the_trace_id() {
    let directory = tempfile::tempdir().unwrap();
    let output = run(directory.path(), &[("DROVER_TEST_JSON", "1"), ("OTEL_TRACES_EXPORTER", "none")]).await;
    let log = String::from_utf8(output.stderr).unwrap();
    let lines: Vec<serde_json::Value> =
        log.lines().filter(|l| l.starts_with('{')).map(|line| serde_json::from_str(line).unwrap()).collect();
    let line = |text: &str| lines.iter().find(|l| l["message"] == text).unwrap_or_else(|| panic!("{text} in {log}"));
    assert_eq!(
        (&line("in a span of others")["trace_id"], &line("in a span of others")["answer"]),
        (&TRACE.into(), &42.into())
    );
    assert_eq!(line("in the inner")["trace_id"], TRACE);
    assert!(line("outside").get("trace_id").is_none());
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0, "no spool with OTEL_TRACES_EXPORTER=none");
}

#[tokio::test]
async fn the_console_exporter_prints_spans_and_the_sampler_leaves_them_out() {
    let directory = tempfile::tempdir().unwrap();
    let output = run(directory.path(), &[("OTEL_TRACES_EXPORTER", "console"), ("OTEL_SERVICE_NAME", "mine")]).await;
    let text = String::from_utf8(output.stdout).unwrap();
    let spans: Vec<serde_json::Value> =
        text.lines().filter(|l| l.starts_with('{')).map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(spans.len(), 2, "{text}");
    assert!(spans.iter().all(|s| s["trace_id"] == TRACE && s["resource"]["service.name"] == "mine"));

    let off = [("OTEL_TRACES_EXPORTER", "console"), ("OTEL_TRACES_SAMPLER", "always_off")];
    let output = run(directory.path(), &off).await;
    assert!(!String::from_utf8(output.stdout).unwrap().contains("trace_id"));
}

#[tokio::test]
async fn a_program_without_a_disk_for_spans_runs_and_says_so() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("file");
    drop(std::fs::File::create(&file).unwrap());
    let output = run(&file, &[]).await;
    assert!(String::from_utf8(output.stderr).unwrap().contains("the span spool can't be made"));
}

#[test]
fn a_log_filter_that_can_t_be_read_is_named() {
    let settings = Settings {
        program: "drover-test",
        instance: String::new(),
        spool_dir: "/nowhere".into(),
        log_filter: "drover=loud=er".to_owned(),
        log_json: false,
        spool_bytes_max: 1 << 20,
    };
    let error = format!("{:#}", drover_telemetry::init(settings).unwrap_err());
    assert!(error.contains("log_filter = \"drover=loud=er\""), "{error}");
}
