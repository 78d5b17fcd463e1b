//! `on_lease_lost`: where a deployment says "stop", a server is over before its node's lease is, whatever has become of agent
//! and coordinator; where it says nothing or "keep" it lives on. Who is back in time finds both.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test")]

mod support;
use drover_proto::{
    status::reason,
    v1::{DeploymentSpec, InstanceState, OnLeaseLost, StatusReport},
};
use drover_shim::{
    clock, failpoint,
    lease::{self, Times},
    record::{self, Exit, LEASED_FORMAT, RECORD_FORMAT},
};
use nix::sys::signal::Signal;
use std::time::Duration;
use support::{Answer, Node, ask, is_alive, signal, tiny, wait_for};

const STOP: &str = "stop-234567";
const KEEP: &str = "keep-234567";

fn stop() -> DeploymentSpec {
    DeploymentSpec { on_lease_lost: OnLeaseLost::Stop.into(), ..tiny() }
}

struct Fleet {
    node: Node,
    stop: StatusReport,
    keep: StatusReport,
}

impl Fleet {
    /// A node that serves both, under a lease of so many milliseconds.
    async fn of(ttl_ms: i64) -> Self {
        let mut node = Node::idle("").await;
        node.coordinator.state().ttl_ms = ttl_ms;
        node.start_agent().await;
        node.coordinator.offer(STOP, stop());
        node.coordinator.offer(KEEP, tiny());
        let stop = node.reported(STOP, InstanceState::Ready).await;
        let keep = node.reported(KEEP, InstanceState::Ready).await;
        assert_eq!((node.record(STOP).format, node.record(KEEP).format), (LEASED_FORMAT, RECORD_FORMAT));
        Self { node, stop, keep }
    }

    fn times(&self) -> Times {
        lease::read(&self.node.directory(STOP).lease()).unwrap()
    }

    /// Waits for the end of the one; says until when its lease was known to live, and when it has ended, both by the clock of
    /// the lease and as recorded.
    async fn ended(&self) -> (Times, u64) {
        wait_for("the end of the server", || (!is_alive(self.stop.pid)).then_some(())).await;
        let path = self.node.directory(STOP).exit();
        let exit = wait_for("the record of the end", || record::read::<Exit>(&path).ok()).await;
        assert!(exit.lease_lost && exit.signal.is_some_and(|s| s == 15 || s == 9) || exit.code == Some(0), "{exit:?}");
        let ago_ms = u64::try_from(clock::unix_ms() - exit.ended_at_ms).unwrap();
        (self.times(), clock::boottime_ns() - ago_ms * 1_000_000)
    }

    /// It was over before the lease, and not sooner than it had to be; the other lives.
    async fn ended_in_time(&self) {
        let (times, ended_ns) = self.ended().await;
        assert!(times.term_ns <= ended_ns + 1_000_000, "it ended too soon: {ended_ns} {times:?}");
        assert!(ended_ns < times.until_ns, "it outlived its lease: {ended_ns} {times:?}");
        assert!(is_alive(self.keep.pid), "it was to be kept");
    }

