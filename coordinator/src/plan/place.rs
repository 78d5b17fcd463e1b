//! PURE. Placement: which nodes may claim an instance, best first.

use super::{Input, Offer, avoid, snapshot::Stored};
use drover_proto::{
    PROTOCOL_LEASE_LOST, limits,
    store::v1 as record,
    v1::{DeploymentSpec, OnLeaseLost},
};
use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
    fmt,
};

/// Nodes of which it is told what they lack; the others are counted.
const LACKS_TOLD: usize = 5;

/// What is taken of each node: by claims, by runs without one, by offers that stand, and by those that this plan makes.
/// Counted once for a plan; so one plan does not promise the same room twice, and neither do two in a row.
#[derive(Debug, Default)]
pub(super) struct Rooms<'a> {
    bytes: BTreeMap<&'a str, i64>,
    /// By deployment and node.
    replicas: BTreeMap<(&'a str, &'a str), usize>,
    /// Deployments and nodes that are avoided now for some instance of them: others of the same are better placed elsewhere.
    avoided: BTreeSet<(&'a str, &'a str)>,
}

impl<'a> Rooms<'a> {
    pub(super) fn of(input: &Input<'a>) -> Self {
        let snapshot = input.snapshot;
        let mut rooms = Self::default();
        for (id, claim) in &snapshot.claims {
            let wanted = snapshot.instances.get(id).filter(|i| i.value.wanted);
            rooms.take(&claim.value.node, claim.value.memory_bytes, wanted.map(|i| i.value.deployment.as_str()));
        }
        for (name, node) in &snapshot.nodes {
            rooms.take(name, snapshot.unclaimed_bytes(name, &node.value), None);
        }
        for (id, instance) in &snapshot.instances {
            let avoided = instance.value.avoid.iter().map(|avoid| avoid.node.as_str());
            let avoided = avoided.filter(|node| avoid::in_force(&instance.value, node, input.now_ms).is_some());
            rooms.avoided.extend(avoided.map(|node| (instance.value.deployment.as_str(), node)));
            let standing = snapshot.standing_offer(id, instance, input.now_ms);
            let standing = standing.filter(|_| input.offer_left_ms(&instance.value) > 0);
            let best = standing.and_then(|offer| offer.candidates.first());
            let (Some(best), Some(spec)) = (best, snapshot.spec_of(&instance.value)) else { continue };
            let node = snapshot.nodes.get(best);
            let file_bytes = node.and_then(|node| model_size(&node.value, &spec.model_path)).unwrap_or(0);
            let runs = node.is_some_and(|node| snapshot.unclaimed_of(best, &node.value, id).is_some());
            let need = if runs { 0 } else { need_bytes(spec, file_bytes) };
            rooms.take(best, need, Some(&instance.value.deployment));
        }
        rooms
    }

    fn take(&mut self, node: &'a str, bytes: i64, replica_of: Option<&'a str>) {
        let taken = self.bytes.entry(node).or_default();
        *taken = taken.saturating_add(bytes);
        if let Some(deployment) = replica_of {
            *self.replicas.entry((deployment, node)).or_default() += 1;
        }
    }
}

/// What a node lacks; for people.
enum Lack<'a> {
    Session,
    Inventory,
    Label(&'a str, &'a str),
    LeaseLost,
    Model(&'a str),
    Memory { free: i64, need: i64 },
    Owner,
    Avoided(&'a record::Avoid),
}

impl fmt::Display for Lack<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Session => write!(f, "is not connected"),
            Self::Inventory => write!(f, "has joined and not said yet what runs on it"),
            Self::Label(key, value) => write!(f, "does not bear the label {key}={value}"),
            Self::LeaseLost => write!(f, "has an agent that does not know on_lease_lost = \"stop\": upgrade it"),
            Self::Model(path) => write!(f, "has no model file {path}"),
            Self::Memory { free, need } => write!(f, "has {free} bytes of memory left, {need} are needed"),
            Self::Owner => write!(f, "owns it"),
            Self::Avoided(avoid) => {
                let until = avoid.until.map(|until| prost_types::Timestamp { nanos: 0, ..until }.to_string());
                let (until, why) = (until.unwrap_or_default(), &avoid.why);
                write!(f, "is AVOIDED until {until}, since it had claimed it in vain ({why})")
            }
        }
    }
}

