//! A thousand starts and stops in quick succession, wanted again, unwanted and killed at any moment, all end as asked last:
//! no process, no lock, no socket, no file, no cgroup and no descriptor of the agent is left.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr)]
#![allow(missing_docs, reason = "a test")]

mod support;
use drover_proto::v1::{InstanceState, StatusReport};
use nix::sys::signal::{Signal, kill};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};
use support::{
    Node, llama_server, tiny, wait_for,
    watcher::{self, Watcher},
};
use tokio::{task::JoinSet, time::sleep};

const CYCLES: u32 = 1_000;
/// Between two offers of one that nobody has.
const OFFER_AGAIN: Duration = Duration::from_millis(200);
/// Instances at a time.
const AT_ONCE: u64 = 6;
/// Restarts without long pauses, however often a server is killed: what is tested is where they lead.
const CONFIG: &str = "[restarts]\nbackoff_first_ms = 5\nbackoff_max_ms = 20\nquick_ends_max = 1000\n";

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_of_them() {
    let seed: u64 = std::env::var("DROVER_TEST_SEED").map_or_else(|_| rand::random(), |text| text.parse().unwrap());
    eprintln!("again with: DROVER_TEST_SEED={seed}");
    let node = Arc::new(Node::with(CONFIG).await);
    let watcher = Watcher::start(node.root.path(), &llama_server());
    let agent = node.agent.as_ref().unwrap().id();
    let descriptors = || fs::read_dir(format!("/proc/{agent}/fd")).unwrap().count();
    // The first start opens what stays open.
    node.run("warm-234567").await;
    node.coordinator.stop("warm-234567");
    node.nothing_left("warm-234567", "the first").await;
    let (before, files_before) = (descriptors(), files(&node.path("state")));

    let (begun, left, done) = (Instant::now(), Arc::new(AtomicU32::new(CYCLES)), Arc::new(AtomicU32::new(0)));
    let mut lanes = JoinSet::new();
    for lane in 0..AT_ONCE {
        let (node, left, done) = (node.clone(), left.clone(), done.clone());
        let mut random = StdRng::seed_from_u64(seed ^ lane);
        lanes.spawn(async move {
            let id = format!("lane{lane}-234567");
            let take_one = || left.try_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1)).is_ok();
            while take_one() {
                cycle(&node, &id, &mut random).await;
                let done = done.fetch_add(1, Ordering::Relaxed) + 1;
                if done.is_multiple_of(100) {
                    eprintln!("{done} cycles after {:.0} s", begun.elapsed().as_secs_f64());
                }
            }
        });
    }
    while let Some(ended) = lanes.join_next().await {
        ended.unwrap();
    }

    assert_eq!(done.load(Ordering::Relaxed), CYCLES);
    // What has stopped has given its claim back: nothing went on under its token. The report itself may be repeated.
    let stopped = |report: &StatusReport| report.state() == InstanceState::Stopped;
    let refused: Vec<_> = node.coordinator.state().refused.iter().filter(|report| !stopped(report)).cloned().collect();
    assert!(refused.is_empty(), "{refused:?}");
    assert_eq!(fs::read_dir(node.path("state/instances")).unwrap().count(), 0);
    let root = node.path("state/instances");
    let processes = watcher::processes(|words| words.iter().any(|word| word.starts_with(root.to_str().unwrap())));
    assert!(processes.is_empty(), "{processes:?}");
    let listening = fs::read_to_string("/proc/net/unix").unwrap();
    let run = format!("{}/lane", node.path("state/run").display());
    let listening: Vec<&str> = listening.lines().filter(|line| line.contains(&run)).collect();
    assert!(listening.is_empty(), "{listening:?}");
    // The spool of the agent's own spans lives on.
    let more: Vec<_> = files(&node.path("state")).difference(&files_before).cloned().collect();
    let more: Vec<_> = more.into_iter().filter(|path| !path.starts_with(node.path("state/spool"))).collect();
    assert!(more.is_empty(), "{more:?}");
    assert_eq!(cgroups(Path::new("/sys/fs/cgroup")), Vec::<String>::new());
    wait_for("the agent's descriptors to be closed", || (descriptors() <= before).then_some(())).await;
    assert!(watcher.looked_at() > 0);
    watcher.saw_no_fault("a thousand cycles");
}

