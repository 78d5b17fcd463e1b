//! Records in their typed form: encoded and decoded, and whole snapshots made of them.
//!
//! A record that can't be read must not stop the world: it is reported, and the last good one kept.

use super::{Change, Error, KeyValue, Listing, Op, keys};
use crate::plan::snapshot::{Map, Snapshot, Stored};
use drover_proto::mutant;
use prost::Message;
use std::{collections::BTreeSet, sync::Arc};

/// Name of the breakage that takes a record which can't be read for none.
pub const UNREADABLE_SAYS_NO: &str = "unreadable-says-no";

/// The operation that writes a record; `lease` 0 for none.
#[must_use]
pub fn put<M: Message>(key: impl Into<String>, record: &M, lease: i64) -> Op {
    Op::Put { key: key.into(), value: record.encode_to_vec(), lease }
}

/// Reads a record.
///
/// # Errors
/// [`Error::Corrupt`], which names the key.
pub fn decode<M: Message + Default>(kv: &KeyValue) -> Result<M, Error> {
    M::decode(kv.value.as_slice()).map_err(|e| Error::Corrupt { key: kv.key.clone(), what: e.to_string() })
}

/// Reads a record together with its revisions.
///
/// # Errors
/// As [`decode`].
pub fn stored<M: Message + Default>(kv: &KeyValue) -> Result<Stored<M>, Error> {
    Ok(Stored { value: decode(kv)?, create_revision: kv.create_revision, mod_revision: kv.mod_revision })
}

/// A snapshot of everything listed, and the records that are left out because they can't be read.
#[must_use]
pub fn snapshot(listing: &Listing) -> (Snapshot, Vec<Error>) {
    snapshot_after(listing, &Snapshot::default())
}

/// As [`snapshot`], for a listing after an interruption: in the place of a record that can't be read now stands the one of
/// the last snapshot, if there is one. Its old `mod_revision` makes every transaction that relies on it fail.
#[must_use]
pub fn snapshot_after(listing: &Listing, last: &Snapshot) -> (Snapshot, Vec<Error>) {
    let mut snapshot = Snapshot { revision: listing.revision, unreadable: BTreeSet::new(), ..last.clone() };
    let listed: BTreeSet<&str> = listing.items.iter().map(|kv| kv.key.as_str()).collect();
    for (prefix, place) in places(&mut snapshot) {
        place.retain(&|name| listed.contains(format!("{prefix}{name}").as_str()));
    }
    let problems = listing.items.iter().filter_map(|kv| put_into(&mut snapshot, kv).err()).collect();
    (snapshot, problems)
}

/// Applies one change; keys that no snapshot has (events, telemetry, access, unknown ones) change nothing. The snapshot's
/// own revision is left to the caller, who knows when a revision is complete.
///
/// # Errors
/// [`Error::Corrupt`]: the record is left as it was.
pub fn apply(snapshot: &mut Snapshot, change: &Change) -> Result<(), Error> {
    match change {
        Change::Put(kv) => put_into(snapshot, kv),
        Change::Delete { key, .. } => {
            snapshot.unreadable.remove(key);
            if let Some((place, name)) = place(snapshot, key) {
                place.remove(name);
            }
            Ok(())
        }
    }
}

fn put_into(snapshot: &mut Snapshot, kv: &KeyValue) -> Result<(), Error> {
    let read = place(snapshot, &kv.key).map_or(Ok(()), |(place, name)| place.put(name, kv));
    match read {
        Ok(()) => drop(snapshot.unreadable.remove(&kv.key)),
        Err(_) if mutant::on(UNREADABLE_SAYS_NO) => {}
        Err(_) => drop(snapshot.unreadable.insert(kv.key.clone())),
    }
    read
}

/// Where records of one kind stand in a snapshot: a map of them by name, or a single one, whose name is empty.
trait Place {
    fn put(&mut self, name: &str, kv: &KeyValue) -> Result<(), Error>;
    fn remove(&mut self, name: &str);
    fn retain(&mut self, keep: &dyn Fn(&str) -> bool);
}

impl<M: Message + Default> Place for Map<M> {
    fn put(&mut self, name: &str, kv: &KeyValue) -> Result<(), Error> {
        self.insert(name.to_owned(), Arc::new(stored(kv)?));
        Ok(())
    }

    fn remove(&mut self, name: &str) {
        Self::remove(self, name);
    }

    fn retain(&mut self, keep: &dyn Fn(&str) -> bool) {
        let gone: Vec<String> = self.keys().filter(|name| !keep(name)).cloned().collect();
        gone.iter().for_each(|name| drop(Self::remove(self, name)));
    }
}

impl<M: Message + Default> Place for Option<Arc<Stored<M>>> {
    fn put(&mut self, _: &str, kv: &KeyValue) -> Result<(), Error> {
        *self = Some(Arc::new(stored(kv)?));
        Ok(())
    }

    fn remove(&mut self, _: &str) {
        *self = None;
    }

    fn retain(&mut self, keep: &dyn Fn(&str) -> bool) {
        if !keep("") {
            *self = None;
        }
    }
}