/// Room of a node for a spec, in bytes.
struct Room {
    free: i64,
    need: i64,
    capacity: i64,
}

/// How long a node is offered nothing, in milliseconds: what it is about to claim again needs its room. An agent that never
/// says what runs there is not waited for without an end.
fn inventory_wait_ms(input: &Input<'_>, name: &str, node: &record::Node, session: &record::Session) -> i64 {
    if node.inventory_of == session.session_id {
        return 0;
    }
    input.settings.grace_ms.saturating_sub(input.joined_for(name)).max(0)
}

/// When the first of the nodes that are offered nothing for now is waited for no more, in milliseconds.
pub(super) fn inventory_in_ms(input: &Input<'_>) -> Option<i64> {
    let waits = input.snapshot.sessions.iter().filter_map(|(name, session)| {
        let node = input.snapshot.nodes.get(name)?;
        Some(inventory_wait_ms(input, name, &node.value, &session.value))
    });
    waits.filter(|ms| *ms > 0).min()
}

/// When the first of the nodes that are avoided for an instance may have it again, in milliseconds.
pub(super) fn avoided_for_ms(input: &Input<'_>, instance: &record::Instance) -> Option<i64> {
    let left = instance.avoid.iter().map(|avoid| avoid::left_ms(instance, &avoid.node, input.now_ms));
    left.filter(|ms| *ms > 0).min()
}

/// Filters one node of which `taken` bytes are taken.
fn room<'a>(
    input: &Input<'_>,
    spec: &'a DeploymentSpec,
    name: &str,
    node: &record::Node,
    taken: i64,
) -> Result<Room, Lack<'a>> {
    let Some(session) = input.snapshot.sessions.get(name) else { return Err(Lack::Session) };
    if inventory_wait_ms(input, name, node, &session.value) > 0 {
        return Err(Lack::Inventory);
    }
    if let Some((key, value)) = spec.node_labels.iter().find(|(k, v)| node.labels.get(*k) != Some(v)) {
        return Err(Lack::Label(key, value));
    }
    if spec.on_lease_lost() == OnLeaseLost::Stop && node.protocol < PROTOCOL_LEASE_LOST {
        return Err(Lack::LeaseLost);
    }
    let Some(file_bytes) = model_size(node, &spec.model_path) else { return Err(Lack::Model(&spec.model_path)) };
    let need = need_bytes(spec, file_bytes);
    let capacity = node.capacity.as_ref().map_or(0, |c| c.memory_bytes);
    let free = capacity.saturating_sub(taken);
    if free < need { Err(Lack::Memory { free, need }) } else { Ok(Room { free, need, capacity }) }
}

/// Whether a node could take an instance if so many bytes of it became free.
pub(super) fn fits_when_freed(
    input: &Input<'_>,
    spec: &DeploymentSpec,
    name: &str,
    freed: i64,
    rooms: &Rooms<'_>,
) -> bool {
    let taken = rooms.bytes.get(name).copied().unwrap_or(0).saturating_sub(freed);
    input.snapshot.nodes.get(name).is_some_and(|node| room(input, spec, name, &node.value, taken).is_ok())
}

/// Size of a model file on a node; `None` when it is not there, `Some(0)` when that is not known.
fn model_size(node: &record::Node, path: &str) -> Option<i64> {
    let models = node.models.as_ref()?;
    let found = models.files.iter().find(|f| names_file(path, &f.path, &models.roots));
    found.map(|f| f.size_bytes).or(models.truncated.then_some(0))
}

/// Whether a deployment's model_path means this file of a node with these roots.
pub(crate) fn names_file(path: &str, file: &str, roots: &[String]) -> bool {
    if path.starts_with('/') {
        return path == file;
    }
    roots.iter().any(|root| {
        file.strip_prefix(root.trim_end_matches('/')).is_some_and(|rest| rest.strip_prefix('/') == Some(path))
    })
}

/// Memory that an instance needs on a node, in bytes: what the deployment says, else the file and an overhead.
fn need_bytes(spec: &DeploymentSpec, file_bytes: i64) -> i64 {
    spec.memory_bytes.unwrap_or(file_bytes.saturating_add(limits::defaults::MEMORY_OVERHEAD_BYTES))
}

