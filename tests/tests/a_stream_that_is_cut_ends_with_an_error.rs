//! A stream that outlasts its instance's drain, or whose instance is stopped by force, ends with an error event and never looks
//! whole.

use anyhow::{Context as _, ensure};
use drover_proto::v1::DeploymentSpec;
use drover_tests::{
    cluster::{Cluster, Plan, SOON},
    programs::{eventually, program, servers_with},
};
use serde_json::json;
use std::{
    io::{BufRead as _, BufReader, Lines, Write as _},
    net::TcpStream,
    process::Command,
};

/// A stream too large for the buffers on its way, of which the beginning was read.
fn begin(cluster: &Cluster) -> anyhow::Result<Lines<BufReader<TcpStream>>> {
    let body = json!({
        "model": "tiny", "prompt": "once", "stream": true, "max_tokens": 6000, "logprobs": 5, "temperature": 0,
        "ignore_eos": true,
    })
    .to_string();
    let mut stream = TcpStream::connect(&cluster.coordinators[0].http)?;
    write!(
        stream,
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n\
         Content-Length: {}\r\n\r\n{body}",
        body.len()
    )?;
    let mut lines = BufReader::new(stream).lines();
    let status = lines.next().context("no answer")??;
    ensure!(status.contains("200"), "{status}");
    lines.find(|line| line.as_ref().is_ok_and(|line| line.starts_with("data: "))).context("no first chunk")??;
    Ok(lines)
}

/// Reads the rest, and sees that it says that it was cut.
fn is_cut(lines: Lines<BufReader<TcpStream>>) -> anyhow::Result<()> {
    let chunks: Vec<String> = lines.map_while(Result::ok).filter(|line| line.starts_with("data: ")).collect();
    let last = chunks.last().context("nothing more")?;
    ensure!(last.contains("\"error\""), "the last event is no error: {last}");
    ensure!(!chunks.iter().any(|chunk| chunk == "data: [DONE]"), "it looks whole");
    Ok(())
}

fn spec(cluster: &Cluster, drain_ms: i64) -> DeploymentSpec {
    DeploymentSpec {
        context_tokens: Some(8192),
        drain_timeout_ms: Some(drain_ms),
        stop_grace_ms: Some(1_000),
        ..cluster.spec("tiny", 1)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn when_its_drain_is_over_and_when_its_instance_is_stopped_by_force() -> anyhow::Result<()> {
    let cluster = Cluster::start(Plan::default()).await?;
    cluster.deploy(spec(&cluster, 500)).await?;
    let stream = begin(&cluster)?;
    cluster.delete("tiny").await?;
    is_cut(stream)?;

    // With a drain that no test would wait for.
    let instance = cluster.deploy(spec(&cluster, 3_600_000)).await?.remove(0);
    let stream = begin(&cluster)?;
    for force in [false, true] {
        let mut command = Command::new(program("drover"));
        command.args(["--coordinators", &cluster.coordinators[0].grpc, "--join-secret-file"]);
        command.arg(cluster.folder().join("secret")).args(["processes", "stop", &instance.id]);
        let output = command.args(force.then_some("--force")).output()?;
        ensure!(output.status.success(), "{force}: {}", String::from_utf8_lossy(&output.stderr));
    }
    is_cut(stream)?;
    eventually("nothing is left of the one that was stopped", SOON, async || {
        let left = servers_with(&instance.id);
        ensure!(left.is_empty(), "{left:?}");
        Ok(())
    })
    .await?;
    cluster.delete("tiny").await?;
    cluster.end().await
}