/// Every place with its key, or with the prefix of its keys, which ends with '/'.
fn places(snapshot: &mut Snapshot) -> [(&'static str, &mut dyn Place); 15] {
    [
        (keys::SCHEMA, &mut snapshot.schema),
        (keys::HALT, &mut snapshot.halt),
        (keys::LEADER, &mut snapshot.leader),
        (keys::FREEZE, &mut snapshot.freeze),
        (keys::DEPLOYMENTS, &mut snapshot.deployments),
        (keys::REVISIONS, &mut snapshot.revisions),
        (keys::INSTANCES, &mut snapshot.instances),
        (keys::UNPLACED, &mut snapshot.unplaced),
        (keys::TAKEN, &mut snapshot.taken),
        (keys::SESSIONS, &mut snapshot.sessions),
        (keys::CLAIMS, &mut snapshot.claims),
        (keys::RUNS, &mut snapshot.runs),
        (keys::STATUS, &mut snapshot.statuses),
        (keys::NODES, &mut snapshot.nodes),
        (keys::COMMANDS, &mut snapshot.commands),
    ]
}

/// The place of a key, and its name there.
fn place<'s, 'k>(snapshot: &'s mut Snapshot, key: &'k str) -> Option<(&'s mut dyn Place, &'k str)> {
    places(snapshot).into_iter().find_map(|(at, place)| {
        let name = key.strip_prefix(at)?;
        (at.ends_with('/') != name.is_empty()).then_some((place, name))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use drover_proto::store::v1 as record;

    fn kv(key: &str, record: &impl Message, revision: i64) -> KeyValue {
        KeyValue {
            key: key.to_owned(),
            value: record.encode_to_vec(),
            create_revision: revision,
            mod_revision: revision,
            version: 1,
            lease: 0,
        }
    }

    fn node(machine: &str) -> record::Node {
        record::Node { machine_id: machine.to_owned(), ..record::Node::default() }
    }

    fn corrupt(key: &str) -> KeyValue {
        KeyValue { value: vec![0xff; 3], ..kv(key, &node("x"), 9) }
    }

    #[test]
    fn a_listing_becomes_a_snapshot_and_unknown_keys_are_passed_over() {
        let items = vec![
            kv("claims/m-1", &record::Claim { node: "a".to_owned(), ..Default::default() }, 3),
            corrupt("events/instance/m-1/0001"),
            kv("nodes/a", &node("id-a"), 2),
            corrupt("schemata"),
            kv(
                "schema",
                &record::Schema { generation: 4, format: 1, oldest_writer: 1, ..record::Schema::default() },
                1,
            ),
            corrupt("telemetry/e1"),
        ];
        let (snapshot, problems) = snapshot(&Listing { items, revision: 9 });
        assert_eq!(problems, []);
        assert_eq!(snapshot.revision, 9);
        assert_eq!(snapshot.generation(), 4);
        assert_eq!(snapshot.nodes["a"].value.machine_id, "id-a");
        assert_eq!(snapshot.token("m-1").unwrap().to_string(), "4.3");
    }

    #[test]
    fn a_corrupt_record_is_reported_and_the_last_good_one_kept() {
        let (mut snapshot, _) = snapshot(&Listing { items: vec![kv("nodes/a", &node("good"), 2)], revision: 2 });

        let problem = apply(&mut snapshot, &Change::Put(corrupt("nodes/a"))).unwrap_err();
        assert!(snapshot.unreadable.contains("nodes/a"));
        assert!(problem.to_string().contains("nodes/a"), "{problem}");
        assert_eq!(snapshot.nodes["a"].value.machine_id, "good");

        let items = vec![corrupt("nodes/a"), kv("nodes/b", &node("b"), 5)];
        let (snapshot, problems) = snapshot_after(&Listing { items, revision: 9 }, &snapshot);
        assert_eq!(problems.len(), 1);
        assert_eq!((snapshot.nodes["a"].value.machine_id.as_str(), snapshot.nodes["a"].mod_revision), ("good", 2));
        assert_eq!(snapshot.nodes["b"].value.machine_id, "b");
        assert_eq!(snapshot.unreadable, BTreeSet::from(["nodes/a".to_owned()]));
        let mut mended = snapshot.clone();
        apply(&mut mended, &Change::Put(kv("nodes/a", &node("mended"), 10))).unwrap();
        assert!(mended.unreadable.is_empty());
        let mut removed = snapshot;
        apply(&mut removed, &Change::Delete { key: "nodes/a".to_owned(), revision: 10 }).unwrap();
        assert!(removed.unreadable.is_empty());
    }

    #[test]
    fn what_a_later_listing_lacks_is_gone() {
        let items = vec![kv("halt", &record::Halt::default(), 2), kv("nodes/a", &node("a"), 3)];
        let (before, _) = snapshot(&Listing { items, revision: 3 });
        let (after, _) = snapshot_after(&Listing { items: vec![], revision: 7 }, &before);
        assert!(after.halt.is_none() && after.nodes.is_empty());

        let mut changed = before;
        apply(&mut changed, &Change::Delete { key: "nodes/a".to_owned(), revision: 4 }).unwrap();
        apply(&mut changed, &Change::Delete { key: "halt".to_owned(), revision: 4 }).unwrap();
        assert!(changed.halt.is_none() && changed.nodes.is_empty());
    }

    #[test]
    fn what_is_put_is_what_is_read() {
        let Op::Put { key, value, lease } = put(keys::node("a"), &node("id"), 7) else { panic!("no put") };
        assert_eq!((key.as_str(), lease), ("nodes/a", 7));
        let read: record::Node = decode(&KeyValue { value, ..corrupt(&key) }).unwrap();
        assert_eq!(read.machine_id, "id");
    }
}
