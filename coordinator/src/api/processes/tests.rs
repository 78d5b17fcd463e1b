//! Processes over a store in memory and nodes that answer what the test gives.

use super::*;
use crate::{
    control::tests::faulty::Faulty,
    store::{Change, Compare, Op, Txn, keys, memory::Memory, records, schema},
};
use drover_proto::{
    status::{reason, reason_of},
    store::v1 as record,
    v1::{CommandAnswer, ProcessAction, ProcessOwner, StopProcessRequest, node_command::Command},
};
use std::{
    sync::{Arc, atomic::Ordering::SeqCst},
    time::Duration,
};
use tokio_util::sync::CancellationToken;

struct World {
    processes: Processes,
    stop: CancellationToken,
}

impl World {
    async fn new() -> Self {
        Self::over(Arc::new(Memory::start(1))).await
    }

    async fn over(store: Store) -> Self {
        schema::open(&store, None).await.unwrap();
        let stop = CancellationToken::new();
        let view = View::start(store.clone(), stop.clone());
        let (events, _) = Events::start(store.clone(), "coordinator/test".to_owned());
        let commands = Commands::new(store.clone(), view.clone());
        Self { processes: Processes { store, view, events, commands }, stop }
    }

    async fn put(&self, key: String, value: &impl prost::Message, lease: i64) {
        let txn = Txn { compare: vec![], then: vec![records::put(key, value, lease)], otherwise: vec![] };
        let revision = self.processes.store.txn(txn).await.unwrap().revision;
        self.processes.view.at_least(revision, Duration::from_secs(10)).await.unwrap();
    }

    /// A node whose session a coordinator serves, and which answers so. Without an answer it is silent.
    async fn node(&self, name: &str, answer: impl Fn(&Command) -> Option<CommandAnswer> + Send + 'static) {
        self.put(keys::node(name), &record::Node::default(), 0).await;
        self.put(keys::session(name), &record::Session::default(), 0).await;
        let (store, prefix) = (self.processes.store.clone(), format!("{}{name}/", keys::COMMANDS));
        let mut watch = store.watch(&prefix, 1).await.unwrap();
        let name = name.to_owned();
        tokio::spawn(self.stop.clone().run_until_cancelled_owned(async move {
            loop {
                for change in watch.next().await.unwrap().changes {
                    let Change::Put(item) = change else { continue };
                    let asked: record::Command = records::decode(&item).unwrap();
                    let command = asked.command.unwrap();
                    let Some(answer) = answer(command.command.as_ref().unwrap()) else { continue };
                    let value = record::Answer { answer: Some(CommandAnswer { id: command.id.clone(), ..answer }) };
                    let put = records::put(keys::answer(&name, &command.id), &value, asked.lease);
                    let compare = vec![Compare::ModRevision(item.key.clone(), item.mod_revision)];
                    store.txn(Txn { compare, then: vec![put], otherwise: vec![] }).await.unwrap();
                }
            }
        }));
    }

    async fn deployment(&self, name: &str, replicas: i32, on: &[&str]) -> Vec<String> {
        let deployment = record::Deployment { replicas, generation: 1, revision: 1, ..record::Deployment::default() };
        self.put(keys::deployment(name), &deployment, 0).await;
        let mut ids = Vec::new();
        for (n, node) in on.iter().enumerate() {
            let id = format!("{name}-22222{}", n + 2);
            let wanted = record::Instance { deployment: name.to_owned(), wanted: true, ..record::Instance::default() };
            self.put(keys::instance(&id), &wanted, 0).await;
            let claim = record::Claim { node: (*node).to_owned(), ..record::Claim::default() };
            self.put(keys::claim(&id), &claim, 0).await;
            ids.push(id);
        }
        ids
    }

    fn replicas(&self, name: &str) -> i32 {
        self.processes.view.snapshot().deployments[name].value.replicas
    }

    fn wanted(&self) -> Vec<String> {
        let snapshot = self.processes.view.snapshot();
        snapshot.instances.iter().filter(|(_, i)| i.value.wanted).map(|(id, _)| id.clone()).collect()
    }

