//! A server whose grandchild has left its group, its session and its parent, and ignores SIGTERM: with the server it ends
//! too, by their cgroup, also when the shim was killed before. Nothing is ended in a cgroup that is not the recorded one.
//!
//! Needs a cgroup of version 2 that this user may write to: to be root, or a unit or scope with Delegate=yes.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test")]

mod support;
use drover_agent::{host::cgroup, instance::run};
use drover_proto::v1::{DeploymentSpec, InstanceState, StatusReport};
use drover_shim::{
    cgroup::{Cgroup, place},
    durable, identity, membership,
    record::{Record, Token},
};
use nix::sys::signal::Signal;
use std::{
    fs,
    path::PathBuf,
    process::{Child, Command},
};
use support::{Node, is_alive, misbehaving, signal, tiny, wait_for};

const ID: &str = "tiny-234567";

/// A node whose server has such a grandchild: its report, the grandchild, the shim and their cgroup.
struct Family {
    node: Node,
    ready: StatusReport,
    grandchild: i64,
    shim: i64,
    cgroup: PathBuf,
}

impl Family {
    async fn start(config: &str) -> Self {
        let mut node = Node::idle("").await;
        let child = node.path("child");
        node.config = format!(
            "{config}\n[llama_server_environment]\nMISBEHAVE = 'fugitive'\nCHILD_FILE = '{}'\n",
            child.display()
        );
        node.program = misbehaving();
        node.start_agent().await;
        node.coordinator.offer(ID, DeploymentSpec { stop_grace_ms: Some(200), ..tiny() });
        let ready = node.reported(ID, InstanceState::Ready).await;
        let grandchild: i64 = fs::read_to_string(child).unwrap().trim().parse().unwrap();
        let shim = node.processes(ID).into_iter().map(i64::from).find(|pid| *pid != ready.pid).expect("a shim");
        let of = identity::stat(i32::try_from(grandchild).unwrap()).unwrap();
        assert_ne!(i64::from(of.session), ready.pid, "else this test proves nothing");
        let cgroup = node.record(ID).cgroup.map(|cgroup| cgroup.path).unwrap_or_default();
        Self { node, ready, grandchild, shim, cgroup }
    }

    fn procs(&self) -> Vec<i64> {
        let text = fs::read_to_string(self.cgroup.join("cgroup.procs")).unwrap();
        text.lines().map(|line| line.parse().unwrap()).collect()
    }

    async fn all_gone(&self) {
        wait_for("the grandchild's end", || (!is_alive(self.grandchild)).then_some(())).await;
        // Killed together, they are gone one after the other.
        wait_for("the server's end", || (!is_alive(self.ready.pid)).then_some(())).await;
        wait_for("the cgroup to go", || (!self.cgroup.exists()).then_some(())).await;
        wait_for("its folder to go", || (!self.cgroup.parent().unwrap().exists()).then_some(())).await;
    }
}

fn needs_cgroups(family: &Family) {
    let log = family.node.log();
    assert!(family.cgroup.is_absolute(), "run this test as root or in a scope with Delegate=yes: {log}");
}

