//! An agent dies at each numbered step of a start, a stop and an adoption, of the restart of a crashed server, and of a
//! raise of the token (the table is in `drover_shim::failpoint`); the next one brings the instance to where it is wanted,
//! without a second server and without one that no record names.
#![allow(clippy::disallowed_methods, clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr)]
#![allow(missing_docs, reason = "a test")]

mod support;
use drover_proto::{
    status::reason,
    v1::{EndRun, InstanceState, StatusReport, Token},
};
use nix::sys::signal::Signal;
use std::{sync::Arc, time::Duration};
use support::{
    Answer, Node, llama_server, signal, tiny, wait_for,
    watcher::{self, Watcher},
};
use tokio::{sync::Semaphore, task::JoinSet};

const ID: &str = "tiny-234567";
/// Nodes at a time.
const AT_ONCE: usize = 4;
/// Steps that a shim reaches: it is held there while its agent is killed and the next one begins.
const OF_THE_SHIM: [&str; 9] = [
    "start.locked",
    "start.forked",
    "start.recorded",
    "start.checked",
    "start.released",
    "start.confirmed",
    "stop.seen",
    "stop.tree-ended",
    "stop.exit-written",
];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Then {
    /// The next agent resumes the session: it is wanted.
    Wanted,
    /// The session has run out meanwhile, and the instance is offered again.
    Expired,
    /// It is not wanted any more.
    Unwanted,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Action {
    Start,
    Stop,
    Adoption,
    /// Its server is killed, and started again.
    Restart,
    /// Its session runs out, and it is claimed again under a higher token.
    Raise,
}

impl Action {
    fn steps(self) -> Vec<&'static str> {
        let begin_with = |prefix: &'static str| drover_shim::failpoint::names().filter(move |n| n.starts_with(prefix));
        match self {
            Self::Start => begin_with("start.").collect(),
            Self::Stop => begin_with("stop.").collect(),
            Self::Adoption => begin_with("adopt.").collect(),
            // The end is seen first; the claim stands already.
            Self::Restart => ["stop.ended", "stop.settled"]
                .into_iter()
                .chain(begin_with("start.").filter(|step| !["start.claimed", "start.claim-written"].contains(step)))
                .collect(),
            Self::Raise => begin_with("raise.").collect(),
        }
    }
}

/// Restarts without long pauses: what is tested is where they lead.
const CONFIG: &str = "[restarts]\nbackoff_first_ms = 50\nbackoff_max_ms = 400\nquick_ends_max = 50\n";

