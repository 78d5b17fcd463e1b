//! What judging costs, beside what the view itself does with the same changes.

use super::*;
use crate::store::{Change, Changes, KeyValue};
use prost::Message;

const NODES: usize = 500;
const INSTANCES: usize = 5000;

/// A history that is made up: one change a revision but for claims.
#[derive(Default)]
struct History {
    revision: i64,
    batches: Vec<Changes>,
    versions: BTreeMap<String, (i64, i64)>,
}

impl History {
    fn write(&mut self, puts: Vec<(String, Vec<u8>, i64)>) -> i64 {
        self.revision += 1;
        let revision = self.revision;
        let changes = puts.into_iter().map(|(key, value, lease)| {
            let (create_revision, version) =
                *self.versions.entry(key.clone()).and_modify(|known| known.1 += 1).or_insert((revision, 1));
            Change::Put(KeyValue { key, value, create_revision, mod_revision: revision, version, lease })
        });
        self.batches.push(Changes { changes: changes.collect(), revision });
        revision
    }

    fn put(key: String, record: &impl Message) -> (String, Vec<u8>, i64) {
        (key, record.encode_to_vec(), 0)
    }

    fn session(node: &str, version: u64) -> (String, Vec<u8>, i64) {
        let session = record::Session { session_id: "s".to_owned(), lease: 7, version, ..record::Session::default() };
        (keys::session(node), session.encode_to_vec(), 7)
    }

    /// A fleet begins, loses half of its nodes, and goes on.
    fn of_a_fleet() -> Vec<Changes> {
        let mut history = Self::default();
        let schema = record::Schema { generation: 1, format: 1, oldest_writer: 1, ..Default::default() };
        history.write(vec![Self::put(keys::SCHEMA.to_owned(), &schema)]);
        let deployment = record::Deployment { revision: 1, replicas: 5000, ..Default::default() };
        history.write(vec![Self::put(keys::deployment("m"), &deployment)]);
        let node = |n: usize| format!("n{n}");
        let mut sessions = Vec::new();
        for n in 0..NODES {
            let capacity = Some(Capacity { memory_bytes: 1000, ..Capacity::default() });
            let told = record::Node { capacity, inventory_of: "s".to_owned(), ..record::Node::default() };
            sessions.push(history.write(vec![Self::session(&node(n), 1), Self::put(keys::node(&node(n)), &told)]));
        }
        let mut version = vec![1; NODES];
        for i in 0..INSTANCES {
            let (id, n) = (format!("m-{i:06}"), i % NODES);
            let offer = Some(record::Offer { candidates: vec![node(n)], ..record::Offer::default() });
            let instance =
                record::Instance { deployment: "m".to_owned(), revision: 1, wanted: true, offer, ..Default::default() };
            let offer_revision = history.write(vec![Self::put(keys::instance(&id), &instance)]);
            version[n] += 1;
            let claim = record::Claim {
                node: node(n),
                session_id: "s".to_owned(),
                nonce: "n".to_owned(),
                session_revision: sessions[n],
                offer_revision,
                memory_bytes: 1,
                ..Default::default()
            };
            let taken = record::Taken { node: node(n), nonce: "n".to_owned() };
            let revision = history.write(vec![
                Self::session(&node(n), version[n]),
                (keys::claim(&id), claim.encode_to_vec(), 7),
                Self::put(keys::taken(&id), &taken),
            ]);
            sessions[n] = revision;
            let token = Some(Token { generation: 1, revision });
            for state in [InstanceState::Starting, InstanceState::Loading, InstanceState::Ready] {
                let status = record::Status { token, node: node(n), state: state.into(), ..Default::default() };
                history.write(vec![Self::put(keys::status(&id), &status)]);
            }
        }
        for n in 0..NODES / 2 {
            history.revision += 1;
            let revision = history.revision;
            let claims = (n..INSTANCES).step_by(NODES).map(|i| keys::claim(&format!("m-{i:06}")));
            let gone = claims.chain([keys::session(&node(n))]);
            let changes = gone.map(|key| Change::Delete { key, revision }).collect();
            history.batches.push(Changes { changes, revision });
        }
        history.batches
    }
}

#[test]
fn judging_a_fleet_costs_a_few_times_what_the_view_does_with_the_same_changes() {
    let history = History::of_a_fleet();
    #[allow(clippy::disallowed_methods, reason = "measured is what it really takes")]
    let now = std::time::Instant::now;
    let begun = now();
    let mut snapshot = Snapshot::default();
    for change in history.iter().flat_map(|changes| &changes.changes) {
        records::apply(&mut snapshot, change).unwrap();
    }
    let applied = begun.elapsed();
    let begun = now();
    let mut checker = Checker::new(Settings { grace_ms: GRACE, slack_ms: 0, orders: false });
    history.iter().for_each(|changes| checker.store(NOW, changes));
    let judged = begun.elapsed();
    assert_eq!(checker.violations().first(), None);
    println!("{} revisions: applied in {applied:?}, judged in {judged:?}", history.len());
    assert!(judged < applied * 20, "judged in {judged:?}, applied in {applied:?}");
}