    /// It was started again, which counts for no crash loop, and the history tells why; the other was left alone.
    async fn is_back(&self) {
        let (node, before) = (&self.node, self.stop.pid);
        let again = |r: &StatusReport| r.state() == InstanceState::Ready && r.pid != before;
        node.report("the next server", STOP, again).await;
        wait_for("its history", || (!node.events(STOP, "LeaseLost").is_empty()).then_some(())).await;
        let told = node.events(STOP, "LeaseLost");
        assert!(told.len() == 1 && told[0].contains("its lease was not renewed in time"), "{told:?}");
        let all: Vec<_> = node.events(STOP, "BackOff");
        assert!(!all.iter().any(|message| message.contains("crash loop")), "{all:?}");
        let kept = node.reported(KEEP, InstanceState::Ready).await;
        assert!(kept.pid == self.keep.pid && is_alive(kept.pid));
        assert_eq!(node.events(KEEP, "LeaseLost"), Vec::<String>::new());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn when_its_agent_is_killed_and_does_not_come_back() {
    let mut fleet = Fleet::of(3_000).await;
    fleet.node.kill_agent();
    fleet.ended_in_time().await;
    // The session has run out meanwhile. The next agent owns nothing, so it starts nothing, until it claims it.
    let claims = fleet.node.coordinator.state().claims.len();
    fleet.node.coordinator.expire();
    fleet.node.start_agent().await;
    wait_for("the other to be claimed again", || {
        fleet.node.coordinator.state().claims[claims..].iter().any(|claim| claim.instance == KEEP).then_some(())
    })
    .await;
    wait_for("the history", || (!fleet.node.events(STOP, "LeaseLost").is_empty()).then_some(())).await;
    wait_for("its files to go", || (!fleet.node.directory(STOP).path().exists()).then_some(())).await;
    fleet.node.coordinator.offer(STOP, stop());
    fleet.is_back().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn but_not_when_an_agent_is_back_in_time() {
    let mut fleet = Fleet::of(30_000).await;
    let before = fleet.times();
    fleet.node.kill_agent();
    fleet.node.start_agent().await;
    // The one after the last that the first agent could have been promised.
    wait_for("a renewal by the next agent", || (fleet.times().until_ns > before.until_ns).then_some(())).await;
    for (id, pid) in [(STOP, fleet.stop.pid), (KEEP, fleet.keep.pid)] {
        assert_eq!(fleet.node.reported(id, InstanceState::Ready).await.pid, pid);
        assert!(is_alive(pid));
    }
    // And it ends with the lease that the next agent had.
    fleet.node.kill_agent();
    assert!(is_alive(fleet.stop.pid));
}

#[tokio::test(flavor = "multi_thread")]
async fn when_its_agent_is_halted_for_longer_than_that() {
    let fleet = Fleet::of(3_000).await;
    let agent = i64::from(fleet.node.agent.as_ref().unwrap().id());
    signal(agent, Signal::SIGSTOP);
    fleet.ended_in_time().await;
    fleet.node.coordinator.expire();
    signal(agent, Signal::SIGCONT);
    wait_for("the other's claim", || fleet.node.coordinator.state().owned.contains_key(KEEP).then_some(())).await;
    if !fleet.node.coordinator.state().owned.contains_key(STOP) {
        fleet.node.coordinator.offer(STOP, stop());
    }
    fleet.is_back().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn when_no_coordinator_answers_and_requests_go_elsewhere_before() {
    // Long enough to see what happens in between.
    let fleet = Fleet::of(8_000).await;
    assert_eq!((ask(&fleet.node, STOP).await, ask(&fleet.node, KEEP).await), (200, 200));
    fleet.node.coordinator.change(|state| state.answering = false);
    let mut statuses = Vec::new();
    let unrouted_ns = loop {
        let status = ask(&fleet.node, STOP).await;
        statuses.push(status);
        if status != 200 {
            break clock::boottime_ns();
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    let times = fleet.times();
    assert!(
        times.drain_ns <= unrouted_ns && unrouted_ns < times.term_ns && is_alive(fleet.stop.pid),
        "{unrouted_ns} {times:?} {:?}",
        statuses.last()
    );
    fleet.ended_in_time().await;
    assert_eq!(ask(&fleet.node, KEEP).await, 200);
    let token = fleet.stop.token;
    fleet.node.coordinator.change(|state| state.answering = true);
    fleet.is_back().await;
    assert_eq!(fleet.node.reported(STOP, InstanceState::Ready).await.token, token, "the claim had stood all the while");
}

#[tokio::test(flavor = "multi_thread")]
async fn and_a_claim_that_is_lost_while_the_session_lives_is_no_lost_lease() {
    let fleet = Fleet::of(3_000).await;
    let node = &fleet.node;
    node.coordinator.state().answers.extend([Answer::Refuse(reason::ALREADY_CLAIMED); 1000]);
    let before = fleet.times();
    node.coordinator.change(|state| drop(state.owned.remove(STOP)));
    wait_for("more than its time", || (clock::boottime_ns() > before.until_ns + 1_000_000_000).then_some(())).await;
    assert!(is_alive(fleet.stop.pid) && is_alive(fleet.keep.pid));
    assert!(fleet.times().until_ns > before.until_ns);
    // With the session it is lost: the next one does not cover it.
    node.coordinator.expire();
    fleet.ended_in_time().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn and_one_that_is_claimed_again_goes_on_under_the_next_lease() {
    let fleet = Fleet::of(3_000).await;
    let before = fleet.times();
    fleet.node.coordinator.expire();
    let again = |r: &StatusReport| r.token > fleet.stop.token;
    assert_eq!(fleet.node.report("the higher token", STOP, again).await.pid, fleet.stop.pid);
    wait_for("more than its time", || (clock::boottime_ns() > before.until_ns + 1_000_000_000).then_some(())).await;
    assert!(is_alive(fleet.stop.pid));
}

#[tokio::test(flavor = "multi_thread")]
async fn and_a_file_that_is_lost_or_damaged_is_made_good_by_the_next_renewal() {
    let fleet = Fleet::of(3_000).await;
    let path = fleet.node.directory(STOP).lease();
    for damage in [Some("no lease\n"), None] {
        let before = fleet.times();
        match damage {
            Some(text) => std::fs::write(&path, text).unwrap(),
            None => std::fs::remove_file(&path).unwrap(),
        }
        wait_for("it to be made good", || {
            lease::read(&path).ok().filter(|times| times.until_ns > before.until_ns).map(drop)
        })
        .await;
    }
    assert!(is_alive(fleet.stop.pid));
}

#[tokio::test(flavor = "multi_thread")]
async fn and_a_shim_that_could_not_see_to_it_is_not_given_one() {
    let mut node = Node::idle("").await;
    node.environment = vec![(failpoint::FORMAT_VARIABLE, RECORD_FORMAT.to_string())];
    node.start_agent().await;
    node.coordinator.offer(STOP, stop());
    let refused = |r: &StatusReport| r.state() == InstanceState::Backoff && r.message.contains("upgrade it");
    let refused = node.report("the refusal", STOP, refused).await;
    assert!(refused.message.contains("on_lease_lost = \"stop\" needs a drover-shim of this agent's version"));
    assert_eq!(node.run(KEEP).await.state(), InstanceState::Ready, "one that it can keep is kept by it");
}

#[tokio::test(flavor = "multi_thread")]
async fn and_an_agent_ends_one_whose_shim_is_dead() {
    let fleet = Fleet::of(3_000).await;
    let shims = fleet.node.processes(STOP);
    let shim = shims.into_iter().map(i64::from).find(|pid| *pid != fleet.stop.pid).unwrap();
    signal(shim, Signal::SIGKILL);
    fleet.node.coordinator.change(|state| state.answering = false);
    wait_for("the end of the server", || (!is_alive(fleet.stop.pid)).then_some(())).await;
    let (now_ns, times) = (clock::boottime_ns(), fleet.times());
    assert!(now_ns >= times.kill_ns, "{now_ns} {times:?}");
    assert!(is_alive(fleet.keep.pid));
}