/// One start and its stop; in between whatever may happen, and before the stop the server runs if that was asked for last.
async fn cycle(node: &Node, id: &str, random: &mut StdRng) {
    node.coordinator.offer(id, tiny());
    owned(node, id).await;
    // Met when just claimed, while it starts or loads, when it is ready, or anywhere in between.
    match random.random_range(0..5) {
        0 => {}
        1 => seen(node, id, InstanceState::Starting).await,
        2 => seen(node, id, InstanceState::Loading).await,
        3 => seen(node, id, InstanceState::Ready).await,
        _ => moment(random).await,
    }
    for _ in 0..random.random_range(0..3) {
        match random.random_range(0..3) {
            0 => drop(want(node, id, false)),
            1 => drop(want(node, id, true)),
            _ => end_server(node, id),
        }
        if random.random_bool(0.7) {
            moment(random).await;
        }
    }
    // Every fourth must be seen to serve after all that.
    if random.random_bool(0.25) {
        let mut offered: Option<Instant> = None;
        wait_for(&format!("{id} to serve, as was asked last"), || {
            let report = node.coordinator.last_report(id).filter(|report| report.state() == InstanceState::Ready);
            if report.is_some_and(|report| support::is_alive(report.pid)) {
                return Some(());
            }
            // Wanted, and nobody has it since its end was reported: offered again, as a leader does from time to time.
            if !want(node, id, true) && offered.is_none_or(|at| at.elapsed() > OFFER_AGAIN) {
                let mut state = node.coordinator.state();
                // One that was claimed meanwhile would be offered beside its claim.
                if !state.owned.contains_key(id) {
                    state.offer(id, tiny());
                    offered = Some(Instant::now());
                }
            }
            None
        })
        .await;
    }
    gone(node, id).await;
    assert_eq!(node.coordinator.last_report(id).unwrap().state(), InstanceState::Stopped, "{id}");
}

async fn moment(random: &mut StdRng) {
    sleep(Duration::from_micros(random.random_range(0..60_000))).await;
}

async fn owned(node: &Node, id: &str) {
    wait_for(&format!("the claim on {id}"), || node.coordinator.state().owned.contains_key(id).then_some(())).await;
}

async fn seen(node: &Node, id: &str, state: InstanceState) {
    wait_for(&format!("{id} to be {state:?}"), || {
        let owned = node.coordinator.state().owned.get(id).and_then(|owned| owned.token);
        let report = node.coordinator.last_report(id).filter(|report| report.token == owned)?;
        (i32::from(report.state()) >= i32::from(state)).then_some(())
    })
    .await;
}

/// Unwanted until the claim is gone, and everything with it.
async fn gone(node: &Node, id: &str) {
    wait_for(&format!("{id} to go"), || {
        let files = || node.directory(id).path().exists() || node.socket(id).exists();
        (!want(node, id, false) && !files() && node.processes(id).is_empty()).then_some(())
    })
    .await;
}

/// False when its end was reported: there is nothing left to want. Said once: it is for the agent to hold on to it.
fn want(node: &Node, id: &str, wanted: bool) -> bool {
    let before = node.coordinator.state().owned.get(id).map(|owned| owned.wanted);
    if before.is_some_and(|before| before != wanted) {
        node.coordinator.change(|state| state.owned.get_mut(id).into_iter().for_each(|owned| owned.wanted = wanted));
    }
    before.is_some()
}

/// SIGKILL to whichever server of this instance lives now.
fn end_server(node: &Node, id: &str) {
    for (pid, instance) in watcher::servers(node.root.path(), &llama_server()) {
        if instance == id {
            // It may have ended since.
            let _ = kill(nix::unistd::Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
}

/// All files below a folder, sockets and folders among them.
fn files(place: &Path) -> BTreeSet<PathBuf> {
    let entries = fs::read_dir(place).into_iter().flatten().flatten().map(|entry| entry.path());
    entries.flat_map(|path| files(&path).into_iter().chain([path])).collect()
}

/// cgroups that bear the name of one of the instances.
fn cgroups(place: &Path) -> Vec<String> {
    let entries = fs::read_dir(place).into_iter().flatten().flatten();
    let folders = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    let below = folders.flat_map(|entry| {
        let name = entry.file_name().to_string_lossy().into_owned();
        let mut found = cgroups(&entry.path());
        if name.contains("lane") && name.contains("-234567") {
            found.push(name);
        }
        found
    });
    below.collect()
}