/// A small mixing function (splitmix64's finaliser): the order among equals, from the seed.
pub(super) fn mix(seed: u64, text: &str) -> u64 {
    let mut z =
        text.bytes().fold(seed ^ 0x9e37_79b9_7f4a_7c15, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Nodes that an instance's last offer named, if it ran out unused: they have declined, or did not answer.
fn declined<'a>(input: &Input<'a>, id: &str, instance: Option<&'a Stored<record::Instance>>) -> &'a [String] {
    let Some(instance) = instance else { return &[] };
    let used = input.snapshot.taken.get(id).is_some_and(|t| t.mod_revision >= instance.mod_revision);
    instance.value.offer.as_ref().filter(|_| !used).map_or(&[], |offer| &offer.candidates)
}

/// The best nodes for an instance, or what each lacks. Filter first, then score; the first candidate's room is taken.
/// After an offer in vain chance decides among those whom it did not name: whoever can take it is asked in the end. `owner` is
/// who has it, when it is to be taken from it.
pub(super) fn offer<'a>(
    input: &Input<'a>,
    deployment: &'a str,
    spec: &DeploymentSpec,
    id: &str,
    instance: Option<&'a Stored<record::Instance>>,
    owner: Option<&str>,
    rooms: &mut Rooms<'a>,
) -> Result<Offer, String> {
    let snapshot = input.snapshot;
    let declined = declined(input, id, instance);
    let chance = mix(input.seed, id);
    let mut fit = Vec::new();
    let (mut lacks, mut lacking) = (Vec::new(), 0_usize);
    for (name, node) in &snapshot.nodes {
        // What is taken from its owner goes first to who runs it already, and would claim it again if it could: that needs no other
        // room. What nobody owns its nodes had their time to claim again before it is offered at all.
        let own = owner.and_then(|_| snapshot.unclaimed_of(name, &node.value, id));
        let taken = rooms.bytes.get(name.as_str()).copied().unwrap_or(0).saturating_sub(own.unwrap_or(0));
        let avoided = instance.and_then(|instance| avoid::in_force(&instance.value, name, input.now_ms));
        let room = match (owner == Some(name), avoided) {
            (true, _) => Err(Lack::Owner),
            (false, Some(avoid)) => Err(Lack::Avoided(avoid)),
            (false, None) => room(input, spec, name, &node.value, taken),
        };
        let room = match room {
            Ok(room) => room,
            Err(lack) => {
                // Who owns it is told besides.
                let told = !matches!(lack, Lack::Owner);
                lacking += usize::from(told);
                if told && lacking <= LACKS_TOLD {
                    lacks.push(format!("{name} {lack}"));
                }
                continue;
            }
        };
        // Spread first, then the share of memory that stays free (in thousandths), then chance.
        let score = declined.is_empty().then(|| {
            let replicas = rooms.replicas.get(&(deployment, name.as_str())).copied().unwrap_or(0);
            (replicas, Reverse((room.free - room.need).saturating_mul(1000) / room.capacity.max(1)))
        });
        let avoided = rooms.avoided.contains(&(deployment, name.as_str()));
        fit.push((declined.contains(name), own.is_none(), avoided, score, mix(chance, name), name, room.need));
    }
    fit.sort_unstable();
    let Some((_, elsewhere, _, _, _, best, need)) = fit.first() else {
        if lacking > LACKS_TOLD {
            lacks.push(format!("and {} nodes more", lacking - LACKS_TOLD));
        }
        let nobody = if owner.is_some() { "there is none" } else { "no node has ever joined" };
        return Err(if lacks.is_empty() { nobody.to_owned() } else { lacks.join("; ") });
    };
    // Re-adoption before replacement: who runs it already is asked alone.
    let (few, need) = if *elsewhere { (input.settings.candidates.max(1), *need) } else { (1, 0) };
    rooms.take(best.as_str(), need, Some(deployment));
    let best_few = fit.iter().take(few);
    Ok(Offer {
        candidates: best_few.map(|(_, _, _, _, _, name, _)| (*name).clone()).collect(),
        deadline_ms: input.now_ms + input.settings.offer_deadline_ms,
        halt_generation: snapshot.halt_generation(),
    })
}