    /// Waits until a deployment's event says so.
    async fn told(&self, deployment: &str, words: &str) {
        let object = format!("deployment/{deployment}");
        let told = async {
            loop {
                let items = self.processes.store.list(&keys::events(&object)).await.unwrap().items;
                let events = items.iter().filter_map(|kv| records::decode::<record::Event>(kv).ok()?.event);
                let all: Vec<_> = events.map(|event| format!("{} {}", event.reason, event.message)).collect();
                if all.iter().any(|event| event.contains(words)) {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        let asked = format!("{object} does not tell \"{words}\"");
        tokio::time::timeout(Duration::from_secs(10), told).await.expect(&asked);
    }

    /// Keys of commands and answers.
    async fn mailbox(&self) -> usize {
        let count = async |prefix| self.processes.store.list(prefix).await.unwrap().items.len();
        count(keys::COMMANDS).await + count(keys::ANSWERS).await
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

fn process(pid: i64, owner: ProcessOwner, instance: &str) -> HostProcess {
    HostProcess {
        pid,
        start_ticks: 1,
        owner: owner.into(),
        instance: instance.to_owned(),
        node: "forged".to_owned(),
        ..HostProcess::default()
    }
}

/// What a node with these processes answers; it ends whatever it is told to.
fn with(processes: Vec<HostProcess>, not_listed: i64) -> impl Fn(&Command) -> Option<CommandAnswer> {
    move |command| match command {
        Command::ListProcesses(_) => {
            Some(CommandAnswer { processes: processes.clone(), not_listed, ..CommandAnswer::default() })
        }
        Command::EndProcesses(order) => {
            let ended = |p: &drover_proto::v1::ProcessName| ProcessResult {
                process: Some(HostProcess { pid: p.pid, start_ticks: p.start_ticks, ..HostProcess::default() }),
                action: ProcessAction::Ended.into(),
                message: "ended by SIGTERM".to_owned(),
            };
            Some(CommandAnswer { results: order.processes.iter().map(ended).collect(), ..CommandAnswer::default() })
        }
    }
}

#[tokio::test(start_paused = true)]
async fn what_a_node_leaves_out_and_a_node_that_is_silent_are_said_and_no_key_is_left() {
    let world = World::new().await;
    world.node("a", with(vec![process(7, ProcessOwner::Foreign, "")], 44)).await;
    world.node("b", |_: &Command| None).await;
    let failed = |_: &Command| Some(CommandAnswer { error: "no /proc".to_owned(), ..CommandAnswer::default() });
    world.node("c", failed).await;
    let listed = world.processes.list(ListProcessesRequest::default()).await.unwrap();
    assert_eq!(listed.processes.iter().map(|p| (p.node.as_str(), p.pid)).collect::<Vec<_>>(), [("a", 7)]);
    assert_eq!(listed.not_listed.iter().map(|n| (n.node.as_str(), n.processes)).collect::<Vec<_>>(), [("a", 44)]);
    let failures: Vec<_> = listed.unreachable.iter().map(|f| f.node.as_str()).collect();
    assert_eq!(failures, ["b", "c"]);
    assert!(listed.unreachable[1].message.contains("no /proc"), "{listed:?}");
    assert_eq!(world.mailbox().await, 0);
    let bad = ListProcessesRequest { page_size: -1, ..ListProcessesRequest::default() };
    assert!(world.processes.list(bad).await.unwrap_err().message().contains("page_size"));
}

#[tokio::test(start_paused = true)]
async fn all_of_a_node_are_its_own_instances_and_no_others() {
    let world = World::new().await;
    let ids = world.deployment("m", 3, &["a", "b", "b"]).await;
    let runs = vec![
        process(1, ProcessOwner::Owned, &ids[0]),
        // Taken over by b: to stop it here must not stop it there.
        process(2, ProcessOwner::Owned, &ids[1]),
        process(3, ProcessOwner::Foreign, ""),
        process(4, ProcessOwner::OtherAgent, ""),
        process(5, ProcessOwner::Unknown, ""),
    ];
    world.node("a", with(runs, 0)).await;
    world.node("b", |_: &Command| None).await;
    let request = |confirm| StopProcessRequest { node: "a".to_owned(), all: true, confirm, ..Default::default() };
    let answer = world.processes.stop("an operator", request(false)).await.unwrap();
    let done: Vec<_> = answer.results.iter().map(|r| (r.process.as_ref().map_or(0, |p| p.pid), r.action())).collect();
    use ProcessAction::{Draining, Ended, LeftAlone, WouldEnd};
    assert_eq!(done, [(0, Draining), (3, WouldEnd), (2, LeftAlone), (5, LeftAlone)], "{answer:#?}");
    assert_eq!((world.wanted(), world.replicas("m")), (ids[1..].to_vec(), 2));
    let answer = world.processes.stop("an operator", request(true)).await.unwrap();
    assert!(answer.results.iter().any(|r| r.action() == Ended), "{answer:#?}");
    assert_eq!((world.wanted(), world.replicas("m")), (ids[1..].to_vec(), 2), "nothing is lowered twice");
}

#[tokio::test(start_paused = true)]
async fn a_pid_stands_for_its_instance_only_on_the_node_that_owns_it() {
    let world = World::new().await;
    let ids = world.deployment("m", 1, &["b"]).await;
    world.node("a", with(vec![process(2, ProcessOwner::Owned, &ids[0])], 0)).await;
    world.node("b", with(vec![process(9, ProcessOwner::Owned, &ids[0])], 0)).await;
    let request = |node: &str, pid| StopProcessRequest { node: node.to_owned(), pid, ..Default::default() };
    let result = world.processes.stop("an operator", request("a", 2)).await.unwrap().result.unwrap();
    assert!(result.action() == ProcessAction::LeftAlone && result.message.contains("owned by node b"), "{result:?}");
    assert_eq!(world.wanted(), ids);
    let result = world.processes.stop("an operator", request("b", 9)).await.unwrap().result.unwrap();
    assert!(result.action() == ProcessAction::Draining, "{result:?}");
    assert_eq!((world.wanted(), world.replicas("m")), (vec![], 0));
}

#[tokio::test(start_paused = true)]
async fn what_is_stored_is_told_even_when_the_node_can_not_be_asked() {
    let world = World::new().await;
    let ids = world.deployment("m", 2, &["a", "gone"]).await;
    world.node("a", |_: &Command| None).await;
    for (n, id) in ids.iter().enumerate() {
        let request = StopProcessRequest { instance: id.clone(), force: true, ..Default::default() };
        let answer = world.processes.stop("an operator", request).await.unwrap();
        let result = answer.result.unwrap();
        assert!(result.action() == ProcessAction::Draining && result.message.contains("is away"), "{result:?}");
        assert_eq!(answer.unreachable.len(), 1);
        assert_eq!(world.replicas("m"), 1 - i32::try_from(n).unwrap());
    }
    assert_eq!((world.wanted(), world.mailbox().await), (vec![], 0));
    let request = StopProcessRequest { instance: "m-zzzzzz".to_owned(), ..Default::default() };
    let status = world.processes.stop("an operator", request).await.unwrap_err();
    assert_eq!(reason_of(&status).as_deref(), Some(reason::NOT_FOUND));
}

#[tokio::test(start_paused = true)]
async fn many_who_stop_the_same_at_once_lower_the_number_once() {
    let world = World::new().await;
    let ids = world.deployment("m", 4, &["a", "a", "a", "a"]).await;
    let stop = |id: &String| {
        let request = StopProcessRequest { instance: id.clone(), ..Default::default() };
        let processes = world.processes.clone();
        async move { processes.stop("an operator", request).await }
    };
    // Each instance twice, as from two coordinators.
    let answers = futures::future::join_all(ids[..2].iter().chain(&ids[..2]).map(stop)).await;
    for answer in answers {
        assert!(answer.is_ok(), "{answer:?}");
    }
    assert_eq!((world.wanted(), world.replicas("m")), (ids[2..].to_vec(), 2));
}

#[tokio::test(start_paused = true)]
async fn a_stop_whose_answer_was_lost_is_told_as_what_it_did() {
    let faulty = Arc::new(Faulty::start());
    let world = World::over(faulty.clone()).await;
    let ids = world.deployment("m", 2, &["a", "a"]).await;
    for (left, request) in [
        (1, StopProcessRequest { instance: ids[0].clone(), ..Default::default() }),
        (0, StopProcessRequest { name: "m".to_owned(), ..Default::default() }),
    ] {
        faulty.unanswered.store(true, SeqCst);
        let answer = world.processes.stop("an operator", request).await.unwrap();
        assert_eq!(world.replicas("m"), left);
        let said = format!("m asks for {left} instead of {}", left + 1);
        assert!(answer.results.iter().any(|r| r.message.contains(&said)), "{said}: {answer:#?}");
        world.told("m", &format!("from {} to {left} replicas", left + 1)).await;
    }
}

#[tokio::test(start_paused = true)]
async fn what_was_stopped_before_a_failure_is_told_all_the_same() {
    let world = World::new().await;
    let ids = world.deployment("m", 1, &["a"]).await;
    world.deployment("n", 1, &["a"]).await;
    world.node("a", |_: &Command| None).await;
    // A record that can't be read: the view keeps the last good one, and every write that relies on it fails.
    let garbage = Op::Put { key: keys::deployment("n"), value: vec![0xff; 3], lease: 0 };
    world.processes.store.txn(Txn { then: vec![garbage], ..Txn::default() }).await.unwrap();
    let request = StopProcessRequest { node: "a".to_owned(), all: true, ..Default::default() };
    let failed = world.processes.stop("an operator", request).await.unwrap_err();
    assert!(failed.message().contains("deployment n was changed by others"), "{failed}");
    assert!(!world.wanted().contains(&ids[0]));
    world.told("m", &format!("an operator has {} stopped", ids[0])).await;
}

#[tokio::test(start_paused = true)]
async fn what_this_coordinator_does_not_see_is_not_said_to_be_stopping() {
    let world = World::new().await;
    world.deployment("m", 1, &["a"]).await;
    world.stop.cancel();
    tokio::time::sleep(Duration::from_secs(1)).await;
    let wanted = record::Instance { deployment: "m".to_owned(), wanted: true, ..record::Instance::default() };
    let put = records::put(keys::instance("m-zzzzzz"), &wanted, 0);
    world.processes.store.txn(Txn { then: vec![put], ..Txn::default() }).await.unwrap();
    let request = StopProcessRequest { instance: "m-zzzzzz".to_owned(), ..Default::default() };
    let status = world.processes.stop("an operator", request).await.unwrap_err();
    assert_eq!(reason_of(&status).as_deref(), Some(reason::STORE_UNAVAILABLE), "{status}");
}

/// What was done to each process, by its pid.
fn actions(results: &[ProcessResult]) -> Vec<(i64, ProcessAction)> {
    results.iter().map(|r| (r.process.as_ref().map_or(0, |p| p.pid), r.action())).collect()
}

#[tokio::test(start_paused = true)]
async fn force_ends_the_process_of_the_owner_and_no_other() {
    let world = World::new().await;
    let ids = world.deployment("m", 1, &["b"]).await;
    // It ran on a before; and something there only says that it is of the instance.
    let stale = vec![process(1, ProcessOwner::Owned, &ids[0]), process(2, ProcessOwner::Unknown, &ids[0])];
    world.node("a", with(stale, 0)).await;
    let own = [(7, ProcessOwner::Owned), (8, ProcessOwner::Unknown), (9, ProcessOwner::Owned)];
    world.node("b", with(own.map(|(pid, owner)| process(pid, owner, &ids[0])).into(), 0)).await;
    let request = StopProcessRequest { name: "m".to_owned(), force: true, confirm: true, ..Default::default() };
    let answer = world.processes.stop("an operator", request).await.unwrap();
    let ended = |pid| (pid, ProcessAction::Ended);
    assert_eq!(actions(&answer.results), [ended(7), ended(9)], "one for each process: {answer:#?}");
}

#[tokio::test(start_paused = true)]
async fn a_name_ends_what_bears_it_and_belongs_to_nobody_and_only_when_that_is_confirmed() {
    let world = World::new().await;
    let named = |pid, owner, alias: &str| HostProcess { model_alias: alias.to_owned(), ..process(pid, owner, "") };
    let runs = vec![
        named(1, ProcessOwner::Foreign, "m"),
        named(2, ProcessOwner::Foreign, "other"),
        named(3, ProcessOwner::OtherAgent, "m"),
        named(4, ProcessOwner::Unknown, "m"),
        named(5, ProcessOwner::Stale, "m"),
    ];
    world.node("a", with(runs, 0)).await;
    for (confirm, done) in [(false, ProcessAction::WouldEnd), (true, ProcessAction::Ended)] {
        let request = StopProcessRequest { name: "m".to_owned(), confirm, ..Default::default() };
        let answer = world.processes.stop("an operator", request).await.unwrap();
        assert_eq!(actions(&answer.results), [(1, done), (5, done)], "{answer:#?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_pid_of_another_agent_or_of_unknown_owner_is_left_alone_whatever_is_confirmed() {
    let world = World::new().await;
    let runs = vec![
        process(3, ProcessOwner::Foreign, ""),
        process(4, ProcessOwner::OtherAgent, ""),
        process(5, ProcessOwner::Unknown, ""),
    ];
    world.node("a", with(runs, 0)).await;
    use ProcessAction::{Ended, LeftAlone, WouldEnd};
    let cases = [(3, false, WouldEnd), (3, true, Ended), (4, true, LeftAlone), (5, true, LeftAlone)];
    for (pid, confirm, done) in cases {
        let request = StopProcessRequest { node: "a".to_owned(), pid, confirm, force: true, ..Default::default() };
        let answer = world.processes.stop("an operator", request).await.unwrap();
        assert_eq!(actions(&answer.results), [(pid, done)], "{answer:#?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_clean_up_only_says_what_it_would_do_unless_told_otherwise() {
    let world = World::new().await;
    let runs = vec![
        process(1, ProcessOwner::Owned, "m-222222"),
        process(2, ProcessOwner::Stale, ""),
        process(3, ProcessOwner::Foreign, ""),
        process(4, ProcessOwner::Unknown, ""),
    ];
    world.node("a", with(runs, 0)).await;
    use ProcessAction::{Ended, WouldEnd};
    for (dry_run, done) in [(None, WouldEnd), (Some(true), WouldEnd), (Some(false), Ended)] {
        let request = CleanupProcessesRequest { dry_run, ..Default::default() };
        let answer = world.processes.clean_up("an operator", request).await.unwrap();
        assert_eq!(actions(&answer.results), [(2, done), (3, done)], "{answer:#?}");
    }
}