/// All steps of an action, each with each fate.
async fn all(action: Action) {
    let steps = action.steps();
    assert!(steps.len() >= 4, "{steps:?}");
    let gate = Arc::new(Semaphore::new(AT_ONCE));
    let mut cases = JoinSet::new();
    for step in steps {
        for then in [Then::Wanted, Then::Expired, Then::Unwanted] {
            let gate = gate.clone();
            cases.spawn(async move {
                let _turn = gate.acquire().await.unwrap();
                eprintln!("{action:?} {step} {then:?}");
                case(action, step, then).await;
            });
        }
    }
    while let Some(ended) = cases.join_next().await {
        ended.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn of_a_start() {
    all(Action::Start).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_a_stop() {
    all(Action::Stop).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_an_adoption() {
    all(Action::Adoption).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_a_restart_after_a_crash() {
    all(Action::Restart).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_a_raise_of_the_token() {
    all(Action::Raise).await;
}

async fn case(action: Action, step: &'static str, then: Then) {
    let what = format!("{action:?} {step} {then:?}");
    let point = (step, if OF_THE_SHIM.contains(&step) { "pause" } else { "kill" });
    let armed = matches!(action, Action::Start | Action::Stop).then_some(point);
    let mut node = Node::armed(CONFIG, armed).await;
    let watcher = Watcher::start(node.root.path(), &llama_server());
    let shim = match action {
        Action::Start => {
            node.coordinator.offer(ID, tiny());
            dies(&mut node).await
        }
        Action::Stop => {
            node.run(ID).await;
            node.coordinator.stop(ID);
            dies(&mut node).await
        }
        Action::Adoption => {
            node.run(ID).await;
            node.kill_agent();
            node.fail_point = Some(point);
            node.spawn_agent();
            dies(&mut node).await
        }
        Action::Restart | Action::Raise => {
            let before = node.run(ID).await;
            // The fail-point is for the second start or claim alone.
            node.kill_agent();
            node.fail_point = Some(point);
            let reports = node.coordinator.state().reports.len();
            node.start_agent().await;
            let told = || (node.coordinator.state().reports.len() > reports).then_some(());
            wait_for(&format!("{what}: the second agent's report"), told).await;
            if action == Action::Restart {
                signal(before.pid, Signal::SIGKILL);
            } else {
                node.coordinator.expire();
            }
            dies(&mut node).await
        }
    };
    let owned = node.coordinator.state().owned.get(ID).cloned();
    let token = owned.as_ref().and_then(|owned| owned.token).unwrap_or_default();
    fate(&node, action, then);
    let before = node.coordinator.state().reports.len();
    node.start_agent().await;
    if let Some(shim) = shim {
        signal(i64::from(shim), Signal::SIGCONT);
    }
    if then == Then::Unwanted || (action, then) == (Action::Stop, Then::Expired) {
        wait_for(&format!("{what}: the claim to go"), || {
            (!node.coordinator.state().owned.contains_key(ID)).then_some(())
        })
        .await;
        node.nothing_left(ID, &what).await;
    } else {
        serves(&node, &what, before, token).await;
        assert!(watcher.looked_at() > 0, "{what}: the watcher saw nothing");
    }
    watcher.saw_no_fault(&what);
}

/// The agent ends at the step; or the shim is held there, its pid is returned, and the agent is killed meanwhile.
async fn dies(node: &mut Node) -> Option<i32> {
    if node.fail_point.is_some_and(|(_, what)| what == "kill") {
        node.died().await;
        return None;
    }
    let shim = node.paused().await;
    node.kill_agent();
    node.fail_point = None;
    Some(shim)
}

/// What the coordinator does while there is no agent.
fn fate(node: &Node, action: Action, then: Then) {
    let claimed = node.coordinator.state().owned.contains_key(ID);
    match (action, then) {
        (Action::Stop, Then::Expired) => {
            node.coordinator.expire();
            let mut state = node.coordinator.state();
            state.end_runs = vec![EndRun { instance: ID.to_owned(), ..EndRun::default() }];
            state.answers.extend([Answer::Refuse(reason::NOT_FOUND); 100]);
        }
        // Wanted again before anybody is there to hear it.
        (Action::Stop, Then::Wanted) if claimed => {
            node.coordinator.change(|state| state.owned.get_mut(ID).unwrap().wanted = true);
        }
        (_, Then::Expired) => node.coordinator.expire(),
        (_, Then::Unwanted) if claimed => node.coordinator.stop(ID),
        (_, Then::Wanted | Then::Unwanted) => {}
    }
}

/// It is ready under the token or its successor, with one process. Offered again, as a leader does, while nobody has it.
async fn serves(node: &Node, what: &str, before: usize, token: Token) {
    let mut offers = tokio::time::interval(Duration::from_millis(200));
    let ready: StatusReport = tokio::time::timeout(support::PATIENCE, async {
        loop {
            let found = {
                let state = node.coordinator.state();
                let last = state.reports[before..].iter().rev().find(|r| r.instance == ID).cloned();
                let owned = state.owned.get(ID).and_then(|owned| owned.token);
                last.filter(|r| r.state() == InstanceState::Ready && r.token == owned)
            };
            if let Some(report) = found {
                return report;
            }
            offers.tick().await;
            if !node.coordinator.state().owned.contains_key(ID) {
                node.coordinator.offer(ID, tiny());
            }
        }
    })
    .await
    .unwrap_or_else(|_| {
        panic!("{what}: it does not serve; reports {:?}\n{}", node.coordinator.state().reports, node.log())
    });
    assert!(ready.token >= Some(token), "{what}: {ready:?}, before {token}");
    let record = node.record(ID);
    assert_eq!(i64::from(record.process.pid), ready.pid, "{what}");
    assert_eq!(
        Some((record.token.generation, record.token.revision)),
        ready.token.map(|t| (t.generation, t.revision)),
        "{what}: the record has not the token of the claim"
    );
    let servers: Vec<i32> =
        watcher::servers(node.root.path(), &llama_server()).into_iter().map(|(pid, _)| pid).collect();
    assert_eq!(servers, [record.process.pid], "{what}");
}