/// As somebody says whose handle of it has failed.
#[tokio::test(flavor = "multi_thread")]
async fn but_not_when_it_is_only_said_to_have_ended() {
    let family = Family::start("").await;
    needs_cgroups(&family);
    let node = &family.node;
    run::ended(&node.directory(ID), Some(&node.record(ID))).await;
    assert!(is_alive(family.ready.pid) && is_alive(family.grandchild));
    node.coordinator.stop(ID);
    family.all_gone().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn when_it_is_stopped() {
    let family = Family::start("").await;
    needs_cgroups(&family);
    let (node, procs) = (&family.node, family.procs());
    assert!(procs.contains(&family.ready.pid) && procs.contains(&family.grandchild), "{procs:?}");
    assert!(!procs.contains(&family.shim), "its shim has to outlive it");
    node.coordinator.stop(ID);
    let stopped = node.reported(ID, InstanceState::Stopped).await;
    assert_eq!(stopped.exit_signal, Some(9), "the end of the grace");
    family.all_gone().await;
    node.nothing_left(ID, "stopped").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn when_it_is_stopped_and_its_shim_is_dead() {
    let family = Family::start("").await;
    needs_cgroups(&family);
    signal(family.shim, Signal::SIGKILL);
    wait_for("the shim's end", || (!is_alive(family.shim)).then_some(())).await;
    family.node.coordinator.stop(ID);
    family.node.reported(ID, InstanceState::Stopped).await;
    family.all_gone().await;
    family.node.nothing_left(ID, "stopped without a shim").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn when_it_ended_while_neither_shim_nor_agent_looked() {
    let mut family = Family::start("").await;
    needs_cgroups(&family);
    family.node.kill_agent();
    signal(family.shim, Signal::SIGKILL);
    signal(family.ready.pid, Signal::SIGKILL);
    wait_for("its end", || (!is_alive(family.ready.pid)).then_some(())).await;
    assert!(is_alive(family.grandchild));
    family.node.start_agent().await;
    wait_for("the grandchild's end", || (!is_alive(family.grandchild)).then_some(())).await;
    let pid = family.ready.pid;
    family.node.report("the next server", ID, |r| r.state() == InstanceState::Ready && r.pid != pid).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn by_drover_agent_down() {
    let mut family = Family::start("").await;
    needs_cgroups(&family);
    family.node.kill_agent();
    signal(family.shim, Signal::SIGKILL);
    let mut down = Command::new(env!("CARGO_BIN_EXE_drover-agent"));
    let down = down.args(["down", "--state-dir"]).arg(family.node.path("state")).status().unwrap();
    assert!(down.success());
    family.all_gone().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_cgroups_its_shim_ends_it() {
    for (config, told) in [("cgroup_root = 'off'", 0), ("cgroup_root = '/sys/fs/no-such-cgroup'", 1)] {
        let family = Family::start(config).await;
        assert_eq!(family.node.record(ID).cgroup, None);
        let warned = |f: &Family| f.node.coordinator.state().events.iter().filter(|e| e.reason == "NoCgroups").count();
        wait_for("the one warning", || (warned(&family) == told).then_some(())).await;
        family.node.coordinator.stop(ID);
        family.node.reported(ID, InstanceState::Stopped).await;
        wait_for("the grandchild's end", || (!is_alive(family.grandchild)).then_some(())).await;
        assert_eq!(warned(&family), told);
    }
}

/// A process in a cgroup that was made for a run.
struct Other {
    child: Child,
    base: PathBuf,
    record: Record,
}

impl Other {
    async fn start(name: &str) -> Self {
        let own = membership::of(i32::try_from(std::process::id()).unwrap()).unified.expect("a cgroup of version 2");
        let base = own.join(format!("drover-test-{}-{name}", std::process::id())).join("agent");
        let child = Command::new("sleep").arg("600").spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let token = Token { generation: 1, revision: 5 };
        let cgroup = place(&base, ID, token, pid).expect("run this test as root or in a scope with Delegate=yes");
        let mut node = Node::start().await;
        node.run(ID).await;
        let record = Record { token, cgroup: Some(cgroup), ..node.record(ID) };
        node.kill_agent();
        Self { child, base, record }
    }

    fn spared(&mut self, what: &str, record: &Record) {
        cgroup::kill(record).unwrap();
        assert!(cgroup::is_ended(record), "{what}");
        // A SIGKILL that was sent would be seen in a moment; the right record shows below that it can be.
        std::thread::yield_now();
        assert!(is_alive(i64::from(self.child.id())) && self.child.try_wait().unwrap().is_none(), "{what}");
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if let Some(cgroup) = &self.record.cgroup {
            let _ = fs::remove_dir(&cgroup.path);
        }
        drover_shim::cgroup::clear_base(Some(&self.base));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn and_nothing_that_is_not_its_own() {
    let mut other = Other::start("own").await;
    let right = other.record.clone();
    let cgroup = right.cgroup.clone().unwrap();
    let boot = identity::Process { boot_id: "another".to_owned(), ..right.process.clone() };
    other.spared("of another boot", &Record { process: boot, ..right.clone() });
    other.spared("of another instance", &Record { instance: "tiny-333333".to_owned(), ..right.clone() });
    let lower = Token { generation: 1, revision: 4 };
    other.spared("of a run under a higher token", &Record { token: lower, ..right.clone() });
    let again = Cgroup { id: cgroup.id + 1, ..cgroup.clone() };
    other.spared("made again under the same name", &Record { cgroup: Some(again), ..right.clone() });
    let above = Cgroup { path: other.base.clone(), id: fs_id(&other.base) };
    other.spared("one that holds others", &Record { cgroup: Some(above), ..right.clone() });
    other.spared("recorded by a shim that knew of none", &Record { cgroup: None, ..right.clone() });
    // And the right one is ended, so that the test can tell.
    assert_eq!(Cgroup::of(i32::try_from(other.child.id()).unwrap(), &other.base, ID), Some(cgroup));
    cgroup::kill(&right).unwrap();
    let ended = wait_for("its end", || other.child.try_wait().unwrap()).await;
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&ended), Some(9));
    assert!(cgroup::is_ended(&right) && !right.cgroup.unwrap().path.exists());
}

fn fs_id(path: &std::path::Path) -> u64 {
    std::os::unix::fs::MetadataExt::ino(&fs::metadata(path).unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cgroup_that_no_record_names_is_named_and_left_alone() {
    let mut family = Family::start("").await;
    needs_cgroups(&family);
    family.node.kill_agent();
    let stranger = Command::new("sleep").arg("600").spawn().unwrap();
    let base = family.cgroup.parent().unwrap().to_owned();
    let token = Token { generation: 1, revision: 5 };
    let cgroup = place(&base, "tiny-333333", token, i32::try_from(stranger.id()).unwrap()).unwrap();
    let mut stranger =
        Other { child: stranger, base, record: Record { cgroup: Some(cgroup), ..family.node.record(ID) } };
    fs::create_dir(family.cgroup.with_file_name("tiny-444444@1.1")).unwrap();
    family.node.start_agent().await;
    let pid = stranger.child.id().to_string();
    wait_for("the event", || {
        let events = family.node.coordinator.state().events.clone();
        events.iter().any(|e| e.reason == "UnnamedCgroup" && e.message.contains(&pid)).then_some(())
    })
    .await;
    assert!(stranger.child.try_wait().unwrap().is_none(), "it was ended");
    assert!(!family.cgroup.with_file_name("tiny-444444@1.1").exists(), "the empty one stays");
    assert!(is_alive(family.grandchild), "the recorded one is in use");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_record_that_was_lost_names_it_again() {
    let mut family = Family::start("").await;
    needs_cgroups(&family);
    family.node.kill_agent();
    let before = family.node.record(ID).cgroup;
    fs::remove_file(family.node.directory(ID).record()).unwrap();
    family.node.start_agent().await;
    let found = wait_for("the record", || durable::read::<Record>(&family.node.directory(ID).record()).ok()).await;
    assert_eq!(found.cgroup, before);
}
