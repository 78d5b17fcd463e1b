//! SIGKILL of the leading coordinator: streams, servers, claims and tokens stay, and the other one does its work.

use anyhow::Context as _;
use drover_proto::v1::{Instance, WatchEventsRequest};
use drover_tests::{
    cluster::{Cluster, Plan, SOON},
    gateway::Gateway,
    programs::{eventually, program},
};
use serde_json::json;
use std::{
    fs::File,
    path::Path,
    process::{Child, Command, Stdio},
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_coordinator_is_not_missed() -> anyhow::Result<()> {
    let mut cluster = Cluster::start(Plan { coordinators: 2, agents: 2, ..Plan::default() }).await?;
    let mut spec = cluster.spec("tiny", 2);
    spec.context_tokens = Some(8192);
    let before = standing(&cluster.deploy(spec).await?);
    let leader = leader(&cluster).await?;
    let leading = cluster.coordinators.remove(leader);
    // From here on the first and only coordinator of the fleet is the one that did not lead.
    let addresses = format!("{},{}", leading.grpc, cluster.coordinators[0].grpc);
    let followed = cluster.folder().join("followed");
    let follower = Follower::start(&cluster, &addresses, &followed)?;
    told(&followed, "tiny").await?;
    let mut killed = leading.running;
    let gateway = Gateway::new(&cluster.coordinators[0].http);
    let request = json!({
        "model": "tiny", "stream": true, "max_tokens": 3000, "temperature": 0, "seed": 1,
        "messages": [{ "role": "user", "content": "Tell a long story." }],
    });
    let undisturbed = gateway.stream_chat(&request, |_| {}).await?;
    let disturbed = gateway
        .stream_chat(&request, |text| {
            if text.len() > 100
                && let Some(mut running) = killed.take()
            {
                running.kill().expect("the coordinator is killed");
            }
        })
        .await?;
    assert!(killed.is_none(), "it was killed while the stream ran");
    assert_eq!(disturbed, undisturbed);

    // A change needs a new leader and sessions of the agents with it.
    cluster.deploy(cluster.spec("later", 2)).await?;
    cluster.connected(2).await?;
    // `drover events --follow` was connected to the one that was killed.
    told(&followed, "later").await?;
    let text = drover(&cluster, &addresses, &["scale", "later", "1", "--wait"])?;
    assert!(text.contains("later is ready: 1 instance answers"), "{text}");
    assert!(
        !gateway
            .stream_chat(
                &json!({ "model": "later", "stream": true, "max_tokens": 20,
        "messages": [{ "role": "user", "content": "Hi" }] }),
                |_| {}
            )
            .await?
            .is_empty()
    );
    assert_eq!(standing(&cluster.ready("tiny", 2).await?), before, "nothing was restarted or claimed anew");

    drop(follower);
    cluster.delete("later").await?;
    cluster.delete("tiny").await?;
    cluster.end().await
}

/// One that ends in order closes its streams with a word: whoever follows goes on at the other all the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_that_ends_in_order_is_not_missed_either() -> anyhow::Result<()> {
    let mut cluster = Cluster::start(Plan { coordinators: 2, ..Plan::default() }).await?;
    let addresses = format!("{},{}", cluster.coordinators[0].grpc, cluster.coordinators[1].grpc);
    cluster.deploy(cluster.spec("tiny", 1)).await?;
    let followed = cluster.folder().join("followed");
    let follower = Follower::start(&cluster, &addresses, &followed)?;
    told(&followed, "tiny").await?;
    cluster.stop_coordinator(0).await?;
    cluster.asked = 1;
    cluster.deploy(cluster.spec("later", 1)).await?;
    told(&followed, "later").await?;
    drop(follower);
    cluster.delete("later").await?;
    cluster.delete("tiny").await?;
    cluster.end().await
}

/// What must not change of an instance, in the order of ids.
fn standing(instances: &[Instance]) -> Vec<String> {
    let line =
        |i: &Instance| format!("{} on {}, pid {}, token {:?}, {} restarts", i.id, i.node, i.pid, i.token, i.restarts);
    instances.iter().map(line).collect()
}

/// Index of the coordinator that plans: the one whose event says that an instance was created.
async fn leader(cluster: &Cluster) -> anyhow::Result<usize> {
    let source = eventually("an event names the leader", SOON, async || {
        let request = WatchEventsRequest { object: "instance/".to_owned(), after_revision: 0, follow: false };
        let mut events = cluster.client(0).await?.watch_events(request).await?.into_inner();
        while let Some(answer) = events.message().await? {
            if let Some(event) = answer.event.filter(|e| e.reason == "Created") {
                return Ok(event.source);
            }
        }
        anyhow::bail!("no instance was created")
    })
    .await?;
    let n = source.strip_prefix("coordinator/coordinator-").with_context(|| source.clone())?;
    Ok(n.parse()?)
}

/// The command with the addresses of all coordinators, the dead one first.
fn command(cluster: &Cluster, addresses: &str, words: &[&str]) -> Command {
    let mut command = Command::new(program("drover"));
    command.args(["--coordinators", addresses, "--join-secret-file"]).arg(cluster.folder().join("secret")).args(words);
    command
}

fn drover(cluster: &Cluster, addresses: &str, words: &[&str]) -> anyhow::Result<String> {
    let output = command(cluster, addresses, words).output()?;
    let told = String::from_utf8_lossy(&output.stderr);
    anyhow::ensure!(output.status.success(), "drover {words:?} ended with {}: {told}", output.status);
    Ok(String::from_utf8(output.stdout)?)
}

/// `drover events --follow`, writing into a file.
struct Follower(Child);

impl Follower {
    fn start(cluster: &Cluster, addresses: &str, file: &Path) -> anyhow::Result<Self> {
        let file = File::create(file)?;
        let mut command = command(cluster, addresses, &["events", "--follow", "--object", "deployment/"]);
        Ok(Self(command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file).spawn()?))
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Waits until the follower has told that a deployment was applied.
async fn told(file: &Path, deployment: &str) -> anyhow::Result<()> {
    eventually(&format!("the follower tells of {deployment}"), SOON, async || {
        let text = std::fs::read_to_string(file)?;
        let line = format!("deployment/{deployment}  Applied");
        anyhow::ensure!(text.contains(&line), "{text}");
        Ok(())
    })
    .await
}
